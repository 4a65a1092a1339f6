"""Logs a callback's values: to the loggers and to ``trainer.callback_metrics``, in the steps that Lightning writes."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor


def is_logged_step(trainer: L.Trainer) -> bool:
    """Return True if values of this training batch reach a logger, or are the last of an epoch or of the training.

    Loggers are written every ``log_every_n_steps``; monitors are read at the end of an epoch.
    """
    is_last = trainer.is_last_batch or 0 <= trainer.max_steps <= trainer.global_step + 1
    # As Lightning's own LearningRateMonitor asks.
    written = trainer._logger_connector.should_update_logs or trainer.fast_dev_run or is_last  # type: ignore[attr-defined]
    return bool(written) and not trainer.barebones


def log_step_metrics(trainer: L.Trainer, values: Mapping[str, Tensor | float], *, every_step: bool = False) -> None:
    """Log values of the current step by name; with ``every_step`` whichever steps ``log_every_n_steps`` selects.

    Directly, as `LearningRateMonitor` does: ``LightningModule.log`` takes a hundred microseconds a value.
    """
    if not values:
        return
    tensors = [
        value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for value in values.values()
    ]
    trainer.callback_metrics.update(zip(values, tensors, strict=True))
    if trainer.loggers and (every_step or trainer._logger_connector.should_update_logs):
        device = max(tensors, key=lambda tensor: tensor.is_cuda).device
        numbers = torch.stack([tensor.to(device, torch.float64) for tensor in tensors]).tolist()  # one wait for a GPU
        for logger in trainer.loggers:
            logger.log_metrics(dict(zip(values, numbers, strict=True)), step=logger_step(trainer))


def logger_step(trainer: L.Trainer) -> int:
    """Return the step under which Lightning writes to its loggers."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
