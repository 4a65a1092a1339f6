"""Loops that people report: the rule only learns from gradients that an optimizer step uses, whoever takes the step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from harness import Batches, assert_agrees
from lightning.pytorch.utilities import CombinedLoader
from loops import Network
from models import TASKS, Automatic, Batch, Manual, network_sgd, vector_batches
from reported_loops import (
    SITUATIONS,
    Adversarial,
    ByHand,
    OneForEachPart,
    Situation,
    Toggles,
    plain_sgd,
)
from textbook import Forward
from torch import Tensor
from torch.nn import functional as F
from torchjd.aggregation import UPGrad
from torchjd.scalarization import UW, GeometricMean

from lightning_gradnorm import Aggregation, Balancer, FixedWeights, GradientNormMonitor, GradNorm, Scalarization
from lightning_gradnorm.strategies import GradNormRule

MakeTrainer = Callable[..., L.Trainer]
NAMES = list(TASKS[:3])
pytestmark = pytest.mark.filterwarnings("ignore:.*run with no optimizer", "ignore:.*no `val_dataloader`")


class Steps(L.Callback):
    """Notes the weights after each step of the rule, as soon as a hook tells."""

    def __init__(self, gradnorm: GradNorm) -> None:
        self.gradnorm = gradnorm
        self.weights: list[dict[str, float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        if self.gradnorm.rule.steps > len(self.weights):
            self.weights.append(dict(self.gradnorm.weights))

    on_train_end = on_train_batch_end


def gradnorm(heads: Any = "auto", **options: Any) -> GradNorm:
    if heads == "all found":
        return GradNorm(NAMES, **options)
    named = Automatic().heads() if heads == "named" else heads
    return GradNorm(NAMES, shared_layer="encoder.2", heads=named, **options)


def learn(steps: Any, optimizer: Any = network_sgd, make: Any = Automatic, **options: Any) -> tuple[Any, Any]:
    twin, batches = make(), vector_batches(3, 12)
    flat, sizes = [batches[i] for step in steps for i in step], [len(step) for step in steps]
    made = optimizer(twin.parameters())
    shared = twin.shared_parameters()
    return twin, textbook.train(twin, twin.forward_for_textbook, flat, shared, made, accumulate=sizes, **options)


def fit(trainer: MakeTrainer, situation: Situation, *callbacks: Any) -> Any:
    model, batches = situation.make(), vector_batches(3, 12)[: situation.batches]
    if isinstance(model, Manual):
        model.gradnorm = list(callbacks[:1])
    n = situation.at_once
    loader = [batches[i : i + n] for i in range(0, len(batches), n)] if n else batches
    trainer(callbacks=list(callbacks), **situation.trainer).fit(model, Batches(loader))
    return model


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["all found", "auto", "named", None])
@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_the_textbook_is_followed_with(situation: Situation, heads: Any, quiet_trainer: MakeTrainer) -> None:
    twin, trajectory = learn(situation.steps, situation.optimizer, by_closure=situation.by_closure)
    callback = gradnorm(heads)
    steps = Steps(callback)
    model = fit(quiet_trainer, situation, callback, steps)
    assert callback.rule.steps == len(situation.steps)
    assert_agrees(steps, model, trajectory, twin, tolerance=1e-8)  # type: ignore[arg-type]
    assert not {"training_step", "log"} & vars(model).keys(), "nothing is left"
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    assert not any(
        one._optimizer_step_pre_hooks for one in model.trainer.optimizers if hasattr(one, "_optimizer_step_pre_hooks")
    )


# other strategies -----------------------------------------------------------------------------------------------------

STRATEGIES: dict[str, Callable[[], Any]] = {
    "UW": lambda: Scalarization(UW, NAMES),
    "geometric mean": lambda: Scalarization(GeometricMean(), NAMES),
    "UPGrad": lambda: Aggregation(UPGrad(), NAMES),
    "UPGrad at parameters": lambda: Aggregation(UPGrad(), NAMES, at="parameters"),
    "fixed": lambda: FixedWeights({"seg": 2.0, "depth": 0.5, "normal": 1.0}),
}
TOLD_APART = [
    "a closure without a step",
    "an epoch cut short",
    "raw steps",
    "a last window dropped",
    "batches left out",
    "out of memory, again",
    "a discriminator in between",
    "steps after the epoch",
    "a batch in pieces",
]


class InSteps(ByHand):
    """One plain step on each list of batches: what a situation comes to."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for one in batch:
            self.back_propagate(one, parts=len(batch))
        optimizer.step()


def fit_in_steps(trainer: MakeTrainer, situation: Situation, callback: Any) -> Any:
    batches = vector_batches(3, 12)
    model = InSteps()
    model.gradnorm = [callback]
    trainer(callbacks=[callback]).fit(model, Batches([[batches[i] for i in step] for step in situation.steps]))
    return model


@pytest.mark.each_value_once
@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("name", TOLD_APART)
def test_another_strategy_trains_as_in_plain_steps_with(name: str, make: Any, quiet_trainer: MakeTrainer) -> None:
    situation = SITUATIONS[name]
    model, plain = fit(quiet_trainer, situation, make()), fit_in_steps(quiet_trainer, situation, make())
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["steps within backward", "steps within backward by hand"])
def test_an_aggregation_at_the_parameters_would_come_too_late_for(name: str, quiet_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"at='parameters' .* have moved within it .*Step after it, .*representation"):
        fit(quiet_trainer, SITUATIONS[name], STRATEGIES["UPGrad at parameters"]())


@pytest.mark.each_value_once
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "name", [*TOLD_APART, "raw steps by closure", "steps after the batch", "an optimizer of its own"]
)
def test_the_monitor_measures_the_same_steps_with(name: str, every: int, quiet_trainer: MakeTrainer) -> None:
    situation = SITUATIONS[name]
    monitors = [GradientNormMonitor(NAMES, every_n_steps=every) for _ in range(2)]
    fit(quiet_trainer, situation, monitors[0])
    fit_in_steps(quiet_trainer, situation, monitors[1])
    assert monitors[0].summary() == monitors[1].summary().replace("InSteps", "")
    assert "measured step" in monitors[0].summary()


# several optimizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["auto", "named", None])
def test_weights_move_with_the_encoder_and_not_with_the_heads(heads: Any, quiet_trainer: MakeTrainer) -> None:
    callback = gradnorm(heads)
    fit(quiet_trainer, Situation(lambda: OneForEachPart(starts=1), [], {"max_epochs": 2}), callback)
    assert callback.rule.steps == 6


def test_an_encoder_that_never_steps_is_warned_of_in_the_end(quiet_trainer: MakeTrainer) -> None:
    with pytest.warns(
        UserWarning, match=r"no optimizer of OneForEachPart that holds what the tasks share has taken a step"
    ):
        fit(quiet_trainer, Situation(lambda: OneForEachPart(starts=9), []), gradnorm())


@pytest.mark.parametrize("heads", ["auto", "named", None])
def test_heads_may_be_trained_first_while_the_encoder_is_toggled_off(heads: Any, quiet_trainer: MakeTrainer) -> None:
    batch, twin = vector_batches(3, 12)[0], Automatic()
    network_sgd(p for name, p in twin.named_parameters() if "head" in name)
    of_heads = network_sgd([p for name, p in twin.named_parameters() if "head" in name])
    torch.stack(list(twin.task_losses(batch).values())).sum().backward()
    of_heads.step()
    made = network_sgd(twin.encoder.parameters())
    trajectory = textbook.train(twin, twin.forward_for_textbook, [batch], twin.shared_parameters(), made)
    callback = gradnorm(heads)
    model = fit(quiet_trainer, Situation(Toggles, [], batches=1), callback)
    assert callback.weights == pytest.approx(trajectory.weights[-1], abs=1e-9)
    torch.testing.assert_close(model.encoder[2].weight, twin.encoder[2].weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("heads", ["auto", "named", None])
def test_losses_watched_while_the_encoder_is_toggled_off_are_reported(heads: Any, quiet_trainer: MakeTrainer) -> None:
    with pytest.raises(UserWarning, match=r"'encoder.2' is frozen .* Nothing is balanced until it is trained"):
        fit(quiet_trainer, Situation(lambda: Toggles(watches_heads=True), []), gradnorm(heads))


@pytest.mark.parametrize("is_first", [True, False])
def test_an_overflow_in_a_discriminator_does_not_affect_the_tasks(is_first: bool, quiet_trainer: MakeTrainer) -> None:
    class Single(Adversarial):
        def discriminate(self, batch: Batch, optimizer: Any) -> None:
            overflows = self.discriminator.weight.register_hook(lambda gradient: gradient * torch.inf)
            super().discriminate(batch, optimizer)
            overflows.remove()

    model, callback = Single(is_first, every=1).float(), gradnorm()
    model.gradnorm = [callback]
    precision = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    batches = [{name: value.float() for name, value in batch.items()} for batch in vector_batches(3, 6)]
    quiet_trainer(callbacks=[callback], plugins=[precision]).fit(model, Batches(batches))
    assert callback.rule.steps == 6


# loaders --------------------------------------------------------------------------------------------------------------


class WithDataOfEachTask(Automatic):
    """Each task has its own data; the encoder is called once per task."""

    def losses_of(self, batch: dict[str, Any]) -> dict[str, Tensor | None]:
        heads = {task: getattr(self, f"{task}_head") for task in self.tasks}
        given = {task: batch.get(task) for task in self.tasks}
        return {t: None if b is None else F.mse_loss(heads[t](self.encoder(b["x"])), b[t]) for t, b in given.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = self.losses_of(batch)
        return {"loss": torch.stack([loss for loss in losses.values() if loss is not None]).sum(), **losses}

    def forward_for_textbook(self, batch: Any) -> Forward:
        return Forward({task: loss for task, loss in self.losses_of(batch).items() if loss is not None})


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", "named", None])
@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_loaders_may_be_combined(mode: Any, heads: Any, quiet_trainer: MakeTrainer) -> None:
    batches, options = vector_batches(3, 12), {"optimizer": plain_sgd}
    make = lambda: CombinedLoader({t: Batches(batches[3 * i : 3 * i + 3 + i]) for i, t in enumerate(NAMES)}, mode)  # noqa: E731
    twin, seen = WithDataOfEachTask(), [batch for batch, _, _ in make()]
    trajectory = textbook.train(
        twin,
        twin.forward_for_textbook,
        seen,
        twin.shared_parameters(),
        network_sgd(twin.parameters()),
        weight_optimizer=plain_sgd,
        tasks=NAMES,
    )
    model, callback = WithDataOfEachTask(), gradnorm(heads, **options)
    steps = Steps(callback)
    quiet_trainer(callbacks=[callback, steps]).fit(model, make())
    assert_agrees(steps, model, trajectory, twin, tolerance=1e-8)  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", ["auto", None])
@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*", "ignore:.*The number of training batches.*")
def test_a_step_may_draw_its_batches_itself(heads: Any, quiet_trainer: MakeTrainer) -> None:
    class Draws(Automatic):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, index, _ = next(dataloader_iter)
            return super().training_step(batch, index)

    _, trajectory = learn([[i] for i in range(6)])
    callback = gradnorm(heads)
    fit(quiet_trainer, Situation(Draws, []), callback)
    assert callback.weights == pytest.approx(trajectory.weights[-1], abs=1e-9)


# your own loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["auto", "named", None])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_balancer_forgets_dropped_gradients_too(set_to_none: bool, heads: Any) -> None:
    _, trajectory = learn([[0], [3], [4], [5]])
    model, found = Network(), []
    optimizer = network_sgd(model.parameters())
    named = model.heads() if heads == "named" else heads
    with Balancer(model, GradNormRule(NAMES), shared_layer="encoder.2", heads=named) as balancer:
        for index, batch in enumerate(vector_batches(3, 12)[:6]):
            balancer.backward(model(batch))
            if index not in (1, 2):
                optimizer.step()
                balancer.step()
                found.append(balancer.weights)
            optimizer.zero_grad(set_to_none=set_to_none)
    assert found == [pytest.approx(weights, abs=1e-9) for weights in trajectory.weights]


def test_a_forgotten_step_of_the_balancer_is_warned_of_once() -> None:
    model, batches = Network(), vector_batches(3, 12)
    optimizer = network_sgd(model.parameters())
    with Balancer(model, GradNormRule(NAMES)) as balancer, warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for index in range(120):
            optimizer.zero_grad()
            balancer.backward(model(batches[index % 12]))
            optimizer.step()
        balancer.step()
    assert [str(one.message)[:79] for one in found] == [
        "Balancer: step was not called during the last 50 backward passes, although the "
    ]


def test_an_optimizer_may_evaluate_its_closure_as_often_as_it_likes() -> None:
    model, batch = Network(), vector_batches(3, 1)[0]
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=70)
    with Balancer(model, GradNormRule(NAMES)) as balancer:

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = model(batch)
            balancer.backward(losses)
            return torch.stack(list(losses.values())).sum()

        optimizer.step(closure)
        balancer.step()
