"""Beside the callbacks and flags that people use, GradNorm trains as it does alone, and leaves nothing on the model.

Where the other callback changes nothing in training, both runs are equal bit by bit; where it does (clipping, accumulation
by a schedule, a backbone unfrozen later), they are those of the textbook.
"""

from __future__ import annotations

import copy
import io
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from garbage import only_what_comes_from_here
from harness import (
    Batches,
    MemoryLogger,
    Recorder,
    assert_agrees,
    assert_clean,
    parameters_by_part,
    state_by_part,
    traces,
)
from lightning.pytorch import callbacks as pl
from lightning.pytorch.tuner import Tuner
from models import (
    FEATURES,
    OUTPUTS,
    Automatic,
    Convolutional,
    Manual,
    OnlyLogs,
    as_inputs_and_targets,
    image_batches,
    multi_task_module,
    network_sgd,
    vector_batches,
    vector_encoder,
)
from textbook import Forward, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_gradnorm import GradNorm

MakeTrainer = Callable[..., L.Trainer]
TASKS = ["seg", "depth", "normal"]
EPOCHS, BATCHES = 2, 4
MODES = [
    "heads",
    "manual",
    "own",
    *(pytest.param(m, marks=pytest.mark.slow) for m in ("automatic", "logged", "images")),
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using `LearningRateMonitor` callback with models that have no learning"),
    # what Lightning says of a checkpoint in mid-step of a manual model; here it is meant
    pytest.mark.filterwarnings("ignore:.*pre-optimization state.*", "ignore:.*manual optimization.*"),
]


class Evaluated:
    """Validation and test for any of the models: they look at the losses, in no way that training could notice."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", sum(self.task_losses(batch).values()))  # type: ignore[attr-defined]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", sum(self.task_losses(batch).values()))  # type: ignore[attr-defined]


class Plain(Evaluated, Automatic):
    lr = 0.02  # what a learning-rate finder looks for

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Logs(Evaluated, OnlyLogs):
    pass


class ByHand(Evaluated, Manual):
    pass


class Images(Evaluated, Convolutional):
    pass


def make(mode: str) -> tuple[L.LightningModule, GradNorm, list[Any]]:
    """A model, its callback and its batches, the same for each call."""
    batches = vector_batches(3, BATCHES)
    if mode == "own":
        return multi_task_module(3), GradNorm(), as_inputs_and_targets(batches)
    if mode == "images":
        images = Images(3)
        return images, GradNorm(TASKS, heads=images.heads()), image_batches(3, BATCHES)
    if mode == "logged":
        logs = Logs(3)
        return logs, GradNorm(logs.logged_names()), batches
    if mode == "manual":
        manual = ByHand(3)
        gradnorm = GradNorm(TASKS)
        manual.gradnorm = [gradnorm]
        return manual, gradnorm, batches
    plain = Plain(3)
    return plain, GradNorm(TASKS, heads=plain.heads() if mode == "heads" else None), batches


class Course(L.Callback):
    """Notes the weights and the whole network after each batch that is trained on."""

    def __init__(self, gradnorm: GradNorm) -> None:
        self.gradnorm = gradnorm
        self.weights: list[dict[str, float]] = []
        self.networks: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.weights.append(self.gradnorm.weights)
        self.networks.append({name: value.clone() for name, value in state_by_part(pl_module).items()})

    def assert_equals(self, other: Course, tolerance: float = 0.0) -> None:
        assert len(self.weights) == len(other.weights) > 0
        for batch, (one, two) in enumerate(zip(self.weights, other.weights, strict=True)):
            assert one == pytest.approx(two, rel=0, abs=tolerance), f"after batch {batch}"
        for batch, (one, two) in enumerate(zip(self.networks, other.networks, strict=True)):
            for name in one:
                difference = float((one[name] - two[name]).abs().max())
                assert difference <= tolerance, f"{name} differs by {difference} after batch {batch}"
        assert self.weights[-1] != dict.fromkeys(self.weights[-1], 1.0), "GradNorm has done nothing"


def fit(
    trainer: MakeTrainer,
    mode: str,
    others: list[L.Callback],
    *,
    first: bool = False,
    validate: bool = True,
    **options: Any,
) -> tuple[L.LightningModule, Course, L.Trainer]:
    """Train with GradNorm and these other callbacks, before or after it, and check that the model is clean afterwards."""
    model, gradnorm, batches = make(mode)
    before, keys = traces(model), list(model.state_dict())
    course = Course(gradnorm)
    callbacks = [*others, gradnorm] if first else [gradnorm, *others]
    one = trainer(**{"callbacks": [course, *callbacks], "max_epochs": EPOCHS, **options})
    one.fit(model, Batches(batches), Batches(batches) if validate else None)
    assert_as_before(model, before, keys)
    return model, course, one


_COURSES: dict[tuple[Any, ...], Course] = {}


def course_alone(trainer: MakeTrainer, mode: str, **options: Any) -> Course:
    """What GradNorm does without other callbacks; trained once for all tests."""
    key = (mode, *sorted(options.items()))
    if key not in _COURSES:
        _, _COURSES[key], _ = fit(trainer, mode, [], **options)
    return _COURSES[key]


def assert_as_before(model: L.LightningModule, before: set[str], keys: list[str]) -> None:
    for gradnorm in getattr(model, "gradnorm", []):  # a manual model holds its callback; both can be pickled
        assert pickle.loads(pickle.dumps(gradnorm)).weights == gradnorm.weights
    assert list(model.state_dict()) == keys
    assert_clean(model, before)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


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


def nothing(*args: Any) -> None:
    pass


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
    """What the Trainer needs for that callback to do its work at all."""
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
def test_a_flag_of_the_trainer_changes_which_batches_are_seen_and_nothing_else(
    flag: str, mode: str, quiet_trainer: MakeTrainer
) -> None:
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


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_a_shared_layer_that_is_still_frozen_is_an_error_that_names_it(heads: bool, quiet_trainer: MakeTrainer) -> None:
    model = WithNeck(3)
    before = traces(model)
    gradnorm = GradNorm(TASKS, shared_layer="backbone.2", heads=model.heads() if heads else None)
    with pytest.raises(ValueError, match=r"GradNorm: shared_layer 'backbone.2' is frozen .*Name the last shared layer"):
        quiet_trainer(callbacks=[finetuning(), gradnorm]).fit(model, Batches(vector_batches(3, 2)))
    assert_clean(model, before)


# checkpoints that are written while hooks are in place ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["automatic", "heads", "logged", "manual", "own", "images"])
def test_a_checkpoint_written_in_mid_training_holds_the_network_and_loads_safely(
    mode: str, quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    saver = pl.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    model, course, _ = fit(quiet_trainer, mode, [saver], enable_checkpointing=True)
    fresh, _, _ = make(mode)
    for step in (1, BATCHES, EPOCHS * BATCHES - 1):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert list(checkpoint["state_dict"]) == list(model.state_dict())
        fresh.load_state_dict(checkpoint["state_dict"])
        for name, value in state_by_part(fresh).items():
            assert torch.equal(value, course.networks[step - 1][name]), f"{name} after step {step}"
        state = checkpoint["callbacks"]["GradNorm"]
        assert dict(zip(state["tasks"], state["weights"].tolist(), strict=True)) == course.weights[step - 1]


@pytest.mark.parametrize("mode", ["heads", "own"])
def test_a_model_copied_in_mid_training_is_a_model(mode: str, quiet_trainer: MakeTrainer) -> None:
    """What a user's own callback may do while the hooks are in place."""
    copies: list[nn.Module] = []

    class Copies(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            part = pl_module.get_submodule("encoder")
            copies.append(copy.deepcopy(part))
            pickle.dumps(part)

    _, course, _ = fit(quiet_trainer, mode, [Copies()])
    for network, copied in zip(course.networks, copies, strict=True):
        for name, value in copied.state_dict().items():
            assert torch.equal(value, network[f"encoder.{name}"])


# however training ends -----------------------------------------------------------------------------------------------


class Breaks(L.Callback):
    """Ends training in the second epoch."""

    def __init__(self, exception: type[BaseException]) -> None:
        self.exception = exception

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 1 and batch_idx == 2:
            raise self.exception("the user's")


class BreaksInTheStep(Breaks):
    """Ends it with the losses in hand: in backward of the second batch."""

    def on_train_batch_start(self, *args: Any) -> None:
        pass

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if trainer.fit_loop.total_batch_idx >= 1:
            raise self.exception("the user's")


def all_at_once(folder: Path) -> list[L.Callback]:
    return [
        pl.EMAWeightAveraging(decay=0.8),
        pl.EarlyStopping("val/loss", patience=100),
        pl.ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1),
        pl.Timer(duration="00:00:10:00"),
        pl.LambdaCallback(on_train_batch_start=nothing),
    ]


@pytest.fixture
def _signals() -> Iterator[None]:
    """Lightning switches Ctrl-C off when it has seen one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


ENDINGS = {
    "an exception": (Breaks, ZeroDivisionError, ZeroDivisionError),
    "an exception in the step": (BreaksInTheStep, ZeroDivisionError, ZeroDivisionError),
    "Ctrl-C": (Breaks, KeyboardInterrupt, SystemExit),
    "Ctrl-C in the step": (BreaksInTheStep, KeyboardInterrupt, SystemExit),
}


@pytest.mark.each_value_once
@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_training_cut_short_leaves_a_clean_model_that_trains_again(
    ending: str, mode: str, others: bool, quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    kind, raised, seen = ENDINGS[ending]
    model, gradnorm, batches = make(mode)
    start = copy.deepcopy(model.state_dict())
    before, keys = traces(model), list(model.state_dict())
    beside = all_at_once(tmp_path) if others else []
    with pytest.raises(seen):
        quiet_trainer(callbacks=[gradnorm, *beside, kind(raised)], max_epochs=EPOCHS, enable_checkpointing=others).fit(
            model, Batches(batches), Batches(batches)
        )
    assert_as_before(model, before, keys)

    model.load_state_dict(start)
    course = Course(gradnorm)
    quiet_trainer(callbacks=[gradnorm, course], max_epochs=EPOCHS).fit(model, Batches(batches))
    alone = course_alone(quiet_trainer, mode)
    course.assert_equals(alone)


# Lightning's own, whenever this callback is there
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint")
@pytest.mark.parametrize("mode", ["heads", "own"])
def test_a_checkpoint_written_at_an_exception_has_the_state_of_that_moment(
    mode: str, quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    model, gradnorm, batches = make(mode)
    last = pl.OnExceptionCheckpoint(tmp_path)
    with pytest.raises(ZeroDivisionError):
        quiet_trainer(
            callbacks=[last, gradnorm, Breaks(ZeroDivisionError)], max_epochs=EPOCHS, enable_checkpointing=True
        ).fit(model, Batches(batches))
    state = torch.load(last.ckpt_path, weights_only=True)["callbacks"]["GradNorm"]
    at_the_moment = course_alone(quiet_trainer, mode).weights[BATCHES + 1]
    assert dict(zip(state["tasks"], state["weights"].tolist(), strict=True)) == at_the_moment
    assert state["steps"] == BATCHES + 2


@pytest.mark.each_value_once
@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("after", ["validate", "test", "a second fit"])
def test_what_follows_a_training_leaves_a_clean_model(
    after: str, mode: str, others: bool, quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    model, gradnorm, batches = make(mode)
    before, keys = traces(model), list(model.state_dict())
    beside = all_at_once(tmp_path) if others else []
    trainer = quiet_trainer(callbacks=[gradnorm, *beside], max_epochs=1, enable_checkpointing=others)
    trainer.fit(model, Batches(batches), Batches(batches))
    weights, network = gradnorm.weights, {name: value.clone() for name, value in state_by_part(model).items()}
    if after == "a second fit":
        again = all_at_once(tmp_path / "again") if others else []
        quiet_trainer(callbacks=[gradnorm, *again], max_epochs=1, enable_checkpointing=others).fit(
            model, Batches(batches), Batches(batches)
        )
    else:
        getattr(trainer, after)(model, Batches(batches), verbose=False)
        assert gradnorm.weights == weights
        for name, value in network.items():
            assert torch.equal(state_by_part(model)[name], value)
    assert_as_before(model, before, keys)


def test_parameters_have_no_hooks_while_no_training_runs(quiet_trainer: MakeTrainer) -> None:
    """The gradients of a model that is used by hand between two fits are those of the plain sum."""
    model, gradnorm, batches = make("heads")
    quiet_trainer(callbacks=[gradnorm]).fit(model, Batches(batches))
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one.zero_grad()
        one.training_step(batches[0], 0)["loss"].backward()  # type: ignore[index]
    for (name, one), other in zip(parameters_by_part(model).items(), parameters_by_part(twin).values(), strict=True):
        assert torch.equal(one.grad, other.grad), name
