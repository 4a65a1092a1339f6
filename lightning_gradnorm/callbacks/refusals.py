"""Settings of a Trainer in which losses cannot be balanced: each is an error at the start of training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lightning_gradnorm.callbacks.packages import is_one_of


def refuse_sharded(caller: str, strategy: Any) -> None:
    """Raise ValueError for a strategy that keeps only a piece of each weight or activation on a rank."""
    name = type(strategy).__name__
    if is_one_of(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(
            f"{caller}: {name} keeps only a piece of the shared layer on each rank, in a form that cannot be put together for "
            f"one layer alone. Use strategy='ddp', or ModelParallelStrategy with fully_shard."
        )
    if is_one_of(strategy, "ModelParallelStrategy") and strategy.device_mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"{caller}: tensor parallelism cuts the representation into pieces, which is not supported. Use "
            f"ModelParallelStrategy(tensor_parallel_size=1), or strategy='ddp'."
        )


def refuse_line_search(caller: str, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise ValueError for LBFGS."""
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise ValueError(
            f"{caller}: torch.optim.LBFGS evaluates the losses several times within one step, between which their weights "
            f"should not change. Use another optimizer for the network, or FixedWeights."
        )
