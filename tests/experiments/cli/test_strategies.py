"""Every strategy has a yaml and a row in docs/strategies.md, and the row is correct."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchjd.aggregation
import torchjd.scalarization
from configurations import compose_alone, compose_run, options
from strategies_page import LEFT_OUT, ROWS, TEXT, in_python, table
from torch import Tensor, nn

from lightning_gradnorm import (
    FixedWeights,
    GradNorm,
    InverseNorm,
    LRAnnealing,
    NormWeighting,
    NTKWeights,
    RandomWeights,
    Scalarization,
)
from lightning_gradnorm.experiments.cli.build import build
from lightning_gradnorm.experiments.cli.config import conf_dir
from lightning_gradnorm.experiments.registry import Strategy
from lightning_gradnorm.strategies import snapshot
from lightning_gradnorm.strategies.aggregation import AggregationRule
from lightning_gradnorm.strategies.factory import instantiate
from lightning_gradnorm.strategies.scalarization import ScalarizationRule

TASKS = ["a", "b", "c", "d"]
T = len(TASKS)
OF_TORCHJD = [name for name, row in ROWS.items() if re.match("Scalarization|Aggregation", str(row.callback))]
SELDOM_DRAWS = {"relobralo": {"rho": 0.5}}  # with the options of the yaml once in a thousand steps

quiet = pytest.mark.filterwarnings(
    "ignore:You are solving a parameterized problem that is not DPP"
)  # cvxpy, of NashMTL


def from_yaml(name: str, *overrides: str) -> Any:
    if overrides:
        return build(compose_run(Path("unused"), f"balancing={name}", *overrides), "balancing")
    config = compose_run(Path("unused"))  # the rest is the same for all
    config.balancing = compose_alone("balancing", name)
    return build(config, "balancing")


def parts(callback: Scalarization) -> Iterator[nn.Module]:
    """The aggregator and the scalarizer, made for four tasks."""
    for given in (getattr(callback, "_aggregator", None), callback._scalarizer):
        if given is not None:
            yield instantiate(TASKS, given, caller="test")


def rule_of(name: str, seed: int = 0, tasks: Sequence[str] = TASKS) -> ScalarizationRule:
    rule = ROWS[name].rule(tasks, seed=seed, dtype=torch.float64)
    assert rule is not None
    return rule


def driven(rule: ScalarizationRule, steps: int) -> list[Tensor]:
    """Drive the rule through that many steps, one per epoch; return its weights, or its gradient without weights."""
    draw = torch.Generator().manual_seed(1)
    seen = []
    for step in range(steps):
        losses = 10 ** (3 * torch.rand(T, generator=draw, dtype=torch.float64) - 2)  # 0.01 to 10
        J = torch.randn(T, 6, generator=draw, dtype=torch.float64) * losses[:, None]
        rule.begin_epoch(step)
        rule.weigh(losses)
        if isinstance(rule, AggregationRule) and not rule.has_weights:
            seen.append(rule.aggregate(rule.loss_weights[:, None] * J, torch.ones(T, dtype=torch.bool)))
        elif isinstance(rule, AggregationRule):
            J = rule.loss_weights[:, None] * J
            rule.weigh_gradients(J @ J.T, matrix=J)
        rule.step()
        if rule.has_weights:
            seen.append(rule.weights.clone())
        if rule.needs_losses_after_step:
            rule.update_after_step(losses * 0.9, torch.ones(T, dtype=torch.bool))
    return seen


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(*pair) for pair in zip(first, second, strict=True))
    return bool(first == second)


def states(rule: ScalarizationRule) -> list[Any]:
    """The state of the strategy's parts."""
    return [snapshot(part) for part in (getattr(rule, "aggregator", None), rule.scalarizer) if part is not None]


# ---- the table is complete -------------------------------------------------------------------------------------------


def test_every_yaml_has_one_row_and_every_row_a_yaml() -> None:
    assert sorted(cells[0].split("`")[1] for cells in table("# Strategies")) == options("balancing")


def test_every_strategy_of_torchjd_has_a_row_or_a_reason_to_have_none() -> None:
    written = " ".join(str(row.callback) for row in ROWS.values())
    bases = {"Aggregator", "Scalarizer", "Weighting", "WeightedAggregator", "GramianWeightedAggregator"}
    aggregators = set(torchjd.aggregation.__all__)
    twins = {
        name for name in aggregators if name.endswith("Weighting") and name.removesuffix("Weighting") in aggregators
    }
    of_gramian = {name for name in aggregators if f"{name}Weighting" in aggregators and name in bases}
    for kind, names in (("scalarization", set(torchjd.scalarization.__all__)), ("aggregation", aggregators - twins)):
        for name in names - bases - of_gramian:
            is_in_table = re.search(rf"(?<![\w.]){name}\b|{kind}\.{name}\b", written) is not None
            assert is_in_table != (f"{kind}.{name}" in LEFT_OUT), f"{kind}.{name}"


def test_the_rows_of_omitted_strategies_name_classes_of_torchjd() -> None:
    for name in LEFT_OUT:
        kind, one = name.split(".")
        assert hasattr(getattr(torchjd, kind), one), name


@pytest.mark.parametrize("name", options("balancing"))
def test_every_yaml_begins_with_a_summary(name: str) -> None:
    first, *_ = (conf_dir() / "balancing" / f"{name}.yaml").read_text().splitlines()
    assert re.match(r"# [A-Z]", first)


# ---- the two ways to write it ----------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("name", OF_TORCHJD)
def test_the_yaml_and_the_line_of_python_make_the_same(name: str) -> None:
    callback, expected = from_yaml(name), in_python(name)
    assert type(callback) is type(expected)
    optimizer, expected_optimizer = (one.optimizer([torch.ones(1, requires_grad=True)]) for one in (callback, expected))
    assert type(optimizer) is type(expected_optimizer)
    assert optimizer.defaults == expected_optimizer.defaults
    for option in ("tasks", "heads", "representation", "at"):
        assert getattr(callback, option, None) == getattr(expected, option, None)
    found, wanted = list(parts(callback)), list(parts(expected))
    assert [type(part) for part in found] == [type(part) for part in wanted]
    for part, other in zip(found, wanted, strict=True):
        assert same(snapshot(part), snapshot(other))  # with all options


def test_the_other_yamls_create_what_their_rows_state() -> None:
    assert from_yaml("equal") is None
    assert type(from_yaml("gradnorm")) is type(in_python("gradnorm")) is GradNorm
    fixed = from_yaml("fixed", "balancing.weights={seg: 1.0, depth: 0.2}")
    assert type(fixed) is FixedWeights
    assert fixed.weights == {"seg": 1.0, "depth": 0.2}
    random = from_yaml("random_static")
    assert type(random) is RandomWeights
    assert random.seed == in_python("random_static").seed == 0
    assert from_yaml("random_static", "seed=3").seed == 3
    for name, formula in (("inverse_norm", InverseNorm), ("ntk", NTKWeights)):
        made, expected = from_yaml(name), in_python(name)
        assert type(made) is type(expected) is NormWeighting
        assert type(made._formula) is type(expected._formula) is formula
        assert vars(made._formula) == vars(expected._formula)
    annealing = from_yaml("lr_annealing", "balancing.rule.residual=seg", "balancing.rule.norm=l2")
    assert vars(annealing._formula) == vars(LRAnnealing("seg", norm="l2"))
    assert [str(ROWS[name].callback) for name in ("gradnorm_static", "fixed")] == [
        "GradNormStatic(from_run=…)",
        "FixedWeights(…)",
    ]


# ---- what the columns say --------------------------------------------------------------------------------------------


def needed(row: Strategy) -> str:
    rule = rule_of(row.name) if row.name in OF_TORCHJD else None
    if not isinstance(rule, AggregationRule):
        of_gradients = {
            "gradnorm": "gradients of the last shared layer",
            "inverse_norm": "gradients of the last shared layer",
            "lr_annealing": "gradients of the whole network",
            "ntk": "gradients of the whole network",
        }
        return of_gradients.get(row.name, "losses" if rule else "nothing")
    of = "gradients of the parameters" if rule.of_parameters else "gradients at the representation"
    return of if rule.scalarizer is None else f"losses and {of}"


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_requirements_and_costs_follow_from_the_kind(row: Strategy) -> None:
    assert row.needs == needed(row)
    costs = {
        "gradients of the last shared layer": "T gradients of one layer",
        "gradients of the whole network": "T backward passes, in steps with an update",
        "gradients at the representation": "T × z in memory",
        "gradients of the parameters": "T passes through the trunk",
    }
    again = row.name in OF_TORCHJD and rule_of(row.name).needs_losses_after_step
    of_losses = "one more forward pass" if again else "nothing"
    assert row.costs == next((cost for need, cost in costs.items() if need in row.needs), of_losses)
    assert again == (row.name == "famo")


@quiet
@pytest.mark.parametrize("name", OF_TORCHJD)
def test_the_stated_state_is_what_changes(name: str) -> None:
    row, rule, fresh = ROWS[name], rule_of(name), rule_of(name)
    before = states(rule)
    assert same(before, states(fresh))
    driven(rule, 4)
    assert rule.fallbacks == 0
    remembers = {one.strip() for one in row.remembers.split(",")}
    assert same(states(rule), before) == (remembers <= {"nothing", "random draws"}), row.remembers
    rules = [rule_of(name, seed=seed) for seed in (0, 5)]
    for option, value in SELDOM_DRAWS.get(name, {}).items():
        for one in rules:
            setattr(one.scalarizer, option, value)
    first, otherwise = (torch.stack(driven(one, 12)) for one in rules)
    assert torch.allclose(first, otherwise, rtol=1e-9) == ("random draws" not in remembers)
    assert (rule._optimizer is not None) <= ("optimizer" in remembers)


@quiet
@pytest.mark.parametrize("name", OF_TORCHJD)
def test_the_sum_of_the_weights_is_measured(name: str) -> None:
    rule = rule_of(name)
    if not rule.has_weights:
        assert ROWS[name].weights_sum_to == "none"
        return
    sums = torch.stack([weights.sum() for weights in driven(rule, 8)])
    constants = {"1": 1.0, "T": float(T), "1/T": 1 / T}
    found = [text for text, value in constants.items() if torch.allclose(sums, sums.new_tensor(value), atol=1e-9)]
    assert (found or ["free"]) == [ROWS[name].weights_sum_to], sums


def test_static_weights_have_the_sum_in_their_rows() -> None:
    assert {ROWS[name].weights_sum_to for name in ("random_static", "gradnorm", "gradnorm_static")} == {"T"}
    assert [ROWS[name].weights_sum_to for name in ("inverse_norm", "lr_annealing", "ntk")] == ["T", "free", "free"]
    assert sum(RandomWeights(4, tasks=TASKS).weights.values()) == pytest.approx(T, abs=1e-12)


@quiet
def test_the_strategies_whose_weights_may_be_negative_are_named() -> None:
    found = {
        name
        for name in OF_TORCHJD
        for rule in [rule_of(name)]
        if rule.has_weights and any(bool((w < 0).any()) for w in driven(rule, 30))
    }
    (sentence,) = re.findall(r"Weights may be\s+negative\s+\(([^)]*)\)", TEXT)
    assert found == set(re.findall(r"`(\w+)`", sentence))


@quiet
@pytest.mark.parametrize("name", OF_TORCHJD)
def test_on_several_ranks_it_is_exact_unless_it_goes_number_by_number(name: str) -> None:
    rule = rule_of(name)
    goes_by_number = isinstance(rule, AggregationRule) and rule.input == "matrix" and not rule.of_parameters
    assert ROWS[name].on_ranks == ("number by number" if goes_by_number else "exact")


@pytest.mark.parametrize("name", OF_TORCHJD)
def test_it_requires_no_package_besides_ours(name: str) -> None:
    for part in parts(in_python(name)):
        for module in part.modules():
            for one in (module, *vars(module).values()):
                assert not getattr(one, "_REQUIRED_DEPS", ())


@quiet
@pytest.mark.parametrize("name", OF_TORCHJD)
def test_the_fewest_tasks_are_enough_and_one_fewer_is_not(name: str) -> None:
    fewest = ROWS[name].fewest_tasks
    for number in range(2, 6):
        tasks = [f"t{i}" for i in range(number)]
        if number >= fewest:
            rule_of(name, tasks=tasks)
        else:
            with pytest.raises(ValueError, match=f"of {number} tasks, failed"):
                rule_of(name, tasks=tasks)


# ---- options -----------------------------------------------------------------------------------------------------------


def test_an_option_reaches_the_object() -> None:
    assert from_yaml("cagrad", "balancing.aggregator.c=0.3")._aggregator.gramian_weighting.c == 0.3
    made = instantiate(TASKS, from_yaml("pbi", "balancing.scalarizer.scalarizer.theta=2")._scalarizer, caller="test")
    assert made.theta == 2.0
    vector = "balancing.aggregator.pref_vector={_target_: torch.tensor, data: [2.0, 1.0]}"
    assert from_yaml("upgrad", vector)._aggregator.pref_vector.tolist() == [2.0, 1.0]
    assert from_yaml("mgda", "balancing.at=parameters").at == "parameters"
