"""One step of the weights: our Adam on tensors agrees with torch's Adam, and the host never waits for a number."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import NoNumberIsAskedFor
from torch import Tensor

from lightning_gradnorm.strategies import GradNormRule
from lightning_gradnorm.strategies.weight_optimizer import MaskedAdam, WeightOptimizer, make_weight_optimizer

F64 = torch.float64


class General(torch.optim.Adam):
    """Adam by another name, so it is treated like any optimizer."""


@pytest.mark.parametrize(
    "options", [{"lr": 0.025}, {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-3}, {"betas": (0.0, 0.5)}]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-13), (torch.float32, 2e-6)])
def test_adam_on_tensors_alone_is_torchs_adam(options: Any, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.full((4,), 2.0, dtype=dtype).requires_grad_() for _ in range(2)]
    ours = make_weight_optimizer(weights[0], partial(torch.optim.Adam, **options))
    theirs = torch.optim.Adam([weights[1]], **options)
    assert type(ours) is MaskedAdam
    for _ in range(200):
        gradient = torch.randn(4, generator=generator, dtype=dtype) * 10 ** float(torch.randn((), generator=generator))
        with torch.no_grad():
            assert ours.step(gradient, torch.zeros(4), None, lambda before, moved: moved)
        weights[1].grad = gradient.clone()
        theirs.step()
        torch.testing.assert_close(*weights, rtol=tolerance, atol=tolerance)
    state, expected = ours.state_dict()["state"][0], theirs.state_dict()["state"][0]
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=10 * tolerance, atol=0.0, check_dtype=False)


def test_the_state_of_torchs_adam_and_of_ours_can_take_each_others_place() -> None:
    steps = torch.rand(20, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(1)) + 0.1
    makers = {"ours": torch.optim.Adam, "general": General}
    rules = {
        name: GradNormRule(list("abc"), optimizer=partial(maker, lr=0.1), dtype=F64) for name, maker in makers.items()
    }
    assert [type(rule._step) for rule in rules.values()] == [MaskedAdam, WeightOptimizer]
    for norms, losses in steps[:10]:
        for rule in rules.values():
            rule.step(norms, losses)
    exchanged = {
        name: GradNormRule(list("abc"), optimizer=partial(maker, lr=0.1), resume_options="given", dtype=F64)
        for name, maker in makers.items()
    }
    with pytest.warns(
        UserWarning, match="the class of the weights' optimizer is General in the checkpoint and Adam here"
    ):
        exchanged["ours"].load_state_dict(rules["general"].state_dict())
    with pytest.warns(
        UserWarning, match="the class of the weights' optimizer is Adam in the checkpoint and General here"
    ):
        exchanged["general"].load_state_dict(rules["ours"].state_dict())
    for norms, losses in steps[10:]:
        for rule in (*rules.values(), *exchanged.values()):
            rule.step(norms, losses)
    first, *others = (rule.weights.detach() for rule in (*rules.values(), *exchanged.values()))
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-11, atol=0.0)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    "scheduler",
    [
        partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.8),
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=40),  # of the betas, too
    ],
)
def test_a_schedulers_change_applies_in_the_next_step(scheduler: Any) -> None:
    weights = {}
    for maker in (torch.optim.Adam, General):
        schedulers = []

        def make(parameters: Any, maker: Any = maker, schedulers: list[Any] = schedulers) -> torch.optim.Optimizer:
            optimizer: torch.optim.Optimizer = maker(parameters, lr=0.1)
            schedulers.append(scheduler(optimizer))
            return optimizer

        rule = GradNormRule(list("abc"), optimizer=make, dtype=F64)
        generator = torch.Generator().manual_seed(1)
        for _ in range(30):
            rule.step(*torch.rand(2, 3, dtype=F64, generator=generator) + 0.1)
            schedulers[0].step()
        weights[type(rule._step)] = rule.weights.detach()
    torch.testing.assert_close(weights[MaskedAdam], weights[WeightOptimizer], rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("option", ["weight_decay", "amsgrad", "maximize"])
def test_an_adam_with_more_to_it_is_left_to_torch(option: str) -> None:
    made = make_weight_optimizer(torch.ones(2).requires_grad_(), partial(torch.optim.Adam, **{option: True}))
    assert type(made) is WeightOptimizer


def test_an_adam_that_somebody_watches_is_left_to_torch() -> None:
    def watched(parameters: Any) -> torch.optim.Optimizer:
        adam = torch.optim.Adam(parameters)
        adam.register_step_post_hook(lambda *_: None)
        return adam

    assert type(make_weight_optimizer(torch.ones(2).requires_grad_(), watched)) is WeightOptimizer


# ---- the host ----------------------------------------------------------------------------------------------------------


class OnAGPU(GradNormRule):
    """Does as if its numbers were where looking at them takes time."""

    syncs_every_step = False


def test_a_step_with_absent_tasks_or_bad_numbers_does_not_synchronize() -> None:
    rule, looking = (
        kind(list("abc"), initial_losses=dict.fromkeys(list("abc"), 1.0)) for kind in (OnAGPU, GradNormRule)
    )
    one, some = torch.ones(3), torch.tensor([True, False, True])
    steps: list[tuple[Tensor, Tensor, Tensor | None]] = [
        (torch.tensor([1.0, 2.0, 3.0]), one, None),
        (torch.tensor([1.0, torch.nan, 3.0]), one, some),
        (torch.tensor([1.0, torch.nan, 3.0]), one, None),
        (one, torch.tensor([1.0, -1.0, 1.0]), None),
        (torch.tensor([1.0, 2.0, 3.0]), 2 * one, some),
    ]
    for each in (rule, looking):
        each.step(one, one)  # L_i(0) is looked at once
    with NoNumberIsAskedFor():
        for step in steps:
            rule.step(*step)
            rule.count_step()
    with NoNumberIsAskedFor(), pytest.raises(AssertionError, match="makes the host wait"):
        _ = rule.skipped
    assert rule.skipped == 2
    assert list(rule.tasks_at_fault) == ["b"]
    for step in steps:
        looking.step(*step)
        looking.count_step()
    assert torch.equal(rule.weights, looking.weights)
    assert (looking.skipped, looking.tasks_at_fault) == (rule.skipped, rule.tasks_at_fault)
    assert rule.last is not None
    assert torch.equal(rule.last.losses, 2 * one)
    assert torch.equal(rule.mean_weights, looking.mean_weights)
