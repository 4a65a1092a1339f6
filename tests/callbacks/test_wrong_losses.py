"""Losses that are not returned, logged or watched as they should be: an error that says what to do, or a warning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, case
from models import (
    Automatic,
    Manual,
    OnlyLogs,
    vector_batches,
)
from torch import Tensor
from wrong_inputs import HEADS, LOGGED, ONES, TASKS, Losses, MakeTrainer, fails

from lightning_gradnorm import FixedWeights, GradNorm

# losses that training_step returns -----------------------------------------------------------------------------------


class Spoilt(Automatic):
    """Returns an invalid value."""

    def __init__(self, spoil: Callable[[Losses], Any]) -> None:
        super().__init__(3)
        self.spoil = spoil

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.spoil(self.task_losses(batch))


def total(losses: Losses) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def with_depth(make: Callable[[Tensor], Any], losses: Losses) -> dict[str, Any]:
    return {"loss": total(losses), **losses, "depth": make(losses["depth"])}


def as_vector(loss: Tensor) -> Tensor:
    return loss.expand(3)


def as_list(loss: Tensor) -> list[Tensor]:
    return [loss]


def as_copy(loss: Tensor) -> Tensor:
    return loss * 1


def as_integer(loss: Tensor) -> Tensor:
    return loss.detach().int()


def as_array(loss: Tensor) -> Any:
    return loss.detach().numpy()


def with_complex_depth(losses: Losses) -> dict[str, Any]:
    depth = torch.complex(losses["depth"], losses["depth"])
    return {"loss": losses["seg"] + losses["normal"] + depth.real, **losses, "depth": depth}


def with_depth_left_out_of_the_sum(losses: Losses) -> dict[str, Any]:
    return {"loss": losses["seg"] + losses["normal"], **losses}


def with_depth_detached_in_the_sum(losses: Losses) -> dict[str, Any]:
    return {"loss": losses["seg"] + losses["normal"] + losses["depth"].detach(), **losses}


def with_one_tensor_for_two(losses: Losses) -> dict[str, Any]:
    return {"loss": total(losses), **losses, "depth": losses["seg"]}


def without_depth(losses: Losses) -> dict[str, Any]:
    return {"loss": total(losses), "seg": losses["seg"], "normal": losses["normal"]}


def one_level_too_deep(losses: Losses) -> dict[str, Any]:
    return {"loss": total(losses), "losses": losses}


def a_pair(losses: Losses) -> Any:
    return total(losses), losses


RETURNED = [
    case("a vector of copies of it", partial(with_depth, as_vector), ["'depth'", "not a copy", "backward pass"]),
    case("detached", partial(with_depth, Tensor.detach), ["'depth'", "gradient", "not .detach()"]),
    case("a float, by .item()", partial(with_depth, Tensor.item), ["'depth'", "a tensor", "float"]),
    case("an integer tensor", partial(with_depth, as_integer), ["'depth'", "gradient"]),
    case("a numpy array", partial(with_depth, as_array), ["'depth'", "a tensor", "ndarray"]),
    case("a string", partial(with_depth, str), ["'depth'", "a tensor", "str"]),
    case("a list of one loss", partial(with_depth, as_list), ["'depth'", "a tensor", "list"]),
    case("complex", with_complex_depth, ["'depth'", "real", "complex"]),
    case("a copy of what is summed", partial(with_depth, as_copy), ["'depth'", "not a copy", "backward pass"]),
    case("left out of the sum", with_depth_left_out_of_the_sum, ["'depth'", "Add it to what is back-propagated"]),
    case("detached in the sum", with_depth_detached_in_the_sum, ["'depth'", "took no part in the backward pass"]),
    case("the tensor of another task", with_one_tensor_for_two, ["'seg' and 'depth'", "same tensor"]),
    case("not returned at all", without_depth, ["'depth'", "['normal', 'seg']", "given as None"]),
    case("one mapping too deep", one_level_too_deep, ["'seg'", "['losses']"]),
    case("nothing but their sum", total, ["should return a mapping", "Tensor", "tasks={'seg': 'train/seg_loss'"]),
    case("in a tuple", a_pair, ["should return a mapping", "tuple", "Return {'loss': loss"]),
]


@pytest.mark.parametrize("callback", ["GradNorm", "GradNorm with heads", "FixedWeights"])
@pytest.mark.parametrize(("spoil", "expected"), RETURNED)
def test_a_returned_loss_that_cannot_be_weighted_is_named(
    spoil: Any, expected: list[str], callback: str, quiet_trainer: MakeTrainer
) -> None:
    balancing = {
        "GradNorm": GradNorm(TASKS),
        "GradNorm with heads": GradNorm(TASKS, heads=HEADS),
        "FixedWeights": FixedWeights({"seg": 1.0, "depth": 2.0, "normal": 0.5}),
    }[callback]
    fails(quiet_trainer, Spoilt(spoil), balancing, callback.split()[0], *expected)


# losses that are logged ----------------------------------------------------------------------------------------------


class LogsNothing(OnlyLogs):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return total(self.task_losses(batch))


class LogsDetached(OnlyLogs):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.task_losses(batch)
        self.log_dict({f"train/{task}_loss": loss.detach() for task, loss in losses.items()})
        return total(losses)


class LogsInValidationAlone(LogsNothing):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({f"train/{task}_loss": loss for task, loss in self.task_losses(batch).items()})


class LogsAfterBackward(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        losses = self.task_losses(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(total(losses))
        self.log_dict({f"train/{task}_loss": loss for task, loss in losses.items()}, on_step=True)
        optimizer.step()


LOGS = [
    case(
        "under another name",
        OnlyLogs,
        {**LOGGED, "depth": "train/dept_loss"},
        ["'train/dept_loss'", "did you mean 'train/depth_loss'"],
    ),
    case("by the names of the tasks, not of the log", OnlyLogs, {"seg": "seg", "depth": "depth"}, ["'seg' was not"]),
    case("never", LogsNothing, LOGGED, ["'train/seg_loss' was not logged in the first batch"]),
    case("in validation alone", LogsInValidationAlone, LOGGED, ["'train/seg_loss' was not logged in the first batch"]),
    case("detached", LogsDetached, LOGGED, ["'seg'", "gradient", "not .detach()"]),
    case("after backward, in manual optimization", LogsAfterBackward, LOGGED, ["'seg'", "before backward"]),
]


@pytest.mark.parametrize(("model", "tasks", "expected"), LOGS)
def test_a_loss_that_is_not_logged_as_it_should_be_is_named(
    model: Any, tasks: dict[str, str], expected: list[str], quiet_trainer: MakeTrainer
) -> None:
    fails(quiet_trainer, model(3), GradNorm(tasks), "GradNorm", *expected)


# losses that are watched ---------------------------------------------------------------------------------------------


class Stepwise(Manual):
    """Optimizes manually as `step(self, losses, batch_idx)` does; `self.watch` is that of its first callback."""

    def __init__(self, step: Callable[[Any, Losses, int], None]) -> None:
        super().__init__(3)
        self.step = step

    def watch(self, losses: Any) -> None:
        self.gradnorm[0].watch(losses)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.step(self, self.task_losses(batch), batch_idx)

    def backward_and_step(self, losses: Losses) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(total(losses))
        optimizer.step()


def never(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    model.backward_and_step(losses)


def after_the_step(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    model.backward_and_step(losses)
    model.watch(losses)


def between_backward_and_step(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    optimizer = model.optimizers()
    optimizer.zero_grad()
    model.manual_backward(total(losses))
    model.watch(losses)
    optimizer.step()


def by_copies(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    model.watch({task: loss * 1 for task, loss in losses.items()})
    model.backward_and_step(losses)


def as_a_list(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    model.watch(list(losses.values()))
    model.backward_and_step(losses)


def as_their_sum(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    model.watch(total(losses))
    model.backward_and_step(losses)


def misspelt(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    model.watch({"seg": losses["seg"], "dept": losses["depth"], "normal": losses["normal"]})
    model.backward_and_step(losses)


def only_two(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    model.watch({"seg": losses["seg"], "depth": losses["depth"]})
    model.backward_and_step(losses)


def never_and_backward_by_hand(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    optimizer = model.optimizers()
    optimizer.zero_grad()
    total(losses).backward()
    optimizer.step()


def without_a_step(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    model.watch(losses)
    model.manual_backward(total(losses))


def one_in_the_first_batch_alone(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    model.watch(losses if batch_idx == 0 else {task: loss for task, loss in losses.items() if task != "depth"})
    model.backward_and_step(losses)


def in_every_batch(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    model.watch(losses)
    model.backward_and_step(losses)


WATCHED = [
    case("never", never, ["no task loss was seen", "watch({'seg': loss", "before manual_backward"]),
    case("after the optimizer's step", after_the_step, ["'seg'", "took no part", "before backward"]),
    case("after backward", between_backward_and_step, ["'seg'", "took no part", "before backward"]),
    case("as copies", by_copies, ["'seg'", "not a copy"]),
    case("as a list", as_a_list, ["watch", "mapping", "list"]),
    case("as their sum", as_their_sum, ["watch", "mapping", "Tensor"]),
    case("under a misspelt name", misspelt, ["'depth'", "did you mean 'dept'"]),
    case("but for one", only_two, ["'normal'", "['depth', 'seg']", "given as None"]),
    case(
        "never, with loss.backward() past Lightning",
        never_and_backward_by_hand,
        ["no task loss was seen", "watch({'seg': loss"],
    ),
    case("but no optimizer ever steps", without_a_step, ["step"]),
]


@pytest.mark.parametrize(("step", "expected"), WATCHED)
def test_losses_of_a_manual_model_that_are_not_watched_as_they_should_be_are_an_error(
    step: Any, expected: list[str], quiet_trainer: MakeTrainer
) -> None:
    model, callback = Stepwise(step), GradNorm(TASKS)
    model.gradnorm = [callback]
    fails(quiet_trainer, model, callback, "GradNorm", *expected, error=(ValueError, TypeError, UserWarning))


@pytest.mark.filterwarnings("ignore:GradNorm. watch was called")
def test_watching_a_callback_while_another_is_in_the_trainer_is_an_error(quiet_trainer: MakeTrainer) -> None:
    model = Stepwise(in_every_batch)
    model.gradnorm = [GradNorm(TASKS)]
    fails(quiet_trainer, model, GradNorm(TASKS), "GradNorm", "no task loss was seen", "on this callback")


def test_watching_a_callback_that_no_trainer_has_is_not_passed_over(quiet_trainer: MakeTrainer) -> None:
    model = Stepwise(in_every_batch)
    model.gradnorm = [GradNorm(TASKS)]
    fails(
        quiet_trainer, model, L.Callback(), "GradNorm", "watch", "Trainer(callbacks=", error=(RuntimeError, UserWarning)
    )


# what is not wrong in the first batch --------------------------------------------------------------------------------


def warnings_of(name: str, warned: Any) -> list[str]:
    return [str(one.message) for one in warned if name in str(one.message)]


class Vanishing(Automatic):
    """Returns `depth` in the first batch alone."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        return output if batch_idx == 0 else {name: loss for name, loss in output.items() if name != "depth"}


class VanishingFromTheLog(OnlyLogs):
    """Logs `depth` in the first batch alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.task_losses(batch)
        for task in self.tasks if batch_idx == 0 else ("seg", "normal"):
            self.log(f"train/{task}_loss", losses[task])
        return total(losses)


@pytest.mark.parametrize(
    ("model", "tasks"),
    [
        case("from what is returned", Vanishing(3), TASKS),
        case("from the log", VanishingFromTheLog(3), LOGGED),
        case("from watch", Stepwise(one_in_the_first_batch_alone), TASKS),
    ],
)
def test_a_task_that_vanishes_after_the_first_batch_is_warned_of_once(
    model: Any, tasks: Any, quiet_trainer: MakeTrainer
) -> None:
    callback = GradNorm(tasks)
    if isinstance(model, Manual):
        model.gradnorm = [callback]
    with pytest.warns(UserWarning, match="'depth'") as warned:
        quiet_trainer(callbacks=[callback]).fit(model, Batches(vector_batches(3, 5)))
    assert len([message for message in warnings_of("GradNorm", warned) if "'depth'" in message]) == 1


class Negative(Automatic):
    """`depth` is a log-likelihood that passes below zero."""

    def task_losses(self, batch: Any) -> Losses:
        losses = super().task_losses(batch)
        return {**losses, "depth": losses["depth"] - 100}


def test_a_negative_loss_has_no_training_rate_and_is_warned_of_once(quiet_trainer: MakeTrainer) -> None:
    gradnorm = GradNorm(TASKS)
    with pytest.warns(UserWarning, match="task 'depth' is negative .*alpha=0.*weights stay as they are") as warned:
        quiet_trainer(callbacks=[gradnorm]).fit(Negative(3), Batches(vector_batches(3, 4)))
    assert len(warnings_of("GradNorm", warned)) == 1
    assert gradnorm.weights == ONES


def test_a_negative_loss_is_balanced_with_alpha_zero_as_the_same_loss_without_the_constant(
    quiet_trainer: MakeTrainer,
) -> None:
    found = []
    for model in (Negative(3), Automatic(3)):
        gradnorm = GradNorm(TASKS, alpha=0.0)
        quiet_trainer(callbacks=[gradnorm]).fit(model, Batches(vector_batches(3, 4)))
        found.append(gradnorm.weights)
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    assert found[0] != ONES
