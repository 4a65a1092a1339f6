"""With nothing named, the tasks seen so far are balanced; a task that appears later may change the shared layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradnorm import Balancer
from lightning_gradnorm.strategies import GradNormRule

NAMES = ["a", "b", "late"]
STEPS = 6


class Network(nn.Module):
    """`a` and `b` share a layer that `late` does not reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.of_two = nn.Linear(3, 5), nn.Linear(5, 5)
        self.heads = nn.ModuleDict({name: nn.Linear(5, 1) for name in NAMES})
        self.double()

    def forward(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor | None]:
        z = self.trunk(x).tanh()
        y = self.of_two(z).tanh()
        scales = {"a": 1.0, "b": 3.0, "late": 0.5}
        given = {name: self.heads[name](z if name == "late" else y) for name in tasks}
        return {name: (scales[name] * out - 1).square().mean() for name, out in given.items()} | dict.fromkeys(
            set(NAMES) - set(tasks)
        )


def trained(
    steps: Sequence[Sequence[Sequence[str]]], **options: Any
) -> tuple[Network, Balancer, list[dict[str, float]]]:
    """Train on the given tasks, step by step and micro-batch by micro-batch."""
    model = Network()
    balancer = Balancer(model, GradNormRule(NAMES), **options)
    return model, balancer, train(model, balancer, steps, torch.Generator().manual_seed(1))


def train(
    model: Network, balancer: Balancer, steps: Sequence[Sequence[Sequence[str]]], generator: torch.Generator
) -> list[dict[str, float]]:
    optimizer, weights = torch.optim.SGD(model.parameters(), lr=0.05), []
    for step in steps:
        optimizer.zero_grad()
        for tasks in step:
            balancer.backward(model(torch.randn(4, 3, dtype=torch.float64, generator=generator), tasks))
        optimizer.step()
        balancer.step()
        weights.append(balancer.weights)
    return weights


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=0, abs=1e-12)
    assert max(abs(weight - 1) for weight in expected[-1].values()) > 0.05


@pytest.mark.parametrize("heads", ["auto", None])
def test_a_task_that_never_appears_does_not_stop_the_others(heads: Any) -> None:
    steps = STEPS * [[["a", "b"]]]
    _, balancer, found = trained(steps, heads=heads)
    assert_same(found, trained(steps, heads=heads, shared_layer="of_two")[2])
    assert found[-1]["late"] == 1.0
    assert balancer._engine.inspection.plan.shared_layer.keys() == {"of_two.weight"}


@pytest.mark.parametrize("heads", ["auto", None])
def test_a_task_that_appears_later_moves_the_shared_layer_to_where_it_is_shared(heads: Any) -> None:
    before, after = 3 * [[["a", "b"]]], 3 * [[NAMES]]
    model, _, found = trained([*before, *after], heads=heads)
    twin, generator = Network(), torch.Generator().manual_seed(1)
    with Balancer(twin, GradNormRule(NAMES), heads=heads, shared_layer="of_two") as first:
        expected = train(twin, first, before, generator)
        state = first.state_dict()
    second = Balancer(twin, GradNormRule(NAMES), heads=heads, shared_layer="trunk")
    second.load_state_dict(state)
    expected += train(twin, second, after, generator)
    assert_same(found, expected)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_step_in_which_the_layer_changes_between_two_passes_is_not_measured() -> None:
    late = [[["a", "b"], NAMES], [NAMES, NAMES]]
    _, balancer, found = trained(late)
    assert found[0] == {"a": 1.0, "b": 1.0, "late": 1.0}
    assert found[1] != found[0]
    assert balancer._engine.inspection.plan.shared_layer.keys() == {"trunk.weight"}


def test_one_task_alone_is_not_enough_to_find_a_layer() -> None:
    _, balancer, found = trained([[["a"]], [["a"]], [["b"]], [["late"]], [NAMES]])
    assert found[1] == dict.fromkeys(NAMES, 1.0)
    assert balancer._engine.inspection.plan.shared_layer.keys() == {"trunk.weight"}


def test_each_new_layer_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning_gradnorm"):
        trained([*(2 * [[["a", "b"]]]), *(2 * [[NAMES]])], heads=None)
    lines = [line for line in caplog.text.splitlines() if "W = " in line]
    assert len(lines) == 2
    assert "W = of_two.weight" in lines[0]
    assert "W = trunk.weight" in lines[1]
