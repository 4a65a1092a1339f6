"""Any aggregation through the callback is what the aggregator makes of the whole matrix of gradients, taken by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import by_hand
import lightning as L
import pytest
import torch
import torchjd.aggregation as jd
import torchjd.scalarization as js
from harness import Batches, BeforeBatch, assert_clean, seed, state_by_part, traces
from lightning.pytorch.plugins.precision import MixedPrecision
from models import (
    Automatic,
    Convolutional,
    Manual,
    Nested,
    OnlyLogs,
    WithCoefficients,
    WithDropout,
    as_inputs_and_targets,
    image_batches,
    multi_task_module,
    network_sgd,
    vector_batches,
)
from strategies import BY_HAND_OF_GRADIENTS, has_weights
from textbook import Forward
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradnorm import Aggregation
from lightning_gradnorm.strategies import DBMTL, GABA, LogSum
from lightning_gradnorm.strategies.facts import any_part

MakeTrainer = Callable[..., L.Trainer]
T, STEPS = 3, 12
NAMES = ["seg", "depth", "normal"]
EVERYWHERE = pytest.mark.parametrize("at", ["representation", "parameters"])
WITH_AND_WITHOUT_HEADS = pytest.mark.parametrize("with_heads", [True, False], ids=["heads", "no heads"])


class Halves(jd.Aggregator):
    """A user's own, which needs the matrix itself: the mean of the rows, and half of the largest in size."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        return matrix.mean(dim=0) + 0.5 * matrix.gather(0, matrix.abs().argmax(dim=0, keepdim=True))[0]


class OfTheNorms(jd.Weighting[Any]):
    """A user's own weighting of the Gramian."""

    def forward(self, gramian: Tensor, /) -> Tensor:
        return 1 / (0.1 + gramian.diagonal().sqrt())


MADE: dict[str, Callable[[], Any]] = {
    **{name: partial(make, T) for name, make in BY_HAND_OF_GRADIENTS.items()},
    "a user's own aggregator": Halves,
    "a user's own weighting": OfTheNorms,
}
AT_PARAMETERS_ALONE = {name: made for name, made in MADE.items() if any_part(made(), "averages_over_steps")}
EVERYWHERE_MADE = {name: made for name, made in MADE.items() if name not in AT_PARAMETERS_ALONE}
SHORT = ["UPGrad", "Constant", "GradDrop", "GABA", "DBMTL, no memory", "PCGrad"]


def of_the_matrix(made: Any) -> Callable[[Tensor], Tensor]:
    """What a weighting of the Gramian, or an aggregator, makes of J."""
    return (lambda J: made(J @ J.T) @ J) if isinstance(made, jd.Weighting) else made


class Weights(L.Callback):
    """Notes the weights after each optimizer step, and the norms that are logged with them."""

    def __init__(self, callback: Aggregation) -> None:
        self.callback = callback
        self.weights: list[dict[str, float]] = []
        self.norms: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step > len(self.weights):
            self.weights.append(self.callback.weights)
            shown = trainer.callback_metrics
            self.norms.append({t: shown[f"balancing/grad_norm/{t}"].item() for t in NAMES})


def worst(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert found.keys() == expected.keys()
    return max((torch.as_tensor(found[k] - expected[k]).abs().sum().item() for k in expected), default=0.0)


def assert_same(
    noted: Weights,
    model: nn.Module,
    hand: by_hand.ByHand,
    twin: nn.Module,
    tolerance: float = 1e-8,
    state: Callable[[nn.Module], dict[str, Tensor]] = state_by_part,
) -> None:
    """The network at the end, and the weights and norms after each step, are those found by hand."""
    difference = worst(state(model), state(twin))
    assert difference <= tolerance, f"the networks differ by {difference}"
    assert len(noted.weights) == len(hand.weights)
    assert max(worst(f, e) for f, e in zip(noted.norms, hand.norms, strict=True)) <= 1e-5  # logged in float32
    if noted.callback.rule.has_weights:
        differences = [worst(f, e) for f, e in zip(noted.weights, hand.weights, strict=True)]
        assert max(differences) <= 1e-6, f"the weights differ by {differences}"


def train_both(
    quiet_trainer: MakeTrainer,
    made: Callable[[], Any],
    *,
    kind: Callable[[], Any] = lambda: Automatic(T),
    batches: list[Any] | None = None,
    at: str = "representation",
    with_heads: bool = True,
    scalarizer: Callable[[], nn.Module] | None = None,
    before_batch: Callable[[int], object] = lambda index: None,
    coefficients: Any = None,
    accumulate: int = 1,
    clip: float | None = None,
    check: bool = True,
    tolerance: float = 1e-8,
    numbered: bool = False,
) -> tuple[Weights, Any]:
    batches = batches or vector_batches(T, STEPS)
    twin = kind()
    hand = by_hand.aggregate(
        twin,
        twin.forward_for_textbook,
        list(enumerate(batches)) if numbered else batches,
        of_the_matrix(made()),
        network_sgd(twin.parameters()),
        tasks=NAMES,
        at=at,
        scalarizer=None if scalarizer is None else scalarizer().double(),
        before_batch=before_batch,
        coefficients=coefficients,
        accumulate=accumulate,
        clip=clip,
    )
    torch.manual_seed(0)
    model = kind()
    callback = Aggregation(
        made(),
        NAMES,
        heads=model.heads() if with_heads else None,
        at=at,  # type: ignore[arg-type]
        scalarizer=None if scalarizer is None else scalarizer(),
    )
    noted, before = Weights(callback), traces(model)
    trainer = quiet_trainer(
        callbacks=[BeforeBatch(before_batch), callback, noted],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    trainer.fit(model, Batches(batches))
    if check:
        assert_same(noted, model, hand, twin, tolerance)
        assert callback.rule.fallbacks == 0
    assert_clean(model, before)
    return noted, model


def _some_of(names: Any) -> list[Any]:
    """All of them; those that are not `SHORT` among the slow tests."""
    return [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.filterwarnings("ignore:You are solving")  # cvxpy, of NashMTL's problem
@pytest.mark.parametrize("name", EVERYWHERE_MADE)
def test_every_aggregator_trains_as_by_hand_at_the_representation(quiet_trainer: MakeTrainer, name: str) -> None:
    noted, _ = train_both(quiet_trainer, MADE[name])
    assert noted.callback.rule.has_weights == has_weights(MADE[name]())


@pytest.mark.each_value_once
@pytest.mark.both_packages
@pytest.mark.filterwarnings("ignore:You are solving")
@pytest.mark.parametrize("name", _some_of(EVERYWHERE_MADE))
@EVERYWHERE
@WITH_AND_WITHOUT_HEADS
def test_every_aggregator_trains_as_by_hand(quiet_trainer: MakeTrainer, name: str, at: str, with_heads: bool) -> None:
    noted, _ = train_both(quiet_trainer, MADE[name], at=at, with_heads=with_heads)
    assert noted.callback.rule.has_weights == has_weights(MADE[name]())


@pytest.mark.each_value_once
@pytest.mark.parametrize("name", AT_PARAMETERS_ALONE)
@WITH_AND_WITHOUT_HEADS
def test_what_averages_gradients_over_steps_trains_as_by_hand_at_parameters(
    quiet_trainer: MakeTrainer, name: str, with_heads: bool
) -> None:
    train_both(quiet_trainer, AT_PARAMETERS_ALONE[name], at="parameters", with_heads=with_heads)


COMBINED: dict[str, tuple[Callable[[], Any], Callable[[], nn.Module], str]] = {
    "IMTL": (jd.IMTLG, lambda: js.IMTLL(T), "representation"),
    "IMTL of the parameters": (jd.IMTLG, lambda: js.IMTLL(T), "parameters"),
    "DB-MTL": (DBMTL, LogSum, "parameters"),
    "DB-MTL, no memory": (partial(DBMTL, beta=0.0), LogSum, "representation"),
    "UPGrad of uncertainty": (jd.UPGrad, lambda: js.UW(T), "representation"),
}


@pytest.mark.each_value_once
@pytest.mark.parametrize("name", COMBINED)
@WITH_AND_WITHOUT_HEADS
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_aggregation_of_a_scalarization_trains_as_by_hand(
    quiet_trainer: MakeTrainer, name: str, with_heads: bool, accumulate: int
) -> None:
    made, scalarizer, at = COMBINED[name]
    train_both(quiet_trainer, made, at=at, with_heads=with_heads, scalarizer=scalarizer, accumulate=accumulate)


# one aggregator or two in every situation -----------------------------------------------------------------------------

WITH_EVERYTHING = pytest.mark.parametrize(
    ("at", "with_heads"),
    [
        pytest.param("representation", True, id="representation, heads"),
        pytest.param("parameters", False, id="parameters, no heads"),
        pytest.param("representation", False, id="representation, no heads", marks=pytest.mark.slow),
        pytest.param("parameters", True, id="parameters, heads", marks=pytest.mark.slow),
    ],
)


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


class Regularized(Automatic):
    """`loss` has a term that is no task, on the parameters and on the representation itself."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        given = self.forward_for_textbook(batch)
        return {"loss": sum(given.losses.values()) + given.rest, **given.losses}

    def forward_for_textbook(self, batch: Any) -> Any:
        given = super().forward_for_textbook(batch)
        given.rest = 0.3 * given.representation[0].square().mean() + 0.01 * self.encoder[0].weight.square().sum()
        return given


class RegularizedNeck(Neck):
    """Both at once, so that what comes to the representation is a mixture."""

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
    """Feature maps of which one is made of the other: the gradient of each is what the heads give to it directly."""

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


@pytest.mark.parametrize("name", ["UPGrad", "ConFIG", "AlignedMTL", "GradDrop", "Constant", "DualProj"])
def test_preferences_in_single_precision_serve_a_network_in_double(quiet_trainer: MakeTrainer, name: str) -> None:
    """Numbers that both hold exactly, so that the results are the same."""
    single = torch.tensor([0.5, 0.25, 0.125])

    def made(preferences: Tensor) -> Any:
        option = "leak" if name == "GradDrop" else "weights" if name == "Constant" else "pref_vector"
        return getattr(jd, name)(**{option: preferences})

    ends = []
    for preferences in (single, single.double()):
        torch.manual_seed(0)
        model = Automatic(T)
        callback = Aggregation(made(preferences), NAMES, heads=model.heads())
        quiet_trainer(callbacks=[callback]).fit(model, Batches(vector_batches(T, 4)))
        assert callback.rule.fallbacks == 0
        ends.append(state_by_part(model))
    assert worst(*ends) <= 1e-12


@pytest.mark.parametrize("made", [jd.UPGrad, jd.MGDA, jd.IMTLG, jd.AlignedMTL, GABA])
def test_a_class_that_needs_no_arguments_is_called_without_any(quiet_trainer: MakeTrainer, made: Any) -> None:
    """The number of tasks would be taken for a preference vector, or an epsilon."""
    ends = []
    for given in (made, made()):
        model = Automatic(T)
        quiet_trainer(callbacks=[Aggregation(given, NAMES)]).fit(model, Batches(vector_batches(T, 4)))
        ends.append(state_by_part(model))
    assert worst(*ends) == 0.0


# compiled -------------------------------------------------------------------------------------------------------------


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


# mixed precision ------------------------------------------------------------------------------------------------------


class Single(Automatic):
    """The test network in single precision."""

    def __init__(self) -> None:
        super().__init__(3)
        self.float()


SINGLE = [{name: value.float() for name, value in batch.items()} for batch in vector_batches(3, 30)]


def _in_precision(quiet_trainer: MakeTrainer, made: Any, callbacks: tuple[Any, ...] = (), **options: Any) -> Weights:
    torch.manual_seed(0)
    model = Single()
    at, with_heads = options.pop("at"), options.pop("with_heads")
    callback = Aggregation(made(), NAMES, heads=model.heads() if with_heads else None, at=at)
    noted = Steps(callback)
    quiet_trainer(callbacks=[*callbacks, callback, noted], **options).fit(model, DataLoader(SINGLE, batch_size=None))
    return noted


class Steps(Weights):
    """Notes the weights after every batch, also one whose step the scaler skips, and the encoder."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.weights.append(self.callback.weights)
        self.norms.append({"encoder": pl_module.encoder[0].weight.detach().clone()})  # type: ignore[dict-item]


def _scaled(scale: float = 2.0**12) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["16-mixed with a scaler", "bf16-mixed"])
@pytest.mark.parametrize(
    "made",
    [jd.UPGrad, *(pytest.param(m, marks=pytest.mark.slow) for m in (partial(jd.NashMTL, 3), partial(GABA, warmup=2)))],
)
@WITH_EVERYTHING
@pytest.mark.filterwarnings("ignore:You are solving")
def test_mixed_precision_follows_single_precision(
    quiet_trainer: MakeTrainer, made: Any, at: str, with_heads: bool, precision: str
) -> None:
    options = {"plugins": [_scaled()]} if "scaler" in precision else {"precision": "bf16-mixed"}
    single = _in_precision(quiet_trainer, made, at=at, with_heads=with_heads)
    mixed = _in_precision(quiet_trainer, made, at=at, with_heads=with_heads, **options)
    assert mixed.callback.rule.fallbacks == 0
    tolerance = 0.03 if "scaler" in precision else 0.15
    difference = mixed.norms[-1]["encoder"] - single.norms[-1]["encoder"]
    moved = single.norms[-1]["encoder"] - single.norms[0]["encoder"]
    assert difference.norm() <= tolerance * moved.norm()


@WITH_EVERYTHING
@pytest.mark.parametrize("made", [partial(GABA, warmup=0, beta=0.5), pytest.param(jd.GradDrop, marks=pytest.mark.slow)])
def test_a_step_that_the_scaler_skips_leaves_the_network_and_is_no_fallback(
    quiet_trainer: MakeTrainer, made: Any, at: str, with_heads: bool
) -> None:
    skipped = {3, 7, 8}

    class Overflows(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx in skipped:
                pl_module.seg_head.weight.grad[0, 0] = torch.inf

    options = {"at": at, "with_heads": with_heads, "plugins": [_scaled()]}
    noted = _in_precision(quiet_trainer, made, (Overflows(),), **options)
    moved = [not torch.equal(a["encoder"], b["encoder"]) for a, b in zip(noted.norms, noted.norms[1:], strict=False)]
    assert [step + 1 for step, has_moved in enumerate(moved) if not has_moved] == sorted(skipped)
    assert noted.callback.rule.fallbacks == 0
    assert noted.norms[-1]["encoder"].isfinite().all()


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


@WITH_EVERYTHING
def test_a_scale_that_overflows_by_itself_is_lowered_and_is_no_fallback(
    quiet_trainer: MakeTrainer, at: str, with_heads: bool
) -> None:
    noted = _in_precision(quiet_trainer, jd.UPGrad, at=at, with_heads=with_heads, plugins=[_scaled(2.0**22)])
    moved = [not torch.equal(a["encoder"], b["encoder"]) for a, b in zip(noted.norms, noted.norms[1:], strict=False)]
    assert not moved[0]
    assert all(moved[10:])
    assert noted.callback.rule.fallbacks == 0
    assert noted.norms[-1]["encoder"].isfinite().all()
