"""Training any scalarization through the callback is the same as ``scalarizer(losses).backward()`` by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import by_hand
import lightning as L
import pytest
import torch
import torchjd.scalarization as jd
from harness import Batches, BeforeBatch, MemoryLogger, assert_clean, seed, state_by_part, traces
from models import (
    Automatic,
    Convolutional,
    Manual,
    OnlyLogs,
    Regularized,
    WithCoefficients,
    WithDropout,
    as_inputs_and_targets,
    image_batches,
    multi_task_module,
    network_sgd,
    vector_batches,
)
from strategies import BY_HAND_OF_LOSSES
from torch import Tensor, nn

from lightning_gradnorm import Scalarization
from lightning_gradnorm.strategies.factory import TaskAware

MakeTrainer = Callable[..., L.Trainer]
T, STEPS = 3, 12
NAMES = ["seg", "depth", "normal"]


class Squares(nn.Module):
    """A user's own: no torchjd class, with a parameter and a buffer, and weights that depend on all losses."""

    def __init__(self, number_of_tasks: int) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.full((number_of_tasks,), 0.5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return (
            self.sharpness.exp() * values.square()
        ).sum() / values.detach().sum() + 0.1 * self.sharpness.square().sum()


MADE: dict[str, Callable[[int], nn.Module]] = {**BY_HAND_OF_LOSSES, "a user's own": Squares}


class States(L.Callback):
    """Notes the weights, and the state of the scalarizer, after each optimizer step."""

    def __init__(self, callback: Scalarization, accumulate: int = 1) -> None:
        self.callback, self.accumulate = callback, accumulate
        self.weights: list[dict[str, float]] = []
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step > len(self.weights):
            self.weights.append(self.callback.weights)
            if self.callback.scalarizer is not None:
                state = self.callback.scalarizer.state_dict()
                self.states.append({name: value.clone() for name, value in state.items()})


def fresh(made: Callable[[int], nn.Module]) -> nn.Module:
    """A scalarizer for the loop by hand: it knows its tasks and uses double precision."""
    scalarizer = made(T)
    if isinstance(scalarizer, TaskAware):
        scalarizer.name_tasks(NAMES)
    return scalarizer.double()


def worst(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert found.keys() == expected.keys()
    return max((torch.as_tensor(found[k] - expected[k]).abs().sum().item() for k in expected), default=0.0)


def assert_same(
    states: States, model: nn.Module, hand: by_hand.ByHand, twin: nn.Module, tolerance: float = 1e-10
) -> None:
    """The weights and the scalarizer after each step are those found by hand, and the network is at the end."""
    assert len(states.weights) == len(hand.weights)
    differences = [worst(f, e) for f, e in zip(states.weights, hand.weights, strict=True)]
    differences += [worst(f, e) for f, e in zip(states.states, hand.states, strict=True)]
    differences.append(worst(state_by_part(model), state_by_part(twin)))
    assert max(differences) <= tolerance, f"they differ by {differences}"


@pytest.mark.each_value_once
@pytest.mark.both_packages
@pytest.mark.parametrize("given", ["an object", "what makes one"])
@pytest.mark.parametrize("name", MADE)
def test_every_scalarizer_trains_as_by_hand(quiet_trainer: MakeTrainer, name: str, given: str) -> None:
    batches = vector_batches(T, 4)
    twin, by_itself = Automatic(T), fresh(MADE[name])
    hand = by_hand.scalarize(
        twin, twin.forward_for_textbook, batches, by_itself, network_sgd(twin.parameters()), tasks=NAMES, epochs=4
    )
    model, callback = Automatic(T), Scalarization(MADE[name](T) if given == "an object" else MADE[name], NAMES)
    states, before = States(callback), traces(model)
    quiet_trainer(callbacks=[callback, states], max_epochs=4).fit(model, Batches(batches))
    assert_same(states, model, hand, twin)
    assert_clean(model, before)


def test_the_scalarizers_do_something_different_from_each_other() -> None:
    """Else all of the above could be the plain sum."""
    ends: dict[str, Tensor] = {}
    for name, made in MADE.items():
        twin = Automatic(T)
        options = {"tasks": NAMES, "epochs": 4}
        by_hand.scalarize(
            twin,
            twin.forward_for_textbook,
            vector_batches(T, 4),
            fresh(made),
            network_sgd(twin.parameters()),
            **options,
        )
        ends[name] = twin.encoder[0].weight.detach()
    names = list(ends)
    same = [(a, b) for i, a in enumerate(names) for b in names[:i] if (ends[a] - ends[b]).abs().max() < 1e-6]
    assert same == []


# one or two scalarizers in every situation ----------------------------------------------------------------------------


class Twice(Automatic):
    """A head is called twice."""

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        losses = {t: nn.functional.mse_loss(getattr(self, f"{t}_head")(z), batch[t]) for t in self.tasks}
        return {**losses, "seg": losses["seg"] + nn.functional.mse_loss(self.seg_head(z.flip(0)), batch["seg"])}

    def forward_for_textbook(self, batch: Any) -> Any:
        given = super().forward_for_textbook(batch)
        z = given.representation[0]
        given.losses["seg"] = given.losses["seg"] + nn.functional.mse_loss(self.seg_head(z.flip(0)), batch["seg"])
        return given


class Late(Automatic):
    """Tasks come and go: `present` has those of each batch; the others are given as None, or left out altogether."""

    present: ClassVar[list[list[str]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        losses = self.forward_for_textbook((batch_idx, batch)).losses
        return {"loss": sum(losses.values()), **dict.fromkeys(NAMES), **losses}

    def forward_for_textbook(self, numbered: Any) -> Any:
        number, batch = numbered
        given = super().forward_for_textbook(batch)
        given.losses = {t: given.losses[t] for t in NAMES if t in self.present[number]}
        return given


COMING_AND_GOING = [["seg"], ["seg", "depth"], ["depth"], NAMES, NAMES, ["seg", "normal"], NAMES, ["normal"]] + [
    NAMES
] * 4


@pytest.mark.each_value_once
@pytest.mark.parametrize("made", ["UW", "FAMO", "a user's own"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(Automatic, {}, id="plain"),
        pytest.param(Automatic, {"accumulate": 2}, id="two batches to a step"),
        pytest.param(Automatic, {"accumulate": 4}, id="four batches to a step"),
        pytest.param(WithCoefficients, {}, id="coefficients and a regularizer of the parameters"),
        pytest.param(Regularized, {}, id="a regularizer of the representation"),
        pytest.param(Regularized, {"accumulate": 2}, id="a regularizer, two batches to a step"),
        pytest.param(Twice, {}, id="a head called twice"),
        pytest.param(Convolutional, {}, id="BatchNorm"),
        pytest.param(WithDropout, {}, id="Dropout"),
        pytest.param(Automatic, {"clip": 0.05}, id="gradient clipping"),
    ],
)
def test_it_trains_as_by_hand_with(
    quiet_trainer: MakeTrainer, kind: type[Automatic], options: dict[str, Any], made: str
) -> None:
    batches = (image_batches if kind is Convolutional else vector_batches)(T, STEPS)
    twin, by_itself = kind(T), fresh(MADE[made])
    hand = by_hand.scalarize(
        twin,
        twin.forward_for_textbook,
        batches,
        by_itself,
        network_sgd(twin.parameters()),
        tasks=NAMES,
        coefficients=getattr(kind, "coefficients", None),
        before_batch=seed,
        **options,
    )
    torch.manual_seed(0)
    model, callback = kind(T), Scalarization(MADE[made], NAMES)
    states, before = States(callback), traces(model)
    trainer = quiet_trainer(
        callbacks=[BeforeBatch(seed), callback, states],
        accumulate_grad_batches=options.get("accumulate", 1),
        gradient_clip_val=options.get("clip"),
    )
    trainer.fit(model, Batches(batches))
    if kind is Convolutional and made == "FAMO":  # by hand the running statistics see each batch twice
        running = {k: v for k, v in state_by_part(model).items() if "running" in k or "tracked" in k}
        plain = Convolutional(T)
        quiet_trainer(callbacks=[]).fit(plain, Batches(batches))
        assert int(running["encoder.1.num_batches_tracked"]) == STEPS
        for name in running:
            twin_state = state_by_part(twin)
            twin_state[name].copy_(running[name])
    assert_same(states, model, hand, twin)
    assert_clean(model, before)


@pytest.mark.parametrize("made", ["UW", "FAMO", "DWA", "Mean", "a user's own"])
def test_an_absent_task_enters_with_its_last_loss_and_until_all_were_seen_all_weigh_one(
    quiet_trainer: MakeTrainer, made: str
) -> None:
    batches = vector_batches(T, STEPS)
    twin, by_itself = Late(T), fresh(MADE[made])
    twin.present = COMING_AND_GOING
    hand = by_hand.scalarize(
        twin,
        twin.forward_for_textbook,
        list(enumerate(batches)),
        by_itself,
        network_sgd(twin.parameters()),
        tasks=NAMES,
    )
    model, callback = Late(T), Scalarization(MADE[made], NAMES)
    model.present = COMING_AND_GOING
    states = States(callback)
    quiet_trainer(callbacks=[callback, states]).fit(model, Batches(batches))
    assert hand.weights[2] == dict.fromkeys(NAMES, 1.0)
    assert_same(states, model, hand, twin)


@pytest.mark.each_value_once
@pytest.mark.both_packages
@pytest.mark.parametrize("how", ["manual", "manual, two batches to a step", "MultiTaskModule", "logged"])
@pytest.mark.parametrize("made", ["UW", "FAMO", "DWA"])
def test_it_trains_as_by_hand_in_every_kind_of_module(quiet_trainer: MakeTrainer, how: str, made: str) -> None:
    if made == "FAMO" and "manual" in how:
        pytest.skip("is refused: a test of its own")
    batches: list[Any] = vector_batches(T, STEPS)
    accumulate = 2 if "two" in how else 1
    twin, by_itself = Automatic(T), fresh(MADE[made])
    hand = by_hand.scalarize(
        twin,
        twin.forward_for_textbook,
        batches,
        by_itself,
        network_sgd(twin.parameters()),
        tasks=NAMES,
        accumulate=accumulate,
    )
    model: L.LightningModule
    tasks: Any = NAMES
    if "manual" in how:
        model = Manual(T, accumulate=accumulate)
    elif how == "logged":
        model = OnlyLogs(T)
        tasks = model.logged_names()
    else:
        model, tasks, batches = multi_task_module(T), None, as_inputs_and_targets(batches)
    callback = Scalarization(MADE[made], tasks)
    if isinstance(model, Manual):
        model.gradnorm = [callback]
    states, before = States(callback), traces(model)
    quiet_trainer(callbacks=[callback, states]).fit(model, Batches(batches))
    assert_same(states, model, hand, twin)
    if isinstance(model, Manual):
        model.gradnorm = []
    assert_clean(model, before)


@pytest.mark.both_packages
def test_the_weights_are_logged_and_the_models_own_loss_stays_its_own(quiet_trainer: MakeTrainer) -> None:
    class Logs(Automatic):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            given = super().training_step(batch, batch_idx)
            self.log("train/loss", given["loss"])
            return given

    batches = vector_batches(T, STEPS)
    twin = Automatic(T)
    hand = by_hand.scalarize(
        twin, twin.forward_for_textbook, batches, fresh(jd.UW), network_sgd(twin.parameters()), tasks=NAMES
    )
    model, callback, logger = Logs(T), Scalarization(jd.UW, NAMES), MemoryLogger()
    first = sum(loss.item() for loss in Automatic(T).task_losses(batches[0]).values())
    quiet_trainer(callbacks=[callback], logger=logger).fit(model, Batches(batches))
    for task in NAMES:
        assert logger.scalars[f"balancing/weight/{task}"] == pytest.approx([w[task] for w in hand.weights], abs=1e-6)
    assert logger.scalars["balancing/fallbacks"] == [0.0] * STEPS
    assert logger.scalars["train/loss"][0] == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.5), partial(torch.optim.AdamW, lr=0.1)])
def test_the_scalarizers_parameters_are_trained_by_the_optimizer_given(
    quiet_trainer: MakeTrainer, optimizer: Any
) -> None:
    batches = vector_batches(T, STEPS)
    twin = Automatic(T)
    hand = by_hand.scalarize(
        twin,
        twin.forward_for_textbook,
        batches,
        fresh(jd.IMTLL),
        network_sgd(twin.parameters()),
        tasks=NAMES,
        scalarizer_optimizer=optimizer,
    )
    model, callback = Automatic(T), Scalarization(jd.IMTLL, NAMES, optimizer=optimizer)
    states = States(callback)
    quiet_trainer(callbacks=[callback, states]).fit(model, Batches(batches))
    assert_same(states, model, hand, twin)
