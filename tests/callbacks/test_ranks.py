"""Several processes give the weights and the network of one process on the concatenated batch.

If the ranks have the same tasks, they are compared with one process of the Trainer. If not, they are compared with the
textbook, which uses DDP's objective: the mean over ranks and micro-batches of the sum of the losses that are
present. SGD updates the weights, because Adam would hide a norm that is wrong by a factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import lightning as L
import pytest
import textbook
import torch
from harness import state_by_part
from lightning.pytorch.plugins.precision import MixedPrecision
from models import (
    FEATURES,
    HIDDEN,
    Convolutional,
    image_batches,
    multi_task_module,
    network_sgd,
    vector_batches,
)
from ranks import (
    NO_TASK,
    PRESENCE,
    MayLack,
    MayLackManual,
    Notes,
    Presence,
    Run,
    Sent,
    Step,
    Told,
    assert_identical,
    distance,
    in_form_of,
    lacking,
    shares,
    train,
    train_each,
    when,
)

from lightning_gradnorm import GradNorm

NAMES = ["seg", "depth", "normal"]
T = len(NAMES)
STEPS = 24
ROWS = 16  # of the whole batch of one optimizer step
KINDS = ["from the losses", "at the heads", "manual", "MultiTaskModule", "activation"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
weight_sgd = partial(torch.optim.SGD, lr=0.05)


def build(kind: str, accumulate: int = 1, **options: Any) -> tuple[L.LightningModule, GradNorm]:
    """The same network trained in one of five ways, and the callback for it."""
    options = {"optimizer": weight_sgd, "shared_layer": "encoder.2", **options}
    if kind == "MultiTaskModule":
        return multi_task_module(T, accumulate_grad_batches=accumulate), GradNorm(**options)
    model = MayLackManual(T, accumulate=accumulate) if kind == "manual" else MayLack(T)
    if kind in ("at the heads", "activation"):
        options["heads"] = model.heads()
    else:
        options.setdefault("heads", None)
    if kind == "activation":
        options["norm_of"] = "activation"
    gradnorm = GradNorm(NAMES, **options)
    if isinstance(model, MayLackManual):
        model.gradnorm = [gradnorm]
    return model, gradnorm


def cut(kind: str, ranks: int, accumulate: int, dtype: torch.dtype = torch.float64, count: int = STEPS) -> list[Step]:
    batches = [{name: value.to(dtype) for name, value in b.items()} for b in vector_batches(T, count, size=ROWS)]
    return in_form_of(kind, [shares(batch, ranks, accumulate) for batch in batches])


class Way(NamedTuple):
    """How the same network is trained on the same rows."""

    kind: str
    ranks: int = 2
    accumulate: int = 1
    dtype: torch.dtype = torch.float64
    ddp: str = ""

    def __str__(self) -> str:
        single = "float32" if self.dtype == torch.float32 else "float64"
        return ", ".join([self.kind, f"{self.ranks} ranks x {self.accumulate}", single, *filter(None, [self.ddp])])


def run_of(way: Way) -> Run:
    model, gradnorm = build(way.kind, way.accumulate)
    steps = cut(way.kind, way.ranks, way.accumulate, way.dtype)
    return Run(model.to(way.dtype), gradnorm, steps, ddp=DDP[way.ddp] if way.ddp else {})


@cache
def outcomes(ways: tuple[Way, ...]) -> dict[str, list[Told] | str]:
    """All in the same processes, which cost more to start than a training."""
    return train_each({str(way): run_of(way) for way in ways})


def told_of(way: Way) -> list[Told]:
    if way in FAST and way.ranks > 1:
        told = outcomes(tuple(one for one in FAST if one.ranks == way.ranks))[str(way)]
        assert not isinstance(told, str), told
        return told
    one = run_of(way)
    return train(one.model, one.balancing, one.steps, ddp=one.ddp)


@cache
def alone(kind: str, dtype: torch.dtype = torch.float64) -> Told:
    """One process on the concatenated batch."""
    (told,) = told_of(Way(kind, ranks=1, dtype=dtype))
    assert max(abs(weight - 1) for weight in told.weights[-1].values()) > 0.1, "weights that never moved prove nothing"
    return told


def assert_close(ranks: list[Told], expected: Told, tolerance: float) -> None:
    assert_identical(ranks)
    weights, network = distance(ranks[0], expected)
    assert weights <= tolerance, f"weights differ by {weights}"
    assert network <= tolerance, f"the network differs by {network}"


# ---- the same tasks everywhere -----------------------------------------------------------------------------------------


FAST = [
    *(Way(kind) for kind in KINDS),
    Way("at the heads", dtype=torch.float32),
    Way("at the heads", 1, 2),
    Way("MultiTaskModule", 1, 2),
    Way("MultiTaskModule", 4, 2),
    Way("at the heads", 2, 1, ddp="static graph"),
    Way("MultiTaskModule", 2, 2, ddp="find unused"),
    Way("at the heads", 2, 2, ddp="bucket view"),
]
"""The other ways add no line of code that these do not run."""
TOGETHER = pytest.mark.xdist_group("GradNorm on ranks")
"""What is trained in the same processes is for one worker."""


def _table(ways: Iterable[Way]) -> Any:
    rows = [pytest.param(way, id=str(way), marks=TOGETHER if way in FAST else pytest.mark.slow) for way in ways]
    return pytest.mark.parametrize("way", rows)


def _with_the_same_tasks() -> Iterator[Way]:
    for kind in KINDS:
        for ranks in (1, 2, 4):
            for accumulate in (1, 2, 4):
                for dtype in (torch.float64, torch.float32):
                    if ranks * accumulate > 1:
                        yield Way(kind, ranks, accumulate, dtype)


@_table(_with_the_same_tasks())
def test_ranks_and_micro_batches_match_one_process(way: Way) -> None:
    assert_close(told_of(way), alone(way.kind, way.dtype), TOLERANCE[way.dtype])


@pytest.mark.parametrize("kind", ["at the heads", "activation"])
def test_one_process_agrees_with_the_textbook(kind: str) -> None:
    """The other tests compare with one process, so they also compare with the textbook."""
    assert_close([alone(kind)], oracle(cut(kind, 1, 1), kind), 1e-9)


@pytest.mark.parametrize(
    "kind", ["at the heads", "MultiTaskModule", pytest.param("activation", marks=pytest.mark.slow)]
)
def test_a_last_step_of_fewer_micro_batches_takes_their_mean(kind: str) -> None:
    """Two of four on each rank, of two rows: the mean over the same rows is that of four micro-batches of one row."""
    *steps, last = cut("from the losses", 2, 4, count=12)
    halved = [of_rank[:2] for of_rank in last]
    finer = [[row for batch in of_rank for (row,) in shares(batch, 2, 1)] for of_rank in halved]
    model, gradnorm = build(kind, 4)
    told = train(model, gradnorm, in_form_of(kind, [*steps, halved]))
    expected = oracle([*steps, finer], kind)
    if kind != "MultiTaskModule":  # Lightning divides what reaches the network by four all the same
        expected.network = told[0].network
    assert_close(told, expected, 1e-9)


# ---- DDP's options -----------------------------------------------------------------------------------------------------

DDP = {
    "static graph": {"static_graph": True},
    "find unused": {"find_unused_parameters": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "static graph and bucket view": {"static_graph": True, "gradient_as_bucket_view": True},
}


def _with_options_of_ddp() -> Iterator[Way]:
    for option, arguments in DDP.items():
        for kind in KINDS:
            # A static graph cannot begin with a backward pass under no_sync, with or without this callback: DDP fails an
            # assertion of its own. So what accumulates under no_sync is tried without it.
            accumulates = kind == "manual" or "static_graph" not in arguments
            for ranks in (2, 4):
                yield Way(kind, ranks, 2 if accumulates else 1, ddp=option)


@_table(_with_options_of_ddp())
def test_ddp_options_change_nothing(way: Way) -> None:
    assert_close(told_of(way), alone(way.kind), 1e-9)


# ---- tasks that are here and not there ---------------------------------------------------------------------------------


def uneven(presence: Presence) -> list[Step]:
    return lacking(vector_batches(T, STEPS, size=24), presence)


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


@cache
def complete(parts: int, kind: str) -> Told:
    """The textbook's result if no task is ever absent."""
    return oracle(uneven(Presence(lambda s, r, m: set(), ranks=parts)), kind)


UNEVEN_FAST = [
    ("a task absent on one rank", "at the heads"),
    ("a task absent on all ranks", "manual"),
    ("absent tasks wander over the ranks", "from the losses"),
    ("absent on one rank in one micro-batch", "at the heads"),
    ("no task on one rank", "at the heads"),
    ("no task on one rank in the first batch", "MultiTaskModule"),
    ("at random", "at the heads"),
]
"""What the fast set runs; the others are slow."""


def _uneven_grid() -> Iterator[Any]:
    for name in {**PRESENCE, **NO_TASK}:
        for kind in KINDS:
            marks = TOGETHER if (name, kind) in UNEVEN_FAST else pytest.mark.slow
            yield pytest.param(name, kind, {}, id=f"{name}, {kind}", marks=marks)
    for name in ("a task absent on one rank", "a task absent on all ranks", "at random"):
        option = {"gradient_as_bucket_view": True}
        yield pytest.param(name, "at the heads", option, id=f"{name}, bucket view", marks=pytest.mark.slow)


def uneven_run(name: str, kind: str, **ddp: Any) -> Run:
    presence = {**PRESENCE, **NO_TASK}[name]
    model, gradnorm = build(kind, presence.accumulate)
    return Run(model, gradnorm, in_form_of(kind, uneven(presence)), ddp={"find_unused_parameters": True, **ddp})


@cache
def uneven_outcomes(ranks: int) -> dict[str, list[Told] | str]:
    runs = {f"{name}, {kind}": uneven_run(name, kind) for name, kind in UNEVEN_FAST}
    return train_each({name: one for name, one in runs.items() if one.ranks == ranks})


@pytest.mark.parametrize(("name", "kind", "ddp"), list(_uneven_grid()))
def test_uneven_presence_follows_the_textbook(name: str, kind: str, ddp: dict[str, Any]) -> None:
    presence = {**PRESENCE, **NO_TASK}[name]
    expected = oracle(uneven(presence), kind)
    assert distance(expected, complete(presence.ranks * presence.accumulate, kind))[0] > 1e-3, (
        "what is absent makes no difference here"
    )
    if (name, kind) in UNEVEN_FAST and not ddp:
        told = uneven_outcomes(presence.ranks)[f"{name}, {kind}"]
        assert not isinstance(told, str), told
    else:
        one = uneven_run(name, kind, **ddp)
        told = train(one.model, one.balancing, one.steps, ddp=one.ddp)
    assert_close(told, expected, 1e-9)


def without(steps: list[Step], left_out: set[int]) -> list[Step]:
    return [step for index, step in enumerate(steps) if index not in left_out]


def standing_still(expected: Told, at: set[int]) -> Told:
    """The same with further steps in between, which have changed nothing."""
    weights, moves = [], iter(expected.weights)
    for step in range(len(expected.weights) + len(at)):
        weights.append(weights[-1] if step in at else next(moves))
    return Told(weights, expected.network, {}, [])


def test_steps_without_any_task_on_any_rank_move_no_weight_and_block_no_rank() -> None:
    """The network's optimizer does take such a step, along a gradient of zero: no rank knows that the others had none."""
    empty = {4, 5, 15}
    steps = uneven(Presence(lambda s, r, m: when(s in empty, *NAMES), accumulate=2))
    model, gradnorm = build("MultiTaskModule", 2)
    ranks = train(model, gradnorm, in_form_of("MultiTaskModule", steps), ddp={"find_unused_parameters": True})
    for step in range(1, len(steps)):
        assert (ranks[0].weights[step] == ranks[0].weights[step - 1]) == (step in empty)
    assert distance(ranks[0], ranks[1]) == (0.0, 0.0)


# ---- batch statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_batch_norm_takes_each_ranks_statistics_and_keeps_those_of_rank_0(
    ranks: int, accumulate: int, heads: bool
) -> None:
    """Ordinary BatchNorm under DDP; SyncBatchNorm refuses to run on a CPU."""
    parts = ranks * accumulate
    batches = image_batches(T, 20 * parts)
    micro = iter(batches)
    steps: list[Step] = [[[next(micro) for _ in range(accumulate)] for _ in range(ranks)] for _ in range(20)]
    model, twin = Convolutional(T), Convolutional(T)

    def forward(batch: Any) -> textbook.Forward:
        kept = {module: dict(module._buffers) for module in twin.modules()}
        if next(rank_of_pass) > 0:  # writes its running statistics into copies that are thrown away
            for module, buffers in kept.items():
                module._buffers.update({name: value.clone() for name, value in buffers.items()})
        seen = twin.forward_for_textbook(batch)
        for module, buffers in kept.items():
            module._buffers.update(buffers)
        return seen

    rank_of_pass = iter([rank for _ in range(20) for rank in range(ranks) for _ in range(accumulate)])
    trajectory = textbook.train(
        twin,
        forward,
        batches,
        twin.shared_parameters(),
        network_sgd(twin.parameters()),
        weight_optimizer=weight_sgd,
        accumulate=parts,
    )
    gradnorm = GradNorm(NAMES, shared_layer="encoder.3", heads=model.heads() if heads else None, optimizer=weight_sgd)
    told = train(model, gradnorm, steps)
    expected = Told(trajectory.weights, state_by_part(twin), {}, [])
    assert max(distance(told[0], expected)) <= 1e-9
    for one in [*told, expected]:  # each rank's own running statistics are its own until rank 0's are handed out again
        one.network = {name: value for name, value in one.network.items() if "running" not in name}
    assert_close(told, expected, 1e-9)


# ---- numbers that are none ---------------------------------------------------------------------------------------------


class LeavesOutWhatIsNotFinite(L.Callback):
    """What a careful user does: no optimizer step along a gradient that is not finite."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if not all(p.grad.isfinite().all() for p in pl_module.parameters()):
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("kind", "ranks", "accumulate"),
    [
        ("MultiTaskModule", 2, 2),
        pytest.param("at the heads", 2, 1, marks=pytest.mark.slow),
        pytest.param("from the losses", 2, 1, marks=pytest.mark.slow),
        pytest.param("manual", 2, 2, marks=pytest.mark.slow),
        pytest.param("activation", 4, 2, marks=pytest.mark.slow),
        pytest.param("at the heads", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_is_no_number_on_one_rank_moves_no_ranks_weights(kind: str, ranks: int, accumulate: int) -> None:
    no_number = {3: torch.nan, 10: torch.inf, 11: torch.nan}
    steps = cut("from the losses", ranks, accumulate)
    expected = standing_still(oracle(without(steps, set(no_number)), kind), set(no_number))
    for step, value in no_number.items():
        steps[step][1][-1]["depth"].fill_(value)
    model, gradnorm = build(kind, accumulate)
    told = train(
        model,
        gradnorm,
        in_form_of(kind, steps),
        callbacks=[LeavesOutWhatIsNotFinite()],
        warns="GradNorm: the loss or the gradient norm of task 'depth' is not finite",
    )
    assert_close(told, expected, 1e-9)
    assert [len(one.warnings) for one in told] == [1] + [0] * (ranks - 1)
    assert [one.logged["gradnorm/skipped"] for one in told] == [3.0] * ranks


class Scales(Notes):
    """Notes the scale of the loss scaler after each optimizer step."""

    def __init__(self, accumulate: int) -> None:
        super().__init__()
        self.accumulate = accumulate

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % self.accumulate == 0:
            self.notes.append(trainer.precision_plugin.scaler.get_scale())


@pytest.mark.parametrize(
    ("kind", "ranks", "accumulate"),
    [
        ("at the heads", 2, 1),
        pytest.param("MultiTaskModule", 2, 2, marks=pytest.mark.slow),
        pytest.param("from the losses", 2, 2, marks=pytest.mark.slow),
        pytest.param("manual", 2, 2, marks=pytest.mark.slow),
        pytest.param("activation", 4, 2, marks=pytest.mark.slow),
        pytest.param("at the heads", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_an_overflow_on_one_rank_is_skipped_by_all_together(kind: str, ranks: int, accumulate: int) -> None:
    overflows, scale = {7, 20}, 2.0**12
    steps = cut("from the losses", ranks, accumulate, torch.float32)
    expected = standing_still(
        oracle(
            [[[{n: v.double() for n, v in b.items()} for b in r] for r in s] for s in without(steps, overflows)], kind
        ),
        overflows,
    )
    for step in overflows:
        steps[step][1][-1]["depth"].fill_(1e4)  # its error times the scale is beyond half precision
    model, gradnorm = build(kind, accumulate)
    told = train(
        model.float(),
        gradnorm,
        in_form_of(kind, steps),
        callbacks=[Scales(accumulate)],
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))],
    )
    assert_identical(told)
    for one in told:
        assert one.notes == [scale / 2 ** sum(step >= o for o in overflows) for step in range(STEPS)]
        assert one.logged["gradnorm/skipped"] == 0
    weights = torch.tensor([list(one.values()) for one in told[0].weights])
    moved = (weights[1:] - weights[:-1]).abs().sum(dim=1)
    assert {step for step in range(1, STEPS) if moved[step - 1] == 0} == overflows
    reference = torch.tensor([list(one.values()) for one in expected.weights])
    torch.testing.assert_close(weights, reference, rtol=0.01, atol=0)


# ---- what is sent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "accumulate"), [("from the losses", 1), pytest.param("manual", 2, marks=pytest.mark.slow)]
)
def test_once_layer_and_heads_are_found_there_is_one_sum_for_each_step(kind: str, accumulate: int) -> None:
    model, gradnorm = build(kind, accumulate, shared_layer=None, heads="auto")
    told = train(model, gradnorm, cut(kind, 2, accumulate, count=6), callbacks=[Sent(accumulate)])
    for one in told:
        sent = [(step, name) for step, name, _, _, _ in one.notes if step < 6]
        assert [note for note in sent if note[0] > 0] == [(step, "all_reduce") for step in range(1, 6)]
        assert 1 < len([note for note in sent if note[0] == 0]) <= 5
        assert not any(in_backward for _, _, in_backward, _, _ in one.notes)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "kind",
    [
        kind
        if kind in ("at the heads", "MultiTaskModule", "activation")
        else pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_one_sum_over_the_ranks_for_each_step_and_none_in_backward(kind: str, accumulate: int) -> None:
    update_every, stop_after = 3, 20
    model, gradnorm = build(kind, accumulate, update_every=update_every, stop_after=stop_after)
    told = train(model, gradnorm, cut(kind, 2, accumulate), callbacks=[Sent(accumulate)])
    width = 1 if kind == "activation" else HIDDEN * FEATURES
    for one in told:
        sent = [note for note in one.notes if note[0] < STEPS]
        assert [(step, name, in_backward) for step, name, in_backward, _, _ in sent] == [
            (step, "all_reduce", False) for step in range(STEPS)
        ]
        for step, _, _, numbers, _ in sent:
            measured = step % update_every == 0 and step < stop_after
            beside = numbers - (T * width if measured else 0)  # the losses and how often each task was there
            assert 0 <= beside <= 4 * T, (step, numbers)
