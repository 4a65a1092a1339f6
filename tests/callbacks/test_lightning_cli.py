"""LightningCLI of both packages builds callbacks from a YAML file; the config it saves reproduces the training."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import cli_model
import lightning as L
import packages
import pytest
import pytorch_lightning as pl
import torch
import yaml

from lightning_gradnorm import GradNorm, MultiTaskModule

pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse, which is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the way LightningCLI calls jsonargparse
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader."),
]

NAMESPACES = {"lightning": L, "pytorch_lightning": pl}
MODELS = {name: type("Model", (cli_model.TwoHeads, one.LightningModule), {}) for name, one in NAMESPACES.items()}
DATA = {name: type("Data", (cli_model.Numbers, one.LightningDataModule), {}) for name, one in NAMESPACES.items()}


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])


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
        "absent_tasks": "last_seen",
        "on_task_mismatch": "adapt",
        "resume_options": "given",
    },
    "Scalarization": {
        "scalarizer": {"class_path": "torchjd.scalarization.UW", "init_args": {"shape": 2}},
        "tasks": ["a", "b"],
    },
    "Scalarization, by class path": {"scalarizer": "torchjd.scalarization.UW", "tasks": ["a", "b"]},
    "Aggregation": {"aggregator": {"class_path": "torchjd.aggregation.UPGrad"}, "tasks": ["a", "b"]},
    "Aggregation, of a scalarization": {
        "aggregator": "torchjd.aggregation.UPGrad",
        "scalarizer": "torchjd.scalarization.IMTLL",
        "tasks": ["a", "b"],
    },
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


@pytest.mark.each_value_once
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


@pytest.mark.parametrize("package", NAMESPACES)
def test_the_default_optimizer_is_the_same_as_the_papers_written_out(package: str, tmp_path: Path) -> None:
    """A default that is a function gives the numbers of `partial(torch.optim.Adam, lr=0.025)`, which users may still give."""
    found = []
    for optimizer in (None, partial(torch.optim.Adam, lr=0.025)):
        gradnorm = GradNorm(["a", "b"]) if optimizer is None else GradNorm(["a", "b"], optimizer=optimizer)
        torch.manual_seed(0)
        trainer = NAMESPACES[package].Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            callbacks=[gradnorm],
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(MODELS[package](), DATA[package]())
        found.append(gradnorm.state_dict())
    packages.assert_identical(*found)


def linear(outputs: int, inputs: int = 4) -> dict[str, Any]:
    options = {"in_features": inputs, "out_features": outputs}
    return {"class_path": "torch.nn.Linear", "init_args": options}


def a_task(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "lightning_gradnorm.Task", "init_args": {"head": linear(1), **arguments}}


TASKS: dict[str, dict[str, Any]] = {
    "a": a_task(loss={"class_path": "torch.nn.MSELoss"}, metrics={"class_path": "torchmetrics.MeanSquaredError"}),
    "b": a_task(
        loss="torch.nn.functional.l1_loss", metrics={"error": {"class_path": "torchmetrics.MeanAbsoluteError"}}
    ),
}


@pytest.mark.parametrize("optimizer", [pytest.param(None, marks=pytest.mark.slow), ADAM])
def test_a_multi_task_module_is_built_from_a_yaml_and_its_saved_config(optimizer: Any, tmp_path: Path) -> None:
    model = {"encoder": linear(4, 3), "tasks": TASKS} | ({} if optimizer is None else {"optimizer": optimizer})
    callback = {"class_path": "lightning_gradnorm.GradNorm"}
    path = write(tmp_path / "own.yaml", callback, model=model, data={"targets": True})
    first = fit("lightning", Double, tmp_path / "1", path)
    tasks = first.model.tasks
    assert isinstance(tasks["a"].loss, torch.nn.MSELoss)
    assert tasks["b"].loss is torch.nn.functional.l1_loss
    assert [list(tasks[name].metrics) for name in "ab"] == [["meansquarederror"], ["error"]]
    assert first.model.configure_optimizers().defaults["lr"] == (1e-3 if optimizer is None else 0.1)
    assert "Unable to serialize" not in saved_by(first).read_text()
    assert_same_run(fit("lightning", Double, tmp_path / "2", saved_by(first)), first)


class Double(MultiTaskModule):
    """In double precision, as the data."""

    def setup(self, stage: str) -> None:
        self.double()
