"""Kendall's formulas, against the Gaussian and the Boltzmann likelihood they come from."""

from __future__ import annotations

import math

import pytest
import torch
from torchjd.scalarization import UW

from lightning_gradnorm.strategies import Uncertainty

F64 = torch.float64


def uncertainty(s: list[float], classification: tuple[str, ...] = ()) -> Uncertainty:
    made = Uncertainty(classification)
    made.name_tasks(["seg", "depth", "normal"][: len(s)])
    made.double()
    assert made.log_variance is not None
    made.log_variance.data = torch.tensor(s, dtype=F64)
    return made


def test_regressions_are_half_the_loss_over_the_variance_and_classifications_the_whole() -> None:
    s, losses = [0.3, -1.2, 2.0], [1.5, 0.2, 40.0]
    made, values = uncertainty(s, ("seg",)), torch.tensor(losses, dtype=F64, requires_grad=True)
    total = made(values)
    total.backward()
    sigma = [math.exp(one / 2) for one in s]
    by_hand = losses[0] / sigma[0] ** 2 + math.log(sigma[0])
    by_hand += sum(L / (2 * one**2) + math.log(one) for L, one in zip(losses[1:], sigma[1:], strict=True))
    assert total.item() == pytest.approx(by_hand, abs=1e-12)
    assert values.grad is not None
    weights = [1 / sigma[0] ** 2, 1 / (2 * sigma[1] ** 2), 1 / (2 * sigma[2] ** 2)]
    assert values.grad.tolist() == pytest.approx(weights, abs=1e-12)
    assert made.log_variance is not None
    assert made.log_variance.grad is not None
    slopes = [0.5 - w * L for w, L in zip(weights, losses, strict=True)]
    assert made.log_variance.grad.tolist() == pytest.approx(slopes, abs=1e-11)


def test_with_regressions_alone_it_is_torchjds() -> None:
    theirs, values = UW(3).double(), torch.tensor([3.0, 0.1, 7.0], dtype=F64)
    theirs.log_var.data = torch.tensor([0.3, -1.2, 2.0], dtype=F64)
    assert uncertainty([0.3, -1.2, 2.0])(values).item() == pytest.approx(theirs(values).item(), abs=1e-12)


def test_learned_variances_settle_at_the_loss_and_at_twice_the_cross_entropy() -> None:
    made, losses = uncertainty([0.0, 0.0], ("seg",)), torch.tensor([0.7, 5.0], dtype=F64)
    optimizer = torch.optim.LBFGS(made.parameters(), max_iter=100, tolerance_grad=1e-12, tolerance_change=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = made(losses)
        total.backward()
        return total

    for _ in range(3):
        optimizer.step(closure)
    assert made.log_variance is not None
    assert made.log_variance.exp().tolist() == pytest.approx([1.4, 5.0], rel=1e-6)


def test_naming_the_same_tasks_again_keeps_the_parameters_and_other_tasks_are_an_error() -> None:
    made = uncertainty([0.3, -1.2])
    kept = made.log_variance
    made.name_tasks(["seg", "depth"])
    assert made.log_variance is kept
    with pytest.raises(ValueError, match=r"the tasks are \['seg', 'depth'\]; got \['depth', 'seg'\]"):
        made.name_tasks(["depth", "seg"])


def test_reset_goes_back_to_the_start() -> None:
    made = Uncertainty(initial=-0.5)
    made.name_tasks(["seg", "depth"])
    assert made.log_variance is not None
    made.log_variance.data += 1
    made.reset()
    assert made.log_variance.tolist() == [-0.5, -0.5]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="'sge', which is not a task; did you mean 'seg'"):
        Uncertainty(["sge"]).name_tasks(["seg", "depth"])
    with pytest.raises(RuntimeError, match="Call name_tasks"):
        Uncertainty()(torch.ones(2))
    with pytest.raises(TypeError, match=r"\['seg'\]"):
        Uncertainty("seg")
    with pytest.raises(ValueError, match=r"has 2 tasks; got losses of shape \(3,\)"):
        uncertainty([0.0, 0.0])(torch.ones(3))
