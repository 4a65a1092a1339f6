"""A `Balancer` on alternating data sets: absent tasks with their last numbers, and the warnings without this option."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import textbook
import torch
from loops import (
    Network,
    distance,
    gradnorm_rule,
    on_two_ranks,
    parameter_distance,
    train,
    train_on_rank,
)
from models import TASKS, Batch, network_sgd, vector_batches
from torchjd.scalarization import UW

from lightning_gradnorm import Balancer
from lightning_gradnorm.strategies import GradNormRule, ScalarizationRule

NAMES = TASKS[:3]
STEPS = 12
last_seen = partial(gradnorm_rule, absent_tasks="last_seen")
without_momentum = partial(
    torch.optim.SGD, lr=0.02
)  # it would move the heads of absent tasks, whose gradients are summed as 0


def in_turn(count: int, size: int = 4) -> list[Batch]:
    return [{"x": b["x"], NAMES[i % 3]: b[NAMES[i % 3]]} for i, b in enumerate(vector_batches(3, count, size=size))]


def of_textbook(
    batches: Sequence[Batch], twin: Network, make_optimizer: Any = network_sgd, **options: Any
) -> list[dict[str, float]]:
    optimizer = make_optimizer(twin.parameters())
    options = {"alpha": 1.2, "tasks": NAMES, "absent_tasks": "last_seen", **options}
    return textbook.train(
        twin, twin.forward_for_textbook, batches, [twin.encoder[2].weight], optimizer, **options
    ).weights


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", None])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("options", [{}, {"update_every": 2}, {"alpha": 0.0}], ids=str)
def test_it_agrees_with_the_textbook(options: dict[str, Any], accumulate: int, heads: Any) -> None:
    batches, model, twin = in_turn(STEPS * accumulate), Network(), Network()
    found, _ = train(model, last_seen(**options), batches, accumulate=accumulate, heads=heads, shared_layer="encoder.2")
    expected = of_textbook(batches, twin, accumulate=accumulate, **options)
    assert max(abs(weight - 1) for weight in expected[-1].values()) > 0.02
    assert distance(found, expected) <= 1e-9
    assert parameter_distance(model, twin) <= 1e-9


@pytest.mark.parametrize("at", [1, 2, 7])
def test_its_state_resumes_bit_for_bit(at: int) -> None:
    batches, whole, parts = in_turn(STEPS), Network(), Network()
    expected, _ = train(whole, last_seen(), batches)
    optimizer = network_sgd(parts.parameters())
    first, state = train(parts, last_seen(), batches[:at], optimizer=optimizer)
    second, _ = train(parts, last_seen(), batches[at:], optimizer=optimizer, state=state)
    assert first + second == expected
    assert parameter_distance(parts, whole) == 0


def test_two_processes_agree_with_the_textbook(tmp_path: Path) -> None:
    batches, twin = in_turn(STEPS, size=8), Network()
    options = {"make_rule": last_seen, "make_optimizer": without_momentum, "shared_layer": "encoder.2"}
    first, second = on_two_ranks(partial(train_on_rank, batches=batches, **options), tmp_path)
    assert first[0] == second[0]
    assert distance(first[0], of_textbook(batches, twin, without_momentum)) <= 1e-9
    assert parameter_distance(first[1], twin) <= 1e-9


# ---- nobody to balance ---------------------------------------------------------------------------------------------------


def told_by(rule: Any, batches: Sequence[Batch], *, end_epoch_after: int | None = None) -> list[str]:
    model = Network()
    optimizer = network_sgd(model.parameters())
    with warnings.catch_warnings(record=True) as caught, Balancer(model, rule, shared_layer="encoder.2") as balancer:
        warnings.simplefilter("always")
        for index, batch in enumerate(batches, start=1):
            balancer.backward(model(batch))
            optimizer.step()
            balancer.step()
            optimizer.zero_grad()
            if index == end_epoch_after:
                balancer.end_epoch()
    return [str(one.message) for one in caught if "weight updates" in str(one.message)]


def test_fifty_steps_with_one_task_each_warn_once() -> None:
    assert told_by(gradnorm_rule(), in_turn(49)) == []
    (told,) = told_by(gradnorm_rule(), in_turn(120))
    assert told.startswith("Balancer: in none of the last 50 weight updates were two tasks present")


def test_the_end_of_an_epoch_warns_at_once() -> None:
    (told,) = told_by(gradnorm_rule(), in_turn(9), end_epoch_after=9)
    assert told.startswith("Balancer: in none of the last 9 weight updates")
    assert told_by(last_seen(), in_turn(60), end_epoch_after=9) == []


def test_a_rule_that_needs_no_norms_does_not_warn() -> None:
    assert told_by(ScalarizationRule(NAMES, UW(3)), in_turn(60), end_epoch_after=9) == []


def test_a_step_that_asks_for_no_number_counts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what happened is read at the end of the epoch."""
    monkeypatch.setattr(GradNormRule, "syncs_every_step", False)
    (told,) = told_by(gradnorm_rule(), in_turn(9), end_epoch_after=9)
    assert told.startswith("Balancer: in none of the last 9 weight updates")
    batches, twin = in_turn(STEPS), Network()
    found, _ = train(Network(), last_seen(), batches, shared_layer="encoder.2")
    assert distance(found, of_textbook(batches, twin)) <= 1e-9
