"""An unusable strategy is an error with a reason; one that fails during training is replaced in that step, with a warning."""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torchjd._mixins
import torchjd.aggregation as jd
import torchjd.scalarization as js
from harness import Batches, MemoryLogger, assert_clean, assert_says, case, traces
from models import Automatic, Manual, vector_batches
from torch import Tensor, nn

from lightning_gradnorm import Aggregation, FixedWeights, GradNorm, Scalarization
from lightning_gradnorm.strategies import AMNL, DBMTL, GABA, SLAW, UWSO, ReLoBRaLo, SoftAdapt, Uncertainty

MakeTrainer = Callable[..., L.Trainer]
T, STEPS = 3, 12
NAMES = ["seg", "depth", "normal"]
HEADS = {task: f"{task}_head" for task in NAMES}


class Odd(nn.Module):
    """A user's scalarizer with a mistake in it."""

    def __init__(self, mistake: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.mistake = mistake

    def forward(self, values: Tensor) -> Any:
        return self.mistake(values)


class OddAggregator(jd.Aggregator):
    def __init__(self, mistake: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.mistake = mistake

    def forward(self, matrix: Tensor, /) -> Any:
        return self.mistake(matrix)


class OddWeighting(jd.Weighting[Any]):
    def __init__(self, mistake: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.mistake = mistake

    def forward(self, gramian: Tensor, /) -> Any:
        return self.mistake(gramian)


def raises(values: Tensor) -> Any:
    raise RuntimeError("the solver gave up")


def fails(
    quiet_trainer: MakeTrainer,
    callback: Callable[[], Any],
    *expected: str,
    model: Automatic | None = None,
    error: Any = (ValueError, TypeError),
    batches: int = 4,
) -> None:
    model = model or Automatic(T)
    before = traces(model)

    def fit() -> None:
        made = callback()
        trainer = quiet_trainer(callbacks=made if isinstance(made, list) else [made])
        trainer.fit(model, Batches(vector_batches(T, batches)))

    with pytest.raises(error) as raised:
        fit()
    assert_says(raised.value, *expected)
    assert_clean(model, before)


def scalarization(scalarizer: Any, **options: Any) -> Callable[[], Scalarization]:
    return lambda: Scalarization(scalarizer, NAMES, **options)


def aggregation(aggregator: Any, **options: Any) -> Callable[[], Aggregation]:
    return lambda: Aggregation(aggregator, NAMES, **{"heads": HEADS, **options})


VECTOR = torch.tensor([0.5, 0.5])
AT_THE_START = [
    case("a scalarizer that returns a vector", scalarization(Odd(lambda L: L)), "Odd", "3 losses of 1", "scalar", "(3,)"),
    case("a scalarizer that returns a float", scalarization(Odd(lambda L: 1.0)), "Odd", "scalar tensor", "float"),
    case("a scalarizer that returns None", scalarization(Odd(lambda L: None)), "scalar tensor", "NoneType"),
    case("a scalarizer that returns NaN", scalarization(Odd(lambda L: L.sum() * math.nan)), "finite number", "nan"),
    case("a scalarizer whose slope is infinite", scalarization(Odd(lambda L: (L - 1).sum().sqrt())), "finite", "inf"),
    case("a scalarizer that returns a constant", scalarization(Odd(lambda L: torch.ones(()))), "depends on the losses"),
    case("a scalarizer that detaches", scalarization(Odd(lambda L: L.detach().sum())), "depends on the losses"),
    case("a scalarizer that raises", scalarization(Odd(raises)), "Odd", "failed: the solver gave up"),
    case("UW for two tasks", scalarization(js.UW(2)), "UW", "3 losses", "(2,)"),
    case("PBI with two preferences", scalarization(js.PBI(5.0, VECTOR)), "PBI", "weights", "2"),
    case("Uncertainty of a task that is misspelt", scalarization(Uncertainty(["dept"])), "'dept'", "did you mean 'depth'"),
    case("AMNL with a weight too few", scalarization(AMNL(weights={"seg": 0.5, "depth": 0.5})), "['normal'] are missing"),
    case("a scalarizer that is a number", scalarization(1.5), "scalarizer should be a module", "1.5"),
    case("a scalarizer that is None", scalarization(None), "scalarizer should be a module", "None"),
    case("what makes no module", scalarization(lambda T: T), "scalarizer should be a module", "got 3"),
    case("a class that needs more than T", scalarization(js.PBI), "PBI", "needs theta and weights", "partial(PBI"),
    case("a class that needs something else than T", scalarization(js.STCH), "STCH", "needs mu", "STCH(mu=…)"),
    case("an aggregator as scalarizer", scalarization(jd.UPGrad()), "UPGrad", "Use Aggregation(UPGrad(…)"),
    case("a weighting as scalarizer", scalarization(GABA), "GABA", "Use Aggregation(GABA(…)"),
    case("an optimizer already made", scalarization(js.UW, optimizer=torch.optim.SGD([torch.ones(1)])), "optimizer", "partial"),
    case("a scalarizer as aggregator", aggregation(js.Mean()), "aggregator", "Mean", "is a Scalarization"),
    case("what makes a scalarizer as aggregator", aggregation(js.UW), "aggregator", "UW", "is a Scalarization"),
    case("an aggregator that is a string", aggregation("UPGrad"), "aggregator should be a module", "'UPGrad'"),
    case("an aggregator that raises", aggregation(OddAggregator(raises)), "OddAggregator", "the solver gave up"),
    case("an aggregator that returns NaN", aggregation(OddAggregator(lambda J: J[0] * math.nan)), "finite", "nan"),
    case("an aggregator that returns a matrix", aggregation(OddAggregator(lambda J: J)), "OddAggregator", "6 finite"),
    case("a weighting that returns NaN", aggregation(OddWeighting(lambda G: G[0] / 0 - 1)), "OddWeighting", "3 finite"),
    case("a weighting of the wrong length", aggregation(OddWeighting(lambda G: G[0][:2])), "OddWeighting", "3 finite"),
    case("a weighting that returns a list", aggregation(OddWeighting(lambda G: [1.0] * 3)), "OddWeighting", "list"),
    case("NashMTL for two tasks", aggregation(jd.NashMTL(2)), "NashMTL", "3 tasks", "failed"),
    case("UPGrad with two preferences", aggregation(jd.UPGrad(VECTOR)), "UPGrad", "3 tasks", "failed"),
    case("Constant with two weights", aggregation(jd.Constant(VECTOR)), "Constant", "3 tasks", "failed"),
    case("GradDrop with two leaks", aggregation(jd.GradDrop(leak=VECTOR)), "GradDrop", "3 tasks", "failed"),
    case("Krum for too few tasks", aggregation(jd.Krum(2)), "Krum", "at least 5 rows"),
    case("TrimmedMean of too few tasks", aggregation(jd.TrimmedMean(2)), "TrimmedMean", "3 tasks", "failed"),
    case("CAGrad without its c", aggregation(jd.CAGrad), "CAGrad", "needs c", "CAGrad(c=…)"),
    case("GABA with a floor too high", aggregation(GABA(floor=0.4)), "GABA", "0.4"),
    case("SDMGrad", aggregation(jd.SDMGradWeighting()), "two independent batches", "MGDA"),
    case("MoDo", aggregation(jd.MoDoWeighting()), "two independent batches", "MGDA"),
    case("ExcessMTL at the representation", aggregation(jd.ExcessMTL()), "ExcessMTL", "at='parameters'"),
    case("DBMTL at the representation", aggregation(DBMTL()), "DBMTL", "at='parameters'"),
    case("at is misspelt", aggregation(jd.UPGrad(), at="params"), "at should be", "'parameters'", "'params'"),
    case("the representation is misspelt", aggregation(jd.UPGrad(), representation="encodr"), "representation", "'encoder'"),
    case("the representation is a module", aggregation(jd.UPGrad(), representation=nn.ReLU()), "dotted name", "ReLU"),
    case("a head is misspelt", aggregation(jd.UPGrad(), heads=HEADS | {"seg": "sge_head"}), "'sge_head'", "'seg_head'"),
    case("heads lack a task", aggregation(jd.UPGrad(), heads={"seg": "seg_head"}), "heads", "depth"),
    case("a wrong scalarizer of an aggregation", aggregation(jd.UPGrad(), scalarizer=js.UW(2)), "UW", "(2,)"),
    case("an aggregator as its scalarizer", aggregation(jd.UPGrad(), scalarizer=jd.MGDA()), "scalarizer", "MGDA"),
]  # fmt: skip


@pytest.mark.parametrize(("callback", "expected"), [
    pytest.param(row.values[0], row.values[1:], id=row.id) for row in AT_THE_START
])  # fmt: skip
def test_an_unusable_strategy_is_an_error_before_the_first_step(quiet_trainer: MakeTrainer, callback, expected) -> None:
    fails(quiet_trainer, callback, *expected)


# the model -----------------------------------------------------------------------------------------------------------


class CallsTwice(Automatic):
    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        self.encoder(batch["x"] * 2)
        return super().task_losses(batch)


class InPlace(Automatic):
    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        z = self.encoder(batch["x"]).relu_()
        return {t: nn.functional.mse_loss(getattr(self, f"{t}_head")(z), batch[t]) for t in self.tasks}


class Around(Automatic):
    """One loss does not pass the representation."""

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        losses = super().task_losses(batch)
        return {**losses, "seg": self.seg_head.weight.square().sum()}


def every_balancing_callback() -> dict[str, Callable[[], L.Callback]]:
    return {
        "GradNorm": lambda: GradNorm(NAMES),
        "FixedWeights": lambda: FixedWeights(dict.fromkeys(NAMES, 1.0)),
        "Scalarization": scalarization(js.UW),
        "Aggregation": aggregation(jd.UPGrad()),
    }


def test_an_encoder_that_is_called_twice_is_refused(quiet_trainer: MakeTrainer) -> None:
    fails(
        quiet_trainer, aggregation(jd.UPGrad()), "'encoder' is called more than once", "torch.cat", model=CallsTwice(T)
    )


@pytest.mark.parametrize("heads", [HEADS, None])
def test_a_representation_that_is_changed_in_place_is_refused(quiet_trainer: MakeTrainer, heads: Any) -> None:
    callback = lambda: Aggregation(jd.UPGrad(), NAMES, heads=heads)  # noqa: E731
    fails(quiet_trainer, callback, "Aggregation", "changed in place", "relu(z)", model=InPlace(T))


@pytest.mark.parametrize(
    ("at", "says"),
    [
        ("representation", ["'seg' does not depend on 'encoder'"]),
        (
            "parameters",
            ["task 'seg' shares no trained parameter with the others, ['depth', 'normal']", "Scalarization"],
        ),
    ],
)
def test_a_loss_that_does_not_reach_the_shared_layer_is_an_error(
    quiet_trainer: MakeTrainer, at: str, says: list[str]
) -> None:
    fails(quiet_trainer, aggregation(jd.UPGrad(), at=at), *says, model=Around(T))


def test_famo_with_manual_optimization_is_refused(quiet_trainer: MakeTrainer) -> None:
    fails(quiet_trainer, scalarization(js.FAMO), "FAMO", "optimizes manually", "MultiTaskModule", model=Manual(T))


@pytest.mark.parametrize("second", every_balancing_callback())
@pytest.mark.parametrize("first", every_balancing_callback())
def test_any_two_balancing_callbacks_are_refused(quiet_trainer: MakeTrainer, first: str, second: str) -> None:
    made = every_balancing_callback()
    if first == second:  # Lightning's own error, when the Trainer is made
        with pytest.raises(RuntimeError, match=f"more than one stateful callback of type `{first}`"):
            quiet_trainer(callbacks=[made[first](), made[second]()])
        return
    fails(quiet_trainer, lambda: [made[first](), made[second]()], "one balancing callback", first, second, "Remove one")


# a solver that is not installed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "lacks", "instead"),
    [
        (jd.UPGrad, "quadprog", "UPGrad or lightning_gradnorm.strategies.DualProj"),
        (jd.DualProj, "qpsolvers", "UPGrad or lightning_gradnorm.strategies.DualProj"),
        (jd.NashMTL, "ecos", "NashMTL"),
        (partial(jd.CAGrad, c=0.5), "clarabel", "CAGrad"),
        (partial(jd.FairGrad, alpha=1.0), "scipy", "FairGrad"),
    ],
)
def test_the_error_for_a_missing_solver_names_it_how_to_install_it_and_what_needs_none(
    quiet_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, made: Any, lacks: str, instead: str
) -> None:
    def find_spec(name: str) -> Any:
        return None if name == lacks else importlib.util.find_spec(name)

    monkeypatch.setattr(torchjd._mixins, "find_spec", find_spec)
    hint = f", or use lightning_gradnorm.strategies.{instead}, which needs none."
    expected = ("Aggregation: aggregator", lacks, f'pip install "lightning-gradnorm[solvers]"{hint}')
    fails(quiet_trainer, aggregation(made), *expected, error=ModuleNotFoundError)


def test_an_import_error_of_another_package_is_passed_on(quiet_trainer: MakeTrainer) -> None:
    def made(T: int) -> nn.Module:
        raise ImportError("no such thing as unicorns")

    fails(quiet_trainer, aggregation(made), "no such thing as unicorns", error=ImportError)


# in mid-training ------------------------------------------------------------------------------------------------------


def sometimes(right: Callable[[Tensor], Any], wrong: Callable[[Tensor], Any], at: set[int]) -> Callable[[Tensor], Any]:
    """Works correctly except in the calls in ``at``; the trial before the first step does not count as a call."""
    calls = itertools.count(-1)

    def call(values: Tensor) -> Any:
        return (wrong if next(calls) in at else right)(values)

    return call


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "raises": raises,
    "returns NaN": lambda values: values.sum() * math.nan if values.ndim == 1 else values[0] * math.nan,
    "has the wrong shape": lambda values: torch.ones(7),
}
WRONG_AT = {3, 4, 8}


class Guarded(Automatic):
    """What a user does against losses that are not finite: the gradients are put right before the step."""

    wrong_batches: tuple[int, ...] = ()
    value = math.nan

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = self.task_losses(batch)
        if batch_idx in self.wrong_batches:
            losses["depth"] = losses["depth"] * self.value
        return {"loss": sum(losses.values()), **losses}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


def train(
    quiet_trainer: MakeTrainer, callback: Any, model: Automatic, **options: Any
) -> tuple[MemoryLogger, list[str]]:
    logger = MemoryLogger()
    before = traces(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(callbacks=[callback], logger=logger, **options).fit(model, Batches(vector_batches(T, STEPS)))
    assert_clean(model, before)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return logger, [str(w.message) for w in caught if "usable weights" in str(w.message)]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("what", ["aggregator", "weighting"])
@pytest.mark.parametrize("at", ["representation", "parameters"])
def test_an_aggregator_that_fails_in_mid_training_is_bridged_by_equal_weights(
    quiet_trainer: MakeTrainer, wrong: str, what: str, at: str
) -> None:
    right = (lambda J: J.mean(dim=0)) if what == "aggregator" else (lambda G: 1 / (1 + G.diagonal()))
    kind = OddAggregator if what == "aggregator" else OddWeighting
    made = kind(sometimes(right, WRONG[wrong], WRONG_AT))
    callback = Aggregation(made, NAMES, heads=HEADS, at=at)  # type: ignore[arg-type]
    logger, warned = train(quiet_trainer, callback, Automatic(T))
    counted = [sum(at <= step for at in WRONG_AT) for step in range(STEPS)]
    assert logger.scalars["balancing/fallbacks"] == counted
    assert len(warned) == 1
    assert_says(
        Warning(warned[0]), kind.__name__, "solver gave up" if wrong == "raises" else "it returned", "fallbacks"
    )
    if what == "weighting":
        weights = torch.tensor([logger.scalars[f"balancing/weight/{task}"] for task in NAMES]).T
        for step in range(STEPS):
            assert (weights[step].std() < 1e-6) == (step in WRONG_AT)
            if step in WRONG_AT:
                assert weights[step].sum() == pytest.approx(weights[2 if step < 5 else 7].sum().item(), rel=1e-5)


def test_a_scalarizer_without_a_finite_answer_in_mid_training_is_bridged_by_equal_weights(
    quiet_trainer: MakeTrainer,
) -> None:
    made = Odd(sometimes(lambda L: L.square().sum(), WRONG["returns NaN"], WRONG_AT))
    logger, warned = train(quiet_trainer, Scalarization(made, NAMES), Automatic(T))
    assert logger.scalars["balancing/fallbacks"] == [sum(at <= step for at in WRONG_AT) for step in range(STEPS)]
    assert len(warned) == 1
    weights = torch.tensor([logger.scalars[f"balancing/weight/{task}"] for task in NAMES]).T
    for step in range(STEPS):
        assert (weights[step].std() < 1e-6) == (step in WRONG_AT)


@pytest.mark.parametrize("made", [jd.UPGrad, None])
def test_an_error_that_a_scalarizer_raises_in_mid_training_is_the_users(quiet_trainer: MakeTrainer, made: Any) -> None:
    """The error reports a mistake that you must fix, such as a negative loss, because it would recur in every step."""
    odd = Odd(sometimes(lambda L: L.square().sum(), raises, WRONG_AT))
    callback = Scalarization(odd, NAMES) if made is None else Aggregation(made(), NAMES, heads=HEADS, scalarizer=odd)
    fails(quiet_trainer, lambda: callback, "the solver gave up", error=RuntimeError, batches=6)


@pytest.mark.each_value_once
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "made",
    [
        pytest.param(made, id=name)
        for name, made in {
            "UW": scalarization(js.UW),
            "IMTLL": scalarization(js.IMTLL),
            "DWA": scalarization(js.DWA),
            "FAMO": scalarization(js.FAMO),
            "AMNL": scalarization(AMNL(beta=0.9)),
            "ReLoBRaLo": scalarization(ReLoBRaLo()),
            "SoftAdapt": scalarization(SoftAdapt(order=3)),
            "SLAW": scalarization(SLAW()),
            "UWSO": scalarization(UWSO()),
            "UPGrad": aggregation(jd.UPGrad()),
            "UPGrad, no heads": lambda: Aggregation(jd.UPGrad(), NAMES),
            "UPGrad of the parameters": aggregation(jd.UPGrad(), at="parameters"),
            "GABA": aggregation(GABA(warmup=0)),
            "NashMTL": aggregation(jd.NashMTL(T)),
            "GradVac": aggregation(jd.GradVac()),
            "GradDrop": aggregation(jd.GradDrop()),
            "DBMTL": aggregation(DBMTL(), at="parameters"),
            "ExcessMTL": aggregation(jd.ExcessMTL(), at="parameters"),
            "IMTL": aggregation(jd.IMTLG(), scalarizer=js.IMTLL),
        }.items()
    ],
)
@pytest.mark.filterwarnings("ignore:You are solving")
def test_a_loss_that_is_not_finite_is_counted_and_reported_once_and_forgotten(
    quiet_trainer: MakeTrainer, made: Callable[[], Any], value: float
) -> None:
    callback, model = made(), Guarded(T)
    model.wrong_batches, model.value = (4, 5), value
    logger, warned = train(quiet_trainer, callback, model)
    assert len(warned) == 1
    steps = logger.scalars["balancing/fallbacks"]
    assert steps[3] == 0
    assert steps[4] > 0
    assert steps[5] > steps[4]
    assert steps[-1] == steps[5], "it has not recovered"
    for task in NAMES:
        assert all(math.isfinite(number) for number in logger.scalars.get(f"balancing/weight/{task}", []))
    for module in (callback.scalarizer, getattr(callback, "aggregator", None)):
        if module is not None:
            assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


@pytest.mark.parametrize(
    "made", [scalarization(js.UW), aggregation(jd.UPGrad()), aggregation(DBMTL(), at="parameters")]
)
def test_an_exception_in_mid_training_leaves_a_clean_model(quiet_trainer: MakeTrainer, made: Callable[[], Any]) -> None:
    class Stops(Automatic):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            losses = super().training_step(batch, batch_idx)
            if batch_idx == 3:
                raise ZeroDivisionError("an error of the user's")
            return losses

    model = Automatic(T)
    model.__class__ = Stops
    before = traces(model)
    with pytest.raises(ZeroDivisionError):
        quiet_trainer(callbacks=[made()]).fit(model, Batches(vector_batches(T, 6)))
    assert traces(model) == before
    model.__class__ = Automatic  # which can be pickled
    quiet_trainer(callbacks=[made()]).fit(model, Batches(vector_batches(T, 3)))
    assert_clean(model, traces(Automatic(T)) | traces(model))
