"""One validation score in which all tasks count equally, independent of the units of their losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_gradnorm.callbacks.logging import log_step_metrics

TOTAL, PREFIX = "val/loss", "val/loss/"
RATIO = "val/loss_ratio"
OF_BEST = "best/val/loss"
"""The sum of the validation losses at the best checkpoint, which is the one tested."""


class LossRatios(L.Callback):
    """Log ``val/loss_ratio`` after each validation: the mean over the tasks of ``L_i / L_i(first validation)``.

    The task with the largest units dominates the sum of the losses; a ratio has no units. The first validation is the one
    after the first epoch, not the sanity check, which only sees two batches. A task that is absent then uses its own first
    validation. A task whose first loss is zero, negative or not finite has no ratio and is skipped. Without any
    ``val/loss/<task>``, the ratio uses ``val/loss``.

    Each time a `ModelCheckpoint` finds a better epoch, its ``val/loss`` is logged as ``best/val/loss``, so you can compare it
    with the test of the same checkpoint.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> trainer = L.Trainer(callbacks=[LossRatios(), ModelCheckpoint(monitor="val/loss_ratio")], logger=False)
    """

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        """The reference losses of the ratios."""
        self._best: float | None = None

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        losses = losses_in({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.first = {**losses, **self.first}
        ratio = mean_ratio(losses, self.first)
        if ratio is not None:
            log_step_metrics(trainer, {RATIO: ratio}, every_step=True)

    # Checkpoints are saved after all other callbacks.

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_best(trainer)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_best(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_best(trainer)

    def _log_best(self, trainer: L.Trainer) -> None:
        """Log the loss of the best checkpoint if it comes from the latest validation."""
        checkpoint = trainer.checkpoint_callback
        if not isinstance(checkpoint, ModelCheckpoint) or checkpoint.best_model_score is None:
            return
        best, now = float(checkpoint.best_model_score), trainer.callback_metrics.get(str(checkpoint.monitor))
        if best == self._best or now is None or float(now) != best:
            return
        self._best = best
        if TOTAL in trainer.callback_metrics:
            log_step_metrics(trainer, {OF_BEST: trainer.callback_metrics[TOTAL]}, every_step=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"first": dict(self.first), "best": self._best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first, self._best = dict(state_dict["first"]), state_dict["best"]


def losses_in(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the validation losses by task, or the total loss if there are none.

    Example:
        >>> losses_in({"val/loss": 3.0, "val/loss/a": 1.0, "val/r2/a": 0.5}), losses_in({"val/loss": 3.0})
        ({'a': 1.0}, {'all': 3.0})
    """
    by_task = {name.removeprefix(PREFIX): value for name, value in metrics.items() if name.startswith(PREFIX)}
    return by_task or ({"all": metrics[TOTAL]} if TOTAL in metrics else {})


def mean_ratio(losses: Mapping[str, float], first: Mapping[str, float]) -> float | None:
    """Return the mean of the losses relative to the first ones, or ``None`` if no task has a ratio.

    Example:
        >>> mean_ratio({"a": 1.0, "b": 50.0}, {"a": 2.0, "b": 200.0})
        0.375
    """
    ratios = [loss / first[task] for task, loss in losses.items() if 0 < first[task] < math.inf]
    return fmean(ratios) if ratios else None
