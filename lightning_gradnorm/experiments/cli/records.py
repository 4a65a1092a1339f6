"""Callbacks that write a run's options and results to its folder."""

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
    """Writes the run's configuration when training begins, so a failed resume leaves the folder unchanged.

    It also removes the results of earlier training, so you cannot mistake them for new ones.

    Args:
        folder: the run's folder.
        config: the whole configuration.
        overrides: overrides on the command line.
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
    """Writes ``weights.json``: the final task weights and their mean over training, if the strategy has them.

    The process that trains writes it, which may differ from the process that read the configuration.

    Args:
        folder: the run's folder.
        balancing: the strategy, or ``None`` without one.
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
        """Return the contents of the file."""
        return {} if self.balancing is None else read_whole(self.file)


CLOCKS = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
"""Wall time and CPU time of this process, summed over its threads. On a busy machine, CPU time is the fairer measure."""


class TimeRecord(L.Callback):
    """Writes ``training.json``: ``{"seconds": …, "processor_seconds": …, "steps": …, "epochs": …}``.

    Excludes validation. A resumed run adds to the earlier times.

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
    """Writes ``failure.json`` if the run ends with an error: ``{"error": …, "step": …, "epoch": …}``. Ctrl-C is not an error.

    Resumed training removes it (see `RunRecord`), and so does a completed test. An error before training starts leaves the
    folder of an earlier training unchanged.

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
