"""Notices, while a model trains, what its author has left out: a loss never shown, never back-propagated, no step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_gradnorm.callbacks.step import Pass
from lightning_gradnorm.suggestions import did_you_mean


class Omissions:
    """What one training has shown so far. Errors in the first batch, warnings later, each once.

    Args:
        asked_by: the callback's name, the beginning of each message.
        tasks: the tasks' names.
        logged_names: task → name under which its loss is logged, if that is where losses are seen.
        declared: whether the module declares its tasks itself, and knows which are absent.
    """

    def __init__(
        self,
        asked_by: str,
        tasks: Sequence[str] = (),
        logged_names: Mapping[str, str] | None = None,
        *,
        declared: bool = False,
    ) -> None:
        self._asked_by = asked_by
        self._tasks = tasks
        self._logged_names = logged_names
        self._declared = declared
        self.logged: set[str] = set()
        """All names that the module has logged."""
        self.seen: set[str] = set()
        """Tasks whose loss has been shown."""
        self.stepped = False
        """Whether an optimizer has taken a step."""
        self._shown = False
        self._warned_of: set[str] = set()

    def show(self, losses: Mapping[str, Any]) -> None:
        """Take note of what is being watched.

        Raises:
            ValueError: a task is not among the losses of the first batch.
        """
        self._shown = True
        if self._logged_names is not None or self._declared:
            return
        for task in self._tasks:
            if task not in losses and task not in self.seen:
                raise ValueError(
                    f"{self._asked_by}: task '{task}' is not among the losses of the first batch, which are "
                    f"{sorted(losses)}; {did_you_mean(task, losses)} (A task that is absent from a batch is given as None.)"
                )

    def end_batch(self, module: L.LightningModule, current: Pass) -> None:
        """Look at what a batch has shown, now that it is over.

        Raises:
            ValueError: no loss was shown, or one that was not back-propagated.
        """
        if current.backwards or current.steps:
            self._check_shown(module, current)
        if current.backwards:  # a step that returned None after it had shown its losses is no step
            self._warn_of_missing(current)
            self.check_back_propagated(current)

    def _check_shown(self, module: L.LightningModule, current: Pass) -> None:
        names = self._logged_names or {}
        unseen = [logged for task, logged in names.items() if task not in self.seen]
        if unseen and current.backwards:
            raise ValueError(
                f"{self._asked_by}: '{unseen[0]}' was not logged in the first batch, which logged {sorted(self.logged)}; "
                f"{did_you_mean(unseen[0], sorted(self.logged))} (In training_step, log the loss before its backward.)"
            )
        if not self._shown and not self._declared and not names and not module.automatic_optimization:
            raise ValueError(
                f"{self._asked_by}: no task loss was seen in the first batch. {type(module).__name__} optimizes manually, so "
                f"that it should call watch({{'{self._tasks[0]}': loss, …}}) on this callback before manual_backward."
            )

    def check_back_propagated(self, current: Pass) -> None:
        """Refuse a loss that was shown, but took no part in the backward pass."""
        missed = [task for task in current.losses if task not in current.fired]
        if missed:
            raise ValueError(
                f"{self._asked_by}: what was given as the loss of task '{missed[0]}' took no part in the backward pass. Add "
                f"it to what is back-propagated; give the very tensor, not a copy of it, and give it before backward."
            )

    def _warn_of_missing(self, current: Pass) -> None:
        accounted = set(current.losses) | current.absent | self._warned_of
        missing = [task for task in self._tasks if task in self.seen and task not in accounted]
        if missing and not self._declared:
            self._warned_of.update(missing)
            rank_zero_warn(
                f"{self._asked_by}: the losses of tasks {missing} were shown in earlier batches, but not in this one; they "
                f"count as absent wherever they are not shown, and are not weighted. (Give None where a task is absent.)"
            )

    def end_epoch(self, module: L.LightningModule) -> None:
        """Warn, once, if losses were shown but no optimizer took a step."""
        if self.seen and not self.stepped and "step" not in self._warned_of:
            self._warned_of.add("step")
            rank_zero_warn(
                f"{self._asked_by}: no step of an optimizer was seen in the first epoch, so that no weight has moved. "
                f"{type(module).__name__} optimizes manually: it should call step() on what self.optimizers() returns."
            )
