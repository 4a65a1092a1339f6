"""Everything that a step used is freed when the step ends, without waiting for the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
from garbage import Garbage, only_what_comes_from_here
from harness import Batches
from models import TASKS, Automatic, vector_batches
from strategies import STRATEGIES, tasks_for

from lightning_gradnorm import GradNorm

GRADNORMS: dict[str, Callable[..., Any]] = {
    "GradNorm": GradNorm,
    "GradNorm of activations": partial(GradNorm, norm_of="activation"),
    "GradNorm of a linear layer in large batches": partial(GradNorm, shared_layer="encoder.0.weight"),
}
SOME = [
    "UW of the losses",
    "FAMO of the losses",
    "UPGrad at the representation",
    "UPGrad at the parameters",
    "IMTL",
    "DB-MTL",
]


class Collects(L.Callback):
    """Looks at what a few steps leave."""

    def __init__(self) -> None:
        self.garbage = Garbage()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            self.garbage.begin()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 6:
            self.garbage.end()


@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("name", [*GRADNORMS, *SOME])
def test_no_tensor_waits_for_the_garbage_collector(name: str, with_heads: bool, quiet_trainer: Any) -> None:
    T = tasks_for(name)
    with only_what_comes_from_here():
        model, collects = Automatic(T), Collects()
        make = (GRADNORMS | STRATEGIES)[name]
        options = {} if "losses" in name else {"heads": model.heads() if with_heads else None}
        try:
            trainer = quiet_trainer(callbacks=[make(tasks=TASKS[:T], **options), collects], max_steps=7)
            trainer.fit(model, Batches(vector_batches(T, 7)))
        finally:
            gc.enable()
    assert collects.garbage.tensors == []
