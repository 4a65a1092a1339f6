"""Several processes give the weights and the network of one process on the concatenated batch.

Where the ranks have the same tasks, they are held against one process of the Trainer. Where they have not, they are held
against the textbook, which says what DDP's objective then is: the mean over ranks and micro-batches of the sum of the
losses that are there. SGD updates the weights: Adam would hide a norm that is wrong by a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from harness import state_by_part
from models import Automatic, Convolutional, as_inputs_and_targets, image_batches, multi_task_module, network_sgd
from models import vector_batches
from ranks import MayLack, MayLackManual, Notes, Step, Told, assert_identical, distance, shares, train

from lightning_gradnorm import GradNorm

NAMES = ["seg", "depth", "normal"]
T = len(NAMES)
STEPS = 50
ROWS = 16  # of the whole batch of one optimizer step
KINDS = ["from the losses", "at the heads", "manual", "MultiTaskModule", "activation"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
weight_sgd = partial(torch.optim.SGD, lr=0.05)


def build(kind: str, accumulate: int = 1, **options: Any) -> tuple[L.LightningModule, GradNorm]:
    """The same network trained in one of five ways, and the callback for it."""
    options = {"optimizer": weight_sgd, **options}
    if kind == "MultiTaskModule":
        return multi_task_module(T, accumulate_grad_batches=accumulate), GradNorm(**options)
    model = MayLackManual(T, accumulate=accumulate) if kind == "manual" else MayLack(T)
    if kind in ("at the heads", "activation"):
        options["heads"] = model.heads()
    if kind == "activation":
        options["norm_of"] = "activation"
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2", **options)
    if isinstance(model, MayLackManual):
        model.gradnorm = [gradnorm]
    return model, gradnorm


def cut(kind: str, ranks: int, accumulate: int, dtype: torch.dtype = torch.float64, count: int = STEPS) -> list[Step]:
    batches = [{name: value.to(dtype) for name, value in b.items()} for b in vector_batches(T, count, size=ROWS)]
    return in_form_of(kind, [shares(batch, ranks, accumulate) for batch in batches])


def in_form_of(kind: str, steps: list[Step]) -> list[Step]:
    """The batches as this kind of module takes them."""
    if kind != "MultiTaskModule":
        return steps
    return [[as_inputs_and_targets(of_rank) for of_rank in step] for step in steps]


def run(kind: str, ranks: int, accumulate: int, dtype: torch.dtype = torch.float64, **options: Any) -> list[Told]:
    model, gradnorm = build(kind, accumulate)
    return train(model.to(dtype), gradnorm, cut(kind, ranks, accumulate, dtype), **options)


@cache
def alone(kind: str, dtype: torch.dtype = torch.float64) -> Told:
    """One process on the concatenated batch."""
    (told,) = run(kind, ranks=1, accumulate=1, dtype=dtype)
    assert max(abs(weight - 1) for weight in told.weights[-1].values()) > 0.1, "weights that never moved prove nothing"
    return told


def assert_close(ranks: list[Told], expected: Told, tolerance: float) -> None:
    assert_identical(ranks)
    weights, network = distance(ranks[0], expected)
    assert weights <= tolerance, f"weights differ by {weights}"
    assert network <= tolerance, f"the network differs by {network}"


# ---- the same tasks everywhere -----------------------------------------------------------------------------------------


def _grid() -> Iterator[Any]:
    """All combinations; those marked slow add no line of code that the others do not run."""
    for kind in KINDS:
        for ranks in (1, 2, 4):
            for accumulate in (1, 2, 4):
                for dtype in (torch.float64, torch.float32):
                    if ranks == accumulate == 1:
                        continue
                    single = dtype == torch.float32
                    cheap = {(2, 1, False), (1, 2, False), (4, 2, False)}
                    if kind == "at the heads":
                        cheap |= {(2, 1, True), (4, 2, True)}
                    marks = [] if (ranks, accumulate, single) in cheap else [pytest.mark.slow]
                    name = f"{kind}, {ranks} ranks x {accumulate}, {'float32' if single else 'float64'}"
                    yield pytest.param(kind, ranks, accumulate, dtype, id=name, marks=marks)


@pytest.mark.parametrize(("kind", "ranks", "accumulate", "dtype"), list(_grid()))
def test_ranks_and_micro_batches_give_what_one_process_gives(
    kind: str, ranks: int, accumulate: int, dtype: torch.dtype
) -> None:
    assert_close(run(kind, ranks, accumulate, dtype), alone(kind, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["at the heads", "activation"])
def test_one_process_gives_what_the_textbook_gives(kind: str) -> None:
    """So that the others, held against it, are held against the textbook too."""
    assert_close([alone(kind)], oracle(cut(kind, 1, 1), kind), 1e-9)


# ---- DDP's options -----------------------------------------------------------------------------------------------------

DDP = {
    "static graph": {"static_graph": True},
    "find unused": {"find_unused_parameters": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "static graph and bucket view": {"static_graph": True, "gradient_as_bucket_view": True},
}


def _ddp_grid() -> Iterator[Any]:
    for option in DDP:
        for kind in KINDS:
            for ranks, accumulate in ((2, 1), (2, 2), (4, 2)):
                cheap = (ranks, accumulate) == (2, 2) and kind in ("at the heads", "MultiTaskModule")
                name = f"{option}, {kind}, {ranks} ranks x {accumulate}"
                yield pytest.param(option, kind, ranks, accumulate, id=name, marks=[] if cheap else [pytest.mark.slow])


@pytest.mark.parametrize(("option", "kind", "ranks", "accumulate"), list(_ddp_grid()))
def test_ddp_options_change_nothing(option: str, kind: str, ranks: int, accumulate: int) -> None:
    assert_close(run(kind, ranks, accumulate, ddp=DDP[option]), alone(kind), 1e-9)


# ---- tasks that are here and not there ---------------------------------------------------------------------------------


@dataclass
class Presence:
    """Which tasks a batch lacks, and in how many parts each step is cut."""

    lacks: Callable[[int, int, int], set[str]]
    """Of step, rank and micro-batch."""
    ranks: int = 2
    accumulate: int = 1


def _at_random(step: int, rank: int, micro: int) -> set[str]:
    generator = torch.Generator().manual_seed(step * 100 + rank * 10 + micro)
    return {task for task in NAMES if torch.rand((), generator=generator) < 0.3}


def _when(condition: bool, *tasks: str) -> set[str]:
    return set(tasks) if condition else set()


PRESENCE = {
    "a task absent on one rank": Presence(lambda s, r, m: _when(r == 1 and s % 2 == 0, "depth")),
    "a task absent on all ranks": Presence(lambda s, r, m: _when(s % 3 == 1, "depth")),
    "a task never on one rank": Presence(lambda s, r, m: _when(r == 1, "depth")),
    "no task on two ranks": Presence(lambda s, r, m: set(NAMES) - {NAMES[r]}, ranks=3),
    "absent tasks wander over the ranks": Presence(lambda s, r, m: _when(r == s % 2, NAMES[s % T])),
    "absent in the first micro-batch": Presence(lambda s, r, m: _when(m == 0, "depth"), accumulate=2),
    "absent in the last micro-batch": Presence(lambda s, r, m: _when(m == 1 and s % 2 == 1, "depth"), accumulate=2),
    "absent on one rank in one micro-batch": Presence(
        lambda s, r, m: _when(r == 1 and m == s % 2, "seg"), accumulate=2
    ),
    "at random": Presence(_at_random, ranks=4, accumulate=2),
}
NO_TASK = {
    "no task on one rank": Presence(lambda s, r, m: _when(r == 1 and s % 3 == 0, *NAMES)),
    "no task on one rank in the first micro-batch": Presence(
        lambda s, r, m: _when(r == 1 and m == 0 and s % 3 == 0, *NAMES), accumulate=2
    ),
    "no task on one rank in the last micro-batch": Presence(
        lambda s, r, m: _when(r == 1 and m == 1 and s % 3 == 0, *NAMES), accumulate=2
    ),
}


def uneven(presence: Presence, size: int = 24) -> list[Step]:
    steps = [shares(b, presence.ranks, presence.accumulate) for b in vector_batches(T, STEPS, size=size)]
    return [
        [
            [
                {name: value for name, value in batch.items() if name not in presence.lacks(s, r, m)}
                for m, batch in enumerate(of_rank)
            ]
            for r, of_rank in enumerate(step)
        ]
        for s, step in enumerate(steps)
    ]


def oracle(steps: list[Step], kind: str) -> Told:
    """The textbook in one process, all ranks' micro-batches in one step."""
    twin = MayLack(T)
    trajectory = textbook.train(
        twin,
        twin.forward_for_textbook,
        [batch for step in steps for of_rank in step for batch in of_rank],
        twin.shared_parameters(),
        network_sgd(twin.parameters()),
        weight_optimizer=weight_sgd,
        accumulate=len(steps[0]) * len(steps[0][0]),
        norm_of="activation" if kind == "activation" else "weight",
        tasks=NAMES,
    )
    return Told(trajectory.weights, state_by_part(twin), {}, [])


def _uneven_grid() -> Iterator[Any]:
    for name in {**PRESENCE, **NO_TASK}:
        for kind in KINDS:
            cheap = kind == "at the heads" or (kind == "MultiTaskModule" and name == "a task absent on one rank")
            yield pytest.param(name, kind, id=f"{name}, {kind}", marks=[] if cheap else [pytest.mark.slow])


@pytest.mark.parametrize(("name", "kind"), list(_uneven_grid()))
def test_uneven_presence_follows_the_textbook(name: str, kind: str) -> None:
    presence = {**PRESENCE, **NO_TASK}[name]
    steps = uneven(presence)
    expected = oracle(steps, kind)
    complete = oracle(uneven(Presence(lambda s, r, m: set(), presence.ranks, presence.accumulate)), kind)
    assert distance(expected, complete)[0] > 1e-3, "what is absent makes no difference here"
    model, gradnorm = build(kind, presence.accumulate)
    ranks = train(model, gradnorm, in_form_of(kind, steps), ddp={"find_unused_parameters": True})
    assert_close(ranks, expected, 1e-9)
