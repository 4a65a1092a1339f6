"""A task whose gradient at the shared layer is exactly zero counts as absent."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from harness import Batches, MemoryLogger, Recorder
from models import Automatic, vector_batches
from torch import Tensor

from lightning_gradnorm import GradNorm
from lightning_gradnorm.strategies import GradNormRule

F64 = torch.float64
NAMES = ["seg", "depth", "normal"]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def test_it_trains_as_if_the_task_were_absent() -> None:
    rule, other = (GradNormRule(NAMES, dtype=F64) for _ in range(2))
    for step in range(12):
        losses = tensor(2.0, 1.0 + 0.1 * step, 0.5)
        is_zero = 3 <= step < 8
        rule.step(tensor(1.0, 0.0 if is_zero else 3.0, 0.7), losses)
        other.step(tensor(1.0, 3.0, 0.7), losses, torch.tensor([True, not is_zero, True]))
        torch.testing.assert_close(rule.weights, other.weights, rtol=0, atol=1e-14)
        rule.count_step()
        other.count_step()
    assert rule.weights.detach().max() > 1.01


def test_its_first_loss_is_the_first_with_a_gradient() -> None:
    rule = GradNormRule(["fit", "kl"], dtype=F64)
    for loss in (9.0, 8.0, 7.0):
        rule.step(tensor(1.0, 0.0), tensor(2.0, loss))
    assert rule.weights.tolist() == [1.0, 1.0]
    rule.step(tensor(1.0, 0.2), tensor(2.0, 5.0))
    assert rule.initial_losses.tolist() == [2.0, 5.0]
    assert rule.skipped == 0


def test_if_no_task_has_a_gradient_nothing_moves() -> None:
    rule = GradNormRule(["fit", "kl"], dtype=F64)
    rule.step(tensor(0.0, 0.0), tensor(2.0, 3.0))
    assert rule.weights.tolist() == [1.0, 1.0]
    assert rule.tasks_at_fault == {}


def test_a_task_is_named_after_fifty_updates_without_a_gradient_in_a_row() -> None:
    rule = GradNormRule(NAMES, dtype=F64)
    for _ in range(49):
        rule.step(tensor(1.0, 0.0, 1.0), tensor(1.0, 1.0, 1.0))
    assert rule.tasks_without_gradient == []
    rule.step(tensor(1.0, 0.0, 1.0), tensor(1.0, 1.0, 1.0))
    assert rule.tasks_without_gradient == ["depth"]
    rule.step(tensor(1.0, 1.0, 1.0), tensor(1.0, 1.0, 1.0))
    assert rule.tasks_without_gradient == []


class WarmsUp(Automatic):
    """The coefficient of one task is 0 for the first batches, or its loss is left out."""

    def __init__(self, steps: int, how: str) -> None:
        super().__init__(3)
        self.steps, self.how = steps, how

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor | None]:
        losses: dict[str, Tensor | None] = dict(self.task_losses(batch))
        is_off = batch_idx < self.steps
        coefficient = 0.0 if is_off else 1.0
        depth = losses["depth"]
        if self.how == "left out" and is_off:
            losses["depth"] = None
        return {"loss": losses["seg"] + losses["normal"] + coefficient * depth, **losses}


@pytest.mark.parametrize("heads", ["auto", None])
def test_a_coefficient_that_begins_at_zero_is_as_a_loss_that_is_left_out(heads: Any, quiet_trainer: Any) -> None:
    weights = []
    for how in ("coefficient 0", "left out"):
        gradnorm = GradNorm(NAMES, shared_layer="encoder.2", heads=heads)
        recorder = Recorder(gradnorm)
        quiet_trainer(callbacks=[gradnorm, recorder]).fit(WarmsUp(4, how), Batches(vector_batches(3, 8)))
        weights.append(recorder.weights)
    for with_zero, without in zip(*weights, strict=True):
        assert with_zero == pytest.approx(without, abs=1e-9)


def test_the_user_is_warned_once_by_name(quiet_trainer: Any) -> None:
    gradnorm = GradNorm(NAMES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(callbacks=[gradnorm]).fit(WarmsUp(60, "coefficient 0"), Batches(vector_batches(3, 60)))
    told = [str(one.message) for one in caught if "gradient of task" in str(one.message)]
    assert len(told) == 1
    assert told[0].startswith("GradNorm: the gradient of task 'depth' at the shared layer has been exactly 0")
    assert gradnorm.weights["depth"] == pytest.approx(1.0, abs=1e-5)


def test_its_updates_are_logged(quiet_trainer: Any) -> None:
    logger, gradnorm = MemoryLogger(), GradNorm(NAMES)
    trainer = quiet_trainer(callbacks=[gradnorm], logger=logger, log_every_n_steps=1)
    trainer.fit(WarmsUp(4, "coefficient 0"), Batches(vector_batches(3, 8)))
    assert logger.scalars["gradnorm/without_gradient"] == [1, 2, 3, 4, 4, 4, 4, 4]


def test_with_last_numbers_it_counts_with_its_previous_ones() -> None:
    rule, other = (GradNormRule(NAMES, absent_tasks="last_seen", dtype=F64) for _ in range(2))
    for step in range(12):
        seg = 2.0 - 0.1 * step
        is_zero = 3 <= step < 8
        rule.step(tensor(1.0, 0.0 if is_zero else 3.0 + step, 0.7), tensor(seg, 9.0 if is_zero else 1.0 + step, 0.5))
        last = 2 if is_zero else step
        other.step(tensor(1.0, 3.0 + last, 0.7), tensor(seg, 1.0 + last, 0.5))
        torch.testing.assert_close(rule.weights, other.weights, rtol=0, atol=1e-14)
    assert rule.outcomes.zero_gradients.updates == 5
    assert rule.initial_losses.tolist() == other.initial_losses.tolist()


@pytest.mark.parametrize("absent_tasks", ["leave_out", "last_seen"])
def test_a_loss_without_a_gradient_is_no_last_number(absent_tasks: Any) -> None:
    rule = GradNormRule(["fit", "kl"], absent_tasks=absent_tasks, dtype=F64)
    for loss in (9.0, 8.0, 7.0):
        assert rule.step(tensor(1.0, 0.0), tensor(2.0, loss)).taken
    assert rule.weights.tolist() == [1.0, 1.0]
    assert rule.initial_losses.tolist() == [2.0, 0.0]
