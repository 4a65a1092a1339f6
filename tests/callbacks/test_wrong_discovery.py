"""Wrong uses of automatic discovery: each error names the culprit, the expectation and the fix.

Wrong uses of `losses_from` are in `test_wrong_losses_from.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from found import Found
from harness import Batches, assert_says, case
from models import FEATURES, INPUTS, OUTPUTS, Batch, vector_batches
from torch import Tensor, nn
from torchjd.scalarization import UW
from wrong_inputs import HEADS, TASKS, Losses, MakeTrainer, fails

from lightning_gradnorm import GradNorm, Scalarization

# arguments ------------------------------------------------------------------------------------------------------------

ARGUMENTS = [
    case("heads is True", {"heads": True}, ["heads", "'auto' or None", "True"]),
    case("heads is 'AUTO'", {"heads": "AUTO"}, ["heads", "'auto' or None", "'AUTO'"]),
    case("heads is 'none'", {"heads": "none"}, ["heads", "'auto' or None", "'none'"]),
    case("heads is the name of one", {"heads": "seg_head"}, ["heads", "mapping from task", "'seg_head'"]),
    case("a head is a list of names", {"heads": {**HEADS, "seg": ["seg_head"]}}, ["heads", "mapping from task", "['"]),
    case("the layer is a list of numbers", {"shared_layer": [2]}, ["shared_layer", "or None", "got [2]"]),
    case("the layer is a number", {"shared_layer": 2}, ["shared_layer", "or None", "got 2"]),
    case("no first loss", {"initial_losses": {}}, ["initial_losses", "for some tasks or all", "{}"]),
    case("None for the first losses", {"initial_losses": None}, ["initial_losses", "for some tasks or all", "None"]),
    case("True for the first losses", {"initial_losses": True}, ["initial_losses", "number of updates", "True"]),
    case("a first loss of 0", {"initial_losses": {"seg": 0.0}}, ["initial_losses['seg']", "positive", "0.0"]),
    case("a negative first loss", {"initial_losses": {"seg": -2.0}}, ["initial_losses['seg']", "positive", "-2.0"]),
    case("a first loss that is a tensor", {"initial_losses": {"seg": torch.tensor(2.0)}}, ["['seg']", "tensor(2.)"]),
    case(
        "a first loss of a misspelt task",
        {"initial_losses": {"dept": 1.0}},
        ["initial_losses", "'dept'", "did you mean 'depth'"],
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS)
def test_a_wrong_argument_is_named_with_its_value(arguments: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        GradNorm(TASKS, **arguments)
    assert_says(raised.value, "GradNorm: ", *expected)


# models in which there is nothing to find -------------------------------------------------------------------------------


class OnlyHeads(Found):
    """Heads on the inputs."""

    def represent(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, :1]], 1)


class OneApart(Found):
    """One task has its own trunk."""

    def build(self) -> None:
        super().build()
        self.other = nn.Linear(INPUTS, FEATURES)

    def represent(self, x: Tensor) -> Any:
        return super().represent(x), self.other(x)

    def predict(self, task: str, z: Any) -> Tensor:
        return super().predict(task, z[task == "normal"])


class Normalized(Found):
    """All that is shared is a LayerNorm."""

    def build(self) -> None:
        self.trunk = nn.LayerNorm(INPUTS)
        for task in self.tasks:
            setattr(self, f"{task}_head", nn.Linear(INPUTS, OUTPUTS))


class Detaches(Found):
    """Only trains its heads, on an untrained trunk."""

    def represent(self, x: Tensor) -> Tensor:
        return super().represent(x).detach()


class WithoutGradients(Found):
    """The same by another way."""

    def represent(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().represent(x)


class OnlyColumns(OnlyHeads):
    """One layer with a column for each task: shared by name alone."""

    def build(self) -> None:
        super().build()
        self.output = nn.Linear(FEATURES, 3)

    def task_losses(self, batch: Batch) -> Losses:
        columns = self.output(self.represent(batch["x"])).unbind(1)
        return {task: column.square().mean() for task, column in zip(self.tasks, columns, strict=True)}


ALL = "['seg', 'depth', 'normal']"
NOTHING = [
    case("they share nothing", OnlyHeads, {}, ["shared_layer=None", "OnlyHeads", ALL, "Scalarization"]),
    case(
        "one has a trunk of its own", OneApart, {}, ["shared_layer=None", "'normal' shares no", "Leave it out of tasks"]
    ),
    case(
        "two have a trunk each",
        OneApart,
        {"tasks": ["seg", "normal"]},
        ["shared_layer=None", "['seg', 'normal'] share no", "Scalarization"],
    ),
    case("they share a LayerNorm alone", Normalized, {}, ["two or more dimensions", "shared_layer='…'"]),
    case("what they share is detached", Detaches, {}, [ALL, "detached"]),
    case("what they share is computed without gradients", WithoutGradients, {}, [ALL, "torch.no_grad()"]),
    case("each has its own column", OnlyColumns, {}, [ALL, "entries of its own"]),
    case("the layer is 'auto'", Found, {"shared_layer": "auto"}, ["shared_layer 'auto'", "leave it out", "is found"]),
    case("the layer is that of a head", Found, {"shared_layer": "seg_head"}, ["'depth'", "layer that all tasks share"]),
    case(
        "the container named has a misspelt part",
        Found,
        {"shared_layer": "trunk.layer2"},
        ["shared_layer 'trunk.layer2'", "did you mean 'trunk.2'"],
    ),
    case(
        "the representation has another name",
        Found,
        {"norm_of": "activation"},
        ["representation 'encoder'", "'trunk'"],
    ),
]


@pytest.mark.parametrize(("model", "options", "expected"), NOTHING)
def test_the_error_explains_why_nothing_was_found_in_a_model(
    model: Any, options: dict[str, Any], expected: list[str], quiet_trainer: MakeTrainer
) -> None:
    fails(quiet_trainer, model(3), GradNorm(**{"tasks": TASKS, **options}), "GradNorm: ", *expected)


@pytest.mark.parametrize("model", [Detaches, OnlyHeads])
def test_strategies_that_need_no_layer_still_train(model: Any, quiet_trainer: MakeTrainer) -> None:
    """The message claims this."""
    scalarization = Scalarization(UW, TASKS)
    quiet_trainer(callbacks=[scalarization]).fit(model(3), Batches(vector_batches(3, 4)))
    assert len(set(scalarization.weights.values())) == 3


# what is watched --------------------------------------------------------------------------------------------------------


class Shows(Found):
    """Calls `watch` in some way, and returns the total."""

    def __init__(self, how: Callable[[Any, Losses], Any]) -> None:
        super().__init__(3)
        self.how = how

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        losses = self.task_losses(batch)
        self.how(self.trainer.callbacks[0].watch, losses)
        return torch.stack([*losses.values()]).sum()


def a_list(watch: Any, losses: Losses) -> None:
    watch(list(losses.values()))


def one_tensor(watch: Any, losses: Losses) -> None:
    watch(losses["seg"])


def lists(watch: Any, losses: Losses) -> None:
    watch({task: [loss] for task, loss in losses.items()})


def numbers(watch: Any, losses: Losses) -> None:
    watch({task: loss.item() for task, loss in losses.items()})


def detached(watch: Any, losses: Losses) -> None:
    watch({task: loss.detach() for task, loss in losses.items()})


def copies(watch: Any, losses: Losses) -> None:
    watch({task: loss.clone() for task, loss in losses.items()})


def expanded(watch: Any, losses: Losses) -> None:
    watch({task: loss.expand(3) for task, loss in losses.items()})


def misspelt(watch: Any, losses: Losses) -> None:
    watch({"seg": losses["seg"], "dept": losses["depth"], "normal": losses["normal"]})


def one_alone(watch: Any, losses: Losses) -> None:
    watch({"seg": losses["seg"]})


def two_in_parts(watch: Any, losses: Losses) -> None:
    watch({"seg": losses["seg"]})
    watch({"normal": losses["normal"]})


def one_for_two(watch: Any, losses: Losses) -> None:
    watch({"seg": losses["seg"], "normal": losses["normal"]})
    watch({"depth": losses["seg"]})


def one_in_another(watch: Any, losses: Losses) -> None:
    losses["seg"] = losses["seg"] + losses["depth"]
    watch(losses)


def nothing(watch: Any, losses: Losses) -> None:
    pass


def under_no_grad(watch: Any, losses: Losses) -> None:
    with torch.no_grad():
        watch({task: loss * 1 for task, loss in losses.items()})


WATCHED = [
    case("a list", a_list, ["watch takes a mapping", "list"]),
    case("one loss", one_tensor, ["watch takes a mapping", "Tensor"]),
    case("lists of losses", lists, ["'seg'", "a tensor; got list"]),
    case("their numbers", numbers, ["'seg'", "a tensor; got a float; did you call .item()?"]),
    case("what is detached", detached, ["'seg'", "not .detach()"]),
    case("copies", copies, ["'seg'", "took no part in the backward pass", "not a copy"]),
    case("copies in a vector", expanded, ["'seg'", "took no part in the backward pass", "not a copy"]),
    case("one by another name", misspelt, ["'depth'", "['dept', 'normal', 'seg']; did you mean 'dept'?"]),
    case("one of three", one_alone, ["'depth'", "['seg']. (A task that is absent from a batch is given as None.)"]),
    case("two of three, in parts", two_in_parts, ["'depth'", "['normal', 'seg']", "given as None"]),
    case("one tensor for two", one_for_two, ["'seg' and 'depth'", "same tensor"]),
    case("a loss within another", one_in_another, ["'seg'", "contains that of task 'depth'", "a loss of its own"]),
    case("nothing", nothing, ["training_step should return a mapping", "losses_from", "watch({"]),
    case("what is made under no_grad", under_no_grad, ["training_step should return a mapping", "watch({"]),
]


@pytest.mark.parametrize(("how", "expected"), WATCHED)
def test_the_error_names_what_is_watched_wrongly(how: Any, expected: list[str], quiet_trainer: MakeTrainer) -> None:
    fails(quiet_trainer, Shows(how), GradNorm(TASKS), "GradNorm: ", *expected)


class Logs(Found):
    """Logs its losses and returns the total."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        losses = self.task_losses(batch)
        self.log("train/loss", 0.0)
        for task, loss in losses.items():
            self.log(f"train/{task}_accuracy", 0.5, on_step=False, on_epoch=True)
            self.log(f"train/{task}_loss", loss, on_step=False, on_epoch=True)
        return torch.stack([*losses.values()]).sum()


def test_the_error_about_a_returned_total_holds_the_names_that_the_model_logs_ready_to_paste(
    quiet_trainer: MakeTrainer,
) -> None:
    logged = {task: f"train/{task}_loss" for task in TASKS}
    fails(
        quiet_trainer,
        Logs(3),
        GradNorm(TASKS),
        "GradNorm: Logs.training_step should return a mapping",
        f"tasks={logged};",
    )
    gradnorm = GradNorm(logged)
    quiet_trainer(callbacks=[gradnorm]).fit(Logs(3), Batches(vector_batches(3, 4)))
    assert set(gradnorm.weights) == set(TASKS)
