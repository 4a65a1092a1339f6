"""C-MAPSS experiments with simulated engines in place of NASA's, and with files in NASA's format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import QUICK, compose_run, options, tiny
from omegaconf import OmegaConf

from lightning_gradnorm import MultiTaskModule
from lightning_gradnorm.experiments.cli import train
from lightning_gradnorm.experiments.cli.build import build
from lightning_gradnorm.experiments.problems.engines.losses import FailureBiasedMSE
from lightning_gradnorm.experiments.problems.engines.turbofan import write_turbofan

Call = Callable[..., str]
SMALL = [*QUICK, *tiny("cmapss_small"), "callbacks=none", "logger=none"]
SIMULATED = ("data.engines", "data.test_engines", "data.folder")  # which files have of their own
EXPERIMENTS = [one for one in options("experiment") if one.startswith("cmapss")]


def test_a_run_reports_that_it_uses_simulated_engines_instead_of_cmapss(call: Call) -> None:
    told = call(train.main, "experiment=cmapss_small", *SMALL)
    assert "Simulated engines stand in for C-MAPSS. With its files: data=cmapss data.root=FOLDER" in told
    assert "stand in for C-MAPSS" not in call(train.main, "data=turbofan", *SMALL)


@pytest.mark.filterwarnings("ignore:CMAPSS. .* should be NASA's")
def test_with_the_real_files_nothing_is_simulated(call: Call, tmp_path: Path) -> None:
    write_turbofan(tmp_path / "files", "FD001", engines=6, test_engines=3, seed=0)
    given = ["experiment=cmapss_fd001", "data=cmapss", "data.root=files", "balancing=uncertainty"]
    network = [option for option in SMALL if not option.startswith(SIMULATED)]
    told = call(train.main, *given, "balancing.scalarizer.classification=[health]", *network)
    assert "stand in" not in told
    for metric in ("rmse", "mae", "nasa_score", "accuracy", "f1"):
        assert metric in told


def test_without_a_folder_it_is_asked_for(call: Call) -> None:
    told = call(train.main, "experiment=cmapss_small", "data=cmapss", status=1)
    assert "data.root should be set" in told


@pytest.mark.parametrize("data", ["cmapss", "turbofan"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_network_fits_the_data(experiment: str, data: str, tmp_path: Path) -> None:
    config = compose_run(tmp_path, f"experiment={experiment}", f"data={data}")
    subset = "FD001" if experiment in ("cmapss_mlp", "cmapss_small") else experiment.removeprefix("cmapss_").upper()
    assert config.data.subset == subset
    found: Any = OmegaConf.to_container(config.model, resolve=True)
    values = {"FD001": 14, "FD002": 20, "FD003": 14, "FD004": 20}[subset]
    assert found["encoder"]["in_features"] == values * (30 if experiment == "cmapss_mlp" else 1)
    assert (found["tasks"]["in_features"], found["tasks"]["cap"], found["tasks"]["classes"]) == (32, 125, 3)


def test_the_network_follows_sensors_thresholds_cap_and_funnel(tmp_path: Path) -> None:
    changed = ["data.sensors=[2, 3, 4]", "data.health_thresholds=[100, 60, 20]", "data.cap=150"]
    config = compose_run(tmp_path, "data=turbofan", *changed, "model.encoder.funnel=[48]", "model.tasks.weighted=true")
    model = build(config, "model")
    assert isinstance(model, MultiTaskModule)
    predictions = model(torch.zeros(2, 30, build(config, "data").input_dim))
    assert {name: tuple(prediction.shape) for name, prediction in predictions.items()} == {
        "rul": (2, 1),
        "health": (2, 4),
    }
    loss = model.tasks["rul"].loss
    assert isinstance(loss, FailureBiasedMSE)
    assert loss.cap == 150


def test_the_recipe_is_the_books(tmp_path: Path) -> None:
    config = compose_run(tmp_path, "experiment=cmapss_fd001")
    model = build(config, "model")
    assert (model.gradient_clip_val, config.trainer.max_epochs, config.data.batch_size) == (1.0, 100, 256)
    optimizer = model.optimizer(model.parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-3, 1e-4)
    scheduler, rates = model._schedule.make(optimizer), []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-4 + 9e-5 * min(epoch, 10) for epoch in range(12)])
    dropout = {one: compose_run(tmp_path, f"experiment={one}").model.encoder.get("dropout") for one in EXPERIMENTS}
    assert dropout == {
        "cmapss_fd001": 0.3,
        "cmapss_fd002": 0.2,
        "cmapss_fd003": 0.3,
        "cmapss_fd004": 0.2,
        "cmapss_mlp": None,
        "cmapss_small": 0.2,
    }
