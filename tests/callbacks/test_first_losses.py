"""``L_i(0)``: a penalty that is 0 in the first batches makes the weights wait; a mapping may set it for some tasks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from harness import Batches, MemoryLogger, Recorder, assert_agrees
from models import Automatic, Batch, Manual, learn_from_textbook, vector_batches
from textbook import Forward
from torch import Tensor
from torch.nn import functional as F

from lightning_gradnorm import GradNorm

STEPS = 6
NAMES = ["seg", "depth", "normal"]
ONES = dict.fromkeys(NAMES, 1.0)
MakeTrainer = Callable[..., L.Trainer]


class Penalized(Automatic):
    """The loss of `depth` is a penalty that is 0 for as long as the batch sets it."""

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        losses = {t: F.mse_loss(self.get_submodule(f"{t}_head")(z), batch[t]) for t in ("seg", "normal")}
        penalty = (self.depth_head(z).square() - batch["allowed"]).relu().mean()
        return {"seg": losses["seg"], "depth": penalty, "normal": losses["normal"]}

    def forward_for_textbook(self, batch: Batch) -> Forward:
        return Forward(self.task_losses(batch))


class PenalizedByHand(Penalized, Manual):
    """The same with manual optimization."""


def batches_with_zeros(*zeros: int, accumulate: int = 1) -> list[Batch]:
    """In these batches no penalty is due."""
    batches = vector_batches(3, STEPS * accumulate)
    for index, batch in enumerate(batches):
        batch["allowed"] = torch.tensor(100.0 if index in zeros else 0.0, dtype=torch.float64)
    return batches


def train(
    trainer: MakeTrainer, batches: list[Batch], kind: type[Penalized] = Penalized, accumulate: int = 1, **options: Any
) -> tuple[Penalized, GradNorm, Recorder, MemoryLogger]:
    model, gradnorm, logger = kind(3), GradNorm(NAMES, **options), MemoryLogger()
    of_trainer = {"accumulate_grad_batches": accumulate} if model.automatic_optimization else {}
    model.gradnorm = [gradnorm]
    recorder = Recorder(gradnorm, accumulate)
    trainer(callbacks=[gradnorm, recorder], logger=logger, **of_trainer).fit(model, Batches(batches))
    return model, gradnorm, recorder, logger


def learn(batches: list[Batch], **options: Any) -> tuple[Penalized, textbook.Trajectory]:
    twin = Penalized(3)
    trajectory = learn_from_textbook(twin, batches, **options)
    assert max(abs(weight - 1) for weight in trajectory.weights[-1].values()) > 1e-3
    return twin, trajectory


WAITS = r"GradNorm: the loss of task 'depth' has been 0 from the start, .*initial_losses={'depth': 1.0}.*alpha=0.*stay"


@pytest.mark.parametrize("heads", ["auto", None], ids=["auto", "no-heads"])
@pytest.mark.parametrize("kind", [Penalized, PenalizedByHand])
@pytest.mark.parametrize("zeros", [(0,), (0, 1, 2)], ids=str)
def test_weights_wait_for_a_loss_that_is_0_at_first(
    zeros: tuple[int, ...], kind: type[Penalized], heads: Any, quiet_trainer: MakeTrainer
) -> None:
    batches = batches_with_zeros(*zeros)
    twin, trajectory = learn(batches)
    with pytest.warns(UserWarning, match=WAITS) as warned:
        model, gradnorm, recorder, logger = train(quiet_trainer, batches, kind, heads=heads)
    assert len([one for one in warned if re.search(WAITS, str(one.message))]) == 1
    assert_agrees(recorder, model, trajectory, twin)
    assert [weights == ONES for weights in recorder.weights] == [step in zeros for step in range(STEPS)]
    assert logger.scalars["gradnorm/skipped"][-1] == len(zeros)
    assert gradnorm.weights == recorder.weights[-1]


def test_a_step_whose_second_batch_has_the_loss_does_not_wait(quiet_trainer: MakeTrainer) -> None:
    batches = batches_with_zeros(0, accumulate=2)
    twin, trajectory = learn(batches, accumulate=2)
    model, _, recorder, _ = train(quiet_trainer, batches, accumulate=2)
    assert_agrees(recorder, model, trajectory, twin)
    assert recorder.weights[0] != ONES


def test_a_mean_of_first_losses_begins_with_the_first_that_is_not_0(quiet_trainer: MakeTrainer) -> None:
    batches = batches_with_zeros(0, 1)
    twin, trajectory = learn(batches, initial_losses=2)
    with pytest.warns(UserWarning, match=WAITS):
        model, _, recorder, _ = train(quiet_trainer, batches, initial_losses=2)
    assert_agrees(recorder, model, trajectory, twin)


@pytest.mark.parametrize("heads", ["auto", None], ids=["auto", "no-heads"])
@pytest.mark.parametrize(
    "given",
    [{"normal": 2.5}, {"seg": 0.3, "normal": 2.5}, {"normal": 1, "depth": 0.7, "seg": 4.0}],
    ids=lambda given: ", ".join(given),
)
def test_initial_losses_may_name_some_tasks(given: dict[str, float], heads: Any, quiet_trainer: MakeTrainer) -> None:
    batches = batches_with_zeros()
    twin, trajectory = learn(batches, initial_losses=given)
    model, _, recorder, _ = train(quiet_trainer, batches, initial_losses=given, heads=heads)
    assert_agrees(recorder, model, trajectory, twin)


def test_a_loss_that_never_comes_moves_no_weight_and_ends_nothing(quiet_trainer: MakeTrainer) -> None:
    batches = batches_with_zeros(*range(STEPS))
    with pytest.warns(UserWarning, match=WAITS):
        _, gradnorm, recorder, logger = train(quiet_trainer, batches)
    assert recorder.weights == [ONES] * STEPS
    assert logger.scalars["gradnorm/skipped"][-1] == STEPS
    assert gradnorm.mean_weights == ONES


def test_naming_the_first_loss_of_the_task_at_fault_ends_the_waiting(quiet_trainer: MakeTrainer) -> None:
    _, _, recorder, logger = train(quiet_trainer, batches_with_zeros(0), initial_losses={"depth": 1.0})
    assert recorder.weights[0] != ONES
    assert logger.scalars["gradnorm/skipped"][-1] == 0


def test_alpha_0_needs_no_first_loss(quiet_trainer: MakeTrainer) -> None:
    _, _, recorder, logger = train(quiet_trainer, batches_with_zeros(0), alpha=0)
    assert recorder.weights[0] != ONES
    assert logger.scalars["gradnorm/skipped"][-1] == 0
