"""TensorBoard shows image, prediction and truth side by side, and training does not change."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dense
import lightning as L
import numpy as np
import pytest
import torch
from harness import Batches, case
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_gradnorm import GradNorm, MultiTaskModule, Task
from lightning_gradnorm.experiments.problems.dense.pictures import GAP, strip
from lightning_gradnorm.experiments.problems.dense.predictions_callback import DensePredictions
from lightning_gradnorm.experiments.problems.dense.tasks import nyuv2_tasks

TASKS = ["segmentation", "depth", "normals", "keypoints"]
SIZE = (12, 16)  # of the images, twice that of the targets
STEPS = 2

Build = Callable[..., L.Trainer]


class Noisy(nn.Module):
    """Draws random numbers and counts, in training and in validation: what a second look might disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.noise = 0.1
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            self.seen.append(len(images))
        z: Tensor = self.layers(images)
        return z + self.noise * torch.randn_like(z) * np.random.rand()


class Renamed(MultiTaskModule):
    """Calls its tasks seg and d; batches have the usual names."""

    def __init__(self) -> None:
        tasks = zip(("seg", "d"), nyuv2_tasks(["segmentation", "depth"], 8).values(), strict=True)
        super().__init__(Noisy(), {name: Task(task.head, task.loss) for name, task in tasks})

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0], {"seg": batch[1]["segmentation"], "d": batch[1]["depth"]}


def network(encoder: nn.Module | None = None, **options: Any) -> MultiTaskModule:
    torch.manual_seed(0)
    return MultiTaskModule(encoder or Noisy(), nyuv2_tasks(TASKS, 8), **options)


def batches(seed: int, count: int = STEPS, size: int = 3) -> Batches:
    random = torch.Generator().manual_seed(seed)
    small = (SIZE[0] // 2, SIZE[1] // 2)
    return Batches(
        [
            (torch.rand(size, 3, *SIZE, generator=random), dense.targets(size, seed=seed + i, size=small))
            for i in range(count)
        ]
    )


@pytest.fixture
def fit(quiet_trainer: Build, tmp_path: Path) -> Callable[..., L.Trainer]:
    """`fit(model, callback)` trains with a TensorBoardLogger in ``tmp_path``."""

    def run(model: L.LightningModule, *callbacks: L.Callback, val: Any = None, **options: Any) -> L.Trainer:
        torch.manual_seed(1)
        np.random.seed(1)
        logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
        trainer = quiet_trainer(**{"callbacks": list(callbacks), "logger": logger, **options})
        trainer.fit(model, batches(0), val or batches(9))
        return trainer

    return run


def shown(folder: Path) -> dict[str, dict[int, Tensor]]:
    """Tag → step → picture, each of a step in which the loss of that validation is logged, too."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    validated = {event.step for event in events.Scalars("val/loss")} if "val/loss" in tags["scalars"] else set()
    assert all(event.step in validated for tag in tags["images"] for event in events.Images(tag))
    return {
        tag: {
            event.step: torch.tensor(np.array(Image.open(io.BytesIO(event.encoded_image_string)))).movedim(-1, 0)
            for event in events.Images(tag)
        }
        for tag in tags["images"]
    }


def epochs_shown(folder: Path) -> list[float]:
    """Counted from 1, of all tasks the same."""
    by_task = {tag: sorted(pictures) for tag, pictures in shown(folder).items()}
    assert set(by_task) == {f"val/prediction/{task}" for task in TASKS}
    steps = by_task["val/prediction/depth"]
    assert all(found == steps for found in by_task.values())
    return [(step + 1) / STEPS for step in steps]


def test_each_task_is_shown_as_the_validated_network_predicts_the_first_images(fit: Any, tmp_path: Path) -> None:
    encoder = Noisy()
    encoder.noise = 0
    model = network(encoder)
    fit(model, DensePredictions(images=2), max_epochs=1)
    images, targets = batches(9).batches[0]
    predictions = model.eval()(images)
    pictures = shown(tmp_path)
    assert set(pictures) == {f"val/prediction/{task}" for task in TASKS}
    for task in TASKS:
        (picture,) = pictures[f"val/prediction/{task}"].values()
        above, gap, below = picture.split([SIZE[0], GAP, SIZE[0]], dim=1)
        assert (gap == 255).all()
        for i, found in enumerate((above, below)):
            assert torch.equal(found, strip(task, images[i], predictions[task][i], targets[task][i]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        case("the first, every n-th and the last", {"max_epochs": 8}, [1, 3, 6, 8]),
        case("the last once if it is an n-th", {"max_epochs": 6}, [1, 3, 6]),
        case("as soon as validated", {"max_epochs": 11, "check_val_every_n_epoch": 2}, [2, 4, 6, 10]),
        case("the first of several in an epoch", {"max_epochs": 3, "val_check_interval": 0.5}, [0.5, 2.5, 3]),
        case("the last of a run that ends by steps", {"max_epochs": -1, "max_steps": 10}, [1, 3, 5]),
    ],
)
def test_pictures_are_of(fit: Any, tmp_path: Path, options: dict[str, Any], expected: list[float]) -> None:
    fit(network(), DensePredictions(every_n_epochs=3), num_sanity_val_steps=2, **options)
    assert epochs_shown(tmp_path) == expected


def test_a_run_that_stops_early_shows_its_last_validation(fit: Any, tmp_path: Path) -> None:
    stops = EarlyStopping("val/loss", patience=3, mode="max")  # four epochs: the loss gets lower
    trainer = fit(network(), DensePredictions(every_n_epochs=50), stops, max_epochs=9)
    assert 1 < trainer.current_epoch < 9
    assert epochs_shown(tmp_path) == [1, trainer.current_epoch]


def test_the_last_pictures_are_of_the_validated_network_not_of_one_trained_on(fit: Any, tmp_path: Path) -> None:
    encoder = Noisy()
    encoder.noise = 0
    states: list[dict[str, Tensor]] = []
    keep = L.pytorch.callbacks.LambdaCallback(
        on_validation_end=lambda trainer, model: states.append({k: v.clone() for k, v in model.state_dict().items()})
    )
    model = network(encoder, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    fit(model, DensePredictions(every_n_epochs=50, images=1), keep, max_epochs=5, check_val_every_n_epoch=2)
    pictures = shown(tmp_path)["val/prediction/normals"]
    assert sorted(pictures) == [2 * STEPS - 1, 4 * STEPS - 1]
    (image, *_), targets = batches(9).batches[0]
    trained_on = model.eval()(image[None])["normals"][0]
    model.load_state_dict(states[-1])
    validated = model(image[None])["normals"][0]
    assert torch.equal(pictures[4 * STEPS - 1], strip("normals", image, validated, targets["normals"][0]))
    assert not torch.equal(pictures[4 * STEPS - 1], strip("normals", image, trained_on, targets["normals"][0]))


def test_training_is_the_same_to_the_last_bit(fit: Any) -> None:
    found = []
    for looks_on in ([], [DensePredictions(every_n_epochs=1, images=2)]):
        model = network()
        trainer = fit(model, GradNorm(), *looks_on, max_epochs=3, num_sanity_val_steps=2)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        found.append((model.state_dict(), metrics, torch.get_rng_state(), np.random.get_state()[1]))
        assert model.encoder.seen.count(2) == (4 if looks_on else 0)  # batches have 3
    (state, metrics, torchs, numpys), (state_with, metrics_with, torchs_with, numpys_with) = found
    assert len(metrics) > 10
    assert metrics == metrics_with
    assert "encoder.layers.1.running_mean" in state
    assert all(torch.equal(value, state_with[name]) for name, value in state.items())
    assert torch.equal(torchs, torchs_with)
    assert np.array_equal(numpys, numpys_with)


def test_without_tensorboard_the_network_is_not_even_run(fit: Any, tmp_path: Path) -> None:
    model = network()
    fit(model, DensePredictions(images=1), logger=False)
    assert model.encoder.seen == [3] * STEPS
    assert list(tmp_path.rglob("events*")) == []


def test_without_validation_nothing_is_shown(fit: Any, tmp_path: Path) -> None:
    fit(network(), DensePredictions(), limit_val_batches=0)
    assert shown(tmp_path) == {}


def test_validation_outside_of_training_shows_nothing(tmp_path: Path, quiet_trainer: Build) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    trainer = quiet_trainer(callbacks=[DensePredictions()], logger=logger)
    trainer.validate(network(), batches(9), verbose=False)
    assert shown(tmp_path) == {}


def test_a_resumed_run_continues_with_the_steps_of_the_first(fit: Any, tmp_path: Path, quiet_trainer: Build) -> None:
    first = fit(network(), DensePredictions(every_n_epochs=2), max_epochs=2)
    first.save_checkpoint(tmp_path / "2.ckpt")
    logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    second = quiet_trainer(callbacks=[DensePredictions(every_n_epochs=2)], logger=logger, max_epochs=5)
    second.fit(network(), batches(0), batches(9), ckpt_path=tmp_path / "2.ckpt", weights_only=True)
    assert epochs_shown(tmp_path) == [1, 2, 3, 4, 5]


def test_only_the_first_of_two_processes_writes(fit: Any, tmp_path: Path) -> None:
    fit(network(), DensePredictions(), devices=2, strategy="ddp_fork")
    assert epochs_shown(tmp_path) == [1]
    assert len(list(tmp_path.rglob("events*"))) == 1


def test_half_precision_is_shown_as_it_is_validated(fit: Any, tmp_path: Path) -> None:
    kinds: list[torch.dtype] = []
    model = network()
    model.tasks["depth"].head.register_forward_hook(lambda module, inputs, out: kinds.append(out.dtype))
    fit(model, DensePredictions(images=1), precision="bf16-mixed")
    assert set(kinds) == {torch.bfloat16}
    assert epochs_shown(tmp_path) == [1]


def test_only_the_chosen_tasks_are_shown(fit: Any, tmp_path: Path) -> None:
    fit(network(), DensePredictions(tasks=["depth", "keypoints"]))
    assert set(shown(tmp_path)) == {"val/prediction/depth", "val/prediction/keypoints"}


def test_tasks_may_have_other_names(fit: Any, tmp_path: Path) -> None:
    fit(Renamed(), DensePredictions(tasks={"seg": "segmentation"}))
    fit(network(), DensePredictions(tasks=["segmentation"]))
    pictures = shown(tmp_path)
    (seg,), (segmentation,) = (pictures[f"val/prediction/{task}"].values() for task in ("seg", "segmentation"))
    assert torch.equal(seg[:, :, : SIZE[1]], segmentation[:, :, : SIZE[1]])
    assert torch.equal(seg[:, :, -SIZE[1] :], segmentation[:, :, -SIZE[1] :])


def test_a_task_without_a_target_in_the_batch_is_left_out(fit: Any, tmp_path: Path) -> None:
    val = batches(9)
    del val.batches[0][1]["normals"]
    val.batches[0][1]["depth"] = None
    fit(network(), DensePredictions(), val=val)
    assert set(shown(tmp_path)) == {"val/prediction/segmentation", "val/prediction/keypoints"}


# ---- wrong uses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        case(
            "no epoch", {"every_n_epochs": 0}, r"DensePredictions: every_n_epochs should be a positive integer; got 0"
        ),
        case("half an image", {"images": 1.5}, r"images should be a positive integer; got 1\.5"),
        case("a task in a string", {"tasks": "depth"}, r"tasks should be None, a list of tasks, or .*; got 'depth'"),
        case("no task", {"tasks": []}, r"tasks should be None, a list of tasks, or .*; got \[\]"),
        case("no such picture", {"tasks": ["depht"]}, r"there is no picture of 'depht'; did you mean 'depth'"),
        case("no such kind", {"tasks": {"seg": "labels"}}, r"there is no picture of 'labels'; it has 'segmentation'"),
    ],
)
def test_a_wrong_value_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DensePredictions(**options)


class Bare(L.LightningModule):
    """Returns a fixed prediction for batches of any kind, and is never trained."""

    def __init__(self, prediction: Any) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, images: Tensor) -> Any:
        return self.prediction

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("the sanity check should have told what is wrong")

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> None: ...


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize(
    ("prediction", "batch", "options", "error", "message"),
    [
        case(
            "images alone",
            {},
            torch.zeros(2, 3, 4, 4),
            {},
            TypeError,
            r"a validation batch should be \(images, targets\), .*; got Tensor\. Leave the callback out",
        ),
        case(
            "targets without names", {}, [torch.zeros(2, 3, 4, 4)] * 2, {}, TypeError, r"\(images, targets\).*got list"
        ),
        case(
            "one prediction without a name",
            torch.zeros(2, 1, 4, 4),
            [torch.zeros(2, 3, 4, 4), {"depth": torch.zeros(2, 1, 4, 4)}],
            {},
            TypeError,
            r"return a dict of predictions by task .*; Bare returned Tensor",
        ),
        case(
            "other tasks",
            {"life": 0, "state": 0},
            [torch.zeros(2, 3, 4, 4), {}],
            {},
            ValueError,
            r"pictures of segmentation, depth, normals, keypoints; the model has none of these tasks, but life, state\.",
        ),
        case(
            "a task that the model has not",
            {"depths": 0, "normals": 0},
            [torch.zeros(2, 3, 4, 4), {}],
            {"tasks": ["depth"]},
            ValueError,
            r"the model predicts no task 'depth'; did you mean 'depths'",
        ),
    ],
)
def test_predictions_that_cannot_be_shown_are_an_error_before_training(
    fit: Any, prediction: Any, batch: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(Bare(prediction), DensePredictions(**options), val=Batches([batch]), num_sanity_val_steps=1)
