"""Features have mean 0 and standard deviation 1 within each operating condition, recomputed here line by line."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from engine_files import PLACES

from lightning_gradnorm.experiments.problems.engines.cmapss import Standardization


def scattered(cycles: int, conditions: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Settings near the conditions' places, features of each condition's own level and spread, and the conditions."""
    draw = np.random.default_rng(seed)
    condition = draw.integers(conditions, size=cycles)
    settings = np.array(PLACES)[condition] + draw.normal(size=(cycles, 3)) * [0.003, 0.0005, 0]
    features = draw.normal(size=(cycles, 4)) * (1 + condition[:, None]) + 100 * condition[:, None]
    return settings, features, condition


@pytest.mark.parametrize("conditions", [1, 2, 6])
def test_mean_and_spread_are_computed_per_condition(conditions: int) -> None:
    settings, features, condition = scattered(400, conditions)
    standardize = Standardization.fit(settings, features, conditions)
    assert np.array_equal(standardize.conditions_of(settings), condition)  # conditions are in order of their altitude
    for number in range(conditions):
        own = [features[i].tolist() for i in range(400) if condition[i] == number]
        for column in range(4):
            values = [values[column] for values in own]
            mean = math.fsum(values) / len(values)
            std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
            assert standardize.mean[number, column] == pytest.approx(mean, rel=1e-12)
            assert standardize.std[number, column] == pytest.approx(std, rel=1e-12)
    expected = [(features[i] - standardize.mean[condition[i]]) / standardize.std[condition[i]] for i in range(400)]
    found = standardize(settings, features)
    assert found.dtype == np.float32
    assert np.abs(found - np.array(expected)).max() < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_the_six_conditions_are_found_in_any_order_and_share_of_the_cycles(seed: int) -> None:
    settings, features, condition = scattered(900, 6, seed)
    rare = (condition != 3) | (np.arange(900) < 20)  # a condition flown a few times only
    standardize = Standardization.fit(settings[rare], features[rare], 6)
    assert np.abs(standardize.centers - np.array(PLACES)).max() < 0.01
    assert np.array_equal(standardize.conditions_of(settings), condition)


def test_constant_features_of_a_condition_become_zero() -> None:
    settings, features, condition = scattered(300, 2)
    features[condition == 0, 1] = 518.67  # the mean of so many is not exactly this number
    standardize = Standardization.fit(settings, features, 2)
    found = standardize(settings, features)
    assert np.abs(found[condition == 0, 1]).max() < 1e-6
    assert found[condition == 1, 1].std() == pytest.approx(1, abs=1e-4)


def test_more_conditions_than_different_settings_are_refused() -> None:
    settings = np.array([[0.0, 0, 100]] * 5 + [[10.0, 0, 100]])
    with pytest.raises(
        ValueError, match=r"conditions should be at most the 2 different settings of the training .*; got 3"
    ):
        Standardization.fit(settings, np.zeros((6, 2)), 3)


def test_k_means_is_needed_for_several_conditions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    settings, features, _ = scattered(50, 6)
    Standardization.fit(settings, features, 1)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn, .* pip install 'lightning-gradnorm\[cmapss\]'"):
        Standardization.fit(settings, features, 6)
