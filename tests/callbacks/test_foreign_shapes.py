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
from shapes import CALLS, CHECKPOINTS, LAYERS, SURROUNDINGS, Case
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_gradnorm import GradNorm

STEPS = 10
MakeTrainer = Callable[..., L.Trainer]


def table(cases: Mapping[str, Case]) -> Any:
    """One row for each case, without and with `heads=` where both are possible."""
    rows = [
        pytest.param(case, heads, id=f"{name}, heads" if heads else name, marks=case.marks)
        for name, case in cases.items()
        for heads in case.modes
    ]
    return pytest.mark.parametrize(("case", "heads"), rows)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, also of what torch.compile has wrapped."""
    return {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}


def learn(
    case: Case, batches: Sequence[Any], optimizer: Callable[[Any], Any] = lambda twin: network_sgd(twin.parameters())
) -> tuple[Any, textbook.Trajectory]:
    """Train the twin as the textbook says; the fused attention kernels cannot be differentiated twice."""
    twin = case.make().for_textbook()
    named = dict(twin.named_parameters())
    shared = [named[name] for name in case.W]
    with sdpa_kernel(SDPBackend.MATH):
        trajectory = textbook.train(
            twin, twin.forward_for_textbook, batches, shared, optimizer(twin), before_micro_batch=torch.manual_seed
        )
    moved = max(abs(weight - 1.0) for weight in trajectory.weights[-1].values())
    assert moved > 1e-3, "the oracle's weights did not move: this test would prove nothing"
    return twin, trajectory


def fit(
    trainer: MakeTrainer, model: Any, gradnorm: GradNorm, batches: Sequence[Any], **options: Any
) -> tuple[Recorder, MemoryLogger]:
    """Train; the masks of dropout are drawn from a seed for each batch, as the textbook draws them."""
    recorder, logger = Recorder(gradnorm), MemoryLogger()
    callbacks = [BeforeBatch(torch.manual_seed), gradnorm, recorder]
    trainer(callbacks=callbacks, logger=logger, **options).fit(model, Batches(batches))
    return recorder, logger


def balance(model: Any, case: Case, heads: bool) -> GradNorm:
    return GradNorm(list(model.tasks), shared_layer=case.layer, heads=case.heads if heads else None)


def assert_trains_as_the_textbook_says(
    trainer: MakeTrainer,
    case: Case,
    heads: bool,
    model: Any = None,
    optimizer: Callable[[Any], Any] = lambda twin: network_sgd(twin.parameters()),
    **options: Any,
) -> None:
    """The norms and the weights of every step, and the parameters and buffers at the end."""
    batches = case.batches(STEPS)
    twin, trajectory = learn(case, batches, optimizer)
    model = case.make() if model is None else model
    recorder, logger = fit(trainer, model, balance(model, case, heads), batches, **options)

    for task in model.tasks:
        norms = [step[task] for step in trajectory.grad_norms]
        assert logger.scalars[f"gradnorm/grad_norm/{task}"] == pytest.approx(norms, rel=1e-6)
    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-8, state=whole_state)


@table(LAYERS)
def test_the_shared_layer_may_be(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@table(SURROUNDINGS)
def test_around_the_shared_layer_there_may_be(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@table(CALLS)
def test_encoder_and_heads_may_be_called_with(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@table(CHECKPOINTS)
def test_activations_may_be_checkpointed_in(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)
