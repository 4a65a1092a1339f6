"""LightningCLI of both packages builds callbacks from a yaml; the config it saves trains the same again."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import cli_model
import lightning as L
import packages
import pytest
import pytorch_lightning as pl
import torch
import yaml

pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse, which is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:jsonargparse"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader."),
]

NAMESPACES = {"lightning": L, "pytorch_lightning": pl}
MODELS = {name: type("Model", (cli_model.TwoHeads, one.LightningModule), {}) for name, one in NAMESPACES.items()}
DATA = {name: type("Data", (cli_model.Numbers, one.LightningDataModule), {}) for name, one in NAMESPACES.items()}

ADAM = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.1}}
CALLBACKS: dict[str, dict[str, Any]] = {
    "GradNorm": {"tasks": ["a", "b"], "shared_layer": "encoder"},
    "GradNorm, another optimizer": {"tasks": ["a", "b"], "optimizer": ADAM},
    "GradNorm, all options": {
        "tasks": ["a", "b"],
        "heads": {"a": "a", "b": "b"},
        "alpha": 0.5,
        "initial_losses": {"a": 1.0, "b": 2.0},
        "initial_weights": {"a": 1.0, "b": 3.0},
        "priorities": {"a": 1.0, "b": 2.0},
        "update_every": 2,
        "norm_of": "activation",
        "on_task_mismatch": "adapt",
    },
    "Scalarization": {
        "scalarizer": {"class_path": "torchjd.scalarization.UW", "init_args": {"T": 2}},
        "tasks": ["a", "b"],
    },
    "Aggregation": {"aggregator": {"class_path": "torchjd.aggregation.UPGrad"}, "tasks": ["a", "b"]},
    "FixedWeights": {"weights": {"a": 0.5, "b": 2.0}},
    "RandomWeights": {"seed": 3, "tasks": ["a", "b"]},
    "GradientNormMonitor": {"losses": ["a", "b"], "every_n_steps": 1},
}


def fit(package: str, model: type, folder: Path, config: Path, *args: str, **options: Any) -> Any:
    """Run `fit --config` and return the LightningCLI; it saves its config in the folder."""
    cli = importlib.import_module("lightning.pytorch.cli" if package == "lightning" else "pytorch_lightning.cli")
    return cli.LightningCLI(
        model,
        DATA[package],
        args=["fit", "--config", str(config), f"--trainer.default_root_dir={folder}", *args],
        **options,
    )


def write(path: Path, callback: dict[str, Any], **sections: Any) -> Path:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = {"accelerator": "cpu", "max_epochs": 2, "callbacks": [callback], **quiet}
    path.write_text(yaml.safe_dump({"seed_everything": 1, "trainer": trainer, **sections}))
    return path


def saved_by(cli: Any) -> Path:
    return Path(cli.trainer.log_dir) / "config.yaml"


def result(cli: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return cli.model.state_dict(), cli.trainer.callbacks[0].state_dict()


def assert_same_run(one: Any, other: Any) -> None:
    (network, state), (expected_network, expected_state) = result(one), result(other)
    for name, value in expected_network.items():
        assert torch.equal(network[name], value), name
    packages.assert_identical(state, expected_state)


@pytest.mark.parametrize("package", NAMESPACES)
@pytest.mark.parametrize("name", CALLBACKS)
def test_the_saved_config_is_loaded_again_and_trains_the_same(name: str, package: str, tmp_path: Path) -> None:
    callback = {"class_path": f"lightning_gradnorm.{name.partition(',')[0]}", "init_args": CALLBACKS[name]}
    first = fit(package, MODELS[package], tmp_path / "1", write(tmp_path / "own.yaml", callback))
    assert type(first.trainer.callbacks[0]).__name__ == name.partition(",")[0]
    text = saved_by(first).read_text()
    assert "Unable to serialize" not in text
    again = fit(package, MODELS[package], tmp_path / "2", saved_by(first))
    assert_same_run(again, first)
    assert saved_by(again).read_text() == text.replace(str(tmp_path / "1"), str(tmp_path / "2"))
