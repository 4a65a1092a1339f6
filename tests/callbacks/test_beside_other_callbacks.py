"""Beside the callbacks that people use, GradNorm trains as it does alone, and leaves nothing on the model.

If the other callback does not change the training, both runs are bit-identical. If it does, as weight averaging or a backbone
that is unfrozen later do, they agree with the textbook.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from beside import (
    BATCHES,
    EPOCHS,
    FILTERS,
    TASKS,
    Course,
    Evaluated,
    MakeTrainer,
    Plain,
    assert_as_before,
    course_alone,
    fit,
    make,
    nothing,
)
from garbage import only_what_comes_from_here
from harness import (
    Batches,
    MemoryLogger,
    Recorder,
    state_by_part,
    traces,
)
from lightning.pytorch import callbacks as pl
from lightning.pytorch.tuner import Tuner
from models import (
    FEATURES,
    OUTPUTS,
    Automatic,
    vector_batches,
    vector_encoder,
)
from textbook import Forward, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_gradnorm import GradNorm

pytestmark = FILTERS


# callbacks that change nothing in training ---------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[L.Callback]:
    return [pl.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)]


def best_checkpoints(folder: Path) -> list[L.Callback]:
    return [pl.ModelCheckpoint(folder, "{epoch}", monitor="gradnorm/loss", save_top_k=2, save_last=True)]


def early_stopping(folder: Path) -> list[L.Callback]:
    return [pl.EarlyStopping("val/loss", patience=100), pl.EarlyStopping("gradnorm/loss", patience=100)]


def monitors(folder: Path) -> list[L.Callback]:
    return [pl.LearningRateMonitor("step", log_momentum=True), pl.DeviceStatsMonitor(cpu_stats=False)]


def summaries(folder: Path) -> list[L.Callback]:
    return [pl.ModelSummary(max_depth=-1), pl.RichModelSummary()]


def progress_bars(folder: Path) -> list[L.Callback]:
    return [pl.TQDMProgressBar()]


def timer(folder: Path) -> list[L.Callback]:
    return [pl.Timer(duration="00:00:10:00", interval="step")]


def functions(folder: Path) -> list[L.Callback]:
    return [pl.LambdaCallback(on_train_batch_start=nothing, on_before_optimizer_step=nothing, on_train_end=nothing)]


BYSTANDERS = {
    "ModelCheckpoint at every step": checkpoints,
    "ModelCheckpoint of the best": best_checkpoints,
    "EarlyStopping": early_stopping,
    "LearningRateMonitor and DeviceStatsMonitor": monitors,
    "ModelSummary": summaries,
    "TQDMProgressBar": progress_bars,
    "Timer": timer,
    "LambdaCallback": functions,
}


def options_for(sentence: str) -> dict[str, Any]:
    """The Trainer options that this callback requires."""
    options: dict[str, Any] = {"logger": MemoryLogger()}
    options["enable_checkpointing"] = "Checkpoint" in sentence
    options["enable_progress_bar"] = "ProgressBar" in sentence
    options["enable_model_summary"] = "Summary" in sentence
    return options


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    ("mode", "first"), [("heads", False), ("heads", True), ("own", False)], ids=["after", "before", "own"]
)
@pytest.mark.parametrize("sentence", BYSTANDERS)
def test_a_callback_that_only_looks_on_changes_nothing(
    sentence: str, mode: str, first: bool, quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    alone = course_alone(quiet_trainer, mode)
    others = BYSTANDERS[sentence](tmp_path)
    _, beside, _ = fit(quiet_trainer, mode, others, first=first, **options_for(sentence))
    beside.assert_equals(alone)


# averages of the network ---------------------------------------------------------------------------------------------


def mean_of(networks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in networks]).mean(0) for name in networks[0]}


def moving_average_of(networks: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    average = networks[0]
    for one in networks[1:]:
        average = {name: decay * average[name] + (1 - decay) * one[name] for name in one}
    return average


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


def average_of_all(folder: Path) -> L.Callback:
    return pl.WeightAveraging()


def moving_average(folder: Path) -> L.Callback:
    return pl.EMAWeightAveraging(decay=0.8)


@pytest.mark.each_value_once
@pytest.mark.parametrize("mode", ["heads", "logged", "manual", "own"])
@pytest.mark.parametrize(
    ("make_average", "decay"), [(average_of_all, None), (moving_average, 0.8)], ids=["mean", "ema"]
)
def test_an_average_of_the_network_is_that_of_the_network_alone(
    make_average: Any, decay: float | None, mode: str, quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    alone = course_alone(quiet_trainer, mode)
    model, beside, _ = fit(quiet_trainer, mode, [make_average(tmp_path)])
    beside.assert_equals(alone)
    averaged = mean_of(alone.networks) if decay is None else moving_average_of(alone.networks, decay)
    assert_close(state_by_part(model), averaged)


def test_a_stochastic_average_is_that_of_the_networks_at_the_ends_of_epochs(quiet_trainer: MakeTrainer) -> None:
    swa = pl.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2)  # the rate it already has, but for rounding
    alone = course_alone(quiet_trainer, "heads", max_epochs=4)
    model, beside, _ = fit(quiet_trainer, "heads", [swa], max_epochs=4)
    beside.assert_equals(alone, tolerance=1e-12)
    # taken at the start of an epoch: what the second and the third have left behind; Lightning's last epoch is not in it
    assert_close(state_by_part(model), mean_of([alone.networks[i * BATCHES - 1] for i in (1, 2, 3)]))


def test_the_epoch_that_refreshes_batch_norm_for_a_stochastic_average_moves_no_weights(
    quiet_trainer: MakeTrainer,
) -> None:
    swa = pl.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)
    _, beside, _ = fit(quiet_trainer, "images", [swa], max_epochs=3)
    assert len(beside.weights) == 4 * BATCHES, "no epoch was added for the statistics"
    at_the_end = beside.weights[3 * BATCHES - 1]
    assert all(weights == at_the_end for weights in beside.weights[3 * BATCHES :])
    assert beside.weights[3 * BATCHES - 2] != at_the_end
    assert beside.gradnorm.state_dict()["steps"] == 3 * BATCHES


# callbacks that try things out and take them back --------------------------------------------------------------------


def learning_rate_finder(**options: Any) -> pl.LearningRateFinder:
    return pl.LearningRateFinder(
        **{"num_training_steps": 6, "min_lr": 1e-4, "max_lr": 1e-1, "early_stop_threshold": None, **options}
    )


@pytest.mark.each_value_once
@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("mode", ["automatic", "heads"])
def test_the_trial_steps_of_a_learning_rate_finder_leave_weights_and_initial_losses_alone(
    mode: str, first: bool, quiet_trainer: MakeTrainer
) -> None:
    alone = course_alone(quiet_trainer, mode)
    finder = learning_rate_finder(update_attr=False)
    _, beside, _ = fit(quiet_trainer, mode, [finder], first=first)
    assert finder.optimal_lr is not None
    assert len(finder.optimal_lr.results["loss"]) == 6
    beside.assert_equals(alone)
    found, expected = beside.gradnorm.state_dict(), alone.gradnorm.state_dict()
    assert torch.equal(found["initial_losses"], expected["initial_losses"])
    assert found["steps"] == expected["steps"]


def test_the_rate_that_the_tuner_finds_is_trained_with(quiet_trainer: MakeTrainer) -> None:
    model, gradnorm, batches = make("heads")
    assert isinstance(model, Plain)
    before, keys, course = traces(model), list(model.state_dict()), Course(gradnorm)
    trainer = quiet_trainer(callbacks=[gradnorm, course], max_epochs=EPOCHS)
    found = Tuner(trainer).lr_find(
        model, Batches(batches * 10), num_training=30, min_lr=1e-4, max_lr=1e-1, early_stop_threshold=None
    )
    assert found is not None
    assert found.suggestion() == model.lr != Plain.lr
    assert gradnorm.weights == dict.fromkeys(TASKS, 1.0)
    assert course.weights == []
    assert_as_before(model, before | {": attribute lr"}, keys)
    trainer.fit(model, Batches(batches))

    other, again, _ = make("heads")
    assert isinstance(other, Plain)
    other.lr = model.lr
    alone = Course(again)
    quiet_trainer(callbacks=[again, alone], max_epochs=EPOCHS).fit(other, Batches(batches))
    course.assert_equals(alone)


class FinderInMidTraining(pl.LearningRateFinder):
    """Looks for a new rate at the start of the second epoch, as Lightning's documentation shows."""

    def on_fit_start(self, *args: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1 and self.optimal_lr is None:
            self.lr_find(trainer, pl_module)


def with_finder_in_mid_training(trainer: MakeTrainer, mode: str) -> Course:
    finder = FinderInMidTraining(
        num_training_steps=9, min_lr=1e-4, max_lr=1e-1, early_stop_threshold=None, update_attr=False
    )
    _, beside, _ = fit(trainer, mode, [finder], validate=False, max_epochs=3)
    if finder.optimal_lr is None or not finder.optimal_lr.results["loss"]:
        raise RuntimeError("no step was tried, so that this says nothing")
    return beside


@pytest.mark.parametrize("mode", ["automatic", "heads"])
def test_a_learning_rate_finder_in_mid_training_leaves_weights_alone(mode: str, quiet_trainer: MakeTrainer) -> None:
    alone = course_alone(quiet_trainer, mode, max_epochs=3)
    with_finder_in_mid_training(quiet_trainer, mode).assert_equals(alone)


@pytest.mark.parametrize("mode", ["automatic", "heads"])
def test_after_a_finder_in_mid_training_checkpoints_have_the_present_state(
    mode: str, quiet_trainer: MakeTrainer
) -> None:
    gradnorm = with_finder_in_mid_training(quiet_trainer, mode).gradnorm
    state = gradnorm.state_dict()
    assert state["steps"] == 3 * BATCHES
    assert dict(zip(state["tasks"], state["weights"].tolist(), strict=True)) == gradnorm.weights


class Rows(Dataset[dict[str, Tensor]]):
    """Single samples, for a loader whose batch size is looked for."""

    def __init__(self) -> None:
        (batch,) = vector_batches(3, 1, size=32)
        self.batch = batch

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.batch.items()}


class Sized(Plain):
    """Makes its own loader, of a batch size that can be set."""

    batch_size = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Rows(), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Rows(), batch_size=8)


@pytest.mark.each_value_once
@pytest.mark.parametrize("how", ["callback", "tuner"])
@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_the_trial_steps_of_a_batch_size_finder_leave_weights_and_initial_losses_alone(
    how: str, heads: bool, quiet_trainer: MakeTrainer
) -> None:
    options = {"steps_per_trial": 2, "init_val": 2, "max_trials": 2}

    def gradnorm_of(model: Sized) -> GradNorm:
        return GradNorm(TASKS, heads=model.heads() if heads else None)

    model = Sized(3)
    before, keys, gradnorm = traces(model), list(model.state_dict()), gradnorm_of(model)
    course = Course(gradnorm)
    finder = [pl.BatchSizeFinder(**options)] if how == "callback" else []
    trainer = quiet_trainer(callbacks=[*finder, gradnorm, course], max_epochs=2)
    with only_what_comes_from_here():  # the finder collects garbage after each trial
        if how == "tuner":
            Tuner(trainer).scale_batch_size(model, **options)
            assert course.weights == []
        trainer.fit(model)
    assert model.batch_size == 4
    assert_as_before(model, before | {": attribute batch_size"}, keys)

    other = Sized(3)
    other.batch_size = 4
    again = gradnorm_of(other)
    alone = Course(again)
    quiet_trainer(callbacks=[again, alone], max_epochs=2).fit(other)
    course.assert_equals(alone)


# a backbone that is unfrozen later -----------------------------------------------------------------------------------


class WithNeck(Evaluated, Automatic):
    """A pretrained backbone, a shared neck behind it, and heads; the first trains later."""

    def build(self) -> None:
        self.backbone = vector_encoder()
        self.neck = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh())
        for task in self.tasks:
            setattr(self, f"{task}_head", nn.Linear(FEATURES, OUTPUTS))

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        z = self.neck(self.backbone(batch["x"]))
        return {task: F.mse_loss(getattr(self, f"{task}_head")(z), batch[task]) for task in self.tasks}

    def forward_for_textbook(self, batch: Any) -> Forward:
        return Forward(self.task_losses(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02)


def finetuning() -> L.Callback:
    return pl.BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.02, lambda_func=always_the_same, should_align=False
    )


def always_the_same(epoch: int) -> float:
    return 1.0


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_a_backbone_below_the_shared_layer_may_be_unfrozen_later(heads: bool, quiet_trainer: MakeTrainer) -> None:
    """The textbook freezes by a rate of zero, which is the same for plain gradient descent."""
    model, twin, batches = WithNeck(3), WithNeck(3), vector_batches(3, BATCHES)
    before, keys = traces(model), list(model.state_dict())
    gradnorm = GradNorm(TASKS, shared_layer="neck.0", heads=model.heads() if heads else None)
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[finetuning(), gradnorm, recorder], max_epochs=3).fit(model, Batches(batches))

    backbone = list(twin.backbone.parameters())
    rest = [p for name, p in twin.named_parameters() if not name.startswith("backbone")]
    sgd = torch.optim.SGD([{"params": backbone, "lr": 0.0}, {"params": rest}], lr=0.02)

    def unfreeze(micro_batch: int) -> None:
        sgd.param_groups[0]["lr"] = 0.02 if micro_batch >= BATCHES else 0.0

    trajectory = train(
        twin, twin.forward_for_textbook, batches * 3, [twin.neck[0].weight], sgd, before_micro_batch=unfreeze
    )
    for found, expected in zip(recorder.weights, trajectory.weights, strict=True):
        assert found == pytest.approx(expected, abs=1e-9)
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, msg=name)
    assert_as_before(model, before, keys)
