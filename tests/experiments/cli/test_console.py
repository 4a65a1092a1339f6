"""What a run shows in the terminal, from its first line to its last, and what it does not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from configurations import QUICK, SMALL

from lightning_gradnorm.experiments.callbacks.console import as_text, numbers
from lightning_gradnorm.experiments.cli import console, evaluate, train
from lightning_gradnorm.experiments.report import read_run

Call = Callable[..., str]
OPTIONS = [*SMALL, *(one for one in QUICK if "enable" not in one)]
NOISE = ("v_num", "weights_only", "Tip", "TPU", "FLOP", "litlogger", "[HYDRA]", "Warning")


FIXED = ["balancing=fixed", "balancing.weights={task_0: 1.5, task_1: 0.5}"]
COMMANDS = {
    "a run": [*OPTIONS, "trainer.max_epochs=2", "hydra.run.dir=run", "callbacks.last.every_n_train_steps=1"],
    "a sweep": ["-m", *OPTIONS, "logger=csv", "balancing=equal,gradnorm", "hydra.sweep.dir=my sweep"],
    "fixed weights": [*OPTIONS, "logger=csv", "callbacks.interrupt=null", *FIXED],
}
ONE_AFTER_THE_OTHER = """
import json, sys
from hydra.core.global_hydra import GlobalHydra
from lightning_gradnorm.experiments.cli import train
for arguments in json.loads(sys.argv[1]):
    GlobalHydra.instance().clear()
    sys.argv = ["gradnorm-train", *arguments]
    train.main()
    print("== end ==", flush=True)
"""


class Shown(NamedTuple):
    """What each command has printed, and where they ran."""

    said: dict[str, str]
    folder: Path


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The commands in one fresh process, whose logging is not pytest's; the first shows what appears once per process."""
    folder = tmp_path_factory.mktemp("shown")
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(list(COMMANDS.values()))],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    *said, rest = done.stdout.split("== end ==\n")
    assert rest == ""
    return Shown(dict(zip(COMMANDS, said, strict=True)), folder)


def test_a_run_shows_losses_and_weights_and_no_advertisements(shown: Shown) -> None:
    said = shown.said["a run"]
    assert [word for word in NOISE if word in said] == []
    assert said.count("GPU available") == 1
    assert "Network: encoder 33,600, tasks.task_0 10,100, tasks.task_1 10,100; 53,800 parameters, all trained" in said
    lines = re.findall(r"train: (\S+) val: (\S+) w: task_0 (\S+), task_1 (\S+)", said)
    train_loss, val_loss, *weights = map(float, lines[-1])
    logged = (shown.folder / "run/metrics.json").read_text()
    for name, value in (("train/loss", train_loss), ("val/loss", val_loss)):
        (exact,) = re.findall(rf'"{name}": ([\d.e+-]+)', logged)
        assert value == pytest.approx(float(exact), rel=1e-3)
    assert sum(weights) == pytest.approx(2, abs=0.02)
    assert "tensorboard --logdir run\n" in said


def test_a_sweep_shows_each_line_once_and_how_to_compare_its_runs(shown: Shown) -> None:
    said = shown.said["a sweep"]
    assert said.count("Network: encoder 33,600") == 2
    assert said.count("GPU available") == 2
    assert re.search(r"^compare +\S*gradnorm-report 'my sweep'$", said, re.MULTILINE)


@pytest.mark.parametrize("job", ["fixed weights", "a sweep"])
def test_other_strategies_show_the_weights_that_they_have(shown: Shown, job: str) -> None:
    said = shown.said[job].partition("#1 : ")[0]  # of the sweep, the job with equal weights
    assert re.search(r"train: \S+ val: \S+", said)
    assert (" w: " in said) == (job == "fixed weights")
    assert ("w: task_0 1.5, task_1 0.5" in said) == (job == "fixed weights")


def test_the_weights_of_four_tasks_have_room() -> None:
    weights = {f"balancing/weight/{name}": value for name, value in zip("abcde", range(1, 6), strict=True)}
    assert numbers(weights)["w"] == "a 1, b 2, c 3, d 4, …"
    assert numbers({**weights, "val/loss": torch.tensor(0.00012345), "val/loss/a": 3.0})["val"] == "0.0001234"
    assert numbers({"train/loss/a": 1.0, "gradnorm/loss": 2.0}) == {}


def test_the_description_of_a_network_counts_frozen_parameters() -> None:
    network = torch.nn.ModuleDict(
        {"trunk": torch.nn.Linear(2, 3), "head": torch.nn.LazyLinear(2), "act": torch.nn.ReLU()}
    )
    network["trunk"].requires_grad_(False)
    assert as_text(network) == "Network: trunk 9, head 0; 9 parameters, 0 of them trained"


def test_bar_and_network_can_be_switched_off(call: Call, caplog: pytest.LogCaptureFixture) -> None:
    said = call(train.main, *SMALL, *QUICK, "logger=csv", "hydra.run.dir=run")
    assert "GradNorm: W = " in said + caplog.text
    assert "Network:" not in said + caplog.text
    assert "train: " not in said
    assert "task_0" in call(evaluate.main, "ckpt_path=run/checkpoints/best.ckpt")
    assert read_run("run").metrics


def test_a_command_is_printed_so_that_the_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = tmp_path / ".venv" / "bin"
    here.mkdir(parents=True)
    (here / "gradnorm-train").write_text("#!/bin/sh\n")
    (here / "gradnorm-train").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert console.executable("gradnorm-train") == ".venv/bin/gradnorm-train"
    assert console.executable("tensorboard") == "tensorboard"  # not installed beside it: the user's own
    monkeypatch.setenv("PATH", str(here))
    assert shutil.which("gradnorm-train") is not None
    assert console.executable("gradnorm-train") == "gradnorm-train"
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("PATH", "/nowhere")
    assert console.executable("gradnorm-train") == str(here / "gradnorm-train")
