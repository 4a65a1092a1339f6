"""Callbacks that write what a run was and what it came to into its folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf
from typing_extensions import override

from lightning_gradnorm.experiments.cli.run_folder import (
    CONFIG,
    FAILURE,
    LAST_METRICS,
    METRICS,
    OVERRIDES,
    TIME,
    WEIGHTS,
    in_one_line,
    read_whole,
    write_whole,
)


class RunRecord(L.Callback):
    """Writes the run's configuration once training really begins: a resume that fails leaves the folder as it was.

    What an earlier training has found out goes then, so that it is not taken for this one's.

    Args:
        folder: the run's folder.
        config: the whole configuration.
        overrides: what the command line gave.
    """

    def __init__(self, folder: Path, config: DictConfig, overrides: Sequence[str]) -> None:
        self.folder, self.config, self.overrides = folder, config, list(overrides)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for outdated in (METRICS, LAST_METRICS, WEIGHTS, TIME, FAILURE):
                (self.folder / outdated).unlink(missing_ok=True)
            OmegaConf.save(self.config, self.folder / CONFIG, resolve=True)
            OmegaConf.save(OmegaConf.create(self.overrides), self.folder / OVERRIDES)


class WeightsRecord(L.Callback):
    """Writes ``weights.json``: the task weights at the end and their mean over training, as far as the strategy has them.

    It is written where the training ends, which need not be the process that has read the configuration.

    Args:
        folder: the run's folder.
        balancing: the strategy; ``None`` if there is none.
    """

    def __init__(self, folder: Path, balancing: Any) -> None:
        self.file, self.balancing = folder / WEIGHTS, balancing

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = {name: getattr(self.balancing, name, None) for name in ("weights", "mean_weights")}
        weights = {name: dict(value) for name, value in found.items() if value}
        if trainer.is_global_zero and weights:
            write_whole(self.file, weights)

    def read(self) -> dict[str, dict[str, float]]:
        """Return what was written."""
        return {} if self.balancing is None else read_whole(self.file)


CLOCKS = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
"""What passes, and what the processor works for this process, all threads added up: on a busy machine the fairer measure."""


class TimeRecord(L.Callback):
    """Writes ``training.json``: ``{"seconds": …, "processor_seconds": …, "steps": …, "epochs": …}``.

    Validation is left out; a resumed run adds up.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / TIME
        self._so_far = dict.fromkeys(CLOCKS, 0.0)
        self._began: dict[str, float] | None = None

    def _go(self) -> None:
        self._began = {name: now() for name, now in CLOCKS.items()}

    def _stop(self) -> None:
        self._so_far, self._began = self._until_now(), None

    def _until_now(self) -> dict[str, float]:
        if self._began is None:
            return self._so_far
        return {name: self._so_far[name] + CLOCKS[name]() - began for name, began in self._began.items()}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._go()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._go()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()
        if trainer.is_global_zero:
            record = {**self._so_far, "steps": trainer.global_step, "epochs": trainer.current_epoch}
            write_whole(self.file, record)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._until_now()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._so_far = {name: float(state_dict[name]) for name in CLOCKS}


class FailureRecord(L.Callback):
    """Writes ``failure.json`` if the run ends by an error: ``{"error": …, "step": …, "epoch": …}``; Ctrl-C is none.

    Training that goes on removes it (see `RunRecord`), and so does a test that is done. An error before training leaves the
    folder of an earlier training as it was.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FAILURE
        self._is_ours = not (folder / CONFIG).is_file()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._is_ours = True

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._is_ours = True

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.file.unlink(missing_ok=True)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Exception) or not self.file.parent.is_dir() or not trainer.is_global_zero:
            return
        if not self._is_ours:
            return
        record = {"error": in_one_line(exception), "step": trainer.global_step, "epoch": trainer.current_epoch}
        write_whole(self.file, record)
