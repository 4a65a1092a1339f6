"""Losses that use `torch.func`, forward mode or double backward: read exactly, or an error that names them.

`tests/derivatives.py` has the ways to build them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import by_hand
import pytest
import textbook
import torch
from by_hand import flat
from derivatives import ORDINARY, TRANSFORMED, WAYS, Derived, Replaced, all_of, one_of
from harness import Batches, Recorder, assert_agrees
from loops import distance, gradnorm_rule, parameter_distance, train
from models import FEATURES, Automatic, Batch, network_sgd, vector_batches
from textbook import Forward
from torch import Tensor, nn
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
    fails(quiet_trainer, model, Aggregation(UPGrad(), TASKS), f"Aggregation{inside}", "Scalarization")


# ---- Aggregation -----------------------------------------------------------------------------------------------------


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", ORDINARY)
@pytest.mark.parametrize("spread", SPREAD)
def test_derivatives_that_go_around_the_representation_are_not_aggregated_there(
    way: str, spread: str, quiet_trainer: MakeTrainer
) -> None:
    model = Derived(SPREAD[spread](way))
    fails(quiet_trainer, model, Aggregation(UPGrad(), TASKS), "Aggregation: ", "'encoder'")


def aggregates(
    make: Callable[[], Any], forward: Callable[[Any], Callable[[Any], Forward]], heads: Any, trainer: MakeTrainer
) -> None:
    """Train with an aggregation at the parameters and by hand, and compare the networks."""
    model, twin, batches = make(), make(), vector_batches(3, STEPS)
    trainer(callbacks=[Aggregation(UPGrad(), TASKS, at="parameters", heads=heads)]).fit(model, Batches(batches))
    optimizer, numbered = network_sgd(twin.parameters()), list(enumerate(batches))
    by_hand.aggregate(twin, forward(twin), numbered, UPGrad(), optimizer, tasks=TASKS, at="parameters")
    assert parameter_distance(model, twin) < TOLERANCE


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize("heads", ["auto", None], ids=["found", "none"])
def test_at_the_parameters_any_derivatives_are_aggregated_as_by_hand(
    way: str, spread: str, heads: Any, quiet_trainer: MakeTrainer
) -> None:
    def forward(twin: Derived) -> Callable[[Any], Forward]:
        return lambda numbered: twin.forward_for_textbook(numbered[1])

    aggregates(lambda: Derived(SPREAD[spread](way)), forward, heads, quiet_trainer)


class Slopes(Automatic):
    """One call of the encoder; from some batch on, `seg` is also to change little with the inputs."""

    first = 0
    in_pieces = False

    def build(self) -> None:
        super().build()
        if self.encoder_of_one_layer:
            self.encoder = OneProduct()

    def __init__(self, first: int, in_pieces: bool = False, encoder_of_one_layer: bool = False) -> None:
        self.first, self.in_pieces, self.encoder_of_one_layer = first, in_pieces, encoder_of_one_layer
        super().__init__(3)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        x = batch["x"].clone().requires_grad_()
        z = self.encoder(x)
        y = {task: self.get_submodule(f"{task}_head")(z) for task in self.tasks}
        losses = {task: (y[task] - batch[task]).square().mean() for task in self.tasks}
        total = torch.stack(list(losses.values())).sum()
        if batch_idx >= self.first:
            slope = torch.autograd.grad(y["seg"].square().sum(), x, create_graph=True)[0].square().mean()
            total = total + slope
            if self.in_pieces:
                self.trainer.callbacks[0].watch({"seg": losses.pop("seg")})  # type: ignore[attr-defined]
                losses["seg"] = slope
            else:
                losses["seg"] = losses["seg"] + slope
                total = torch.stack(list(losses.values())).sum()
        return {"loss": total, **losses}


class OneProduct(nn.Module):
    """A trunk that is nothing but a product: a derivative of it by its inputs is made of the weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("options", [{}, {"in_pieces": True}, {"encoder_of_one_layer": True}], ids=str)
@pytest.mark.parametrize("first", [0, 2])
def test_a_penalty_of_slopes_is_not_aggregated_at_the_representation_whenever_it_begins(
    first: int, options: dict[str, bool], quiet_trainer: MakeTrainer
) -> None:
    expected = "Aggregation: the loss of task 'seg' reaches the inside of 'encoder'", "at='parameters'", "GradNorm"
    fails(quiet_trainer, Slopes(first, **options), Aggregation(UPGrad(), TASKS), *expected)


@pytest.mark.parametrize("heads", ["auto", None], ids=["found", "none"])
@pytest.mark.parametrize("options", [{}, {"encoder_of_one_layer": True}], ids=str)
@pytest.mark.parametrize("first", [0, 2])
def test_at_the_parameters_it_is_aggregated_as_by_hand(
    first: int, options: dict[str, bool], heads: Any, quiet_trainer: MakeTrainer
) -> None:
    def forward(twin: Slopes) -> Callable[[Any], Forward]:
        def call(numbered: Any) -> Forward:
            step = twin.training_step(numbered[1], numbered[0])
            return Forward({task: step[task] for task in TASKS}, representation=[])

        return call

    aggregates(lambda: Slopes(first, **options), forward, heads, quiet_trainer)


# ---- derivatives that another thread takes ---------------------------------------------------------------------------


class Threaded(Automatic):
    """Computes a derivative in a separate thread, where torch restarts its node numbers, as in CUDA's backward pass."""

    def forward_for_textbook(self, batch: Batch) -> Forward:
        z = self.encoder(batch["x"])
        y = {task: self.get_submodule(f"{task}_head")(z) for task in self.tasks}
        losses = {task: (y[task] - batch[task]).square().mean() for task in self.tasks}
        slopes: list[Tensor] = []

        def differentiate() -> None:
            slopes.extend(torch.autograd.grad(y["seg"].square().sum(), z, create_graph=True))

        thread = threading.Thread(target=differentiate)
        thread.start()
        thread.join()
        return Forward(losses, rest=slopes[0].square().sum())

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        given = self.forward_for_textbook(batch)
        assert given.rest is not None
        return {"loss": torch.stack(list(given.losses.values())).sum() + given.rest, **given.losses}


def test_a_penalty_of_a_head_that_another_thread_has_differentiated_is_no_part_of_the_task(
    quiet_trainer: MakeTrainer,
) -> None:
    agree(lambda: Threaded(3), GradNorm(TASKS), quiet_trainer)


# ---- losses inside a transform ---------------------------------------------------------------------------------------


class PerSample(Automatic):
    """Computes its losses sample by sample, and shows them there or their means."""

    def __init__(self, shows: str) -> None:
        super().__init__(3)
        self.shows = shows

    def per_sample(self, y: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = {task: (y[task] - target[task]).square().mean() for task in self.tasks}
        if self.shows == "each":
            self.trainer.callbacks[0].watch(losses)  # type: ignore[attr-defined]
        return losses

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        y = {task: self.get_submodule(f"{task}_head")(z) for task in self.tasks}
        return {task: each.mean() for task, each in vmap(self.per_sample)(y, {t: batch[t] for t in y}).items()}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        return output if self.shows == "means" else {"loss": output["loss"]}


@pytest.mark.parametrize("make", [GradNorm, GradientNormMonitor])
def test_losses_inside_vmap_are_refused_where_they_are_shown(make: Any, quiet_trainer: MakeTrainer) -> None:
    expected = "'seg' is from inside a transform of torch.func", "Show what is computed from the transform's result"
    fails(quiet_trainer, PerSample("each"), make(TASKS), *expected)


def test_losses_that_a_function_returns_inside_vmap_are_refused(quiet_trainer: MakeTrainer) -> None:
    callback = GradNorm(TASKS, losses_from="per_sample")
    fails(quiet_trainer, PerSample("none"), callback, "GradNorm: the loss of task 'seg'", "inside a transform")


def test_means_of_the_output_of_vmap_are_losses(quiet_trainer: MakeTrainer) -> None:
    agree(lambda: PerSample("means"), GradNorm(TASKS), quiet_trainer)


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
