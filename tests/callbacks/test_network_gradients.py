"""At the optimizer step each parameter's `.grad` is exactly the gradient of `Σ w_i c_i L_i + rest`.

The weights are those at the start of the step; nothing of `L_grad` (its second-order terms) may leak in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, parameters_by_part, state_by_part
from models import (
    Automatic,
    Convolutional,
    Manual,
    Nested,
    OnlyLogs,
    WithCoefficients,
    as_inputs_and_targets,
    image_batches,
    multi_task_module,
    vector_batches,
)
from torch import Tensor

from lightning_gradnorm import FixedWeights, GradNorm

STEPS = 6
MakeTrainer = Callable[..., L.Trainer]


class Compare(L.Callback):
    """Notes the network and the weights at the start of a step, and the gradients and the network's batches at its end."""

    def __init__(self, weights: Callable[[], dict[str, float]], accumulate: int) -> None:
        self.weights = weights
        self.accumulate = accumulate
        self.starts: list[tuple[dict[str, Tensor], dict[str, float]]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.accumulate == 0:
            state = {name: value.clone() for name, value in state_by_part(pl_module).items()}
            self.starts.append((state, dict(self.weights())))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        found = {}
        for name, parameter in parameters_by_part(pl_module).items():
            assert parameter.grad is not None
            found[name] = parameter.grad.clone()
        self.gradients.append(found)


def check(compare: Compare, twin: Automatic, batches: list[Any], accumulate: int) -> None:
    assert len(compare.gradients) == len(compare.starts) == STEPS
    coefficients = twin.coefficients if isinstance(twin, WithCoefficients) else dict.fromkeys(twin.tasks, 1.0)
    for step, ((state, weights), found) in enumerate(zip(compare.starts, compare.gradients, strict=True)):
        with torch.no_grad():
            for name, value in state_by_part(twin).items():
                value.copy_(state[name])
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            forward = twin.forward_for_textbook(batch)
            for task, loss in forward.losses.items():
                total = total + weights[task] * coefficients[task] * loss / accumulate
            if forward.rest is not None:
                total = total + forward.rest / accumulate
        parameters = parameters_by_part(twin)
        expected = torch.autograd.grad(total, list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13, msg=f"{name} in step {step}")


def train(
    quiet_trainer: MakeTrainer, model: Any, strategy: Any, weights: Any, batches: list[Any], accumulate: int
) -> Compare:
    if isinstance(model, Manual):
        model.gradnorm = [strategy]
    compare = Compare(weights, accumulate)
    options = {"accumulate_grad_batches": accumulate} if model.automatic_optimization else {}
    quiet_trainer(callbacks=[strategy, compare], **options).fit(model, Batches(batches))
    return compare


@pytest.mark.each_value_once
@pytest.mark.parametrize("norm_of", ["weight", "activation"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
@pytest.mark.parametrize(
    "make",
    [
        Automatic,
        WithCoefficients,
        OnlyLogs,
        Convolutional,
        partial(Nested, container=tuple),
        Manual,
    ],
    ids=["automatic", "coefficients", "only-logs", "batch-norm", "tuple", "manual"],
)
def test_gradients_of_an_existing_model_match_the_weighted_loss(
    make: Callable[..., Any], heads: bool, accumulate: int, norm_of: Any, quiet_trainer: MakeTrainer
) -> None:
    options = {"accumulate": accumulate} if make is Manual else {}
    model, twin = make(T=3, **options), make(T=3)
    batches = (image_batches if make is Convolutional else vector_batches)(3, STEPS * accumulate)
    tasks = model.logged_names() if isinstance(model, OnlyLogs) else list(model.tasks)
    gradnorm = GradNorm(tasks, heads=model.heads() if heads else None, norm_of=norm_of)

    compare = train(quiet_trainer, model, gradnorm, lambda: gradnorm.weights, batches, accumulate)

    assert gradnorm.weights != dict.fromkeys(model.tasks, 1.0)
    check(compare, twin, batches, accumulate)


@pytest.mark.parametrize("norm_of", ["weight", "activation"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_a_multi_task_module_match_the_weighted_loss(
    accumulate: int, norm_of: Any, quiet_trainer: MakeTrainer
) -> None:
    model = multi_task_module(3, accumulate_grad_batches=accumulate)
    batches = vector_batches(3, STEPS * accumulate)
    gradnorm = GradNorm(norm_of=norm_of)

    fed = as_inputs_and_targets(batches)
    compare = train(quiet_trainer, model, gradnorm, lambda: gradnorm.weights, fed, accumulate)

    check(compare, Automatic(3), batches, accumulate)


@pytest.mark.parametrize("update_every", [2, 4])
@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_gradients_are_weighted_in_the_steps_between_two_updates_too(
    heads: bool, update_every: int, quiet_trainer: MakeTrainer
) -> None:
    model, batches = WithCoefficients(3), vector_batches(3, STEPS)
    gradnorm = GradNorm(list(model.tasks), heads=model.heads() if heads else None, update_every=update_every)

    check(train(quiet_trainer, model, gradnorm, lambda: gradnorm.weights, batches, 1), WithCoefficients(3), batches, 1)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", ["automatic", "coefficients", "own"])
def test_fixed_weights_multiply_each_tasks_gradient(mode: str, accumulate: int, quiet_trainer: MakeTrainer) -> None:
    weights, batches = {"normal": 3.0, "seg": 0.2, "depth": 1.7}, vector_batches(3, STEPS * accumulate)
    twin: Automatic = WithCoefficients(3) if mode == "coefficients" else Automatic(3)
    model = multi_task_module(3, accumulate_grad_batches=accumulate) if mode == "own" else type(twin)(3)
    fed: list[Any] = as_inputs_and_targets(batches) if mode == "own" else batches

    compare = train(quiet_trainer, model, FixedWeights(weights), lambda: weights, fed, accumulate)

    check(compare, twin, batches, accumulate)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_multi_task_module_without_a_strategy_weighs_all_tasks_equally(
    accumulate: int, quiet_trainer: MakeTrainer
) -> None:
    model, batches = multi_task_module(3, accumulate_grad_batches=accumulate), vector_batches(3, STEPS * accumulate)
    equal = dict.fromkeys(Automatic(3).tasks, 1.0)
    compare = train(quiet_trainer, model, L.Callback(), lambda: equal, as_inputs_and_targets(batches), accumulate)

    check(compare, Automatic(3), batches, accumulate)


def test_an_accumulation_window_cut_short_by_the_epochs_end_is_averaged_over_its_batches(
    quiet_trainer: MakeTrainer,
) -> None:
    batches = vector_batches(3, 5)
    model, gradnorm = multi_task_module(3, accumulate_grad_batches=2), GradNorm()
    compare = train(quiet_trainer, model, gradnorm, lambda: gradnorm.weights, as_inputs_and_targets(batches), 2)

    twin, (state, weights), found = Automatic(3), compare.starts[2], compare.gradients[2]
    with torch.no_grad():
        for name, value in state_by_part(twin).items():
            value.copy_(state[name])
    losses = twin.forward_for_textbook(batches[4]).losses
    total = torch.stack([weights[task] * loss for task, loss in losses.items()]).sum()
    parameters = parameters_by_part(twin)
    for name, gradient in zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13)
