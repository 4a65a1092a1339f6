"""Trains one network in several forked processes, gives each rank its own batches, and tells how each rank ended."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness import Recorder, state_by_part
from lightning.pytorch.strategies import DDPStrategy
from models import Automatic, Batch, Manual
from textbook import Forward
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_gradnorm import GradNorm

Step = list[list[Any]]
"""The batches of one optimizer step: of each rank, one for each micro-batch. The last step may have fewer."""


def shares(batch: Batch, ranks: int, accumulate: int) -> Step:
    """Cut the whole batch of one optimizer step into equal parts."""
    parts = {name: value.chunk(ranks * accumulate) for name, value in batch.items()}
    cut = [{name: part[i] for name, part in parts.items()} for i in range(ranks * accumulate)]
    return [cut[rank * accumulate : (rank + 1) * accumulate] for rank in range(ranks)]


class MayLack(Automatic):
    """As `Automatic`, for batches in which some tasks are missing, or all of them."""

    def some_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What is back-propagated, and the losses of the tasks that the batch has."""
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


class _Tell(L.Callback):
    """Writes to a file what this rank has to tell; waits for the others before the processes part."""

    def __init__(self, folder: Path, recorder: Recorder, caught: list[warnings.WarningMessage]) -> None:
        self.folder, self.recorder, self.caught = folder, recorder, caught

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.fit_loop.epoch_loop.batch_idx + 1) % self.recorder.accumulate:  # the last step had fewer batches
            self.recorder.weights.append(dict(self.recorder.gradnorm.weights))
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


def train(
    model: L.LightningModule,
    gradnorm: GradNorm,
    steps: Sequence[Step],
    *,
    ddp: dict[str, Any] | None = None,
    callbacks: Sequence[L.Callback] = (),
    warns: str | None = None,
    **options: Any,
) -> list[Told]:
    """Train in as many processes as `steps` has ranks, and return what each tells. One rank: in this process.

    Warnings that match `warns` are told by each rank; any other is an error there as in all tests.
    """
    ranks, accumulate = len(steps[0]), len(steps[0][0])
    recorder = Recorder(gradnorm, accumulate)
    if model.automatic_optimization:
        options["accumulate_grad_batches"] = accumulate
    if ranks > 1:  # a rank that waits for ever is to fail soon
        options["strategy"] = DDPStrategy(start_method="fork", timeout=timedelta(seconds=30), **(ddp or {}))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        if warns is not None:
            warnings.filterwarnings("always", message=warns)  # a forked process adds to a copy of `caught` of its own
        trainer = L.Trainer(
            accelerator="cpu",
            devices=ranks,
            max_epochs=1,
            logger=False,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[*callbacks, gradnorm, recorder, _Tell(Path(folder), recorder, caught)],
            **options,
        )
        trainer.fit(model, datamodule=_OwnBatches(steps))
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


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
        abs(one[task] - other[task])
        for one, other in zip(found.weights, expected.weights, strict=True)
        for task in other.keys() | one.keys()
    )
    assert found.network.keys() == expected.network.keys()
    network = max(float((found.network[name] - value).abs().max()) for name, value in expected.network.items())
    return weights, network
