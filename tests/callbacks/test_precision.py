"""Mixed precision: norms are those of unscaled gradients, and a step that the scaler skips does not update the weights."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import lightning as L
import packages
import pytest
import torch
from harness import MemoryLogger, Overflows, Recorder
from models import Automatic, vector_batches
from torch.utils.data import DataLoader

from lightning_gradnorm import GradNorm

STEPS = 50
NAMES = ["seg", "depth", "normal"]


class Single(Automatic):
    """The test network in single precision."""

    def __init__(self) -> None:
        super().__init__(3)
        self.float()


def _batches() -> list:
    return [{name: value.float() for name, value in batch.items()} for batch in vector_batches(3, STEPS)]


def _trajectory(quiet_trainer, heads: bool, callbacks: tuple = (), **options) -> torch.Tensor:
    model = Single()
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2", heads=model.heads() if heads else None)
    recorder = Recorder(gradnorm)
    trainer = quiet_trainer(callbacks=[*callbacks, gradnorm, recorder], **options)
    trainer.fit(model, DataLoader(_batches(), batch_size=None))
    return torch.tensor([list(weights.values()) for weights in recorder.weights])


def _scaled(package: ModuleType) -> Any:
    plugin = packages.submodule(package, "plugins.precision").MixedPrecision
    return plugin("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))


@pytest.mark.both_packages
@pytest.mark.parametrize("heads", [False, True])
def test_half_precision_with_a_scaler_follows_single_precision(quiet_trainer, heads: bool, package: ModuleType) -> None:
    single = _trajectory(quiet_trainer, heads)
    assert (single[-1] - 1).abs().max() > 0.1
    half = _trajectory(quiet_trainer, heads, plugins=[_scaled(package)])
    torch.testing.assert_close(half, single, rtol=0.01, atol=0)


@pytest.mark.parametrize("heads", [False, True])
def test_bfloat16_follows_single_precision(quiet_trainer, heads: bool) -> None:
    single = _trajectory(quiet_trainer, heads)
    half = _trajectory(quiet_trainer, heads, precision="bf16-mixed")
    torch.testing.assert_close(half, single, rtol=0.01, atol=0)


@pytest.mark.both_packages
def test_a_step_that_the_scaler_skips_changes_no_weight(quiet_trainer, package: ModuleType) -> None:
    skipped = {3, 17, 18}
    weights = _trajectory(quiet_trainer, True, callbacks=(Overflows(skipped),), plugins=[_scaled(package)])
    moved = (weights[1:] - weights[:-1]).abs().sum(dim=1)
    for step in range(1, STEPS):
        assert (moved[step - 1] == 0) == (step in skipped)


@pytest.mark.both_packages
def test_norms_are_of_unscaled_gradients(quiet_trainer, package: ModuleType) -> None:
    class Norms(L.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            self.seen.append(trainer.callback_metrics["gradnorm/grad_norm/depth"].item())

    single, half = Norms(), Norms()
    _trajectory(quiet_trainer, True, callbacks=(single,))
    _trajectory(quiet_trainer, True, callbacks=(half,), plugins=[_scaled(package)])
    assert half.seen == pytest.approx(single.seen, rel=0.02)


@pytest.mark.parametrize("norm_of", ["weight", "activation"])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_that_a_losss_precision_rounds_leaves_the_norms_exact(
    quiet_trainer, dtype: torch.dtype, heads: bool, norm_of
) -> None:
    """The gradient is multiplied by the rounded weight; the norm that is taken is that of the weight itself."""

    class LowLosses(Single):
        def task_losses(self, batch):
            return {task: loss.to(dtype) for task, loss in super().task_losses(batch).items()}

    weights = {"seg": 1.0031, "depth": 1.2017, "normal": 0.7952}
    model, logger = LowLosses(), MemoryLogger()
    twin = copy.deepcopy(model)
    options = {"initial_weights": weights, "norm_of": norm_of, "heads": model.heads() if heads else None}
    trainer = quiet_trainer(callbacks=[GradNorm(NAMES, shared_layer="encoder.2", **options)], logger=logger)
    trainer.fit(model, DataLoader(_batches()[:1], batch_size=None))
    z = twin.encoder(_batches()[0]["x"])
    for task in NAMES:
        loss = torch.nn.functional.mse_loss(getattr(twin, f"{task}_head")(z), _batches()[0][task]).to(dtype)
        at = twin.encoder[2].weight if norm_of == "weight" else z
        (gradient,) = torch.autograd.grad(loss, at, retain_graph=True)
        found = logger.scalars[f"gradnorm/grad_norm/{task}"][0]
        assert found == pytest.approx(weights[task] * gradient.norm().item(), rel=1e-5)
