"""Several processes give, with every strategy, the weights and the network of one process on the concatenated batch.

Starting processes takes longer than training a few steps. The same two processes therefore train all strategies once,
one after another, and each test looks at the result of one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from models import Batch, vector_batches
from ranks import (
    MayLack,
    Notes,
    Run,
    Sent,
    Step,
    Told,
    assert_identical,
    distance,
    in_form_of,
    in_processes,
    train,
    train_each,
)
from strategies import STRATEGIES
from strategies_on_ranks import KINDS, ROWS, STEPS, TOLERANCE, Case, build, cut
from torch import Tensor, nn
from torchjd import aggregation as A

from lightning_gradnorm import Aggregation

# cvxpy's, of NashMTL
pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")


def run(case: Case, steps: list[Step]) -> Run:
    model, balancing = build(case.name, case.kind, case.accumulate)
    options = {"max_epochs": 4} if "DWA" in case.name else {}  # its weights begin to differ in the third
    ddp = dict.fromkeys(case.ddp, True)
    return Run(model, balancing, in_form_of(case.kind, steps), ddp=ddp, options=options)


def joined(steps: list[Step]) -> list[Step]:
    """For one process: each micro-batch made of those of all ranks."""
    return [
        [
            [
                {name: torch.cat([one[name] for one in of_ranks]) for name in of_ranks[0]}
                for of_ranks in zip(*step, strict=True)
            ]
        ]
        for step in steps
    ]


@cache
def outcomes(cases: tuple[Case, ...]) -> dict[str, list[Told] | str]:
    """On two ranks, all in one pair of processes."""
    return train_each({str(case): run(case, cut(case)) for case in cases})


def alone(case: Case, ranks: int) -> Told:
    """One process on the concatenated batch."""
    torch.manual_seed(0)
    one = run(case, joined(cut(case, ranks)))
    (told,) = train(one.model, one.balancing, one.steps, **one.options)
    return told


def assert_as_alone(case: Case, told: list[Told] | str) -> tuple[float, float]:
    assert not isinstance(told, str), f"{case}: {told}"
    assert_identical(told)
    apart = distance(told[0], alone(case, len(told)))
    assert max(apart) <= TOLERANCE, f"{case}: weights and network differ by {apart}"
    return apart


SOME = (
    *(f"{name} of the losses" for name in ("COSMOS", "DWA", "FAMO", "Random", "STCH", "UW")),
    *(f"{name} at the representation" for name in ("AlignedMTL", "ConFIG", "CR-MOGM", "FairGrad", "GradVac", "Krum")),
    *(f"{name} at the representation" for name in ("GradDrop of the larger part", "NashMTL", "PCGrad", "TrimmedMean")),
    *(f"{name} at the parameters" for name in ("ConFIG", "ExcessMTL", "GABA", "GradDrop", "Random", "UPGrad")),
    "IMTL",
    "DB-MTL",
)
FEW = ("FAMO of the losses", "UPGrad at the representation", "UPGrad at the parameters", "DB-MTL")
WAYS: list[tuple[str, int, tuple[str, ...]]] = [
    ("at the heads", 2, ()),
    ("at the heads", 4, ("gradient_as_bucket_view",)),
    ("from the losses", 1, ()),
    ("manual", 2, ()),
    ("MultiTaskModule", 2, ()),
    ("at the heads", 2, ("find_unused_parameters",)),
    ("from the losses", 1, ("static_graph",)),
    ("MultiTaskModule", 1, ("static_graph", "gradient_as_bucket_view")),
]
MORE_WAYS = [
    *((kind, accumulate, ()) for kind in KINDS for accumulate in (1, 2, 4)),
    *((kind, 2, ("find_unused_parameters",)) for kind in KINDS),
    *((kind, 2, ("gradient_as_bucket_view",)) for kind in KINDS),
    *((kind, 1, ("static_graph",)) for kind in KINDS),  # which DDP does not allow together with no_sync
]


def possible(cases: Iterable[Case]) -> tuple[Case, ...]:
    """FAMO is refused where the module itself makes its steps, since it asks for the losses of a batch once more."""
    return tuple(case for case in cases if not (case.name.startswith("FAMO") and case.kind == "manual"))


FAST = (
    *(f"{name} of the losses" for name in ("DWA", "Random", "UW")),
    *(f"{name} at the representation" for name in ("CR-MOGM", "GradDrop of the larger part", "Krum", "NashMTL")),
    *(f"{name} at the parameters" for name in ("ExcessMTL", "GradDrop")),
    "IMTL",
)
"""One of each kind: what has parameters, a memory, draws, an own number of tasks, a solver, or no weights."""
IN_TURN = [Case(name, *way) for i, way in enumerate(WAYS) for name in (FEW[i % 4], FEW[(i + 1 + i // 4) % 4])]
SHORT = possible([*(Case(name) for name in FAST), *IN_TURN])
LONGER = possible([*(Case(name) for name in SOME), *(Case(name, *way) for way in WAYS for name in FEW)])


@pytest.mark.xdist_group("strategies on two ranks")  # all in one pair of processes
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_two_ranks_match_one_process(case: Case) -> None:
    assert_as_alone(case, outcomes(SHORT)[str(case)])


@pytest.mark.slow
def test_two_ranks_match_one_process_with_more_strategies() -> None:
    found = outcomes(LONGER)
    for case in LONGER:
        print("APART", case, assert_as_alone(case, found[str(case)]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_match_one_process_with_every_strategy(kind: str) -> None:
    cases = possible(Case(name, kind, 1 if kind == "at the heads" else 2) for name in STRATEGIES)
    found = outcomes(cases)
    for case in cases:
        print("APART", case, assert_as_alone(case, found[str(case)]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_match_one_process_in_every_mode(kind: str) -> None:
    cases = possible(Case(name, *way) for way in MORE_WAYS if way[0] == kind for name in FEW)
    found = outcomes(cases)
    for case in cases:
        print("APART", case, assert_as_alone(case, found[str(case)]))


@pytest.mark.slow
def test_four_ranks_match_one_process() -> None:
    cases = possible(Case(name, accumulate=2) for name in SOME)
    found = train_each({str(case): run(case, cut(case, ranks=4)) for case in cases})
    for case in cases:
        print("APART", case, assert_as_alone(case, found[str(case)]))


class SeesTheRows(MayLack):
    """Records each task's gradient at the representation, and the gradient that continues through the encoder."""

    def __init__(self, T: int, notes: list[Any]) -> None:
        super().__init__(T)
        self.notes = notes
        self.encoder.append(_Tap(notes))  # type: ignore[operator]

    def some_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.encoder(batch["x"])
        losses = {t: nn.functional.mse_loss(getattr(self, f"{t}_head")(z), batch[t]) for t in self.tasks}
        self.notes.append(torch.stack([torch.autograd.grad(one, z, retain_graph=True)[0] for one in losses.values()]))
        return torch.stack(list(losses.values())).sum(), losses


class _Tap(nn.Module):
    def __init__(self, notes: list[Any]) -> None:
        super().__init__()
        self.notes = notes

    def forward(self, z: Tensor) -> Tensor:
        z = z.view_as(z)
        z.register_hook(lambda gradient: self.notes.append(gradient.clone()))
        return z


def test_grad_drop_draws_for_each_rank_and_leaves_the_ranks_identical() -> None:
    notes = Notes()
    model = SeesTheRows(3, notes.notes)
    balancing = Aggregation(A.GradDrop(), tasks=list(model.tasks), heads=model.heads())
    steps = [[[batch], [batch]] for batch in vector_batches(3, STEPS, size=ROWS)]  # the same on both ranks
    told = train(model, balancing, steps, callbacks=[notes])
    assert_identical(told)
    kept = []
    for one in told:
        rows, gone_on = torch.stack(one.notes[::2]), torch.stack(one.notes[1::2])
        positive, negative = rows.clamp(min=0).sum(1), rows.clamp(max=0).sum(1)
        is_positive = (gone_on - positive).abs() <= 1e-15
        assert bool((is_positive | ((gone_on - negative).abs() <= 1e-15)).all())
        kept.append(is_positive[(positive > 0) & (negative < 0)])
    assert 0.3 < kept[0].double().mean() < 0.7
    assert 0.3 < (kept[0] != kept[1]).double().mean() < 0.7, "both ranks have drawn the same"


class StopsOnRank1(MayLack):
    """One rank fails in a step, or does not come back from it before `until` is there."""

    until: Path | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        if self.trainer.global_rank == 1 and batch_idx == 3:
            while self.until is not None and not self.until.exists():
                time.sleep(0.1)
            raise ValueError("an error of the user's")
        return super().training_step(batch, batch_idx)


@pytest.mark.each_value_once
@pytest.mark.xdist_group("processes that wait")
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("at", ["representation", "parameters"])
def test_a_rank_that_fails_or_is_stuck_ends_the_other_within_the_timeout_of_ddp(
    at: Any, fails: bool, tmp_path: Path
) -> None:
    """In either case rank 1's process stays, and prints nothing more."""
    steps = cut(Case("UPGrad"))

    def work(rank: int) -> None:
        model = StopsOnRank1(3)
        model.until = None if fails else tmp_path / "0.txt"
        balancing = Aggregation(A.UPGrad(), tasks=list(model.tasks), heads=model.heads(), at=at)
        try:
            Run(model, balancing, steps).fit(tmp_path, DDPStrategy(timeout=timedelta(seconds=3)))
        except Exception as error:
            (tmp_path / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        while rank == 1 and not (tmp_path / "0.txt").exists():
            time.sleep(0.1)

    in_processes(work, timeout=60)
    assert "an error of the user's" in (tmp_path / "1.txt").read_text()
    assert "gloo" in (tmp_path / "0.txt").read_text()


@pytest.mark.parametrize(
    ("name", "before", "within", "after"),
    [
        ("UW of the losses", 1, 0, 0),
        ("FAMO of the losses", 1, 0, 1),
        ("UPGrad at the representation", 0, 2, 0),
        ("IMTL", 1, 2, 0),
        ("TrimmedMean at the representation", 0, 0, 0),
        ("UPGrad at the parameters", 1, 0, 3),  # which parameters are shared; J, weights, what comes out
        ("DB-MTL", 2, 0, 2),
    ],
)
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_nothing_of_ours_is_sent_in_the_group_of_ddp_within_backward(
    name: str, before: int, within: int, after: int, accumulate: int
) -> None:
    """How many collectives there are for each batch before backward and within it, and for each step after it."""
    case = Case(name, accumulate=accumulate)
    model, balancing = build(*case[:3])
    for one in train(model, balancing, cut(case), callbacks=[Sent(accumulate)]):
        for step in range(1, STEPS):  # what FAMO sends when a batch is over is noted with the next
            sent = [(in_backward, of_ddp) for at, _, in_backward, _, of_ddp in one.notes if at == step]
            assert (True, True) not in sent
            assert sum(in_backward for in_backward, _ in sent) == within * accumulate
            assert len(sent) == (before + within) * accumulate + after
