"""A strategy's state goes through a file into a fresh object, which continues bit for bit."""

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
from harness import seed
from strategies import MODULES, has_memory
from torch import Tensor, nn
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm.strategies import Uncertainty, load_snapshot, snapshot
from lightning_gradnorm.strategies.factory import instantiate, move_to
from lightning_gradnorm.strategies.facts import facts_of

T, n = 3, 5
NAMES = ["seg", "depth", "normal"]


def losses_at(t: int) -> Tensor:
    return torch.rand(T, generator=torch.Generator().manual_seed(t)) + 0.1


def matrix_at(t: int) -> Tensor:
    return torch.randn(T, n, generator=torch.Generator().manual_seed(t))


def call_scalarizer(scalarizer: Any, t: int) -> list[Tensor]:
    """One training step with an optimizer of its parameters, and the other calls that the class requires."""
    seed(t)  # Random draws weights
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
    seed(t)  # GradVac draws an order
    return [aggregator(matrix_at(t)).clone()]


def call_weighting(weighting: Any, t: int) -> list[Tensor]:
    seed(t)
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
        self.late_optimizer: torch.optim.Optimizer | None = None
        self.history: list[Tensor] = []
        self.seen: dict[Any, Any] = {("a", 1): [1.0, torch.zeros(2)], "best": None}
        self.of, self.kind, self.place = torch.Size([2, 3]), torch.float16, torch.device("cpu")
        self.make = lambda value: value + 1

    def forward(self, values: Tensor) -> Tensor:
        if self.late_optimizer is None:
            self.late_optimizer = torch.optim.AdamW([self.w], lr=0.01, betas=(0.8, 0.9))
            self.register_buffer("total", torch.zeros_like(values))
            self.register_parameter("scale", nn.Parameter(torch.ones_like(values)))
        for optimizer in (self.optimizer, self.late_optimizer):
            self.w.grad = values.clone()
            optimizer.step()
        self.history = [*self.history, values.clone()][-2:]
        self.seen["best"] = (values.clone(), float(values.sum()))
        self.total = self.total + values
        self.scale.data *= 1.1
        return (torch.stack(self.history).sum(0) + self.total) * self.alias[0].detach() * self.scale.detach()


class KeepsItsOwn(nn.Module):
    """A user's strategy with a memory of other kinds, which it writes and reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.history: deque[float] = deque(maxlen=2)
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        self.history.append(float(values.sum()))
        self.count += 1
        return torch.rand(2, generator=self.generator) * sum(self.history) * self.count

    def get_extra_state(self) -> dict[str, Any]:
        return {"history": list(self.history), "generator": self.generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.history = deque(state["history"], maxlen=2)
        self.generator.set_state(state["generator"])


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
    "a user's own with get_extra_state": Case(KeepsItsOwn, call_anything),
    "a user's own within another module": Case(lambda: nn.Sequential(KeepsItsOwn()), call_anything),
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
@pytest.mark.parametrize("calls", [2, *(pytest.param(calls, marks=pytest.mark.slow) for calls in (0, 1, 5))])
@pytest.mark.parametrize("name", CASES)
def test_a_fresh_object_continues_bit_for_bit(name: str, calls: int) -> None:
    case = of(name)
    uninterrupted, resumed = case.make(), case.make()
    for t in range(calls):
        case.call(uninterrupted, t)
    load_snapshot(resumed, through_a_file(snapshot(uninterrupted)))
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
def test_a_state_is_independent_of_its_object_and_of_those_it_was_restored_into(name: str) -> None:
    case = of(name)
    first = case.make()
    for t in range(3):
        case.call(first, t)
    state = snapshot(first)
    expected = [case.call(first, t) for t in range(3, 6)]
    for _ in range(2):
        resumed = case.make()
        load_snapshot(resumed, state)
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
    load_snapshot(resumed, through_a_file(snapshot(uninterrupted)))
    outputs = [(in_double(uninterrupted, t), in_double(resumed, t)) for t in range(3, 6)]
    assert all(same(one, other) for one, other in outputs)
    assert outputs[0][0][0].dtype == torch.float64


def test_any_plain_memory_of_a_users_own_strategy_is_carried() -> None:
    one, other = Anything(), Anything()
    for t in range(3):
        one(losses_at(t)[:2])
    load_snapshot(other, through_a_file(snapshot(one)))
    assert other.alias[0] is other.w
    assert other.optimizer.param_groups[0]["params"][0] is other.w
    for t in range(3, 6):
        assert one(losses_at(t)[:2]).equal(other(losses_at(t)[:2]))
    assert isinstance(other.late_optimizer, torch.optim.AdamW)
    assert other.late_optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert (other.of, other.kind, other.place) == (torch.Size([2, 3]), torch.float16, torch.device("cpu"))
    assert other.seen[("a", 1)][0] == 1.0
    assert other.seen["best"][0].equal(one.seen["best"][0])
    assert isinstance(other.scale, nn.Parameter)
    assert set(other.state_dict()) == {"w", "scale", "total"}


class With(nn.Module):
    def __init__(self, content: Any) -> None:
        super().__init__()
        self.memory = content


class Hidden(dict):  # type: ignore[type-arg]
    pass


def stateful_object() -> Any:
    class Counter:
        count = 0

    return Counter()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (threading.Lock(), "'memory' is a _thread.lock"),
        ([nn.Linear(1, 1)], r"'memory\[0\]' is a torch.nn.modules.linear.Linear"),
        (Hidden(a=1), "'memory' is a .*Hidden"),
        (stateful_object(), "'memory' is a .*Counter"),
        ({"a": [{1, 2}]}, r"'memory\['a'\]\[0\]' is a builtins.set"),
        (deque([1]), "'memory' is a collections.deque"),
        (np.zeros(2), "'memory' is a numpy.ndarray"),
        (np.float64(1), "'memory' is a numpy.float64"),
        (torch.Generator(), "'memory' is a torch._C.Generator"),
        ([torch.optim.SGD([nn.Parameter(torch.ones(1))])], r"'memory\[0\]' is a torch.optim.sgd.SGD"),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))]), "'memory' has parameters that are not the module's"),
    ],
)
def test_unsavable_state_is_an_error_that_explains_what_to_implement(content: Any, what: str) -> None:
    with pytest.raises(TypeError, match=rf"^With: .*{what}.* implement get_extra_state.* set_extra_state in With\.$"):
        snapshot(With(content))


def test_an_extra_state_that_cannot_be_saved_is_an_error_too() -> None:
    class Sloppy(With):
        def get_extra_state(self) -> Any:
            return {"seen": {1, 2}}

    with pytest.raises(TypeError, match=r"'get_extra_state\(\)\['seen'\]' is a builtins.set"):
        snapshot(Sloppy(None))


def test_a_module_that_is_registered_needs_nothing_else() -> None:
    one, other = With(nn.Linear(1, 1)), With(nn.Linear(1, 1))
    load_snapshot(other, through_a_file(snapshot(one)))
    assert other.memory.weight.equal(one.memory.weight)


@pytest.mark.parametrize(
    ("saved", "into", "says"),
    [
        (S.DWA(), S.FAMO(2), "FAMO: the strategy should be a DWA as in the state; got a FAMO. Resume with the same"),
        (
            S.FAMO(3),
            S.FAMO(2),
            r"FAMO: buffer 'min_losses' should be of shape \(3,\) as in the state; got \(2,\)",
        ),
        (
            A.CRMOGMWeighting(A.MGDAWeighting()),
            A.CRMOGMWeighting(A.MeanWeighting()),
            "submodule 'weighting' should be a MGDAWeighting as in the state; got a MeanWeighting",
        ),
        (nn.Sequential(S.DWA()), nn.Sequential(S.DWA(), S.DWA()), r"submodules: the state lacks \['1'\]"),
        (nn.Sequential(S.DWA(), S.DWA()), nn.Sequential(S.DWA()), r"has \['1'\] that this one lacks"),
        (With(torch.ones(2)), With(torch.ones(3)), r"With: attribute 'memory' should be of shape \(2,\)"),
    ],
)
def test_another_class_or_shape_is_refused(saved: nn.Module, into: nn.Module, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_snapshot(into, through_a_file(snapshot(saved)))


def test_an_optimizer_of_another_class_is_refused() -> None:
    one, other = Anything(), Anything()
    other.optimizer = torch.optim.Adagrad([other.w])  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Anything: optimizer should be a SGD as in the state; got a Adagrad"):
        load_snapshot(other, snapshot(one))


def test_an_optimizer_that_cannot_be_made_is_refused() -> None:
    class Own(torch.optim.SGD):
        pass

    one, other = Anything(), Anything()
    one.late_optimizer = Own([one.w])
    with pytest.raises(ValueError, match=r"Anything: late_optimizer should be a .*Own as in the state; got a NoneType"):
        load_snapshot(other, snapshot(one))


def test_an_attribute_that_the_state_does_not_know_is_refused() -> None:
    one, other = With(1), With(1)
    other.since = 2
    with pytest.raises(ValueError, match=r"lacks \['since'\]"):
        load_snapshot(other, snapshot(one))


def test_a_state_of_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="should be of version 2; got 7"):
        load_snapshot(S.DWA(), {**snapshot(S.DWA()), "version": 7})


def test_an_option_with_another_value_is_taken_from_the_state_and_reported() -> None:
    resumed = S.DWA(temperature=1.0)
    with pytest.warns(UserWarning, match=r"DWA: temperature is 2\.0 in the state and 1\.0 here"):
        load_snapshot(resumed, snapshot(S.DWA(temperature=2.0)))
    assert resumed.temperature == 2.0


def test_a_parameter_stays_the_object_that_an_optimizer_has() -> None:
    saved, resumed = uncertainty(), uncertainty()
    assert saved.log_variance is not None
    saved.log_variance.data += 1
    had = resumed.log_variance
    load_snapshot(resumed, snapshot(saved))
    assert resumed.log_variance is had
    assert had is not None
    assert had.tolist() == [1.0, 1.0, 1.0]


def test_a_parameter_that_is_not_made_yet_is_made() -> None:
    saved, resumed = uncertainty(), Uncertainty(["b"])
    load_snapshot(resumed, snapshot(saved))
    resumed.name_tasks(["a", "b", "c"])
    assert resumed(losses_at(0)).equal(saved(losses_at(0)))


def test_state_from_one_device_moves_to_the_requested_one() -> None:
    """The meta device stands for an accelerator."""
    weighting, moved = A.MoDoWeighting(), A.MoDoWeighting()
    call_weighting(weighting, 0)
    load_snapshot(moved, snapshot(weighting), device="meta")
    assert moved._lambda.device.type == "meta"  # type: ignore[union-attr]
    assert moved._state_key == (T, torch.float32, torch.device("meta"))
