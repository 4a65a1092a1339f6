"""InverseNorm, LRAnnealing and NTKWeights alone: equations over 200 steps, states, wild numbers, and errors."""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_says, case
from norm_rules import RULES
from torch import Tensor

from lightning_gradnorm import InverseNorm, LRAnnealing, NormWeighting, NTKWeights
from lightning_gradnorm.gradients.readers import RowReader, WeightGradients
from lightning_gradnorm.strategies import GradNormRule, NormFormula, NormWeightingRule
from lightning_gradnorm.strategies.norm_weighting import Memory

F64 = torch.float64
TASKS = ["pde", "boundary", "initial"]
STEPS = 200


def gradients_of(step: int) -> Tensor:
    """Of seven entries; their sizes differ by three orders of magnitude and fall at different rates."""
    draw = torch.Generator().manual_seed(step)
    fall = torch.tensor([1.0, 0.99, 0.995], dtype=F64) ** step
    return (torch.tensor([0.1, 1.0, 100.0], dtype=F64) * fall)[:, None] * torch.randn(3, 7, generator=draw, dtype=F64)


def losses_of(step: int) -> Tensor:
    return gradients_of(step).abs().sum(dim=1) + 0.01


def read(gradients: Tensor, rule: NormWeightingRule) -> Tensor:
    """The norms as the engine takes them."""
    reader = WeightGradients([])
    reader.kinds = rule.norms
    return reader.norms_of(gradients)


@pytest.mark.parametrize("absence", [0.0, 0.3], ids=["all present", "some absent"])
@pytest.mark.parametrize("name", RULES)
def test_200_updates_follow_the_published_equations(name: str, absence: float) -> None:
    rule, weigh = NormWeightingRule(TASKS, RULES[name].make(), dtype=F64), RULES[name].equations()
    expected, draw = dict.fromkeys(TASKS, 1.0), random.Random(2)
    for step in range(STEPS):
        present = torch.tensor([draw.random() >= absence for _ in TASKS])
        gradients, losses = gradients_of(step), losses_of(step)
        assert rule.should_measure == (step % RULES[name].update_every == 0)
        if rule.should_measure and bool(present.any()):
            here = list(itertools.compress(range(3), present.tolist()))
            found = weigh({TASKS[i]: gradients[i].tolist() for i in here}, {TASKS[i]: float(losses[i]) for i in here})
            if RULES[name].normalize:
                scale = math.fsum(expected[task] for task in found) / math.fsum(found.values())
                found = {task: scale * w for task, w in found.items()}
            expected |= found
            rule.step(read(gradients, rule), torch.where(present, losses, math.nan), present)
        rule.count_step()
        assert rule.weights.tolist() == pytest.approx([expected[task] for task in TASKS], rel=1e-9)
        if RULES[name].normalize:
            assert float(rule.weights.sum()) == pytest.approx(3.0, rel=1e-12)
    assert max(expected.values()) / min(expected.values()) > 2


@pytest.mark.parametrize("name", RULES)
def test_a_state_that_went_through_a_file_continues_bit_for_bit_in_any_order_of_the_tasks(name: str) -> None:
    rule = NormWeightingRule(TASKS, RULES[name].make(), dtype=F64)
    for step in range(31):
        rule.step(read(gradients_of(step), rule), losses_of(step))
        rule.count_step()
    buffer = io.BytesIO()
    torch.save(rule.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    same, other = (NormWeightingRule(tasks, RULES[name].make(), dtype=F64) for tasks in (TASKS, TASKS[::-1]))
    same.load_state_dict(state)
    other.load_state_dict(state)
    for step in range(31, 60):
        for one, back in ((rule, 1), (same, 1), (other, -1)):
            order = list(range(3))[::back]
            one.step(read(gradients_of(step)[order], one), losses_of(step)[order])
            one.count_step()
        assert torch.equal(rule.weights, same.weights)
        torch.testing.assert_close(other.weights.flip(0), rule.weights, rtol=1e-12, atol=0.0)
        assert torch.equal(rule.mean_weights, same.mean_weights)


@pytest.mark.parametrize("name", RULES)
def test_wild_numbers_leave_weights_that_are_positive_and_finite(name: str) -> None:
    draw = random.Random(7)
    rule = NormWeightingRule(TASKS, RULES[name].make())
    shape = (3, len(rule.norms)) if len(rule.norms) > 1 else (3,)
    numbers = [0.0, -0.0, 1e-45, 1e-30, 1.0, 1e30, 3e38, math.inf, math.nan, -1.0]
    skipped = 0
    for _ in range(500):
        norms = torch.tensor([draw.choice(numbers[:9]) for _ in range(math.prod(shape))]).reshape(shape)
        losses = torch.tensor([draw.choice(numbers) for _ in TASKS])
        present = torch.tensor([draw.random() < 0.8 for _ in TASKS])
        before = rule.weights.clone()
        update = rule.step(norms, losses, present)
        skipped += not bool(update.taken)
        assert bool((rule.weights > 0).all())
        assert bool(rule.weights.isfinite().all())
        unchanged = ~(update.present & update.taken)
        assert torch.equal(rule.weights[unchanged], before[unchanged])
    assert rule.skipped == skipped > 50
    rule.step(torch.ones(shape), torch.ones(3))
    assert rule.last is not None


def test_a_task_without_a_gradient_keeps_its_weight_and_is_named_if_that_lasts() -> None:
    rule = NormWeightingRule(["a", "b", "c"], InverseNorm(ema=0.0), dtype=F64)
    rule.step(torch.tensor([1.0, 2.0, 4.0]), torch.ones(3))
    a, b, c = rule.weights.tolist()
    for _ in range(50):
        rule.step(torch.tensor([1.0, 0.0, 1.0]), torch.ones(3))
    assert rule.weights.tolist() == pytest.approx([(a + c) / 2, b, (a + c) / 2], rel=1e-12)
    assert rule.tasks_without_gradient == ["b"]
    assert "'b'" in next(iter(rule.remarks.values()))


def test_a_loss_that_allows_no_update_is_named_with_the_reason() -> None:
    rule = NormWeightingRule(["pde", "boundary"], NTKWeights())
    rule.step(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -0.5]))
    assert rule.weights.tolist() == [1.0, 1.0]
    (message,) = rule.remarks.values()
    assert "task 'boundary' should be a mean of squares, above 0; it is -0.5" in message
    assert "balancing/skipped" in message


def test_annealing_waits_for_the_residual() -> None:
    rule = NormWeightingRule(["pde", "boundary"], LRAnnealing("pde", 1.0, "l2"), dtype=F64)
    rule.step(torch.tensor([6.0, 2.0]), torch.ones(2))
    rule.step(torch.tensor([0.0, 5.0]), torch.ones(2), torch.tensor([False, True]))
    assert rule.weights.tolist() == [1.0, 3.0]


def test_an_epoch_of_single_tasks_is_remarked() -> None:
    rule = NormWeightingRule(["a", "b"], InverseNorm())
    for step in range(4):
        rule.step(torch.ones(2), torch.ones(2), torch.tensor([step % 2 == 0, step % 2 == 1]))
    rule.end_epoch()
    (message,) = rule.remarks.values()
    assert "in none of the last 4 weight updates were two tasks present" in message
    assert "absent_tasks" not in message  # which it does not have


def test_priorities_keep_their_precision_in_float64() -> None:
    rule = NormWeightingRule(["a", "b"], InverseNorm(0.0, 1.0, normalize=False, priorities={"a": 0.1, "b": 0.7}))
    rule.to(dtype=F64)
    rule.step(torch.ones(2, dtype=F64), torch.ones(2, dtype=F64))
    assert rule.weights.tolist() == pytest.approx([0.25, 1.75], rel=1e-15)


def test_weights_of_a_run_without_normalization_are_scaled_when_it_resumes_with_it() -> None:
    free = NormWeightingRule(["a", "b"], InverseNorm(0.0, 1.0, normalize=False), dtype=F64)
    free.step(torch.tensor([0.1, 0.2]), torch.ones(2))
    scaled = NormWeightingRule(["a", "b"], InverseNorm(0.0), dtype=F64)
    scaled.load_state_dict(free.state_dict())
    assert scaled.weights.tolist() == pytest.approx([4 / 3, 2 / 3], rel=1e-12)


def test_the_largest_and_the_mean_entry_are_of_all_entries() -> None:
    reader = WeightGradients([])
    reader.kinds = ("max", "mean", "l2")
    found = reader.norms_of(torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, -2.0]]))
    assert found.tolist() == [[4.0, 1.75, 5.0], [2.0, 0.5, 2.0]]
    assert RowReader.kinds == ("l2",)


class Own(NormFormula):
    """A user's formula: the largest norm over each."""

    def __init__(self) -> None:
        super().__init__(update_every=1)

    def weigh(
        self, memory: Memory, norms: Tensor, losses: Tensor, present: Tensor, tasks: Any
    ) -> tuple[Tensor, Tensor]:
        return memory.values, norms.max() / norms


def test_a_formula_of_ones_own_is_another_strategy() -> None:
    rule = NormWeightingRule(["a", "b"], Own())
    rule.step(torch.tensor([2.0, 4.0]), torch.ones(2))
    assert rule.weights.tolist() == [2.0, 1.0]
    assert rule.kind == "Own"


WRONG = [
    case("ema of 1", "InverseNorm: ema should be a number from 0 to below 1; got 1.0", lambda: InverseNorm(1.0)),
    case("negative ema", "InverseNorm: ema should be", lambda: InverseNorm(-0.1)),
    case("ema that is a flag", "InverseNorm: ema should be", lambda: InverseNorm(True)),
    case(
        "unknown reference",
        "InverseNorm: reference should be 'mean', 'total' or a positive number; got 'median'",
        lambda: InverseNorm(reference="median"),  # type: ignore[arg-type]
    ),
    case("reference of 0", "InverseNorm: reference should be", lambda: InverseNorm(reference=0.0)),
    case("infinite reference", "InverseNorm: reference should be", lambda: InverseNorm(reference=math.inf)),
    case(
        "normalize that is a number",
        "InverseNorm: normalize should be True or False; got 1",
        lambda: InverseNorm(normalize=1),  # type: ignore[arg-type]
    ),
    case(
        "priorities in a list",
        "InverseNorm: priorities should be a mapping from task to number; got [1, 2]",
        lambda: InverseNorm(priorities=[1, 2]),  # type: ignore[arg-type]
    ),
    case(
        "update_every of 0",
        "InverseNorm: update_every should be an integer, at least 1; got 0",
        lambda: InverseNorm(update_every=0),
    ),
    case("update_every of a half", "NTKWeights: update_every should be", lambda: NTKWeights(update_every=0.5)),  # type: ignore[arg-type]
    case(
        "rate of 0", "LRAnnealing: rate should be a number above 0, at most 1; got 0.0", lambda: LRAnnealing("pde", 0.0)
    ),
    case("rate above 1", "LRAnnealing: rate should be", lambda: LRAnnealing("pde", 1.1)),
    case(
        "unknown norm",
        "LRAnnealing: norm should be 'max_mean' or 'l2'; got 'l1'",
        lambda: LRAnnealing("pde", norm="l1"),  # type: ignore[arg-type]
    ),
    case(
        "residual that is no name",
        "LRAnnealing: residual should be the name of a task; got 0",
        lambda: LRAnnealing(0),  # type: ignore[arg-type]
    ),
    case(
        "residual that is no task",
        "LRAnnealing: residual 'pd' is not among the tasks ['pde', 'boundary']; did you mean 'pde'?",
        lambda: NormWeighting(LRAnnealing("pd"), ["pde", "boundary"]),
    ),
    case(
        "residual that is no task of the rule",
        "LRAnnealing: residual 'x' is not among the tasks",
        lambda: NormWeightingRule(["pde", "b"], LRAnnealing("x")),
    ),
    case(
        "priority of no task",
        "InverseNorm: priorities names 'bound', which is not among the tasks ['pde', 'boundary']; did you mean 'boundary'?",
        lambda: NormWeighting(InverseNorm(priorities={"pde": 1, "bound": 2}), ["pde", "boundary"]),
    ),
    case(
        "priority that lacks a task",
        "InverseNorm: priorities should name every task; ['boundary'] are missing",
        lambda: NormWeighting(InverseNorm(priorities={"pde": 1}), ["pde", "boundary"]),
    ),
    case(
        "priority of 0",
        "InverseNorm: priorities['pde'] should be positive and finite; got 0",
        lambda: NormWeighting(InverseNorm(priorities={"pde": 0, "boundary": 1}), ["pde", "boundary"]),
    ),
    case(
        "a class in place of a formula",
        "NormWeighting: rule should be a formula such as InverseNorm(); got the class InverseNorm",
        lambda: NormWeighting(InverseNorm, ["a", "b"]),  # type: ignore[arg-type]
    ),
    case(
        "a rule in place of a formula",
        "NormWeighting: rule should be a formula such as InverseNorm(); got GradNormRule",
        lambda: NormWeighting(GradNormRule(["a", "b"]), ["a", "b"]),  # type: ignore[arg-type]
    ),
    case(
        "entries at the representation",
        "NormWeighting: norm_of='activation' supports only Euclidean norms",
        lambda: NormWeighting(LRAnnealing("a"), ["a", "b"], norm_of="activation"),
    ),
    case(
        "shared layers that are no names",
        "NormWeighting: shared_layer should be a dotted name such as 'encoder.4', a list of such names, 'all', or None",
        lambda: NormWeighting(InverseNorm(), ["a", "b"], shared_layer=[1]),  # type: ignore[list-item]
    ),
    case(
        "no shared layer in the list",
        "NormWeighting: shared_layer should be",
        lambda: NormWeighting(InverseNorm(), ["a", "b"], shared_layer=[]),
    ),
    case(
        "a single task",
        "NormWeighting: tasks should name at least two tasks",
        lambda: NormWeighting(InverseNorm(), ["a"]),
    ),
    case(
        "norm of something else",
        "NormWeighting: norm_of should be 'weight' or 'activation'; got 'output'",
        lambda: NormWeighting(InverseNorm(), ["a", "b"], norm_of="output"),  # type: ignore[arg-type]
    ),
]


@pytest.mark.parametrize(("message", "make"), WRONG)
def test_a_mistake_is_refused_by_name(message: str, make: Callable[[], object]) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert_says(error.value, message)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "InverseNorm: the state should be from InverseNorm; it is from fixed weights"),
        (
            NormWeightingRule(["a", "b"], NTKWeights()).state_dict(),
            "InverseNorm: the state should be from InverseNorm; it is from NTKWeights",
        ),
        (GradNormRule(["a", "b"]).state_dict(), "it is from GradNorm"),
        (
            NormWeightingRule(["a", "c"], InverseNorm()).state_dict(),
            "InverseNorm: the checkpoint has tasks ['a', 'c'], but this run has ['a', 'b']",
        ),
        (NormWeightingRule(["a", "b"], InverseNorm()).state_dict() | {"version": 9}, "should be of version 1; got 9"),
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(state: Any, message: str) -> None:
    rule = NormWeightingRule(["a", "b"], InverseNorm())
    rule.step(torch.tensor([1.0, 2.0]), torch.ones(2))
    before: Callable[[], list[float]] = rule.weights.tolist
    kept = before()
    with pytest.raises(ValueError, match=r"state|checkpoint") as error:
        rule.load_state_dict(state)
    assert_says(error.value, message)
    assert rule.weights.tolist() == kept
