"""A training on a device, a GPU or the CPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, Recorder
from models import (
    Automatic,
    Convolutional,
    Manual,
    as_inputs_and_targets,
    image_batches,
    multi_task_module,
    vector_batches,
)

from lightning_gradnorm import GradNorm

STEPS = 24
T = 3
NAMES = ["seg", "depth", "normal"]
MakeTrainer = Callable[..., L.Trainer]

CUDA = [
    pytest.mark.gpu,
    # Warnings of torch and Lightning about a certain GPU are not ours to fix; our own are.
    pytest.mark.filterwarnings(
        "default",
        *(f"error:{name}" for name in ("GradNorm", "FixedWeights", "Scalarization", "Aggregation", "MultiTask")),
    ),
]


def on_each_device(name: str, values: Sequence[str], quick: Collection[str]) -> pytest.MarkDecorator:
    """Every value on CUDA and on the CPU; on the CPU, values that are not `quick` run in the slow tests."""
    cases = [pytest.param(value, "cpu", marks=[] if value in quick else [pytest.mark.slow]) for value in values]
    cases += [pytest.param(value, "cuda", marks=CUDA) for value in values]
    return pytest.mark.parametrize((name, "device"), cases, indirect=["device"])


def in_single_precision(batch: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda tensor: tensor.float(), batch)


def fit(trainer: MakeTrainer, model: L.LightningModule, gradnorm: GradNorm, data: Any, **options: Any) -> Recorder:
    """Train, and return the weights after each step; single precision is the model's choice."""
    callbacks = options.pop("callbacks", [])
    resume = options.pop("ckpt_path", None)
    if next(model.parameters()).dtype == torch.float32 and not isinstance(data, L.LightningDataModule):
        data = [in_single_precision(batch) for batch in data]
    if isinstance(model, Manual):
        model.gradnorm = [gradnorm]
    recorder = Recorder(gradnorm)
    data = data if isinstance(data, L.LightningDataModule) else Batches(data)
    trainer(callbacks=[*callbacks, gradnorm, recorder], **options).fit(model, data, ckpt_path=resume)
    model.cpu()  # as Lightning does at the end of a fit, in all strategies but some
    return recorder


MODES = ["automatic", "manual", "batch-norm", "activation"]


def make(mode: str) -> tuple[L.LightningModule, GradNorm, list[Any]]:
    kind, _, with_heads = mode.partition(" with ")
    if kind == "module":
        return multi_task_module(T), GradNorm(), as_inputs_and_targets(vector_batches(T, STEPS))
    model = {"manual": Manual, "batch-norm": Convolutional}.get(kind, Automatic)(T)
    heads = model.heads() if with_heads else None
    gradnorm = GradNorm(NAMES, heads=heads, norm_of="activation" if kind == "activation" else "weight")
    return model, gradnorm, (image_batches if kind == "batch-norm" else vector_batches)(T, STEPS)
