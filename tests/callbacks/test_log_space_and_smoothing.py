"""`weight_space="log"` and `smoothing`, our own answers to unequal scales and noisy rates."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import textbook
import torch
from found import MakeTrainer
from harness import Batches, Recorder, assert_agrees
from loops import Network, distance, gradnorm_rule, on_two_ranks, parameter_distance, train, train_on_rank
from models import TASKS, Automatic, vector_batches
from torch import Tensor

from lightning_gradnorm import GradNorm
from lightning_gradnorm.strategies import GradNormRule

STEPS = 10
F64 = torch.float64
OPTIONS: dict[str, dict[str, Any]] = {
    "log": {"weight_space": "log"},
    "smoothed": {"smoothing": 0.9},
    "both": {"weight_space": "log", "smoothing": 0.5},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def by_the_textbook(batches: list[Any], **options: Any) -> tuple[Automatic, textbook.Trajectory]:
    twin = Automatic()
    W = [twin.encoder[2].weight]
    return twin, textbook.train(
        twin, twin.forward_for_textbook, batches, W, twin.configure_optimizers(), tasks=TASKS[:3], **options
    )


@each_option
@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", None])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "more",
    [{}, {"update_every": 2}, {"initial_losses": 3}, {"optimizer": partial(torch.optim.SGD, lr=0.1)}, {"alpha": 0.0}],
    ids=str,
)
def test_a_training_agrees_with_the_textbook(
    options: dict[str, Any], heads: Any, accumulate: int, more: dict[str, Any], quiet_trainer: MakeTrainer
) -> None:
    batches = vector_batches(3, STEPS * accumulate)
    of_textbook = {"weight_optimizer" if name == "optimizer" else name: value for name, value in more.items()}
    twin, trajectory = by_the_textbook(batches, accumulate=accumulate, **options, **of_textbook)
    assert max(abs(weight - 1) for weight in trajectory.weights[-1].values()) > 1e-3
    model, gradnorm = Automatic(), GradNorm(list(TASKS[:3]), shared_layer="encoder.2", heads=heads, **options, **more)
    recorder = Recorder(gradnorm, accumulate)
    quiet_trainer(callbacks=[gradnorm, recorder], accumulate_grad_batches=accumulate).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)


@each_option
@pytest.mark.parametrize("absent_tasks", ["leave_out", "last_seen"])
def test_absent_tasks_agree_with_the_textbook(options: dict[str, Any], absent_tasks: Any) -> None:
    batches = vector_batches(3, STEPS)
    for index, batch in enumerate(batches):
        if index:
            del batch[TASKS[index % 3]]
    sgd = partial(torch.optim.SGD, lr=0.05)
    twin = Network()
    run = textbook.train(
        twin,
        twin.forward_for_textbook,
        batches,
        [twin.encoder[2].weight],
        torch.optim.SGD(twin.parameters(), lr=0.02, momentum=0.9),
        alpha=1.2,
        tasks=TASKS[:3],
        weight_optimizer=sgd,
        absent_tasks=absent_tasks,
        **options,
    )
    model = Network()
    rule = gradnorm_rule(optimizer=sgd, absent_tasks=absent_tasks, **options)
    network_optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    weights, _ = train(model, rule, batches, optimizer=network_optimizer)
    assert distance(weights, run.weights) <= 1e-9


def rule(**options: Any) -> GradNormRule:
    return GradNormRule(["a", "b", "c"], dtype=F64, **options)


def numbers(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.rand, 3, dtype=F64, generator=generator)
    return [(draw() + 0.1, draw() + 0.1) for _ in range(count)]


@each_option
def test_a_resumed_rule_continues_bit_for_bit(options: dict[str, Any]) -> None:
    whole, first, second = (rule(**options) for _ in range(3))
    for index, (norms, losses) in enumerate(numbers(20)):
        whole.step(norms, losses)
        (first if index < 10 else second).step(norms, losses)
        if index == 9:
            second.load_state_dict(first.state_dict())
    assert torch.equal(whole.weights, second.weights)


@each_option
def test_a_state_without_them_can_be_gone_on_from(options: dict[str, Any]) -> None:
    plain, resumed = rule(), rule(**options)
    for norms, losses in numbers(5):
        plain.step(norms, losses)
    resumed.load_state_dict(plain.state_dict())
    assert torch.equal(resumed.weights, plain.weights)
    resumed.step(*numbers(1)[0])
    assert float(resumed.weights.detach().sum()) == pytest.approx(3.0, abs=1e-12)


@each_option
def test_moving_to_another_precision_keeps_every_value(options: dict[str, Any]) -> None:
    moved, kept = rule(**options), rule(**options)
    for norms, losses in numbers(4):
        for one in (moved, kept):
            one.step(norms, losses)
    moved.to(dtype=torch.float32)
    torch.testing.assert_close(moved.weights.detach().double(), kept.weights.detach(), rtol=1e-6, atol=0.0)
    moved.step(*numbers(1)[0])
    assert moved.weights.dtype == torch.float32


@each_option
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_a_bad_number_leaves_no_trace(options: dict[str, Any], bad: float) -> None:
    with_bad, without = rule(**options), rule(**options)
    for index, (norms, losses) in enumerate(numbers(8)):
        for one in (with_bad, without):
            one.step(norms, losses)
        if index == 3:
            only_first = torch.tensor([True, False, False])
            before = with_bad.weights.detach().clone()
            with_bad.step(norms, torch.tensor([bad, 1.0, 1.0], dtype=F64), only_first)
            assert torch.equal(with_bad.weights.detach(), before)
    assert torch.equal(with_bad.weights, without.weights)
    assert with_bad.skipped == 1


def test_in_log_space_small_and_large_weights_move_by_the_same_factor() -> None:
    linear, log = (
        rule(weight_space=space, alpha=0.0, initial_weights={"a": 1e-3, "b": 1.5, "c": 1.499})
        for space in ("linear", "log")
    )
    for one in (linear, log):
        before = one.weights.detach().clone()
        one.step(torch.tensor([1e4, 1.0, 1.0], dtype=F64), torch.ones(3, dtype=F64))
        factor = one.weights.detach() / before
        if one is log:
            assert 0.94 < float(factor[0] / factor[1]) < 0.96  # exp(−0.025) down, exp(0.025) up
        else:
            assert float(factor[0] / factor[1]) < 0.11  # down to min_weight at once


@each_option
def test_two_processes_match_one(options: dict[str, Any], tmp_path: Path) -> None:
    batches = vector_batches(3, 6, size=8)
    alone = Network()
    expected, _ = train(alone, gradnorm_rule(**options), batches)

    work = partial(train_on_rank, batches=batches, make_rule=partial(gradnorm_rule, **options))
    for weights, network in on_two_ranks(work, tmp_path):
        assert distance(weights, expected) <= 1e-9
        assert parameter_distance(network, alone) <= 1e-9


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weight_space": "logarithmic"}, r"weight_space should be 'linear' or 'log'; got 'logarithmic'"),
        ({"smoothing": 1.0}, r"smoothing should be a number from 0 to below 1; got 1\.0"),
        ({"smoothing": -0.1}, r"smoothing should be a number from 0 to below 1; got -0\.1"),
        ({"smoothing": "0.9"}, r"smoothing should be a number from 0 to below 1; got '0\.9'"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"GradNorm: {expected}"):
        GradNorm(["a", "b"], **options)
