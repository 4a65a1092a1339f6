"""Ways to run and optimize a network that was not written for this callback: recomputed, compiled, scheduled, clipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import textbook
import torch
from foreign import (
    STEPS,
    MakeTrainer,
    assert_trains_as_the_textbook_says,
    balance,
    fit,
    node_names,
    table,
    whole_state,
)
from harness import Batches, assert_agrees
from models import network_sgd
from shapes import Case, Shape, plain_layer, simple
from shapes.calls import Scaled
from shapes.checkpoints import INSIDE, REENTRANT, Checkpointed
from shapes.surroundings import normed, normed_readout
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from lightning_gradnorm.engine.engine import Engine

# ---- reentrant checkpoints and recomputation -------------------------------------------------------------------------


@table(REENTRANT)
def test_a_reentrant_checkpoint_that_hides_the_gradients_is_an_error(
    case: Case, heads: bool, quiet_trainer: MakeTrainer
) -> None:
    """By torch, or by the callback: in either case the message explains what to do."""
    model = case.make()
    with pytest.raises((ValueError, RuntimeError), match=r"use_reentrant=False"):
        fit(quiet_trainer, model, balance(model, case, heads), case.batches(1))


NORM_IN_HEADS = simple(plain_layer, head=lambda: Checkpointed(normed_readout(), use_reentrant=False))
RECOMPUTED = {
    "its head": replace(NORM_IN_HEADS, modes=(True,)),
    "its head, unnamed": replace(NORM_IN_HEADS, modes=(False,)),
    "the encoder": simple(lambda: Checkpointed(normed(), use_reentrant=False), **INSIDE),
}


@table(RECOMPUTED)
def test_a_checkpointed_batch_norm_sees_no_more_batches_than_without_the_callback(
    case: Case, heads: bool, quiet_trainer: MakeTrainer
) -> None:
    counts = []
    for balanced in (True, False):
        model = case.make()
        quiet_trainer(callbacks=[balance(model, case, heads)] if balanced else []).fit(model, Batches(case.batches(3)))
        counts.append({name: int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")})
    assert counts[0] == counts[1] == dict.fromkeys(counts[1], 6), "once in forward and once in backward"


# ---- torch.compile ---------------------------------------------------------------------------------------------------

COMPILED = simple(plain_layer, head=Scaled)
"""Heads of a class of its own: torch.compile does not look into a bare nn.Sequential."""


def compile_heads(model: Any, case: Case, way: str, graphs: list[Any]) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    for name in case.heads.values():
        head = model.get_submodule(name)
        if way.startswith("head.compile"):
            head.compile(backend=backend, fullgraph="fullgraph" in way)
        else:
            setattr(model, name, torch.compile(head, backend=backend, fullgraph="fullgraph" in way))


COMPILES = [
    "head.compile()",
    "torch.compile(head)",
    "head.compile(fullgraph=True)",
    "torch.compile(head, fullgraph=True)",
]


def compiling(test: Any) -> Any:
    test = pytest.mark.usefixtures("fresh_compiler")(test)
    test = pytest.mark.filterwarnings("ignore:.*should not be instantiated")(test)
    return pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")(test)  # torch's own


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@compiling
@pytest.mark.parametrize("way", COMPILES)
def test_a_second_callback_on_the_same_compiled_heads_reads_its_own_numbers(
    way: str, quiet_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = COMPILED
    graphs: list[Any] = []
    readings: list[str] = []
    read = Engine._read

    def counted(engine: Engine[Any], task: str, *args: Any, **kwargs: Any) -> object:
        readings.append(task)
        return read(engine, task, *args, **kwargs)

    monkeypatch.setattr(Engine, "_read", counted)
    model, twin = case.make(), case.make()
    compile_heads(model, case, way, graphs)
    weights = []
    for draw, every in ((1, 1), (2, 3)):
        batches = case.batches(STEPS, draw)
        shared = [dict(twin.named_parameters())[name] for name in case.W]
        optimizer = network_sgd(twin.parameters())
        trajectory = textbook.train(twin, twin.forward_for_textbook, batches, shared, optimizer, update_every=every)
        gradnorm = balance(model, case, heads=True, update_every=every)
        readings.clear()
        recorder, _ = fit(quiet_trainer, model, gradnorm, batches)
        assert_agrees(recorder, model, trajectory, twin, tolerance=1e-8, state=whole_state)
        measured = len(range(0, STEPS, every))
        assert sorted(readings) == sorted(measured * list(model.tasks)), "read once for each task, by one callback"
        weights.append((gradnorm, gradnorm.weights))
    assert any("linear" in str(graph.code) for graph in graphs), "the heads were compiled"

    batch, plain = case.batches(1, 3)[0], case.make()
    plain.load_state_dict(whole_state(model))
    readings.clear()
    for one in (model, plain):
        one.zero_grad()
        torch.stack(list(one.task_losses(batch).values())).sum().backward()
    for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-12, atol=1e-14)
    assert not readings, "training is over"
    assert all(gradnorm.weights == final for gradnorm, final in weights)


@compiling
def test_the_compiler_sees_the_heads_and_not_the_callback(quiet_trainer: MakeTrainer) -> None:
    graphs: list[Any] = []
    model = COMPILED.make()
    compile_heads(model, COMPILED, "head.compile()", graphs)
    fit(quiet_trainer, model, balance(model, COMPILED, heads=True), COMPILED.batches(2))
    assert len(graphs) == 1, "the three heads share one graph"


@compiling
@pytest.mark.parametrize("way", ["head.compile()", "torch.compile(head)"])
def test_compiled_heads_are_refused_without_heads(way: str, quiet_trainer: MakeTrainer) -> None:
    model = COMPILED.make()
    compile_heads(model, COMPILED, way, [])
    with pytest.raises(ValueError, match=r"through a module compiled with torch\.compile.*Name the heads with heads="):
        fit(quiet_trainer, model, balance(model, COMPILED, heads=False), COMPILED.batches(1))


class CompiledStem(Shape):
    """Modules before the shared layer are compiled; reading does not get that far."""

    def __init__(self) -> None:
        super().__init__(plain_layer)
        self.stem_of_its_own = self.encoder.stem
        self.encoder.stem = torch.compile(self.encoder.stem, backend="aot_eager")

    def for_textbook(self) -> Shape:
        self.encoder.stem = self.stem_of_its_own
        return self


@compiling
@pytest.mark.parametrize("heads", [False, True], ids=["no heads", "heads"])
def test_modules_before_the_shared_layer_may_be_compiled(heads: bool, quiet_trainer: MakeTrainer) -> None:
    case = Case(CompiledStem)
    losses = case.make().task_losses(case.batches(1)[0])
    assert "CompiledFunctionBackward" in node_names(losses.values())
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


# ---- how the network is optimized ------------------------------------------------------------------------------------


def two_groups(model: Any) -> torch.optim.Optimizer:
    heads = [p for name, p in model.named_parameters() if "head" in name]
    return torch.optim.SGD(
        [{"params": model.encoder.parameters(), "lr": 0.05}, {"params": heads}], lr=0.01, momentum=0.9
    )


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)


class Scheduled(Shape):
    """Two parameter groups, and a schedule by step."""

    def configure_optimizers(self) -> Any:
        optimizer = two_groups(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving(optimizer), "interval": "step"}}


def before_each_step(do: Callable[[Any], object]) -> Callable[[Any], torch.optim.Optimizer]:
    def make(twin: Any) -> torch.optim.Optimizer:
        optimizer = network_sgd(twin.parameters())
        optimizer.register_step_pre_hook(lambda *_: do(list(twin.parameters())) and None)
        return optimizer

    return make


def scheduled(twin: Any) -> torch.optim.Optimizer:
    optimizer = two_groups(twin)
    scheduler = halving(optimizer)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


@pytest.mark.parametrize("heads", [False, True], ids=["no heads", "heads"])
@pytest.mark.parametrize(
    ("make", "optimizer", "options"),
    [
        (
            Shape,
            before_each_step(lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.3)),
            {"gradient_clip_val": 0.3},
        ),
        (
            Shape,
            before_each_step(lambda parameters: nn.utils.clip_grad_value_(parameters, 0.05)),
            {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        ),
        (Scheduled, scheduled, {}),
        (Shape, lambda twin: network_sgd(twin.parameters()), {"detect_anomaly": True}),
    ],
    ids=["clipping by norm", "clipping by value", "two parameter groups and a schedule", "anomaly detection"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_the_network_may_be_optimized_with(
    make: type[Shape], optimizer: Any, options: dict[str, Any], heads: bool, quiet_trainer: MakeTrainer
) -> None:
    case = Case(lambda: make(plain_layer))
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads, optimizer=optimizer, **options)
