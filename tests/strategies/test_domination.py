"""Warnings name a task that holds nearly all of the weight without success, and a loss that vanishes."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from harness import Batches, MemoryLogger
from loops import gradnorm_rule, train
from models import Automatic, vector_batches
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm import GradNorm
from lightning_gradnorm.strategies import GradNormRule
from lightning_gradnorm.strategies.domination import Domination

F64 = torch.float64


def found_in(losses: list[float], ratio: float = 1.0, rate: float = 1.0) -> int:
    """Updates that are found dominated by one task with these losses."""
    domination = Domination()
    for loss in losses:
        domination.note("noise", loss, ratio, rate)
    assert list(domination.found) == (["noise"] if domination.updates else [])
    return domination.updates


def noisy(n: int, *, slope: float, noise: float, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return [
        1.0 + slope * i + noise * float(one) for i, one in enumerate(torch.randn(n, generator=generator, dtype=F64))
    ]


def test_a_constant_a_rising_and_a_falling_loss() -> None:
    assert found_in([0.7] * 99) == 0
    assert found_in([0.7] * 100) == 100
    assert found_in([0.7] * 250) == 200
    assert found_in([0.7 + 0.001 * i for i in range(100)]) == 100
    assert found_in([0.7 - 0.0001 * i for i in range(500)]) == 0
    assert found_in([0.7 * 0.9**i for i in range(500)]) == 0


def test_noise_neither_hides_a_loss_that_stays_nor_one_that_falls() -> None:
    """Of stretches of pure noise five in six are found at once; one that falls by as much as the noise is never."""
    stays = [found_in(noisy(100, slope=0.0, noise=0.3, seed=seed)) for seed in range(200)]
    assert stays.count(100) > 0.75 * len(stays)
    assert all(found_in(noisy(600, slope=0.0, noise=0.3, seed=seed)) for seed in range(50))
    assert not any(found_in(noisy(100, slope=-0.006, noise=0.3, seed=seed)) for seed in range(200))


def test_a_loss_that_vanishes_is_found_though_it_falls() -> None:
    falls = [0.7 * 0.9**i for i in range(100)]
    assert found_in(falls, ratio=1e-4, rate=1e-3) == 100
    assert found_in(falls, ratio=1e-4, rate=0.9) == 0  # the others are as far
    assert found_in(falls, ratio=0.3, rate=0.05) == 0  # there is much left to learn


def test_a_stretch_ends_when_another_task_holds_the_weight() -> None:
    domination = Domination()
    for task in ["a"] * 60 + [None] + ["a"] * 60 + ["b"] * 60 + ["a"] * 99:
        domination.note(task, 1.0)
    assert domination.updates == 0


# ---- the rule --------------------------------------------------------------------------------------------------------------


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def told_of(rule: GradNormRule) -> list[str]:
    return [message for key, message in rule.remarks.items() if key.endswith("dominates")]


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_the_rule_names_the_task_that_is_not_learned(as_on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradNormRule, "syncs_every_step", not as_on_a_gpu)
    rule = GradNormRule(["fit", "noise"], dtype=F64)
    steps = 0
    while float(rule.weights[1].detach()) <= 1.8:
        rule.step(tensor(1.0, 0.05), tensor(0.97**steps, 2.3))
        steps += 1
    for _ in range(99):
        rule.step(tensor(1.0, 0.05), tensor(0.97**steps, 2.3))
    assert told_of(rule) == []
    rule.step(tensor(1.0, 0.05), tensor(0.97**steps, 2.3))
    (told,) = told_of(rule)
    assert told.startswith(
        "task 'noise' has held more than 90 % of the weight for 100 updates, and its loss has not fallen"
    )
    assert "second). If the task is solved, ignore this. If it never learns: leave the task out, " in told
    for remedy in ("leave the task out", "priorities", "min_weight", "lr=0.005", "stop_after"):
        assert remedy in told
    assert rule.outcomes.domination.updates == 100


def test_updates_that_lack_the_task_do_not_end_its_stretch_and_do_not_count() -> None:
    rule = GradNormRule(
        ["fit", "other", "noise"], initial_weights={"fit": 0.05, "other": 0.05, "noise": 2.9}, dtype=F64
    )
    without = torch.tensor([True, True, False])
    for _ in range(99):
        rule.step(tensor(60.0, 60.0, 1.0), tensor(1.0, 1.0, 2.3))
        rule.step(tensor(60.0, 60.0, 0.0), tensor(1.0, 1.0, 0.0), without)
    assert told_of(rule) == []
    rule.step(tensor(60.0, 60.0, 1.0), tensor(1.0, 1.0, 2.3))
    assert len(told_of(rule)) == 1


@pytest.mark.each_value_once
@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
@pytest.mark.parametrize("absent_tasks", ["leave_out", "last_seen"])
def test_a_loss_that_goes_to_zero_leaves_the_weights_right_and_is_reported(absent_tasks: Any, alpha: float) -> None:
    """Its norm is that of a square, the root of the loss; at the end both are exactly 0."""
    rule = GradNormRule(["fit", "gone"], alpha=alpha, absent_tasks=absent_tasks, dtype=F64)
    for step in range(1500):
        loss = 0.6**step if step < 1000 else 0.0
        rule.step(tensor(1.0, math.sqrt(loss)), tensor(0.5 + 0.5 * 0.999**step, loss))
        weights = rule.weights.detach()
        assert bool((weights.isfinite() & (weights > 0)).all())
        assert float(weights.sum()) == pytest.approx(2, abs=1e-9)
    assert rule.skipped == 0
    if rule.weights[1] > 1.8:
        (told,) = told_of(rule)
        assert "task 'gone' has held more than 90 %" in told
        assert "all but vanished" in told
    assert (float(rule.weights[1].detach()) > 1.8) == (alpha < 0.5)  # a larger alpha holds it back
    assert any("gradient of task 'gone' at the shared layer has been exactly 0" in one for one in rule.remarks.values())


# ---- training --------------------------------------------------------------------------------------------------------------


class Unlearnable(Automatic):
    """The last task's targets are random numbers; small, so that its weight grows."""

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        fit = F.mse_loss(self.seg_head(z), 5 * batch["x"][:, :3])
        return {"seg": fit, "depth": F.mse_loss(self.depth_head(z), 0.1 * batch["depth"])}


def train_on(model: nn.Module, trainer: Any, **options: Any) -> tuple[list[str], MemoryLogger]:
    logger, gradnorm = MemoryLogger(), GradNorm(["seg", "depth"], shared_layer="encoder.2", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callbacks=[gradnorm], logger=logger, log_every_n_steps=1).fit(model, Batches(vector_batches(2, 500)))
    return [str(one.message) for one in caught if "GradNorm" in str(one.message)], logger


def test_a_task_of_random_targets_is_named_once_and_its_updates_are_logged(quiet_trainer: Any) -> None:
    told, logger = train_on(Unlearnable(2), quiet_trainer, alpha=0.5)
    (message,) = told
    assert message.startswith("GradNorm: task 'depth' has held more than 90 % of the weight for 100 updates")
    dominated = logger.scalars["gradnorm/dominated"]
    assert dominated[0] == 100
    assert dominated[-1] >= 200
    assert len(dominated) < len(logger.scalars["gradnorm/skipped"])
    assert "gradnorm/without_gradient" not in logger.scalars


@pytest.mark.parametrize(
    "options",
    [
        {"min_weight": 0.3},
        pytest.param({"stop_after": 20}, marks=pytest.mark.slow),
        pytest.param({"optimizer": partial(torch.optim.Adam, lr=1e-3)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_advice_of_the_warning_helps(options: dict[str, Any], quiet_trainer: Any) -> None:
    told, logger = train_on(Unlearnable(2), quiet_trainer, alpha=0.5, **options)
    assert told == []
    assert "gradnorm/dominated" not in logger.scalars


def test_ordinary_training_logs_none_of_the_rare_counts(quiet_trainer: Any) -> None:
    told, logger = train_on(Automatic(2), quiet_trainer)
    assert told == []
    assert {"gradnorm/dominated", "gradnorm/without_gradient"}.isdisjoint(logger.scalars)


def test_a_plain_loop_is_warned_too() -> None:
    rule = gradnorm_rule(2, alpha=0.5)
    with pytest.warns(UserWarning, match="Balancer: task 'depth' has held more than 90 % of the weight"):
        train(Loop(), rule, vector_batches(2, 500), shared_layer="encoder.2")


class Loop(nn.Module):
    """`Unlearnable` as a plain network."""

    def __init__(self) -> None:
        super().__init__()
        same = Unlearnable(2)
        self.encoder, self.seg_head, self.depth_head = same.encoder, same.seg_head, same.depth_head

    forward = Unlearnable.task_losses
