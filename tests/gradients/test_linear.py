"""Norms from the products of samples are those of the gradient itself, whatever the network does with the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches
from models import TASKS, WithoutTargets
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm import GradNorm
from lightning_gradnorm.callbacks.hooks import around_call, is_ours
from lightning_gradnorm.gradients import LinearGradients, PooledGradients, WeightGradients, fan_out
from lightning_gradnorm.gradients.readers import norms_of_rows

F64 = torch.float64
T, INPUTS, OUTPUTS = 3, 20, 30


def networks() -> tuple[nn.Linear, dict[str, nn.Module], Tensor]:
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    heads: dict[str, nn.Module] = {task: nn.Linear(OUTPUTS, 2, dtype=F64) for task in TASKS[:T]}
    return nn.Linear(INPUTS, OUTPUTS, dtype=F64), heads, torch.randn(6, INPUTS, generator=generator, dtype=F64)


Encode = Callable[[nn.Linear, Tensor], Tensor]
ENCODERS: dict[str, tuple[Encode, bool]] = {
    "the layer": (lambda layer, x: layer(x), True),
    "relu in place": (lambda layer, x: layer(x).relu_(), True),
    "a batch of sequences": (lambda layer, x: layer(x.reshape(2, 3, -1)).tanh().reshape(6, -1), True),
    "two calls": (lambda layer, x: layer(x) * layer(x.flip(0)).sigmoid(), True),
    "one vector": (lambda layer, x: layer(x[0])[None], True),
    "the weight once more, by hand": (lambda layer, x: layer(x) + F.linear(x.flip(0), layer.weight), False),
    "the weight before the call, by hand": (
        lambda layer, x: layer(F.linear(x, layer.weight)[:, :INPUTS].tanh()),
        False,
    ),
    "before the call, a large batch": (lambda layer, x: layer(layer(x.repeat(20, 1))[:6, :INPUTS].tanh()), False),
    "twice, one after the other": (lambda layer, x: layer(layer(x)[:, :INPUTS].tanh()), True),
    "with a weight made of its own": (
        lambda layer, x: torch.func.functional_call(layer, {"weight": layer.weight * layer.weight.detach().sign()}, x),
        False,
    ),
    "beside what it is differentiated by": (
        lambda layer, x: layer(x) + torch.func.grad(lambda x: layer(x).square().sum())(x).repeat(1, 2)[:, :OUTPUTS],
        False,
    ),
    "by keyword": (lambda layer, x: layer(input=x), False),
    "a large batch": (lambda layer, x: layer(x.repeat(20, 1)), False),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_norms_are_those_of_the_gradient(name: str) -> None:
    encode, is_quick = ENCODERS[name]
    layer, heads, x = networks()
    reader, plain = LinearGradients(layer, is_ours), WeightGradients([layer.weight])
    around_call(layer, before=reader.before, after=reader.after)

    def receive(task: str, outputs: Any, gradients: Any) -> None:
        reader.read(task, outputs, gradients)
        plain.read(task, outputs, gradients)

    for _ in range(2):
        views = fan_out(encode(layer, x), heads, receive)
        sum(heads[task](views[task]).square().mean() for task in heads).backward()  # type: ignore[union-attr]
        assert bool(reader._at_outputs) is is_quick
        torch.testing.assert_close(
            reader.norms([*heads, "absent"]), plain.norms([*heads, "absent"]), rtol=1e-12, atol=0
        )
        assert bool(reader._rows) is not is_quick
        reader.clear()
        plain.clear()


def changed_by_hooks(where: str, layer: nn.Linear) -> None:
    def double_output(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 2 * output

    def divide(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.view(-1, 5, OUTPUTS // 5)

    def of_another_input(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return F.linear(2 * args[0], layer.weight, layer.bias)

    def with_something(_: nn.Module, args: Any, output: Tensor) -> Any:
        return output, None

    def double_input(_: nn.Module, args: Any) -> Any:
        return (2 * args[0],)

    if where == "output":
        layer.register_forward_hook(double_output)
    elif where in ("a view", "another product", "a tuple"):
        hooks: dict[str, Any] = {"a view": divide, "another product": of_another_input, "a tuple": with_something}
        layer.register_forward_hook(hooks[where])
    elif where == "forward":
        layer.forward = lambda x: F.linear(2 * x, layer.weight)  # type: ignore[method-assign, assignment]
    elif where == "weight":
        layer.weight.register_hook(lambda gradient: 3 * gradient)
    else:
        layer.register_forward_pre_hook(double_input)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("where", ["input", "output", "weight", "a view", "another product", "a tuple", "forward"])
def test_what_somebody_elses_hook_changes_is_read_as_it_is(where: str, is_first: bool) -> None:
    layer, heads, x = networks()
    reader = LinearGradients(layer, is_ours)
    if is_first:
        changed_by_hooks(where, layer)
    around_call(layer, before=reader.before, after=reader.after)
    if not is_first:
        changed_by_hooks(where, layer)

    def encode() -> Tensor:
        z = layer(x)
        return (z[0] if isinstance(z, tuple) else z).reshape(-1, OUTPUTS)

    views = fan_out(encode(), heads, reader.read)
    losses = {task: heads[task](views[task]).square().mean() for task in heads}
    expected = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in losses.values()]
    reader.clear()  # what was read on the way to the expected numbers
    reader._calls = []
    views = fan_out(encode(), heads, reader.read)
    sum(heads[task](views[task]).square().mean() for task in heads).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(reader.norms(list(heads)), torch.stack(expected), rtol=1e-12, atol=0)


def test_a_weight_that_is_frozen_in_the_course_of_the_training_is_no_error_of_torch() -> None:
    layer, _, x = networks()
    reader = LinearGradients(layer)
    layer.weight.requires_grad_(False)
    reader.before((x,), {})
    reader.after(layer(x))  # the callback says what is the matter
    assert not reader._calls


def test_a_second_use_of_the_weight_in_a_later_step_is_seen() -> None:
    layer, heads, x = networks()
    reader, plain = LinearGradients(layer), WeightGradients([layer.weight])
    for step in range(4):
        reader.before((x,), {})
        z = layer(x)
        reader.after(z)
        z = z + F.linear(x.flip(0), layer.weight) if step % 2 else z
        views = fan_out(z, heads, lambda *a: (reader.read(*a), plain.read(*a)))  # type: ignore[arg-type, func-returns-value]
        sum(heads[task](views[task]).square().mean() for task in heads).backward()  # type: ignore[union-attr]
        assert bool(reader._at_outputs) is not bool(step % 2)
        torch.testing.assert_close(reader.norms(list(heads)), plain.norms(list(heads)), rtol=1e-12, atol=0)
        reader.clear()
        plain.clear()


def test_several_passes_of_one_step_add_up_as_gradients_do() -> None:
    layer, heads, x = networks()
    reader, plain = LinearGradients(layer), WeightGradients([layer.weight])
    for part in x.split(2):
        reader.before((part,), {})
        z = layer(part)
        reader.after(z)
        views = fan_out(z, heads, lambda *a: (reader.read(*a), plain.read(*a)))  # type: ignore[arg-type, func-returns-value]
        sum(heads[task](views[task]).square().mean() for task in heads).backward()  # type: ignore[union-attr]
        reader.rescale(TASKS[0], torch.tensor(0.5))
        plain.rescale(TASKS[0], torch.tensor(0.5))
        reader.forget()
        plain.forget()
    torch.testing.assert_close(reader.norms(list(heads)), plain.norms(list(heads)), rtol=1e-12, atol=0)
    torch.testing.assert_close(reader.rows(list(heads), x), plain.rows(list(heads), x), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("difference", [0.0, 1e-6, 1e-3, 1.0])
def test_samples_that_cancel_each_other_cost_no_digits(difference: float) -> None:
    """Of single precision: the norm of what is left of gradients that point against each other."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    x = torch.randn(1, 64).repeat(8, 1)
    sign = torch.tensor([1.0, -1.0] * 4)
    sign[0] += difference
    reader, exact = LinearGradients(layer), layer.double()
    layer = layer.float()
    reader.before((x,), {})
    z = layer(x)
    reader.after(z)
    reader.read("a", [z], [sign[:, None] * torch.ones(8, 64)])
    (expected,) = torch.autograd.grad(
        F.linear(x.double(), exact.weight.double()), exact.weight, (sign[:, None] * torch.ones(8, 64)).double()
    )
    torch.testing.assert_close(reader.norms(["a"])[0].double(), expected.double().norm(), rtol=1e-4, atol=1e-4)


def test_an_input_that_is_changed_before_the_step_is_an_error() -> None:
    layer, heads, x = networks()
    reader = LinearGradients(layer)
    reader.before((x,), {})
    z = layer(x)
    reader.after(z)
    views = fan_out(z, heads, reader.read)
    sum(heads[task](views[task]).sum() for task in heads).backward()  # type: ignore[union-attr]
    x.zero_()
    with pytest.raises(RuntimeError, match="changed in place between backward and the optimizer's step"):
        reader.norms(list(heads))


def test_products_are_as_exact_within_autocast_as_without() -> None:
    """A manual backward pass is begun within Lightning's, where torch's own product is one of bfloat16."""
    layer, heads, x = networks()
    layer, x = layer.float(), x.float()
    reader = LinearGradients(layer, is_ours)
    around_call(layer, before=reader.before, after=reader.after)
    norms = []
    for is_cast in (False, True):
        views = fan_out(layer(x), heads, reader.read)
        loss = sum((i + 1) * views[task].square().mean() for i, task in enumerate(heads))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_cast):
            loss.backward()  # type: ignore[union-attr]
            assert reader._at_outputs
            norms.append(reader.norms(list(heads)))
        reader.clear()
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)


class Wide(WithoutTargets):
    """A shared layer that is larger than the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Sequential(nn.Linear(5, INPUTS), nn.ReLU(), nn.Linear(INPUTS, OUTPUTS), nn.ReLU(inplace=True))
        self.heads = nn.ModuleDict({task: nn.Linear(OUTPUTS, 2) for task in TASKS[:T]})
        self.double()


class Reads(L.Callback):
    """Notes what reads the gradient."""

    def __init__(self, gradnorm: GradNorm) -> None:
        self.gradnorm, self.found = gradnorm, set[str]()

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        reader = self.gradnorm._reader
        assert reader is not None
        self.found.add(
            type(reader).__name__
            + (" at outputs" if vars(reader).get("_at_outputs") or vars(reader).get("_of_inputs") else "")
        )


@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_is_the_same_with_either_way_of_reading(
    quiet_trainer: Any, with_heads: bool, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = list(torch.randn(8, 6, 5, dtype=F64, generator=torch.Generator().manual_seed(2)))
    heads = {task: f"heads.{task}" for task in TASKS[:T]} if with_heads else None
    found = {}
    for is_quick in (True, False):
        monkeypatch.setattr(LinearGradients, "can_read", staticmethod(lambda *_, is_quick=is_quick: is_quick))
        model, gradnorm = Wide(), GradNorm(TASKS[:T], shared_layer="encoder.2", heads=heads)
        reads = Reads(gradnorm)
        trainer = quiet_trainer(callbacks=[reads, gradnorm], max_epochs=2, accumulate_grad_batches=accumulate)
        trainer.fit(model, Batches(batches))
        assert reads.found == {"LinearGradients at outputs" if is_quick else "WeightGradients"}
        found[is_quick] = [*gradnorm.weights.values(), *(p.detach() for p in model.parameters())]
    torch.testing.assert_close(found[True], found[False], rtol=1e-9, atol=1e-12)


class PassesTwice(Wide):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(retain_graph=True)
        loss.backward()


@pytest.mark.parametrize("with_heads", [True, False])
def test_a_module_may_pass_its_losses_twice_in_its_own_backward(quiet_trainer: Any, with_heads: bool) -> None:
    """As the same training with losses of twice the size, of which each has twice the gradient."""
    batches = list(torch.randn(4, 6, 5, dtype=F64, generator=torch.Generator().manual_seed(2)))
    heads = {task: f"heads.{task}" for task in TASKS[:T]} if with_heads else None
    norms = []
    for kind in (Wide, PassesTwice):
        gradnorm = GradNorm(TASKS[:T], shared_layer="encoder.2", heads=heads)
        quiet_trainer(callbacks=[gradnorm], max_steps=1).fit(kind(), Batches(batches))
        norms.append(gradnorm._known.last.norms)  # type: ignore[union-attr]
    torch.testing.assert_close(norms[1], 2 * norms[0], rtol=1e-12, atol=0)


def test_a_gradient_that_is_read_after_it_was_complete_is_an_error() -> None:
    layer, _, x = networks()
    reader = WeightGradients([layer.weight])
    z = layer(x)
    reader.read("a", [z], [torch.ones_like(z)])
    before = reader.norms(["a"])
    reader.close("a")
    assert torch.equal(reader.norms(["a"]), before)
    reader.rescale("a", torch.tensor(2.0, dtype=F64))
    assert torch.equal(reader.norms(["a", "b"]), torch.stack([2 * before[0], torch.zeros((), dtype=F64)]))
    with pytest.raises(RuntimeError, match="read again after it was said to be complete"):
        reader.read("a", [z], [torch.ones_like(z)])
    reader.clear()
    reader.read("a", [z], [torch.ones_like(z)])


@pytest.mark.parametrize("kind", [LinearGradients, PooledGradients])
def test_a_task_that_does_not_come_by_the_layer_has_a_norm_of_zero(kind: Any) -> None:
    torch.manual_seed(0)
    is_linear = kind is LinearGradients
    layer, other = (nn.Linear(20, 30) if is_linear else nn.Conv2d(2, 3, 3) for _ in range(2))
    x = torch.randn(6, 20) if is_linear else torch.randn(6, 2, 12, 12)
    reader = kind(layer, is_ours) if is_linear else kind(layer, 5, is_ours)
    around_call(layer, before=reader.before, after=reader.after)
    by_the_layer, past_it = layer(x), other(x)
    assert reader._calls
    reader.read("past it", [past_it], [torch.ones_like(past_it)])
    reader.read("by it", [by_the_layer], [torch.ones_like(by_the_layer)])
    (expected,) = torch.autograd.grad(by_the_layer.sum(), layer.weight)
    torch.testing.assert_close(reader.norms(["past it", "by it"]), torch.stack([torch.zeros(()), expected.norm()]))
    assert reader.unreached == {"past it"}


@pytest.mark.parametrize("length", [1, 16_383, 16_384, 100_001, 4_000_003])
def test_the_norm_of_a_long_row_has_all_digits_of_its_precision(length: int) -> None:
    rows = torch.randn(2, length, generator=torch.Generator().manual_seed(0)).pow(3)
    torch.testing.assert_close(norms_of_rows(rows).double(), rows.double().norm(dim=1), rtol=1e-6, atol=0)
