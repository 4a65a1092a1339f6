"""Scalarizations: strategies that turn the T losses into one number; its partial derivatives are the weights.

``∇ s(L_1, …, L_T) = Σ_i ∂s/∂L_i ∇L_i``: training on a scalarizer ``s`` weights each task's gradient by the derivative of
``s`` at the current losses. The formulas are TorchJD's, or one file each in this folder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchjd.aggregation import Aggregator, Weighting

from lightning_gradnorm._messages import check_task_names, kind_of
from lightning_gradnorm.strategies.factory import follow_parameters, move_to
from lightning_gradnorm.strategies.facts import facts_of
from lightning_gradnorm.strategies.optimizers import made_optimizer
from lightning_gradnorm.strategies.resuming import check_kind
from lightning_gradnorm.strategies.rng import seeded_rng
from lightning_gradnorm.strategies.snapshot import load_snapshot, snapshot

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]
_VERSION = 1


class ScalarizationRule:
    """A scalarizer with all its state: the optimizer of its parameters, the last losses, its random numbers.

    Args:
        tasks: the tasks' names, in the order of every tensor of shape (T,).
        scalarizer: a module from the losses, shape (T,), to a scalar; ``None`` for the plain sum.
        optimizer: builds the optimizer of the scalarizer's parameters, if it has any.
        seed: seed of the random numbers that the scalarizer draws.
        dtype: precision of the weights.
        device: device of the weights.

    Raises:
        ValueError: fewer than two tasks, a name twice, a scalarizer that cannot be called with T losses, or an optimizer with
            a train() and an eval() mode.
        TypeError: you passed an aggregator in place of a scalarizer, or the optimizer is not an optimizer.

    Example:
        >>> from torchjd.scalarization import GeometricMean
        >>> rule = ScalarizationRule(["seg", "depth"], GeometricMean())
        >>> rule.weigh(torch.tensor([1.0, 4.0]))  # sqrt(L_1 L_2) / (2 L_i)
        tensor([1.0000, 0.2500])
    """

    needs: ClassVar[Literal["losses", "gradients"]] = "losses"
    name = "Scalarization"
    has_weights = True
    reason = "a loss or a derivative is not finite"
    """Why the strategy last gave no usable weights."""

    def __init__(
        self,
        tasks: Sequence[str],
        scalarizer: nn.Module | None,
        *,
        optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=0.025),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.tasks = check_task_names(tasks, caller=self.name)
        if isinstance(scalarizer, Aggregator | Weighting):
            raise TypeError(
                f"{self.name}: scalarizer should turn the losses into a number; got {type(scalarizer).__name__}, which "
                f"combines gradients. Use Aggregation({type(scalarizer).__name__}(…), tasks=…)."
            )
        if not (scalarizer is None or isinstance(scalarizer, nn.Module)):
            raise TypeError(
                f"{self.name}: scalarizer should be a module, such as UW({len(tasks)}); got {kind_of(scalarizer)}."
            )
        self.scalarizer = None if scalarizer is None else move_to(scalarizer, device=device, dtype=dtype)
        self.loss_weights = torch.ones(len(tasks), dtype=dtype, device=device)
        """The factors of the losses' gradients, shape (T,)."""
        self.fallbacks = 0
        """The number of steps in which the strategy gave no usable weights, so all tasks got equal weights."""
        self._settled = 0
        self._seed = seed
        self._asked = 0
        self._losses = torch.full_like(self.loss_weights, torch.nan)
        self._passes = 0
        self._epoch: int | None = None
        learned = [] if self.scalarizer is None else self.scalarizer.parameters()
        self._parameters = [parameter for parameter in learned if parameter.requires_grad]
        parameters: list[Tensor] = [*self._parameters]
        self._optimizer = made_optimizer(optimizer, parameters, caller=self.name) if parameters else None
        if self.scalarizer is not None:
            self._validate()

    @property
    def weights(self) -> Tensor:
        """The current weights, shape (T,)."""
        return self.loss_weights

    @property
    def needs_losses_after_step(self) -> bool:
        """True if `update_after_step` must be called with the losses of the same batch after the network's step."""
        return self.scalarizer is not None and facts_of(self.scalarizer).needs_losses_after_step

    @property
    def kind(self) -> str:
        """The name of the strategy's class; a checkpoint is recognized by it."""
        return type(self.scalarizer).__name__

    def _validate(self) -> None:
        """Call a copy of the scalarizer once, to find errors that would otherwise only show in the first step."""
        ones = torch.ones_like(self.loss_weights)
        asked = f"{self.name}: {self.kind}, asked for the scalarization of {len(self.tasks)} losses of 1,"
        try:
            scalar, weights = self._value_and_grad(copy.deepcopy(self.scalarizer), ones)
        except Exception as reason:
            raise ValueError(f"{asked} failed: {reason}") from reason
        if weights is None:
            raise ValueError(f"{asked} should return a value that depends on the losses, part of the graph")
        if not bool(torch.isfinite(scalar)) or not bool(weights.isfinite().all()):
            raise ValueError(
                f"{asked} should be a finite number with finite derivatives; got {scalar.item()} and {weights.tolist()}"
            )

    def _value_and_grad(self, scalarizer: Any, losses: Tensor, *, learn: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the scalar and its derivatives; with ``learn``, accumulate the gradients of the scalarizer's parameters."""
        parameters = self._parameters if learn else []
        with torch.enable_grad(), seeded_rng(self._seed, self._asked, losses.device):
            leaf = losses.detach().clone().requires_grad_()
            scalar = scalarizer(leaf)
            if not (isinstance(scalar, Tensor) and scalar.numel() == 1):
                found = f"shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else type(scalar).__name__
                raise ValueError(f"it should return a scalar tensor; got {found}")
            if not scalar.requires_grad:
                return scalar, None
            weights, *of_parameters = torch.autograd.grad(scalar.reshape(()), [leaf, *parameters], allow_unused=True)
        if all(bool(one.isfinite().all()) for one in of_parameters if one is not None):
            for parameter, gradient in zip(parameters, of_parameters, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return scalar.detach(), weights

    def weigh(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the weights ``∂s/∂L_i`` for the upcoming backward pass, shape (T,).

        If a loss or a derivative is not finite, they are equal, with the sum of the last ones: the scalarizer learns nothing
        from that step, and ``fallbacks`` counts it.

        Args:
            losses: shape (T,).
            present: which tasks are present, bool of shape (T,); all by default. An absent task enters with its last loss;
                until every task has been seen, all weights are 1.
        """
        if self.scalarizer is None:
            return self.loss_weights
        losses = losses.to(self.loss_weights)
        here = torch.ones_like(losses, dtype=torch.bool) if present is None else present
        if bool((here & ~losses.isfinite()).any()):
            self.loss_weights = self._fall_back(self.loss_weights)
            return self.loss_weights
        self._losses = torch.where(here, losses, self._losses)
        if bool(self._losses.isfinite().all()):
            _, weights = self._value_and_grad(self.scalarizer, self._losses, learn=True)
            self._asked += 1
            self._passes += 1
            if weights is None or not bool(weights.isfinite().all()):
                weights = self._fall_back(self.loss_weights)
            self.loss_weights = weights
        return self.loss_weights

    def _fall_back(self, weights: Tensor) -> Tensor:
        """Return equal weights with the same sum, and count them."""
        self.fallbacks += 1
        return torch.full_like(weights, float(weights.mean()))

    def begin_epoch(self, epoch: int) -> None:
        """Call the scalarizer's ``step()``, if it has one, once an epoch is over. Call this in every step."""
        scalarizer: Any = self.scalarizer
        if scalarizer is not None and self._epoch not in (None, epoch) and facts_of(scalarizer).steps_each_epoch:
            scalarizer.step()
        self._epoch = epoch

    @torch.no_grad()
    def step(self) -> None:
        """Take one step of the scalarizer's parameters, with the mean of their gradients since the last one."""
        if self._optimizer is not None and self._passes:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad /= self._passes
            self._optimizer.step()
        self._settled = self.fallbacks
        self.discard_step()

    def count_step(self) -> None:
        """Do nothing; the engine calls this after every optimizer step of the network, measured or not."""

    def discard_step(self) -> None:
        """Discard what was accumulated since the last step, because the loss scaler skipped the network's step."""
        self._passes, self.fallbacks = 0, self._settled
        for parameter in self._parameters:
            parameter.grad = None

    def update_after_step(self, losses: Tensor, present: Tensor) -> None:
        """Update the scalarizer with the losses of the last batch, recomputed after the network's step, shape (T,)."""
        scalarizer: Any = self.scalarizer
        losses = torch.where(present, losses.to(self._losses), self._losses)
        if bool(losses.isfinite().all()):
            scalarizer.update(losses)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Move all state to another precision or device, in place; every value is kept."""
        before = self.loss_weights.dtype
        self.loss_weights = self.loss_weights.to(dtype=dtype, device=device)
        self._losses = self._losses.to(dtype=dtype, device=device)
        if self.scalarizer is not None:
            move_to(self.scalarizer, dtype=dtype, device=device, only=before)
        if self._optimizer is not None:
            follow_parameters(self._optimizer)

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all state as plain tensors and numbers, loadable with ``torch.load(weights_only=True)``."""
        return {
            "version": _VERSION,
            "tasks": list(self.tasks),
            "loss_weights": self.loss_weights.clone(),
            "losses": self._losses.clone(),
            "asked": self._asked,
            "seed": self._seed,
            "epoch": self._epoch,
            "fallbacks": self.fallbacks,
            "kind": self.kind,
            "scalarizer": {} if self.scalarizer is None else snapshot(self.scalarizer),
            "optimizer": {} if self._optimizer is None else copy.deepcopy(self._optimizer.state_dict()),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of another rule for the same tasks in the same order.

        Raises:
            ValueError: the state is of other tasks, another scalarizer, or another version.
        """
        check_kind(state, self.kind, _VERSION, caller=self.name)
        if list(state["tasks"]) != list(self.tasks):
            raise ValueError(
                f"{self.name}: the checkpoint has tasks {list(state['tasks'])}, but this run has {list(self.tasks)}. "
                f"Resume with the same tasks in the same order."
            )
        self.loss_weights = state["loss_weights"].to(self.loss_weights)
        self._losses = state["losses"].to(self._losses)
        self._asked, self._seed, self._epoch = state["asked"], state["seed"], state["epoch"]
        self.fallbacks = self._settled = state["fallbacks"]
        if self.scalarizer is not None:
            load_snapshot(self.scalarizer, state["scalarizer"], device=self.loss_weights.device)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
