"""The comparison on two digits: its trainings, and the numbers in its tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from configurations import compose_run

from lightning_gradnorm.experiments.cli.build import build
from lightning_gradnorm.experiments.report import Run

SCRIPT = "reproduce_digits"
LOG = "step,gradnorm/loss,gradnorm/weight/left,gradnorm/grad_norm/left\n" + "9,1,1,4\n" * 6


def test_the_remedies_are_tested_against_plain_gradnorm_seed_by_seed(
    script: ModuleType, call: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[str]] = {}

    def finished_runs(jobs: dict[str, list[str]], folder: Path, **_: Any) -> list[Run]:
        asked.update(jobs)
        runs = []
        for name in jobs:
            arm, seed = name.split("/")
            (folder / name).mkdir(parents=True)
            (folder / name / "metrics.csv").write_text(LOG)
            better = {"gradnorm, log": (0.03, 0.03, 0.0)[int(seed)]}.get(arm, 0.0)
            runs.append(Run(name, {metric: 0.5 + int(seed) / 10 + better for metric in script.COLUMNS}))
        return runs

    monkeypatch.setattr(script, "finished_runs", finished_runs)
    told = call("--seeds", "0", "1", "2")
    page = (tmp_path / "docs" / "results" / "digits.md").read_text()
    assert "| gradnorm, log | 62.00 ± 8.54 (p 0.184) |" in page  # t = 2 on two degrees of freedom
    assert "| gradnorm | 0.000 | 0.25 |" in told
    assert (tmp_path / "docs" / "results" / "digits.png").stat().st_size > 10_000
    made = [build(compose_run(tmp_path, *overrides), "balancing") for overrides in asked.values()]
    spaces = [(one.weight_space, one.smoothing) for one in made if one is not None]
    assert spaces == 3 * [("linear", 0.0), ("log", 0.0), ("linear", 0.9)]
