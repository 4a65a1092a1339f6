"""Wrong input gets an error that names the culprit, what was expected and what was found; the model is left as it was."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
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
from torch import Tensor

from lightning_gradnorm import FixedWeights, GradNorm

MakeTrainer = Callable[..., L.Trainer]
TASKS = ["seg", "depth", "normal"]


def fails(
    trainer: MakeTrainer,
    model: L.LightningModule,
    callback: L.Callback,
    *expected: str,
    batches: list[Any] | None = None,
    error: type[Exception] | tuple[type[Exception], ...] = (ValueError, TypeError),
    **options: Any,
) -> str:
    """Fit, and check that it fails with a message holding all of `expected` and leaves nothing on the model."""
    if isinstance(model, Manual):
        model.gradnorm = [callback] if isinstance(callback, GradNorm) and model.gradnorm else []
    before = traces(model)
    with pytest.raises(error) as raised:
        trainer(callbacks=[callback], **options).fit(model, Batches(batches or vector_batches(3, 4)))
    message = str(raised.value)
    for part in expected:
        assert part in message, f"{part!r} is not in the message: {message}"
    assert_clean(model, before)
    return message


# arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"alpha": -0.1}, ["alpha", "-0.1"]),
        ({"alpha": math.nan}, ["alpha", "nan"]),
        ({"alpha": math.inf}, ["alpha", "inf"]),
        ({"initial_weights": {"seg": 1.0, "depth": 0.0, "normal": 1.0}}, ["initial_weights", "depth", "0.0"]),
        ({"initial_weights": {"seg": 1.0, "depth": -2.0, "normal": 1.0}}, ["initial_weights", "depth", "-2.0"]),
        ({"initial_weights": {"seg": 1.0, "depth": math.nan, "normal": 1.0}}, ["initial_weights", "depth", "nan"]),
        ({"initial_weights": {"seg": 1.0, "dept": 1.0, "normal": 1.0}}, ["initial_weights", "dept", "depth"]),
        ({"priorities": {"seg": 1.0, "depth": 0.0, "normal": 1.0}}, ["priorities", "depth", "0.0"]),
        ({"priorities": {"seg": 1.0, "depth": -1.0, "normal": 1.0}}, ["priorities", "depth", "-1.0"]),
        ({"priorities": {"seg": 1.0, "dpth": 1.0, "normal": 1.0}}, ["priorities", "dpth", "depth"]),
        ({"initial_losses": 0}, ["initial_losses", "0"]),
        ({"initial_losses": -3}, ["initial_losses", "-3"]),
        ({"initial_losses": {"seg": 1.0, "depth": 0.0, "normal": 1.0}}, ["initial_losses", "depth", "0.0"]),
        ({"initial_losses": {"seg": 1.0, "depth": 1.0, "norml": 1.0}}, ["initial_losses", "norml", "normal"]),
        ({"min_weight": -1e-4}, ["min_weight", "-0.0001"]),
        ({"min_weight": 0.0}, ["min_weight", "0.0"]),
        ({"min_weight": 1.5}, ["min_weight", "1.5"]),
        ({"min_weight": math.nan}, ["min_weight", "nan"]),
        ({"update_every": 0}, ["update_every", "0"]),
        ({"update_every": -2}, ["update_every", "-2"]),
        ({"stop_after": -1}, ["stop_after", "-1"]),
        ({"norm_of": "weights"}, ["norm_of", "weights", "activation"]),
        ({"heads": {"seg": "seg_head", "dept": "depth_head", "normal": "normal_head"}}, ["heads", "dept", "depth"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range_are_named_with_their_value(arguments: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        GradNorm(TASKS, **arguments)
    for part in ["GradNorm", *expected]:
        assert part in str(raised.value), f"{part!r} is not in the message: {raised.value}"


@pytest.mark.parametrize("tasks", [[], ["seg"], {"seg": "train/seg_loss"}])
def test_fewer_than_two_tasks_cannot_be_balanced(tasks: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"GradNorm.*two"):
        GradNorm(tasks)


def test_a_task_named_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="seg"):
        GradNorm(["seg", "depth", "seg"])


def test_one_string_is_not_a_list_of_tasks() -> None:
    with pytest.raises((ValueError, TypeError), match="tasks"):
        GradNorm("seg")


# names ---------------------------------------------------------------------------------------------------------------


def test_an_unknown_task_lists_the_keys_and_suggests_the_nearest(quiet_trainer: MakeTrainer) -> None:
    message = fails(quiet_trainer, Automatic(3), GradNorm(["seg", "dept"]), "GradNorm", "'dept'", "seg", "normal")
    assert "did you mean 'depth'" in message


def test_an_unknown_logged_name_lists_what_was_logged(quiet_trainer: MakeTrainer) -> None:
    callback = GradNorm({"seg": "train/seg_loss", "depth": "train/dept_loss"})
    fails(quiet_trainer, OnlyLogs(3), callback, "GradNorm", "train/dept_loss", "train/depth_loss")


def test_an_unknown_shared_layer_suggests_the_nearest(quiet_trainer: MakeTrainer) -> None:
    model = Nested(3)
    callback = GradNorm(TASKS, shared_layer="encoder.topp")
    fails(
        quiet_trainer,
        model,
        callback,
        "GradNorm: shared_layer 'encoder.topp' is not in Nested; did you mean 'encoder.top'?",
    )


def test_an_unknown_parameter_as_shared_layer_is_an_error(quiet_trainer: MakeTrainer) -> None:
    fails(
        quiet_trainer,
        Automatic(3),
        GradNorm(TASKS, shared_layer="encoder.2.wieght"),
        "shared_layer",
        "encoder.2.wieght",
    )


def test_an_unknown_head_suggests_the_nearest(quiet_trainer: MakeTrainer) -> None:
    callback = GradNorm(TASKS, heads={"seg": "seg_haed", "depth": "depth_head", "normal": "normal_head"})
    fails(quiet_trainer, Automatic(3), callback, "GradNorm", "seg_haed", "did you mean 'seg_head'")


def test_a_task_without_a_head_is_an_error() -> None:
    with pytest.raises((ValueError, TypeError), match="normal"):
        GradNorm(TASKS, heads={"seg": "seg_head", "depth": "depth_head"})


def test_an_unknown_representation_is_an_error(quiet_trainer: MakeTrainer) -> None:
    fails(
        quiet_trainer, Automatic(3), GradNorm(TASKS, norm_of="activation", representation="encodr"), "encodr", "encoder"
    )


class WithoutEncoder(Automatic):
    """Calls its trunk by another name."""

    def build(self) -> None:
        super().build()
        self.trunk = self.encoder
        del self.encoder

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        z = self.trunk(batch["x"])
        return {t: (getattr(self, f"{t}_head")(z) - batch[t]).square().mean() for t in self.tasks}


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_without_an_encoder_the_shared_layer_has_to_be_named(heads: bool, quiet_trainer: MakeTrainer) -> None:
    model = WithoutEncoder(3)
    callback = GradNorm(TASKS, heads=model.heads() if heads else None)
    fails(quiet_trainer, model, callback, "GradNorm", "shared_layer", "encoder")
    quiet_trainer(callbacks=[GradNorm(TASKS, shared_layer="trunk.2")]).fit(model, Batches(vector_batches(3, 2)))


def test_an_encoder_without_weights_asks_for_a_shared_layer(quiet_trainer: MakeTrainer) -> None:
    class Flat(Automatic):
        def build(self) -> None:
            super().build()
            self.encoder = torch.nn.Sequential(torch.nn.Identity())
            for task in self.tasks:
                setattr(self, f"{task}_head", torch.nn.Linear(5, 3))

    with pytest.raises(ValueError, match=r"GradNorm.*shared_layer"):
        quiet_trainer(callbacks=[GradNorm(TASKS)]).fit(Flat(3), Batches(vector_batches(3, 2)))


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_a_frozen_shared_layer_is_an_error(heads: bool, quiet_trainer: MakeTrainer) -> None:
    model = Automatic(3)
    model.encoder[2].weight.requires_grad_(False)
    callback = GradNorm(TASKS, shared_layer="encoder.2", heads=model.heads() if heads else None)
    fails(quiet_trainer, model, callback, "GradNorm", "encoder.2", "requires_grad")


# losses --------------------------------------------------------------------------------------------------------------


class Spoilt(Automatic):
    """Returns what it should not."""

    def __init__(self, spoil: Callable[[Any, dict[str, Tensor]], dict[str, Any]]) -> None:
        super().__init__(3)
        self.spoil = spoil

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = self.task_losses(batch)
        return {"loss": torch.stack(list(losses.values())).sum(), **self.spoil(self, losses)}


def not_a_scalar(model: Any, losses: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**losses, "depth": losses["depth"].expand(3)}


def detached(model: Any, losses: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**losses, "depth": losses["depth"].detach()}


def a_float(model: Any, losses: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**losses, "depth": float(losses["depth"].detach())}


def a_copy(model: Any, losses: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**losses, "depth": losses["depth"] * 1}


def lacking(model: Any, losses: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"seg": losses["seg"], "normal": losses["normal"]}


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (not_a_scalar, ["'depth'", "scalar", "(3,)"]),
        (detached, ["'depth'", "grad"]),
        (a_float, ["'depth'", "float"]),
        (a_copy, ["'depth'", "copy", "backward"]),
        (lacking, ["'depth'", "seg", "normal"]),
    ],
)
def test_a_returned_loss_that_cannot_be_weighted_is_named(
    spoil: Any, expected: list[str], heads: bool, quiet_trainer: MakeTrainer
) -> None:
    model = Spoilt(spoil)
    fails(quiet_trainer, model, GradNorm(TASKS, heads=model.heads() if heads else None), "GradNorm", *expected)


@pytest.mark.parametrize("spoil", [not_a_scalar, detached, a_copy])
def test_fixed_weights_refuse_the_same_losses(spoil: Any, quiet_trainer: MakeTrainer) -> None:
    callback = FixedWeights({"seg": 1.0, "depth": 2.0, "normal": 0.5})
    fails(quiet_trainer, Spoilt(spoil), callback, "FixedWeights", "'depth'")


class Apart(Automatic):
    """`depth` reads the inputs, not the encoder."""

    def build(self) -> None:
        super().build()
        self.depth_head = torch.nn.Linear(5, 3)

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        losses = {}
        z = self.encoder(batch["x"])
        for task in self.tasks:
            prediction = self.depth_head(batch["x"]) if task == "depth" else getattr(self, f"{task}_head")(z)
            losses[task] = (prediction - batch[task]).square().mean()
        return losses


@pytest.mark.parametrize("norm_of", ["weight", "activation"])
@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_a_loss_that_does_not_depend_on_the_shared_layer_is_named(
    heads: bool, norm_of: Any, quiet_trainer: MakeTrainer
) -> None:
    model = Apart(3)
    callback = GradNorm(TASKS, heads=model.heads() if heads else None, norm_of=norm_of)
    fails(quiet_trainer, model, callback, "GradNorm", "'depth'")


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_a_first_loss_of_zero_gives_no_training_rate(heads: bool, quiet_trainer: MakeTrainer) -> None:
    model, batches = Automatic(3), vector_batches(3, 4)
    with torch.no_grad():
        batches[0]["depth"] = model.depth_head(model.encoder(batches[0]["x"]))
    callback = GradNorm(TASKS, heads=model.heads() if heads else None)
    fails(quiet_trainer, model, callback, "GradNorm", "depth", "initial_losses", batches=batches)


def test_a_manual_model_that_never_calls_watch_is_told_how(quiet_trainer: MakeTrainer) -> None:
    fails(quiet_trainer, Manual(3), GradNorm(TASKS), "GradNorm", "watch", "manual_backward")


def test_watching_after_the_backward_pass_is_an_error(quiet_trainer: MakeTrainer) -> None:
    class Late(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            losses = self.task_losses(batch)
            self.manual_backward(torch.stack(list(losses.values())).sum())
            self.gradnorm[0].watch(losses)
            self.optimizers().step()  # type: ignore[union-attr]

    model = Late(3)
    callback = GradNorm(TASKS)
    model.gradnorm = [callback]
    with pytest.raises((ValueError, RuntimeError), match="GradNorm"):
        quiet_trainer(callbacks=[callback]).fit(model, Batches(vector_batches(3, 2)))


def test_watching_an_unknown_task_is_an_error(quiet_trainer: MakeTrainer) -> None:
    model = Manual(3)
    callback = GradNorm(["seg", "dept"])
    model.gradnorm = [callback]
    fails(quiet_trainer, model, callback, "GradNorm", "dept", "depth")


# MultiTaskModule -----------------------------------------------------------------------------------------------------


def inputs_alone(batch: Any) -> Any:
    return batch["x"]


def three_things(batch: Any) -> Any:
    return batch["x"], {"seg": batch["seg"]}, {"depth": batch["depth"]}


def targets_in_a_list(batch: Any) -> Any:
    return batch["x"], [batch["seg"], batch["depth"], batch["normal"]]


@pytest.mark.parametrize("spoil", [inputs_alone, three_things, targets_in_a_list])
@pytest.mark.parametrize("callback", [GradNorm, L.Callback])
def test_a_batch_of_a_multi_task_module_is_inputs_and_a_dict_of_targets(
    callback: Any, spoil: Any, quiet_trainer: MakeTrainer
) -> None:
    batches = [spoil(batch) for batch in vector_batches(3, 2)]
    fails(quiet_trainer, multi_task_module(3), callback(), "MultiTaskModule", "(inputs, targets)", batches=batches)


def test_a_target_of_no_task_lists_the_tasks(quiet_trainer: MakeTrainer) -> None:
    batches = as_inputs_and_targets(vector_batches(3, 2))
    for _, targets in batches:
        targets["dept"] = targets.pop("depth")
    fails(quiet_trainer, multi_task_module(3), GradNorm(), "'dept'", "did you mean 'depth'", batches=batches)


def test_tasks_of_a_plain_module_have_to_be_named(quiet_trainer: MakeTrainer) -> None:
    fails(quiet_trainer, Automatic(3), GradNorm(), "GradNorm", "tasks", "Automatic")


def test_a_multi_task_module_lists_its_tasks_when_asked_for_another(quiet_trainer: MakeTrainer) -> None:
    batches = as_inputs_and_targets(vector_batches(3, 2))
    fails(quiet_trainer, multi_task_module(3), GradNorm(["seg", "dept"]), "dept", "depth", batches=batches)


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
