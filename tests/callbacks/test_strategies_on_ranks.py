"""Several processes give, with every strategy, the weights and the network of one process on the concatenated batch.

Where the ranks have the same tasks, they are held against one process of the Trainer. Where they have not, against a
calculation by hand. To start processes takes longer than to train a few steps: the strategies are trained one after the other
in the same two processes, once, and each test looks at what became of one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning as L
import pytest
import torch
from models import TASKS, Batch, as_inputs_and_targets, multi_task_module, vector_batches
from ranks import (
    MayLack,
    MayLackManual,
    Run,
    Step,
    Told,
    assert_identical,
    distance,
    in_form_of,
    shares,
    train,
    train_each,
)
from strategies import STRATEGIES, tasks_for

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # cvxpy, of NashMTL
STEPS = 8
ROWS = 16  # of the whole batch of one optimizer step
KINDS = ["at the heads", "from the losses", "manual", "MultiTaskModule"]


def build(name: str, kind: str, accumulate: int = 1) -> tuple[L.LightningModule, Any]:
    """The same network trained in one of four ways, and the strategy's callback for it."""
    T = tasks_for(name)
    if kind == "MultiTaskModule":
        return multi_task_module(T, accumulate_grad_batches=accumulate), STRATEGIES[name]()
    model = MayLackManual(T, accumulate=accumulate) if kind == "manual" else MayLack(T)
    heads = model.heads() if kind == "at the heads" else None
    balancing = STRATEGIES[name](tasks=list(TASKS[:T]), heads=heads)
    if isinstance(model, MayLackManual):
        model.gradnorm = [balancing]
    return model, balancing


def cut(name: str, ranks: int, accumulate: int) -> list[Step]:
    return [shares(batch, ranks, accumulate) for batch in vector_batches(tasks_for(name), STEPS, size=ROWS)]


def joined(steps: list[Step]) -> list[Step]:
    """For one process: each micro-batch made of those of all ranks."""
    return [
        [[{name: torch.cat([one[name] for one in of_ranks]) for name in of_ranks[0]} for of_ranks in zip(*step)]]
        for step in steps
    ]


def run(name: str, kind: str, steps: list[Step], **options: Any) -> Run:
    model, balancing = build(name, kind, len(steps[0][0]))
    if "DWA" in name:
        options["options"] = {"max_epochs": 4}  # its weights begin to differ in the third
    return Run(model, balancing, in_form_of(kind, steps), **options)


@cache
def outcomes(kind: str, accumulate: int, ddp: tuple[str, ...] = (), names: tuple[str, ...] = tuple(STRATEGIES)) -> Any:
    """Of each strategy on two ranks, in one pair of processes."""
    options = {option: True for option in ddp}
    return train_each({name: run(name, kind, cut(name, 2, accumulate), ddp=options) for name in names})


@cache
def alone(name: str, kind: str, accumulate: int) -> Told:
    one = run(name, kind, joined(cut(name, 2, accumulate)))
    return train(one.model, one.balancing, one.steps, **one.options)[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_give_what_one_process_gives(name: str) -> None:
    told = outcomes("at the heads", 1)[name]
    assert not isinstance(told, str), told
    assert_identical(told)
    expected = alone(name, "at the heads", 1)
    weights, network = distance(told[0], expected)
    print(name, weights, network, told[0].weights[-1])
    assert weights <= 1e-8
    assert network <= 1e-8
