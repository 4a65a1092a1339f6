"""Losses of any shape, reported anywhere: the weight scales the gradient, and the mean is balanced.

A model may return only its total and call ``watch`` wherever it computes a loss. All are compared with the textbook, which
receives the means.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from harness import Batches, MemoryLogger, Recorder, assert_agrees, assert_clean, traces
from models import Automatic, Batch, learn_from_textbook, vector_batches
from torch import Tensor

from lightning_gradnorm import FixedWeights, GradientNormMonitor, GradNorm

STEPS = 5
NAMES = ["seg", "depth", "normal"]
HEADS = {task: f"{task}_head" for task in NAMES}
LOGGED = {task: f"train/{task}_loss" for task in NAMES}
MakeTrainer = Callable[..., L.Trainer]

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "one for each example": lambda errors: errors.mean(1),
    "one for each column": lambda errors: errors.mean(0),
    "one for each entry": lambda errors: errors,
    "one number in two brackets": lambda errors: errors.mean().reshape(1, 1),
    "a view with other strides": lambda errors: errors.T,
}


class Unreduced(Automatic):
    """Returns losses of some shape; the sum of their means is back-propagated."""

    def __init__(self, shape: str) -> None:
        super().__init__(3)
        self.shape = shape

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        errors = {t: (self.get_submodule(f"{t}_head")(z) - batch[t]).square() for t in self.tasks}
        return {task: SHAPES[self.shape](error) for task, error in errors.items()}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        return torch.stack([loss.mean() for loss in losses.values()]).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        losses = self.losses(batch)
        return {"loss": self.total(losses), **losses}


class Watched(Unreduced):
    """Returns the total alone."""

    gradnorm: Any = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        losses = self.losses(batch)
        self.trainer.callbacks[0].watch(losses)
        return self.total(losses)


class ByHand(Unreduced):
    """The same with manual optimization."""

    def __init__(self, shape: str) -> None:
        super().__init__(shape)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        losses = self.losses(batch)
        self.trainer.callbacks[0].watch(losses)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.total(losses))
        optimizer.step()


def learn(batches: list[Batch], **options: Any) -> tuple[Automatic, textbook.Trajectory]:
    twin = Automatic(3)
    trajectory = learn_from_textbook(twin, batches, **options)
    assert max(abs(weight - 1) for weight in trajectory.weights[-1].values()) > 1e-3
    return twin, trajectory


def growing(count: int) -> list[Batch]:
    """Batches of 2, 3, … examples, in which a sum is no multiple of the mean."""
    return [vector_batches(3, 1, seed=11 + index, size=2 + index)[0] for index in range(count)]


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", HEADS, None], ids=["auto", "heads", "no-heads"])
@pytest.mark.parametrize("kind", [Unreduced, Watched, ByHand])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_loss_of_any_shape_counts_with_its_mean(
    shape: str, kind: type[Unreduced], heads: Any, quiet_trainer: MakeTrainer
) -> None:
    batches, model = growing(STEPS), kind(shape)
    twin, trajectory = learn(batches)
    gradnorm, logger, before = GradNorm(NAMES, heads=heads), MemoryLogger(), traces(model)
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder], logger=logger).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)
    for task in NAMES:
        norms = [norms[task] for norms in trajectory.grad_norms]
        assert logger.scalars[f"gradnorm/grad_norm/{task}"] == pytest.approx(norms, rel=1e-6)
    assert_clean(model, before)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_of_different_shapes_are_balanced_together(accumulate: int, quiet_trainer: MakeTrainer) -> None:
    class Mixed(Unreduced):
        def losses(self, batch: Batch) -> dict[str, Tensor]:
            losses = super().losses(batch)
            return {"seg": losses["seg"], "depth": losses["depth"].mean(0), "normal": losses["normal"].mean()}

    batches, model = growing(STEPS * accumulate), Mixed("one for each entry")
    twin, trajectory = learn(batches, accumulate=accumulate)
    gradnorm = GradNorm(NAMES)
    recorder = Recorder(gradnorm, accumulate)
    quiet_trainer(callbacks=[gradnorm, recorder], accumulate_grad_batches=accumulate).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)


def test_the_coefficient_of_a_vector_is_the_one_it_is_back_propagated_with(quiet_trainer: MakeTrainer) -> None:
    """Summed instead of averaged: four times the gradient, and the same training rate."""

    class Summed(Unreduced):
        def total(self, losses: dict[str, Tensor]) -> Tensor:
            return torch.stack([loss.sum() for loss in losses.values()]).sum()

    batches, model = vector_batches(3, STEPS), Summed("one for each example")
    twin, trajectory = learn(batches, coefficients=dict.fromkeys(NAMES, 4.0))
    gradnorm = GradNorm(NAMES)
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)


# ---- a model that returns its total alone ------------------------------------------------------------------------------


def at_once(watch: Any, losses: dict[str, Tensor]) -> None:
    watch(losses)


def one_by_one(watch: Any, losses: dict[str, Tensor]) -> None:
    for task, loss in losses.items():
        watch({task: loss})


def in_two_parts(watch: Any, losses: dict[str, Tensor]) -> None:
    watch({"depth": losses["depth"]})
    watch({"normal": losses["normal"], "seg": losses["seg"]})


def twice(watch: Any, losses: dict[str, Tensor]) -> None:
    watch(losses)
    watch(losses)


def with_others(watch: Any, losses: dict[str, Tensor]) -> None:
    watch({**losses, "total": sum(losses.values()), "accuracy": 0.5})


SHOWS = [at_once, one_by_one, in_two_parts, twice, with_others]


class TotalOnly(Automatic):
    """Calls `watch` inside the forward pass, not in `training_step`, and returns the total."""

    def __init__(self, show: Callable[..., None] = at_once) -> None:
        super().__init__(3)
        self.show = show

    def forward(self, batch: Batch) -> Tensor:
        losses = self.task_losses(batch)
        self.show(self.trainer.callbacks[0].watch, losses)
        return torch.stack(list(losses.values())).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        return self(batch)


class TotalOnlyByHand(TotalOnly):
    """The same with manual optimization."""

    def __init__(self, show: Callable[..., None] = at_once) -> None:
        super().__init__(show)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self(batch))
        optimizer.step()


@pytest.mark.each_value_once
@pytest.mark.both_packages
@pytest.mark.parametrize("tasks", [NAMES, {task: task for task in NAMES}, LOGGED], ids=["list", "mapping", "log"])
@pytest.mark.parametrize("kind", [TotalOnly, TotalOnlyByHand])
@pytest.mark.parametrize("show", SHOWS)
def test_watch_may_be_called_anywhere_and_in_parts(
    show: Any, kind: type[TotalOnly], tasks: Any, quiet_trainer: MakeTrainer, package: ModuleType
) -> None:
    batches, model = vector_batches(3, STEPS), kind(show)
    twin, trajectory = learn(batches)
    gradnorm = GradNorm(tasks)
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)


@pytest.mark.parametrize("show", [at_once, in_two_parts])
def test_fixed_weights_and_the_monitor_accept_watched_losses(show: Any, quiet_trainer: MakeTrainer) -> None:
    batches = vector_batches(3, STEPS)
    weights = {"seg": 0.5, "depth": 2.0, "normal": 0.5}
    found = []
    for model, tasks in ((TotalOnly(show), NAMES), (Automatic(3), None)):
        quiet_trainer(callbacks=[FixedWeights(weights, tasks=tasks)]).fit(model, Batches(batches))
        found.append(model.state_dict())
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-12, msg=name)

    norms = []
    for losses, model in ((NAMES, TotalOnly(show)), ({t: t for t in NAMES}, TotalOnly(show)), (NAMES, Automatic(3))):
        logger, monitor = MemoryLogger(), GradientNormMonitor(losses, parameters="encoder.2", every_n_steps=1)
        quiet_trainer(callbacks=[monitor], logger=logger).fit(model, Batches(batches))
        norms.append([logger.scalars[f"monitor/norm/{task}"] for task in NAMES])
    assert norms[0] == norms[1] == norms[2]


class Logs(Automatic):
    """Logs its losses in one of several ways, and returns the total."""

    def __init__(self, **options: Any) -> None:
        super().__init__(3)
        self.options = options

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        losses = self.task_losses(batch)
        for task, loss in losses.items():
            self.log(LOGGED[task], loss, **self.options)
        return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize(
    "options", [{"on_step": False, "on_epoch": True}, {"on_step": True, "on_epoch": True}, {"prog_bar": True}], ids=str
)
def test_a_loss_logged_in_any_way_is_balanced(options: dict[str, Any], quiet_trainer: MakeTrainer) -> None:
    batches, model = vector_batches(3, STEPS), Logs(**options)
    twin, trajectory = learn(batches)
    gradnorm = GradNorm(LOGGED)
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)


def test_losses_logged_under_no_grad_are_balanced(quiet_trainer: MakeTrainer) -> None:
    """Logged losses still carry their gradients."""

    class LogsWithoutGradients(Automatic):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
            losses = self.task_losses(batch)
            with torch.no_grad():
                self.log_dict({LOGGED[task]: loss for task, loss in losses.items()})
            return torch.stack(list(losses.values())).sum()

    batches, model = vector_batches(3, STEPS), LogsWithoutGradients(3)
    twin, trajectory = learn(batches)
    gradnorm = GradNorm(LOGGED)
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)
