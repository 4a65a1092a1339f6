"""The first step looks at the graph of all tasks together: its work grows with their number, not with its square."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import lightning_gradnorm
from lightning_gradnorm import Balancer
from lightning_gradnorm.strategies import GradNormRule

_PACKAGE = lightning_gradnorm.__path__[0]


class Lines:
    """Counts the lines of the package that are executed. Each node of a graph that a loop visits takes at least one."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.count += event == "line"
        return self._line


class Network(nn.Module):
    """A trunk of so many layers, and linear heads."""

    def __init__(self, tasks: list[str], depth: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())))
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in tasks})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.trunk(x)
        return {task: head(z).square().mean() for task, head in self.heads.items()}


def lines_of_steps(T: int, where: str, depth: int = 5) -> list[int]:
    """Return the lines executed in each of the first four steps."""
    tasks = [f"task_{i}" for i in range(T)]
    model, layer = Network(tasks, depth), f"trunk.{2 * depth - 2}"
    options: dict[str, dict[str, Any]] = {
        "found": {},
        "named": {"shared_layer": layer, "heads": {task: f"heads.{task}" for task in tasks}},
        "at the losses": {"shared_layer": layer, "heads": None},
    }
    counts = []
    with Balancer(model, GradNormRule(tasks), **options[where]) as balancer:
        for _ in range(4):
            with Lines() as lines:
                balancer.backward(model(torch.randn(3, 4)))
                balancer.step()
            counts.append(lines.count)
    return counts


@pytest.mark.parametrize("where", ["found", "named", "at the losses"])
def test_the_work_of_each_step_is_linear_in_the_number_of_tasks(where: str) -> None:
    few, some, many = (lines_of_steps(T, where) for T in (16, 64, 256))
    for step, (of_few, of_some, of_many) in enumerate(zip(few, some, many, strict=True)):
        assert (of_many - of_some) / 192 <= 1.01 * (of_some - of_few) / 48, f"in step {step}"


@pytest.mark.parametrize("where", ["found", "named", "at the losses"])
def test_one_more_task_does_not_walk_through_the_trunk_once_more(where: str) -> None:
    per_task = []
    for depth in (5, 25):
        few, some = (lines_of_steps(T, where, depth) for T in (16, 64))
        per_task.append([(of_some - of_few) / 48 for of_few, of_some in zip(few, some, strict=True)])
    for step, (shallow, deep) in enumerate(zip(*per_task, strict=True)):
        # The search compares the depths of the layers that each task shares, at a few lines for each. A walk takes hundreds.
        assert deep - shallow <= (20 * 8 if where == "found" and step == 0 else 1), f"in step {step}"
