"""Stops at Ctrl-C between two optimizer steps, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_gradnorm.experiments.callbacks.save_last import BetweenSteps


class SaveOnInterrupt(BetweenSteps):
    """At the first Ctrl-C, finishes the optimizer step, saves ``interrupted.ckpt`` and stops. At the second, stops at once.

    You cannot resume exactly from a checkpoint saved in the middle of a batch, because the optimizer may have stepped while
    the counters have not. You can from this one. With several processes, the ranks would stop at different batches, so
    Lightning's own handling of Ctrl-C remains.

    Args:
        dirpath: folder of the checkpoint.

    Example:
        >>> callback = SaveOnInterrupt(dirpath="checkpoints")
    """

    def __init__(self, dirpath: str | Path) -> None:
        self.checkpoint = Path(dirpath) / "interrupted.ckpt"
        self.interrupted = False
        self._previous: Any = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.interrupted = False
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.interrupted = True
        handle = self._previous
        self._restore()
        # A sweep's handler records the signal. Its exception has to wait until the step ends.
        with suppress(KeyboardInterrupt):
            if callable(handle):
                handle(signum, frame)
        rank_zero_info("Stopping after this step. Press Ctrl-C again to stop at once, without a checkpoint.")

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.interrupted and self._can_be_resumed(trainer):
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            raise KeyboardInterrupt

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()
