"""Trains one network in several forked processes, gives each rank its own batches, and reports how each rank ended."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import Recorder, state_by_part
from lightning.pytorch.strategies import DDPStrategy
from models import TASKS, Automatic, Batch, Manual, as_inputs_and_targets
from textbook import Forward
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_gradnorm.callbacks.base import BalancingCallback

Step = list[list[Any]]
"""The batches of one optimizer step: of each rank, one for each micro-batch. The last step may have fewer."""


def shares(batch: Batch, ranks: int, accumulate: int) -> Step:
    """Cut the whole batch of one optimizer step into equal parts."""
    parts = {name: value.chunk(ranks * accumulate) for name, value in batch.items()}
    cut = [{name: part[i] for name, part in parts.items()} for i in range(ranks * accumulate)]
    return [cut[rank * accumulate : (rank + 1) * accumulate] for rank in range(ranks)]


def in_form_of(kind: str, steps: list[Step]) -> list[Step]:
    """The batches as this kind of module takes them."""
    if kind != "MultiTaskModule":
        return steps
    return [[as_inputs_and_targets(of_rank) for of_rank in step] for step in steps]


_NAMES = TASKS[:3]


@dataclass
class Presence:
    """Which tasks a batch lacks, and in how many parts each step is cut."""

    lacks: Callable[[int, int, int], set[str]]
    """Of step, rank and micro-batch."""
    ranks: int = 2
    accumulate: int = 1


def _at_random(step: int, rank: int, micro: int) -> set[str]:
    generator = torch.Generator().manual_seed(step * 100 + rank * 10 + micro)
    absent = {task for task in _NAMES if torch.rand((), generator=generator) < 0.4}
    return absent if len(absent) < 3 else set()


def when(condition: bool, *tasks: str) -> set[str]:
    """The tasks, if the condition holds."""
    return set(tasks) if condition else set()


PRESENCE = {
    "a task absent on one rank": Presence(lambda s, r, m: when(r == 1 and s % 2 == 0, "depth")),
    "a task absent on all ranks": Presence(lambda s, r, m: when(s % 3 == 1, "depth")),
    "a task never on one rank": Presence(lambda s, r, m: when(r == 1, "depth")),
    "no task on two ranks": Presence(lambda s, r, m: set(_NAMES) - {_NAMES[r]}, ranks=3),
    "absent tasks wander over the ranks": Presence(lambda s, r, m: when(r == s % 2, _NAMES[s % 3])),
    "absent in the first micro-batch": Presence(lambda s, r, m: when(m == 0, "depth"), accumulate=2),
    "absent in the last micro-batch": Presence(lambda s, r, m: when(m == 1 and s % 2 == 1, "depth"), accumulate=2),
    "absent on one rank in one micro-batch": Presence(lambda s, r, m: when(r == 1 and m == s % 2, "seg"), accumulate=2),
    "at random": Presence(_at_random, ranks=4, accumulate=2),
}
NO_TASK = {
    "no task on one rank": Presence(lambda s, r, m: when(r == 1 and s % 3 == 1, *_NAMES)),
    "no task on one rank in the first batch": Presence(lambda s, r, m: when(r == 1 and s == 0, *_NAMES)),
    "no task on one rank in the first micro-batch": Presence(
        lambda s, r, m: when(r == 1 and m == 0 and s % 3 == 1, *_NAMES), accumulate=2
    ),
    "no task on one rank in the last micro-batch": Presence(
        lambda s, r, m: when(r == 1 and m == 1 and s % 3 == 1, *_NAMES), accumulate=2
    ),
}


def lacking(batches: Sequence[Batch], presence: Presence) -> list[Step]:
    """The batches of as many steps, cut into parts, each without what it lacks."""
    steps = [shares(batch, presence.ranks, presence.accumulate) for batch in batches]
    return [
        [
            [
                {name: value for name, value in batch.items() if name not in presence.lacks(s, r, m)}
                for m, batch in enumerate(of_rank)
            ]
            for r, of_rank in enumerate(step)
        ]
        for s, step in enumerate(steps)
    ]


class MayLack(Automatic):
    """As `Automatic`, for batches in which some tasks are missing, or all of them."""

    def some_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The back-propagated loss, and the losses of the tasks in the batch."""
        z = self.encoder(batch["x"])
        losses = {t: F.mse_loss(getattr(self, f"{t}_head")(z), batch[t]) for t in self.tasks if t in batch}
        return torch.stack([0 * z.sum(), *losses.values()]).sum(), losses

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        loss, losses = self.some_losses(batch)
        return {"loss": loss, **dict.fromkeys(self.tasks), **losses}

    def forward_for_textbook(self, batch: Batch) -> Forward:
        z = self.encoder(batch["x"])
        losses = {t: F.mse_loss(getattr(self, f"{t}_head")(z), batch[t]) for t in self.tasks if t in batch}
        return Forward(losses, representation=[z])


class MayLackManual(MayLack, Manual):
    """The same with manual optimization; it lets DDP reduce in every backward pass, as users do who forget `no_sync`."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        loss, losses = self.some_losses(batch)
        for gradnorm in self.gradnorm:
            gradnorm.watch({**dict.fromkeys(self.tasks), **losses})
        optimizer = self.optimizers()
        self.manual_backward(loss / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


@dataclass
class Told:
    """How one rank ended."""

    weights: list[dict[str, float]]
    """In force after each optimizer step."""
    network: dict[str, Tensor]
    logged: dict[str, float]
    warnings: list[str]
    notes: list[Any] = field(default_factory=list)
    """What a `Notes` callback has collected."""


class Notes(L.Callback):
    """A callback that collects something in `notes`, in each process for itself."""

    def __init__(self) -> None:
        self.notes: list[Any] = []


class Sent(Notes):
    """Notes each collective that our code asks for: in which step, whether within backward, of how many numbers, and whether in
    the group in which DDP reduces the gradients."""

    COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_object")

    def __init__(self, accumulate: int) -> None:
        super().__init__()
        self.accumulate, self.step = accumulate, 0

    def on_train_start(self, trainer, pl_module) -> None:
        for name in self.COLLECTIVES:
            self._listen(name, getattr(torch.distributed, name))

    def _listen(self, name: str, collective: Callable[..., Any]) -> None:
        def noted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            stack = traceback.extract_stack()
            if any("lightning_gradnorm" in frame.filename for frame in stack):
                in_backward = any(frame.name == "_engine_run_backward" for frame in stack)
                numbers = tensor.numel() if isinstance(tensor, torch.Tensor) else None
                group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
                self.notes.append((self.step, name, in_backward, numbers, group in (None, dist.group.WORLD)))
            return collective(tensor, *args, **kwargs)

        setattr(torch.distributed, name, noted)  # in this forked process alone

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.step = (batch_idx + 1) // self.accumulate

    def on_train_end(self, trainer, pl_module) -> None:
        self.step = trainer.global_step


class _Tell(L.Callback):
    """Writes to a file what this rank has to tell; waits for the others before the processes part."""

    def __init__(self, folder: Path, recorder: Recorder, caught: list[warnings.WarningMessage]) -> None:
        self.folder, self.recorder, self.caught = folder, recorder, caught

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.fit_loop.epoch_loop.batch_idx + 1) % self.recorder.accumulate:  # the last step had fewer batches
            self.recorder.weights.append(dict(self.recorder.balancing.weights))
        told = Told(
            weights=self.recorder.weights,
            network={name: value.detach().clone() for name, value in state_by_part(pl_module).items()},
            logged={name: float(value) for name, value in trainer.callback_metrics.items()},
            warnings=[str(one.message) for one in self.caught],
            notes=[note for c in trainer.callbacks if isinstance(c, Notes) for note in c.notes],
        )
        torch.save(told, self.folder / f"{trainer.global_rank}.pt")
        trainer.strategy.barrier()


class _OwnBatches(L.LightningDataModule):
    """Each rank reads its own batches in their order: no sampler, which Lightning would have shuffle them."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.steps = steps

    def train_dataloader(self) -> DataLoader:
        own = [batch for step in self.steps for batch in step[self.trainer.global_rank]]
        return DataLoader(own, batch_size=None)  # type: ignore[arg-type]


@dataclass
class Run:
    """What `train` is to do."""

    model: L.LightningModule
    balancing: BalancingCallback[Any]
    steps: Sequence[Step]
    ddp: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[L.Callback] = ()
    warns: str | None = None
    """Each rank reports warnings that match; any other is an error there as in all tests."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the Trainer."""

    @property
    def ranks(self) -> int:
        return len(self.steps[0])

    def fit(self, folder: Path, strategy: DDPStrategy | None) -> None:
        """Train; each rank writes its results to `folder`."""
        accumulate = len(self.steps[0][0])
        recorder = Recorder(self.balancing, accumulate)
        options = dict(self.options)
        if self.model.automatic_optimization:
            options["accumulate_grad_batches"] = accumulate
        if strategy is not None:
            options["strategy"] = strategy
        with warnings.catch_warnings(record=True) as caught:
            if self.warns is not None:
                warnings.filterwarnings("always", message=self.warns)
            quiet: dict[str, Any] = {
                "accelerator": "cpu",
                "devices": self.ranks,
                "max_epochs": 1,
                "logger": False,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
            }
            callbacks = [*self.callbacks, self.balancing, recorder, _Tell(folder, recorder, caught)]
            L.Trainer(callbacks=callbacks, **{**quiet, **options}).fit(self.model, datamodule=_OwnBatches(self.steps))

    def told(self, folder: Path) -> list[Told]:
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(self.ranks)]


def train(
    model: L.LightningModule,
    balancing: BalancingCallback[Any],
    steps: Sequence[Step],
    *,
    ddp: Mapping[str, Any] | None = None,
    callbacks: Sequence[L.Callback] = (),
    warns: str | None = None,
    **options: Any,
) -> list[Told]:
    """Train in as many processes as `steps` has ranks, and return what each tells. One rank: in this process."""
    run = Run(model, balancing, steps, ddp or {}, callbacks, warns, options)
    # A rank that waits forever should fail soon.
    strategy = DDPStrategy(start_method="fork", timeout=timedelta(seconds=30), **run.ddp) if run.ranks > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        run.fit(Path(folder), strategy)
        return run.told(Path(folder))


def train_each(runs: Mapping[str, Run]) -> dict[str, list[Told] | str]:
    """Train one after the other in the same processes, which cost more to start than a training of a few steps.

    A run that fails on a rank ends them all, since ranks that have parted do not meet again: it has its traceback, and those
    that would have followed it say so.
    """
    (ranks,) = {run.ranks for run in runs.values()}

    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, list[Told] | str] = {}
        for name in runs:
            (Path(folder) / name).mkdir(parents=True)

        def work(rank: int) -> None:
            for name, run in runs.items():
                try:
                    torch.manual_seed(0)
                    # Processes that are there already are those that Lightning takes to have been started by a cluster.
                    strategy = DDPStrategy(timeout=timedelta(seconds=30), **run.ddp)
                    run.fit(Path(folder) / name, strategy)
                except BaseException:
                    (Path(folder) / name / f"{rank}.txt").write_text(traceback.format_exc())
                    return

        in_processes(work, ranks)
        for name, run in runs.items():
            errors = sorted((Path(folder) / name).glob("*.txt"))
            if errors:
                found[name] = "\n".join(f"rank {error.stem}: {error.read_text()}" for error in errors)
            elif len(list((Path(folder) / name).glob("*.pt"))) < ranks:
                found[name] = "was not run, since one before it failed"
            else:
                found[name] = run.told(Path(folder) / name)
        return found


def in_processes(work: Callable[[int], None], ranks: int = 2, timeout: float = 240) -> None:
    """Call `work(rank)` in forked processes in which Lightning's `devices=ranks` finds all others already started.

    Raises:
        TimeoutError: they have not ended; they are ended then.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def begin(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
        work(rank)

    processes = mp.start_processes(begin, nprocs=ranks, join=False, start_method="fork")
    assert processes is not None
    end = time.monotonic() + timeout
    try:
        while not processes.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"{ranks} processes have not ended after {timeout} s")
    finally:
        for process in processes.processes:
            process.kill()


def assert_identical(ranks: Sequence[Told]) -> None:
    """All ranks have had the same weights after every step, and have the same network, bit for bit."""
    first, *others = ranks
    for rank, other in enumerate(others, start=1):
        assert other.weights == first.weights, f"rank {rank} has other weights than rank 0"
        assert other.network.keys() == first.network.keys()
        for name, value in first.network.items():
            assert torch.equal(other.network[name], value), f"{name} differs on rank {rank}"


def distance(found: Told, expected: Told) -> tuple[float, float]:
    """The largest difference of a weight after any step, and of a number in the network at the end."""
    assert len(found.weights) == len(expected.weights)
    weights = max(
        (
            abs(one[task] - other[task])
            for one, other in zip(found.weights, expected.weights, strict=True)
            for task in (other.keys() | one.keys() if one else ())  # a strategy without weights tells none
        ),
        default=0.0,
    )
    assert found.network.keys() == expected.network.keys()
    network = max(float((found.network[name] - value).abs().max()) for name, value in expected.network.items())
    return weights, network
