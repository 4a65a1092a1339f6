"""Loggers beside TensorBoard's: missing packages are reported, and scalars and images reach each of them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_ins
from configurations import QUICK, SMALL, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gradnorm.experiments.callbacks.weights_image import COLORS, WeightsImage, drawn
from lightning_gradnorm.experiments.cli import train

Call = Callable[..., str]
NORMS = ["callbacks=monitor", "callbacks.monitor.every_n_steps=1"]


@pytest.mark.parametrize(
    ("logger", "installed", "expected"),
    [
        ("wandb", [], "logger=wandb needs wandb, which is not installed. Install it: pip install wandb; or"),
        (
            "mlflow",
            ["wandb"],
            "logger=mlflow needs mlflow, which is not installed. Install it: pip install mlflow; or",
        ),
        (
            "many",
            [],
            "logger=many needs wandb and mlflow, which are not installed. Install them: pip install wandb mlflow",
        ),
        ("many", ["wandb"], "logger=many needs mlflow, which is not installed."),
    ],
)
def test_a_package_that_is_missing_is_named(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: str, installed: list[str], expected: str
) -> None:
    monkeypatch.setattr(train, "find_spec", lambda name: object() if name in installed else None)
    said = call(train.main, f"logger={logger}", *SMALL, *QUICK, status=1)
    assert expected in said
    assert not list(tmp_path.rglob("checkpoints"))


def logged_by_csv(run: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    with (run / "csv/version_0/metrics.csv").open() as rows:
        for row in csv.DictReader(rows):
            for name, text in row.items():
                if text and name != "step":
                    found.setdefault(name, {})[int(row["step"])] = float(text)
    return found


def test_scalars_and_images_reach_every_logger(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, clients = stand_ins.wandb(monkeypatch), stand_ins.mlflow(monkeypatch)
    call(train.main, *SMALL, *QUICK, *NORMS, "logger=many", "logger.wandb.offline=true", "hydra.run.dir=run")
    (client,) = clients
    assert run.started["name"] == client.tags["mlflow.runName"] == "run"
    assert run.finished == 1, "or the next job of a sweep would continue in it"
    expected = logged_by_csv(tmp_path / "run")
    assert {"gradnorm/weight/task_0", "train/loss/task_1", "val/loss_ratio", "test/r2/task_0"} <= set(expected)
    for name, curve in expected.items():
        for scalars in (run.scalars, client.scalars):
            assert scalars[name] == pytest.approx(curve, rel=1e-6), name

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == set(run.images) == {"gradnorm/weights", "monitor/cosine"}
    for name, by_step in run.images.items():
        steps = [event.step for event in events.Images(name)]
        assert list(by_step) == steps
        for step, pixels in by_step.items():
            assert pixels.dtype == np.uint8
            assert pixels.shape[2] == 3
            assert np.array_equal(client.images[f"{name}/step_{step:08d}.png"], pixels)
    assert len(client.images) == sum(map(len, run.images.values()))


def test_pictures_of_dense_predictions_reach_every_logger(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stand_ins.wandb(monkeypatch)
    quick = [one for one in QUICK if "val_batches" not in one]
    call(
        train.main,
        "experiment=nyuv2_seg_small",
        *tiny("nyuv2_seg_small"),
        *quick,
        "callbacks=dense",
        "logger=wandb",
        "hydra.run.dir=r",
    )
    shown = {name for name in run.images if name.startswith("val/prediction/")}
    assert shown == {f"val/prediction/{task}" for task in ("segmentation", "depth", "normals")}


def test_the_weights_over_time_are_a_line_for_each_task() -> None:
    image = drawn({"a": [(0, 1.0), (10, 2.0)], "b": [(0, 1.0), (10, 0.0)]})
    pixels = image.permute(1, 2, 0).numpy()
    lines = [np.argwhere((pixels[:, :520] == color).all(axis=2)) for color in COLORS[:2]]
    for line, rises in zip(lines, (True, False), strict=True):
        first, last = line[line[:, 1].argmin()], line[line[:, 1].argmax()]
        assert (last[0] < first[0]) == rises  # rows are counted from above
    up, down = lines
    assert up[:, 0].max() <= down[:, 0].min() + 2


def test_a_long_training_keeps_few_points_and_a_resumed_one_its_beginning(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_gradnorm.experiments.callbacks.weights_image._MOST", 6)
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        WeightsImage, "on_train_end", lambda self, *_: seen.append({k: list(v) for k, v in self.curves.items()})
    )
    steps = [*SMALL, *(one for one in QUICK if "max_epochs" not in one), "logger=tensorboard", "test=false"]
    call(train.main, *steps, "trainer.max_epochs=2", "hydra.run.dir=run")
    call(train.main, "ckpt_path=run/checkpoints/last.ckpt", "trainer.max_epochs=6")
    before, after = seen
    assert [step for step, _ in before["task_0"]] == [0, 1, 2, 3]
    assert after["task_0"][0] == before["task_0"][0]
    assert after["task_0"][-1][0] == 11
    assert len(after["task_0"]) <= 6
    assert set(after) == {"task_0", "task_1"}


def test_an_image_of_every_no_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="WeightsImage: every_n_epochs should be a positive integer; got 0"):
        WeightsImage(every_n_epochs=0)
