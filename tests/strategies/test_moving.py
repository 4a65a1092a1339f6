"""A rule that is moved to another precision keeps everything it has learned, and continues with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from strategies import AGGREGATORS, ONLY_OF_PARAMETERS, SCALARIZERS, draws, has_memory, tasks_for
from torch import Tensor, nn

from lightning_gradnorm.strategies import Uncertainty
from lightning_gradnorm.strategies.aggregation import AggregationRule
from lightning_gradnorm.strategies.factory import instantiate, move_to
from lightning_gradnorm.strategies.scalarization import ScalarizationRule

OF_GRADIENTS = {**AGGREGATORS, **ONLY_OF_PARAMETERS}
NAMES = [
    *(f"{name} of the losses" for name in SCALARIZERS),
    *(f"{name} of the gradients" for name in OF_GRADIENTS),
    "IMTLG of IMTLL of the gradients",
]

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # cvxpy's, of NashMTL


def rule_of(name: str, dtype: torch.dtype = torch.float32) -> ScalarizationRule:
    name, _, kind = name.rpartition(" of the ")
    tasks = ["seg", "depth", "normal", "d", "e", "f"][: tasks_for(name)]

    def made(make: Callable[[int], nn.Module]) -> nn.Module:
        return instantiate(tasks, make, caller="test")

    if kind == "losses":
        return ScalarizationRule(tasks, made(SCALARIZERS[name]), dtype=dtype)
    if name == "IMTLG of IMTLL":
        return AggregationRule(tasks, made(OF_GRADIENTS["IMTLG"]), made(SCALARIZERS["IMTLL"]), dtype=dtype)
    return AggregationRule(tasks, made(OF_GRADIENTS[name]), of_parameters=True, dtype=dtype)


def step(rule: ScalarizationRule, t: int) -> Tensor:
    """One training step in its own epoch; return the strategy's result."""
    draw, dtype, T = torch.Generator().manual_seed(t), rule.loss_weights.dtype, len(rule.tasks)
    losses = torch.rand(T, generator=draw, dtype=torch.float64).to(dtype) + 0.1
    J = torch.randn(T, 6, generator=draw, dtype=torch.float64).to(dtype)
    rule.begin_epoch(t)
    found = rule.weigh(losses)
    if isinstance(rule, AggregationRule):
        everyone = torch.ones(T, dtype=torch.bool)
        if rule.has_weights:
            rule.weigh_gradients(J @ J.T, matrix=J)
        found = rule.weights if rule.has_weights else rule.aggregate(J, everyone)
    rule.step()
    if rule.needs_losses_after_step:
        rule.update_after_step(losses * 0.9, torch.ones(T, dtype=torch.bool))
    return found.double()


def leaves(state: Any) -> Iterator[Any]:
    """All tensors and numbers of a state, in order."""
    if isinstance(state, Mapping):
        for value in state.values():
            yield from leaves(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from leaves(value)
    elif not isinstance(state, torch.dtype):
        yield state


def modules_of(rule: ScalarizationRule) -> list[nn.Module]:
    return [one for one in (rule.scalarizer, getattr(rule, "aggregator", None)) if one is not None]


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_the_state_is_the_same_in_double_precision(name: str) -> None:
    rule = rule_of(name)
    for t in range(4):
        step(rule, t)
    before = list(leaves(rule.state_dict()))
    rule.to(dtype=torch.float64)
    after = list(leaves(rule.state_dict()))
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        # A loss that was never given is NaN.
        assert torch.allclose(old.to(new.dtype), new, 0.0, 0.0, True) if isinstance(old, Tensor) else old == new
    assert rule.weights.dtype == torch.float64
    assert all(p.dtype == torch.float64 for module in modules_of(rule) for p in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_moved_rule_continues_where_it_was(name: str) -> None:
    stays, moved, fresh = rule_of(name), rule_of(name), rule_of(name, torch.float64)
    if any(draws(one) and not has_memory(one) for one in modules_of(stays)):
        pytest.skip("other numbers are drawn in another precision")
    for t in range(4):
        step(stays, t)
        step(moved, t)
    moved.to(dtype=torch.float64)
    expected, found, forgetful = (torch.stack([step(one, t) for t in range(4, 8)]) for one in (stays, moved, fresh))
    assert moved.fallbacks == 0
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    if any(has_memory(one) for one in modules_of(stays)):
        assert not torch.allclose(forgetful, expected, rtol=1e-3, atol=1e-4)


def test_the_optimizer_keeps_its_parameters_and_its_state_is_in_their_precision() -> None:
    rule = rule_of("Uncertainty of the losses")
    assert isinstance(rule.scalarizer, Uncertainty)
    assert rule._optimizer is not None
    step(rule, 0)
    parameter = rule.scalarizer.log_variance
    rule.to(dtype=torch.float64)
    assert rule.scalarizer.log_variance is parameter
    assert rule._optimizer.param_groups[0]["params"][0] is parameter
    assert rule._optimizer.state[parameter]["exp_avg"].dtype == torch.float64  # type: ignore[index]


class Keeps(nn.Module):
    """A user's strategy with tensors in all kinds of places."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(2))
        self.alias = [self.w, self.seen]
        self.history = {"first": (torch.ones(1), [torch.ones(1)])}
        self.count = torch.tensor(3)
        self.key = (2, torch.float32, torch.device("cpu"))
        self.optimizer = torch.optim.Adam([self.w])


def test_tensors_in_lists_and_dicts_move_and_one_that_is_named_twice_stays_one() -> None:
    module = Keeps()
    module.w.grad = torch.ones(2)
    module.optimizer.step()
    move_to(module, dtype=torch.float64, only=torch.float32)
    assert module.alias[0] is module.w
    assert module.alias[1] is module.seen
    assert module.seen.dtype == module.history["first"][1][0].dtype == torch.float64
    assert module.count.dtype == torch.int64
    assert module.key == (2, torch.float64, torch.device("cpu"))
    assert module.optimizer.state[module.w]["exp_avg"].dtype == torch.float64
    assert move_to(Keeps(), device="meta").key[2] == torch.device("meta")


@pytest.mark.parametrize("tasks", [[], ["seg"], ["seg", "seg"]])
def test_fewer_than_two_different_tasks_are_refused(tasks: list[str]) -> None:
    with pytest.raises(ValueError, match=r"Scalarization: tasks should (name at least two|all be different).*; got \["):
        ScalarizationRule(tasks, SCALARIZERS["Mean"](2))
