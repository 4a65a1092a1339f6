"""The table of remaining useful life: what is trained, what is kept, and the numbers in it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_gradnorm.cli.build import build
from lightning_gradnorm.data.turbofan import write_turbofan

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce_rul.py"
TWO = ["--quick", "--methods", "fixed", "gradnorm", "--subsets", "FD001"]
Call = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, in an empty folder."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    specification = importlib.util.spec_from_file_location("reproduce_rul", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "reproduce_rul", module)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "be_quiet", lambda: None)  # changes the process
    return module


@pytest.fixture
def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        script.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def trained(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The overrides of all runs; they are not trained, but made up."""
    runs: list[list[str]] = []

    def made_up(given: list[str]) -> dict[str, Any]:
        runs.append(given)
        seed = int(next(one for one in given if one.startswith("seed=")).removeprefix("seed="))
        by_gradnorm = "balancing=gradnorm" in given
        metrics = {column.metric: 10.0 + seed - (3 if by_gradnorm and seed != 2 else 0) for column in script.COLUMNS}
        seconds = (1.1 if by_gradnorm else 1.0) * (1 + seed)
        return {"overrides": given, "metrics": metrics, "seconds": seconds, "steps": 5, "parameters": 1234}

    monkeypatch.setattr(script, "run", made_up)
    return runs


@pytest.mark.filterwarnings("ignore")
def test_the_quick_table_is_trained_measured_and_kept(script: ModuleType, call: Call, tmp_path: Path) -> None:
    told = call(*TWO)
    files = sorted((tmp_path / "outputs" / "rul").iterdir())
    assert [file.name.rsplit("_", 1)[0] for file in files] == ["FD001_fixed_0", "FD001_gradnorm_0"]
    page = (tmp_path / "outputs" / "rul.md").read_text()
    assert "Simulated engines" in told
    assert "**Simulated engines**" in page
    assert "`python scripts/reproduce_rul.py --quick" in page
    for file in files:
        kept = json.loads(file.read_text())
        assert kept["seconds"] > 0
        assert kept["steps"] == 3
        assert set(kept["weights"]) == {"rul", "health"}
        assert f"{kept['metrics']['test/rmse/rul']:.2f}" in page
    again = call(*TWO)
    assert again.count("(finished before)") == 2
    assert again.split("## FD001")[1] == told.split("## FD001")[1]


def test_all_methods_and_subsets_compose_as_the_command_line_does(script: ModuleType, call: Call, trained: Any) -> None:
    call("--seeds", "4")
    assert len(trained) == 2 * 6
    configs = [script.composed(given, "RUN") for given in trained]
    assert {config.data.subset for config in configs} == {"FD001", "FD002"}
    assert {config.seed for config in configs} == {4}
    assert {config.data.seed for config in configs} == {0}
    assert {type(build(config, "balancing")).__name__ for config in configs} == {
        "FixedWeights",
        "Scalarization",
        "GradNorm",
        "Aggregation",
    }
    weighted = {config.model.tasks.weighted for config in configs if "AMNL" in str(config.balancing)}
    assert weighted == {True}
    assert sum(config.model.tasks.weighted for config in configs) == 2


def test_what_is_finished_is_not_trained_again_and_what_differs_is(
    script: ModuleType, call: Call, trained: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(*TWO)
    assert len(trained) == 2
    call(*TWO)
    assert len(trained) == 2
    call(*TWO, "--set", "model.optimizer.lr=1e-4")
    assert len(trained) == 4
    write_turbofan(tmp_path / "files", "FD001", engines=4, test_engines=3, seed=0)
    for _ in range(2):
        told = call(*TWO, "--root", "files")
        assert len(trained) == 6
    assert "Simulated" not in told
    with (tmp_path / "files" / "train_FD001.txt").open("a") as file:
        file.write("\n")
    call(*TWO, "--root", "files")
    assert len(trained) == 8
    monkeypatch.setattr(script.L, "__version__", "0")
    call(*TWO)
    assert len(trained) == 10


def test_a_run_that_was_stopped_is_trained_again(
    script: ModuleType, call: Call, trained: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = script.run

    def stopped(given: list[str]) -> dict[str, Any]:
        if "balancing=gradnorm" in given:
            raise KeyboardInterrupt
        return whole(given)

    monkeypatch.setattr(script, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        call(*TWO)
    monkeypatch.setattr(script, "run", whole)
    trained.clear()
    assert call(*TWO).count("(finished before)") == 1
    assert [one for given in trained for one in given if one.startswith("balancing=")] == ["balancing=gradnorm"]


def test_the_table_has_means_and_deviations_beside_what_was_published(call: Call, trained: Any, tmp_path: Path) -> None:
    call("--methods", "fixed", "gradnorm", "amnl_2", "--subsets", "FD002", "--output", "docs")
    page = (tmp_path / "docs" / "rul.md").read_text()
    (fixed,) = [line for line in page.splitlines() if line.startswith("| fixed")]
    (gradnorm,) = [line for line in page.splitlines() if line.startswith("| gradnorm")]
    cells = [cell.strip() for cell in gradnorm.split("|")[2:-1]]
    # 7, 8 and 12, of which the mean is 9 and the deviation √7
    assert cells[:4] == ["9.00 ± 2.65", "9.00 ± 2.65", "9 ± 3", "900.0 ± 264.6"]
    assert cells[4] == "1.10 ± 0.00"
    assert cells[5:] == ["*15.8*", "*2.8*", "*8.19 ± 0.78*", "*260.9 ± 36.1*"]
    assert "11.00 ± 1.00" in fixed
    assert "RMSE: best on average is **gradnorm**; of 3 seeds it beats fixed in 2, amnl_2 in 2." in page
    assert "accuracy, %: best on average is **fixed**; of 3 seeds it beats gradnorm in 2, amnl_2 in 0." in page
    assert "1,234 parameters" in page
