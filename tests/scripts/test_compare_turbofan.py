"""The comparison of simulated engines with NASA's: with NASA's files, and with a number outside the tolerance."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from real_data import real_data

SCRIPT = "compare_turbofan"


@pytest.mark.slow
def test_simulated_engines_are_like_nasas(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(real_data("cmapss")), "--subsets", "FD001", "FD003"]) == 0
    assert capsys.readouterr().out.count("  0 outside the tolerance") == 2


@pytest.mark.parametrize(
    ("name", "inside", "outside", "place", "line"),
    [
        ("lives", 218, 222, 2, "median"),
        ("mean", 0.2, 0.3, 6, "7"),
        ("std", 1.09, 1.11, 6, "7"),
        ("noise", 0.54, 0.56, 6, "7"),
        ("capped", -0.56, -0.54, 6, "7"),
        ("uncapped", -0.56, -0.54, 6, "7"),
        ("std", 1.09, 0, 6, "7"),
        ("held_out", 17.2, 17.3, None, "ridge RMSE"),
    ],
)
def test_a_number_outside_the_tolerance_is_marked_and_counted(
    name: str, inside: float, outside: float, place: int | None, line: str, script: ModuleType
) -> None:
    ones, lives = np.ones(21), np.array([100.0, 150, 200, 250, 300])
    real = script.Statistics(lives, 0 * ones, ones, 0.5 * ones, -0.6 * ones, -0.6 * ones, held_out=15.0, test=15.0)
    for value, count in ((inside, 0), (outside, 1)):
        changed = value
        if place is not None:
            changed = getattr(real, name).copy()
            changed[place] = value
        found = script.Comparison("FD001", real, replace(real, **{name: changed}))
        assert found.outside == count
        marked = [text.strip() for text in found.lines[1:] if "*" in text]
        assert len(marked) == count
        assert all(text.startswith(line) for text in marked)


@pytest.mark.parametrize(("subset", "status"), [("FD001", 1), ("FD002", 0)])
def test_a_decisive_number_makes_the_script_fail(
    subset: str, status: int, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = type("Found", (), {"lines": [], "outside": 2})
    monkeypatch.setattr(script, "compare", lambda *_: found)
    assert script.main(["somewhere", "--subsets", subset]) == status
