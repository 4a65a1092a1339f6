"""`gradnorm-train trainer=ddp_cpu`: forked processes write the same files as one process, also in a sweep and at Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import farthest
from machines import MODULE

from lightning_gradnorm.experiments.cli import hparams, train
from lightning_gradnorm.experiments.report import read_run

LAST = "checkpoints/last.ckpt"
OPTIONS = [
    "trainer=ddp_cpu",
    "data.sigmas=[1, 5, 9]",
    "data.train_size=400",
    "data.val_size=100",
    "data.test_size=100",
    "data.batch_size=50",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "logger=csv",
]


def test_two_forked_processes_train_like_one_and_write_the_same_files(call: Callable[..., str], tmp_path: Path) -> None:
    """Weights, network and test metrics: each of the two has one half of every batch."""
    options = [*OPTIONS, "trainer.precision=64-true", "trainer.max_epochs=2"]
    said = call(train.main, *options, "hydra.run.dir=two")
    assert said.count("Test metrics by task") == 1
    call(train.main, *options, "trainer=cpu", "data.batch_size=100", "hydra.run.dir=one")
    weights, network = farthest(tmp_path / "two" / LAST, tmp_path / "one" / LAST)
    assert weights <= 1e-9
    assert network <= 1e-9
    one, two = (json.loads((tmp_path / run / "weights.json").read_text()) for run in ("one", "two"))
    assert two["weights"] != dict.fromkeys(two["weights"], 1.0)
    assert two["weights"] == pytest.approx(one["weights"], abs=1e-6)
    assert one.keys() == two.keys()
    first, second = (read_run(tmp_path / run).metrics for run in ("one", "two"))
    assert second == pytest.approx(first, rel=1e-4)  # the same names, those of the test alone
    files = {run: {file.name for file in (tmp_path / run).iterdir()} for run in ("one", "two")}
    assert files["one"] == files["two"]


@pytest.mark.slow
def test_a_sweep_in_two_processes_runs_each_once(call: Callable[..., str], tmp_path: Path) -> None:
    options = [*OPTIONS[:-1], "trainer.max_epochs=1", "callbacks=none", "hydra.sweep.dir=sweep"]
    call(train.main, "-m", *options, "balancing=equal,famo")
    runs = sorted(folder.name for folder in (tmp_path / "sweep").iterdir() if folder.is_dir())
    assert runs == ["0_equal", "1_famo"]
    assert [(tmp_path / "sweep" / run / "weights.json").exists() for run in runs] == [False, True]
    for run in runs:  # one version of the forked training, one of the forked test
        versions = {folder.name for folder in (tmp_path / "sweep" / run / "csv").iterdir()}
        assert versions == {"version_0", "version_1"}
        assert (tmp_path / "sweep" / run / "tensorboard" / hparams.FILE).is_file()


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_ends_all_processes_and_prints_how_to_continue(start: Any, tmp_path: Path) -> None:
    process = start(*MODULE, *OPTIONS, "trainer.max_epochs=100000", "hydra.run.dir=run")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/checkpoints/last.ckpt").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "gradnorm-train ckpt_path=run/checkpoints/last.ckpt" in said
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
