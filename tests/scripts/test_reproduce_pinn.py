"""The study of physics-informed networks: its trainings, its choices, and the numbers in its tables."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_gradnorm import GradNorm

SCRIPT = "reproduce_pinn"
Call = Callable[..., str]
ARMS = ["equal", "best static", "GradNorm α 0", "ReLoBRaLo"]


def lines(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as rows:
        return list(csv.DictReader(rows))


@pytest.mark.slow
def test_the_quick_study_is_trained_kept_and_written(call: Call, script: ModuleType, tmp_path: Path) -> None:
    asked = ["--quick", "--problems", "plate", "--arms", *ARMS]
    call(*asked)
    page = (tmp_path / "outputs" / "pinn.md").read_text()
    rows = lines(tmp_path / "outputs" / "pinn.csv")
    assert (tmp_path / "outputs" / "pinn.png").stat().st_size > 10_000
    # Two seeds of three arms; two draws with the first seed, and the better one with the other.
    assert len(rows) == 2 * 3 + 2 + 1
    assert all(row["steps"] == "20" for row in rows)
    drawn = [row for row in rows if row["arm"].startswith("static")]
    best = min(drawn[:2], key=lambda row: float(row["val"]))["arm"]
    assert [row["seed"] for row in drawn] == ["0", "0", "1"]
    assert drawn[2]["arm"] == best
    errors = [float(row["test"]) for row in drawn if row["arm"] == best]
    assert f"| best static | {statistics.median(errors):.3g} (" in page
    before = (tmp_path / "outputs" / "pinn.csv").read_bytes()
    assert "seed" not in call(*asked).replace("Seeds", "")
    assert (tmp_path / "outputs" / "pinn.csv").read_bytes() == before
    cut = before[: before.rstrip(b"\n").rfind(b"\n") + 30]  # stopped while it wrote the last line
    (tmp_path / "outputs" / "pinn.csv").write_bytes(cut)
    assert len(call(*asked).splitlines()) == 2  # one run, and the page
    again = lines(tmp_path / "outputs" / "pinn.csv")
    different = ("seconds",)
    assert [{k: v for k, v in row.items() if k not in different} for row in again] == [
        {k: v for k, v in row.items() if k not in different} for row in rows
    ]


@pytest.mark.slow
def test_runs_with_other_settings_are_not_mistaken_for_these(call: Call, tmp_path: Path) -> None:
    call("--quick", "--problems", "plate", "--arms", "equal")
    told = call("--problems", "plate", "--arms", "equal", "--seeds", "0", "--epochs", "1", "--output", "outputs")
    assert "plate, equal, seed 0" in told
    rows = lines(tmp_path / "outputs" / "pinn.csv")
    assert [(row["seed"], row["steps"]) for row in rows] == [("0", "20"), ("1", "20"), ("0", "250")]


def result(script: ModuleType, arm: str, seed: int, test: float, **more: Any) -> Any:
    given = {"settings": "", "val": test, "seconds": 10.0, "steps": 100, "weights": "", **more}
    return script.Result("burgers", arm, seed, test=test, **given)


def test_the_table_has_medians_quartiles_ratios_and_corrected_tests(script: ModuleType) -> None:
    equal, better = [0.4, 0.5, 0.6, 0.7, 0.8], [0.2, 0.25, 0.3, 0.35, 0.41]
    found = {}
    for seed in range(5):
        found["burgers", "equal", seed] = result(script, "equal", seed, equal[seed])
        weights = json.dumps({"pde": 1.0 + seed, "initial": 2.0})
        found["burgers", "GradNorm α 0", seed] = result(
            script, "GradNorm α 0", seed, better[seed], weights=weights, seconds=12.0 + seed
        )
        found["burgers", "UPGrad", seed] = result(script, "UPGrad", seed, equal[seed] * (1.01 if seed % 2 else 0.99))
    text = script.table(found, "burgers", ["equal", "GradNorm α 0", "UPGrad"], range(5))
    head, _, first, second, third = text.splitlines()
    assert head.count("|") == first.count("|") == 6
    assert first == "| equal | 0.6 (0.5 to 0.7) |  |  |  |"
    expected = "| GradNorm α 0 | 0.3 (0.25 to 0.35) **−** | 0.5 (0.5 to 0.5) | 1.40 | pde 3, initial 2 |"
    assert second == expected
    assert third.startswith("| UPGrad | 0.594 (0.505 to 0.707) | 0.99 (")


def test_static_weights_are_drawn_over_four_decades_and_sum_to_the_number_of_tasks(script: ModuleType) -> None:
    draws = [script.static_weights(["pde", "boundary", "initial"], draw) for draw in range(200)]
    assert draws[7] == script.static_weights(["pde", "boundary", "initial"], 7)
    ratios = [one["pde"] / one["boundary"] for one in draws]
    assert all(sum(one.values()) == pytest.approx(3) and min(one.values()) > 0 for one in draws)
    assert max(ratios) > 1000
    assert min(ratios) < 1 / 1000
    assert 0.4 < sum(ratio > 1 for ratio in ratios) / 200 < 0.6


def test_a_strategy_that_cannot_be_trained_is_named_before_anything_is(
    call: Call, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.ARMS, "GradNorm α 0", lambda: GradNorm(["pde", "bc"]))
    with pytest.raises(SystemExit, match=r"reproduce_pinn: GradNorm α 0 fails .*bc.*; choose others with --arms"):
        call("--quick", "--arms", "GradNorm α 0")
    assert not (tmp_path / "outputs").exists()


def test_a_line_is_read_as_it_was_written(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "runs.csv"
    written = [
        result(script, "equal", seed, 0.1 / 3, weights='{"pde": 1.5}', settings='{"a": "b, c"}') for seed in (0, 1)
    ]
    for one in written:
        script.append_run(file, one)
    assert [asdict(one) for one in script.read_runs(file)] == [asdict(one) for one in written]
    assert script.read_runs(tmp_path / "none.csv") == []
