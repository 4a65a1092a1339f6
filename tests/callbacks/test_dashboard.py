"""TensorBoard shows the weights, norms, rates and loss ratios of a run in one ready-made view."""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.util.tensor_util import make_ndarray
from torch import nn
from torch.utils.data import DataLoader
from torchjd.aggregation import MGDA, GradDrop
from torchjd.scalarization import DWA
from torchmetrics import MeanAbsoluteError, MeanSquaredError

from lightning_gradnorm import (
    Aggregation,
    FixedWeights,
    GradientNormMonitor,
    GradNorm,
    MultiTaskModule,
    Scalarization,
    Task,
)
from lightning_gradnorm.callbacks import TensorBoardDashboard
from lightning_gradnorm.callbacks.packages import is_one_of

STEPS = 6


Train = Callable[..., Path]


@pytest.fixture
def train(tmp_path: Path, quiet_trainer: Callable[..., L.Trainer]) -> Train:
    """`train(*callbacks, **options)` trains a small model with the dashboard; returns the folder of the events."""
    number = itertools.count()

    def fit(*callbacks: L.Callback, **options: Any) -> Path:
        tasks = {
            "near": Task(nn.Linear(3, 1), nn.MSELoss(), {"mae": MeanAbsoluteError(), "mse": MeanSquaredError()}),
            "far": Task(nn.Linear(3, 1), nn.MSELoss(), {"mae": MeanAbsoluteError()}),
        }
        module = options.pop("module", {})
        model = MultiTaskModule(nn.Linear(2, 3), tasks, **module)
        batch = (torch.randn(4, 2), {"near": torch.randn(4, 1), "far": 10 * torch.randn(4, 1)})
        folder = tmp_path / f"logs{next(number)}"
        logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
        trainer = quiet_trainer(callbacks=[*callbacks, TensorBoardDashboard()], logger=logger, **options)
        trainer.fit(model, DataLoader([batch] * STEPS, batch_size=None), DataLoader([batch], batch_size=None))
        return folder

    return fit


@pytest.fixture
def run(train: Train) -> Path:
    return train(GradNorm())


def test_every_scalar_is_written_at_every_step(run: Path) -> None:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    expected = {
        f"gradnorm/{what}/{t}" for what in ("weight", "grad_norm", "rate", "loss_ratio") for t in ("near", "far")
    }
    assert expected | {"gradnorm/loss", "train/loss/near", "train/loss/far"} <= set(events.Tags()["scalars"])
    for tag in expected:
        assert len(events.Scalars(tag)) == STEPS
    for near, far in zip(events.Scalars("gradnorm/weight/near"), events.Scalars("gradnorm/weight/far"), strict=True):
        assert near.value + far.value == pytest.approx(2.0)


STRATEGIES = {
    "none": (list, ["training losses, by task"]),
    "gradnorm": (
        lambda: [GradNorm()],
        [
            "task weights w",
            "gradient norms G of the tasks",
            "relative inverse training rates r",
            "loss ratios L / L(0)",
            "training losses, by task",
        ],
    ),
    "fixed": (lambda: [FixedWeights({"near": 1.5, "far": 0.5})], ["task weights w", "training losses, by task"]),
    "of losses": (lambda: [Scalarization(DWA)], ["task weights w", "training losses, by task"]),
    "with weights": (
        lambda: [Aggregation(MGDA())],
        ["task weights w", "gradient norms G of the tasks", "training losses, by task"],
    ),
    "without weights": (
        lambda: [Aggregation(GradDrop())],
        ["gradient norms G of the tasks", "training losses, by task"],
    ),
}


def charts_of(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return category → chart → tags, as the run's last layout has them, in their order."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    last = events.Tensors("custom_scalars__config__")[-1].tensor_proto
    layout = Layout.FromString(make_ndarray(last).item())
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }


@pytest.mark.parametrize("name", STRATEGIES)
def test_there_are_the_charts_of_what_the_strategy_logs_and_no_other(name: str, train: Train) -> None:
    callbacks, expected = STRATEGIES[name]
    folder = train(*callbacks())
    charts = charts_of(folder)
    assert list(charts) == ["Balancing", "Validation"]
    assert list(charts["Balancing"]) == expected
    assert list(charts["Validation"]) == ["sum of the losses", "losses, by task", "mae, by task", "mse, by task"]
    for tags, shown in shown_in(folder).items():
        assert shown, f"the chart of {tags} is empty"
    shown = shown_in(folder)
    assert shown["val/mae/"] == {"val/mae/near", "val/mae/far"}
    assert shown["val/loss/"] == {"val/loss/near", "val/loss/far"}
    assert shown["val/loss$"] == {"val/loss"}


def shown_in(folder: Path) -> dict[str, set[str]]:
    """Return what each chart's regular expression finds among the scalars that were written, as TensorBoard looks for it."""
    events = EventAccumulator(str(folder))
    events.Reload()
    patterns = [tag for charts in charts_of(folder).values() for tags in charts.values() for tag in tags]
    return {tags: {tag for tag in events.Tags()["scalars"] if re.match(tags, tag)} for tags in patterns}


def test_the_monitor_has_a_row_of_its_own(train: Train) -> None:
    folder = train(GradientNormMonitor(every_n_steps=2))
    assert list(charts_of(folder)["Gradient-norm monitor"]) == [
        "share of the update",
        "gradient norms",
        "imbalance, largest norm / smallest",
    ]
    assert shown_in(folder)["monitor/share/"] == {"monitor/share/near", "monitor/share/far"}
    assert shown_in(folder)["monitor/imbalance$"] == {"monitor/imbalance"}


@pytest.mark.parametrize("options", [{"num_sanity_val_steps": 1}, {"module": {"accumulate_grad_batches": 3}}], ids=str)
def test_the_charts_are_there_whatever_comes_first(options: dict[str, Any], train: Train) -> None:
    charts = charts_of(train(GradNorm(initial_losses=2), **options))
    assert list(charts["Balancing"]) == STRATEGIES["gradnorm"][1]
    assert len(charts["Validation"]) == 4


def test_a_tensorboard_logger_of_either_lightning_is_known_and_no_other_logger(tmp_path: Path) -> None:
    # A stand-in: importing pytorch_lightning would change where Lightning's messages go, for all tests that follow.
    other = type("TensorBoardLogger", (), {"__module__": "pytorch_lightning.loggers.tensorboard"})
    for kind in (TensorBoardLogger, other):
        subclass = type("Mine", (kind,), {})
        assert is_one_of(subclass(tmp_path) if kind is TensorBoardLogger else subclass(), "TensorBoardLogger")
    assert not is_one_of(CSVLogger(tmp_path), "TensorBoardLogger")


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return bytes(answer.read())


def test_tensorboard_shows_the_charts_of_runs_with_different_strategies_in_one_view(train: Train) -> None:
    """It merges the layouts in the runs' order, and loses the charts of a category that the first run does not have."""
    for name in ("none", "of losses", "with weights", "gradnorm"):
        folder = train(*STRATEGIES[name][0]()).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            address = f"http://127.0.0.1:{port}/data"
            layout = None
            for _ in range(120):
                try:
                    layout = json.loads(_get(f"{address}/plugin/custom_scalars/layout"))
                    tags = json.loads(_get(f"{address}/plugin/scalars/tags"))
                    if layout and len(tags) == 4 and all(tags.values()):
                        break
                except OSError:
                    pass
                time.sleep(0.5)
        finally:
            server.terminate()
    assert layout is not None
    assert [category["title"] for category in layout["category"]] == ["Balancing", "Validation"]
    charts = {
        chart["title"]: chart["multiline"]["tag"] for category in layout["category"] for chart in category["chart"]
    }
    assert set(charts) >= set(STRATEGIES["gradnorm"][1])
    assert len(charts) == 9
    written = [tag for of_run in tags.values() for tag in of_run]
    for title, patterns in charts.items():
        assert any(re.match(pattern, tag) for pattern in patterns for tag in written), f"the chart {title} is empty"
