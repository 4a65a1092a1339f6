"""Trains in two processes that shard one network between them (FSDP2)."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness import Recorder, state_by_part
from lightning.pytorch.strategies import ModelParallelStrategy
from models import Automatic, Manual, vector_batches
from ranks import _OwnBatches, in_processes, shares
from strategies import STRATEGIES
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_gradnorm import GradNorm

STEPS, T = 12, 3
TASKS = ["seg", "depth", "normal"]
# Everything with weights is sharded: what is not, ModelParallelStrategy leaves to each rank for itself.
SHARDED = {
    "encoder and heads": ["encoder", "seg_head", "depth_head", "normal_head"],
    "each layer": ["encoder.0", "encoder.2", "seg_head", "depth_head", "normal_head"],
    "layers within the encoder": ["encoder.0", "encoder.2", "encoder", "seg_head", "depth_head", "normal_head"],
}


class Sharding:
    """Applies `fully_shard` where Lightning wants it."""

    sharded: list[str]

    def configure_model(self) -> None:
        for name in self.sharded:
            fully_shard(self.get_submodule(name), mesh=self.device_mesh["data_parallel"])  # type: ignore[attr-defined]


class Sharded(Sharding, Automatic):
    pass


class ShardedManual(Sharding, Manual):
    pass


class Tell(L.Callback):
    def __init__(self, recorder: Recorder, folder: Path) -> None:
        self.recorder, self.folder = recorder, folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = state_by_part(pl_module)
        whole = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in state.items()}
        told = {
            "weights": self.recorder.weights,
            "network": {n: v.detach().clone() for n, v in whole.items()},
            "sharded": [name for name, value in state.items() if isinstance(value, DTensor)],
        }
        torch.save(told, self.folder / f"{trainer.global_rank}.pt")
        trainer.strategy.barrier()


def train_sharded(folder: Path, case: str, **options: Any) -> list[str]:
    """Train, and return each rank's traceback if it fails; both write the resulting network to `folder`."""

    def work(rank: int) -> None:
        try:
            _train_on_this_rank(folder, case, **options)
        except BaseException:
            (folder / f"{rank}.txt").write_text(traceback.format_exc())

    in_processes(work, timeout=120)
    return [error.read_text() for error in sorted(folder.glob("*.txt"))]


def _train_on_this_rank(
    folder: Path,
    case: str,
    manual: bool = False,
    heads: bool = True,
    accumulate: int = 1,
    options: Mapping[str, Any] | None = None,
    strategy: str | None = None,
) -> None:
    warnings.simplefilter("ignore")
    model: Any = ShardedManual(T, accumulate=accumulate) if manual else Sharded(T)
    model.sharded = SHARDED[case]
    named = {"heads": model.heads() if heads else None, **(options or {})}
    balancing: Any
    if strategy is None:
        balancing = GradNorm(TASKS, shared_layer="encoder.2", **named)
    else:
        balancing = STRATEGIES[strategy](tasks=TASKS, **named)
    if manual:
        model.gradnorm = [balancing]
    recorder = Recorder(balancing, accumulate)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=1 if manual else accumulate,
        callbacks=[balancing, recorder, Tell(recorder, folder)],
    )
    steps = [shares(batch, 2, accumulate) for batch in vector_batches(T, STEPS, size=8)]
    trainer.fit(model, datamodule=_OwnBatches(steps))
