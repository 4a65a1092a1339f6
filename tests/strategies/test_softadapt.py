"""SoftAdapt's three variants by hand, its finite differences, and weights that change every N steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_rules import weights_of

from lightning_gradnorm.strategies import SoftAdapt

F64 = torch.float64
OF_THE_README = [[1.0, 150.0, 1500.0], [2.0, 100.0, 1000.0], [3.0, 50.0, 500.0], [4.0, 10.0, 100.0], [5.0, 0.1, 1.0]]
"""Five steps of three losses: one rises slowly, one falls, one falls fast."""


def after(steps: list[list[float]], **options: Any) -> list[float]:
    softadapt = SoftAdapt(**options).double()
    return [weights_of(softadapt, losses) for losses in steps][-1]


def normalized(terms: list[float]) -> list[float]:
    return [one / sum(terms) for one in terms]


def test_the_variants_are_the_papers_formulas() -> None:
    steps = [[4.0, 1.0, 2.0], [3.0, 1.5, 2.0]]
    slopes, means = [-1.0, 0.5, 0.0], [3.5, 1.25, 2.0]
    assert after(steps, beta=2.0) == pytest.approx(normalized([math.exp(2 * s) for s in slopes]), rel=1e-12)
    weighted = normalized([f * math.exp(2 * s) for f, s in zip(means, slopes, strict=True)])
    assert after(steps, beta=2.0, variant="loss-weighted") == pytest.approx(weighted, rel=1e-12)
    shares = normalized([math.exp(2 * s / 1.5) for s in slopes])
    assert after(steps, beta=2.0, variant="normalized") == pytest.approx(shares, rel=1e-12)


@pytest.mark.parametrize("variant", ["original", "normalized"])
def test_the_loss_that_falls_fastest_weighs_least_in_the_example_of_the_authors(variant: str) -> None:
    """Their code gives it the largest weight of the normalized variant: the sum of the slopes is negative."""
    rising, falling, falling_fast = after(OF_THE_README, variant=variant)
    assert rising > falling > falling_fast


@pytest.mark.parametrize(
    ("variant", "published"),
    [("original", [9.9343e-01, 6.5666e-03, 3.8908e-22]), ("loss-weighted", [8.7978e-01, 1.2022e-01, 7.1234e-20])],
)
def test_the_numbers_of_the_authors_come_out_with_time_reversed(variant: str, published: list[float]) -> None:
    """A forward difference at the oldest loss is minus a backward difference of the losses in reverse."""
    found = after(OF_THE_README[::-1], beta=-0.1, variant=variant, order=4)
    assert found == pytest.approx(published, rel=2e-4)


@pytest.mark.parametrize("order", range(1, 7))
def test_the_slope_is_that_of_the_polynomial_at_the_newest_loss(order: int) -> None:
    """With ``beta=1`` the logarithm of two weights' ratio is the difference of the slopes; the second is 0."""

    def loss(x: float) -> float:
        return sum((k + 1) * x**k / 50**k for k in range(order + 1))

    slope = sum((k + 1) * k * 3 ** (k - 1) / 50**k for k in range(1, order + 1))
    w = after([[loss(3.0 - age), 1.0] for age in reversed(range(order + 1))], beta=1.0, order=order)
    assert math.log(w[0] / w[1]) == pytest.approx(slope, rel=1e-8)


def test_as_long_as_there_are_few_losses_the_order_is_lower() -> None:
    high, steps = SoftAdapt(beta=0.3, order=3).double(), [[4.0, 1.0], [3.0, 1.5], [1.0, 1.2], [0.9, 1.1]]
    found = [weights_of(high, losses) for losses in steps]
    assert found[0] == [0.5, 0.5]
    for known in (2, 3, 4):
        assert found[known - 1] == pytest.approx(after(steps[:known], beta=0.3, order=known - 1), rel=1e-12)


def test_weights_change_every_n_steps_by_the_means_of_n_losses() -> None:
    softadapt = SoftAdapt(beta=0.3, update_every=3).double()
    steps = [[4.0, 1.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0], [9.0, 1.0], [2.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    found = [weights_of(softadapt, losses) for losses in steps]
    assert found[:5] == [[0.5, 0.5]] * 5
    by_means = after([[3.0, 2.0], [4.0, 1.0]], beta=0.3)
    assert by_means[0] > by_means[1]
    for weights in found[5:]:
        assert weights == pytest.approx(by_means, rel=1e-12)


def test_a_loss_of_zero_has_weight_zero_where_losses_are_factors_and_of_zeros_alone_all_are_equal() -> None:
    found = after([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]], variant="loss-weighted")
    assert found == pytest.approx([0.0, 2 / 3, 1 / 3], abs=1e-12)
    assert after([[0.0, 0.0]] * 2, variant="loss-weighted") == [0.5, 0.5]
    assert after([[2.0, 3.0]] * 2, variant="normalized") == [0.5, 0.5]  # all slopes are zero


@pytest.mark.parametrize("variant", ["original", "loss-weighted", "normalized"])
def test_slopes_whose_exponential_is_beyond_all_numbers_take_all_the_weight(variant: Any) -> None:
    softadapt = SoftAdapt(beta=1e4, variant=variant)
    weights_of(softadapt, [1e30, 1.0], torch.float32)
    assert weights_of(softadapt, [1.0, 2.0], torch.float32) == [0.0, 1.0]
    softadapt = SoftAdapt(beta=-1e30, variant=variant)
    weights_of(softadapt, [1e30, 1.0], torch.float32)
    assert weights_of(softadapt, [1.0, 2.0], torch.float32) == [1.0, 0.0]


def test_negative_losses_are_as_good_as_others_where_only_slopes_count() -> None:
    shifted = [[one - 100 for one in losses] for losses in OF_THE_README]
    assert after(shifted) == pytest.approx(after(OF_THE_README), rel=1e-9)
