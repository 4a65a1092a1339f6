"""Weights in closed form from the norms of the task gradients: the base of such formulas, and the rule that runs one.

A formula defines what it remembers of the norms ``n_i = ||∇_W L_i||`` and which weights follow. `NormWeightingRule` does the
rest: absent tasks, numbers that are not finite, checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gradnorm._messages import check, check_positive_by_task, check_task_names, is_integer, is_number, kind_of
from lightning_gradnorm.strategies.resuming import check_kind
from lightning_gradnorm.strategies.snapshot import matched_by_task
from lightning_gradnorm.strategies.updates import Outcomes, ReadsOutcomes, WeightUpdate
from lightning_gradnorm.strategies.weight_optimizer import moved
from lightning_gradnorm.strategies.zero_gradients import tasks_with_gradient

_VERSION = 1  # of the layout of `NormWeightingRule.state_dict`
Norm = Literal["l2", "max", "mean"]
"""Of all entries of a gradient: the Euclidean norm, the largest absolute value, the mean absolute value."""


class Memory(NamedTuple):
    """What a formula knows about earlier updates; tensors of shape (T,)."""

    values: Tensor
    """Its moving average; 1 at first."""
    updates: Tensor
    """The number of updates in which each task counted, this one included."""


class NormFormula(ABC):
    """A formula for weights from gradient norms, for `NormWeighting`. A subclass is another strategy.

    Args:
        update_every: the network's optimizer steps from one weight update to the next; no gradients are read in the others.
        priorities: task → positive number ``p_i`` that multiplies its weight; scaled to mean 1. ``None``: all 1.
    """

    norms: Sequence[Norm] = ("l2",)
    """The norms to take of each gradient."""
    of_all_parameters: ClassVar[bool] = False
    """Whether the source takes the gradients of the whole network or of a layer; the default of ``shared_layer``."""
    normalize: bool = False
    """Whether the weights are scaled to sum T."""

    def __init__(self, *, update_every: int, priorities: Mapping[str, float] | None = None) -> None:
        self._check(is_integer(update_every, least=1), "update_every", "an integer, at least 1", update_every)
        is_mapping = priorities is None or isinstance(priorities, Mapping)
        self._check(is_mapping, "priorities", "a mapping from task to number", priorities)
        self.update_every, self.priorities = update_every, None if priorities is None else dict(priorities)

    @abstractmethod
    def weigh(
        self, memory: Memory, norms: Tensor, losses: Tensor, present: Tensor, tasks: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return what to remember and the weights, each of shape (T,), with any values at absent tasks.

        Args:
            memory: from earlier updates.
            norms: of the gradients of the unweighted losses, shape (T,); or (T, k) if `norms` has k entries.
            losses: ``L_i``, shape (T,).
            present: the tasks that count, bool of shape (T,).
            tasks: their names.
        """

    def explain(self, task: str, loss: float) -> str:
        """Return why a task with this loss prevented the update, as the beginning of a sentence."""
        return f"the loss or the gradient norm of task '{task}' is not finite, or its weight would not be"

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check the task names in the options.

        Raises:
            ValueError: a name is not among ``tasks``.
        """
        if self.priorities is not None:
            check_positive_by_task(self.priorities, tasks, caller=type(self).__name__, parameter="priorities")

    def _check(self, holds: bool, parameter: str, expected: str, found: object) -> None:
        check(type(self).__name__, holds, parameter, expected, found)

    def _check_share(self, parameter: str, share: object, *, may_be_one: bool = False) -> None:
        expected = "a number above 0, at most 1" if may_be_one else "a number from 0 to below 1"
        is_share = is_number(share) and (0 < share <= 1 if may_be_one else 0 <= share < 1)  # type: ignore[operator]
        self._check(is_share, parameter, expected, share)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if value is not None)
        return f"{type(self).__name__}({given})"


def check_formula(formula: object) -> None:
    """Raise TypeError unless it is a `NormFormula`."""
    if not isinstance(formula, NormFormula):
        raise TypeError(f"NormWeighting: rule should be a formula such as InverseNorm(); got {kind_of(formula)}")


class NormWeightingRule(ReadsOutcomes):
    """Runs a `NormFormula` during training.

    The weights of a step come from the gradients of the step before, so one backward pass serves both. They start at 1.

    Args:
        tasks: the tasks' names, in the order of every tensor of shape (T,).
        formula: for example `InverseNorm()`.
        dtype: of the weights.
        device: of the weights.

    Raises:
        TypeError, ValueError: ``formula`` is not a formula, or names an unknown task.

    Example:
        >>> from lightning_gradnorm.strategies import InverseNorm
        >>> rule = NormWeightingRule(["fit", "kl"], InverseNorm())
        >>> _ = rule.step(norms=torch.tensor([1.0, 3.0]), losses=torch.ones(2))
        >>> rule.weights
        tensor([1.5000, 0.5000])
    """

    needs: ClassVar[Literal["nothing", "losses", "norms", "gradients"]] = "norms"

    def __init__(
        self,
        tasks: Sequence[str],
        formula: NormFormula,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        check_formula(formula)
        self.kind = type(formula).__name__
        self.tasks = check_task_names(tasks, caller=self.kind)
        formula.check_tasks(self.tasks)
        self._formula = formula
        self.weights = torch.ones(len(self.tasks), dtype=dtype, device=device)
        """The current weights, shape (T,)."""
        self.mean_weights = self.weights.clone()
        """Their mean over the steps counted by `count_step`, shape (T,)."""
        self._memory, self._updates = self.weights.clone(), torch.zeros_like(self.weights)
        self._priorities = self._given_priorities()
        self.steps = 0
        """Number of the network's optimizer steps, with and without a weight update."""
        self.outcomes = Outcomes(self.tasks, formula.explain, "balancing/skipped")
        """What happened to the updates."""

    def _given_priorities(self) -> Tensor:
        given = self._formula.priorities or dict.fromkeys(self.tasks, 1.0)
        priorities = self.weights.new_tensor([given[task] for task in self.tasks])
        return priorities / priorities.mean()

    @property
    def norms(self) -> Sequence[Norm]:
        """The norms to take of each gradient."""
        return self._formula.norms

    @property
    def loss_weights(self) -> Tensor:
        """The factors of the losses' gradients, shape (T,)."""
        return self.weights

    @property
    def should_measure(self) -> bool:
        """Whether the network's next optimizer step includes a weight update."""
        return self.steps % self._formula.update_every == 0

    @property
    def syncs_every_step(self) -> bool:
        """Whether each update's outcome may be read at once; on a GPU the host would have to wait."""
        return self.weights.is_cpu

    def count_step(self) -> None:
        """Add the current weights to their mean over time. Called after every optimizer step of the network."""
        self.steps += 1
        self.mean_weights = self.mean_weights.lerp(self.weights, 1 / self.steps)

    def discard_step(self) -> None:
        """Do nothing: a step that the loss scaler skips leaves no trace here."""

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Move all state. Values are kept."""
        self.outcomes.read()
        dtype, device = dtype or self.weights.dtype, device or self.weights.device
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, moved(value, dtype, device))
        self._priorities = self._given_priorities()  # float64 should not get numbers rounded to float32

    @torch.no_grad()
    def step(self, norms: Tensor, losses: Tensor, present: Tensor | None = None) -> WeightUpdate:
        """Update the weights once. The host never waits for a GPU.

        Args:
            norms: of the gradients of the unweighted losses, shape (T,); or (T, k) if the formula needs k norms of each.
            losses: ``L_i``, shape (T,).
            present: the tasks that have a loss, bool of shape (T,); all by default. A task whose gradient is exactly 0 counts
                as absent. An absent task keeps its weight; if the weights are scaled, the others share the rest.

        Returns:
            The update. It is not taken if a number is not finite, or a weight would not be positive and finite; then the
            weights and the averages do not change.
        """
        norms, losses = norms.to(self.weights), losses.to(self.weights)
        sizes = norms if norms.ndim == 1 else norms.amax(dim=1)
        everyone = torch.ones_like(self.weights, dtype=torch.bool)
        shown = everyone if present is None else present
        present = tasks_with_gradient(sizes, shown, may_look=False)
        assert present is not None
        updates = self._updates + present
        values, weights = self._formula.weigh(Memory(self._memory, updates), norms, losses, present, self.tasks)
        weights = weights * self._priorities
        # One bad number spoils the weights of other tasks. The task that it came from is at fault.
        at_fault = present & ~(weights.isfinite() & (weights > 0))
        for brought in (values, losses + sizes):
            bad = present & ~brought.isfinite()
            at_fault = torch.where(bad.any(), bad, at_fault)
        taken = ~at_fault.any() & present.any()
        if self._formula.normalize:
            shared = torch.where(present, self.weights, 0.0).sum()  # the rest belongs to the absent tasks
            weights = weights * (shared / torch.where(present, weights, 0.0).sum())
        changes = present & taken
        self.weights = torch.where(changes, weights, self.weights)
        self._memory = torch.where(changes, values, self._memory)
        self._updates = torch.where(changes, updates, self._updates)
        update = WeightUpdate(sizes, losses, present, shown, present, at_fault.to(sizes), None, taken)
        self.outcomes.add(update, read=self.syncs_every_step)
        return update

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all state as plain tensors and numbers, loadable with ``torch.load(weights_only=True)``."""
        tensors = {
            "weights": self.weights,
            "weights_mean": self.mean_weights,
            "memory": self._memory,
            "updates": self._updates,
        }
        numbers = {"steps": self.steps, "skipped": self.skipped}
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        return {"kind": self.kind, "version": _VERSION, "tasks": list(self.tasks), **copies, **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of another rule of the same formula, matched by the tasks' names. Options stay those of this rule.

        Raises:
            ValueError: the state is of another formula or version, or of other tasks. The rule is then unchanged.
        """
        check_kind(state, self.kind, _VERSION, caller=self.kind)
        if set(state["tasks"]) != set(self.tasks):
            raise ValueError(
                f"{self.kind}: the checkpoint has tasks {sorted(state['tasks'])}, but this run has {sorted(self.tasks)}. "
                f"Resume with the same tasks."
            )
        matched = matched_by_task(state, self.tasks)
        self.weights, self.mean_weights, self._memory, self._updates = (
            matched[name].to(self.weights) for name in ("weights", "weights_mean", "memory", "updates")
        )
        scale = len(self.tasks) / self.weights.sum()
        if self._formula.normalize and abs(scale - 1) > 1e-4:  # saved by a run without normalize
            self.weights = self.weights * scale
        self.steps = int(state["steps"])
        self.outcomes.resume(int(state["skipped"]))
