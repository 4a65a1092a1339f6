"""Wrong arguments and names get an error that names the culprit, what was expected and what was found.

Each row of a table is one mistake of a user, as a sentence, with the required parts of the message; the model does not
change. Wrong losses are in `test_wrong_losses.py`, the mistakes around a `MultiTaskModule` in
`tests/multitask/test_module_wrong_inputs.py`.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, Recorder, assert_says, case
from models import (
    FEATURES,
    HIDDEN,
    Automatic,
    OnlyLogs,
    vector_batches,
)
from torch import nn
from wrong_inputs import HEADS, LOGGED, ONES, TASKS, Losses, MakeTrainer, fails

from lightning_gradnorm import FixedWeights, GradNorm

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
    case("initial losses are empty", {"initial_losses": {}}, ["initial_losses", "for some tasks or all; got {}"]),
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
    case("no tasks", [], ["two", "[]"]),
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
        ["'seg'", "'depth'", "swapped?"],
    ),
    case(
        "three heads are rotated",
        {"heads": {"seg": "depth_head", "depth": "normal_head", "normal": "seg_head"}},
        ["'seg'", "'normal'", "swapped?"],
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
    """Heads of two layers each; one container also holds two of the heads."""

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


class FrozenInPart(Automatic):
    """Its shared layer is recurrent, and only its input weights are trained."""

    def build(self) -> None:
        super().build()
        self.encoder = nn.RNN(5, FEATURES)
        self.encoder.weight_hh_l0.requires_grad_(False)

    def task_losses(self, batch: Any) -> Losses:
        z, _ = self.encoder(batch["x"])
        return {task: (self.get_submodule(f"{task}_head")(z) - batch[task]).square().mean() for task in self.tasks}


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
    case("an encoder without weights", WithoutWeights, {}, ["shared_layer=None", "share no trained", "Scalarization"]),
    case(
        "a layer that is frozen in part, and named",
        FrozenInPart,
        {"shared_layer": "encoder"},
        ["shared_layer 'encoder' is frozen in part", "(encoder.weight_hh_l0 should", "requires_grad=True", "Name"],
    ),
    case(
        "a task beside the encoder",
        Apart,
        {},
        ["shared_layer=None", "'depth'", "shares no trained", "Leave it out of tasks"],
    ),
    case("a task beside the layer named", Apart, {"shared_layer": "encoder.2"}, ["'depth'", "the shared layer"]),
    case("a task beside the representation", Apart, {"norm_of": "activation"}, ["'depth'", "'encoder'"]),
]


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
@pytest.mark.parametrize(("model", "options", "expected"), MODELS)
def test_the_error_explains_why_a_model_cannot_be_balanced(
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


@pytest.mark.parametrize("shared_layer", ["trunk.2", "trunk", None])
def test_an_encoder_may_have_any_name(shared_layer: str | None, quiet_trainer: MakeTrainer) -> None:
    gradnorm = GradNorm(TASKS, shared_layer=shared_layer)
    quiet_trainer(callbacks=[gradnorm]).fit(WithoutEncoder(3), Batches(vector_batches(3, 2)))
    named = GradNorm(TASKS)
    quiet_trainer(callbacks=[named]).fit(Automatic(3), Batches(vector_batches(3, 2)))
    assert gradnorm.weights == named.weights != ONES


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
    fails(quiet_trainer, ReplacesLater(3), callback, "GradNorm", "ReplacesLater had when training began", "replaced")


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_a_step_that_leaves_the_shared_layer_out_leaves_the_weights(heads: bool, quiet_trainer: MakeTrainer) -> None:
    callback = GradNorm(TASKS, shared_layer="encoder.2", heads=HEADS if heads else None)
    recorder = Recorder(callback)
    quiet_trainer(callbacks=[callback, recorder]).fit(LeavesOut(3), Batches(vector_batches(3, 4)))
    first, left_out, third, left_out_again = recorder.weights
    assert first == left_out != third
    assert third == left_out_again


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
def test_fixed_weights_report_misspelled_names(
    callback: L.Callback, expected: list[str], quiet_trainer: MakeTrainer
) -> None:
    fails(quiet_trainer, OnlyLogs(3) if "logged" in str(expected) else Automatic(3), callback, *expected)
