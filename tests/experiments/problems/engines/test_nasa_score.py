"""The NASA score against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_gradnorm.experiments.problems.engines.nasa_score import NASAScore


def score(*differences: float) -> float:
    truth = torch.full((len(differences), 1), 60.0)
    metric = NASAScore()
    metric.update(truth + torch.tensor(differences).reshape(-1, 1), truth)
    return metric.compute().item()


def test_ten_cycles_too_early_and_ten_too_late() -> None:
    assert round(score(-10), 3) == 1.158
    assert round(score(10), 3) == 1.718
    assert score(-10, 10) == pytest.approx(math.exp(10 / 13) - 1 + math.exp(1) - 1)


def test_a_right_prediction_costs_nothing() -> None:
    assert score(0, 0) == 0


def test_small_errors_are_not_lost_beside_one() -> None:
    late, early = torch.tensor([1e-5]), torch.tensor([0.0])
    assert NASAScore()(late, early).item() == pytest.approx(1e-6, rel=1e-4)


def test_the_score_of_batches_is_that_of_all_engines_by_hand() -> None:
    torch.manual_seed(0)
    prediction, truth = 125 * torch.rand(2, 50, 1), 125 * torch.rand(2, 50, 1)
    metric = NASAScore()
    for batch in range(2):
        metric.update(prediction[batch], truth[batch])
    errors = (prediction.double() - truth.double()).flatten().tolist()
    by_hand = sum(math.exp(-d / 13) - 1 if d < 0 else math.exp(d / 10) - 1 for d in errors)
    assert metric.compute().item() == pytest.approx(by_hand, rel=1e-5)


def test_half_precision_does_not_overflow() -> None:
    found = NASAScore()(torch.tensor([125.0]).half(), torch.tensor([5.0]).half())  # e^12 is above half's 65,504
    assert found.item() == pytest.approx(math.exp(12) - 1, rel=1e-5)


def test_every_engine_against_every_other_is_refused() -> None:
    with pytest.raises(ValueError, match=r"NASAScore: .* same shape; got \(4, 1\) and \(4,\)"):
        NASAScore().update(torch.zeros(4, 1), torch.zeros(4))
