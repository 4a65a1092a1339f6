"""Old dotted paths, as in saved configurations and checkpoints."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest
from torch import nn

import lightning_gradnorm
from lightning_gradnorm import _moved
from lightning_gradnorm.multitask.architecture import pack, unpack

OLD_TARGETS = [
    "balancing.GradNormRule",
    "balancing.amnl.AMNL",
    "balancing.with_equal_preferences",
    "callbacks.DensePredictions",
    "callbacks.monitor.GradientNormMonitor",
    "callbacks.GradientNormMonitor",
    "callbacks.tensorboard.TensorBoardDashboard",
    "cli.sharding.FullyShard",
    "cli.sweep.Sweep",
    "data.ToyDataModule",
    "data.cmapss.CMAPSS",
    "data.nyuv2.Augmentations",
    "dense_tasks.nyuv2_tasks",
    "engine_tasks.engine_tasks",
    "losses.AbsoluteDepthLoss",
    "metrics.NASAScore",
    "metrics.depth.DepthRMSError",
    "module.MultiTaskModule",
    "networks.MLP",
    "networks.mlp.MLP",
    "networks.engine.EngineEncoder",
    "networks.segnet.SegNet",
    "tasks.Task",
    "tasks.regression_tasks",
]


@pytest.fixture(autouse=True)
def ignore_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_moved, "_warned", True)


def locate(path: str) -> object:
    module, _, name = f"lightning_gradnorm.{path}".rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", OLD_TARGETS)
def test_an_old_path_leads_to_the_object_that_has_moved(path: str) -> None:
    found = locate(path)
    assert found.__name__ == path.rpartition(".")[2]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ("balancing.Balance", "GradNormTerms"),
        ("balancing.Step", "WeightUpdate"),
        ("balancing.balance", "gradnorm_terms"),
        ("balancing.gradnorm.balance", "gradnorm_terms"),
        ("balancing.restore", "load_snapshot"),
        ("balancing.state.state_of", "snapshot"),
    ],
)
def test_an_old_path_leads_to_renamed_objects(path: str, new: str) -> None:
    from lightning_gradnorm import strategies

    assert locate(path) is getattr(strategies, new)


def test_every_entry_of_the_table_can_be_imported() -> None:
    for homes in _moved.NEW_HOMES.values():
        for home in homes:
            importlib.import_module(f"lightning_gradnorm.{home}")


def test_the_first_old_path_warns_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_moved, "_warned", False)
    with pytest.warns(DeprecationWarning, match=r"tasks\.Task has moved to lightning_gradnorm\.multitask\.Task"):
        locate("tasks.Task")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        locate("tasks.Task")
        locate("networks.MLP")


def test_a_name_that_never_existed_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'Fish' is in none of"):
        locate("networks.Fish")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lightning_gradnorm.fish")


def test_a_model_packed_with_old_class_paths_can_be_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_gradnorm.experiments.problems.small import MLP

    monkeypatch.setattr(MLP, "__module__", "lightning_gradnorm.networks.mlp")  # as the first edition pickled it
    packed = pack({"encoder": nn.Sequential(MLP(2, [3]))})
    assert b"lightning_gradnorm.networks.mlp" in bytes(packed.tolist())  # type: ignore[union-attr]
    (unpacked,) = unpack(packed)["encoder"]
    assert type(unpacked) is MLP


def test_nothing_of_the_experiments_is_imported_before_an_old_path_is_used() -> None:
    code = "import sys, lightning_gradnorm; print([m for m in sys.modules if 'lightning_gradnorm.experiments' in m])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert lightning_gradnorm.__version__
