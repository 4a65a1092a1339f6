"""TensorBoard shows the weights, norms, rates and loss ratios of a run in one ready-made view."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradnorm import GradNorm, MultiTaskModule, Task
from lightning_gradnorm.callbacks import TensorBoardDashboard

STEPS = 6


@pytest.fixture
def run(tmp_path: Path, quiet_trainer) -> Path:
    tasks = {"near": Task(nn.Linear(3, 1), nn.MSELoss()), "far": Task(nn.Linear(3, 1), nn.MSELoss())}
    model = MultiTaskModule(nn.Linear(2, 3), tasks)
    batch = (torch.randn(4, 2), {"near": torch.randn(4, 1), "far": 10 * torch.randn(4, 1)})
    logger = TensorBoardLogger(tmp_path / "logs", name="", version="", default_hp_metric=False)
    trainer = quiet_trainer(callbacks=[GradNorm(), TensorBoardDashboard()], logger=logger)
    trainer.fit(model, DataLoader([batch] * STEPS, batch_size=None))
    return tmp_path / "logs"


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


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return bytes(answer.read())


def test_tensorboard_serves_the_layout_and_each_chart_matches_tags(run: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", run, "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            address = f"http://127.0.0.1:{port}/data"
            layout = None
            for _ in range(120):
                try:
                    layout = json.loads(_get(f"{address}/plugin/custom_scalars/layout"))
                    tags = json.loads(_get(f"{address}/plugin/scalars/tags"))
                    if layout and any(tags.values()):
                        break
                except OSError:
                    pass
                time.sleep(0.5)
        finally:
            server.terminate()
    assert layout is not None
    charts = {chart["title"]: chart for category in layout["category"] for chart in category["chart"]}
    written = [tag for of_run in tags.values() for tag in of_run]
    for title, what in (
        ("task weights w", "weight"),
        ("gradient norms G of the tasks", "grad_norm"),
        ("relative inverse training rates r", "rate"),
        ("loss ratios L / L(0)", "loss_ratio"),
    ):
        patterns = charts[title]["multiline"]["tag"]
        found = {tag for tag in written for pattern in patterns if re.search(pattern, tag)}
        assert found == {f"gradnorm/{what}/near", f"gradnorm/{what}/far"}
