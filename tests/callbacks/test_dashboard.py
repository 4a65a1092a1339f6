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
from lightning_gradnorm.callbacks.dashboard import split_name
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
def test_only_values_that_the_strategy_logs_have_charts(name: str, train: Train) -> None:
    callbacks, expected = STRATEGIES[name]
    folder = train(*callbacks())
    charts = charts_of(folder)
    assert list(charts) == ["Balancing", "Validation"]
    assert list(charts["Balancing"]) == expected
    assert list(charts["Validation"]) == ["losses, by task", "mae, by task", "mse, by task"]
    for tags, shown in shown_in(folder).items():
        assert shown, f"the chart of {tags} is empty"
    shown = shown_in(folder)
    assert shown["val/mae$"] == {("near", "val/mae"), ("far", "val/mae")}
    assert shown["val/mse$"] == {("near", "val/mse")}
    assert shown["val/loss$"] == {(".", "val/loss"), ("near", "val/loss"), ("far", "val/loss")}


def scalars_of(folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Return (run, tag) → steps and values of a logger's folder: its own run is ``.``, and those of the tasks are below it."""
    found = {}
    for place in [folder, *(one for one in folder.iterdir() if one.is_dir())]:
        events = EventAccumulator(str(place), size_guidance={"scalars": 0})
        events.Reload()
        name = str(place.relative_to(folder))
        for tag in events.Tags()["scalars"]:
            found[name, tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def shown_in(folder: Path) -> dict[str, set[tuple[str, str]]]:
    """Return what each chart's regular expression finds in the runs, as TensorBoard looks for it."""
    written = scalars_of(folder)
    patterns = [tag for charts in charts_of(folder).values() for tags in charts.values() for tag in tags]
    return {tags: {(run, tag) for run, tag in written if re.match(tags, tag)} for tags in patterns}


@pytest.mark.parametrize("name", ["gradnorm", "of losses", "with weights"])
def test_each_task_is_a_run_with_the_same_numbers(name: str, train: Train) -> None:
    """TensorBoard colors by run: one chart of all weights has a line with each task's name and color."""
    written = scalars_of(train(*STRATEGIES[name][0](), GradientNormMonitor(every_n_steps=2), num_sanity_val_steps=1))
    of_task = {tag: curve for (run, tag), curve in written.items() if run == "." and tag.endswith(("/near", "/far"))}
    alone = {tag for tag in of_task if tag.startswith(("monitor/cosine", "monitor/conflict"))}
    prefix = "gradnorm" if name == "gradnorm" else "balancing"
    assert {f"{prefix}/weight/near", "train/loss/far", "val/mae/far", "monitor/share/near"} <= set(of_task)
    for tag, curve in of_task.items():
        if tag not in alone:
            start, _, task = tag.rpartition("/")
            assert written[task, start] == curve, tag
    assert {run for run, _ in written} == {".", "near", "far"}
    assert len(written) == len({tag for run, tag in written if run == "."}) + len(of_task) - len(alone)


def test_the_test_is_in_the_runs_of_the_tasks_and_the_logger_is_as_it_was(
    tmp_path: Path, quiet_trainer: Callable[..., L.Trainer]
) -> None:
    tasks = {name: Task(nn.Linear(3, 1), nn.MSELoss()) for name in ("a/b", "c d")}  # names that are no folders
    batch = (torch.randn(4, 2), {name: torch.randn(4, 1) for name in tasks})
    loader = DataLoader([batch] * STEPS, batch_size=None)
    logger, beside = TensorBoardLogger(tmp_path, name="", version=""), CSVLogger(tmp_path / "csv")
    trainer = quiet_trainer(callbacks=[GradNorm(), TensorBoardDashboard()], logger=[logger, beside])
    model = MultiTaskModule(nn.Linear(2, 3), tasks)
    trainer.fit(model, loader)
    trainer.test(model, loader, verbose=False)
    assert "log_metrics" not in vars(logger)
    written = scalars_of(tmp_path)
    for task, run in (("a/b", "a-b"), ("c d", "c-d")):
        assert written[run, "test/loss"] == written[".", f"test/loss/{task}"]
    assert "gradnorm/weight/a/b" in (Path(beside.log_dir) / "metrics.csv").read_text()


def test_an_error_in_training_leaves_the_logger_as_it_was(train: Train) -> None:
    seen: list[L.Trainer] = []

    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(trainer)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(GradNorm(), Stops())
    assert "log_metrics" not in vars(seen[0].logger)


def test_names_of_one_task_are_distinguished_from_all_others() -> None:
    of_task = {
        "gradnorm/weight/a": ("gradnorm/weight", "a"),
        "balancing/grad_norm/a/b": ("balancing/grad_norm", "a/b"),
        "train/loss/a": ("train/loss", "a"),
        "test/r2/a": ("test/r2", "a"),
        "physics/share/a": ("physics/share", "a"),
    }
    alone = (
        "gradnorm/loss",
        "gradnorm/skipped",
        "val/loss",
        "val/loss_ratio",
        "best/val/loss",
        "monitor/imbalance",
        "lr-Adam",
    )
    assert {name: split_name(name) for name in of_task} == of_task
    assert [name for name in (*alone, "monitor/cosine/a/b") if split_name(name) is not None] == []


def test_the_monitor_has_its_own_row(train: Train) -> None:
    folder = train(GradientNormMonitor(every_n_steps=2))
    assert list(charts_of(folder)["Gradient-norm monitor"]) == [
        "share of the update",
        "gradient norms",
        "imbalance, largest norm / smallest",
    ]
    assert shown_in(folder)["monitor/share$"] == {("near", "monitor/share"), ("far", "monitor/share")}
    assert shown_in(folder)["monitor/imbalance$"] == {(".", "monitor/imbalance")}


@pytest.mark.parametrize("options", [{"num_sanity_val_steps": 1}, {"module": {"accumulate_grad_batches": 3}}], ids=str)
def test_the_charts_exist_in_any_order_of_events(options: dict[str, Any], train: Train) -> None:
    charts = charts_of(train(GradNorm(initial_losses=2), **options))
    assert list(charts["Balancing"]) == STRATEGIES["gradnorm"][1]
    assert len(charts["Validation"]) == 3


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
                    if layout and len(tags) == 12 and all(tags.values()):
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
    assert len(charts) == 8
    written = [tag for of_run in tags.values() for tag in of_run]
    for title, patterns in charts.items():
        assert any(re.match(pattern, tag) for pattern in patterns for tag in written), f"the chart {title} is empty"
