"""The rule under a hundred thousand random steps, good and bad, with checks after each of them.

Each run draws its own rule and its own mixture of ordinary and wild numbers from a seed, which is the test's parameter.
"""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gradnorm.strategies import GradNormRule, GradNormTerms

F64 = torch.float64
STEPS = 100
OPTIMIZERS: list[Any] = [
    torch.optim.Adam,
    torch.optim.SGD,
    partial(torch.optim.SGD, momentum=0.9),
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
]
SPECIAL = [0.0, 0.0, 0.0, math.nan, math.inf, -math.inf, -1.0, 1e-30, 1e30]


# ---- what is drawn ---------------------------------------------------------------------------------------------------


class Draw:
    """One run's random choices."""

    def __init__(self, seed: int, T: int | None = None, dtype: torch.dtype | None = None) -> None:
        self.random = random.Random(seed)
        draw = self.random
        self.T = T or draw.choice([2, 3, 4, 5, 10, 40])
        self.tasks = [f"task{i}" for i in range(self.T)]
        self.dtype = dtype or draw.choice([torch.float32, F64])
        self.alpha = draw.choice([0.0, 0.12, 1.5, 12.0, draw.uniform(0, 12)])
        self.wildness = draw.choice([0.0, 0.02, 0.3])  # how many of the numbers are not ordinary
        self.absence = draw.choice([0.0, 0.1, 0.6])
        self.initial_losses: Any = draw.choice([1, 1, 3, 20, self.by_task(-3, 3)])
        self.options: dict[str, Any] = {
            "alpha": self.alpha,
            "optimizer": partial(draw.choice(OPTIMIZERS), lr=self.log_uniform(-4, 1)),
            "initial_losses": self.initial_losses,
            "initial_weights": draw.choice([None, self.by_task(-2, 2)]),
            "priorities": draw.choice([None, self.by_task(-2, 2)]),
            "min_weight": draw.choice([1e-4, 1e-4, self.log_uniform(-9, -0.05)]),
            "dtype": self.dtype,
        }

    def log_uniform(self, low: float, high: float) -> float:
        return 10.0 ** self.random.uniform(low, high)

    def by_task(self, low: float, high: float) -> dict[str, float]:
        return {task: self.log_uniform(low, high) for task in self.tasks}

    def rule(self, order: list[int] | None = None) -> GradNormRule:
        return GradNormRule([self.tasks[i] for i in order or range(self.T)], **self.options)

    def vector(self) -> Tensor:
        def number() -> float:
            if self.random.random() >= self.wildness:
                return self.log_uniform(-3, 3)
            return self.random.choice([self.log_uniform(-30, 30), self.random.choice(SPECIAL)])

        return torch.tensor([number() for _ in range(self.T)], dtype=self.dtype)

    def present(self) -> Tensor:
        return torch.tensor([self.random.random() >= self.absence for _ in range(self.T)])

    def steps(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield norms, losses, present."""
        for _ in range(STEPS):
            yield self.vector(), self.vector(), self.present()


def is_ordinary(values: Tensor) -> bool:
    return bool(((values >= 1e-3) & (values <= 1e3)).all())


# ---- what is asked ---------------------------------------------------------------------------------------------------


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Everything in nested dicts and lists, copied, by its path."""
    if isinstance(node, dict):
        return {name: leaf for key, value in node.items() for name, leaf in flat(value, f"{path}.{key}").items()}
    if isinstance(node, list | tuple):
        return {name: leaf for i, value in enumerate(node) for name, leaf in flat(value, f"{path}.{i}").items()}
    return {path: copy.deepcopy(node)}


def differing(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return {
        k for k in first.keys() | second.keys() if k not in first or k not in second or not same(first[k], second[k])
    }


def assert_weights_are_right(rule: GradNormRule, dtype: torch.dtype) -> None:
    T, weights = len(rule.tasks), rule.weights.detach()
    assert weights.dtype == dtype
    assert bool(weights.isfinite().all())
    assert bool((weights > 0).all()), weights
    assert abs(math.fsum(weights.tolist()) - T) <= T * (1e-5 if dtype == torch.float32 else 1e-12)


class FirstLosses:
    """``L_i(0)``, kept by the test: the mean of the losses of a task's first steps, from the first positive one on."""

    def __init__(self, draw: Draw) -> None:
        self.given = draw.initial_losses
        self.seen: dict[str, list[float]] = {task: [] for task in draw.tasks}
        self.tasks, self.alpha = draw.tasks, draw.alpha

    def note(self, losses: Tensor, present: Tensor) -> None:
        if isinstance(self.given, int):
            for task, loss, here in zip(self.tasks, losses.tolist(), present.tolist(), strict=True):
                counts = loss > 0 or self.seen[task] or self.alpha == 0
                if here and counts and len(self.seen[task]) < self.given:
                    self.seen[task].append(loss)

    def values(self) -> Tensor:
        if isinstance(self.given, int):
            return torch.tensor([math.fsum(s) / len(s) if s else math.nan for s in self.seen.values()], dtype=F64)
        return torch.tensor(list(self.given.values()), dtype=F64)

    def are_ordinary(self, present: Tensor) -> bool:
        return is_ordinary(self.values()[present])


def textbook_step(
    draw: Draw, before: dict[str, Any], first_losses: Tensor, norms: Tensor, losses: Tensor, present: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """One step by double backward from the state ``before``: G, r, L_grad, new weights; None where a sign is chance.

    The task losses are linear in a shared layer of six numbers, with gradients of the wanted norms.
    """
    W = torch.ones(6, dtype=F64, requires_grad=True)
    generator = torch.Generator().manual_seed(len(norms))
    slopes = torch.randn(draw.T, 6, generator=generator, dtype=F64)
    slopes = slopes / slopes.norm(dim=1, keepdim=True) * norms[:, None]
    w = before["weights"].clone().requires_grad_()
    optimizer = draw.options["optimizer"]([w])
    optimizer.load_state_dict(copy.deepcopy(before["optimizer"]))

    here = present.nonzero().flatten().tolist()
    G = torch.stack([torch.autograd.grad(w[i] * (slopes[i] @ W), W, create_graph=True)[0].norm() for i in here])
    ratio = losses[here] / first_losses[here]
    r = ratio / ratio.mean()
    p = torch.tensor([(draw.options["priorities"] or {}).get(draw.tasks[i], 1.0) for i in here], dtype=F64)
    target = (G.mean() * (p / p.mean()) * r**draw.alpha).detach()
    if bool(((G - target).abs() <= 1e-10 * torch.maximum(G, target)).any()):
        return None
    objective = (G - target).abs().sum()
    (w.grad,) = torch.autograd.grad(objective, w)
    optimizer.step()
    with torch.no_grad():
        new = w.detach().clamp(min=draw.options["min_weight"])
        new = torch.where(present, new * (before["weights"][present].sum() / new[present].sum()), before["weights"])
    return G.detach(), r, objective.detach(), new


# ---- the tests -------------------------------------------------------------------------------------------------------

FEW = 10


def few_runs_and(many: int) -> Any:
    """Some seeds by default, and that many more in a slow sibling."""
    few, more = range(FEW), range(FEW, FEW + many)
    by_default, slow = (f"{len(seeds) * STEPS} steps" for seeds in (few, more))
    return pytest.mark.parametrize(
        "seeds", [pytest.param(few, id=by_default), pytest.param(more, id=slow, marks=pytest.mark.slow)]
    )


@few_runs_and(500)
def test_the_weights_are_right_for_any_input_and_ordinary_steps_agree_with_the_textbook(seeds: range) -> None:
    happened = {"taken": 0, "skipped": 0, "waiting": 0, "compared": 0}
    for seed in seeds:
        draw = Draw(seed)
        rule, first = draw.rule(), FirstLosses(draw)
        for norms, losses, present in draw.steps():
            before, nested = flat(rule.state_dict()), copy.deepcopy(rule.state_dict())
            seen = rule.step(norms, losses, present)
            after = flat(rule.state_dict())
            assert_weights_are_right(rule, draw.dtype)
            assert torch.equal(rule.weights.detach()[~present], nested["weights"][~present])
            for name, value in after.items():
                if name.startswith(".optimizer") and isinstance(value, Tensor) and value.shape == present.shape:
                    was = before.get(name, torch.zeros_like(value))
                    assert torch.equal(value[~present], was[~present]), "an absent task keeps its moments"
            assert all(bool(v.isfinite().all()) for k, v in after.items() if isinstance(v, Tensor)), f"seed {seed}"
            if not seen.taken:
                changed = differing(before, after) - {".skipped"}
                happened["waiting" if changed else "skipped"] += 1
                assert after[".skipped"] == before[".skipped"] + 1
                if changed:  # a task that has only shown zeros: there is no rate, but the others have begun
                    assert draw.alpha > 0
                    assert bool((losses[present] <= 0).any())
                    assert changed == {".updates_seen", ".initial_losses"}
                    first.note(losses, present & (norms != 0))
            else:
                happened["taken"] += 1
                first.note(losses, present & (norms != 0))  # without a gradient it counts as absent
                ordinary = is_ordinary(norms[present]) and is_ordinary(losses[present]) and first.are_ordinary(present)
                if (
                    ordinary
                    and draw.dtype == F64
                    and agrees(draw, nested, first, rule, seen.terms, (norms, losses, present))
                ):
                    happened["compared"] += 1
            rule.count_step()
            if draw.random.random() < 0.05:
                rule = reloaded(draw, rule)
    total = len(seeds) * STEPS
    assert happened["taken"] + happened["skipped"] + happened["waiting"] == total
    # Each branch was well visited: the invariants were not kept by doing nothing.
    assert happened["taken"] > 0.5 * total, happened
    assert happened["skipped"] > 0.05 * total, happened
    assert happened["compared"] > 0.1 * total, happened
    assert happened["waiting"] > 0, happened


def agrees(draw: Draw, before: Any, first: FirstLosses, rule: GradNormRule, seen: GradNormTerms, step: Any) -> bool:
    """Compare with the textbook, where it can be: no sign by chance, no weight so small that it was lifted twice."""
    present = step[2]
    expected = textbook_step(draw, before, first.values(), *step)
    if expected is None:
        return False
    G, r, objective, weights = expected
    torch.testing.assert_close(seen.grad_norms[present], G, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(seen.rates[present], r, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(seen.loss, objective, rtol=1e-9, atol=0.0)
    if bool((weights < 1.01 * draw.options["min_weight"] / draw.T).any()):
        return False
    torch.testing.assert_close(rule.weights.detach(), weights, rtol=1e-9, atol=1e-9)
    return True


def reloaded(draw: Draw, rule: GradNormRule) -> GradNormRule:
    """Return another rule with the same state, which went through a file."""
    buffer = io.BytesIO()
    torch.save(rule.state_dict(), buffer)
    buffer.seek(0)
    other = draw.rule()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert differing(flat(rule.state_dict()), flat(other.state_dict())) == set()
    return other


@few_runs_and(150)
def test_two_tasks_exchanged_are_the_same_two_tasks_bit_for_bit(seeds: range) -> None:
    """A sum of two does not depend on their order, so nothing may differ, not even after wild numbers."""
    taken = 0
    for seed in seeds:
        draw = Draw(seed, T=2)
        rule, exchanged = draw.rule(), draw.rule(order=[1, 0])
        for norms, losses, present in draw.steps():
            for one, order in ((rule, [0, 1]), (exchanged, [1, 0])):
                taken += bool(one.step(norms[order], losses[order], present[order]).taken)
            assert torch.equal(exchanged.weights.detach(), rule.weights.detach()[[1, 0]])
            twin = draw.rule()
            twin.load_state_dict(exchanged.state_dict())  # puts all of it in order, by name
            assert differing(flat(twin.state_dict()), flat(rule.state_dict())) == set()
    assert taken > len(seeds) * STEPS  # of two rules


@few_runs_and(150)
def test_many_tasks_in_another_order_are_the_same_but_for_the_rounding_of_sums(seeds: range) -> None:
    """Each step starts from the same state, so no rounding is carried over; steps where it decides a sign are left out."""
    compared = chance = 0
    for seed in seeds:
        draw = Draw(seed, dtype=F64)
        order = draw.random.sample(range(draw.T), draw.T)
        rule, other = draw.rule(), draw.rule(order)
        for norms, losses, present in draw.steps():
            other.load_state_dict(rule.state_dict())
            try:
                seen = rule.step(norms, losses, present)
            except ValueError:
                with pytest.raises(ValueError, match="initial loss"):
                    other.step(norms[order], losses[order], present[order])
                continue
            again = other.step(norms[order], losses[order], present[order])
            assert bool(again.taken) == bool(seen.taken)
            assert other.tasks_at_fault.keys() == rule.tasks_at_fault.keys()
            if seen.taken:
                G, target = seen.terms.grad_norms[present], seen.terms.targets[present]
                if bool(((G - target).abs() <= 1e-12 * torch.maximum(G, target)).any()):
                    chance += 1
                    continue
                compared += 1
                for found, expected in zip(again.terms, seen.terms, strict=True):
                    aligned = expected if expected.ndim == 0 else expected[order]
                    torch.testing.assert_close(found, aligned, rtol=1e-10, atol=0.0, equal_nan=True)
            # A weight is a difference, and what is lost in it is relative to the largest number in sight.
            torch.testing.assert_close(other.weights.detach(), rule.weights.detach()[order], rtol=1e-12, atol=1e-11)
    assert compared > 0.5 * len(seeds) * STEPS
    assert chance < 0.2 * compared, (chance, compared)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("T", [2, 12])
def test_after_wild_steps_the_weights_settle_where_all_gradients_are_equal(T: int, dtype: torch.dtype) -> None:
    """With plain SGD, which has no memory. What Adam has seen of a gradient of 1e30 it forgets in 1 / (1 − β₂) steps."""
    draw = Draw(T, T=T, dtype=dtype)
    draw.wildness = 0.5
    sgd = partial(torch.optim.SGD, lr=5e-3)
    rule = GradNormRule(draw.tasks, alpha=0.0, optimizer=sgd, dtype=dtype)
    for norms, losses, present in draw.steps():
        rule.step(norms, losses, present)
    norms = torch.linspace(0.5, 2.0, T, dtype=dtype)
    for _ in range(300 * T):
        rule.step(norms, torch.ones(T, dtype=dtype))
    torch.testing.assert_close(rule.weights.detach(), T * (1 / norms) / (1 / norms).sum(), rtol=0.0, atol=0.05)


def test_a_task_alone_with_next_to_nothing_keeps_that() -> None:
    """2 − 1.9999999 is nothing in float32: subtraction cannot give the present task's rest."""
    weights = {"large": 1.0, "small": 1e-9}
    rule = GradNormRule(["large", "small"], initial_weights=weights, min_weight=1e-10)
    for _ in range(20):
        before = rule.weights.detach().clone()
        rule.step(torch.ones(2), torch.ones(2), torch.tensor([False, True]))
        torch.testing.assert_close(rule.weights.detach(), before, rtol=1e-6, atol=0.0)


def test_a_state_is_of_the_moment_when_it_was_asked_for() -> None:
    rule, other = GradNormRule(["a", "b"]), GradNormRule(["a", "b"])
    rule.step(torch.tensor([1.0, 3.0]), torch.ones(2))
    state = rule.state_dict()
    before = flat(state)
    other.load_state_dict(state)
    other.step(torch.tensor([1.0, 3.0]), torch.ones(2))
    rule.step(torch.tensor([1.0, 3.0]), torch.ones(2))
    assert differing(flat(state), before) == set()
    assert differing(flat(rule.state_dict()), flat(other.state_dict())) == set(), "they do not share what they count"
