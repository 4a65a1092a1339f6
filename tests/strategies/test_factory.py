"""Preference vectors of 1/T, in Python and from a configuration."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import nn
from torchjd.scalarization import COSMOS, PBI, Constant, Mean

from lightning_gradnorm.strategies import with_equal_preferences

losses = torch.tensor([3.0, 1.0, 0.5, 8.0])
quarters = torch.full((4,), 0.25)


@pytest.mark.parametrize(
    ("scalarizer", "options", "same"),
    [
        (Constant, {}, Mean()),
        (PBI, {"theta": 5.0}, PBI(5.0, quarters)),
        (COSMOS, {"lambda_": 2.0}, COSMOS(2.0, quarters)),
    ],
)
def test_it_is_the_scalarizer_with_weights_of_one_over_T(scalarizer: Any, options: Any, same: nn.Module) -> None:
    by_options = partial(with_equal_preferences, scalarizer=scalarizer, **options)(4)
    by_partial = partial(with_equal_preferences, scalarizer=partial(scalarizer, **options))(4)
    assert type(by_options) is scalarizer
    assert by_options(losses).item() == by_partial(losses).item() == pytest.approx(same(losses).item())


def test_a_configuration_creates_objects_that_need_the_number_of_tasks() -> None:
    make = instantiate(
        {
            "_target_": "lightning_gradnorm.strategies.with_equal_preferences",
            "_partial_": True,
            "scalarizer": {"_target_": "torchjd.scalarization.PBI", "_partial_": True, "theta": 5.0},
        }
    )
    assert make(4)(losses).item() == pytest.approx(PBI(5.0, quarters)(losses).item())


def test_the_preferences_follow_the_module_to_another_precision_and_can_be_set_anew() -> None:
    made = with_equal_preferences(4, PBI, theta=5.0).double()
    assert made.weights.dtype == torch.float64
    assert made(losses.double()).dtype == torch.float64
    made.weights = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    assert made(losses.double()).item() == pytest.approx(PBI(5.0, made.weights)(losses.double()).item())
