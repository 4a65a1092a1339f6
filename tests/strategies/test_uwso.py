"""UW-SO's formula by hand, and its behavior near zero."""

from __future__ import annotations

import math

import pytest
import torch
from loss_rules import weights_of

from lightning_gradnorm.strategies import UWSO, Uncertainty

F64 = torch.float64


@pytest.mark.parametrize("tau", [0.5, 1.0, 20.0])
def test_weights_are_a_softmax_of_the_inverse_losses_and_constants(tau: float) -> None:
    losses = [0.3, 2.0, 40.0]
    powers = [math.exp(1 / (tau * one)) for one in losses]
    expected = [one / sum(powers) for one in powers]
    assert weights_of(UWSO(tau), losses) == pytest.approx(expected, rel=1e-12)
    total = UWSO(tau)(torch.tensor(losses, dtype=F64))
    assert total.item() == pytest.approx(sum(w * L for w, L in zip(expected, losses, strict=True)), rel=1e-12)


def test_before_the_softmax_they_are_the_weights_at_which_uncertainty_weighting_is_at_rest() -> None:
    """A softmax keeps differences: those of the logarithms are those of half of 1/L, the weight of a regression."""
    uncertainty, losses = Uncertainty(), [0.3, 2.0]
    uncertainty.name_tasks(["a", "b"])
    uncertainty.double()
    assert uncertainty.log_variance is not None
    uncertainty.log_variance.data = torch.tensor(losses, dtype=F64).log()  # at rest, σ² = L
    first, second = weights_of(uncertainty, losses)
    assert uncertainty.log_variance.grad is not None
    assert uncertainty.log_variance.grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    w = weights_of(UWSO(tau=2.0), losses)
    assert math.log(w[0] / w[1]) == pytest.approx(first - second, rel=1e-9)


def test_a_loss_that_goes_to_zero_takes_all_the_weight() -> None:
    shares = [weights_of(UWSO(tau=1.0), [small, 1.0])[0] for small in (1.0, 0.5, 0.1, 0.01, 1e-300, 0.0)]
    assert shares == sorted(shares)
    assert shares[0] == 0.5
    assert shares[-1] == shares[-2] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_losses_of_exactly_zero_share_the_weight_with_either_sign(dtype: torch.dtype) -> None:
    assert weights_of(UWSO(), [0.0, 0.0, 3.0], dtype) == [0.5, 0.5, 0.0]
    assert weights_of(UWSO(), [-0.0, 0.0, 3.0], dtype) == [0.5, 0.5, 0.0]
    assert weights_of(UWSO(), [-0.0, -0.0], dtype) == [0.5, 0.5]


def test_a_large_temperature_makes_weights_equal() -> None:
    assert weights_of(UWSO(tau=1e9), [0.3, 2.0, 40.0]) == pytest.approx([1 / 3] * 3, rel=1e-6)
