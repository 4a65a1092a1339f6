"""Detects usage errors in training: a loss never shown or never back-propagated, or an optimizer that never steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from torch import Tensor

from lightning_gradnorm._messages import nearest
from lightning_gradnorm.engine.graph_checks import require_backpropagated
from lightning_gradnorm.engine.ranks import Ranks
from lightning_gradnorm.engine.step_state import BatchState

_PATIENCE = 50
"""Batches with a backward pass in which an expected loss may be missing: they may train something else first."""


def _question(near: str | None) -> str:
    return "" if near is None else f"did you mean '{near}'? "


class UsageChecks:
    """Watches one training. Certain mistakes are errors at once; the rest is a warning, later and once.

    Args:
        caller: the callback's name; begins each message.
        tasks: the tasks' names.
        logged_names: task → name under which its loss is logged, if that is where losses are seen.
        declared: whether the module declares its tasks itself, and knows which are absent.
        ranks: who warns.
    """

    def __init__(
        self,
        caller: str,
        tasks: Sequence[str] = (),
        logged_names: Mapping[str, str] | None = None,
        *,
        declared: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._caller = caller
        self._tasks = tasks
        self._logged_names = logged_names
        self._declared = declared
        self._ranks = Ranks() if ranks is None else ranks
        self.logged: set[str] = set()
        """All names that the module has logged."""
        self.seen: set[str] = set()
        """Tasks whose loss has been shown."""
        self.stepped = False
        """Whether an optimizer has taken a step."""
        self._names: set[str] = set()
        self._batches = 0
        self._warned_of: set[str] = set()

    def on_losses(self, losses: Mapping[str, Any], module: L.LightningModule) -> None:
        """Called with the losses that are being watched.

        Raises:
            ValueError: a task has never been among the losses, and these are all there are, or one is nearly called so.
        """
        self._names |= set(losses)
        if self._logged_names is None and not self._declared:
            self._check_named(is_all=module.automatic_optimization)

    def _check_named(self, *, is_all: bool) -> None:
        for task in self._tasks:
            if task in self._names:
                continue
            near = nearest(task, self._names - set(self._tasks))
            if is_all or near:
                raise ValueError(
                    f"{self._caller}: task '{task}' is not among the losses of the first batch, which are "
                    f"{sorted(self._names)}; {_question(near)}(A task that is absent from a batch is given as None.)"
                )

    def on_batch_end(self, module: L.LightningModule, batch: BatchState) -> None:
        """Called at the end of each batch.

        Raises:
            ValueError: a loss was not shown, or was shown and not back-propagated.
        """
        self._batches += bool(batch.backwards or batch.steps)
        if batch.losses or batch.absent:
            if self._logged_names is None and not self._declared:
                self._check_named(is_all=True)
            self._warn_of_missing(batch)
            # Else it was a step that returned None after it had shown its losses, which Lightning lets pass.
            if batch.backwards or (batch.steps and not module.automatic_optimization):
                require_backpropagated(batch, caller=self._caller)
        self._check_shown(module, is_late=self._batches >= _PATIENCE)

    def _check_shown(self, module: L.LightningModule, *, is_late: bool) -> None:
        if not self._batches or self._declared:
            return
        expected = self._logged_names or {}
        for task, logged in expected.items():
            if task in self.seen:
                continue
            near = nearest(logged, self.logged - set(expected.values()))
            if is_late or near:
                raise ValueError(
                    f"{self._caller}: '{logged}' was not logged in the first batches, which logged {sorted(self.logged)}; "
                    f"{_question(near)}(In training_step, log the loss before its backward.)"
                )
        if is_late and not self._names and self._logged_names is None and not module.automatic_optimization:
            raise ValueError(
                f"{self._caller}: no task loss was seen in the first batches. {type(module).__name__} optimizes manually, so "
                f"that it should call watch({{'{self._tasks[0]}': loss, …}}) on this callback before manual_backward."
            )

    def _warn_of_missing(self, batch: BatchState) -> None:
        accounted = set(batch.losses) | batch.absent | self._warned_of
        missing = [task for task in self._tasks if task in self.seen and task not in accounted]
        if missing and not self._declared:
            self._warned_of.update(missing)
            how = "Where it is returned or watched, None says so without this warning."
            self._ranks.warn(
                f"{self._caller}: the losses of tasks {missing} were shown in earlier batches, but not in this one; they "
                f"count as absent wherever they are not shown, and are not weighted. {how}"
            )

    def on_epoch_end(self, module: L.LightningModule) -> None:
        """Called at the end of each epoch.

        Raises:
            ValueError: a loss was never shown.
        """
        self._check_shown(module, is_late=True)
        if self.seen and not self.stepped and "step" not in self._warned_of:
            self._warned_of.add("step")
            self._ranks.warn(
                f"{self._caller}: no step of an optimizer was seen in the first epoch, so that no weight has moved. "
                f"{type(module).__name__} optimizes manually: it should call step() on what self.optimizers() returns."
            )


def warn_if_trained(caller: str, losses: Mapping[str, Any]) -> bool:
    """Warn that a callback which no Trainer has started is shown losses, if these are trained on. Return True if it did."""
    is_trained = any(isinstance(loss, Tensor) and loss.requires_grad for loss in losses.values())
    if is_trained:
        Ranks.current().warn(
            f"{caller}: watch was called, but this callback is not at work: no Trainer has started it. Give it to the Trainer "
            f"that trains the module, L.Trainer(callbacks=[gradnorm]). The losses are not balanced."
        )
    return is_trained
