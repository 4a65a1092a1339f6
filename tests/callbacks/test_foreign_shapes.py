"""Shapes of networks that nobody made for this callback: ten steps of each, against the double-backward textbook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from harness import Batches, BeforeBatch, MemoryLogger, Recorder, assert_agrees
from models import network_sgd
from shapes import LAYERS, Case
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_gradnorm import GradNorm

STEPS = 10
MakeTrainer = Callable[..., L.Trainer]
both = pytest.mark.parametrize("heads", [False, True], ids=["no heads", "heads"])


def table(cases: Mapping[str, Case]) -> Any:
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=name, marks=case.marks) for name, case in cases.items()]
    )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, also of what torch.compile has wrapped."""
    return {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}


def learn(case: Case, batches: Sequence[Any], optimizer: Any = network_sgd, **options: Any) -> tuple[Any, Any]:
    """Train the twin as the textbook says; the fused attention kernels cannot be differentiated twice."""
    twin = case.make().for_textbook()
    named = dict(twin.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        shared = [named[name] for name in case.W]
        trajectory = textbook.train(
            twin, twin.forward_for_textbook, batches, shared, optimizer(twin.parameters()), **options
        )
    moved = max(abs(weight - 1.0) for weight in trajectory.weights[-1].values())
    assert moved > 1e-3, "the oracle's weights did not move: this test would prove nothing"
    return twin, trajectory


def fit(
    trainer: MakeTrainer, model: Any, gradnorm: GradNorm, batches: Sequence[Any], seeded: bool = False, **options: Any
) -> tuple[Recorder, MemoryLogger]:
    recorder, logger = Recorder(gradnorm), MemoryLogger()
    callbacks = [BeforeBatch(torch.manual_seed if seeded else lambda index: None), gradnorm, recorder]
    trainer(callbacks=callbacks, logger=logger, **options).fit(model, Batches(batches))
    return recorder, logger


def assert_trains_as_the_textbook_says(
    trainer: MakeTrainer, case: Case, heads: bool, *, seeded: bool = False, **options: Any
) -> None:
    """Weights and norms of every step, parameters and buffers at the end."""
    batches = case.batches(STEPS)
    before = {"before_micro_batch": torch.manual_seed} if seeded else {}
    twin, trajectory = learn(case, batches, **before)
    model = case.make()
    gradnorm = GradNorm(list(model.tasks), shared_layer=case.layer, heads=case.heads if heads else None)

    recorder, logger = fit(trainer, model, gradnorm, batches, seeded, **options)

    for task in model.tasks:
        norms = [step[task] for step in trajectory.grad_norms]
        assert logger.scalars[f"gradnorm/grad_norm/{task}"] == pytest.approx(norms, rel=1e-6)
    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-8, state=whole_state)


@both
@table(LAYERS)
def test_the_shared_layer_may_be(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)
