"""A training with GradNorm beside other callbacks: models of every kind, recorded batch by batch."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from harness import (
    Batches,
    assert_clean,
    state_by_part,
    traces,
)
from models import (
    Automatic,
    Convolutional,
    Manual,
    OnlyLogs,
    as_inputs_and_targets,
    image_batches,
    multi_task_module,
    vector_batches,
)
from torch import Tensor

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

FILTERS = [
    pytest.mark.filterwarnings("ignore:You are using `LearningRateMonitor` callback with models that have no learning"),
    # Lightning's warning about a checkpoint in mid-step of a manual model; here it is on purpose
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


def nothing(*args: Any) -> None:
    pass
