"""Wrong uses of `losses_from`: each error names the path, what it found and the fix; the model does not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Batches, assert_says, case
from models import Automatic, Batch, as_inputs_and_targets, multi_task_module, vector_batches
from torch import Tensor, nn
from torch.nn import functional as F
from wrong_inputs import TASKS, Losses, MakeTrainer, fails

from lightning_gradnorm import FixedWeights, GradientNormMonitor, GradNorm

# arguments ------------------------------------------------------------------------------------------------------------

EACH = dict.fromkeys(TASKS, "criterion")
ARGUMENTS = [
    case("it is empty", {"losses_from": ""}, ["losses_from", "dotted path such as 'module.loss'", "''"]),
    case("it is a list", {"losses_from": ["a", "b"]}, ["losses_from", "dotted path", "['a', 'b']"]),
    case("it is the module", {"losses_from": nn.MSELoss()}, ["losses_from", "dotted path", "MSELoss()"]),
    case("it is the function", {"losses_from": F.mse_loss}, ["losses_from", "dotted path", "mse_loss"]),
    case("a mapping lacks a task", {"losses_from": {"seg": "a", "depth": "b"}}, ["every task", "['normal']"]),
    case("a mapping is empty", {"losses_from": {}}, ["every task", "['seg', 'depth', 'normal']"]),
    case(
        "a mapping has a misspelt task",
        {"losses_from": {"seg": "a", "dept": "b", "normal": "c"}},
        ["losses_from names 'dept'", "did you mean 'depth'"],
    ),
    case("a path is a number", {"losses_from": {**EACH, "seg": 1}}, ["losses_from['seg']", "dotted path", "got 1"]),
    case("a path is empty", {"losses_from": {**EACH, "depth": ""}}, ["losses_from['depth']", "dotted path", "''"]),
    case("all paths are the same", {"losses_from": EACH}, ["'criterion'", "only one task", "losses_from='criterion'"]),
    case(
        "both are mappings",
        {"tasks": {task: task for task in TASKS}, "losses_from": EACH},
        ["a place for each loss", "losses_from as one place"],
    ),
    case("there are no tasks", {"tasks": None, "losses_from": "criterion"}, ["losses_from needs tasks", "None"]),
    case(
        "two tasks have one name in it",
        {"tasks": {"seg": "a", "depth": "a"}, "losses_from": "criterion"},
        ["tasks should all be different", "['a', 'a']"],
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS)
def test_a_wrong_argument_is_named_with_its_value(arguments: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        GradNorm(**{"tasks": TASKS, **arguments})
    assert_says(raised.value, "GradNorm: ", *expected)


# places that the model lacks --------------------------------------------------------------------------------------------


class Criterion(nn.Module):
    """Returns the losses in some form."""

    def __init__(self, pack: Callable[[Losses], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, losses: Losses) -> Any:
        return self.pack(losses)


class Slotted:
    """Its methods cannot be replaced."""

    __slots__ = ()

    def compute(self, losses: Losses) -> Losses:
        return losses


class Hidden(Automatic):
    """Returns its total alone."""

    def __init__(
        self, pack: Callable[[Losses], Any] = dict, step: Callable[[Any, Losses], Tensor] | None = None
    ) -> None:
        super().__init__(3)
        self.criterion, self.unused = Criterion(pack), Criterion(dict)
        self.nested = nn.ModuleDict({"inner": nn.ModuleList([nn.Identity()])})
        self.listed, self.mapped, self.fixed = [F.mse_loss], {"main": F.mse_loss}, (F.mse_loss,)
        self.slotted, self.step = Slotted(), step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        losses = self.task_losses(batch)
        if self.step is not None:
            return self.step(self, losses)
        self.criterion(losses)
        return torch.stack(list(losses.values())).sum()


PLACES = [
    case("it is misspelt", "criterio", ["has no 'criterio'; did you mean 'criterion'?"]),
    case("a part of it is misspelt", "criterion.forwrd", ["'criterion' (Criterion) has no 'forwrd'", "'forward'"]),
    case("it begins with self", "self.criterion", ["leave 'self.' out: losses_from='criterion'"]),
    case(
        "it begins with a name that is not there",
        "model.criterion",
        ["has no 'model'; it has 'encoder'", "'criterion'"],
    ),
    case("it ends with a dot", "criterion.", ["'criterion' (Criterion) has no ''", "'forward'"]),
    case("an index is too large", "nested.inner.7", ["'nested.inner' (ModuleList) has no '7'; it has '0'"]),
    case("an index of a list is too large", "listed.3", ["'listed' (list) has no '3'; it has '0'"]),
    case("a key is misspelt", "mapped.man", ["'mapped' (dict) has no 'man'; did you mean 'main'?"]),
    case("it is a list", "listed", ["'listed'", "a module, a method or a function", "got list"]),
    case("it is a parameter", "encoder.0.weight", ["'encoder.0.weight'", "a module, a method", "got Parameter"]),
    case("it is an option", "reverse", ["'reverse'", "a module, a method or a function", "got bool"]),
    case("it is in a tuple", "fixed.0", ["'fixed.0' cannot be replaced in a tuple", "a method that calls it"]),
    case("it is in an object with slots", "slotted.compute", ["'slotted.compute' cannot be replaced in a Slotted"]),
]


@pytest.mark.parametrize(("path", "expected"), PLACES)
def test_a_place_that_is_not_there_is_named(path: str, expected: list[str], quiet_trainer: MakeTrainer) -> None:
    fails(quiet_trainer, Hidden(), GradNorm(TASKS, losses_from=path), f"GradNorm: losses_from '{path}'", *expected)


def test_the_error_only_lists_the_users_own_keys(quiet_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="has no 'xyz'; it has") as raised:
        quiet_trainer(callbacks=[GradNorm(TASKS, losses_from="xyz")]).fit(Hidden(), vector_batches(3, 1))
    assert "training'," not in str(raised.value)
    assert "prepare_data_per_node" not in str(raised.value)


# what is returned there -------------------------------------------------------------------------------------------------


def total(losses: Losses) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def stacked(losses: Losses) -> Tensor:
    return torch.stack(list(losses.values()))


def stacked_inside(losses: Losses) -> Any:
    return {"losses": stacked(losses)}


def as_tuple(losses: Losses) -> Any:
    return tuple(losses.values())


def nothing(losses: Losses) -> None:
    return None


def detached(losses: Losses) -> Losses:
    return {task: loss.detach() for task, loss in losses.items()}


def numbers(losses: Losses) -> dict[str, float]:
    return {task: loss.item() for task, loss in losses.items()}


def copies(losses: Losses) -> Losses:
    return {task: loss.clone() for task, loss in losses.items()}


RETURNED = [
    case(
        "a dict without it", dict, ["seg", "dept"], ["task 'dept'", "this dict has no 'dept'", "did you mean 'depth'"]
    ),
    case("a dict, and an index is given", dict, {"seg": "0", "depth": "1"}, ["this dict has no '0'", "'seg'"]),
    case("a dict of losses, not of dicts", dict, {"seg": "seg", "depth": "depth.x"}, ["'depth.x'", "got a Tensor"]),
    case("a tuple that is too short", as_tuple, {"seg": "0", "depth": "5"}, ["this tuple has no '5'", "'2'"]),
    case("a tuple, and a name is given", as_tuple, TASKS, ["this tuple has no 'seg'", "'0'"]),
    case("a tensor that is too short", stacked, {"seg": "0", "depth": "5"}, ["this Tensor has no '5'", "'2'"]),
    case("a tensor, and a name is given", stacked, TASKS, ["this Tensor has no 'seg'", "'0', '1', '2'"]),
    case(
        "a tensor within a dict",
        stacked_inside,
        {"seg": "losses.0", "depth": "losses.1"},
        ["'losses.0'", "entries of a tensor", "Name a module or a method that returns the tensor itself"],
    ),
    case(
        "the total",
        total,
        TASKS,
        ["'seg' in what 'criterion' returns, but got a Tensor", "Name what returns each"],
    ),
    case("None", nothing, TASKS, ["'seg' in what 'criterion' returns, but got a NoneType", "Name what returns each"]),
    case("detached losses", detached, TASKS, ["'seg'", "not .detach()"]),
    case("numbers", numbers, TASKS, ["'seg'", "a tensor; got a float; did you call .item()?"]),
    case(
        "copies of what is added up",
        copies,
        TASKS,
        ["'seg'", "took no part in the backward pass", "not a copy", "or an expression computed a second"],
    ),
]


@pytest.mark.parametrize("callback", [GradNorm, "FixedWeights"], ids=["GradNorm", "FixedWeights"])
@pytest.mark.parametrize(("pack", "tasks", "expected"), RETURNED)
def test_the_error_names_what_is_returned_instead_of_the_losses(
    pack: Any, tasks: Any, expected: list[str], callback: Any, quiet_trainer: MakeTrainer
) -> None:
    if callback == "FixedWeights":
        balancing = FixedWeights(dict.fromkeys(tasks, 1.0), tasks=tasks, losses_from="criterion")
    else:
        balancing = GradNorm(tasks, losses_from="criterion")
    fails(quiet_trainer, Hidden(pack), balancing, f"{type(balancing).__name__}: ", *expected)


# places that are not called ---------------------------------------------------------------------------------------------


def without_gradients(model: Any, losses: Losses) -> Tensor:
    with torch.no_grad():
        model.criterion({task: loss * 1 for task, loss in losses.items()})
    return total(losses)


def by_its_forward(model: Any, losses: Losses) -> Tensor:
    return total(model.criterion.forward(losses))


def beside_the_total(model: Any, losses: Losses) -> Tensor:
    model.criterion({task: 2 * loss for task, loss in losses.items()})
    return total(losses)


NOT_CALLED = [
    case("it is another that is called", "unused", None, ["no loss came from 'unused'", "what training_step calls"]),
    case("it only contains what is called", "nested", None, ["no loss came from 'nested'", "what training_step calls"]),
    case("its forward is called", "criterion", by_its_forward, ["from 'criterion'", "itself, not its forward"]),
    case("it is called without gradients", "criterion", without_gradients, ["'criterion'", "'seg'", "torch.no_grad()"]),
    case("what it returns is not added up", "criterion", beside_the_total, ["'seg'", "took no part", "Add it to"]),
]


@pytest.mark.parametrize(("path", "step", "expected"), NOT_CALLED)
def test_a_place_that_gives_no_loss_is_named(
    path: str, step: Any, expected: list[str], quiet_trainer: MakeTrainer
) -> None:
    fails(quiet_trainer, Hidden(step=step), GradNorm(TASKS, losses_from=path), "GradNorm: ", *expected)


def test_the_monitor_raises_the_same_error(quiet_trainer: MakeTrainer) -> None:
    monitor = GradientNormMonitor(TASKS, losses_from="criterio", every_n_steps=1)
    fails(quiet_trainer, Hidden(), monitor, "GradientNormMonitor: losses_from 'criterio'", "did you mean 'criterion'?")
    monitor = GradientNormMonitor(TASKS, losses_from="unused", every_n_steps=1)
    with pytest.warns(UserWarning, match="GradientNormMonitor: no loss came from 'unused' in the measured steps"):
        quiet_trainer(callbacks=[monitor]).fit(Hidden(), Batches(vector_batches(3, 2)))


def test_our_own_module_shows_its_losses_itself(quiet_trainer: MakeTrainer) -> None:
    batches = as_inputs_and_targets(vector_batches(3, 2))
    expected = "MultiTaskModule shows the losses of its tasks itself. Leave it out"
    fails(
        quiet_trainer,
        multi_task_module(3),
        GradNorm(TASKS, losses_from="encoder"),
        "GradNorm: losses_from",
        expected,
        batches=batches,
    )
