"""An encoder that is frozen, for an epoch as with `BackboneFinetuning` or to the end: strategies wait and report it.

Networks that stay frozen next to the model, as in perceptual losses, do not count as shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import by_hand
import lightning as L
import pytest
import textbook
import torch
from aggregations import worst
from found import Found
from harness import Batches, Recorder, assert_agrees, assert_clean, state_by_part, traces
from lightning.pytorch.callbacks import BackboneFinetuning
from loops import Network, gradnorm_rule, train
from models import FEATURES, INPUTS, OUTPUTS, Automatic, Batch, network_sgd, vector_batches
from textbook import Forward
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd.aggregation import UPGrad
from wrong_inputs import HEADS, TASKS, MakeTrainer, fails

from lightning_gradnorm import Aggregation, GradientNormMonitor, GradNorm

TOLERANCE = 1e-9
STEPS = 6
ONES = dict.fromkeys(TASKS, 1.0)


class Frozen(Found):
    """Its trunk stays frozen until it is unfrozen; with plain gradient descent, a rate of 0 has the same effect."""

    def build(self) -> None:
        super().build()
        self.backbone = self.trunk
        del self.trunk
        self.backbone.requires_grad_(False)

    def represent(self, x: Tensor) -> Any:
        return self.backbone(x)

    def forward_for_textbook(self, batch: Batch) -> Forward:
        z = self.represent(batch["x"])
        losses = {task: F.mse_loss(self.predict(task, z), batch[task]) for task in self.tasks}
        return Forward(losses, representation=[z])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02)


class FrozenEncoder(Frozen):
    """The same with the name that is looked for where nothing can be found."""

    def build(self) -> None:
        super().build()
        self.encoder = self.backbone


class Sets(L.Callback):
    """Freezes or unfreezes the backbone in a batch; then hands it to the optimizer."""

    def __init__(self, batch: int, is_trained: bool = True) -> None:
        self.batch, self.is_trained = batch, is_trained

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            pl_module.backbone.requires_grad_(self.is_trained)
            if self.is_trained:
                trainer.optimizers[0].add_param_group({"params": list(pl_module.backbone.parameters()), "lr": 0.02})


def finetuning() -> L.Callback:
    return BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.02, lambda_func=always_the_same, should_align=False
    )


def always_the_same(epoch: int) -> float:
    return 1.0


def whole_state(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict())


WAITING = r"GradNorm: {} is frozen \(requires_grad=False\).*Nothing is balanced until it is trained.*Scalarization"
LAYER, CONTAINER = WAITING.format("shared_layer 'backbone.2'"), WAITING.format("shared_layer 'backbone'")
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing named": ({}, r"GradNorm: all .* share in Frozen\w* is frozen \(4 parameters, such as '\w+.0.weight'\)"),
    "the layer named": ({"shared_layer": "backbone.2"}, LAYER),
    "its container named": ({"shared_layer": "backbone"}, CONTAINER),
    "the heads named": ({"shared_layer": "backbone.2", "heads": HEADS}, LAYER),
    "no heads": ({"shared_layer": "backbone.2", "heads": None}, LAYER),
    "norms at the representation": (
        {"norm_of": "activation", "representation": "backbone"},
        WAITING.format("'backbone'"),
    ),
    "norms at the representation, and heads": (
        {"norm_of": "activation", "representation": "backbone", "heads": HEADS},
        WAITING.format("'backbone'"),
    ),
}


@pytest.mark.each_value_once
@pytest.mark.parametrize("kind", [Frozen, FrozenEncoder])
@pytest.mark.parametrize(
    ("unfreeze", "epochs", "at"),
    [(partial(Sets, 2), 1, 2), (finetuning, 2, STEPS)],
    ids=["by a callback", "by BackboneFinetuning"],
)
@pytest.mark.parametrize("how", OPTIONS)
def test_weights_wait_until_something_shared_is_trained(
    how: str,
    unfreeze: Callable[[], L.Callback],
    epochs: int,
    at: int,
    kind: type[Frozen],
    quiet_trainer: MakeTrainer,
) -> None:
    batches, model, twin = vector_batches(3, STEPS), kind(3), kind(3)
    options, expected = OPTIONS[how]
    gradnorm, before = GradNorm(TASKS, **options), traces(model)
    recorder = Recorder(gradnorm)
    with pytest.warns(UserWarning, match=expected) as warned:
        quiet_trainer(callbacks=[unfreeze(), gradnorm, recorder], max_epochs=epochs).fit(model, Batches(batches))
    assert len([one for one in warned if "GradNorm" in str(one.message)]) == 1
    assert_clean(model, before)

    backbone, rest = list(twin.backbone.parameters()), [p for p in twin.parameters() if p.requires_grad]
    twin.backbone.requires_grad_(True)
    sgd = torch.optim.SGD([{"params": backbone, "lr": 0.0}, {"params": rest}], lr=0.02)

    def thaw(micro_batch: int) -> None:
        sgd.param_groups[0]["lr"] = 0.02 if micro_batch >= at else 0.0

    trajectory = textbook.train(
        twin,
        twin.forward_for_textbook,
        batches * epochs,
        [twin.backbone[2].weight],
        sgd,
        before_micro_batch=thaw,
        skip_steps=range(at),
        norm_of=options.get("norm_of", "weight"),
    )
    assert recorder.weights[:at] == [ONES] * at
    assert recorder.weights[at] != recorder.weights[0]
    assert_agrees(recorder, model, trajectory, twin, tolerance=TOLERANCE, state=whole_state)
    if "norm_of" not in options:
        assert f"W = {'encoder' if kind is FrozenEncoder else 'backbone'}.2.weight (" in repr(gradnorm) or (
            "W = backbone.2.weight (" in repr(gradnorm)
        )


@pytest.mark.filterwarnings("ignore:GradNorm. .* is frozen")
@pytest.mark.parametrize("how", [how for how in OPTIONS if how != "nothing named"])
def test_a_layer_that_stays_frozen_leaves_a_training_without_weights(how: str, quiet_trainer: MakeTrainer) -> None:
    gradnorm, found = GradNorm(TASKS, **OPTIONS[how][0]), []
    for callbacks in ([gradnorm], []):
        model = Frozen(3)
        quiet_trainer(callbacks=callbacks).fit(model, Batches(vector_batches(3, STEPS)))
        found.append(whole_state(model))
    assert gradnorm.weights == ONES
    assert all(torch.equal(one, other) for one, other in zip(found[0].values(), found[1].values(), strict=True))


@pytest.mark.parametrize("how", [how for how in OPTIONS if how != "nothing named"])
def test_a_layer_that_is_frozen_after_norms_were_taken_is_an_error(how: str, quiet_trainer: MakeTrainer) -> None:
    model = Frozen(3)
    model.backbone.requires_grad_(True)
    what = "'backbone'" if "norm_of" in OPTIONS[how][0] else "the shared layer"
    callbacks = [Sets(2, is_trained=False), GradNorm(TASKS, **OPTIONS[how][0])]
    fails(quiet_trainer, model, callbacks, f"GradNorm: {what} has been frozen", "during training", "stop_after")


@pytest.mark.parametrize("stage", ["before", "after"])
def test_a_layer_may_be_frozen_once_stop_after_has_passed(stage: str, quiet_trainer: MakeTrainer) -> None:
    model = Frozen(3)
    model.backbone.requires_grad_(True)
    gradnorm = GradNorm(TASKS, shared_layer="backbone.2", stop_after=2 if stage == "after" else 3)
    callbacks = [Sets(2, is_trained=False), gradnorm]
    if stage == "before":
        fails(quiet_trainer, model, callbacks, "stop_after")
    else:
        quiet_trainer(callbacks=callbacks).fit(model, Batches(vector_batches(3, STEPS)))


@pytest.mark.filterwarnings("ignore:Balancer. .* is frozen")
@pytest.mark.parametrize("options", [{}, {"shared_layer": "encoder.2"}, {"norm_of": "activation"}], ids=str)
def test_a_balancer_waits_too(options: dict[str, Any]) -> None:
    model = Network(3)
    model.encoder.requires_grad_(False)
    seen = iter(range(STEPS))

    def step(balancer: Any, batch: Batch) -> None:
        balancer.step()
        if next(seen) == 2:
            model.encoder.requires_grad_(True)

    weights, _ = train(model, gradnorm_rule(), vector_batches(3, STEPS), step=step, **options)
    assert weights[:3] == [ONES] * 3
    assert all(one != other for one, other in itertools.pairwise(weights[2:]))


# ---- other strategies ------------------------------------------------------------------------------------------------


class Backbone(Automatic):
    """An encoder that is also called backbone, frozen or not."""

    def __init__(self, is_frozen: bool) -> None:
        super().__init__(3)
        self.backbone = self.encoder
        self.backbone.requires_grad_(not is_frozen)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02)


@pytest.mark.parametrize("at", ["representation", "parameters"])
@pytest.mark.parametrize("heads", ["auto", HEADS, None], ids=["found", "named", "none"])
@pytest.mark.parametrize("frozen", ["at first", "at last"])
def test_an_aggregation_trains_the_heads_alone_as_long_as_the_encoder_is_frozen(
    frozen: str, heads: Any, at: Any, quiet_trainer: MakeTrainer
) -> None:
    batches, model, twin = vector_batches(3, STEPS), Backbone(frozen == "at first"), Backbone(False)
    aggregation = Aggregation(UPGrad(), TASKS, heads=heads, at=at)
    says = {
        "representation": r"Aggregation: 'encoder' is frozen .*name a representation that is trained",
        "parameters": r"Aggregation: what the tasks share is frozen .*If it is to stay frozen, balance by the losses alone",
    }
    with pytest.warns(UserWarning, match=says[at]):
        quiet_trainer(callbacks=[Sets(3, frozen == "at first"), aggregation]).fit(model, Batches(batches))
    sgd = torch.optim.SGD(
        [{"params": twin.backbone.parameters(), "lr": 0.0}]
        + [{"params": twin.get_submodule(head).parameters()} for head in HEADS.values()],
        lr=0.02,
    )

    def thaw(batch: int) -> None:
        sgd.param_groups[0]["lr"] = 0.02 if (batch >= 3) == (frozen == "at first") else 0.0

    options = {"tasks": TASKS, "at": at, "before_batch": thaw}
    by_hand.aggregate(twin, twin.forward_for_textbook, batches, UPGrad(), sgd, **options)
    assert worst(state_by_part(model), state_by_part(twin)) <= 1e-8


def test_the_monitor_measures_from_when_something_shared_is_trained(quiet_trainer: MakeTrainer) -> None:
    model = Backbone(True)
    monitor = GradientNormMonitor(TASKS, every_n_steps=1)
    quiet_trainer(callbacks=[Sets(4), monitor]).fit(model, Batches(vector_batches(3, STEPS)))
    assert monitor.summary().startswith("GradientNormMonitor, 2 measured steps: ")
    assert monitor.last is not None
    assert all(norm > 0 for norm in monitor.last.values())


# ---- networks beside the model ---------------------------------------------------------------------------------------


class Apart(Found):
    """Each task has its own network; the losses compare outputs of a frozen network or of a teacher."""

    def __init__(self, side: str) -> None:
        self.side = side
        super().__init__(3)

    def build(self) -> None:
        super().build()
        del self.trunk
        for task in self.tasks:
            network = nn.Sequential(nn.Linear(INPUTS, FEATURES), nn.Tanh(), nn.Linear(FEATURES, OUTPUTS))
            setattr(self, f"{task}_head", network)
        self.beside = nn.Sequential(nn.Linear(OUTPUTS, 4), nn.Tanh(), nn.Linear(4, 4)).requires_grad_(False)

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        y = {task: self.predict(task, batch["x"]) for task in self.tasks}
        losses = {task: F.mse_loss(y[task], batch[task]) for task in self.tasks}
        if self.side == "teacher":
            with torch.no_grad():
                said = self.beside(batch["seg"])
            losses["seg"] = losses["seg"] + F.mse_loss(torch.cat([y["seg"], y["seg"][:, :1]], 1), said)
        else:
            losses["seg"] = losses["seg"] + F.mse_loss(self.beside(y["seg"]), self.beside(batch["seg"]))
        return losses


@pytest.mark.parametrize("side", ["perceptual loss", "teacher"])
def test_a_frozen_network_next_to_the_model_does_not_count_as_shared(side: str, quiet_trainer: MakeTrainer) -> None:
    expected = "GradNorm: shared_layer=None found no layer", "share no trained weight", "Scalarization"
    fails(quiet_trainer, Apart(side), GradNorm(TASKS), *expected)


class Perceptual(Found):
    """A trunk that is trained, and a frozen network that one task's loss passes."""

    def build(self) -> None:
        super().build()
        self.beside = nn.Sequential(nn.Linear(OUTPUTS, 4), nn.Tanh(), nn.Linear(4, 4)).requires_grad_(False)

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        z = self.represent(batch["x"])
        y = {task: self.predict(task, z) for task in self.tasks}
        losses = {task: F.mse_loss(y[task], batch[task]) for task in self.tasks}
        return losses | {"seg": F.mse_loss(self.beside(y["seg"]), self.beside(batch["seg"]))}


def test_a_perceptual_loss_is_balanced_at_the_layer_that_is_shared(quiet_trainer: MakeTrainer) -> None:
    batches, model, twin = vector_batches(3, STEPS), Perceptual(3), Perceptual(3)
    gradnorm = GradNorm(TASKS)
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    W = [twin.get_parameter("trunk.2.weight")]
    trajectory = textbook.train(twin, twin.forward_for_textbook, batches, W, network_sgd(twin.parameters()))
    assert_agrees(recorder, model, trajectory, twin, tolerance=TOLERANCE, state=whole_state)
