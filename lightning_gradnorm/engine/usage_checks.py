"""Notices, while a model trains, what its author has left out: a loss never shown, never back-propagated, no step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_gradnorm._messages import nearest
from lightning_gradnorm.engine.step_state import Pass

_PATIENCE = 50
"""In how many batches with a backward pass a loss may stay away that is not misspelt: they may train something else first."""


def _question(near: str | None) -> str:
    return "" if near is None else f"did you mean '{near}'? "


class Omissions:
    """What one training has shown so far. What is certainly wrong is an error at once; the rest is said once, and later.

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
        self._names: set[str] = set()
        self._batches = 0
        self._warned_of: set[str] = set()

    def show(self, losses: Mapping[str, Any], module: L.LightningModule) -> None:
        """Take note of what is being watched.

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
                    f"{self._asked_by}: task '{task}' is not among the losses of the first batch, which are "
                    f"{sorted(self._names)}; {_question(near)}(A task that is absent from a batch is given as None.)"
                )

    def end_batch(self, module: L.LightningModule, current: Pass) -> None:
        """Look at what a batch has shown, now that it is over.

        Raises:
            ValueError: a loss was not shown, or was shown and not back-propagated.
        """
        self._batches += bool(current.backwards or current.steps)
        if current.losses or current.absent:
            if self._logged_names is None and not self._declared:
                self._check_named(is_all=True)
            self._warn_of_missing(current)
            # Else it was a step that returned None after it had shown its losses, which Lightning lets pass.
            if current.backwards or (current.steps and not module.automatic_optimization):
                self.check_back_propagated(current)
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
                    f"{self._asked_by}: '{logged}' was not logged in the first batches, which logged {sorted(self.logged)}; "
                    f"{_question(near)}(In training_step, log the loss before its backward.)"
                )
        if is_late and not self._names and self._logged_names is None and not module.automatic_optimization:
            raise ValueError(
                f"{self._asked_by}: no task loss was seen in the first batches. {type(module).__name__} optimizes manually, so "
                f"that it should call watch({{'{self._tasks[0]}': loss, …}}) on this callback before manual_backward."
            )

    def check_back_propagated(self, current: Pass) -> None:
        """Refuse a loss that was shown, but took no part in the backward pass."""
        missed = [task for task in current.losses if task not in current.fired]
        if missed:
            raise ValueError(
                f"{self._asked_by}: what was given as the loss of task '{missed[0]}' took no part in the backward pass. Add "
                f"it to what is back-propagated; give the very tensor, not a copy of it, and give it before backward (in "
                f"manual optimization, before manual_backward)."
            )

    def _warn_of_missing(self, current: Pass) -> None:
        accounted = set(current.losses) | current.absent | self._warned_of
        missing = [task for task in self._tasks if task in self.seen and task not in accounted]
        if missing and not self._declared:
            self._warned_of.update(missing)
            how = "Where it is returned or watched, None says so without this warning."
            rank_zero_warn(
                f"{self._asked_by}: the losses of tasks {missing} were shown in earlier batches, but not in this one; they "
                f"count as absent wherever they are not shown, and are not weighted. {how}"
            )

    def end_epoch(self, module: L.LightningModule) -> None:
        """Look at what a whole epoch has shown.

        Raises:
            ValueError: a loss was never shown.
        """
        self._check_shown(module, is_late=True)
        if self.seen and not self.stepped and "step" not in self._warned_of:
            self._warned_of.add("step")
            rank_zero_warn(
                f"{self._asked_by}: no step of an optimizer was seen in the first epoch, so that no weight has moved. "
                f"{type(module).__name__} optimizes manually: it should call step() on what self.optimizers() returns."
            )
