"""The callback gives the same result as calling the aggregator on the whole matrix of gradients, computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchjd.aggregation as jd
import torchjd.scalarization as js
from aggregations import (
    EVERYWHERE,
    NAMES,
    WITH_AND_WITHOUT_HEADS,
    MakeTrainer,
    T,
    train_both,
    worst,
)
from harness import Batches, state_by_part
from models import (
    Automatic,
    vector_batches,
)
from strategies import BY_HAND_OF_GRADIENTS, has_weights
from torch import Tensor, nn

from lightning_gradnorm import Aggregation
from lightning_gradnorm.strategies import DBMTL, GABA, LogSum
from lightning_gradnorm.strategies.facts import any_part


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
def test_strategies_that_average_over_steps_agree_with_by_hand_at_parameters(
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
