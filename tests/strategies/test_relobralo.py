"""ReLoBRaLo's formula by hand, its random lookback, and ratios that do not exist."""

from __future__ import annotations

import math

import pytest
import torch
from loss_rules import weights_of

from lightning_gradnorm.strategies import ReLoBRaLo
from lightning_gradnorm.strategies.scalarization import ScalarizationRule

F64 = torch.float64


def balanced(*ratios: float) -> list[float]:
    powers = [math.exp(one) for one in ratios]
    return [len(ratios) * one / sum(powers) for one in powers]


def test_a_loss_that_has_fallen_less_weighs_more_by_hand() -> None:
    relobralo = ReLoBRaLo(alpha=0.25, tau=0.5, rho=1.0).double()
    assert weights_of(relobralo, [4.0, 10.0]) == [1.0, 1.0]
    second = [0.25 + 0.75 * one for one in balanced(0.5 / 0.5, 0.9 / 0.5)]
    assert weights_of(relobralo, [2.0, 9.0]) == pytest.approx(second, rel=1e-12)
    assert second[1] > second[0]
    third = [0.25 * was + 0.75 * one for was, one in zip(second, balanced(1.5 / 0.5, 1.0 / 0.5), strict=True)]
    assert weights_of(relobralo, [3.0, 9.0]) == pytest.approx(third, rel=1e-12)


def test_with_rho_0_it_looks_back_in_every_step_and_with_rho_1_in_none() -> None:
    always, never = ReLoBRaLo(alpha=1.0, rho=0.0).double(), ReLoBRaLo(alpha=1.0, rho=1.0).double()
    for losses in ([4.0, 10.0], [1.0, 1.0], [8.0, 5.0]):
        found = weights_of(always, losses), weights_of(never, losses)
    assert found[0] == pytest.approx(balanced(2.0, 0.5), rel=1e-12)
    assert found[1] == [1.0, 1.0]


def looked_back(seed: int, steps: int = 1000) -> list[bool]:
    """In which steps it did: with ``alpha=1`` the weights are others then."""
    rule = ScalarizationRule(["a", "b"], ReLoBRaLo(alpha=1.0, rho=0.7), seed=seed, dtype=F64)
    before, found = rule.weigh(torch.tensor([1.0, 1.0])).clone(), []
    for step in range(steps):
        after = rule.weigh(torch.tensor([1.0, 2.0 + 0.001 * step])).clone()
        found.append(not torch.equal(before, after))
        before = after
    return found


def test_it_looks_back_as_often_as_rho_specifies_with_its_own_random_numbers() -> None:
    torch.manual_seed(1)
    first = looked_back(seed=1)
    assert sum(first) / len(first) == pytest.approx(0.3, abs=0.05)
    torch.manual_seed(2)
    assert looked_back(seed=1) == first
    assert sum(a != b for a, b in zip(looked_back(seed=2), first, strict=True)) > 300


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_a_loss_that_was_zero_counts_as_unchanged(rho: float) -> None:
    relobralo = ReLoBRaLo(alpha=0.5, rho=rho).double()
    weights_of(relobralo, [0.0, 2.0])
    found = weights_of(relobralo, [3.0, 1.0])
    history = [1.0, 1.0] if rho else balanced(1.0, 0.5)
    assert found == pytest.approx(
        [0.5 * was + 0.5 * one for was, one in zip(history, balanced(1.0, 0.5), strict=True)], rel=1e-12
    )
    assert weights_of(relobralo, [0.0, 0.0]) != [math.nan] * 2


def test_a_ratio_beyond_the_largest_number_takes_all_the_weight_and_is_no_nan() -> None:
    relobralo = ReLoBRaLo(alpha=0.0)
    weights_of(relobralo, [1e-30, 1e-30, 1.0], torch.float32)
    assert weights_of(relobralo, [1e30, 1.0, 1.0], torch.float32) == [3.0, 0.0, 0.0]
    relobralo.reset()
    weights_of(relobralo, [1e-30, 1e-30, 1.0], torch.float32)
    assert weights_of(relobralo, [1e30, 1e30, 1.0], torch.float32) == [1.5, 1.5, 0.0]
