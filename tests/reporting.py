"""Run folders like those of `gradnorm-train`, made in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml

TASKS = ("depth", "seg")
BALANCING: dict[str, dict[str, Any]] = {
    "equal": {},
    "gradnorm": {"_target_": "lightning_gradnorm.GradNorm", "alpha": 1.5},
    "random_static": {"_target_": "lightning_gradnorm.RandomWeights", "seed": 0},
    "gradnorm_static": {"_target_": "lightning_gradnorm.GradNormStatic", "from_run": "elsewhere"},
}


def config_of(
    folder: Path, balancing: str = "equal", seed: int = 0, tasks: Sequence[str] = TASKS, **options: Any
) -> dict[str, Any]:
    """Return a resolved configuration; ``options`` are dotted names with `__` for the dot."""
    config: dict[str, Any] = {
        "data": {"_target_": "somewhere.Data", "train_size": 100, "batch_size": 10, "seed": seed},
        "model": {
            "tasks": {task: {"loss": {"_target_": "torch.nn.MSELoss"}} for task in tasks},
            "optimizer": {"lr": 0.1},
        },
        "balancing": dict(BALANCING[balancing]),
        "trainer": {"max_epochs": 4, "max_steps": -1, "default_root_dir": str(folder)},
        "callbacks": {"checkpoint": {"dirpath": f"{folder}/checkpoints"}},
        "paths": {"run_dir": str(folder)},
        "seed": seed,
        "alpha": 1.5,
        "tasks": None,
    }
    for name, value in options.items():
        *groups, last = name.split("__")
        place = config
        for group in groups:
            place = place[group]
        place[last] = value
    return config


def write_run(
    folder: Path,
    balancing: str = "equal",
    seed: int = 0,
    metrics: Mapping[str, float] | None = None,
    *,
    tasks: Sequence[str] = TASKS,
    weights: Mapping[str, Mapping[str, float]] | None = None,
    training: Mapping[str, float] | None = None,
    logged: Sequence[Mapping[str, float | str]] = (),
    **options: Any,
) -> Path:
    """Write a run folder with the given contents; return the folder."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(folder, balancing, seed, tasks, **options)))
    (folder / "overrides.yaml").write_text(yaml.safe_dump([f"balancing={balancing}", f"seed={seed}"]))
    (folder / ".hydra").mkdir()
    choices = {"hydra": {"runtime": {"choices": {"balancing": balancing}}}}
    (folder / ".hydra/hydra.yaml").write_text(yaml.safe_dump(choices))
    for name, content in (("test_metrics", metrics), ("weights", weights), ("training", training)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(dict(content)))
    if logged:
        write_log(folder, logged)
    return folder


def write_log(folder: Path, rows: Sequence[Mapping[str, float | str]], version: int = 0) -> Path:
    """Write the files that the CSV logger would write."""
    names = sorted({name for row in rows for name in row})
    file = folder / f"csv/version_{version}/metrics.csv"
    file.parent.mkdir(parents=True)
    lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    file.write_text("\n".join(lines) + "\n")
    return file


def measured(depth: float, seg: float) -> dict[str, float]:
    """Return test metrics of both tasks."""
    return {"test/loss": depth + 1 - seg, "test/loss/depth": depth, "test/rmse/depth": depth, "test/miou/seg": seg}


class FailsAtStep(L.Callback):
    """Ends the training by an error."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the <b>disk</b> is full")
