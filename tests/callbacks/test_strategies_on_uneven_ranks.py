"""Ranks with different tasks, or with additional losses, agree with a calculation by hand for every strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from harness import state_by_part
from minima import mgda
from models import TASKS, Batch, network_sgd, vector_batches
from ranks import (
    NO_TASK,
    PRESENCE,
    MayLack,
    Presence,
    Run,
    Step,
    Told,
    assert_identical,
    distance,
    in_form_of,
    lacking,
    train,
    train_each,
    when,
)
from strategies import AGGREGATORS
from strategies_on_ranks import KINDS, TOLERANCE, Case, build, cut
from torch import Tensor, nn
from torchjd import aggregation as A
from torchjd import scalarization as S


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
    if isinstance(aggregator, A.MGDA):  # TorchJD's iterations come near the minimum only
        weighting = lambda gramian: torch.from_numpy(mgda(gramian.numpy()))  # noqa: E731
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
def test_uneven_presence_agrees_with_by_hand(case: tuple[str, str, str]) -> None:
    name, _, missing = case
    assert_as_by_hand(name, missing, lacking_outcomes(tuple(LACKING_SHORT))[", ".join(case)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "passing by"])
def test_any_presence_agrees_with_by_hand(kind: str) -> None:
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
    """Like `RegularizedOnRank1`, on the heads' input: the other hook sees it before the callback's."""

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
