"""With any Trainer flags, including clipping, GradNorm sees the remaining batches and agrees with the textbook."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from beside import (
    BATCHES,
    EPOCHS,
    FILTERS,
    MakeTrainer,
    course_alone,
    fit,
    make,
)
from harness import (
    Batches,
    Recorder,
    assert_agrees,
)
from lightning.pytorch import callbacks as pl
from models import (
    Automatic,
    as_inputs_and_targets,
    multi_task_module,
    network_sgd,
    vector_batches,
)
from textbook import train
from torch import nn

from lightning_gradnorm import GradNorm

pytestmark = FILTERS


# flags of the Trainer ------------------------------------------------------------------------------------------------


def one_course(epochs: int = EPOCHS, batches: int = BATCHES) -> list[int]:
    return [batch for _ in range(epochs) for batch in range(batches)]


FLAGS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "overfit_batches": ({"overfit_batches": 2}, one_course(batches=2)),
    "limit_train_batches": ({"limit_train_batches": 3}, one_course(batches=3)),
    "limit_val_batches": ({"limit_val_batches": 1}, one_course()),
    "fast_dev_run": ({"fast_dev_run": 3}, one_course(1, 3)),
    "max_steps": ({"max_steps": 6, "max_epochs": -1}, one_course()[:6]),
    "val_check_interval": ({"val_check_interval": 2, "num_sanity_val_steps": 2}, one_course()),
    "validation with gradients": ({"inference_mode": False, "val_check_interval": 1}, one_course()),
    "detect_anomaly": ({"detect_anomaly": True}, one_course()),
    "profiler": ({"profiler": "simple"}, one_course()),
    "deterministic": ({"deterministic": True}, one_course()),
    "reload_dataloaders_every_n_epochs": ({"reload_dataloaders_every_n_epochs": 1}, one_course()),
}


@pytest.mark.each_value_once
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize(
    "mode", ["heads", "own", *(pytest.param(m, marks=pytest.mark.slow) for m in ("manual", "automatic", "logged"))]
)
@pytest.mark.parametrize("flag", FLAGS)
def test_a_trainer_flag_only_changes_which_batches_are_seen(flag: str, mode: str, quiet_trainer: MakeTrainer) -> None:
    options, seen = FLAGS[flag]
    model, course, trainer = fit(quiet_trainer, mode, [], **options)
    twin, batches = Automatic(3), vector_batches(3, BATCHES)
    trajectory = train(
        twin,
        twin.forward_for_textbook,
        [batches[i] for i in seen],
        twin.shared_parameters(),
        network_sgd(twin.parameters()),
    )
    assert trainer.global_step == len(seen)
    recorder = Recorder(course.gradnorm)
    recorder.weights = course.weights
    assert_agrees(recorder, model, trajectory, twin)


BAREBONES = dict.fromkeys(
    ["logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"]
) | {"barebones": True, "num_sanity_val_steps": None}


@pytest.mark.parametrize("mode", ["heads", "own"])
def test_a_barebones_trainer_balances_without_a_warning(mode: str, quiet_trainer: MakeTrainer) -> None:
    alone = course_alone(quiet_trainer, mode)
    _, bare, _ = fit(quiet_trainer, mode, [], validate=False, **BAREBONES)  # the model's own validation_step logs
    bare.assert_equals(alone)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("mode", ["heads", "own"])
def test_a_barebones_trainer_balances(mode: str, quiet_trainer: MakeTrainer) -> None:
    alone = course_alone(quiet_trainer, mode)
    _, bare, _ = fit(quiet_trainer, mode, [], **BAREBONES)
    bare.assert_equals(alone)


class ClippedSGD(torch.optim.SGD):
    """Clips as the Trainer does, after the gradient is complete and before the step."""

    limit = 0.3

    def step(self, closure: Any = None) -> Any:
        norm = nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self.limit)
        assert norm > self.limit, "nothing would be clipped"
        return super().step(closure)


@pytest.mark.parametrize("mode", ["automatic", "heads", "own"])
def test_clipping_comes_after_balancing_and_does_not_change_the_norms(mode: str, quiet_trainer: MakeTrainer) -> None:
    twin, batches = Automatic(3), vector_batches(3, BATCHES)
    clipped = ClippedSGD(twin.parameters(), lr=0.02, momentum=0.9)
    trajectory = train(twin, twin.forward_for_textbook, batches, twin.shared_parameters(), clipped)
    if mode == "own":
        model: L.LightningModule = multi_task_module(3, gradient_clip_val=ClippedSGD.limit)
        gradnorm, seen, flags = GradNorm(), as_inputs_and_targets(batches), {}
    else:
        model, gradnorm, seen = make(mode)
        flags = {"gradient_clip_val": ClippedSGD.limit}
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder], **flags).fit(model, Batches(seen))
    assert_agrees(recorder, model, trajectory, twin)


@pytest.mark.parametrize("mode", ["automatic", "heads", "logged"])
def test_accumulation_by_a_schedule_is_the_textbooks_step_by_step(mode: str, quiet_trainer: MakeTrainer) -> None:
    model, gradnorm, _ = make(mode)
    batches = vector_batches(3, 6)
    recorder = Recorder(gradnorm)
    steps: list[int] = []

    class AtSteps(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step > len(steps):
                steps.append(trainer.fit_loop.total_batch_idx)
                recorder.weights.append(gradnorm.weights)

    schedule = pl.GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})
    quiet_trainer(callbacks=[schedule, gradnorm, AtSteps()], max_epochs=3).fit(model, Batches(batches))
    assert steps == [0, 1, 2, 3, 4, 5, 7, 9, 11, 14, 17]
    twin = Automatic(3)
    trajectory = train(
        twin,
        twin.forward_for_textbook,
        batches * 3,
        twin.shared_parameters(),
        network_sgd(twin.parameters()),
        accumulate=[1] * 6 + [2] * 3 + [3] * 2,
    )
    assert_agrees(recorder, model, trajectory, twin)
