"""However training ends, no trace of the callback remains on the model."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, assert_clean, traces
from models import (
    Automatic,
    Convolutional,
    Manual,
    Nested,
    OnlyLogs,
    as_inputs_and_targets,
    image_batches,
    multi_task_module,
    vector_batches,
)
from wrong_inputs import TASKS, MakeTrainer

from lightning_gradnorm import GradNorm


class Explodes(L.Callback):
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a user's bug")


@pytest.mark.each_value_once
@pytest.mark.parametrize("ending", ["fit", "exception", "teardown", "two-fits"])
@pytest.mark.parametrize("norm_of", ["weight", "activation"])
@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
@pytest.mark.parametrize("make", [Automatic, OnlyLogs, Convolutional, partial(Nested, container=tuple), Manual, "own"])
def test_nothing_is_left_on_the_model(
    make: Any, heads: bool, norm_of: Any, ending: str, quiet_trainer: MakeTrainer
) -> None:
    model = multi_task_module(3) if make == "own" else make(T=3)
    batches: list[Any] = (image_batches if make is Convolutional else vector_batches)(3, 3)
    if make == "own":
        callback, batches = GradNorm(norm_of=norm_of), as_inputs_and_targets(batches)
    else:
        tasks = model.logged_names() if make is OnlyLogs else TASKS
        callback = GradNorm(tasks, heads=model.heads() if heads else None, norm_of=norm_of)
    before = traces(model)
    if make is Manual:
        model.gradnorm = [callback]
    if ending == "exception":
        with pytest.raises(ZeroDivisionError):
            quiet_trainer(callbacks=[callback, Explodes()]).fit(model, Batches(batches))
    else:
        trainer = quiet_trainer(callbacks=[callback])
        trainer.fit(model, Batches(batches))
        if ending == "two-fits":
            quiet_trainer(callbacks=[callback]).fit(model, Batches(batches))
        if ending == "teardown":
            callback.teardown(trainer, model, "fit")
            callback.teardown(trainer, model, "fit")
    if make is Manual:
        model.gradnorm = []
    assert_clean(model, before)


@pytest.mark.parametrize("fitted", [False, True])
def test_the_callback_itself_can_be_pickled(fitted: bool, quiet_trainer: MakeTrainer) -> None:
    model = Automatic(3)
    callback = GradNorm(TASKS, heads=model.heads())
    if fitted:
        quiet_trainer(callbacks=[callback]).fit(model, Batches(vector_batches(3, 3)))
    assert pickle.loads(pickle.dumps(callback)).weights == callback.weights


def test_a_model_trains_on_without_the_callback(quiet_trainer: MakeTrainer) -> None:
    model, plain = Automatic(3), Automatic(3)
    quiet_trainer(callbacks=[GradNorm(TASKS, heads=model.heads())]).fit(model, Batches(vector_batches(3, 3)))
    plain.load_state_dict(model.state_dict())
    for one in (model, plain):
        quiet_trainer().fit(one, Batches(vector_batches(3, 3, seed=5)))
    for name, value in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)
