"""Several processes give, with every strategy, the weights and the network of one process on the concatenated batch.

Where the ranks have the same tasks, they are held against one process of the Trainer. Where they have not, against a
calculation by hand. To start processes takes longer than to train a few steps: the strategies are trained one after the other
in the same two processes, once, and each test looks at what became of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from harness import state_by_part
from lightning.pytorch.strategies import DDPStrategy
from models import TASKS, Batch, multi_task_module, network_sgd, vector_batches
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
    in_processes,
    lacking,
    shares,
    train,
    train_each,
    when,
)
from strategies import AGGREGATORS, STRATEGIES, tasks_for
from torch import Tensor, nn
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm import Aggregation

# cvxpy's, of NashMTL
pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
STEPS = 6
ROWS = 16  # of the whole batch of one optimizer step
KINDS = ["at the heads", "from the losses", "manual", "MultiTaskModule"]
TOLERANCE = 1e-8
OF_A_SOLVER = {"NashMTL": 1e-6}
"""ECOS stops when it is this close."""


class Case(NamedTuple):
    """One training: of which strategy, in which way."""

    name: str
    kind: str = "at the heads"
    accumulate: int = 1
    ddp: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join([self.name, self.kind, f"x {self.accumulate}", *self.ddp])


def build(name: str, kind: str, accumulate: int = 1, model_of: type[MayLack] = MayLack) -> tuple[Any, Any]:
    """The same network trained in one of four ways, and the strategy's callback for it."""
    T = tasks_for(name)
    if kind == "MultiTaskModule":
        return multi_task_module(T, accumulate_grad_batches=accumulate), STRATEGIES[name]()
    model = MayLackManual(T, accumulate=accumulate) if kind == "manual" else model_of(T)
    balancing = STRATEGIES[name](tasks=list(TASKS[:T]), heads=model.heads() if kind == "at the heads" else None)
    if isinstance(model, MayLackManual):
        model.gradnorm = [balancing]
    return model, balancing


def run(case: Case, steps: list[Step]) -> Run:
    model, balancing = build(case.name, case.kind, case.accumulate)
    options = {"max_epochs": 4} if "DWA" in case.name else {}  # its weights begin to differ in the third
    ddp = dict.fromkeys(case.ddp, True)
    return Run(model, balancing, in_form_of(case.kind, steps), ddp=ddp, options=options)


def cut(case: Case, ranks: int = 2) -> list[Step]:
    batches = vector_batches(tasks_for(case.name), STEPS, size=ROWS)
    return [shares(batch, ranks, case.accumulate) for batch in batches]


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
    allowed = next((of for name, of in OF_A_SOLVER.items() if name in case.name), TOLERANCE)
    assert max(apart) <= allowed, f"{case}: weights and network differ by {apart}"
    return apart


# ---- the same tasks everywhere -----------------------------------------------------------------------------------------

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
def test_two_ranks_give_what_one_process_gives(case: Case) -> None:
    assert_as_alone(case, outcomes(SHORT)[str(case)])


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives_with_more_strategies() -> None:
    found = outcomes(LONGER)
    for case in LONGER:
        print("APART", case, assert_as_alone(case, found[str(case)]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_what_one_process_gives_with_every_strategy(kind: str) -> None:
    cases = possible(Case(name, kind, 1 if kind == "at the heads" else 2) for name in STRATEGIES)
    found = outcomes(cases)
    for case in cases:
        print("APART", case, assert_as_alone(case, found[str(case)]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_what_one_process_gives_in_every_way(kind: str) -> None:
    cases = possible(Case(name, *way) for way in MORE_WAYS if way[0] == kind for name in FEW)
    found = outcomes(cases)
    for case in cases:
        print("APART", case, assert_as_alone(case, found[str(case)]))


@pytest.mark.slow
def test_four_ranks_give_what_one_process_gives() -> None:
    cases = possible(Case(name, accumulate=2) for name in SOME)
    found = train_each({str(case): run(case, cut(case, ranks=4)) for case in cases})
    for case in cases:
        print("APART", case, assert_as_alone(case, found[str(case)]))


# ---- tasks that are here and not there ---------------------------------------------------------------------------------


class PassesBy(MayLack):
    """Where no task is there, it does not call its encoder."""

    def some_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if any(task in batch for task in self.tasks):
            return super().some_losses(batch)
        return 0 * self.seg_head.bias.sum(), {}  # type: ignore[union-attr,operator]


def by_hand(
    steps: Sequence[Step],
    *,
    scalarizer: nn.Module | None = None,
    make_aggregator: Any = None,
    at: str = "representation",
    goes_by_place: bool = False,
    rest: Callable[[int, Tensor], Tensor] | None = None,
) -> Told:
    """All ranks in one process: plain torch and torchjd, without a Trainer.

    Each batch of each rank gets a forward pass. A task's gradient is the mean over the ranks, at the representation the
    concatenation of what each rank has. `rest` is what a rank's loss has of its representation besides the tasks.
    """
    model, aggregator = MayLack(3), None if make_aggregator is None else make_aggregator(3)
    trunk, tasks = list(model.encoder.parameters()), model.tasks
    optimizer, R, M = network_sgd(model.parameters()), len(steps[0]), len(steps[0][0])
    known, weights, told = torch.full((3,), torch.nan, dtype=torch.float64), torch.ones(3, dtype=torch.float64), []
    lambdas = torch.ones(3, dtype=torch.float64)
    weighting = aggregator if goes_by_place else getattr(aggregator, "gramian_weighting", None)
    for step in steps:
        optimizer.zero_grad()
        whole = torch.zeros(3, sum(p.numel() for p in trunk), dtype=torch.float64)
        ever = torch.zeros(3, dtype=torch.bool)
        for m in range(len(step[0])):
            zs = [model.encoder(step[r][m]["x"]) for r in range(R)]
            leaves = [z.detach().requires_grad_() for z in zs]
            losses: list[list[Tensor | None]] = [
                [
                    nn.functional.mse_loss(getattr(model, f"{task}_head")(z), step[r][m][task])
                    if task in step[r][m]
                    else None
                    for r, z in enumerate(leaves)
                ]
                for task in tasks
            ]
            here = torch.tensor([any(loss is not None for loss in of_task) for of_task in losses])
            ever |= here
            if scalarizer is not None and here.any():
                for i, of_task in enumerate(losses):
                    if here[i]:
                        known[i] = torch.stack([loss.detach() for loss in of_task if loss is not None]).mean()
                if known.isfinite().all():
                    leaf = known.clone().requires_grad_()
                    (weights,) = torch.autograd.grad(scalarizer(leaf), leaf)
            J = torch.zeros(3, R, *zs[0].shape, dtype=torch.float64)
            for i, of_task in enumerate(losses):
                for r, loss in enumerate(of_task):
                    if loss is not None:
                        (weights[i] * loss / (R * M)).backward()
                        J[i, r] = leaves[r].grad
                        leaves[r].grad = None
            J = J.flatten(1)
            if at == "parameters":
                for i in range(3):
                    found = torch.autograd.grad(zs, trunk, list(J[i].view(R, *zs[0].shape)), retain_graph=True)
                    whole[i] += torch.cat([g.flatten() for g in found])
                continue
            if aggregator is None:
                combined = J.sum(0)
            elif not here.any():
                combined = torch.zeros_like(J[0])
            elif weighting is None:
                combined = aggregator(J[here])
            elif goes_by_place and not here.all():
                combined = (lambdas * here) @ J
            else:
                some = weighting(M**2 * J[here] @ J[here].T)
                lambdas = torch.zeros(3, dtype=torch.float64).index_copy(0, here.nonzero().squeeze(1), some)
                combined = lambdas @ J
            extra = sum(rest(r, z) / (R * M) for r, z in enumerate(zs)) if rest is not None else 0 * zs[0].sum()
            torch.autograd.backward([*zs, extra], [*combined.view(R, *zs[0].shape), torch.ones_like(extra)])
        if at == "parameters":
            combined, start = aggregator(whole[ever]) if ever.any() else torch.zeros_like(whole[0]), 0
            for p in trunk:
                p.grad = combined[start : start + p.numel()].view_as(p)
                start += p.numel()
        optimizer.step()
        told.append(dict(zip(tasks, (weights * lambdas).tolist(), strict=True)))
    return Told(told, state_by_part(model), {}, [])


UNEVEN: dict[str, dict[str, Any]] = {
    "GeometricMean of the losses": {"scalarizer": S.GeometricMean()},
    "STCH of the losses": {"scalarizer": S.STCH(0.5)},
    "UPGrad at the representation": {"make_aggregator": lambda T: A.UPGrad()},
    "MGDA at the representation": {"make_aggregator": lambda T: A.MGDA()},
    "CR-MOGM at the representation": {"make_aggregator": AGGREGATORS["CR-MOGM"], "goes_by_place": True},
    "GradDrop of the larger part at the representation": {
        "make_aggregator": AGGREGATORS["GradDrop of the larger part"]
    },
    "UPGrad at the parameters": {"make_aggregator": lambda T: A.UPGrad(), "at": "parameters"},
    "ConFIG at the parameters": {"make_aggregator": lambda T: A.ConFIG(), "at": "parameters"},
}
MISSING = {
    **{name: presence for name, presence in {**PRESENCE, **NO_TASK}.items() if presence.ranks == 2},
    "no task anywhere": Presence(lambda s, r, m: when(s % 3 == 1, *TASKS[:3])),
    "no task anywhere in a micro-batch": Presence(
        lambda s, r, m: when(s % 3 == 1 and m == 0, *TASKS[:3]), accumulate=2
    ),
    "no task anywhere in the first batch": Presence(lambda s, r, m: when(s == 0, *TASKS[:3])),
}


def lacking_run(name: str, kind: str, missing: str, **options: Any) -> Run:
    steps = lacking(vector_batches(3, 12, size=24), MISSING[missing])
    model_of = PassesBy if kind == "passing by" else MayLack
    model, balancing = build(name, "at the heads" if model_of is PassesBy else kind, len(steps[0][0]), model_of)
    return Run(model, balancing, in_form_of(kind, steps), ddp={"find_unused_parameters": True}, **options)


LACKING_SHORT = [
    ("STCH of the losses", "at the heads", "a task absent on one rank"),
    ("STCH of the losses", "MultiTaskModule", "no task on one rank in the first micro-batch"),
    ("UPGrad at the representation", "at the heads", "absent on one rank in one micro-batch"),
    ("UPGrad at the representation", "passing by", "no task on one rank"),
    ("UPGrad at the representation", "manual", "a task absent on all ranks"),
    ("UPGrad at the representation", "from the losses", "absent tasks wander over the ranks"),
    ("UPGrad at the representation", "MultiTaskModule", "no task on one rank in the last micro-batch"),
    ("UPGrad at the representation", "MultiTaskModule", "no task anywhere in the first batch"),
    ("CR-MOGM at the representation", "at the heads", "a task absent on all ranks"),
    ("UPGrad at the parameters", "at the heads", "absent on one rank in one micro-batch"),
    ("UPGrad at the parameters", "MultiTaskModule", "no task on one rank in the first batch"),
    ("UPGrad at the parameters", "passing by", "no task on one rank in the first batch"),
    ("UPGrad at the parameters", "MultiTaskModule", "no task anywhere in the first batch"),
]


@cache
def lacking_outcomes(cases: tuple[tuple[str, str, str], ...]) -> dict[str, list[Told] | str]:
    return train_each({", ".join(case): lacking_run(*case) for case in cases})


def assert_as_by_hand(name: str, missing: str, told: list[Told] | str) -> None:
    assert not isinstance(told, str), f"{name}, {missing}: {told}"
    assert_identical(told)
    steps = lacking(vector_batches(3, 12, size=24), MISSING[missing])
    options = UNEVEN[name]
    weights, network = distance(told[0], by_hand(steps, **options))
    assert network <= TOLERANCE, f"{name}, {missing}: the network differs by {network}"
    if options.get("at") != "parameters" and "GradDrop" not in name and "anywhere in the first" not in missing:
        assert weights <= TOLERANCE, f"{name}, {missing}: the weights differ by {weights}"


@pytest.mark.xdist_group("tasks absent on two ranks")  # all in one pair of processes
@pytest.mark.parametrize("case", LACKING_SHORT, ids=", ".join)
def test_uneven_presence_gives_what_it_gives_by_hand(case: tuple[str, str, str]) -> None:
    name, _, missing = case
    assert_as_by_hand(name, missing, lacking_outcomes(tuple(LACKING_SHORT))[", ".join(case)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "passing by"])
def test_any_presence_gives_what_it_gives_by_hand(kind: str) -> None:
    missing = NO_TASK if kind == "passing by" else MISSING
    cases = tuple((name, kind, which) for name in UNEVEN for which in missing)
    found = lacking_outcomes(cases)
    for case in cases:
        assert_as_by_hand(case[0], case[2], found[", ".join(case)])


# ---- what else there may be --------------------------------------------------------------------------------------------


class RegularizedOnRank1(MayLack):
    def some_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        penalty: list[Tensor] = []
        with self.encoder.register_forward_hook(lambda module, args, z: penalty.append(0.1 * z.square().mean())):
            loss, losses = super().some_losses(batch)
        return loss + (penalty[0] if self.trainer.global_rank == 1 else 0), losses


class RegularizesTheRepresentation(RegularizedOnRank1):
    """As `RegularizedOnRank1`, by what the heads read: the other's hook sees it before the callback's."""

    def some_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.encoder(batch["x"])
        losses = {t: nn.functional.mse_loss(getattr(self, f"{t}_head")(z), batch[t]) for t in self.tasks}
        penalty = 0.1 * z.square().mean() if self.trainer.global_rank == 1 else 0
        return torch.stack(list(losses.values())).sum() + penalty, losses


@pytest.mark.parametrize("model_of", [RegularizedOnRank1, RegularizesTheRepresentation])
def test_a_regularizer_on_one_rank_is_nobodys_gradient(model_of: type[MayLack]) -> None:
    case = Case("UPGrad at the representation")
    model, balancing = build(case.name, case.kind, 1, model_of)
    told = train(model, balancing, cut(case))
    assert_identical(told)
    expected = by_hand(
        cut(case),
        make_aggregator=lambda T: A.UPGrad(),
        rest=lambda rank, z: 0.1 * z.square().mean() if rank == 1 else 0 * z.sum(),
    )
    without = by_hand(cut(case), make_aggregator=lambda T: A.UPGrad())
    assert distance(expected, without)[1] > 1e-4, "the regularizer makes no difference"
    assert max(distance(told[0], expected)) <= TOLERANCE


class SeesTheRows(MayLack):
    """Notes each task's gradient at the representation, and what goes on through the encoder."""

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
    """In either case rank 1's process stays, and says nothing more."""
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
