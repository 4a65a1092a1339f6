"""Our projections onto the dual cone against quadprog's, the conditions of optimality and closed forms; UPGrad and DualProj."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchjd.aggregation as jd
from gramians import F64, SOME, gramians, rows_of
from torch import Tensor
from torchjd.linalg import QuadprogProjector

from lightning_gradnorm import strategies
from lightning_gradnorm.strategies import (
    AggregationRule,
    DualProj,
    DualProjWeighting,
    PivotingProjector,
    UPGrad,
    UPGradWeighting,
    dual_cone,
)

PAIRS: dict[str, tuple[Any, Any]] = {
    "UPGrad": (UPGrad, jd.UPGrad),
    "UPGradWeighting": (UPGradWeighting, jd.UPGradWeighting),
    "DualProj": (DualProj, jd.DualProj),
    "DualProjWeighting": (DualProjWeighting, jd.DualProjWeighting),
}
OF_NAME = pytest.mark.parametrize("name", PAIRS)


def corners(T: int) -> Tensor:
    """The vectors that UPGrad projects."""
    return torch.eye(T, dtype=F64) / T


def divided(G: Tensor, reg_eps: float) -> Tensor:
    """The matrix G for which the projector finds the least ``vᵀG v``."""
    return G / G.trace() + reg_eps * torch.eye(len(G), dtype=F64)


def given(aggregator: Any, J: Tensor) -> Tensor:
    return J if isinstance(aggregator, jd.Aggregator) else J @ J.T


# ---- the projections -------------------------------------------------------------------------------------------------


@SOME
@pytest.mark.parametrize("norm_eps", [1e-4, 0.0])
def test_the_projections_are_those_of_quadprog(random: int, degenerate: int, norm_eps: float) -> None:
    for name, G in gramians(random, degenerate):
        U = corners(len(G))
        expected = QuadprogProjector(norm_eps=norm_eps)(U, G)
        found = PivotingProjector(norm_eps=norm_eps)(U, G)
        assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-11, name


@SOME
@pytest.mark.parametrize("reg_eps", [1e-4, 1e-8])
def test_they_satisfy_the_conditions_of_optimality(random: int, degenerate: int, reg_eps: float) -> None:
    projected = 0
    for name, gramian in gramians(random, degenerate):
        G, U = divided(gramian, reg_eps), corners(len(gramian))
        V = PivotingProjector(norm_eps=0.0, reg_eps=reg_eps)(U, gramian)
        assert bool((V >= U).all()), name
        # Each entry is the least that it may be, or where the derivative is zero, with the others as they are.
        best = torch.maximum(U, V - V @ G / G.diagonal())
        assert float((V - best).abs().max() / V.max()) <= 1e-11, name
        projected += not torch.equal(V, U)
    assert projected > random / 2


@pytest.mark.parametrize("seed", range(20))
def test_for_two_tasks_they_have_a_closed_form(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    J, u = rows_of(draw, 2, 4) * 10 ** rows_of(draw, 2, 1), rows_of(draw, 2).abs()
    J[1] *= -torch.sign(J[0] @ J[1])  # they conflict
    G = divided(J @ J.T, 1e-4)
    expected = torch.maximum(u, -u.flip(0) * G[0, 1] / G.diagonal())
    torch.testing.assert_close(PivotingProjector(norm_eps=0.0)(u, J @ J.T), expected, rtol=1e-12, atol=0)


def test_the_result_is_the_vector_itself_where_nothing_conflicts() -> None:
    J = rows_of(torch.Generator().manual_seed(0), 5, 8).abs()
    U = torch.rand(3, 2, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(PivotingProjector()(U, J @ J.T), U)


def test_exchanging_one_at_a_time_ends_where_exchanging_all_at_once_repeats_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    J = torch.randint(-3, 4, (5, 5), generator=torch.Generator().manual_seed(233)).double()
    expected = QuadprogProjector()(corners(5), J @ J.T)
    torch.testing.assert_close(PivotingProjector()(corners(5), J @ J.T), expected, rtol=0, atol=1e-13)
    monkeypatch.setattr(dual_cone, "_BLOCKS", 10**9)
    with pytest.raises(ValueError, match="no weights found"):
        PivotingProjector()(corners(5), J @ J.T)


def test_one_at_a_time_is_enough_for_any_number_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_cone, "_BLOCKS", 0)
    for T in (2, 7, 15):
        J = rows_of(torch.Generator().manual_seed(T), T, T + 3)
        expected = QuadprogProjector()(corners(T), J @ J.T)
        torch.testing.assert_close(PivotingProjector()(corners(T), J @ J.T), expected, rtol=0, atol=1e-13)


def test_short_gradients_are_projected_as_long_ones_unless_norm_eps_forbids_it() -> None:
    J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=F64)
    long, short = J @ J.T, 1e-5 * J @ J.T
    assert torch.equal(PivotingProjector(norm_eps=1e-4)(corners(2), short), corners(2))
    assert not torch.equal(PivotingProjector(norm_eps=1e-4)(corners(2), long), corners(2))
    any_length = PivotingProjector()
    torch.testing.assert_close(any_length(corners(2), short), any_length(corners(2), long), rtol=1e-12, atol=0)
    nothing = torch.zeros(2, 2, dtype=F64)
    assert torch.equal(any_length(corners(2), nothing), corners(2))


@pytest.mark.parametrize(
    "gramian",
    [torch.full((3, 3), torch.nan), torch.full((3, 3), torch.inf), 3 * torch.eye(3) - 2],
    ids=["NaN", "inf", "not positive definite"],
)
def test_a_gramian_that_is_none_is_an_error_and_no_nan(gramian: Tensor) -> None:
    projector = PivotingProjector(norm_eps=0.0, reg_eps=0.0)
    with pytest.raises(
        ValueError, match=r"PivotingProjector\(norm_eps=0.0, reg_eps=0.0\): no weights found; the Gramian"
    ):
        projector(corners(3), gramian)


def test_the_rule_falls_back_to_equal_weights_where_none_are_found() -> None:
    rule = AggregationRule(["a", "b", "c"], UPGrad(projector=PivotingProjector(reg_eps=0.0)), dtype=F64)
    G = torch.tensor([[1.0, -2.0, 0.0], [-2.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)  # no Gramian
    assert rule.weigh_gradients(torch.eye(3, dtype=F64)).tolist() == [1 / 3] * 3
    assert rule.fallbacks == 0
    assert rule.weigh_gradients(G).tolist() == [1 / 3] * 3
    assert rule.fallbacks == 1
    assert "no weights found" in rule.reason


@pytest.mark.parametrize("option", ["norm_eps", "reg_eps"])
def test_wrong_options_are_refused_by_name(option: str) -> None:
    with pytest.raises(ValueError, match=f"PivotingProjector: {option} should be at least 0; got -1.0"):
        PivotingProjector(**{option: -1.0})


# ---- the aggregators -------------------------------------------------------------------------------------------------


@OF_NAME
@pytest.mark.parametrize(
    "preferences", [None, [0.5, 0.2, 0.3, 0.0], [1.0, -0.4, 2.0, 0.7]], ids=["equal", "0", "negative"]
)
def test_ours_return_what_torchjds_return(name: str, preferences: list[float] | None) -> None:
    pref_vector = None if preferences is None else torch.tensor(preferences, dtype=F64)
    ours, theirs = (kind(pref_vector) for kind in PAIRS[name])
    assert isinstance(ours, type(theirs))
    assert ours.pref_vector is pref_vector
    for seed in range(10):
        J = given(ours, rows_of(torch.Generator().manual_seed(seed), 4, 6))
        torch.testing.assert_close(ours(J), theirs(J), rtol=1e-11, atol=1e-13)


@OF_NAME
def test_single_precision_stays_single_and_is_solved_in_double(name: str) -> None:
    make = PAIRS[name][0]
    J = rows_of(torch.Generator().manual_seed(0), 4, 6).float()
    found = make()(given(make(), J))
    assert found.dtype == torch.float32
    if isinstance(make(), jd.Weighting):
        exact = make()((J @ J.T).double())
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-7)


@OF_NAME
def test_another_projector_takes_the_place_of_ours(name: str) -> None:
    ours, theirs = PAIRS[name]
    assert isinstance(ours().projector, PivotingProjector)
    made = ours(projector=QuadprogProjector(reg_eps=0.1))
    J = given(made, torch.tensor([[1.0, 0.0], [-4.0, 1.0]], dtype=F64))
    assert torch.equal(made(J), theirs(projector=QuadprogProjector(reg_eps=0.1))(J))
    assert not torch.allclose(made(J), ours()(J), rtol=1e-3)


@OF_NAME
def test_checkpoints_of_ours_and_of_torchjds_fit_each_other(name: str) -> None:
    preferences, others = torch.tensor([0.5, 0.2, 0.3], dtype=F64), torch.tensor([0.1, 0.8, 0.1], dtype=F64)
    for first, second in (PAIRS[name], PAIRS[name][::-1]):
        saved = AggregationRule(["a", "b", "c"], first(preferences.clone()), dtype=F64)
        loaded = AggregationRule(["a", "b", "c"], second(others.clone()), dtype=F64)
        assert saved.kind == loaded.kind == name
        loaded.load_state_dict(saved.state_dict())
        J = rows_of(torch.Generator().manual_seed(3), 3, 5)
        torch.testing.assert_close(
            loaded.weigh_gradients(J @ J.T), saved.weigh_gradients(J @ J.T), rtol=1e-11, atol=1e-13
        )


@OF_NAME
def test_a_copy_works_alone(name: str) -> None:
    make = PAIRS[name][0]
    J = given(make(), rows_of(torch.Generator().manual_seed(4), 3, 5))
    assert torch.equal(copy.deepcopy(made := make())(J), made(J))


def test_the_package_exports_all_of_them() -> None:
    assert {*PAIRS, "PivotingProjector"} <= set(strategies.__all__)
