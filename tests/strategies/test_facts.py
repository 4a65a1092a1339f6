"""A class's declarations decide how it is called; no code of the framework checks for a strategy by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd import aggregation as A
from torchjd import scalarization as S

import lightning_gradnorm
from lightning_gradnorm.experiments.registry import AGGREGATORS, SCALARIZERS
from lightning_gradnorm.strategies import DBMTL
from lightning_gradnorm.strategies.aggregation import AggregationRule
from lightning_gradnorm.strategies.facts import Facts, any_part, facts_of
from lightning_gradnorm.strategies.scalarization import ScalarizationRule

TASKS = ["seg", "depth"]
BOTH = torch.tensor([True, True])
PACKAGE = Path(lightning_gradnorm.__file__).parent
FRAMEWORK = ("strategies", "callbacks", "engine", "gradients", "monitor", "multitask", "experiments/cli")


class Counts(S.Scalarizer):
    """A user's own scalarizer that wants to be called for everything."""

    needs_losses_after_step = True
    steps_each_epoch = True

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.updates: list[list[float]] = []

    def forward(self, values: Tensor, /) -> Tensor:
        return values.sum()

    def step(self) -> None:
        self.steps += 1

    def update(self, values: Tensor) -> None:
        self.updates.append(values.tolist())


class Takes(A.Aggregator):
    """A user's own aggregator: the sum of the rows, and the shape of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, matrix: Tensor, /) -> Tensor:
        self.shapes.append(tuple(matrix.shape))
        return matrix.sum(dim=0)


class TakesRoot(Takes):
    input = "root"
    in_row_span = True


class Averages(Takes):
    averages_over_steps = True


def test_a_users_scalarizer_is_called_at_epochs_and_after_steps_if_its_class_requests_it() -> None:
    counts = Counts()
    rule = ScalarizationRule(TASKS, counts)
    for epoch in (0, 0, 1, 2):
        rule.begin_epoch(epoch)
        rule.weigh(torch.tensor([1.0, 2.0]))
    assert counts.steps == 2
    assert rule.needs_losses_after_step
    rule.update_after_step(torch.tensor([0.5, 9.0]), torch.tensor([True, False]))
    assert counts.updates == [[0.5, 2.0]]  # an absent task's is its last


def test_a_users_scalarizer_without_declarations_gets_no_extra_calls() -> None:
    rule = ScalarizationRule(TASKS, S.Sum())
    assert not rule.needs_losses_after_step
    assert facts_of(S.Sum()) == Facts(weights_sum_to="T")


def test_a_users_aggregator_gets_the_matrix_or_a_root_of_the_gramian_as_its_class_declares() -> None:
    J = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    matrix, root = Takes(), TakesRoot()
    of_matrix, of_root = AggregationRule(TASKS, matrix), AggregationRule(TASKS, root)
    assert (of_matrix.input, of_matrix.has_weights) == ("matrix", False)
    assert (of_root.input, of_root.has_weights) == ("root", True)
    assert of_matrix.aggregate(J, BOTH).tolist() == [3.0, 4.0, 0.0]
    assert torch.allclose(of_root.weigh_gradients(J @ J.T), torch.ones(2))
    assert (matrix.shapes[-1], root.shapes[-1]) == ((2, 3), (2, 2))


def test_averaging_gradients_at_the_representation_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Averages averages gradients over steps.*Use at='parameters'"):
        AggregationRule(TASKS, Averages())
    assert AggregationRule(TASKS, Averages(), of_parameters=True).of_parameters


def test_a_fact_may_depend_on_an_option_or_come_from_a_part_or_a_base_class() -> None:
    assert [facts_of(DBMTL(beta=beta)).averages_over_steps for beta in (0.9, 0.0)] == [True, False]
    assert any_part(A.CRMOGMWeighting(A.ExcessMTLWeighting()), "averages_over_steps")
    assert facts_of(type("Mine", (S.FAMO,), {})(2)).needs_losses_after_step
    assert facts_of(A.Krum(1)) == facts_of(A.KrumWeighting(1))


def names_asked_for(tree: ast.Module) -> Iterator[str]:
    """All names in the second argument of ``isinstance`` and ``issubclass``."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("isinstance", "issubclass"):
            for part in ast.walk(call.args[1]):
                if ast.unparse(part) != "ast.Constant":  # Python's syntax, not the strategy
                    yield getattr(part, "id", None) or getattr(part, "attr", "")


def test_no_code_of_the_framework_asks_for_a_strategy_by_name() -> None:
    strategies: set[Any] = {one.__name__ for one in (*SCALARIZERS, *AGGREGATORS)}
    files = [file for folder in FRAMEWORK for file in (PACKAGE / folder).rglob("*.py")]
    found = {(file.name, name) for file in files for name in names_asked_for(ast.parse(file.read_text("utf-8")))}
    assert {name for _, name in found} >= {"Tensor", "Weighting"}
    assert {(file, name) for file, name in found if name in strategies} == set()
