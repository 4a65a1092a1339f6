"""Wrong use of the monitor, and of `gradient_norms`, is an error that names the culprit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Batches, assert_clean, assert_says, case, traces
from models import (
    Automatic,
    Manual,
    OnlyLogs,
    as_inputs_and_targets,
    multi_task_module,
    vector_batches,
)
from monitored import (
    TASKS,
    MakeTrainer,
    by_hand,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradnorm import GradientNormMonitor, gradient_norms
from lightning_gradnorm.engine.layers import find_parameters

# ---- gradient_norms ----------------------------------------------------------------------------------------------------


def test_the_plain_function_agrees_with_autograd_and_changes_nothing() -> None:
    network, (batch,) = Automatic(3), vector_batches(3, 1)
    losses = network.task_losses(batch)
    found = gradient_norms(losses, network.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())
    torch.stack(list(losses.values())).sum().backward()  # the graph is still there
    parameters = list(network.parameters())
    again = network.task_losses(batch)
    flat = {}
    for name, loss in again.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        flat[name] = filled
    wanted = by_hand(flat, [parameter.grad for parameter in parameters])  # type: ignore[misc]
    for task in TASKS:
        assert found[task] == pytest.approx(wanted[f"monitor/norm/{task}"], abs=1e-12)
        assert found.shares[task] == pytest.approx(wanted[f"monitor/share/{task}"], abs=1e-12)
    assert found.imbalance == pytest.approx(wanted["monitor/imbalance"], abs=1e-12)
    assert found.cosine("seg", "normal") == pytest.approx(wanted["monitor/cosine/seg/normal"], abs=1e-12)
    assert sum(found.shares.values()) == pytest.approx(1)


W = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("losses", "parameters", "error", "says"),
    [
        case("no loss", {}, [W], TypeError, ["losses should be a mapping from name to loss"]),
        case("a list of losses", [W.sum()], [W], TypeError, ["losses should be a mapping"]),
        case(
            "a number",
            {"a": 1.0},
            [W],
            TypeError,
            ["the loss 'a' should be a tensor; got a float; did you call .item()?"],
        ),
        case("a vector", {"a": W * 1}, [W], ValueError, ["the loss 'a'", "scalar; got shape (2,)"]),
        case("detached", {"a": W.sum().detach()}, [W], ValueError, ["the loss 'a'", "carries no gradient"]),
        case("no parameter", {"a": W.sum()}, [], ValueError, ["parameters should have one that is trained"]),
        case("names", {"a": W.sum()}, ["encoder"], TypeError, ["parameters should be tensors", "got str"]),
    ],
)
def test_wrong_input_of_the_plain_function(losses: Any, parameters: Any, error: type[Exception], says: Any) -> None:
    with pytest.raises(error) as raised:
        gradient_norms(losses, parameters)
    assert_says(raised.value, "gradient_norms", *says)


# ---- wrong use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        case("a single name", {"losses": "seg"}, TypeError, ["losses should be a list of names", "'seg'"]),
        case("no name", {"losses": []}, TypeError, ["losses should be a list of names"]),
        case("twice", {"losses": ["seg", "seg"]}, ValueError, ["losses should all be different"]),
        case(
            "the sum",
            {"losses": ["seg", "loss"]},
            ValueError,
            ["losses names 'loss'", "the sum that is back-propagated"],
        ),
        case("the rest", {"losses": ["rest_of_loss"]}, ValueError, ["'rest_of_loss'", "another name"]),
        case(
            "no layer",
            {"parameters": None},
            ValueError,
            ["parameters should be 'shared', 'all' or a dotted name; got None"],
        ),
        case("never", {"every_n_steps": 0}, ValueError, ["every_n_steps should be an integer, at least 1; got 0"]),
        case("no drawing", {"cosine_image": True}, ValueError, ["cosine_image should be a function", "got True"]),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], says: Any) -> None:
    with pytest.raises(error) as raised:
        GradientNormMonitor(**options)
    assert_says(raised.value, "GradientNormMonitor", *says)


class Nesting(Automatic):
    """Returns a loss that contains another one."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = self.task_losses(batch)
        return {"loss": losses["seg"] + losses["depth"], "both": losses["seg"] + losses["depth"], **losses}

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        losses = super().task_losses(batch)
        losses["seg"] = losses["seg"] + losses["depth"]
        return losses


class Copying(Automatic):
    """Returns copies of its losses."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        return {name: value if name == "loss" else 1 * value for name, value in output.items()}


class Detaching(Automatic):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        return {**output, "depth": output["depth"].detach()}


class WithoutParameters(Automatic):
    def build(self) -> None:
        super().build()
        self.flat = nn.Flatten()


@pytest.mark.parametrize(
    ("make", "options", "error", "says"),
    [
        case("no such loss", Automatic, {"losses": ["seg", "dept"]}, ValueError, ["loss 'dept'", "mean 'depth'?"]),
        case("nothing like it", Automatic, {"losses": ["l2"]}, ValueError, ["loss 'l2'", "['depth', 'normal', 'seg']"]),
        case(
            "no such logged name",
            OnlyLogs,
            {"losses": {"seg": "train/seg_los"}},
            ValueError,
            ["'train/seg_los' was not logged", "did you mean 'train/seg_loss'?"],
        ),
        case(
            "no mapping is returned", OnlyLogs, {"losses": ["seg"]}, TypeError, ["OnlyLogs.training_step", "got Tensor"]
        ),
        case("no such task", multi_task_module, {"losses": ["sag"]}, ValueError, ["loss 'sag'", "did you mean 'seg'?"]),
        case(
            "logged names of a MultiTaskModule",
            multi_task_module,
            {"losses": {"seg": "train/loss/seg"}},
            ValueError,
            ["MultiTaskModule shows them itself", "losses=None"],
        ),
        case(
            "no such layer",
            Automatic,
            {"parameters": "encoder.22"},
            ValueError,
            ["parameters 'encoder.22' is not in Automatic", "did you mean 'encoder.2'?"],
        ),
        case("no parameters", WithoutParameters, {"parameters": "flat"}, ValueError, ["'flat'", "has no parameters"]),
        case("one in another", Nesting, {}, ValueError, ["the loss 'seg' contains the loss 'depth'"]),
        case("copies", Copying, {"losses": TASKS}, ValueError, ["the loss 'seg' took no part in the backward pass"]),
        case(
            "all, misspelled", Automatic, {"parameters": "al"}, ValueError, ["parameters 'al'", "did you mean 'all'?"]
        ),
        case("detached", Detaching, {"losses": TASKS}, ValueError, ["the loss 'depth'", "carries no gradient"]),
    ],
)
def test_wrong_use_is_an_error_that_names_the_culprit(
    quiet_trainer: MakeTrainer, make: Any, options: dict[str, Any], error: type[Exception], says: list[str]
) -> None:
    model = make(3)
    before = traces(model)
    batches: list[Any] = vector_batches(3, 2)
    batches = batches if isinstance(model, Automatic) else as_inputs_and_targets(batches)
    with pytest.raises(error) as raised:
        quiet_trainer(callbacks=[GradientNormMonitor(**options)]).fit(model, Batches(batches))
    assert_says(raised.value, "GradientNormMonitor", *says)
    assert_clean(model, before)


class SilentManual(Manual):
    """Optimizes manually and shows no losses."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(torch.stack(list(self.task_losses(batch).values())).sum())
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "losses", "says"),
    [
        case(
            "not logged",
            OnlyLogs,
            {"seg": "train/seg_loss", "l2": "weights"},
            "'weights' was not logged in the measured",
        ),
        case("not watched", SilentManual, None, r"no loss was seen in the measured steps.*watch\(\{'data': loss"),
    ],
)
def test_a_loss_that_no_measured_step_of_the_first_epoch_has_shown_is_a_warning(
    quiet_trainer: MakeTrainer, make: Any, losses: Any, says: str
) -> None:
    """Not an error: measured steps are few, and the loss may come later."""
    with pytest.warns(UserWarning, match=f"GradientNormMonitor: {says}"):
        quiet_trainer(callbacks=[GradientNormMonitor(losses)]).fit(make(3), Batches(vector_batches(3, 2)))


def test_a_tied_layer_is_found_under_each_of_its_names() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    model["second"].weight = model["first"].weight
    found = {
        name: find_parameters(model, name, caller="GradientNormMonitor: parameters")
        for name in ("second", "second.weight")
    }
    assert found["second"].keys() == {"first.weight", "second.bias"}
    assert found["second.weight"] == {"second.weight": model["first"].weight}


def test_a_compiled_layer_is_refused_for_its_graph_cannot_be_walked_twice(quiet_trainer: MakeTrainer) -> None:
    model = Automatic(3)
    model.encoder = torch.compile(model.encoder, backend="aot_eager")  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match=r"GradientNormMonitor: the loss reaches the parameters through a module compiled"
    ):
        quiet_trainer(callbacks=[GradientNormMonitor()]).fit(model, Batches(vector_batches(3, 2)))


def test_a_frozen_encoder_is_reported_at_the_end(quiet_trainer: MakeTrainer) -> None:
    model, monitor = multi_task_module(3), GradientNormMonitor(every_n_steps=1)
    model.encoder.requires_grad_(False)
    quiet_trainer(callbacks=[monitor]).fit(model, Batches(as_inputs_and_targets(vector_batches(3, 2))))
    assert monitor.summary() == (
        "GradientNormMonitor: no step was measured: none of the losses has reached `encoder`, or all of it is frozen."
    )


def test_two_layers_are_monitored_side_by_side(quiet_trainer: MakeTrainer) -> None:
    deep = GradientNormMonitor(None, "encoder.0", every_n_steps=1)
    last = GradientNormMonitor(None, "encoder", every_n_steps=1, prefix="whole")
    trainer = quiet_trainer(callbacks=[deep, last], max_steps=2)
    trainer.fit(multi_task_module(), DataLoader(as_inputs_and_targets(vector_batches(T=3, count=2)), batch_size=None))
    assert deep.last is not None
    assert last.last is not None
    for name in deep.last:
        assert trainer.callback_metrics[f"monitor/norm/{name}"] == pytest.approx(deep.last[name])
        assert trainer.callback_metrics[f"whole/norm/{name}"] == pytest.approx(last.last[name])
        assert last.last[name] > deep.last[name]
