"""Both editions of AMNL, against their formulas in plain floats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_gradnorm.experiments.problems.engines.losses import FailureBiasedMSE
from lightning_gradnorm.strategies import AMNL

F64 = torch.float64


def weights_of(amnl: AMNL, losses: list[float]) -> tuple[float, list[float]]:
    values = torch.tensor(losses, dtype=F64, requires_grad=True)
    total = amnl(values)
    total.backward()
    assert values.grad is not None
    return total.item(), values.grad.tolist()


def test_the_first_edition_has_value_one_and_the_gradient_of_the_mean_logarithm() -> None:
    losses = [2000.0, 1.5, 1e-7]
    total, weights = weights_of(AMNL(), losses)
    assert total == pytest.approx(1.0, abs=1e-12)
    values = torch.tensor(losses, dtype=F64, requires_grad=True)
    values.log().mean().backward()
    assert values.grad is not None
    assert weights == pytest.approx(values.grad.tolist(), rel=1e-12)


def test_weights_are_matched_by_name_in_any_order() -> None:
    amnl = AMNL(weights={"health": 0.25, "rul": 0.75})
    amnl.name_tasks(["rul", "health"])
    assert weights_of(amnl, [2000.0, 2.0])[1] == pytest.approx([0.75 / 2000, 0.25 / 2], abs=1e-15)
    second = AMNL(edition=2, weights={"health": 0.25, "rul": 0.75})
    second.name_tasks(["rul", "health"])
    assert weights_of(second, [2000.0, 2.0]) == (pytest.approx(1500.5), [0.75, 0.25])


def test_the_moving_average_is_that_of_the_losses_bias_corrected() -> None:
    beta, amnl, sequence = 0.9, AMNL(beta=0.9), [[4.0, 0.1], [2.0, 0.3], [0.0, 0.2], [8.0, 0.1]]
    for t, losses in enumerate(sequence):
        past = sequence[: t + 1]
        scale = sum(beta**age for age in range(t + 1))  # (1 − beta^t) / (1 − beta)
        means = [sum(beta ** (t - k) * row[i] for k, row in enumerate(past)) / scale for i in range(2)]
        total, weights = weights_of(amnl, losses)
        assert weights == pytest.approx([0.5 / mean for mean in means], rel=1e-12)
        assert total == pytest.approx(sum(0.5 * L / mean for L, mean in zip(losses, means, strict=True)), rel=1e-12)


@pytest.mark.parametrize("beta", [None, 0.99])
def test_a_loss_of_zero_has_weight_zero_and_never_nan(beta: float | None) -> None:
    assert weights_of(AMNL(beta=beta), [0.0, 2.0]) == (pytest.approx(0.5), [0.0, pytest.approx(0.25)])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("beta", [None, 0.9])
def test_a_loss_that_is_not_finite_shows_in_the_total_but_not_in_the_weights_or_the_average(
    beta: float | None, broken: float
) -> None:
    amnl, untouched = AMNL(beta=beta), AMNL(beta=beta)
    for one in (amnl, untouched):
        weights_of(one, [4.0, 1.0])
    total, weights = weights_of(amnl, [broken, 2.0])
    assert not math.isfinite(total)
    assert weights[0] == 0.5
    assert math.isfinite(weights[1])
    weights_of(untouched, [4.0, 2.0])  # for the other task it was a step
    if beta is not None:
        assert amnl.means[1] == untouched.means[1]
        assert amnl.means[0] == pytest.approx(0.1 * 4.0)


def test_a_negative_loss_is_refused_where_it_would_be_divided_by() -> None:
    with pytest.raises(ValueError, match="none may be negative"):
        AMNL()(torch.tensor([1.0, -1.0]))
    assert AMNL(edition=2)(torch.tensor([1.0, -1.0])).item() == 0.0


def test_half_precision_losses_are_averaged_in_single_precision() -> None:
    amnl = AMNL(beta=0.99)
    for _ in range(3):
        amnl(torch.tensor([2000.0, 0.001], dtype=torch.bfloat16))
    assert amnl.means.dtype == torch.float32


def test_state_dict_carries_the_average_into_a_fresh_object() -> None:
    amnl, fresh = AMNL(beta=0.9), AMNL(beta=0.9)
    for losses in ([4.0, 0.1], [2.0, 0.3]):
        weights_of(amnl, losses)
    fresh.load_state_dict(amnl.state_dict())
    assert weights_of(fresh, [1.0, 1.0]) == weights_of(amnl, [1.0, 1.0])
    amnl.reset()
    assert weights_of(amnl, [1.0, 1.0]) == weights_of(AMNL(beta=0.9), [1.0, 1.0])


def test_an_invalid_weight_or_beta_or_edition_is_an_error() -> None:
    for arguments, says in (
        ({"edition": 3}, "1 or 2"),
        ({"edition": 2, "beta": 0.99}, "None in edition 2"),
        ({"beta": 1.0}, "less than 1"),
        ({"weights": {"a": 0.7, "b": 0.7}}, "sum to 1"),
        ({"weights": {"a": 1.5, "b": -0.5}}, "not negative"),
    ):
        with pytest.raises(ValueError, match=says):
            AMNL(**arguments)  # type: ignore[arg-type]
    amnl = AMNL(weights={"rul": 0.5, "helth": 0.5})
    with pytest.raises(ValueError, match="did you mean 'health'"):
        amnl.name_tasks(["rul", "health"])
    with pytest.raises(ValueError, match=r"\['c'\] are missing"):
        AMNL(weights={"a": 0.5, "b": 0.5}).name_tasks(["a", "b", "c"])
    with pytest.raises(ValueError, match="Call name_tasks"):
        amnl(torch.ones(2))
    averaged = AMNL(beta=0.9)
    averaged(torch.ones(2))
    with pytest.raises(ValueError, match=r"Call reset\(\)"):
        averaged(torch.ones(3))


def weight(y: float) -> float:
    return 2 - y / 125 if 0 <= y <= 125 else (2.0 if y < 0 else 1.0)


def test_the_failure_biased_error_is_a_plain_mean_of_weighted_squares() -> None:
    target = torch.tensor([0.0, 1.0, 62.0, 124.0, 125.0, 180.0, -3.0], dtype=F64)
    prediction = (target + torch.tensor([3.0, -1.0, 2.0, 0.5, 7.0, -4.0, 1.0], dtype=F64)).requires_grad_()
    errors = (prediction - target).tolist()
    loss = FailureBiasedMSE()(prediction, target)
    by_hand = [weight(y) for y in target.tolist()]
    assert loss.item() == pytest.approx(sum(w * e * e for w, e in zip(by_hand, errors, strict=True)) / 7, rel=1e-12)
    loss.backward()
    assert prediction.grad is not None
    gradient = [2 * w * e / 7 for w, e in zip(by_hand, errors, strict=True)]
    assert prediction.grad.tolist() == pytest.approx(gradient, rel=1e-12)


def test_its_cap_and_largest_weight_can_be_chosen() -> None:
    def at(life: float) -> Tensor:
        target = torch.tensor([life])
        return FailureBiasedMSE(cap=100.0, largest=5.0)(target + 1, target)

    assert [at(life).item() for life in (0.0, 50.0, 100.0)] == [5.0, 3.0, 1.0]


def test_predictions_that_would_be_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="same shape"):
        FailureBiasedMSE()(torch.ones(4, 1), torch.ones(4))
    for arguments in ({"cap": 0.0}, {"largest": 0.0}):
        with pytest.raises(ValueError, match="should be positive"):
            FailureBiasedMSE(**arguments)
