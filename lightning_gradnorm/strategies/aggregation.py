"""Aggregations: strategies that turn the T task gradients, the rows of a matrix J, into one gradient.

Most of them are weightings, ``λ @ J``, whose weights depend on J only through its Gramian ``J Jᵀ``. At the representation
each rank holds the columns of its own samples, so the Gramians of all ranks add up: summing T² numbers gives every rank
exactly the same weights. The formulas are TorchJD's, or one file each in this folder.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchjd import Stateful
from torchjd import aggregation as jd

from lightning_gradnorm._messages import kind_of
from lightning_gradnorm.strategies.exact import solver_of
from lightning_gradnorm.strategies.factory import TaskAware, move_to
from lightning_gradnorm.strategies.facts import Input, any_part, facts_of
from lightning_gradnorm.strategies.rng import seeded_rng
from lightning_gradnorm.strategies.scalarization import OptimizerFactory, ScalarizationRule
from lightning_gradnorm.strategies.snapshot import load_snapshot, snapshot


class AggregationRule(ScalarizationRule):
    """An aggregator with all its state.

    Args:
        tasks: the tasks' names, in the order of the rows.
        aggregator: a `torchjd.aggregation.Aggregator`, or a `Weighting` of the Gramian.
        scalarizer: weights the losses before their gradients are taken; ``None`` for weights of 1.
        of_parameters: True if the gradients are those of parameters, the same entries in every step.
        optimizer: makes the optimizer of the scalarizer's parameters.
        seed: seed of the random numbers that the aggregator draws.
        dtype: precision of the weights.
        device: device of the gradients.

    Raises:
        ValueError: the aggregator cannot be used here, or not for this number of tasks.

    Example:
        >>> from torchjd.aggregation import MGDA
        >>> rule = AggregationRule(["seg", "depth"], MGDA())
        >>> J = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> rule.weigh_gradients(J @ J.T)
        tensor([0.2000, 0.8000])
    """

    needs: ClassVar[Literal["losses", "gradients"]] = "gradients"
    name = "Aggregation"

    def __init__(
        self,
        tasks: Sequence[str],
        aggregator: nn.Module,
        scalarizer: nn.Module | None = None,
        *,
        of_parameters: bool = False,
        optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=0.025),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self._check_usable(aggregator, of_parameters)
        if isinstance(aggregator, jd.Weighting) and any(facts_of(p).input == "matrix" for p in aggregator.modules()):
            aggregator = jd.WeightedAggregator(aggregator)
        takes_gramian = isinstance(aggregator, jd.GramianWeightedAggregator | jd.Weighting)
        self.input: Input = facts_of(aggregator).input or ("gramian" if takes_gramian else "matrix")
        """The argument of the aggregator: the Gramian of J, a root of it, or J itself."""
        self.of_parameters = of_parameters
        # A T × T matrix is handled faster on the CPU, and many solvers only run there.
        self._works_on = torch.device(device or "cpu") if self.input == "matrix" else torch.device("cpu")
        self.aggregator = move_to(aggregator, device=self._works_on, dtype=dtype)
        self.gradient_weights = torch.ones(len(tasks), dtype=dtype, device=device)
        """The current weights λ, shape (T,)."""
        self._drawn = 0
        self.handed_over = 0
        """The number of calls that TorchJD's own solver answered, because ours found no solution (see `exact`)."""
        self.has_weights = _weights_of(aggregator) is not None
        """True if the aggregation is a weighted sum of the rows."""
        super().__init__(tasks, scalarizer, optimizer=optimizer, seed=seed, dtype=dtype, device=device)
        self._depends_on_task_order = isinstance(aggregator, TaskAware) or any(
            isinstance(part, Stateful)
            or any(_is_by_task(value, len(tasks)) for value in (vars(part) | part._buffers | part._parameters).values())
            for part in aggregator.modules()
        )
        self._validate_aggregator()

    @property
    def weights(self) -> Tensor:
        """The current weights of the tasks' gradients, those of the losses included, shape (T,)."""
        return self.loss_weights * self.gradient_weights

    @property
    def kind(self) -> str:
        """The names of the strategy's classes; a checkpoint is recognized by them."""
        kind = type(self.aggregator).__name__
        return kind if self.scalarizer is None else f"{kind} of {super().kind}"

    def _check_usable(self, aggregator: nn.Module, of_parameters: bool) -> None:
        if not isinstance(aggregator, jd.Aggregator | jd.Weighting):
            raise TypeError(
                f"{self.name}: aggregator should be a torchjd.aggregation.Aggregator or Weighting; got "
                f"{kind_of(aggregator)}. (A function of the losses is a Scalarization.)"
            )
        kind = type(aggregator).__name__
        if any_part(aggregator, "needs_two_batches"):
            raise ValueError(
                f"{self.name}: {kind} needs the gradients of two independent batches, which one training step does not have. "
                f"Use MGDA or UPGrad."
            )
        if any_part(aggregator, "averages_over_steps") and not of_parameters:
            raise ValueError(
                f"{self.name}: {kind} averages gradients over steps, but at the representation each batch has other entries. "
                f"Use at='parameters'."
            )

    def _validate_aggregator(self) -> None:
        T = len(self.tasks)
        rows = torch.eye(T, 2 * T, dtype=self.loss_weights.dtype)
        asked = f"{self.name}: {type(self.aggregator).__name__}, asked to aggregate the gradients of {T} tasks,"
        tried = copy.copy(self)
        tried.aggregator = copy.deepcopy(self.aggregator).to(device="cpu")
        for part in tried.aggregator.modules():
            if isinstance(part, Stateful):
                part.reset()  # its state may be of gradients of another size
        try:
            found = tried._call_aggregator(rows @ rows.T, rows)
        except Exception as reason:
            raise ValueError(f"{asked} failed: {reason}") from reason
        expected = T if self.has_weights else 2 * T
        if not _is_vector(found, expected):
            raise ValueError(f"{asked} should return {expected} finite numbers; got {_shown(found)}")

    def _input_from(self, gramian: Tensor, matrix: Tensor | None) -> Tensor:
        if self.input == "matrix":
            assert matrix is not None
            return matrix
        if self.input == "gramian":
            return gramian
        values, vectors = torch.linalg.eigh(gramian)
        root: Tensor = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
        return root

    def _call_aggregator(self, gramian: Tensor, matrix: Tensor | None, rank: int = 0) -> Tensor:
        dtype = self.loss_weights.dtype  # the precision of the aggregator's state and options
        if (solve := solver_of(self.aggregator)) is not None:
            if (weights := solve(gramian)) is not None:
                return weights.to(dtype)
            self.handed_over += 1
        given = self._input_from(gramian, matrix).to(dtype)
        call: Any = _weights_of(self.aggregator) or self.aggregator
        with torch.no_grad(), seeded_rng(self._seed + rank, self._drawn, given.device), warnings.catch_warnings():
            # cvxpy warns in every NashMTL that solving the same problem again is not faster.
            warnings.filterwarnings("ignore", message="You are solving a parameterized problem that is not DPP")
            answer: Tensor = call(given)
        return answer

    def _answer(self, gramian: Tensor, matrix: Tensor | None, length: int, rank: int = 0) -> Tensor | None:
        """Return the aggregator's answer, of this length; or ``None`` if it is unusable, and set `reason`."""
        if not bool(gramian.isfinite().all()):
            self.reason = "a gradient is not finite"
            return None
        try:
            answer = self._call_aggregator(gramian, matrix, rank)
        except Exception as reason:
            self.reason = f"{type(reason).__name__}: {reason}"
            return None
        finally:
            self._drawn += 1
        if not _is_vector(answer, length):
            self.reason = f"it returned {_shown(answer)}"
            return None
        return answer

    def weigh_gradients(self, gramian: Tensor, present: Tensor | None = None, matrix: Tensor | None = None) -> Tensor:
        """Return the weights λ of the rows, shape (T,).

        If the Gramian is not finite or the aggregator fails, they are equal, with the sum of the last ones, and ``fallbacks``
        counts it.

        Args:
            gramian: ``J Jᵀ``, shape (T, T), of the mean losses' gradients, zero for an absent task.
            present: which tasks are present, bool of shape (T,); all by default. The aggregator does not see the others; one
                that knows tasks by their place is not called, and the weights stay.
            matrix: J itself, for an aggregator that needs it (`input`).
        """
        T = len(self.tasks)
        here = torch.ones(T, dtype=torch.bool) if present is None else present.cpu()
        if not bool(here.any()):
            return self.gradient_weights
        if self._depends_on_task_order and not bool(here.all()):
            return self.gradient_weights * here.to(self.gradient_weights)
        some = here.nonzero().squeeze(1)
        rows = None if matrix is None else matrix[some.to(matrix.device)]
        weights = self._answer(gramian.cpu()[some][:, some], rows, len(some))
        if weights is None:
            self.gradient_weights = self._fall_back(self.gradient_weights)
        else:
            spread = torch.zeros(T, dtype=weights.dtype).index_copy(0, some, weights.cpu())
            self.gradient_weights = spread.to(self.gradient_weights)
        return self.gradient_weights

    def aggregate(self, matrix: Tensor, present: Tensor, rank: int = 0) -> Tensor:
        """Return the result of an aggregator without weights, shape (n,); the mean of the rows if it fails.

        Args:
            matrix: J, shape (T, n).
            present: which tasks are present.
            rank: gives each rank other random numbers, because each has other columns of J.
        """
        rows = matrix[present.to(matrix.device)]
        if not len(rows):
            return matrix.new_zeros(matrix.shape[1])
        if self._depends_on_task_order and len(rows) < len(matrix):
            return rows.mean(dim=0)
        answer = self._answer(
            rows, rows, rows.shape[1], rank
        )  # the rows stand for the Gramian: both are finite, or none
        if answer is None:
            self.fallbacks += 1
            return rows.mean(dim=0)
        return answer

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Move all state to another precision or device, in place; every value is kept."""
        before = self.loss_weights.dtype
        super().to(dtype=dtype, device=device)
        self.gradient_weights = self.gradient_weights.to(dtype=dtype, device=device)
        if device is not None and self.input == "matrix":
            self._works_on = torch.device(device)
        move_to(self.aggregator, dtype=dtype, device=self._works_on, only=before)

    def state_dict(self) -> dict[str, Any]:
        """Return all state as plain tensors and numbers, loadable with ``torch.load(weights_only=True)``."""
        return {**super().state_dict(), **self.aggregator_state()}

    def aggregator_state(self) -> dict[str, Any]:
        """Return a copy of everything that aggregating changes, as plain tensors and numbers."""
        return {
            "gradient_weights": self.gradient_weights.clone(),
            "drawn": self._drawn,
            "aggregator": snapshot(self.aggregator),
            "fallbacks": self.fallbacks,
            "handed_over": self.handed_over,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of another rule for the same tasks in the same order; see `ScalarizationRule`."""
        super().load_state_dict(state)
        self.load_aggregator_state(state)

    @torch.no_grad()
    def load_aggregator_state(self, state: Mapping[str, Any]) -> None:
        """Undo all aggregation since `aggregator_state` returned this."""
        self.fallbacks = state["fallbacks"]
        self.handed_over = state.get("handed_over", 0)
        self.gradient_weights = state["gradient_weights"].to(self.gradient_weights)
        self._drawn = state["drawn"]
        load_snapshot(self.aggregator, state["aggregator"], device=self._works_on)


def _is_vector(found: Any, length: int) -> bool:
    return isinstance(found, Tensor) and tuple(found.shape) == (length,) and bool(found.isfinite().all())


def _shown(found: Any) -> str:
    """Return a short description of what was found."""
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}, {found!r}"
    return str(found.tolist()) if found.numel() <= 12 else f"shape {tuple(found.shape)}, or numbers that are not finite"


def _is_by_task(value: Any, T: int) -> bool:
    """Return True if this may hold one number for each task."""
    return T in value.shape if isinstance(value, Tensor) else isinstance(value, list | tuple) and len(value) == T


def _weights_of(aggregator: Any) -> Callable[[Tensor], Tensor] | None:
    """Return the function from the aggregator's `Input` to the weights of the rows; ``None`` if it has no weights."""
    if isinstance(aggregator, jd.Weighting):
        return aggregator
    if isinstance(aggregator, jd.GramianWeightedAggregator):
        return aggregator.gramian_weighting
    if isinstance(aggregator, jd.WeightedAggregator):
        return aggregator.weighting
    if facts_of(aggregator).in_row_span:
        # The coefficients of its result. Not by lstsq, which does not give the same bits each time.
        return lambda root: torch.linalg.pinv(root.T) @ aggregator(root)
    return None
