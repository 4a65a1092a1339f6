"""What a strategy remembers: through a file into a fresh object, which goes on bit by bit as if nothing had happened."""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from strategies import MODULES, has_memory
from torch import Tensor, nn
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm.strategies import Uncertainty, restore, state_of
from lightning_gradnorm.strategies.factory import instantiate, move_to
from lightning_gradnorm.strategies.facts import facts_of

T, n = 3, 5
NAMES = ["seg", "depth", "normal"]


def losses_at(t: int) -> Tensor:
    return torch.rand(T, generator=torch.Generator().manual_seed(t)) + 0.1


def matrix_at(t: int) -> Tensor:
    return torch.randn(T, n, generator=torch.Generator().manual_seed(t))


def call_scalarizer(scalarizer: Any, t: int) -> list[Tensor]:
    """One training step with an optimizer of its parameters, and what the class asks for besides."""
    torch.manual_seed(t)  # Random draws weights
    values = losses_at(t).requires_grad_()
    total = scalarizer(values)
    total.backward()
    with torch.no_grad():
        for parameter in scalarizer.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    if facts_of(scalarizer).needs_losses_after_step:
        scalarizer.update(values.detach() * (1 - 0.1 * losses_at(t + 100)))
    if facts_of(scalarizer).steps_each_epoch and t % 2:
        scalarizer.step()
    assert values.grad is not None
    return [total.detach().clone(), values.grad.clone()]


def call_aggregator(aggregator: Any, t: int) -> list[Tensor]:
    torch.manual_seed(t)  # GradVac draws an order
    return [aggregator(matrix_at(t)).clone()]


def call_weighting(weighting: Any, t: int) -> list[Tensor]:
    torch.manual_seed(t)
    return [weighting(matrix_at(t) @ matrix_at(t).T).clone()]


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    call: Callable[[Any, int], list[Tensor]]
    remembers: bool = True


def uncertainty() -> Uncertainty:
    made = Uncertainty(["b"])
    made.name_tasks(["a", "b", "c"])
    return made


class Anything(nn.Module):
    """A user's strategy with all kinds of memory."""

    def __init__(self, size: int = 2, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.w = nn.Parameter(torch.ones(size))
        self.alias = [self.w]
        self.optimizer = torch.optim.SGD([self.w], lr=0.1, momentum=momentum)
        self.scheduler_lr: torch.optim.Optimizer | None = None
        self.generator = torch.Generator().manual_seed(0)
        self.history: deque[Tensor] = deque(maxlen=2)
        self.seen: dict[Any, Any] = {("a", 1): [1.0, torch.zeros(2)], "best": None}
        self.names, self.of, self.kind = {"a", "b"}, torch.Size([2, 3]), torch.float16
        self.array, self.number = np.zeros((2, 2), dtype=np.float32), np.float64(0.1)
        self.counter = Counter()
        self.make = lambda value: value + 1

    def forward(self, values: Tensor) -> Tensor:
        if self.scheduler_lr is None:
            self.scheduler_lr = torch.optim.AdamW([self.w], lr=0.01, betas=(0.8, 0.9))
        for optimizer in (self.optimizer, self.scheduler_lr):
            self.w.grad = values.clone()
            optimizer.step()
        noise = torch.rand(2, generator=self.generator)
        self.history.append(noise)
        self.seen["best"] = (values.clone(), float(values.sum()))
        self.array += values.numpy()
        self.number = np.float64(self.number * 1.1)
        self.counter.inner.count += 1
        return (
            torch.stack(list(self.history)).sum(0) * self.alias[0].detach() * self.counter.inner.count
            + self.array.sum()
        )


class Inner:
    def __init__(self) -> None:
        self.count = 0


class Counter:
    def __init__(self) -> None:
        self.inner = Inner()


def call_anything(anything: Any, t: int) -> list[Tensor]:
    return [anything(losses_at(t)[:2])]


def prepared(make: Callable[[int], nn.Module]) -> nn.Module:
    """As a rule has it: in single precision, with its tasks named."""
    return move_to(instantiate(NAMES, make, caller="test"), dtype=torch.float32)


def case_of(make: Callable[[int], nn.Module]) -> Case:
    made = make(T)
    takes_gramian = isinstance(made, A.Weighting) and facts_of(made).input != "matrix"
    calls = call_scalarizer if isinstance(made, S.Scalarizer) else call_weighting if takes_gramian else call_aggregator
    return Case(partial(prepared, make), calls, has_memory(made))


CASES = {
    **{name: case_of(make) for name, make in MODULES.items()},
    "a user's own": Case(Anything, call_anything),
}

quiet = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
"""cvxpy's advice about NashMTL."""


def of(name: str) -> Case:
    return CASES[name]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_every_stateful_class_of_torchjd_is_among_the_cases() -> None:
    from torchjd import Stateful

    classes = {c for package in (A, S) for c in vars(package).values() if isinstance(c, type)}
    tried = {type(part) for make in MODULES.values() for part in make(T).modules()}
    assert {c for c in classes if issubclass(c, Stateful)} <= tried


@quiet
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_a_fresh_object_goes_on_bit_by_bit(name: str, calls: int) -> None:
    case = of(name)
    uninterrupted, resumed = case.make(), case.make()
    for t in range(calls):
        case.call(uninterrupted, t)
    restore(resumed, through_a_file(state_of(uninterrupted)))
    for t in range(calls, calls + 5):
        assert same(case.call(uninterrupted, t), case.call(resumed, t)), f"step {t}"


@quiet
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.remembers])
def test_without_its_memory_it_would_not(name: str) -> None:
    case = of(name)
    uninterrupted, forgetful = case.make(), case.make()
    for t in range(4):
        case.call(uninterrupted, t)
    assert not all(same(case.call(uninterrupted, t), case.call(forgetful, t)) for t in range(4, 9))


@quiet
@pytest.mark.parametrize("name", CASES)
def test_a_state_does_not_change_with_the_object_it_is_of_nor_with_those_it_was_restored_into(name: str) -> None:
    case = of(name)
    first = case.make()
    for t in range(3):
        case.call(first, t)
    state = state_of(first)
    expected = [case.call(first, t) for t in range(3, 6)]
    for _ in range(2):
        resumed = case.make()
        restore(resumed, state)
        assert all(same(case.call(resumed, t), expected[t - 3]) for t in range(3, 6))


@quiet
@pytest.mark.parametrize("name", CASES)
def test_double_precision_is_kept(name: str) -> None:
    case = of(name)

    def in_double(module: nn.Module, t: int) -> list[Tensor]:
        torch.set_default_dtype(torch.float64)
        try:
            return case.call(module, t)
        finally:
            torch.set_default_dtype(torch.float32)

    uninterrupted, resumed = (move_to(case.make(), dtype=torch.float64) for _ in range(2))
    for t in range(3):
        in_double(uninterrupted, t)
    restore(resumed, through_a_file(state_of(uninterrupted)))
    outputs = [(in_double(uninterrupted, t), in_double(resumed, t)) for t in range(3, 6)]
    assert all(same(one, other) for one, other in outputs)
    assert outputs[0][0][0].dtype == torch.float64


def test_any_plain_memory_of_a_users_own_strategy_is_carried() -> None:
    one, other = Anything(), Anything()
    for t in range(3):
        one(losses_at(t)[:2])
    restore(other, through_a_file(state_of(one)))
    assert other.alias[0] is other.w
    assert other.optimizer.param_groups[0]["params"][0] is other.w
    for t in range(3, 6):
        assert one(losses_at(t)[:2]).equal(other(losses_at(t)[:2]))
    assert isinstance(other.scheduler_lr, torch.optim.AdamW)
    assert other.scheduler_lr.param_groups[0]["betas"] == (0.8, 0.9)
    assert other.history.maxlen == 2
    assert (other.names, other.of, other.kind) == ({"a", "b"}, torch.Size([2, 3]), torch.float16)
    assert other.seen[("a", 1)][0] == 1.0
    assert other.seen["best"][0].equal(one.seen["best"][0])
    assert (other.array == one.array).all()
    assert other.array.dtype == np.float32
    assert other.number == one.number
    assert type(other.number) is np.float64


class With(nn.Module):
    def __init__(self, content: Any) -> None:
        super().__init__()
        self.memory = content


class Slotted:
    __slots__ = ("__dict__", "count")

    def __init__(self) -> None:
        self.count, self.other = 0, 1


class Hidden(dict):  # type: ignore[type-arg]
    pass


def circle() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (threading.Lock(), "'memory' is a _thread.lock"),
        (nn.Linear(1, 1), None),
        ([nn.Linear(1, 1)], r"'memory\[0\]' is a torch.nn.modules.linear.Linear, .* register it as a submodule"),
        (Hidden(a=1), "'memory' is a .*Hidden"),
        (Slotted(), "'memory' is a .*Slotted"),
        ({"a": [iter([1])]}, r"'memory\['a'\]\[0\]' is a builtins.list_iterator"),
        (np.array(["a", None], dtype=object), "'memory' is a numpy.ndarray"),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))]), "parameters that are not the module's"),
        (circle(), "contains itself"),
    ],
)
def test_what_cannot_be_carried_is_an_error_and_never_lost(content: Any, says: str | None) -> None:
    module = With(content)
    if says is None:
        state_of(module)
        return
    with pytest.raises(TypeError, match=says):
        state_of(module)


@pytest.mark.parametrize(
    ("saved", "into", "says"),
    [
        (S.DWA(), S.FAMO(2), "FAMO: the state is that of a DWA. Resume with the same strategy"),
        (S.FAMO(3), S.FAMO(2), r"FAMO._w: should be of shape \(3,\) as in the state; it is of shape \(2,\)"),
        (
            A.CRMOGMWeighting(A.MGDAWeighting()),
            A.CRMOGMWeighting(A.MeanWeighting()),
            "'weighting' is a MeanWeighting, in the state a MGDAWeighting",
        ),
        (nn.Sequential(S.DWA()), nn.Sequential(S.DWA(), S.DWA()), r"submodules: .* lacks \['1'\]"),
        (With(Counter()), With(Inner()), "should be a Counter as in the state; it is a Inner"),
        (With(Counter()), With(None), "should be a Counter as in the state; it is a NoneType"),
        (With(torch.ones(2)), With(torch.ones(3)), r"With.memory: should be of shape \(2,\)"),
    ],
)
def test_another_class_or_shape_is_refused(saved: nn.Module, into: nn.Module, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        restore(into, through_a_file(state_of(saved)))


def test_an_attribute_that_the_state_does_not_know_is_refused() -> None:
    one, other = With(1), With(1)
    other.since = 2
    with pytest.raises(ValueError, match=r"lacks \['since'\]"):
        restore(other, state_of(one))


def test_a_state_of_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="should be of version 1; got 7"):
        restore(S.DWA(), {**state_of(S.DWA()), "version": 7})


def test_an_option_of_another_value_is_taken_from_the_state_and_said() -> None:
    resumed = S.DWA(temperature=1.0)
    with pytest.warns(UserWarning, match=r"DWA: temperature is 2\.0 in the state and 1\.0 here"):
        restore(resumed, state_of(S.DWA(temperature=2.0)))
    assert resumed.temperature == 2.0


def test_a_parameter_stays_the_object_that_an_optimizer_has() -> None:
    saved, resumed = uncertainty(), uncertainty()
    assert saved.log_variance is not None
    saved.log_variance.data += 1
    had = resumed.log_variance
    restore(resumed, state_of(saved))
    assert resumed.log_variance is had
    assert had is not None
    assert had.tolist() == [1.0, 1.0, 1.0]


def test_a_parameter_that_is_not_made_yet_is_made() -> None:
    saved, resumed = uncertainty(), Uncertainty(["b"])
    restore(resumed, state_of(saved))
    resumed.name_tasks(["a", "b", "c"])
    assert resumed(losses_at(0)).equal(saved(losses_at(0)))


def test_what_was_kept_on_a_device_goes_to_the_one_named() -> None:
    """The meta device stands for an accelerator."""
    weighting, gradvac = A.MoDoWeighting(), A.GradVacWeighting()
    for one in (weighting, gradvac):
        call_weighting(one, 0)
    moved, stays = A.MoDoWeighting(), A.GradVacWeighting()
    restore(moved, state_of(weighting), device="meta")
    restore(stays, state_of(gradvac), device="meta")
    assert moved._lambda.device.type == "meta"  # type: ignore[union-attr]
    assert moved._state_key == (T, torch.float32, torch.device("meta"))
    assert stays._phi_t.device.type == "cpu"  # type: ignore[union-attr]
