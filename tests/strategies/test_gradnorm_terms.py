"""The terms of one update by hand, in plain floats: the meaning of priorities, and the tasks that count in a mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_gradnorm.strategies import GradNormRule

ALPHA = 1.5
TASKS = ["a", "b", "c"]
PRIORITIES = {"a": 6.0, "b": 3.0, "c": 0.75}
NORMS, LOSSES = [1.0, 3.0, 2.0], [0.5, 0.25, 0.75]


def targets_by_hand(weights: list[float], here: list[int]) -> list[float]:
    """``Ḡ · p_i · r_i^alpha`` of the tasks that are here; their ``p_i`` have mean 1."""
    n = len(here)
    G = sum(weights[i] * NORMS[i] for i in here) / n
    ratio = sum(LOSSES[i] for i in here) / n
    priority = sum(PRIORITIES[TASKS[i]] for i in here) / n
    return [G * PRIORITIES[TASKS[i]] / priority * (LOSSES[i] / ratio) ** ALPHA for i in here]


def float64(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("here", [[0, 1, 2], [0, 1], [1, 2]])
def test_targets_are_in_the_ratio_of_the_priorities_of_the_tasks_that_are_present(here: list[int]) -> None:
    given = [0.5, 1.0, 1.5]
    rule = GradNormRule(
        TASKS,
        alpha=ALPHA,
        priorities=PRIORITIES,
        initial_losses=dict.fromkeys(TASKS, 1.0),
        initial_weights=dict(zip(TASKS, given, strict=True)),
        dtype=torch.float64,
    )
    present = None if len(here) == 3 else torch.tensor([i in here for i in range(3)])
    update = rule.step(float64(NORMS), float64(LOSSES), present)
    assert update.taken
    expected = targets_by_hand(given, here)
    assert update.terms.targets[here].tolist() == pytest.approx(expected, rel=1e-12)
    assert update.terms.grad_norms[here].tolist() == pytest.approx([given[i] * NORMS[i] for i in here], rel=1e-12)
    distance = sum(abs(given[i] * NORMS[i] - t) for i, t in zip(here, expected, strict=True))
    assert float(update.terms.loss) == pytest.approx(distance, rel=1e-12)


@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0])
def test_only_the_ratio_of_priorities_counts(factor: float) -> None:
    priorities = {task: factor * priority for task, priority in PRIORITIES.items()}
    rule = GradNormRule(TASKS, alpha=ALPHA, priorities=priorities, dtype=torch.float64)
    update = rule.step(float64(NORMS), float64(LOSSES))
    # L_i(0) are the losses themselves, so that all rates are 1; the priorities' mean is 3.25.
    assert update.terms.targets.tolist() == pytest.approx([2 * p / 3.25 for p in PRIORITIES.values()], rel=1e-12)


def test_mean_weights_are_the_mean_of_the_weights_after_each_step() -> None:
    rule, seen = GradNormRule(TASKS, dtype=torch.float64), []
    for _ in range(5):
        rule.step(float64(NORMS), float64(LOSSES))
        seen.append(rule.weights.tolist())
        rule.count_step()
    expected = [sum(of_task) / len(seen) for of_task in zip(*seen, strict=True)]
    assert rule.mean_weights.tolist() == pytest.approx(expected, rel=1e-12)
