"""Runs one way to train a network for a few steps, with a clock."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarking.networks import NETWORKS
from benchmarking.ways import Run

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class Setting:
    """The settings shared by all runs of a measure."""

    device: str = "cpu"
    threads: int = 2
    precision: str = "fp32"
    compiled: bool = False
    batch_size: int | None = None
    steps: int | None = None
    clock: str = "wall"

    @property
    def now(self) -> Callable[[], float]:
        return CLOCKS[self.clock]

    def steps_of(self, kind: str) -> int:
        return self.steps or NETWORKS[kind].steps

    def batch_of(self, kind: str) -> torch.Tensor:
        """Return a batch that is already on the device, so no copy is timed."""
        size, *shape = NETWORKS[kind].batch
        return torch.randn(self.batch_size or size, *shape, device=self.device)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def trainer(self, steps: int, callbacks: Sequence[L.Callback], **options: Any) -> L.Trainer:
        quiet: dict[str, Any] = {
            "max_steps": steps,
            "max_epochs": -1,
            "accelerator": "gpu" if self.device == "cuda" else "cpu",
            "devices": 1,
            "precision": PRECISIONS[self.precision],
            "callbacks": list(callbacks),
            "logger": False,
            "limit_val_batches": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return L.Trainer(**{**quiet, **options})


class Clock(L.Callback):
    """Records when each block of measured steps begins, and when the last step begins, after all earlier work is done."""

    def __init__(self, steps: int, warm_up: int, setting: Setting, block: int = 8) -> None:
        self.steps, self.warm_up, self.setting = steps, warm_up, setting
        self.block = min(block, steps - 1 - warm_up)
        self.begun = 0
        self.times: list[float] = []

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        since = self.begun - self.warm_up
        if since >= 0 and (since % self.block == 0 or self.begun == self.steps - 1):
            self.setting.synchronize()  # only here: in between, the host may run ahead
            self.times.append(self.setting.now())
        self.begun += 1

    def seconds(self) -> float:
        """Return the time from the first of the measured steps to the last."""
        return self.times[-1] - self.times[0]

    def step_time(self) -> float:
        """Return the time of a step: the median over whole blocks, which is robust against interruptions."""
        whole = 1 + (self.steps - 1 - self.warm_up) // self.block
        blocks = [end - begin for begin, end in pairwise(self.times[:whole])]
        return statistics.median(blocks) / self.block


def train(run: Run, kind: str, setting: Setting, callbacks: Sequence[L.Callback] = (), **options: Any) -> None:
    """Train for the network's number of steps.

    Args:
        run: model and callbacks of the way.
        kind: name of the network.
        setting: settings such as the device.
        callbacks: more callbacks.
        options: options of the Trainer.
    """
    steps = setting.steps_of(kind)
    trainer = setting.trainer(steps, [*run.callbacks, *callbacks], **options)
    trainer.fit(run.model, DataLoader([setting.batch_of(kind)] * steps, batch_size=None))  # type: ignore[arg-type]


def step_time(
    run: Run,
    kind: str,
    setting: Setting,
    callbacks: Sequence[L.Callback] = (),
    block: int | None = None,
    **options: Any,
) -> tuple[float, float]:
    """Call `train`, and return the seconds of a step and of the solver in it."""
    network = NETWORKS[kind]
    clock = Clock(setting.steps_of(kind), network.warm_up, setting, block or network.block)
    gc.collect()  # otherwise garbage from earlier runs costs 0.25 s in the middle of some run
    train(run, kind, setting, [clock, *callbacks], **options)
    return clock.step_time(), run.solver.mean() if run.solver is not None else 0.0
