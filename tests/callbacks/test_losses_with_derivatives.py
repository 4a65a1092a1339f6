"""Losses made with `torch.func`, forward-mode derivatives or double backward: read exactly, or refused by name.

`tests/derivatives.py` has the ways in which they are made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from aggregations import train_both, worst
from by_hand import flat
from derivatives import ORDINARY, TRANSFORMED, WAYS, Derived, Replaced, all_of, one_of
from harness import Batches, Recorder, assert_agrees, assert_says
from loops import distance, gradnorm_rule, parameter_distance, train
from models import Automatic, Batch, network_sgd, vector_batches
from torch import Tensor
from torch.func import vmap
from torchjd.aggregation import UPGrad
from wrong_inputs import HEADS, TASKS, MakeTrainer, fails

from lightning_gradnorm import Aggregation, GradientNormMonitor, GradNorm

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode, torch's own
STEPS, TOLERANCE = 4, 1e-9
SPREAD: Mapping[str, Callable[[str], dict[str, str]]] = {"all tasks": all_of, "one task": one_of}


def agree(
    make: Callable[[], Automatic], gradnorm: GradNorm, trainer: MakeTrainer, norm_of: str = "weight", **options: Any
) -> None:
    """Train with the callback and as the textbook has it, and compare every step."""
    model, twin, batches = make(), make(), vector_batches(3, STEPS)
    recorder = Recorder(gradnorm)
    trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    trajectory = textbook.train(
        twin,
        twin.forward_for_textbook,
        batches,
        twin.shared_parameters(),
        network_sgd(twin.parameters()),
        norm_of=norm_of,
    )
    assert_agrees(recorder, model, trajectory, twin, tolerance=TOLERANCE)


# ---- GradNorm --------------------------------------------------------------------------------------------------------


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize("options", [{}, {"heads": None, "shared_layer": "encoder.2"}], ids=["found", "named"])
def test_gradnorm_is_that_of_the_textbook_and_finds_the_last_shared_layer(
    way: str, spread: str, options: dict[str, Any], quiet_trainer: MakeTrainer
) -> None:
    """Also in a derivative by the inputs, whose last product is with the first layer."""
    gradnorm = GradNorm(TASKS, **options)
    agree(lambda: Derived(SPREAD[spread](way)), gradnorm, quiet_trainer)
    assert "W = encoder.2.weight (6 × 7)" in repr(gradnorm)
    if spread == "one task" and not options:
        assert "heads: normal → normal_head, seg → seg_head" in repr(gradnorm)


@pytest.mark.parametrize("way", ["vmap of grad", "a gradient penalty", "jvp"])
@pytest.mark.parametrize("heads", ["auto", None])
def test_a_balancer_does_so_too(way: str, heads: Any) -> None:
    model, twin, batches = Derived(one_of(way)), Derived(one_of(way)), vector_batches(3, STEPS)
    model.forward = model.task_losses  # type: ignore[method-assign,assignment]
    weights, _ = train(model, gradnorm_rule(), batches, heads=heads)
    trajectory = textbook.train(
        twin,
        twin.forward_for_textbook,
        batches,
        twin.shared_parameters(),
        network_sgd(twin.parameters()),
        alpha=1.2,
    )
    assert distance(weights, trajectory.weights) < TOLERANCE
    assert parameter_distance(model, twin) < TOLERANCE


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", SPREAD)
def test_a_head_that_is_named_and_not_passed_alone_is_refused(
    way: str, spread: str, quiet_trainer: MakeTrainer
) -> None:
    task = "depth" if spread == "one task" else "seg"
    expected = f"GradNorm: the loss of task '{task}' ", "head", "Leave heads out"
    fails(quiet_trainer, Derived(SPREAD[spread](way)), GradNorm(TASKS, heads=HEADS), *expected)


@pytest.mark.parametrize("way", ["autograd.grad", "vmap of grad", "vmap", "jvp"])
def test_a_task_that_takes_derivatives_from_the_third_batch_on_is_read_at_its_loss(
    way: str, quiet_trainer: MakeTrainer
) -> None:
    class Later(Derived):
        calls = 0

        def forward_for_textbook(self, batch: Batch) -> Any:
            self.calls += 1
            self.ways = one_of(way) if self.calls > 2 else {}
            return super().forward_for_textbook(batch)

    for heads in ("auto", HEADS):
        agree(lambda: Later({}), GradNorm(TASKS, heads=heads), quiet_trainer)


@pytest.mark.parametrize("heads", ["auto", None, HEADS], ids=["found", "none", "named"])
@pytest.mark.parametrize("norm_of", ["weight", "activation"])
def test_parameters_replaced_by_functional_call_are_passed_on_the_way_to_the_layer(
    norm_of: Any, heads: Any, quiet_trainer: MakeTrainer
) -> None:
    agree(lambda: Replaced(3), GradNorm(TASKS, heads=heads, norm_of=norm_of), quiet_trainer, norm_of)


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", ORDINARY)
@pytest.mark.parametrize("spread", SPREAD)
def test_norms_at_the_representation_count_derivatives_that_pass_it(
    way: str, spread: str, quiet_trainer: MakeTrainer
) -> None:
    gradnorm = GradNorm(TASKS, norm_of="activation")
    agree(lambda: Derived(SPREAD[spread](way)), gradnorm, quiet_trainer, "activation")


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", [way for way in TRANSFORMED if way != "a prediction and its gradient"])
@pytest.mark.parametrize("spread", SPREAD)
def test_a_representation_inside_a_transform_is_refused_by_name(
    way: str, spread: str, quiet_trainer: MakeTrainer
) -> None:
    inside = ": 'encoder' is called inside a transform of torch.func"
    model = Derived(SPREAD[spread](way))
    fails(quiet_trainer, model, GradNorm(TASKS, norm_of="activation"), f"GradNorm{inside}", "Use norm_of='weight'")
    for at in ("representation", "parameters"):
        fails(quiet_trainer, model, Aggregation(UPGrad(), TASKS, at=at), f"Aggregation{inside}", "Scalarization")


# ---- Aggregation -----------------------------------------------------------------------------------------------------


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", ORDINARY)
@pytest.mark.parametrize("at", ["representation", "parameters"])
def test_derivatives_that_go_around_the_representation_are_no_aggregation(
    way: str, at: Any, quiet_trainer: MakeTrainer
) -> None:
    for spread in (all_of, one_of):
        fails(quiet_trainer, Derived(spread(way)), Aggregation(UPGrad(), TASKS, at=at), "Aggregation: ", "'encoder'")


# ---- the monitor -----------------------------------------------------------------------------------------------------


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", SPREAD)
def test_the_monitor_shows_the_norms_that_autograd_finds(way: str, spread: str, quiet_trainer: MakeTrainer) -> None:
    model, twin, batches = Derived(SPREAD[spread](way)), Derived(SPREAD[spread](way)), vector_batches(3, 1)
    monitor = GradientNormMonitor(TASKS, parameters="encoder", every_n_steps=1)
    quiet_trainer(callbacks=[monitor]).fit(model, Batches(batches))
    W = list(twin.encoder.parameters())
    for task, loss in twin.forward_for_textbook(batches[0]).losses.items():
        expected = flat(torch.autograd.grad(loss, W, retain_graph=True, allow_unused=True), W).norm()
        assert monitor.last is not None
        assert monitor.last[task] == pytest.approx(float(expected), rel=1e-9)
