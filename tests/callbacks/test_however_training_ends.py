"""However training ends, and whenever you save or copy the model, no trace of the callback remains on it."""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from beside import (
    BATCHES,
    EPOCHS,
    FILTERS,
    MODES,
    Course,
    MakeTrainer,
    assert_as_before,
    course_alone,
    fit,
    make,
    nothing,
)
from harness import (
    Batches,
    parameters_by_part,
    state_by_part,
    traces,
)
from lightning.pytorch import callbacks as pl
from torch import Tensor, nn

pytestmark = FILTERS


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
def test_operations_after_training_leave_a_clean_model(
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
