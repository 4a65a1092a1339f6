"""Norms from what pooled gradients have in common are those of the gradients themselves; others are read as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from harness import Batches
from models import WithoutTargets
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm import GradNorm
from lightning_gradnorm.callbacks.hooks import around_call, is_ours
from lightning_gradnorm.gradients import PooledGradients, WeightGradients, fan_out, pooled

F64 = torch.float64
TASKS = ["seg", "depth", "normals", "edges", "pose", "time"]
INPUTS, OUTPUTS = 3, 7

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d
Encode = Callable[[Layer, Tensor], Tensor]


def averaged(z: Tensor) -> Tensor:
    return z.flatten(2).mean(2)


def flat(**options: Any) -> Layer:
    return nn.Conv2d(INPUTS, OUTPUTS, 3, dtype=F64, **options)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(5))


norm = nn.BatchNorm2d(OUTPUTS, dtype=F64)

ENCODERS: dict[str, tuple[Callable[[], Layer], Encode, bool]] = {
    "a relu": (flat, lambda layer, x: averaged(layer(x).relu()), True),
    "a relu in place": (flat, lambda layer, x: averaged(layer(x).relu_()), True),
    "nothing": (flat, lambda layer, x: averaged(layer(x)), True),
    "a gelu": (flat, lambda layer, x: averaged(F.gelu(layer(x))), True),
    "dropout": (flat, lambda layer, x: averaged(F.dropout(layer(x).tanh())), True),
    "statistics at rest": (flat, lambda layer, x: averaged(norm.eval()(layer(x)).relu()), True),
    "pooling in the heads": (flat, lambda layer, x: layer(x).relu(), True),
    "a sum with what is before": (flat, lambda layer, x: averaged((layer(x) + x[:, :1, 2:, 2:]).relu()), True),
    "strides": (lambda: flat(stride=(2, 1), padding=(0, 2)), lambda layer, x: averaged(layer(x).relu()), True),
    "holes": (lambda: flat(dilation=(1, 3), padding=3), lambda layer, x: averaged(layer(x).relu()), True),
    "pixels first": (
        flat,
        lambda layer, x: averaged(layer(x.to(memory_format=torch.channels_last)).relu()),
        True,
    ),
    "sequences": (
        lambda: nn.Conv1d(INPUTS, OUTPUTS, 4, stride=2, padding=1, dtype=F64),
        lambda layer, x: averaged(layer(x.flatten(2)).relu()),
        True,
    ),
    "volumes": (
        lambda: nn.Conv3d(INPUTS, OUTPUTS, (2, 3, 1), padding=1, dtype=F64),
        lambda layer, x: averaged(layer(x.unflatten(3, (2, 5))).relu()),
        True,
    ),
    "some of the channels": (flat, lambda layer, x: averaged(layer(x)[:, :3].relu()), False),
    "the largest value": (flat, lambda layer, x: layer(x).flatten(2).amax(2), False),
    "samples mixed": (flat, lambda layer, x: averaged(layer(x) + layer(x).mean(0)), False),
    "statistics of the batch": (flat, lambda layer, x: averaged(norm.train()(layer(x)).relu()), False),
    "every position": (flat, lambda layer, x: layer(x).flatten(2)[..., :OUTPUTS].mean(1), False),
    "two calls": (flat, lambda layer, x: averaged(layer(x) * layer(x.flip(0)).sigmoid()), False),
    "the weight once more, by hand": (
        flat,
        lambda layer, x: averaged(layer(x).relu() + F.conv2d(x, layer.weight, padding=1)[..., 2:, 2:]),
        False,
    ),
    "groups": (lambda: nn.Conv2d(3, 6, 3, groups=3, dtype=F64), lambda layer, x: averaged(layer(x)), False),
    "circles": (lambda: flat(padding_mode="circular", padding=1), lambda layer, x: averaged(layer(x)), False),
    "the same size": (lambda: flat(padding="same"), lambda layer, x: averaged(layer(x)), False),
    "one image": (flat, lambda layer, x: layer(x[0]).flatten(1).mean(1)[None], False),
    "few positions": (flat, lambda layer, x: averaged(layer(x[..., :3, :5])), False),
}


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.last = nn.Linear(width, 2, dtype=F64)

    def forward(self, z: Tensor) -> Tensor:
        return self.last(averaged(z) if z.ndim > 2 else z)


def heads_for(z: Tensor) -> dict[str, nn.Module]:
    torch.manual_seed(7)
    return {task: Head(z.shape[1]) for task in TASKS}


@contextmanager
def both_readers(layer: Layer, tasks: int = len(TASKS)) -> Iterator[tuple[Any, WeightGradients]]:
    """A reader at work on the layer, if it can be, and a plain one."""
    plain = WeightGradients([layer.weight])
    if not PooledGradients.can_read(layer, layer.weight):
        yield None, plain
        return
    reader = PooledGradients(layer, tasks, is_ours)
    undo = around_call(layer, before=reader.before, after=reader.after)
    yield reader, plain
    undo()


def to_both(*readers: Any) -> Callable[..., None]:
    def receive(*arrived: Any) -> None:
        for reader in readers:
            reader.read(*arrived)

    return receive


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("at_once", [1, 2000, 8 * 2**20])
@pytest.mark.parametrize("name", ENCODERS)
def test_norms_and_rows_are_those_of_the_gradient(
    name: str, at_once: int, is_complete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooled, "_AT_ONCE", at_once)
    torch.manual_seed(1)
    make, encode, is_quick = ENCODERS[name]
    layer, x = make(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        if reader is None:
            assert not is_quick
            return
        for step in range(3):
            z = encode(layer, x + step)
            heads = heads_for(z)
            views = fan_out(z, heads, to_both(reader, plain))
            sum(heads[task](views[task]).square().mean() for task in heads).backward()
            assert bool(reader._numbers) is is_quick
            tasks = [*heads, "absent"]
            if is_complete:
                for task in heads:
                    reader.close(task)
                reader.finish()
                assert set(reader._closed) == set(heads)
            else:
                rows = reader.rows(tasks, x), plain.rows(tasks, x)
                torch.testing.assert_close(*rows, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(reader.norms(tasks), plain.norms(tasks), rtol=1e-12, atol=0)
            assert is_quick or all(torch.equal(reader.norms([task]), plain.norms([task])) for task in heads)
            reader.clear()
            plain.clear()


def test_norms_are_found_without_a_row_for_each_task() -> None:
    layer, x = flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        z = averaged(layer(x).relu())
        heads = heads_for(z)
        views = fan_out(z, heads, to_both(reader, plain))
        sum(heads[task](views[task]).square().mean() for task in heads).backward()
        torch.testing.assert_close(reader.norms(TASKS), plain.norms(TASKS), rtol=1e-12, atol=0)
        assert not reader._rows


def test_what_differs_from_position_to_position_is_read_as_it_is() -> None:
    """To the bit; and nothing is kept of it that would decide on later passes."""
    layer, x = flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        for is_pooled in (False, True, False):
            z = layer(x).relu()

            def receive(task: str, *arrived: Any, plain: Any = plain, reader: Any = reader) -> None:
                plain.read(task, *arrived)
                reader.read(task, *arrived)
                reader.close(task)

            views = fan_out(z, TASKS, receive)
            what = {task: averaged(view) if is_pooled else view for task, view in views.items()}
            sum(values.pow(2 + place).mean() for place, values in enumerate(what.values())).backward()
            assert bool(reader._calls) is not is_pooled  # nothing more is to come, and nothing is kept
            reader.finish()
            assert not reader._rows
            if is_pooled:
                torch.testing.assert_close(reader.norms(TASKS), plain.norms(TASKS), rtol=1e-12, atol=0)
            else:
                assert torch.equal(reader.norms(TASKS), plain.norms(TASKS))
            reader.clear()
            plain.clear()


def test_statistics_at_rest_may_wake_up() -> None:
    layer, x = flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        for is_awake in (False, True):
            z = norm.train(is_awake)(layer(x)).relu()
            views = fan_out(z, TASKS, to_both(reader, plain))
            sum(averaged(view).pow(2 + place).mean() for place, view in enumerate(views.values())).backward()
            assert bool(reader._numbers) is not is_awake
            torch.testing.assert_close(reader.norms(TASKS), plain.norms(TASKS), rtol=1e-12, atol=0)
            reader.clear()
            plain.clear()


@pytest.mark.parametrize("dense", [1, 4])
def test_tasks_that_are_pooled_and_others_may_share_a_pass(dense: int) -> None:
    """Also those with no loss for half of the batch, or none at all; few are not worth it and are read as they are."""
    layer, x = flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        z = layer(x).relu()
        views = fan_out(z, TASKS, to_both(reader, plain))
        parts = [slice(2, None), slice(2), slice(None), slice(None), slice(0), slice(3, None)]
        for place, (view, part) in enumerate(zip(views.values(), parts, strict=True)):
            values = view if place < dense else averaged(view)
            values[part].pow(2 + place).sum().backward(retain_graph=True)
        assert set(reader._numbers) == set(TASKS[dense:])
        for task in TASKS[-1:]:
            reader.close(task)
        torch.testing.assert_close(reader.norms(TASKS), plain.norms(TASKS), rtol=1e-12, atol=0)


HOOKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "doubles": lambda gradient: 2 * gradient,
    "is one of guided backpropagation": lambda gradient: gradient.clamp(min=0),
    "clips": lambda gradient: gradient.clamp(-1e-3, 1e-3),
    "divides by the norm": lambda gradient: gradient / gradient.norm(),
    "mixes the samples": lambda gradient: gradient.flip(0),
    "looks": lambda gradient: None,
}


@pytest.mark.parametrize("since", [0, 1])
@pytest.mark.parametrize("what", HOOKS)
@pytest.mark.parametrize("where", ["at the layer's output", "on the way", "at the representation"])
def test_a_hook_of_the_users_is_asked(where: str, what: str, since: int) -> None:
    layer, x = flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        for step in range(2):
            output = layer(x)
            between = output.relu()
            z = between.tanh()
            tensors = {"at the layer's output": output, "on the way": between, "at the representation": z}
            if step >= since:
                tensors[where].register_hook(HOOKS[what])
            views = fan_out(z, TASKS, to_both(reader, plain))
            sum(averaged(view).pow(2 + place).sum() for place, view in enumerate(views.values())).backward()
            torch.testing.assert_close(reader.norms(TASKS), plain.norms(TASKS), rtol=1e-12, atol=0)
            reader.clear()
            plain.clear()


@pytest.mark.parametrize("what", HOOKS)
def test_a_hook_of_the_users_is_asked_also_where_a_short_way_ends(what: str) -> None:
    layer, x = flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        for is_at_output in (False, True):
            output = layer(x)
            z = output.relu()
            (output if is_at_output else z).register_hook(HOOKS[what])
            views = fan_out(z, TASKS, to_both(reader, plain))
            sum(averaged(view).pow(2 + place).sum() for place, view in enumerate(views.values())).backward()
            torch.testing.assert_close(reader.norms(TASKS), plain.norms(TASKS), rtol=1e-12, atol=0)
            reader.clear()
            plain.clear()


def test_a_task_may_leave_the_layer_out() -> None:
    layer, other, x = flat(), flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        z, past = layer(x), other(x)
        for task in TASKS:
            of = past if task == "seg" else z
            to_both(reader, plain)(task, [of], [torch.ones_like(of)])
        norms = reader.norms(TASKS)
        assert norms[0] == 0
        torch.testing.assert_close(norms, plain.norms(TASKS), rtol=1e-12, atol=0)


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16])
def test_a_cast_may_lie_between_layer_and_pooling(to: torch.dtype) -> None:
    layer, x = nn.Conv2d(INPUTS, OUTPUTS, 3), noise(4, INPUTS, 9, 10).float()
    with both_readers(layer) as (reader, plain):
        z = layer(x).relu().to(to)
        views = fan_out(z, TASKS, to_both(reader, plain))
        sum(averaged(view).pow(2 + place).sum() for place, view in enumerate(views.values())).backward()
        torch.testing.assert_close(reader.norms(TASKS), plain.norms(TASKS), rtol=1e-5, atol=0)


def test_products_are_as_exact_within_autocast_as_without() -> None:
    """A manual backward pass is begun within Lightning's."""
    layer, x = nn.Conv2d(INPUTS, OUTPUTS, 3), noise(4, INPUTS, 9, 10).float()
    with both_readers(layer) as (reader, plain):
        z = layer(x).relu()
        views = fan_out(z, TASKS, to_both(reader, plain))
        loss = sum(averaged(view).pow(2 + place).sum() for place, view in enumerate(views.values()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()  # type: ignore[union-attr]
            norms = reader.norms(TASKS)
        torch.testing.assert_close(norms, plain.norms(TASKS), rtol=1e-6, atol=0)


def test_heads_may_begin_with_pooling_of_their_own_behind_something_of_their_own() -> None:
    """Without names for the heads, nobody knows where the trunk ends: the tasks' ways are followed up to where they part."""
    layer, x = flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        z = layer(x).relu()
        for place, task in enumerate(TASKS):
            loss = averaged(z.sigmoid() if task == "depth" else z).pow(2 + place).sum()
            to_both(reader, plain)(task, [loss], [torch.ones_like(loss)])
        assert set(reader._numbers) == {*TASKS} - {"depth"}
        torch.testing.assert_close(reader.norms(TASKS), plain.norms(TASKS), rtol=1e-12, atol=0)


def test_a_loss_that_is_not_finite_shows_and_ends_nothing() -> None:
    layer, x = flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        for factor in (torch.nan, torch.inf, 1.0):
            z = averaged(layer(x).relu())
            heads = heads_for(z)
            views = fan_out(z, heads, to_both(reader, plain))
            losses = [heads[task](views[task]).square().mean() for task in heads]
            (sum(losses[1:]) + factor * losses[0]).backward()  # type: ignore[union-attr]
            found = reader.norms(TASKS)
            assert bool(found[0].isfinite()) is (factor == 1.0)
            torch.testing.assert_close(found, plain.norms(TASKS), rtol=1e-12, atol=0, equal_nan=True)
            reader.clear()
            plain.clear()


@pytest.mark.parametrize("ill", [0, 1, 2, 5])
@pytest.mark.parametrize("sample", [0, 1])
def test_one_sample_that_is_not_finite_spoils_its_task_alone(ill: int, sample: int) -> None:
    layer, x = flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        z = averaged(layer(x))
        for place, task in enumerate(TASKS):
            D = z.detach() ** (1 + place)
            D[1] *= place == ill  # of this sample the others tell nothing
            D[sample] *= torch.nan if place == ill else 1.0
            to_both(reader, plain)(task, [z], [D])
        found = reader.norms(TASKS)
        assert found.isfinite().tolist() == [place != ill for place in range(len(TASKS))]
        torch.testing.assert_close(found, plain.norms(TASKS), rtol=1e-12, atol=0, equal_nan=True)


def test_several_passes_of_one_step_add_up_as_gradients_do() -> None:
    layer, x = flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        for part in x.split(2):
            z = averaged(layer(part).relu())
            heads = heads_for(z)
            for again in (True, False):
                views = fan_out(z, heads, to_both(reader, plain))
                sum(heads[task](views[task]).square().mean() for task in heads).backward(retain_graph=again)
            reader.rescale("seg", torch.tensor(0.5))
            plain.rescale("seg", torch.tensor(0.5))
            reader.forget()
            plain.forget()
        torch.testing.assert_close(reader.norms(TASKS), plain.norms(TASKS), rtol=1e-12, atol=0)
        torch.testing.assert_close(reader.rows(TASKS, x), plain.rows(TASKS, x), rtol=1e-12, atol=1e-15)


def test_a_gradient_that_is_read_after_it_was_complete_is_an_error() -> None:
    layer, x = flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, _):
        z = averaged(layer(x))
        reader.read("seg", [z], [torch.ones_like(z)])
        reader.close("seg")
        with pytest.raises(RuntimeError, match="read again after it was said to be complete"):
            reader.read("seg", [z], [torch.ones_like(z)])


def test_single_precision_loses_no_more_digits_than_the_gradient_itself() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(16, 32, 3, padding=1), torch.randn(8, 16, 14, 14).relu()
    exact = nn.Conv2d(16, 32, 3, padding=1, dtype=F64)
    exact.load_state_dict(layer.state_dict())
    with both_readers(layer) as (reader, _):
        z = averaged(F.gelu(layer(x)))
        v = torch.randn(len(TASKS), *z.shape)
        for task, of_task in zip(TASKS, v, strict=True):
            reader.read(task, [z], [of_task])
        assert len(reader._numbers) == len(TASKS)
        exact_z = averaged(F.gelu(exact(x.double())))
        expected = [
            torch.autograd.grad(exact_z, exact.weight, of_task.double(), retain_graph=True)[0].norm() for of_task in v
        ]
        torch.testing.assert_close(reader.norms(TASKS).double(), torch.stack(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["pooled", "different"])
@pytest.mark.parametrize("size", [1e-30, 1e-24, 1e-8, 1e8, 1e21])
def test_gradients_of_any_size_are_told_apart(size: float, kind: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(INPUTS, OUTPUTS, 3), torch.randn(4, INPUTS, 9, 9) / min(1.0, size * 1e15)
    with both_readers(layer) as (reader, plain):
        z = layer(x)
        for task in TASKS:
            D = size * (torch.randn(4, OUTPUTS, 1, 1).expand_as(z) if kind == "pooled" else torch.randn_like(z))
            to_both(reader, plain)(task, [z], [D])
        assert bool(reader._numbers) is (kind == "pooled")
        torch.testing.assert_close(reader.norms(TASKS), plain.norms(TASKS), rtol=2e-6, atol=0)
        assert bool((plain.norms(TASKS) > 0).all())


@pytest.mark.parametrize("light", [0.0, 1e-5])
def test_a_dark_picture_of_large_gradient_hides_no_others(light: float) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(INPUTS, OUTPUTS, 3), torch.randn(4, INPUTS, 9, 9)
    x[0] *= light
    with both_readers(layer) as (reader, plain):
        z = layer(x)
        for task in TASKS:
            D = torch.randn_like(z)
            D[0] = 1e7 * torch.randn(OUTPUTS, 1, 1)
            to_both(reader, plain)(task, [z], [D])
        torch.testing.assert_close(reader.norms(TASKS), plain.norms(TASKS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("shape", [(4, INPUTS, 9, 10), (2, INPUTS, 60, 70), (30, INPUTS, 9, 10)])
def test_no_more_is_made_at_a_time_than_was_set(
    shape: tuple[int, ...], stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = flat(stride=stride), noise(*shape)
    least = (OUTPUTS + 2 * x[0, 0].numel()) * layer.kernel_size[1] * 8  # of one channel of one sample
    monkeypatch.setattr(pooled, "_AT_ONCE", 2 * least)
    sizes: list[int] = []

    def patches(inputs: Tensor, layer: Any) -> Iterator[Tensor]:
        for U in true_patches(inputs, layer):
            sizes.append(U.untyped_storage().nbytes() + inputs.shape[0] * OUTPUTS * U.shape[2] * U.element_size())
            yield U

    true_patches = pooled.patches
    monkeypatch.setattr(pooled, "patches", patches)
    with both_readers(layer) as (reader, plain):
        z = averaged(layer(x))
        for place, task in enumerate(TASKS):
            to_both(reader, plain)(task, [z], [z.detach() ** place])
        torch.testing.assert_close(reader.norms(TASKS), plain.norms(TASKS), rtol=1e-12, atol=0)
    assert len(sizes) > 1
    assert max(sizes) <= 2 * least


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
def test_a_backward_pass_that_is_to_be_differentiated_leaves_no_graph_in_the_norms() -> None:
    layer, x = flat(), noise(4, INPUTS, 9, 10)
    with both_readers(layer) as (reader, plain):
        z = layer(x)
        views = fan_out(z, TASKS, to_both(reader, plain))
        sum(averaged(view).pow(2 + place).sum() for place, view in enumerate(views.values())).backward(
            create_graph=True
        )
        norms = reader.norms(TASKS)
        assert not norms.requires_grad
        torch.testing.assert_close(norms, plain.norms(TASKS).detach(), rtol=1e-12, atol=0)


class Pictures(WithoutTargets):
    """A convolution whose output the heads read by way of a mean, or a flat picture."""

    def __init__(self, is_pooled: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True))
        last = (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))) if is_pooled else None
        self.heads = nn.ModuleDict({task: last() if last else nn.Conv2d(6, 1, 1) for task in TASKS})
        self.double()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What has been said of the gradients that came to a layer where they may be pooled."""
    found: set[str] = set()
    true_note: Any = PooledGradients._note

    def note(self: PooledGradients, *arrived: Any) -> bool:
        is_pooled: bool = true_note(self, *arrived)
        found.add("pooled" if is_pooled else "different")
        return is_pooled

    monkeypatch.setattr(PooledGradients, "_note", note)
    return found


def pictures() -> list[Tensor]:
    return list(noise(8, 6, 3, 10, 10))


@pytest.mark.parametrize("is_pooled", [True, False])
@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_is_the_same_with_either_way_of_reading(
    quiet_trainer: Any,
    with_heads: bool,
    accumulate: int,
    is_pooled: bool,
    monkeypatch: pytest.MonkeyPatch,
    seen: set[str],
) -> None:
    heads = {task: f"heads.{task}" for task in TASKS} if with_heads else None
    found = {}
    for is_quick in (True, False):
        if not is_quick:
            monkeypatch.setattr(PooledGradients, "can_read", staticmethod(lambda *_: False))
        model, gradnorm = Pictures(is_pooled), GradNorm(TASKS, shared_layer="encoder.2", heads=heads)
        trainer = quiet_trainer(callbacks=[gradnorm], max_epochs=2, accumulate_grad_batches=accumulate)
        trainer.fit(model, Batches(pictures()))
        assert seen == {*(["pooled" if is_pooled else "different"] if is_quick else [])}
        seen.clear()
        found[is_quick] = [*gradnorm.weights.values(), *(p.detach() for p in model.parameters())]
    exact = {"rtol": 1e-9, "atol": 1e-12} if is_pooled else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found[True], found[False], **exact)


@pytest.mark.parametrize("is_pooled", [True, False])
def test_a_resumed_training_goes_on_to_the_bit(quiet_trainer: Any, is_pooled: bool, tmp_path: Any) -> None:
    def train(epochs: int, **options: Any) -> list[Any]:
        model, gradnorm = Pictures(is_pooled), GradNorm(TASKS, shared_layer="encoder.2")
        trainer = quiet_trainer(callbacks=[gradnorm], max_epochs=epochs)
        trainer.fit(model, Batches(pictures()), **options)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return [*gradnorm.weights.values(), *(p.detach() for p in model.parameters())]

    whole = train(3)
    train(1)
    resumed = train(3, ckpt_path=tmp_path / "1.ckpt")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


class ByHand(Pictures):
    """Manual optimization, in which much may happen between two passes."""

    def __init__(self, what: str, gradnorm: GradNorm) -> None:
        super().__init__(is_pooled=True)
        self.automatic_optimization = False
        self.what, self.watch = what, gradnorm.watch

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        losses = super().training_step(batch, 0)
        del losses["loss"]
        return losses

    def pass_back(self, batch: Tensor) -> None:
        losses = self.losses(batch)
        self.watch(losses)
        self.manual_backward(torch.stack(list(losses.values())).sum(), create_graph=self.what == "create_graph")

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if self.what == "other padding" and batch_idx == 1:
            layer: Any = self.encoder[2]
            layer.padding_mode, layer.padding, layer._reversed_padding_repeated_twice = "circular", (1, 1), [1] * 4
        batch = batch[: 0 if self.what == "an empty batch" and batch_idx == 1 else None].clone()
        if self.what == "task by task":
            losses = self.losses(batch)
            self.watch(losses)
            for loss in losses.values():
                self.manual_backward(loss, retain_graph=True)
                self.encoder(batch)
        else:
            self.pass_back(batch)
        if self.what == "two passes":
            self.pass_back(batch.flip(3))
        if self.what == "a batch that is used up":
            batch.zero_()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
@pytest.mark.filterwarnings("ignore:.*is not finite")
@pytest.mark.parametrize(
    "what",
    ["two passes", "task by task", "an empty batch", "a batch that is used up", "other padding", "create_graph"],
)
def test_whatever_a_module_does_by_hand(
    quiet_trainer: Any, what: str, monkeypatch: pytest.MonkeyPatch, seen: set[str]
) -> None:
    found = {}
    for is_quick in (True, False):
        if not is_quick:
            monkeypatch.setattr(PooledGradients, "can_read", staticmethod(lambda *_: False))
        gradnorm = GradNorm(TASKS, shared_layer="encoder.2", alpha=0.0)
        model = ByHand(what, gradnorm)
        quiet_trainer(callbacks=[gradnorm], max_epochs=1).fit(model, Batches(pictures()[:4]))
        assert ("pooled" in seen) is is_quick
        seen.clear()
        found[is_quick] = [*gradnorm.weights.values(), *(p.detach() for p in model.parameters())]
    torch.testing.assert_close(found[True], found[False], rtol=1e-9, atol=1e-12, equal_nan=True)
