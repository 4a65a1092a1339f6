"""Logs a callback's values and images to the loggers and to ``trainer.callback_metrics``, when Lightning writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_gradnorm.callbacks.packages import is_one_of


def is_logged_step(trainer: L.Trainer) -> bool:
    """Return True if values of this training batch reach a logger, or are the last of an epoch or of the training.

    Loggers are written every ``log_every_n_steps``; monitors are read at the end of an epoch.
    """
    is_last = trainer.is_last_batch or 0 <= trainer.max_steps <= trainer.global_step + 1
    # The same test as in Lightning's own LearningRateMonitor.
    written = trainer._logger_connector.should_update_logs or trainer.fast_dev_run or is_last  # type: ignore[attr-defined]
    return bool(written) and not trainer.barebones


def log_step_metrics(trainer: L.Trainer, values: Mapping[str, Tensor | float], *, every_step: bool = False) -> None:
    """Log values of the current step by name; with ``every_step``, in all steps, not only every ``log_every_n_steps``.

    Bypasses ``LightningModule.log``, which takes a hundred microseconds a value, as `LearningRateMonitor` does.
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


def loggers_of_images(trainer: L.Trainer) -> list[Any]:
    """Return the trainer's loggers that take images: TensorBoard, Weights & Biases, MLflow, Comet, and similar ones."""
    known = ("TensorBoardLogger", "MLFlowLogger", "CometLogger")
    return [one for one in trainer.loggers if is_one_of(one, *known) or callable(getattr(one, "log_image", None))]


def log_image(trainer: L.Trainer, name: str, image: Any, step: int) -> None:
    """Log an image to every logger that takes images; skip the others.

    Call it on the first rank only.

    Args:
        trainer: has the loggers.
        name: such as ``val/prediction/depth``.
        image: RGB, a tensor or an array of shape ``(3, height, width)``; uint8, or floats in [0, 1].
        step: the step to write it under.
    """
    loggers = loggers_of_images(trainer)
    if not loggers:
        return
    picture = torch.as_tensor(image).detach().cpu()
    pixels = picture if picture.dtype == torch.uint8 else (picture.float().clamp(0, 1) * 255).round().to(torch.uint8)
    rows = pixels.permute(1, 2, 0).contiguous().numpy()  # height, width, color
    for logger in loggers:
        if is_one_of(logger, "TensorBoardLogger"):
            logger.experiment.add_image(name, picture, step)
        elif is_one_of(logger, "MLFlowLogger"):
            logger.experiment.log_image(logger.run_id, rows, artifact_file=f"{name}/step_{step:08d}.png")
        elif is_one_of(logger, "CometLogger"):
            logger.experiment.log_image(rows, name=name, step=step)
        else:
            logger.log_image(name, [rows], step=step)
