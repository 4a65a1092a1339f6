"""Any aggregation through the callback is what the aggregator makes of the whole matrix of gradients, taken by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import by_hand
import lightning as L
import pytest
import torch
import torchjd.aggregation as jd
import torchjd.scalarization as js
from harness import Batches, BeforeBatch, MemoryLogger, assert_clean, state_by_part, traces
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
from torch import Tensor, nn

from lightning_gradnorm import Aggregation
from lightning_gradnorm.balancing import DBMTL, GABA, DBMTLWeighting, LogSum

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


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


MADE: dict[str, Callable[[], Any]] = {
    "AlignedMTL": jd.AlignedMTL,
    "AlignedMTL, least": partial(jd.AlignedMTL, scale_mode="median"),
    "CAGrad": partial(jd.CAGrad, c=0.5),
    "ConFIG": jd.ConFIG,
    "ConFIG with preferences": lambda: jd.ConFIG(vector(0.5, 0.2, 0.3)),
    "Constant": lambda: jd.Constant(vector(0.5, 3.0, -0.2)),
    "CRMOGM": lambda: jd.CRMOGMWeighting(jd.MGDAWeighting(), alpha=0.7),
    "DualProj": jd.DualProj,
    "FairGrad": partial(jd.FairGrad, alpha=1.0),
    "GradDrop": jd.GradDrop,
    "GradDrop with leak": lambda: jd.GradDrop(leak=vector(0.1, 0.5, 0.0)),
    "GradVac": jd.GradVac,
    "IMTLG": jd.IMTLG,
    "Krum": partial(jd.Krum, n_byzantine=1),
    "Mean": jd.Mean,
    "MGDA": jd.MGDA,
    "NashMTL": partial(jd.NashMTL, n_tasks=T),
    "NashMTL, seldom": partial(jd.NashMTL, n_tasks=T, update_weights_every=3),
    "PCD": jd.PCD,
    "PCGrad": jd.PCGrad,
    "Random": jd.Random,
    "Sum": jd.Sum,
    "TrimmedMean": partial(jd.TrimmedMean, trim_number=1),
    "UPGrad": jd.UPGrad,
    "UPGrad with preferences": lambda: jd.UPGrad(vector(0.5, 0.2, 0.3)),
    "UPGradWeighting": jd.UPGradWeighting,
    "GABA": partial(GABA, warmup=3, beta=0.5),
    "DBMTL, no memory": partial(DBMTL, beta=0.0),
    "DBMTLWeighting": DBMTLWeighting,
    "a user's own aggregator": Halves,
    "a user's own weighting": OfTheNorms,
}
AT_PARAMETERS_ALONE = {"ExcessMTL": jd.ExcessMTL, "DBMTL": DBMTL, "DBMTL, decaying": partial(DBMTL, sigma=0.5)}
MATRIX_ALONE = {"GradDrop", "GradDrop with leak", "TrimmedMean", "a user's own aggregator", "DBMTL, no memory"}
SHORT = ["UPGrad", "Constant", "GradDrop", "GABA", "DBMTL, no memory", "NashMTL", "PCGrad"]


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
    if noted.callback._known.has_weights:
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
        assert callback._known.fallbacks == 0
    assert_clean(model, before)
    return noted, model


@pytest.mark.parametrize("name", MADE)
@EVERYWHERE
@WITH_AND_WITHOUT_HEADS
def test_every_aggregator_trains_as_by_hand(quiet_trainer: MakeTrainer, name: str, at: str, with_heads: bool) -> None:
    noted, _ = train_both(quiet_trainer, MADE[name], at=at, with_heads=with_heads)
    assert noted.callback._known.has_weights == (name not in MATRIX_ALONE)


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


@pytest.mark.parametrize("name", COMBINED)
@WITH_AND_WITHOUT_HEADS
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_aggregation_of_a_scalarization_trains_as_by_hand(
    quiet_trainer: MakeTrainer, name: str, with_heads: bool, accumulate: int
) -> None:
    made, scalarizer, at = COMBINED[name]
    train_both(quiet_trainer, made, at=at, with_heads=with_heads, scalarizer=scalarizer, accumulate=accumulate)
