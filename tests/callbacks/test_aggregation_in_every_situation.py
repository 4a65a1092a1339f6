"""With any network, in any kind of module, `Aggregation` trains as by hand."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import by_hand
import lightning as L
import pytest
import torch
import torchjd.aggregation as jd
from aggregations import (
    EVERYWHERE,
    NAMES,
    STEPS,
    WITH_EVERYTHING,
    MakeTrainer,
    T,
    Weights,
    train_both,
    worst,
)
from harness import Batches, assert_clean, seed, state_by_part, traces
from models import (
    Automatic,
    Convolutional,
    Manual,
    Nested,
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
from textbook import Forward
from torch import Tensor, nn

from lightning_gradnorm import Aggregation


class Neck(Automatic):
    """Between the encoder and the heads are a relu, a flatten and a layer that all tasks share."""

    def build(self) -> None:
        super().build()
        self.neck = nn.Linear(6, 6)

    def forward_for_textbook(self, batch: Any) -> Any:
        given = super().forward_for_textbook(batch)
        z = given.representation[0]
        read = self.neck(torch.relu(z).unsqueeze(1).flatten(1))
        for task in self.tasks:
            given.losses[task] = nn.functional.mse_loss(getattr(self, f"{task}_head")(read), batch[task])
        return given

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        read = self.neck(torch.relu(self.encoder(batch["x"])).unsqueeze(1).flatten(1))
        return {t: nn.functional.mse_loss(getattr(self, f"{t}_head")(read), batch[t]) for t in self.tasks}


class RegularizedNeck(Neck):
    """Both at once, so the representation receives a mixture."""

    training_step = Regularized.training_step

    def forward_for_textbook(self, batch: Any) -> Any:
        given = super().forward_for_textbook(batch)
        given.rest = 0.3 * given.representation[0].square().mean() + 0.1 * self.neck.weight.square().sum()
        return given


class Twice(Automatic):
    """A head is called twice."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = self.forward_for_textbook(batch).losses
        return {"loss": sum(losses.values()), **losses}

    def forward_for_textbook(self, batch: Any) -> Any:
        given = super().forward_for_textbook(batch)
        again = self.seg_head(given.representation[0].flip(0))
        given.losses["seg"] = given.losses["seg"] + nn.functional.mse_loss(again, batch["seg"])
        return given


class Checkpointed(Automatic):
    """The encoder's activations are computed again in backward."""

    def build(self) -> None:
        super().build()
        self.encoder = Again(*self.encoder)


class Again(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Maps(Nested):
    """Two feature maps, one computed from the other: the gradient of each is what the heads give to it directly."""

    def forward_for_textbook(self, batch: Any) -> Any:
        z = self.encoder(batch["x"])
        own = [map.view_as(map) for map in (z.values() if isinstance(z, dict) else z)]
        read = dict(zip(z, own, strict=True)) if isinstance(z, dict) else tuple(own)
        losses = {t: nn.functional.mse_loss(getattr(self, f"{t}_head")(read), batch[t]) for t in self.tasks}
        return Forward(losses, representation=own)


class Late(Automatic):
    """Tasks come and go: `present` has those of each batch."""

    present: ClassVar[list[list[str]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        losses = self.forward_for_textbook((batch_idx, batch)).losses
        return {"loss": sum(losses.values()), **dict.fromkeys(NAMES), **losses}

    def forward_for_textbook(self, numbered: Any) -> Any:
        number, batch = numbered
        given = super().forward_for_textbook(batch)
        given.losses = {t: given.losses[t] for t in NAMES if t in self.present[number]}
        return given


class ComingAndGoing(Late):
    present = [["seg"], ["seg", "depth"], ["depth"], NAMES, NAMES, ["seg", "normal"], NAMES, ["normal"]] + [NAMES] * 4


class Skipping(Late):
    """A layer of the trunk is left out of the first batches, as stochastic depth does."""

    present = [NAMES] * STEPS

    def build(self) -> None:
        super().build()
        self.encoder = MayStop(*self.encoder, nn.Linear(6, 6))

    def forward_for_textbook(self, numbered: Any) -> Any:
        self.encoder.stop = numbered[0] % 3 < 2
        return super().forward_for_textbook(numbered)


class MayStop(nn.Sequential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.stop = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self)[: 4 if self.stop else 5]:
            x = layer(x)
        return x


SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two batches to a step": {"accumulate": 2},
    "four batches to a step": {"accumulate": 4},
    "an incomplete last step": {"accumulate": 4, "batches": vector_batches(T, 10)},
    "coefficients and a regularizer of the parameters": {
        "kind": WithCoefficients,
        "coefficients": WithCoefficients.coefficients,
    },
    "a regularizer of the representation": {"kind": Regularized},
    "a regularizer, two batches to a step": {"kind": Regularized, "accumulate": 2},
    "a shared layer between encoder and heads": {"kind": Neck},
    "a shared layer and a regularizer": {"kind": RegularizedNeck},
    "a shared layer, two batches to a step": {"kind": RegularizedNeck, "accumulate": 2},
    "a dict of feature maps": {"kind": partial(Maps, container=dict)},
    "a tuple of feature maps": {"kind": partial(Maps, container=tuple)},
    "BatchNorm": {"kind": Convolutional, "batches": image_batches(T, STEPS)},
    "Dropout": {"kind": WithDropout, "before_batch": seed},
    "Dropout, two batches to a step": {"kind": WithDropout, "before_batch": seed, "accumulate": 2},
    "activation checkpointing": {"kind": Checkpointed},
    "a head called twice": {"kind": Twice},
    "gradient clipping": {"clip": 0.05},
    "tasks that come and go": {"kind": ComingAndGoing, "numbered": True},
    "tasks that come and go, two batches to a step": {"kind": ComingAndGoing, "numbered": True, "accumulate": 2},
    "a layer that is left out at times": {"kind": Skipping, "numbered": True},
    "a layer that is left out at times, two batches": {"kind": Skipping, "numbered": True, "accumulate": 2},
}


@pytest.mark.each_value_once
@pytest.mark.both_packages
@pytest.mark.parametrize("name", SITUATIONS)
@WITH_EVERYTHING
def test_it_trains_as_by_hand_with(quiet_trainer: MakeTrainer, name: str, at: str, with_heads: bool) -> None:
    options = {"kind": lambda: Automatic(T), **SITUATIONS[name]}
    if options["kind"] is not SITUATIONS["plain"].get("kind") and "kind" in SITUATIONS[name]:
        options["kind"] = partial(SITUATIONS[name]["kind"], T)
    if "come and go" in name and at == "parameters" and not with_heads:
        options["norms_from"] = 1  # after the first batch, of one task alone, nothing says what it will share
    train_both(quiet_trainer, jd.UPGrad, at=at, with_heads=with_heads, **options)


@pytest.mark.each_value_once
@pytest.mark.both_packages
@pytest.mark.parametrize("how", ["manual", "MultiTaskModule", "logged"])
@WITH_EVERYTHING
def test_it_trains_as_by_hand_in_every_kind_of_module(
    quiet_trainer: MakeTrainer, how: str, at: str, with_heads: bool
) -> None:
    batches: list[Any] = vector_batches(T, STEPS)
    twin = Automatic(T)
    hand = by_hand.aggregate(
        twin,
        twin.forward_for_textbook,
        batches,
        jd.UPGrad(),
        network_sgd(twin.parameters()),
        tasks=NAMES,
        at=at,
        accumulate=2,
    )
    model: L.LightningModule
    tasks: Any = NAMES
    options: dict[str, Any] = {}
    heads: Any = Automatic(T).heads()
    if how == "manual":
        model = Manual(T, accumulate=2)
    elif how == "logged":
        model = OnlyLogs(T)
        tasks, options = model.logged_names(), {"accumulate_grad_batches": 2}
    else:
        model, tasks, batches = multi_task_module(T, accumulate_grad_batches=2), None, as_inputs_and_targets(batches)
        heads = None
    callback = Aggregation(jd.UPGrad(), tasks, heads=heads if with_heads else None, at=at)  # type: ignore[arg-type]
    if isinstance(model, Manual):
        model.gradnorm = [callback]  # type: ignore[list-item]
    noted, before = Weights(callback), traces(model)
    quiet_trainer(callbacks=[callback, noted], **options).fit(model, Batches(batches))
    difference = worst(state_by_part(model), state_by_part(twin))
    assert difference <= 1e-8, f"the networks differ by {difference}"
    assert max(worst(f, e) for f, e in zip(noted.weights, hand.weights, strict=True)) <= 1e-6
    assert_clean(model, before)


class Parameterless(Automatic):
    """Frozen at first, as BackboneFinetuning has it: the first layer is trained from the seventh batch on."""

    def build(self) -> None:
        super().build()
        self.encoder[0].requires_grad_(False)


class Thaws(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 6:
            pl_module.encoder[0].requires_grad_(True)


@pytest.mark.parametrize("at", ["representation", "parameters"])
def test_a_layer_that_is_unfrozen_in_mid_training_is_trained_from_then_on(quiet_trainer: MakeTrainer, at: str) -> None:
    batches = vector_batches(T, STEPS)
    twin = Parameterless(T)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.02, momentum=0.9)
    options = {"tasks": NAMES, "at": at}
    for thawed, part in ((False, batches[:6]), (True, batches[6:])):
        twin.encoder[0].requires_grad_(thawed)
        by_hand.aggregate(twin, twin.forward_for_textbook, part, jd.UPGrad(), optimizer, **options)
    model = Parameterless(T)
    callback = Aggregation(jd.UPGrad(), NAMES, heads=model.heads(), at=at)  # type: ignore[arg-type]
    quiet_trainer(callbacks=[Thaws(), callback]).fit(model, Batches(batches))
    assert not torch.equal(model.encoder[0].weight, Parameterless(T).encoder[0].weight)
    assert worst(state_by_part(model), state_by_part(twin)) <= 1e-8


@pytest.mark.each_value_once
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize(
    "what", [("encoder",), tuple(f"{t}_head" for t in NAMES), ("encoder", *(f"{t}_head" for t in NAMES))]
)
@EVERYWHERE
def test_a_compiled_encoder_and_compiled_heads_train_as_by_hand(
    quiet_trainer: MakeTrainer, what: tuple[str, ...], at: str
) -> None:
    torch.compiler.reset()
    batches = vector_batches(T, STEPS)
    twin = Automatic(T)
    hand = by_hand.aggregate(
        twin, twin.forward_for_textbook, batches, jd.UPGrad(), network_sgd(twin.parameters()), tasks=NAMES, at=at
    )
    model = Automatic(T)
    for name in what:
        setattr(model, name, torch.compile(getattr(model, name), backend="aot_eager"))
    callback = Aggregation(jd.UPGrad(), NAMES, heads=model.heads(), at=at)  # type: ignore[arg-type]
    noted = Weights(callback)
    if at == "parameters" and "encoder" in what:
        with pytest.raises(ValueError, match=r"at='parameters' .* compiled with torch\.compile.*at='representation'"):
            quiet_trainer(callbacks=[callback, noted]).fit(model, Batches(batches))
        return
    quiet_trainer(callbacks=[callback, noted]).fit(model, Batches(batches))
    found = {name.replace("_orig_mod.", ""): value for name, value in state_by_part(model).items()}
    assert worst(found, state_by_part(twin)) <= 1e-8
    assert max(worst(f, e) for f, e in zip(noted.weights, hand.weights, strict=True)) <= 1e-6


class ReentrantlyCheckpointed(Automatic):
    def build(self) -> None:
        super().build()
        self.encoder = AgainReentrantly(*self.encoder)

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        return super().task_losses({**batch, "x": batch["x"].clone().requires_grad_()})


class AgainReentrantly(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=True)


def test_a_reentrant_checkpoint_is_passed_once_but_not_once_for_each_task(quiet_trainer: MakeTrainer) -> None:
    batches, ends = vector_batches(T, STEPS), []
    for kind in (Automatic, ReentrantlyCheckpointed):
        model = kind(T)
        quiet_trainer(callbacks=[Aggregation(jd.UPGrad(), NAMES, heads=model.heads())]).fit(model, Batches(batches))
        ends.append(state_by_part(model))
    assert worst(*ends) <= 1e-12
    model = ReentrantlyCheckpointed(T)
    with pytest.raises(ValueError, match=r"at='parameters' .*use_reentrant=False.*at='representation'"):
        quiet_trainer(callbacks=[Aggregation(jd.UPGrad(), NAMES, at="parameters")]).fit(model, Batches(batches))
