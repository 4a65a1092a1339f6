"""What the engine expects of a rule: a strategy's math together with its state for one list of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_gradnorm.gradients import Norm

Needs = Literal["nothing", "losses", "norms", "gradients"]


class Rule(Protocol):
    """A balancing strategy for given tasks. The engine never asks which one it is, only what it needs.

    ``needs`` decides what a rule receives in each optimizer step: ``"nothing"`` (fixed weights), the task ``"losses"``
    before each backward pass (`LossRule`), the ``"norms"`` of the task gradients (`NormRule`), or the task
    ``"gradients"`` themselves (`GradientRule`).
    """

    tasks: tuple[str, ...]

    @property
    def needs(self) -> Needs:
        """What the rule receives in each optimizer step; a class attribute."""

    @property
    def loss_weights(self) -> Tensor:
        """The factors on the gradients of the losses in the next backward pass, detached, shape (T,)."""

    @property
    def weights(self) -> Tensor:
        """The weights shown to the user, shape (T,)."""

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Move all state."""

    def count_step(self) -> None:
        """Called after every optimizer step of the network, measured or not."""

    def discard_step(self) -> None:
        """Called when the loss scaler skips the network's step."""

    def state_dict(self) -> dict[str, Any]:
        """Return all state as plain tensors and numbers."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Restore what `state_dict` returned."""


class NormRule(Rule, Protocol):
    """Needs the gradient norm ``n_i = ||∇_W L_i||`` of each task, or other norms."""

    @property
    def norms(self) -> Sequence[Norm]:
        """The kinds of norms; a class attribute, or decided by an option."""

    @property
    def should_measure(self) -> bool:
        """Whether the next optimizer step needs norms."""

    def step(self, norms: Tensor, losses: Tensor, present: Tensor | None = None) -> Any:
        """Update the weights; all tensors of shape (T,), the norms of shape (T, k) for k kinds of norms."""

    @property
    def syncs_every_step(self) -> bool:
        """Whether each update's outcome may be read at once; on a GPU the host would have to wait."""

    @property
    def remarks(self) -> Mapping[str, str]:
        """What to report to the user about the updates so far: a key, reported once → the message."""

    def end_epoch(self) -> None:
        """Called at the end of each epoch; may add remarks."""


class LossRule(Rule, Protocol):
    """Needs the losses before each backward pass."""

    fallbacks: int
    reason: str
    kind: str

    def weigh(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Set and return ``loss_weights`` for a backward pass with these losses, shape (T,)."""

    def step(self) -> None:
        """Called once per optimizer step."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before the backward passes of each batch with the number of its epoch."""

    @property
    def needs_losses_after_step(self) -> bool:
        """Whether `update_after_step` is called after each optimizer step."""

    def update_after_step(self, losses: Tensor, present: Tensor) -> None:
        """Called with the losses of the same batch after the network's step, shape (T,)."""


class GradientRule(LossRule, Protocol):
    """Needs the matrix J of the task gradients, shape (T, n), or its Gramian."""

    input: Literal["gramian", "root", "matrix"]
    of_parameters: bool
    has_weights: bool
    gradient_weights: Tensor

    def weigh_gradients(self, gramian: Tensor, present: Tensor | None = None, matrix: Tensor | None = None) -> Tensor:
        """Set and return the weights of the rows of J, shape (T,)."""

    def aggregate(self, matrix: Tensor, present: Tensor, rank: int = 0) -> Tensor:
        """Return one gradient, shape (n,), for a strategy without weights."""

    def aggregator_state(self) -> dict[str, Any]:
        """Return a copy of everything that aggregating changes."""

    def load_aggregator_state(self, state: Mapping[str, Any], /) -> None:
        """Undo all aggregation since `aggregator_state` returned this."""


@runtime_checkable
class DeclaresTasks(Protocol):
    """A module that knows its own tasks, as `MultiTaskModule` does, and hands their losses to `watch` itself."""

    @property
    def task_heads(self) -> Mapping[str, str]:
        """Task → dotted name of its head."""

    def task_losses(self, batch: Any) -> Mapping[str, Tensor]:
        """Return the losses of a batch, without a step."""


@runtime_checkable
class WatchesLosses(Protocol):
    """A callback to which a module may show its losses before it back-propagates them."""

    def watch(self, losses: Mapping[str, Tensor | None]) -> None:
        """Use these losses in the backward pass that follows."""
