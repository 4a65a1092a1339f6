"""Fixed weights as a rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_gradnorm.strategies import FixedRule


def test_the_weights_are_those_given_in_their_order_and_stay() -> None:
    rule = FixedRule({"seg": 0.1, "depth": 3.0})
    rule.count_step()
    rule.discard_step()
    rule.load_state_dict(rule.state_dict())
    assert rule.tasks == ("seg", "depth")
    assert rule.needs == "nothing"
    assert rule.weights.equal(torch.tensor([0.1, 3.0]))
    assert rule.loss_weights is rule.weights
    assert rule.state_dict() == {}


def test_in_another_precision_they_are_the_given_numbers() -> None:
    rule = FixedRule({"seg": 0.1, "depth": 0.3})
    rule.to(dtype=torch.float64)
    assert rule.weights.tolist() == [0.1, 0.3]
    rule.to(device="meta")
    assert (rule.weights.dtype, rule.weights.device.type) == (torch.float64, "meta")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"seg": 1.0}, "tasks should name at least two tasks"),
        ({"seg": 1.0, "depth": 0.0}, r"weights\['depth'\] should be positive and finite; got 0.0"),
        ({"seg": math.nan, "depth": 1.0}, r"weights\['seg'\] should be positive and finite; got nan"),
        ([1.0, 2.0], "weights should be a mapping from task to number"),
    ],
)
def test_weights_out_of_range_are_an_error(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^FixedRule: {message}"):
        FixedRule(weights)
