"""SLAW's standard deviations, against those of the statistics module and exact fractions."""

from __future__ import annotations

import math
import random
import statistics
from fractions import Fraction

import pytest
import torch
from loss_rules import slaw as by_equations
from loss_rules import weights_of

from lightning_gradnorm.strategies import SLAW


def test_in_the_first_steps_the_deviations_are_those_of_all_losses() -> None:
    slaw, draw, seen = SLAW(beta=0.99).double(), random.Random(1), []
    for step in range(100):
        seen.append([draw.uniform(0, 1), draw.gauss(50, 9), 3.0 + step])
        found = weights_of(slaw, seen[-1])
        if step > 0:
            inverse = [1 / statistics.pstdev(one) for one in zip(*seen, strict=True)]
            assert found == pytest.approx([3 * one / sum(inverse) for one in inverse], rel=1e-9)
        else:
            assert found == [1.0, 1.0, 1.0]


def test_then_the_averages_move() -> None:
    slaw, weights = SLAW(beta=0.5).double(), []
    for loss in (1.0, 3.0, 9.0):  # the first two steps are a plain mean, the third has share 1/2
        weights = weights_of(slaw, [loss, 2 * loss])
    variance = (0.5 * (1 + 9) / 2 + 0.5 * 81) - (0.5 * 2 + 0.5 * 9) ** 2
    assert slaw.deviation.tolist() == pytest.approx([math.sqrt(variance), 2 * math.sqrt(variance)], rel=1e-12)
    assert weights == pytest.approx([4 / 3, 2 / 3], rel=1e-12)


def test_the_unit_of_a_loss_does_not_matter() -> None:
    draw, one, other = random.Random(3), SLAW().double(), SLAW().double()
    for _ in range(50):
        losses = [draw.uniform(1, 2), draw.uniform(5, 9)]
        w, in_units = weights_of(one, losses), weights_of(other, [1000 * losses[0], losses[1]])
    assert 1000 * in_units[0] / in_units[1] == pytest.approx(w[0] / w[1], rel=1e-9)


def test_a_variance_far_below_the_square_of_the_loss_is_exact_where_the_difference_of_squares_is_lost() -> None:
    slaw, exact, draw = SLAW(beta=0.9).double(), by_equations(Fraction(9, 10), epsilon=1e-12), random.Random(5)
    slaw.epsilon, a, b, lost = 1e-12, 0.0, 0.0, 0
    for step in range(1, 201):
        losses = [1e7 + 1e-3 * draw.random(), 1e7 + 2e-3 * draw.random()]
        share = max(1 / step, 0.1)
        a, b = (1 - share) * a + share * losses[0] ** 2, (1 - share) * b + share * losses[0]
        lost += a - b * b <= 0
        assert weights_of(slaw, losses) == pytest.approx(exact(losses), rel=1e-4)
    assert lost > 20, "nothing was lost by rounding"


def test_a_loss_that_does_not_change_has_the_least_deviation() -> None:
    slaw = SLAW(beta=0.0, epsilon=0.1).double()
    for loss in (1.0, 3.0):
        weights = weights_of(slaw, [2.0, loss, 5.0])
    assert weights == [1.0, 1.0, 1.0], "with beta=0 there is no deviation at all"
    slaw = SLAW(epsilon=0.1).double()
    for loss in (1.0, 3.0):
        weights = weights_of(slaw, [2.0, loss, -5.0])
    inverse = [10.0, 1.0, 10.0]
    assert weights == pytest.approx([3 * one / 21 for one in inverse], rel=1e-12)


def test_losses_whose_squares_are_beyond_single_precision_are_weighed() -> None:
    slaw = SLAW()
    for losses in ([1e30, 1.0, 2e30], [3e30, 2.0, 6e30]):
        weights = weights_of(slaw, losses, torch.float32)
    assert all(math.isfinite(one) for one in weights)
    assert weights == pytest.approx([0.0, 3.0, 0.0], abs=1e-6)
    assert weights[0] / weights[2] == pytest.approx(2.0, rel=1e-3)
