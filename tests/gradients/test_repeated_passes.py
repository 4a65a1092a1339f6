"""Fused kernels overwrite their saved tensors or the incoming gradient, so an additional pass would corrupt them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, Recorder, assert_agrees
from models import Batch, learn_from_textbook, vector_batches
from shapes.losses import NAMES, Pair
from torch import Tensor
from torch.nn import functional as F
from wrong_inputs import fails

from lightning_gradnorm import GradientNormMonitor, GradNorm

STEPS = 5
HEADS = {task: f"{task}_head" for task in NAMES}
MakeTrainer = Callable[..., L.Trainer]


class OverwritesSaved(torch.autograd.Function):
    """Mean squared error whose gradient is computed in the forward pass and scaled in place in the backward pass.

    By way of ``.data``, since a kernel does not count as a change in place either.
    """

    @staticmethod
    def forward(ctx: Any, said: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward((2 / said.numel()) * (said - target))
        return (said - target).square().mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (saved,) = ctx.saved_tensors
        if gradient != 1:
            saved.data.mul_(gradient)
        return saved, None


class OverwritesArrived(torch.autograd.Function):
    """A norm by a constant that writes its gradient over the one that has arrived."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z * 1.5

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient.data.mul_(1.5)
        return gradient


class FusedLoss(Pair):
    """The loss of `seg` is of a fused kernel; with coefficient 1 or another."""

    coefficient = 0.5
    fused = True

    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        said = self.said("seg", z)
        seg = OverwritesSaved.apply(said, batch["seg"]) if self.fused else F.mse_loss(said, batch["seg"])
        return {"seg": seg, "depth": self.error("depth", z, batch)}

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        losses = self.given(batch)
        return {"loss": self.coefficient * losses["seg"] + losses["depth"], **losses}


class FusedLossOf1(FusedLoss):
    coefficient = 1.0


@pytest.mark.parametrize("kind", [FusedLoss, FusedLossOf1])
def test_a_fused_loss_is_refused_where_it_would_be_passed_twice(
    kind: type[FusedLoss], quiet_trainer: MakeTrainer
) -> None:
    expected = ("'seg'", "OverwritesSavedBackward", "overwrite", "name shared_layer and heads")
    for options in ({}, {"heads": None}, {"heads": None, "shared_layer": "encoder.2"}):
        callback = GradNorm(NAMES, **options)
        fails(quiet_trainer, kind(), callback, "GradNorm", *expected, batches=vector_batches(2, 3))
    monitor = GradientNormMonitor(NAMES, every_n_steps=1)
    fails(quiet_trainer, kind(), monitor, "GradientNormMonitor", *expected[:3], batches=vector_batches(2, 3))


@pytest.mark.parametrize("kind", [FusedLoss, FusedLossOf1])
def test_a_fused_loss_is_balanced_below_its_head(kind: type[FusedLoss], quiet_trainer: MakeTrainer) -> None:
    batches, model, twin = vector_batches(2, STEPS), kind(), kind()
    twin.fused = False
    trajectory = learn_from_textbook(twin, batches, coefficients={"seg": kind.coefficient, "depth": 1.0})
    gradnorm = GradNorm(NAMES, heads=HEADS, shared_layer="encoder.2")
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)


class FusedNorm(Pair):
    """Between the shared layer and the heads, or in a head, something overwrites the gradient that arrives."""

    fused, in_head = True, False

    def scaled(self, z: Tensor) -> Tensor:
        return OverwritesArrived.apply(z) if self.fused else z * 1.5

    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        z = z if self.in_head else self.scaled(z)
        return {task: self.error(task, self.scaled(z) if self.in_head else z, batch) for task in NAMES}


class FusedNormInHead(FusedNorm):
    in_head = True


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", HEADS, None], ids=["auto", "heads", "no-heads"])
@pytest.mark.parametrize("kind", [FusedNorm, FusedNormInHead])
def test_a_function_that_overwrites_its_incoming_gradient_gets_a_copy(
    kind: type[FusedNorm], heads: Any, quiet_trainer: MakeTrainer
) -> None:
    batches, model, twin = vector_batches(2, STEPS), kind(), kind()
    twin.fused = False
    trajectory = learn_from_textbook(twin, batches)
    gradnorm = GradNorm(NAMES, heads=heads, shared_layer="encoder.2")
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)
