"""Wrong input gets an error that names the culprit, what was expected and what was found; the model is left as it was.

Each row of a table is one mistake that a user makes, in a sentence, with what has to be in the message. The mistakes around
a `MultiTaskModule` are in `tests/multitask/test_module_wrong_inputs.py`.
"""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, assert_clean, assert_says, case, traces
from models import (
    FEATURES,
    HIDDEN,
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
from torch import Tensor, nn

from lightning_gradnorm import FixedWeights, GradNorm

MakeTrainer = Callable[..., L.Trainer]
Losses = dict[str, Tensor]
TASKS = ["seg", "depth", "normal"]
HEADS = {task: f"{task}_head" for task in TASKS}
ONES = dict.fromkeys(TASKS, 1.0)
LOGGED = {task: f"train/{task}_loss" for task in TASKS}


def fails(
    trainer: MakeTrainer,
    model: L.LightningModule,
    callback: L.Callback | list[L.Callback],
    *expected: str,
    batches: list[Any] | None = None,
    error: type[Exception] | tuple[type[Exception], ...] = (ValueError, TypeError),
    **options: Any,
) -> None:
    """Fit, and check that it fails with a message holding all of `expected` and leaves nothing on the model."""
    callbacks = callback if isinstance(callback, list) else [callback]
    before = traces(model)
    with pytest.raises(error) as raised:
        trainer(callbacks=callbacks, **options).fit(model, Batches(batches or vector_batches(3, 4)))
    assert_says(raised.value, *expected)
    assert_clean(model, before)


# arguments, refused when the callback is made ------------------------------------------------------------------------

ARGUMENTS = [
    case("alpha is negative", {"alpha": -0.1}, ["alpha", "at least 0", "-0.1"]),
    case("alpha is NaN", {"alpha": math.nan}, ["alpha", "finite", "nan"]),
    case("alpha is infinite", {"alpha": math.inf}, ["alpha", "finite", "inf"]),
    case("alpha is a string, as from a command line", {"alpha": "1.5"}, ["alpha", "number", "'1.5'"]),
    case("alpha is None", {"alpha": None}, ["alpha", "number", "None"]),
    case("alpha is a tensor", {"alpha": torch.tensor(1.5)}, ["alpha", "number", "tensor(1.5"]),
    case("an initial weight is zero", {"initial_weights": {**ONES, "depth": 0.0}}, ["initial_weights", "depth", "0.0"]),
    case("an initial weight is negative", {"initial_weights": {**ONES, "depth": -2.0}}, ["initial_weights", "-2.0"]),
    case("an initial weight is NaN", {"initial_weights": {**ONES, "depth": math.nan}}, ["initial_weights", "nan"]),
    case(
        "initial weights are of a misspelt task",
        {"initial_weights": {"seg": 1.0, "dept": 1.0, "normal": 1.0}},
        ["initial_weights", "'dept'", "did you mean 'depth'"],
    ),
    case("initial weights lack a task", {"initial_weights": {"seg": 1.0, "depth": 1.0}}, ["initial_weights", "normal"]),
    case("initial weights are a list", {"initial_weights": [1, 1, 1]}, ["initial_weights", "mapping", "[1, 1, 1]"]),
    case("a priority is zero", {"priorities": {**ONES, "depth": 0.0}}, ["priorities", "depth", "positive", "0.0"]),
    case("a priority is negative", {"priorities": {**ONES, "depth": -1.0}}, ["priorities", "depth", "-1.0"]),
    case("a priority is a string", {"priorities": {**ONES, "depth": "2"}}, ["priorities", "depth", "'2'"]),
    case(
        "priorities are of a misspelt task",
        {"priorities": {"seg": 1.0, "dpth": 1.0, "normal": 1.0}},
        ["priorities", "'dpth'", "did you mean 'depth'"],
    ),
    case("priorities are a list", {"priorities": [2, 1, 1]}, ["priorities", "mapping", "[2, 1, 1]"]),
    case("initial_losses is zero updates", {"initial_losses": 0}, ["initial_losses", "at least 1", "0"]),
    case("initial_losses is a negative number of updates", {"initial_losses": -3}, ["initial_losses", "-3"]),
    case("initial_losses is one loss for all tasks", {"initial_losses": 2.3}, ["initial_losses", "mapping", "2.3"]),
    case("initial_losses is a list", {"initial_losses": [1.0, 1.0, 1.0]}, ["initial_losses", "mapping", "[1.0"]),
    case("an initial loss is zero", {"initial_losses": {**ONES, "depth": 0.0}}, ["initial_losses", "depth", "0.0"]),
    case("an initial loss is negative", {"initial_losses": {**ONES, "depth": -1.0}}, ["initial_losses", "depth", "-1"]),
    case("an initial loss is NaN", {"initial_losses": {**ONES, "depth": math.nan}}, ["initial_losses", "depth", "nan"]),
    case(
        "initial losses are of a misspelt task",
        {"initial_losses": {"seg": 1.0, "depth": 1.0, "norml": 1.0}},
        ["initial_losses", "'norml'", "did you mean 'normal'"],
    ),
    case("initial losses lack a task", {"initial_losses": {"seg": 1.0}}, ["initial_losses", "['depth', 'normal']"]),
    case("min_weight is negative", {"min_weight": -1e-4}, ["min_weight", "between 0 and 1", "-0.0001"]),
    case("min_weight is zero", {"min_weight": 0.0}, ["min_weight", "between 0 and 1", "0.0"]),
    case("min_weight is above one", {"min_weight": 1.5}, ["min_weight", "1.5"]),
    case("min_weight is NaN", {"min_weight": math.nan}, ["min_weight", "nan"]),
    case("min_weight is a string", {"min_weight": "small"}, ["min_weight", "number", "'small'"]),
    case("update_every is zero", {"update_every": 0}, ["update_every", "at least 1", "0"]),
    case("update_every is negative", {"update_every": -2}, ["update_every", "-2"]),
    case("update_every is a fraction", {"update_every": 1.5}, ["update_every", "integer", "1.5"]),
    case("stop_after is negative", {"stop_after": -1}, ["stop_after", "at least 0", "-1"]),
    case("stop_after is a fraction of the training", {"stop_after": 0.5}, ["stop_after", "integer", "0.5"]),
    case("norm_of is misspelt", {"norm_of": "weights"}, ["norm_of", "'weight' or 'activation'", "'weights'"]),
    case("optimizer is a name", {"optimizer": "adam"}, ["optimizer", "partial(torch.optim.Adam, lr=0.025)", "'adam'"]),
    case(
        "optimizer is already made, over the network",
        {"optimizer": torch.optim.Adam(nn.Linear(1, 1).parameters())},
        ["optimizer", "partial(torch.optim.Adam, lr=0.025)", "Adam(…)"],
    ),
    case("shared_layer is the module itself", {"shared_layer": nn.Linear(2, 2)}, ["shared_layer", "name", "Linear("]),
    case("representation is the module itself", {"representation": nn.Linear(2, 2)}, ["representation", "name"]),
    case(
        "heads are a list in the order of the tasks",
        {"heads": ["seg_head", "depth_head", "normal_head"]},
        ["heads", "mapping from task", "['seg_head'"],
    ),
    case("heads are the modules themselves", {"heads": dict.fromkeys(TASKS, nn.Identity())}, ["heads", "name of its"]),
    case(
        "heads are of a misspelt task",
        {"heads": {"seg": "seg_head", "dept": "depth_head", "normal": "normal_head"}},
        ["heads", "'dept'", "did you mean 'depth'"],
    ),
    case("heads lack a task", {"heads": {"seg": "seg_head", "depth": "depth_head"}}, ["heads", "every task", "normal"]),
    case("heads are empty", {"heads": {}}, ["heads", "every task", "'seg', 'depth', 'normal'"]),
]


@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS)
def test_a_wrong_argument_is_named_with_its_value(arguments: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        GradNorm(TASKS, **arguments)
    assert_says(raised.value, "GradNorm", *expected)


TASK_NAMES = [
    case("one is 'loss', the sum of all", ["loss", "seg", "depth"], ["'loss'", "back-propagated"]),
    case("there is none", [], ["two", "[]"]),
    case("there is one", ["seg"], ["two", "['seg']"]),
    case("there is one, by its logged name", {"seg": "train/seg_loss"}, ["two", "['seg']"]),
    case("one is named twice", ["seg", "depth", "seg"], ["different", "['seg', 'depth', 'seg']"]),
    case("two have the same logged name", {"seg": "train/loss", "depth": "train/loss"}, ["different", "train/loss"]),
    case("it is one string, for the comma was forgotten", ("seg"), ["list of names", "'seg'"]),
    case("it is a set, which has no order", {"seg", "depth"}, ["list of names", "'seg'"]),
    case("they are numbers", [0, 1], ["list of names", "[0, 1]"]),
    case("they are the heads' modules", [nn.Identity(), nn.Identity()], ["list of names", "Identity()"]),
]


@pytest.mark.parametrize(("tasks", "expected"), TASK_NAMES)
def test_tasks_are_at_least_two_different_names(tasks: Any, expected: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        GradNorm(tasks)
    assert_says(raised.value, "GradNorm: tasks", *expected)


# names and factories, refused when training starts -------------------------------------------------------------------


def optimizer_of_other_parameters(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam([nn.Parameter(torch.ones(3))])


def no_optimizer(parameters: Any) -> None:
    return None


AT_THE_START = [
    case("a task is misspelt", {"tasks": ["seg", "dept"]}, ["'dept'", "seg", "normal", "did you mean 'depth'"]),
    case(
        "tasks of a module that declares none are left out",
        {"tasks": None},
        ["tasks=None", "Automatic", "tasks=['seg', 'depth']"],
    ),
    case("the shared layer is misspelt", {"shared_layer": "encodr.2"}, ["shared_layer", "did you mean 'encoder.2'"]),
    case("the shared parameter is misspelt", {"shared_layer": "encoder.2.wieght"}, ["did you mean 'encoder.2.weight'"]),
    case("the shared layer is empty", {"shared_layer": ""}, ["shared_layer ''", "'encoder.2'"]),
    case("the shared layer has no weights", {"shared_layer": "encoder.1"}, ["Tanh", "no parameters", "'encoder.2'"]),
    case(
        "the shared layer is one task's head", {"shared_layer": "seg_head"}, ["'depth'", "layer that all tasks share"]
    ),
    case(
        "the shared layer is one task's head, with heads",
        {"shared_layer": "seg_head", "heads": HEADS},
        ["'seg_head'", "layer that all tasks share"],
    ),
    case("a head is misspelt", {"heads": {**HEADS, "seg": "seg_haed"}}, ["heads['seg']", "did you mean 'seg_head'"]),
    case(
        "two tasks have one head",
        {"heads": {**HEADS, "depth": "seg_head"}},
        ["'seg_head'", "'seg' and 'depth'", "Leave heads out"],
    ),
    case("a head is the encoder", {"heads": {**HEADS, "depth": "encoder"}}, ["'depth'", "its head", "Leave heads out"]),
    case(
        "a head is a layer of the encoder", {"heads": {**HEADS, "depth": "encoder.2"}}, ["'depth'", "Leave heads out"]
    ),
    case(
        "two heads are exchanged",
        {"heads": {**HEADS, "seg": "depth_head", "depth": "seg_head"}},
        ["'seg'", "'depth'", "exchanged?"],
    ),
    case(
        "three heads are rotated",
        {"heads": {"seg": "depth_head", "depth": "normal_head", "normal": "seg_head"}},
        ["'seg'", "'normal'", "exchanged?"],
    ),
    case(
        "the representation is misspelt",
        {"representation": "encodr", "norm_of": "activation"},
        ["representation 'encodr'", "did you mean 'encoder'"],
    ),
    case(
        "the representation is misspelt, though norm_of='weight' does not read it",
        {"representation": "encodr"},
        ["representation 'encodr'", "did you mean 'encoder'"],
    ),
    case("optimizer returns nothing", {"optimizer": no_optimizer}, ["optimizer", "it returned NoneType"]),
    case(
        "optimizer is made over other parameters, so that the weights would stay",
        {"optimizer": optimizer_of_other_parameters},
        ["optimizer", "other parameters"],
    ),
    case(
        "optimizer has an option that does not exist",
        {"optimizer": partial(torch.optim.Adam, learning_rate=0.1)},
        ["optimizer", "learning_rate"],
    ),
    case("optimizer needs a closure", {"optimizer": torch.optim.LBFGS}, ["optimizer", "LBFGS"]),
]


@pytest.mark.parametrize(("arguments", "expected"), AT_THE_START)
def test_a_name_that_the_model_lacks_or_a_useless_factory_is_an_error(
    arguments: dict[str, Any], expected: list[str], quiet_trainer: MakeTrainer
) -> None:
    fails(quiet_trainer, Automatic(3), GradNorm(**{"tasks": TASKS, **arguments}), "GradNorm", *expected)


class TwoLayers(Automatic):
    """Heads of two layers, two of which are also held in one container."""

    def build(self) -> None:
        super().build()
        for task in self.tasks:
            setattr(self, f"{task}_head", nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)))
        self.both = nn.ModuleDict({"depth": self.depth_head, "normal": self.normal_head})


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        case("the container of two heads", "both", ["'depth'", "its head", "Leave heads out"]),
        case("a part of another task's head", "seg_head.2", ["'depth'", "its head", "Leave heads out"]),
        case("another task's head under its second name", "both.normal", ["'both.normal'", "'normal' and 'depth'"]),
    ],
)
def test_a_head_is_the_module_that_its_task_alone_runs_through(
    head: str, expected: list[str], quiet_trainer: MakeTrainer
) -> None:
    heads = {"normal": "normal_head", "seg": "seg_head", "depth": head}
    fails(quiet_trainer, TwoLayers(3), GradNorm(["normal", "seg", "depth"], heads=heads), "GradNorm", *expected)


class WithoutEncoder(Automatic):
    """Calls its trunk by another name."""

    def build(self) -> None:
        super().build()
        self.trunk = self.encoder
        del self.encoder

    def task_losses(self, batch: Any) -> Losses:
        z = self.trunk(batch["x"])
        return {t: (getattr(self, f"{t}_head")(z) - batch[t]).square().mean() for t in self.tasks}


class WithoutWeights(Automatic):
    """Has an encoder with nothing to learn."""

    def build(self) -> None:
        super().build()
        self.encoder = nn.Sequential(nn.Identity())
        for task in self.tasks:
            setattr(self, f"{task}_head", nn.Linear(5, 3))


class Frozen(Automatic):
    """Is fine-tuned at its heads alone."""

    def build(self) -> None:
        super().build()
        self.encoder.requires_grad_(False)


class Apart(Automatic):
    """`depth` reads the inputs, not the encoder."""

    def build(self) -> None:
        super().build()
        self.depth_head = nn.Linear(5, 3)

    def task_losses(self, batch: Any) -> Losses:
        losses = {}
        z = self.encoder(batch["x"])
        for task in self.tasks:
            prediction = self.depth_head(batch["x"]) if task == "depth" else getattr(self, f"{task}_head")(z)
            losses[task] = (prediction - batch[task]).square().mean()
        return losses


class Auxiliary(Automatic):
    """The loss of `seg` has that of `depth` in it, while `depth` is a task too."""

    def task_losses(self, batch: Any) -> Losses:
        losses = super().task_losses(batch)
        return {**losses, "seg": losses["seg"] + 0.1 * losses["depth"]}


MODELS = [
    case("no encoder", WithoutEncoder, {}, ["shared_layer=None", "'encoder'", "Name the last layer"]),
    case("an encoder without weights", WithoutWeights, {}, ["shared_layer=None", "Name the last layer"]),
    case("an encoder that is frozen", Frozen, {}, ["shared_layer 'encoder.2'", "requires_grad=True", "Name"]),
    case("a task beside the encoder", Apart, {}, ["'depth'", "the shared layer"]),
    case("a task beside the representation", Apart, {"norm_of": "activation"}, ["'depth'", "'encoder'"]),
]


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
@pytest.mark.parametrize(("model", "options", "expected"), MODELS)
def test_a_model_that_cannot_be_balanced_is_told_why(
    model: Any, options: dict[str, Any], expected: list[str], heads: bool, quiet_trainer: MakeTrainer
) -> None:
    fails(quiet_trainer, model(3), GradNorm(TASKS, heads=HEADS if heads else None, **options), "GradNorm", *expected)


@pytest.mark.parametrize(
    "heads",
    [
        case("with heads", HEADS),
        case("without", None),
    ],
)
def test_a_task_inside_the_loss_of_another_is_an_error(
    heads: dict[str, str] | None, quiet_trainer: MakeTrainer
) -> None:
    fails(quiet_trainer, Auxiliary(3), GradNorm(TASKS, heads=heads), "GradNorm", "'seg'", "'depth'")


def test_without_an_encoder_naming_the_shared_layer_is_enough(quiet_trainer: MakeTrainer) -> None:
    gradnorm = GradNorm(TASKS, shared_layer="trunk.2")
    quiet_trainer(callbacks=[gradnorm]).fit(WithoutEncoder(3), Batches(vector_batches(3, 2)))
    assert gradnorm.weights != ONES


def test_a_layer_that_a_module_holds_under_two_names_is_found_by_either(quiet_trainer: MakeTrainer) -> None:
    class TwoNames(Automatic):
        def build(self) -> None:
            super().build()
            self.last = self.encoder[2]

    found = []
    for name in ("encoder.2", "last"):
        gradnorm = GradNorm(TASKS, shared_layer=name)
        quiet_trainer(callbacks=[gradnorm]).fit(TwoNames(3), Batches(vector_batches(3, 4)))
        found.append(gradnorm.weights)
    assert found[0] == found[1] != ONES


def test_losses_that_are_parts_of_one_tensor_are_not_one_in_another(quiet_trainer: MakeTrainer) -> None:
    """What looks for a loss inside another has to tell the outputs of one node apart."""

    class Unbound(Automatic):
        def task_losses(self, batch: Any) -> Losses:
            losses = super().task_losses(batch)
            return dict(zip(losses, torch.stack(list(losses.values())).unbind(), strict=True))

    found = []
    for model in (Automatic(3), Unbound(3)):
        gradnorm = GradNorm(TASKS)
        quiet_trainer(callbacks=[gradnorm]).fit(model, Batches(vector_batches(3, 4)))
        found.append(gradnorm.weights)
    assert found[1] == pytest.approx(found[0], abs=1e-12)


class FreezesLater(Automatic):
    """Freezes the shared layer, or the whole encoder, at the third batch."""

    def __init__(self, frozen: str) -> None:
        super().__init__(3)
        self.frozen = frozen

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.get_submodule(self.frozen).requires_grad_(batch_idx < 2)


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
@pytest.mark.parametrize("frozen", ["encoder.2", "encoder"])
def test_a_shared_layer_frozen_later_is_named(frozen: str, heads: bool, quiet_trainer: MakeTrainer) -> None:
    callback = GradNorm(TASKS, heads=HEADS if heads else None)
    fails(
        quiet_trainer,
        FreezesLater(frozen),
        callback,
        "GradNorm",
        "shared layer",
        error=(ValueError, TypeError, RuntimeError),
    )


class ReplacesLater(Automatic):
    """Has another shared layer from the third batch on, as a network that is grown or quantized has."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.encoder[2] = nn.Linear(HIDDEN, FEATURES, dtype=torch.float64)


class LeavesOut(Automatic):
    """Passes by the shared layer in every other batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        layer = self.encoder[2]
        own = functools.partial(type(layer).forward, layer)
        layer.forward = (lambda z: z[..., :FEATURES]) if batch_idx % 2 else own


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_a_shared_layer_that_is_replaced_later_is_an_error(heads: bool, quiet_trainer: MakeTrainer) -> None:
    callback = GradNorm(TASKS, shared_layer="encoder.2", heads=HEADS if heads else None)
    fails(
        quiet_trainer, ReplacesLater(3), callback, "GradNorm", "ReplacesLater had when the training began", "replaced"
    )


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_a_shared_layer_that_is_left_out_of_a_step_has_norms_of_0(heads: bool, quiet_trainer: MakeTrainer) -> None:
    callback = GradNorm(TASKS, shared_layer="encoder.2", heads=HEADS if heads else None)
    found = []

    class Looks(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert callback.rule.last is not None
            found.append(callback.rule.last.norms.any().item())

    quiet_trainer(callbacks=[callback, Looks()]).fit(LeavesOut(3), Batches(vector_batches(3, 4)))
    assert found == [True, False, True, False]


# losses that training_step returns -----------------------------------------------------------------------------------


class Spoilt(Automatic):
    """Returns what it should not."""

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
    case("a vector, not reduced", partial(with_depth, as_vector), ["'depth'", "scalar", "(3,)", ".mean()"]),
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


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_a_first_loss_of_zero_gives_no_training_rate(heads: bool, quiet_trainer: MakeTrainer) -> None:
    model, batches = Automatic(3), vector_batches(3, 4)
    with torch.no_grad():
        batches[0]["depth"] = model.depth_head(model.encoder(batches[0]["x"]))
    callback = GradNorm(TASKS, heads=model.heads() if heads else None)
    fails(quiet_trainer, model, callback, "GradNorm", "'depth'", "initial_losses", "alpha=0", batches=batches)


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


def with_a_step_past_lightning(model: Stepwise, losses: Losses, batch_idx: int) -> None:
    optimizer = model.optimizers().optimizer
    optimizer.zero_grad()
    model.watch(losses)
    model.manual_backward(total(losses))
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
    case("but the optimizer steps past Lightning", with_a_step_past_lightning, ["step", "self.optimizers()"]),
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


# other callbacks, strategies, checkpoints ----------------------------------------------------------------------------


def test_two_gradnorms_are_refused(quiet_trainer: MakeTrainer) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `GradNorm`"):
        quiet_trainer(callbacks=[GradNorm(TASKS), GradNorm(TASKS)])


class MyGradNorm(GradNorm):
    """A subclass of the user's."""


@pytest.mark.parametrize("other", [MyGradNorm(TASKS), FixedWeights(ONES)])
def test_two_balancing_callbacks_are_refused(other: L.Callback, quiet_trainer: MakeTrainer) -> None:
    expected = ["one balancing callback", "GradNorm", type(other).__name__, "Remove one"]
    fails(quiet_trainer, Automatic(3), [GradNorm(TASKS), other], *expected)


def test_before_training_the_tasks_of_a_module_are_not_known() -> None:
    with pytest.raises(RuntimeError, match="GradNorm: the tasks of the MultiTaskModule are known once training"):
        _ = GradNorm().weights


def checkpoint_of(trainer: MakeTrainer, folder: Path, *callbacks: L.Callback) -> Path:
    one = trainer(callbacks=list(callbacks))
    one.fit(Automatic(3), Batches(vector_batches(3, 4)))
    one.save_checkpoint(folder / "one.ckpt")
    return folder / "one.ckpt"


def resume(trainer: MakeTrainer, path: Path, *callbacks: L.Callback) -> None:
    trainer(callbacks=list(callbacks), max_epochs=2).fit(Automatic(3), Batches(vector_batches(3, 4)), ckpt_path=path)


@pytest.mark.parametrize("saved_by", [(), (FixedWeights(ONES),)], ids=["plain training", "FixedWeights"])
def test_a_checkpoint_without_state_of_gradnorm_is_gone_on_from_with_a_warning(
    saved_by: tuple[L.Callback, ...], quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    path, gradnorm = checkpoint_of(quiet_trainer, tmp_path, *saved_by), GradNorm(TASKS)
    with pytest.warns(UserWarning, match=r"GradNorm: the checkpoint .*one.ckpt has no state of GradNorm.*anew"):
        resume(quiet_trainer, path, gradnorm)
    assert gradnorm.weights != ONES


def test_a_checkpoint_of_gradnorm_gone_on_from_without_it_is_warned_of(
    quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    path = checkpoint_of(quiet_trainer, tmp_path, GradNorm(TASKS))
    with pytest.warns(UserWarning, match=r"callbacks used to create the checkpoint need to be provided.*GradNorm"):
        resume(quiet_trainer, path, FixedWeights(ONES))


def test_resuming_with_other_tasks_lists_both(quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = checkpoint_of(quiet_trainer, tmp_path, GradNorm(TASKS))
    with pytest.raises(ValueError, match=r"GradNorm: .*\['depth', 'normal', 'seg'\].*\['depth', 'seg'\].*same tasks"):
        resume(quiet_trainer, path, GradNorm(["seg", "depth"]))


def test_resuming_from_a_state_of_another_version_is_an_error(quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = checkpoint_of(quiet_trainer, tmp_path, GradNorm(TASKS))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["GradNorm"]["version"] = 99
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"GradNorm: .*version 1; got 99"):
        resume(quiet_trainer, path, GradNorm(TASKS))


def test_resuming_with_another_kind_of_weight_optimizer_is_an_error(quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = checkpoint_of(quiet_trainer, tmp_path, GradNorm(TASKS))
    with pytest.raises(ValueError, match=r"GradNorm: .*'betas'.*SGD"):
        resume(quiet_trainer, path, GradNorm(TASKS, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9)))


# FixedWeights --------------------------------------------------------------------------------------------------------

FIXED = [
    case("a list", {"weights": [1.0, 2.0]}, ["weights", "mapping", "[1.0, 2.0]"]),
    case("numbered, not named", {"weights": {0: 1.0, 1: 2.0}}, ["weights", "name", "{0: 1.0"]),
    case("of one task", {"weights": {"seg": 1.0}}, ["two", "['seg']"]),
    case("zero", {"weights": {"seg": 1.0, "depth": 0}}, ["weights['depth']", "positive", "0"]),
    case("negative", {"weights": {"seg": 1.0, "depth": -1.0}}, ["weights['depth']", "positive", "-1.0"]),
    case("NaN", {"weights": {"seg": 1.0, "depth": math.nan}}, ["weights['depth']", "finite", "nan"]),
    case("a string", {"weights": {"seg": 1.0, "depth": "2"}}, ["weights['depth']", "'2'"]),
    case("a tensor", {"weights": {"seg": 1.0, "depth": torch.tensor(2.0)}}, ["weights['depth']", "tensor(2.)"]),
    case("lacking one of the tasks", {"weights": {"seg": 1.0, "depth": 2.0}, "tasks": TASKS}, ["weights", "normal"]),
    case(
        "of a task that is not among the tasks",
        {"weights": {"seg": 1.0, "dept": 2.0}, "tasks": ["seg", "depth"]},
        ["weights", "'dept'", "did you mean 'depth'"],
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), FIXED)
def test_fixed_weights_are_positive_numbers_by_task(arguments: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        FixedWeights(**arguments)
    assert_says(raised.value, "FixedWeights", *expected)


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        case("a task", FixedWeights({"seg": 1.0, "dept": 1.0}), ["'dept'", "did you mean 'depth'"]),
        case("a head", FixedWeights(ONES, heads={**HEADS, "seg": "seg_haed"}), ["'seg_haed'", "'seg_head'"]),
        case("a logged name", FixedWeights(ONES, tasks={**LOGGED, "seg": "train/sg_loss"}), ["'train/sg_loss'"]),
    ],
)
def test_fixed_weights_tell_what_is_misspelt(
    callback: L.Callback, expected: list[str], quiet_trainer: MakeTrainer
) -> None:
    fails(quiet_trainer, OnlyLogs(3) if "logged" in str(expected) else Automatic(3), callback, *expected)


# nothing stays on the model ------------------------------------------------------------------------------------------


class Explodes(L.Callback):
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a user's bug")


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
