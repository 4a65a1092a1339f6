"""Detects usage errors in training: a loss never shown or never back-propagated, or an optimizer that never steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from torch import Tensor

from lightning_gradnorm._messages import nearest
from lightning_gradnorm.callbacks.losses import LossSource
from lightning_gradnorm.engine.graph_checks import require_backpropagated
from lightning_gradnorm.engine.ranks import Ranks
from lightning_gradnorm.engine.step_state import BatchState

_PATIENCE = 50
"""Batches with a backward pass in which an expected loss may be missing: they may train something else first."""


class LossNames:
    """Compares the losses that a user named with those that a training shows. Each method returns a message, or None.

    A module that declares its tasks shows them itself, and knows which are absent: nothing is checked.

    Args:
        source: where the losses come from.
        period: the batches that were looked at, in the words of a message.
    """

    def __init__(self, source: LossSource, period: str) -> None:
        self._source = source
        self._period = period
        self.logged: set[str] = set()
        """All names that the module has logged."""
        self.shown: dict[str, None] = {}
        """All names under which losses were returned or watched, in order of their appearance."""

    def find_unlogged(self, seen: Iterable[str], *, is_late: bool) -> str | None:
        """Return which loss was not logged, if it is late or another logged name is similar."""
        expected = self._source.logged_names or {}
        for name, logged in expected.items():
            near = nearest(logged, self.logged - set(expected.values()))
            if name not in seen and (is_late or near):
                return (
                    f"{self._source.caller}: '{logged}' was not logged in the {self._period}, which logged "
                    f"{sorted(self.logged)}; {_question(near)}(In training_step, log the loss before its backward.)"
                )
        return None

    def find_misnamed(self, *, is_all: bool) -> str | None:
        """Return which loss was not shown, if these are all there are or another name is similar."""
        source = self._source
        for name in () if source.declared or source.logged_names is not None else source.names:
            near = nearest(name, self.shown.keys() - set(source.names))
            if name not in self.shown and (is_all or near):
                return (
                    f"{source.caller}: {source.noun} '{name}' is not among the losses of the {self._period}, which are "
                    f"{sorted(self.shown)}; {_question(near)}(A {source.noun} that is absent from a batch is given as None.)"
                )
        return None

    def find_unwatched(self, module: L.LightningModule) -> str | None:
        """Return that no loss was shown, for a module that must show them itself."""
        source = self._source
        if self.shown or source.declared or source.logged_names is not None or module.automatic_optimization:
            return None
        example = source.names[0] if source.names else "data"
        return (
            f"{source.caller}: no {'task ' * (source.noun == 'task')}loss was seen in the {self._period}. "
            f"{type(module).__name__} optimizes manually, so it should call watch({{'{example}': loss, …}}) on this callback "
            f"before manual_backward."
        )


class UsageChecks:
    """Watches one training. Certain mistakes are errors at once; the rest is a warning, later and once.

    Args:
        source: where the losses come from.
        ranks: who warns.
    """

    def __init__(self, source: LossSource, ranks: Ranks | None = None) -> None:
        self._source = source
        self._ranks = Ranks() if ranks is None else ranks
        self.names = LossNames(source, "first batches")
        self.seen: set[str] = set()
        """Tasks whose loss has been shown."""
        self.stepped = False
        """Whether an optimizer has taken a step."""
        self._batches = 0
        self._warned_of: set[str] = set()

    def on_losses(self, losses: Mapping[str, Any], module: L.LightningModule) -> None:
        """Called with the losses that are being watched.

        Raises:
            ValueError: a task has never been among the losses, and these are all there are, or one is nearly called so.
        """
        self.names.shown |= dict.fromkeys(losses)
        _raise(self.names.find_misnamed(is_all=module.automatic_optimization))

    def on_batch_end(self, module: L.LightningModule, batch: BatchState) -> None:
        """Called at the end of each batch.

        Raises:
            ValueError: a loss was not shown, or was shown and not back-propagated.
        """
        self._batches += bool(batch.backwards or batch.steps)
        if batch.losses or batch.absent:
            _raise(self.names.find_misnamed(is_all=True))
            self._warn_of_missing(batch)
            # Else it was a step that returned None after it had shown its losses, which Lightning lets pass.
            if batch.backwards or (batch.steps and not module.automatic_optimization):
                require_backpropagated(batch, caller=self._source.caller)
        self._check_shown(module, is_late=self._batches >= _PATIENCE)

    def _check_shown(self, module: L.LightningModule, *, is_late: bool) -> None:
        if not self._batches:
            return
        _raise(self.names.find_unlogged(self.seen, is_late=is_late))
        if is_late:
            _raise(self.names.find_unwatched(module))

    def _warn_of_missing(self, batch: BatchState) -> None:
        accounted = set(batch.losses) | batch.absent | self._warned_of
        missing = [task for task in self._source.names if task in self.seen and task not in accounted]
        if missing and not self._source.declared:
            self._warned_of.update(missing)
            self._ranks.warn(
                f"{self._source.caller}: the losses of tasks {missing} were shown in earlier batches, but not in this one; "
                f"they count as absent wherever they are not shown, and are not weighted. Where losses are returned or "
                f"watched, None marks a task as absent without this warning."
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
                f"{self._source.caller}: no step of an optimizer was seen in the first epoch, so that no weight has moved. "
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


def _question(near: str | None) -> str:
    return "" if near is None else f"did you mean '{near}'? "


def _raise(message: str | None) -> None:
    if message is not None:
        raise ValueError(message)
