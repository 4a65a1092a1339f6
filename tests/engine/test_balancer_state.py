"""`Balancer`: resume, exchange with the callback, a clean model after `close`, silence in evaluations, and no garbage."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from garbage import Garbage, only_what_comes_from_here
from harness import Batches
from loops import Network, gradnorm_rule, parameter_distance, train
from models import TASKS, Automatic, Batch, network_sgd, vector_batches
from torch import Tensor, nn
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm import Aggregation, Balancer, FixedWeights, GradNorm, Scalarization
from lightning_gradnorm.strategies import AggregationRule, FixedRule, ScalarizationRule

NAMES = TASKS[:3]
RULES: dict[str, Callable[[], Any]] = {
    "GradNorm": gradnorm_rule,
    "fixed weights": lambda: FixedRule({"seg": 0.5, "depth": 2.0, "normal": 1.0}),
    "UW": lambda: ScalarizationRule(NAMES, S.UW(3)),
    "FAMO": lambda: ScalarizationRule(NAMES, S.FAMO(3)),
    "random weights": lambda: ScalarizationRule(NAMES, S.Random()),
    "UPGrad": lambda: AggregationRule(NAMES, A.UPGrad()),
    "PCGrad": lambda: AggregationRule(NAMES, A.PCGrad()),
    "GradNorm of activations": gradnorm_rule,
}
OPTIONS: dict[str, dict[str, Any]] = {"GradNorm of activations": {"norm_of": "activation"}}


def _finish(name: str, model: nn.Module) -> Callable[[Balancer, Batch], None]:
    if name == "FAMO":
        return lambda balancer, batch: balancer.step(losses_after_step=lambda: model(batch))
    return lambda balancer, batch: balancer.step()


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_a_resumed_loop_is_bit_identical_to_an_uninterrupted_one(name: str) -> None:
    batches, whole, parts = vector_batches(3, 12), Network(), Network()
    expected, at_the_end = train(whole, RULES[name](), batches, step=_finish(name, whole), **OPTIONS.get(name, {}))

    optimizer = network_sgd(parts.parameters())
    run = partial(train, parts, optimizer=optimizer, step=_finish(name, parts), **OPTIONS.get(name, {}))
    first, state = run(RULES[name](), batches[:5])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(123)  # the process that resumes has other random numbers
    second, state = run(RULES[name](), batches[5:], state=state)
    assert first + second == expected
    assert parameter_distance(parts, whole) == 0
    _assert_same(state, at_the_end)


def _assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            _assert_same(a, b)
    else:
        assert one == other


def test_dwa_resumes_in_its_epoch() -> None:
    def run(model: Network, epochs: range, state: dict[str, Any] | None = None) -> tuple[list[Any], dict[str, Any]]:
        optimizer, found = torch.optim.SGD(model.parameters(), lr=0.02), []
        with Balancer(model, ScalarizationRule(NAMES, S.DWA())) as balancer:
            if state is not None:
                balancer.load_state_dict(state)
            for _ in epochs:
                for batch in vector_batches(3, 4):
                    optimizer.zero_grad()
                    balancer.backward(model(batch))
                    optimizer.step()
                    balancer.step()
                    found.append(balancer.weights)
                balancer.end_epoch()
            return found, copy.deepcopy(balancer.state_dict())

    whole, parts = Network(), Network()
    expected, _ = run(whole, range(5))
    first, state = run(parts, range(3))
    second, _ = run(parts, range(3, 5), state)
    assert first + second == expected
    assert parameter_distance(parts, whole) == 0


CALLBACKS: dict[str, Callable[[], Any]] = {
    "GradNorm": lambda: GradNorm(NAMES, alpha=1.2, shared_layer="encoder.2"),
    "fixed weights": lambda: FixedWeights({"seg": 0.5, "depth": 2.0, "normal": 1.0}),
    "UW": lambda: Scalarization(lambda T: S.UW(T), tasks=NAMES),
    "UPGrad": lambda: Aggregation(lambda T: A.UPGrad(), tasks=NAMES, at="representation"),
}


class _Fits(Automatic):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def _fit(quiet_trainer: Any, model: nn.Module, callback: Any, batches: list[Batch]) -> dict[str, float]:
    quiet_trainer(callbacks=[callback], max_steps=len(batches)).fit(model, Batches(batches))
    return dict(callback.weights)


def _loop(model: nn.Module, name: str, batches: list[Batch], state: Any = None) -> tuple[dict[str, float], Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with Balancer(model, RULES[name]()) as balancer:
        if state is not None:
            balancer.load_state_dict(state)
        for batch in batches:
            optimizer.zero_grad()
            balancer.backward(model.task_losses(batch))
            optimizer.step()
            balancer.step()
        return balancer.weights, copy.deepcopy(balancer.state_dict())


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_loop_and_a_callback_exchange_their_states(name: str, quiet_trainer: Any) -> None:
    batches, whole = vector_batches(3, 12), _Fits(3)
    expected = _fit(quiet_trainer, whole, CALLBACKS[name](), batches)

    in_loop_first, in_fit_first = _Fits(3), _Fits(3)
    _, state = _loop(in_loop_first, name, batches[:5])
    callback = CALLBACKS[name]()
    callback.load_state_dict(state)
    assert _fit(quiet_trainer, in_loop_first, callback, batches[5:]) == pytest.approx(expected, rel=1e-9)
    assert parameter_distance(in_loop_first, whole) <= 1e-9

    callback = CALLBACKS[name]()
    _fit(quiet_trainer, in_fit_first, callback, batches[:5])
    in_fit_first.train()
    weights, _ = _loop(in_fit_first, name, batches[5:], state=callback.state_dict())
    assert weights == pytest.approx(expected, rel=1e-9)
    assert parameter_distance(in_fit_first, whole) <= 1e-9


# ---- close -----------------------------------------------------------------------------------------------------------


def _traces(model: nn.Module) -> list[Any]:
    """Everything on the modules and parameters that something could have been hung on."""
    of_modules = [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        for module in model.modules()
    ]
    of_parameters = [(p._backward_hooks, p._post_accumulate_grad_hooks, vars(p)) for p in model.parameters()]
    return [of_modules, of_parameters]


@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_close_leaves_the_model_as_it_was(name: str, with_heads: bool) -> None:
    batches, model = vector_batches(3, 3), Network()
    before = _traces(model)
    heads = model.heads() if with_heads else None
    train(model, RULES[name](), batches, step=_finish(name, model), heads=heads, **OPTIONS.get(name, {}))
    model.zero_grad()
    after = _traces(model)
    assert len(after[0]) == len(before[0])
    for one, other in zip(before[0], after[0], strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key] is other[key] or key == "_parameters" or one[key] == other[key], key
    assert [one[:2] for one in after[1]] == [one[:2] for one in before[1]]
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    fresh = Network()
    fresh.load_state_dict(model.state_dict())
    for one in (model, copied, pickled, fresh):
        torch.stack(list(one(batches[0]).values())).sum().backward()
    for one in (copied, pickled, fresh):
        for p, q in zip(one.parameters(), model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


def test_an_open_balancer_does_not_follow_copies_of_its_model() -> None:
    batches, model = vector_batches(3, 4), Network()
    with Balancer(model, gradnorm_rule(), heads=model.heads()) as balancer:
        balancer.backward(model(batches[0]))
        balancer.step()
        teacher = copy.deepcopy(model)
        plain = Network()
        plain.load_state_dict(model.state_dict())
        for one in (teacher, plain):
            one.zero_grad()
            torch.stack(list(one(batches[1]).values())).sum().backward()
        for p, q in zip(teacher.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


def test_weights_and_state_can_be_read_after_close() -> None:
    model = Network()
    balancer = Balancer(model, gradnorm_rule())
    balancer.backward(model(vector_batches(3, 1)[0]))
    balancer.step()
    weights = balancer.weights
    balancer.close()
    balancer.close()  # again: nothing happens
    assert balancer.weights == weights
    assert balancer.mean_weights.keys() == weights.keys()
    assert balancer.state_dict()["weights"].tolist() == list(weights.values())
    Balancer(model, gradnorm_rule()).close()  # and there is room for another


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_evaluations_between_and_within_steps_change_nothing(name: str) -> None:
    batches, model, plain = vector_batches(3, 8), Network(), Network()
    expected, _ = train(plain, RULES[name](), batches, accumulate=2, step=_finish(name, plain), heads=plain.heads())
    optimizer, found = network_sgd(model.parameters()), []

    def evaluate(balancer: Balancer) -> None:
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                losses = model(batches[0])
                balancer.watch(losses)
                total = balancer.prepare_loss(losses)
                assert float(total) == pytest.approx(float(sum(losses.values())))
                assert balancer.prepare_loss(loss=total) is total
        model.eval()
        model(batches[1])  # someone has forgotten no_grad
        model.train()

    with Balancer(model, RULES[name](), heads=model.heads()) as balancer:
        for index, batch in enumerate(batches):
            evaluate(balancer)
            balancer.backward(model(batch), backward=lambda loss: (loss / 2).backward())
            if index % 2:
                optimizer.step()
                _finish(name, model)(balancer, batch)
                optimizer.zero_grad()
                evaluate(balancer)
                found.append(balancer.weights)
    assert found == expected
    assert parameter_distance(model, plain) == 0


# ---- garbage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["backward", "prepare_loss"])
@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("name", ["GradNorm", "GradNorm of activations", "FAMO", "UPGrad"])
def test_no_tensor_of_a_step_waits_for_the_garbage_collector(name: str, with_heads: bool, form: str) -> None:
    garbage = Garbage()
    with only_what_comes_from_here():
        model, batches = Network(), vector_batches(3, 9)
        optimizer = network_sgd(model.parameters())
        heads, options = model.heads() if with_heads else None, OPTIONS.get(name, {})
        try:
            with Balancer(model, RULES[name](), heads=heads, **options) as balancer:
                for index, batch in enumerate(batches):
                    if index == 3:
                        garbage.begin()
                    if form == "backward":
                        balancer.backward(model(batch))
                    else:
                        balancer.prepare_loss(model(batch)).backward()
                    optimizer.step()
                    _finish(name, model)(balancer, batch)
                    optimizer.zero_grad()
                garbage.end()
        finally:
            gc.enable()
    assert garbage.of_graphs == []
    assert garbage.tensors == []
