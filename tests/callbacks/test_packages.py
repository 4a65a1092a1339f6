"""Every callback works with `pytorch_lightning` as with `lightning`, and raises the same errors."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning as L
import packages
import pytest
import pytorch_lightning as pl
import torch
from harness import Batches, MemoryLogger, state_by_part
from lightning.pytorch.demos.boring_classes import BoringModel
from models import Automatic, Manual, as_inputs_and_targets, multi_task_module, vector_batches
from torchjd.aggregation import UPGrad
from torchjd.scalarization import UW

from lightning_gradnorm import (
    Aggregation,
    FixedWeights,
    GradientNormMonitor,
    GradNorm,
    GradNormStatic,
    RandomWeights,
    Scalarization,
)
from lightning_gradnorm.callbacks import TensorBoardDashboard

TASKS = ["seg", "depth", "normal"]
STEPS = 6

CALLBACKS: dict[str, Callable[[], Any]] = {
    "GradNorm": lambda: GradNorm(TASKS),
    "Scalarization": lambda: Scalarization(UW, TASKS),
    "Aggregation": lambda: Aggregation(UPGrad(), TASKS),
    "FixedWeights": lambda: FixedWeights({"seg": 0.5, "depth": 2.0, "normal": 3.0}),
    "RandomWeights": lambda: RandomWeights(3, TASKS),
    "GradientNormMonitor": lambda: GradientNormMonitor(TASKS, every_n_steps=2),
    "TensorBoardDashboard": TensorBoardDashboard,
}


def train(
    package: ModuleType, folder: Path, made: Any, model: Automatic, ckpt_path: Path | None = None, **options: Any
) -> Any:
    """Train for one epoch and return the Trainer."""
    if isinstance(model, Manual):
        model.gradnorm = [made] if hasattr(made, "watch") else []
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "accelerator": "cpu"}
    checkpointing = {"enable_checkpointing": False, "logger": False, "max_epochs": 1}
    trainer = package.Trainer(**{**quiet, **checkpointing, "default_root_dir": folder, "callbacks": [made], **options})
    trainer.fit(model, Batches(vector_batches(3, STEPS)), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.each_value_once
@pytest.mark.parametrize("model", [Automatic, Manual])
@pytest.mark.parametrize("name", CALLBACKS)
def test_both_trainers_give_the_same_network_state_and_log_to_the_bit(
    name: str, model: type[Automatic], tmp_path: Path
) -> None:
    networks, states, logs = [], [], []
    for package in packages.PACKAGES:
        with packages.using(package) as namespace:
            torch.manual_seed(0)
            network, made, logger = model(3), CALLBACKS[name](), MemoryLogger()
            train(namespace, tmp_path, made, network, logger=logger)
        networks.append(state_by_part(network))
        states.append(made.state_dict())
        logs.append(logger.scalars)
    for part, value in networks[0].items():
        assert torch.equal(networks[1][part], value), part
    packages.assert_identical(states[1], states[0])
    assert logs[1] == logs[0]
    assert logs[0] or name == "TensorBoardDashboard"


@pytest.mark.both_packages
def test_the_dashboard_and_the_monitors_picture_reach_either_tensorboard_logger(
    package: ModuleType, tmp_path: Path
) -> None:
    logger = packages.submodule(package, "loggers").TensorBoardLogger(tmp_path)
    written: dict[str, Any] = {}
    logger.experiment.add_custom_scalars = lambda layout: written.update(layout)
    logger.experiment.add_image = lambda tag, *_: written.update({tag: None})
    monitor = GradientNormMonitor(TASKS, every_n_steps=2, cosine_image=lambda names, cosines: torch.zeros(3, 2, 2))
    train(package, tmp_path, None, Automatic(3), callbacks=[TensorBoardDashboard(), monitor], logger=logger)
    assert {"Gradient-norm monitor", "monitor/cosine"} <= written.keys()


@pytest.mark.parametrize("other", packages.PACKAGES)
@pytest.mark.parametrize("name", ["GradNorm", "Scalarization", "Aggregation", "GradientNormMonitor"])
def test_a_checkpoint_of_one_package_resumes_to_the_bit_in_the_other(name: str, other: str, tmp_path: Path) -> None:
    (first,) = set(packages.PACKAGES) - {other}
    path = tmp_path / "one.ckpt"
    with packages.using(first) as namespace:
        trainer = train(namespace, tmp_path, CALLBACKS[name](), Automatic(3))
        trainer.save_checkpoint(path)
        whole, uninterrupted = Automatic(3), CALLBACKS[name]()
        train(namespace, tmp_path, uninterrupted, whole, max_epochs=2)
    assert any(name in key for key in torch.load(path, weights_only=True)["callbacks"])
    with packages.using(other) as namespace:
        resumed, made = Automatic(3), CALLBACKS[name]()
        train(namespace, tmp_path, made, resumed, max_epochs=2, ckpt_path=path)
    packages.assert_identical(made.state_dict(), uninterrupted.state_dict())
    for part, value in state_by_part(whole).items():
        assert torch.equal(state_by_part(resumed)[part], value), part


@pytest.mark.both_packages
def test_static_weights_are_read_from_a_checkpoint_of_the_same_package(package: ModuleType, tmp_path: Path) -> None:
    gradnorm = GradNorm(TASKS)
    train(package, tmp_path, gradnorm, Automatic(3)).save_checkpoint(tmp_path / "one.ckpt")
    static = GradNormStatic(tmp_path / "one.ckpt")
    train(package, tmp_path, static, Automatic(3))
    assert static.weights == gradnorm.mean_weights


@pytest.mark.both_packages
def test_trial_steps_of_the_learning_rate_finder_leave_the_weights(package: ModuleType, tmp_path: Path) -> None:
    class WithRate(Automatic):
        lr = 0.01

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    finder = packages.submodule(package, "callbacks").LearningRateFinder(num_training_steps=5, update_attr=False)
    expected, found = GradNorm(TASKS), GradNorm(TASKS)
    plain, with_finder = WithRate(3), WithRate(3)
    train(package, tmp_path, expected, plain)
    train(package, tmp_path, found, with_finder, callbacks=[finder, found], enable_checkpointing=True)
    assert found.weights == expected.weights
    for part, value in state_by_part(plain).items():
        assert torch.equal(state_by_part(with_finder)[part], value), part


@pytest.mark.both_packages
@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
@pytest.mark.parametrize("name", ["GradNorm", "Scalarization", "Aggregation", "FixedWeights", "GradientNormMonitor"])
def test_a_strategy_that_shards_the_shared_layer_is_refused(name: str, strategy: str, package: ModuleType) -> None:
    """Calls the callback directly, because neither strategy starts on a CPU."""
    made = object.__new__(getattr(packages.submodule(package, "strategies"), strategy))
    trainer: Any = SimpleNamespace(
        callbacks=[], optimizers=[], global_step=0, ckpt_path=None, world_size=1, global_rank=0, strategy=made
    )
    with pytest.raises(ValueError, match=rf"{name}: {strategy} keeps only a shard of .* strategy='ddp'"):
        CALLBACKS[name]().on_train_start(trainer, Automatic(3))


def test_a_multi_task_module_in_the_other_trainer_is_an_error_that_names_both_packages() -> None:
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, callbacks=[GradNorm()], accelerator="cpu")
    for call in (trainer.fit, trainer.validate, trainer.predict):
        with pytest.raises(
            TypeError, match=r"MultiTaskModule: .* from the package lightning; got .* pytorch_lightning"
        ):
            call(multi_task_module(3), Batches(as_inputs_and_targets(vector_batches(3, 1))))


def test_lightnings_own_advice_on_mixed_packages_does_not_change() -> None:
    multi_task_module(3)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(TypeError, match="switch to a single import style"):
        trainer.fit(BoringModel())
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        trainer.fit(torch.nn.Linear(1, 1))


@pytest.mark.both_packages
@pytest.mark.parametrize("model", [Automatic, Manual])
@pytest.mark.parametrize("name", CALLBACKS)
def test_after_training_a_callback_holds_no_trainer_and_can_be_copied_and_pickled(
    name: str, model: type[Automatic], package: ModuleType, tmp_path: Path
) -> None:
    made = Scalarization(UW(3), TASKS) if name == "Scalarization" else CALLBACKS[name]()
    trainer = train(package, tmp_path, made, model(3))
    trainer.cannot_be_pickled = lambda: None
    for one in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        packages.assert_identical(one.state_dict(), made.state_dict())


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_are_of_both_packages_and_can_be_copied_and_pickled(name: str) -> None:
    if name == "Scalarization":
        made: Any = Scalarization(UW(3), TASKS)
    else:
        made = CALLBACKS[name]()
    for one in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert isinstance(one, L.Callback)
        assert isinstance(one, pl.Callback)
        assert one.state_key == made.state_key
    assert made.state_key.startswith(name)


IMPORTS = {
    "before ours": "import pytorch_lightning as pl; from lightning_gradnorm import GradNorm; made = GradNorm(TASKS)",
    "after ours": "from lightning_gradnorm import GradNorm; import pytorch_lightning as pl; made = GradNorm(TASKS)",
    "after construction": """
import sys
from lightning_gradnorm import GradNorm
made = GradNorm(TASKS)
assert "pytorch_lightning" not in sys.modules and "lightning_fabric" not in sys.modules, "ours has imported the other package"
import pytorch_lightning as pl
""",
}

IN_A_FRESH_INTERPRETER = """
import copy, pickle, torch
TASKS = ["a", "b"]
{imports}
class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.a, self.b = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        z = self.encoder(batch)
        losses = {{"a": self.a(z).square().mean(), "b": 9 * self.b(z).square().mean()}}
        return {{"loss": losses["a"] + losses["b"], **losses}}
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
copied = [made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
for one in copied:
    torch.manual_seed(0)
    options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    loader = torch.utils.data.DataLoader(torch.ones(12, 3), batch_size=4)
    pl.Trainer(max_epochs=1, callbacks=[one], **options).fit(Model(), loader)
assert made.weights["a"] != 1 and all(one.weights == made.weights for one in copied), [one.weights for one in copied]
"""


def run_fresh(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "order", ["after construction", *(pytest.param(f"{w} ours", marks=pytest.mark.slow) for w in ("before", "after"))]
)
def test_the_order_of_imports_does_not_matter(order: str) -> None:
    run_fresh(IN_A_FRESH_INTERPRETER.format(imports=IMPORTS[order]))
