"""200 training steps with ReLoBRaLo, SoftAdapt, SLAW and UW-SO, in one process and in two, against their equations by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import by_hand
import pytest
import torch
from harness import state_by_part
from loss_rules import RULES, ByEquations
from models import vector_batches
from ranks import MayLack, Run, Told, assert_identical, shares, train, train_each
from torch import Tensor

from lightning_gradnorm import Scalarization

STEPS, TOLERANCE = 200, 1e-9
TASKS = ["seg", "depth", "normal"]
NAMES = ["ReLoBRaLo, quick", "SoftAdapt, loss-weighted", "SoftAdapt, normalized", "SLAW", "UWSO"]


def batches(absent: bool) -> list[dict[str, Tensor]]:
    """Of 4 rows; if tasks may be absent, each third lacks one of them."""
    made = vector_batches(3, STEPS)
    for step, batch in enumerate(made):
        if absent and step % 3 == 1:
            del batch[TASKS[step % 7 % 3]]
    return made


@cache
def expected(name: str, absent: bool) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The weights after each step, and the network at the end, of a plain loop that follows the equations."""
    torch.manual_seed(0)
    twin = MayLack(3)
    optimizer: Any = twin.configure_optimizers()
    scalarizer = ByEquations(RULES[name].equations())
    hand = by_hand.scalarize(twin, twin.forward_for_textbook, batches(absent), scalarizer, optimizer, tasks=TASKS)
    return hand.weights, {key: value.detach() for key, value in state_by_part(twin).items()}


def run(name: str, absent: bool, ranks: int) -> Run:
    steps = [shares(batch, ranks, 1) for batch in batches(absent)]
    return Run(MayLack(3), Scalarization(RULES[name].make(), tasks=TASKS), steps, ddp={"find_unused_parameters": True})


def assert_follows(told: Told, name: str, absent: bool) -> None:
    weights, network = expected(name, absent)
    assert len(told.weights) == STEPS
    for step, (found, by_equations) in enumerate(zip(told.weights, weights, strict=True)):
        assert found == pytest.approx(by_equations, rel=0.0, abs=TOLERANCE), f"step {step}"
    assert network.keys() == told.network.keys()
    for key, value in network.items():
        torch.testing.assert_close(told.network[key], value, rtol=0.0, atol=TOLERANCE)
    last = list(weights[-1].values())
    assert max(last) - min(last) > 1e-3


@pytest.mark.each_value_once
@pytest.mark.parametrize("absent", [False, True], ids=["all present", "some absent"])
@pytest.mark.parametrize("name", NAMES)
def test_200_steps_of_one_process_follow_the_equations(name: str, absent: bool) -> None:
    torch.manual_seed(0)
    one = run(name, absent, ranks=1)
    (told,) = train(one.model, one.balancing, one.steps)
    assert_follows(told, name, absent)


FAST = ("ReLoBRaLo, quick", "SLAW")  # the one that draws random numbers, and the one that remembers most
GROUPS = {name: FAST if name in FAST else tuple(name for name in NAMES if name not in FAST) for name in NAMES}


@cache
def on_two_ranks(names: tuple[str, ...]) -> dict[str, list[Told] | str]:
    return train_each({name: run(name, True, ranks=2) for name in names})


@pytest.mark.xdist_group("loss rules on two ranks")  # each group in one pair of processes
@pytest.mark.parametrize("name", [pytest.param(one, marks=[] if one in FAST else pytest.mark.slow) for one in NAMES])
def test_200_steps_of_two_processes_follow_the_equations(name: str) -> None:
    told = on_two_ranks(GROUPS[name])[name]
    assert not isinstance(told, str), told
    assert_identical(told)
    assert_follows(told[0], name, absent=True)
