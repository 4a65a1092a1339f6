"""The table of remaining useful life: its trainings, what it keeps, and its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from commands import start_no_process
from configurations import compose_run

from lightning_gradnorm.experiments.cli.build import build
from lightning_gradnorm.experiments.problems.engines.turbofan import write_turbofan
from lightning_gradnorm.experiments.report import Run

SCRIPT = "reproduce_rul"
LOG = (  # six logged steps, with validation in between; only the last two steps count
    "epoch,gradnorm/loss,gradnorm/weight/rul,gradnorm/weight/health,gradnorm/grad_norm/rul,gradnorm/grad_norm/health,"
    "val/rmse/rul\n"
    + "0,9,1,1,5,5,\n0,,,,,,14.5\n"
    + 3 * "1,9,1,1,5,5,\n"
    + "1,,,,,,12.5\n1,2,1,1,3,5,\n2,1,2,1,4,6,\n2,,,,,,13\n"
)
Call = Callable[..., str]


@pytest.fixture
def made_up(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The jobs that were asked for; they are not trained, but made up."""
    asked: dict[str, list[str]] = {}

    def finished_runs(jobs: dict[str, list[str]], folder: Path, **_: Any) -> list[Run]:
        asked.update(jobs)
        runs = []
        for name in jobs:
            *_, method, seed = name.split("/")
            better = 3 if method == "gradnorm" and seed != "2" else 0
            (folder / name).mkdir(parents=True)
            seconds = (1.1 if method == "gradnorm" else 1.0) * (1 + int(seed))
            (folder / name / "training.json").write_text(json.dumps({"processor_seconds": seconds, "seconds": 9.0}))
            (folder / name / "metrics.csv").write_text(LOG)
            runs.append(Run(name, {column.metric: 10.0 + int(seed) - better for column in script.COLUMNS}))
        return runs

    monkeypatch.setattr(script, "finished_runs", finished_runs)
    return asked


@pytest.mark.parametrize("processes", ["this", pytest.param("of their own", marks=pytest.mark.slow)])
def test_the_quick_table_is_trained_measured_and_kept(
    processes: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if processes == "this":
        start_no_process(monkeypatch)
    told = call("--quick")
    page = (tmp_path / "outputs" / "rul.md").read_text()
    assert "Simulated engines" in told
    assert "**Simulated engines**" in page
    assert "`python scripts/reproduce_rul.py --quick" in page
    for method in ("fixed", "gradnorm"):
        folder = tmp_path / "outputs" / "rul" / "mlp" / "FD001" / method / "0"
        metrics = json.loads((folder / "test_metrics.json").read_text())
        assert f"{metrics['test/rmse/rul']:.2f}" in page
        assert json.loads((folder / "training.json").read_text())["steps"] > 0
        assert set(json.loads((folder / "weights.json").read_text())["weights"]) == {"rul", "health"}


def test_all_methods_and_subsets_compose_as_the_command_line_does(
    call: Call, made_up: dict[str, list[str]], tmp_path: Path
) -> None:
    call("--seeds", "4", "--subsets", "FD001", "FD002")
    assert len(made_up) == 2 * 14
    by_method = {}
    for name, overrides in made_up.items():
        by_method.setdefault(name.split("/")[2], []).append(overrides)
    # Composing takes a fifth of a second: each method with one of the subsets, in turns.
    configs = [compose_run(tmp_path, *found[place % 2]) for place, found in enumerate(by_method.values())]
    assert {(config.data.subset, config.trainer.max_epochs) for config in configs} == {("FD001", 30), ("FD002", 18)}
    assert {config.seed for config in configs} == {4}
    assert {config.data.seed for config in configs} == {0}
    assert {type(build(config, "balancing")).__name__ for config in configs} == {
        "FixedWeights",
        "Scalarization",
        "GradNorm",
        "Aggregation",
        "NoneType",  # equal weights
    }
    weighted = {config.model.tasks.weighted for config in configs if "AMNL" in str(config.balancing)}
    assert weighted == {True}
    assert sum(config.model.tasks.weighted for config in configs) == 2
    assert {build(config, "model").encoder.in_features for config in configs} == {30 * 14, 30 * 20}


def test_the_real_files_take_the_simulators_place(call: Call, made_up: dict[str, list[str]], tmp_path: Path) -> None:
    write_turbofan(tmp_path / "my files", "FD001", engines=4, test_engines=3, seed=0)
    told = call("--root", "my files", "--subsets", "FD001", "--seeds", "0", "--methods", "fixed")
    config = compose_run(tmp_path, *made_up["mlp/FD001/fixed/0"])
    assert config.data.root == str(tmp_path / "my files")
    assert "Simulated" not in told


def test_seeds_are_five_where_the_published_table_is_and_three_elsewhere(
    call: Call, made_up: dict[str, list[str]]
) -> None:
    call("--methods", "fixed")
    assert [sum(f"/{subset}/" in name for name in made_up) for subset in ("FD001", "FD002", "FD003", "FD004")] == [
        5,
        5,
        3,
        3,
    ]


def test_the_table_has_means_and_deviations_next_to_published_values(call: Call, made_up: Any, tmp_path: Path) -> None:
    call("--methods", "fixed", "gradnorm", "amnl_2", "--subsets", "FD002", "--seeds", "0", "1", "2", "--output", "docs")
    page = (tmp_path / "docs" / "rul.md").read_text()
    (fixed,) = [line for line in page.splitlines() if line.startswith("| fixed")]
    gradnorm, tested, traced = (line for line in page.splitlines() if line.startswith("| gradnorm"))
    cells = [cell.strip() for cell in gradnorm.split("|")[2:-1]]
    # 7, 8 and 12: their mean is 9 and their deviation √7
    assert cells[:3] == ["9.00 ± 2.65", "9 ± 3", "900.0 ± 264.6"]
    assert cells[3] == "1.10 ± 0.00"
    assert cells[4:] == ["*15.8*", "*2.8*", "*8.19 ± 0.78*", "*260.9 ± 36.1*"]
    assert "11.00 ± 1.00" in fixed
    # Differences of -3, -3 and 0: mean -2, deviation √3, t = -2 on two degrees of freedom, p = 1 - 2/√6.
    assert [cell.strip() for cell in tested.split("|")[2:-1]] == ["-2.00, 0.184", "-2, 0.184", "-200.0, 0.184"]
    # Two steps: log w of 0 and log 2, 0 and 0; 2/8 and 1/10.
    assert [cell.strip() for cell in traced.split("|")[2:-1]] == ["0.490", "0.000", "0.17"]


def test_settings_are_compared_on_validation_engines_alone(
    call: Call, made_up: dict[str, list[str]], tmp_path: Path
) -> None:
    told = call("--choose", "--subsets", "FD003")
    assert len(made_up) == 3 * 2 * 2
    assert all("balancing=fixed" in given for given in made_up.values())
    assert "| FD003 | 1e-3 | 512 | 12.50 ± 0.00 | 2, 2 |" in told
    assert not (tmp_path / "docs").exists()


def test_one_thing_is_changed_at_a_time(call: Call, made_up: dict[str, list[str]], tmp_path: Path) -> None:
    call("--ablate", "--seeds", "0", "1", "--output", "docs")
    configs = {
        name.split("/")[2]: compose_run(tmp_path, *given) for name, given in made_up.items() if name.endswith("/0")
    }
    base = configs.pop("as in the table")
    assert base.callbacks.checkpoint.monitor == "val/rmse/rul"
    assert configs["the last epoch"].callbacks.checkpoint is None
    assert configs["window of 50, padded"].data.window == 50
    assert configs["the book's network in small"].model.encoder.hidden == 16
    assert all(config != base for config in configs.values())
    assert "| window of 20 | 10.50 ± 0.71 |" in (tmp_path / "docs" / "rul_ablation.md").read_text()
