"""Configurations as the command line composes them, small and quick to train."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lightning_gradnorm.experiments.cli.config import conf_dir, register

QUICK = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "trainer.log_every_n_steps=1",
]
SMALL = ["data.train_size=400", "data.val_size=200", "data.test_size=200"]
TASKS = {
    "toy": ["task_0", "task_1"],
    "sinusoids": ["first", "second"],
    "multimnist": ["left", "right", "sum"],
    "rooms": ["segmentation", "depth", "normals"],
    "rooms_few": ["segmentation", "depth", "normals"],
    "nyuv2": ["segmentation", "depth", "normals"],
    "turbofan": ["rul", "health"],
    "cmapss": ["rul", "health"],
    "tabular": ["a", "b"],
    "pde": ["pde", "boundary"],
}
TABLE = [f"data.path={Path(__file__).with_name('table.csv')}", "data.targets=[a, b]"]
"""A table to train on, where that is what is trained on: 60 rows, inputs x, y, z, one value of b in three missing."""


def tiny(experiment: str) -> list[str]:
    """What makes the data and networks of an experiment so small that they train in a second."""
    if experiment.startswith("cmapss"):
        engines = ["data.engines=6", "data.test_engines=3", "data.batch_size=4", "data.folder=${paths.run_dir}/engines"]
        if experiment == "cmapss_mlp":
            return [*engines, "model.encoder.hidden=[8]"]
        return [*engines, "model.encoder.channels=[8]", "model.encoder.hidden=4"]
    if experiment == "tabular":
        return [*TABLE, "data.batch_size=16"]
    if experiment.startswith("pinn"):
        counts = {"pinn_burgers": "initial: 8", "pinn_plate": "moment: 8"}.get(experiment, "")
        points = f"data.points={{pde: 8, boundary: 8{', ' if counts else ''}{counts}}}"
        return [points, "data.steps_per_epoch=4", "data.val_size=8", "model.network.hidden=[4]"]
    few = ["data.train_size=16", "data.val_size=8", "data.test_size=8", "data.batch_size=4"]
    if not experiment.startswith("nyuv2"):
        return few
    small = [*few, "data.input_size=[32, 32]", "data.output_size=[8, 8]", "model.encoder.width=0.0625"]
    return [*small, "model.tasks.head.channels=8"] if experiment == "nyuv2_mtan" else small


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))


def compose_run(run_dir: Path, *overrides: str) -> DictConfig:
    """Compose the configuration of a run whose folder is ``run_dir``; each set of overrides is composed once."""
    config = copy.deepcopy(_composed(overrides))
    config.paths.run_dir = str(run_dir)
    return config


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=["paths.run_dir=not/given", *overrides])


def compose_alone(group: str, option: str) -> DictConfig | None:
    """Compose an option of a group without the rest of a configuration; references to the rest are not resolved."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        option_alone: DictConfig | None = compose(f"{group}/{option}")[group]
    return option_alone
