"""Anything that shards single layers is an error: tensor parallelism, and for the monitor FSDP2 as well."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import packages
import pytest
from models import TASKS, Automatic
from torchjd.aggregation import UPGrad
from torchjd.scalarization import UW

from lightning_gradnorm import Aggregation, FixedWeights, GradientNormMonitor, GradNorm, Scalarization

CALLBACKS: dict[str, Callable[[], Any]] = {
    "GradNorm": lambda: GradNorm(TASKS[:3], shared_layer="encoder.2"),
    "Scalarization": lambda: Scalarization(UW(3), TASKS[:3]),
    "Aggregation": lambda: Aggregation(UPGrad(), TASKS[:3]),
    "FixedWeights": lambda: FixedWeights(dict.fromkeys(TASKS[:3], 1.0)),
}


def trainer(package: ModuleType, tensor_parallel_size: int) -> Any:
    """As much of a Trainer as is asked: the strategy does not start in one process."""
    made = object.__new__(packages.submodule(package, "strategies").ModelParallelStrategy)
    made._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: tensor_parallel_size)}
    return SimpleNamespace(
        callbacks=[], optimizers=[], global_step=0, ckpt_path=None, world_size=1, global_rank=0, strategy=made
    )


@pytest.mark.both_packages
@pytest.mark.parametrize("name", CALLBACKS)
def test_tensor_parallelism_is_refused(name: str, package: ModuleType) -> None:
    with pytest.raises(ValueError, match=rf"{name}: tensor parallelism splits the representation, .* strategy='ddp'"):
        CALLBACKS[name]().on_train_start(trainer(package, 2), Automatic(3))
    CALLBACKS[name]()._refuse_unsupported(trainer(package, 1))  # FSDP2 alone is not


@pytest.mark.both_packages
@pytest.mark.parametrize("size", [1, 2])
def test_the_monitor_is_refused_where_each_rank_has_a_piece_of_each_parameter(size: int, package: ModuleType) -> None:
    expected = r"GradientNormMonitor: ModelParallelStrategy keeps only a shard of .* strategy='ddp'"
    with pytest.raises(ValueError, match=expected):
        GradientNormMonitor(TASKS[:3]).on_train_start(trainer(package, size), Automatic(3))
