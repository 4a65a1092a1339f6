"""scripts/solver_times.py: a table of times of both solvers, with the spread."""

from __future__ import annotations

import re

import pytest
import solver_times


@pytest.mark.filterwarnings("ignore")
def test_the_table_has_a_row_for_each_solver_and_number_of_tasks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver_times, "CALLS", 1)
    solver_times.main(["--rounds", "1", "--tasks", "2", "3"])
    rows = [re.split(r" \| ", line.strip("| ")) for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [(name, T) for name in solver_times.AGGREGATORS for T in "23"]
    for _, _, *both in rows:
        for taken in both:
            assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", taken)
