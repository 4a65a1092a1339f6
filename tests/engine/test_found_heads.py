"""Heads found in models whose modules receive more than they use, or with a task that has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradnorm import Balancer
from lightning_gradnorm.engine import graph_checks
from lightning_gradnorm.strategies import GradNormRule


class Term(nn.Module):
    """Receives a dict of everything computed so far; its loss only depends on `x`."""

    def __init__(self, name: str, goal: float) -> None:
        super().__init__()
        self.name, self.goal = name, goal
        self.distance = nn.MSELoss()

    def forward(self, known: dict[str, Tensor]) -> dict[str, Tensor]:
        x = known["x"]
        return {self.name: self.distance(x, torch.full_like(x, self.goal))}


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 2)
        self.near, self.far = Term("near", 0.5), Term("far", 9.0)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        known = {"x": self.trunk(inputs)}
        near = self.near(known)
        return near | self.far(known | near)


def train(heads: Any) -> tuple[list[dict[str, float]], dict[str, str]]:
    torch.manual_seed(0)
    model, weights = Chain().double(), []
    with Balancer(model, GradNormRule(["near", "far"]), heads=heads) as balancer:
        for inputs in torch.randn(4, 5, 3, dtype=torch.float64):
            balancer.backward(model(inputs))
            balancer.step()
            weights.append(balancer.weights)
        return weights, dict(balancer._engine.inspection.plan.heads or {})


def test_a_module_that_receives_the_loss_of_another_task_is_not_a_head() -> None:
    weights, heads = train("auto")
    assert heads == {"near": "near", "far": "far.distance"}
    assert weights == train(None)[0]
    assert weights[-1]["near"] > 1.05


def test_the_graph_of_a_task_without_a_head_is_checked_in_its_first_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    searches: list[int] = []
    search = graph_checks.nodes_on_paths

    def counted(*args: Any, **kwargs: Any) -> Any:
        searches[-1] += 1
        return search(*args, **kwargs)

    monkeypatch.setattr(graph_checks, "nodes_on_paths", counted)
    model = nn.ModuleDict({"trunk": nn.Linear(3, 4), "decoder": nn.Linear(4, 3)})
    with Balancer(model, GradNormRule(["reconstruction", "size"])) as balancer:
        for inputs in torch.randn(4, 5, 3):
            searches.append(0)
            z = model["trunk"](inputs)
            losses = {"reconstruction": nn.functional.mse_loss(model["decoder"](z), inputs), "size": z.square().mean()}
            balancer.backward(losses)
            balancer.step()
        assert balancer._engine.inspection.plan.heads == {"reconstruction": "decoder"}
    assert searches[0] > 0
    assert searches[1:] == [0, 0, 0]
