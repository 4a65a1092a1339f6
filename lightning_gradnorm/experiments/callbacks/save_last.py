"""Checkpoints that survive a kill: written whole or not at all, and more than once per epoch if you want."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override


class WholeCheckpoints(TorchCheckpointIO):
    """Writes to a file next to the checkpoint, then renames it. The checkpoint is always the old or the new one, never half.

    Lightning writes to the system's temporary folder. If that is on another file system, it then copies the file over the
    old checkpoint instead of renaming it. A process killed during the copy has neither.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     WholeCheckpoints().save_checkpoint({"epoch": 3}, f"{folder}/last.ckpt")
        ...     os.listdir(folder)
        ['last.ckpt']
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):  # leave both to Lightning
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")  # a fixed name, so the leftover of a kill is overwritten
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power failure could leave an empty file under the new name
        part.replace(path)


def write_whole(trainer: L.Trainer) -> None:
    """Make the trainer write `WholeCheckpoints`, unless it has a custom checkpoint plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()


class BetweenSteps(L.Callback):
    """Knows after which batches training can resume exactly.

    It cannot within an optimizer step, because a checkpoint does not contain the accumulated gradients. It also cannot at
    an epoch's last batch, because the resumed training would skip the validation that follows.
    """

    _steps_before = 0

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._steps_before = trainer.global_step

    def _can_be_resumed(self, trainer: L.Trainer) -> bool:
        return trainer.global_step > self._steps_before and not trainer.is_last_batch


class SaveLast(BetweenSteps, Checkpoint):
    """Writes ``last.ckpt`` at the end of every epoch and, if you want, within epochs.

    ``ModelCheckpoint(monitor=…, save_last=True)`` can do neither. It saves the last checkpoint only together with a best one,
    so its ``last.ckpt`` becomes stale as soon as nothing improves. With ``every_n_train_steps``, it saves nothing before the
    first validation, and later judges new weights by an old metric.

    Args:
        dirpath: folder of the checkpoint.
        every_n_train_steps: optimizer steps between checkpoints within an epoch; ``None`` saves only at its end.

    Raises:
        ValueError: ``every_n_train_steps`` is less than 1.

    Example:
        >>> callback = SaveLast(dirpath="checkpoints", every_n_train_steps=100)
    """

    def __init__(self, dirpath: str | Path, every_n_train_steps: int | None = None) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"SaveLast: every_n_train_steps should be at least 1 or null; got {every_n_train_steps}")
        self.checkpoint = Path(dirpath) / "last.ckpt"
        self.every_n_train_steps = every_n_train_steps

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.every_n_train_steps
        if every is not None and trainer.global_step % every == 0 and self._can_be_resumed(trainer):
            self._save(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)  # Lightning calls a `Checkpoint` last, when validation and schedulers are done

    def _save(self, trainer: L.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
