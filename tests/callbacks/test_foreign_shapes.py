"""Shapes of networks that nobody made for this callback: a few steps of each, against the double-backward textbook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from harness import Batches, BeforeBatch, MemoryLogger, Recorder, assert_agrees, seed
from models import network_sgd
from shapes import (
    BEHIND,
    CALLS,
    CHECKPOINTS,
    IN_PLACE,
    INSIDE,
    LAYERS,
    REENTRANT,
    SURROUNDINGS,
    TIED,
    Case,
    Checkpointed,
    Scaled,
    Shape,
    normed,
    normed_readout,
    plain_layer,
    simple,
)
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_gradnorm import GradNorm
from lightning_gradnorm.engine.engine import Engine

STEPS = 6
MakeTrainer = Callable[..., L.Trainer]


def table(cases: Mapping[str, Case]) -> Any:
    """One row for each case, without and with `heads=` where both are possible; one of the two is fast, in turn."""
    rows = []
    for place, (name, case) in enumerate(cases.items()):
        fast = case.modes[place % len(case.modes)]
        for heads in case.modes:
            marks = case.marks if heads == fast else (*case.marks, pytest.mark.slow)
            rows.append(pytest.param(case, heads, id=f"{name}, heads" if heads else name, marks=marks))
    return pytest.mark.parametrize(("case", "heads"), rows)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, also of what torch.compile has wrapped."""
    return {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}


def learn(
    case: Case,
    batches: Sequence[Any],
    optimizer: Callable[[Any], Any] = lambda twin: network_sgd(twin.parameters()),
    **options: Any,
) -> tuple[Any, textbook.Trajectory]:
    """Train the twin as the textbook says; the fused attention kernels cannot be differentiated twice."""
    twin = case.make().for_textbook()
    named = dict(twin.named_parameters())
    shared = [named[name] for name in case.W]
    with sdpa_kernel(SDPBackend.MATH):
        options = {"before_micro_batch": seed, **options}
        trajectory = textbook.train(twin, twin.forward_for_textbook, batches, shared, optimizer(twin), **options)
    moved = max(abs(weight - 1.0) for weight in trajectory.weights[-1].values())
    assert moved > 1e-3, "the oracle's weights did not move: this test would prove nothing"
    return twin, trajectory


def fit(
    trainer: MakeTrainer, model: Any, gradnorm: GradNorm, batches: Sequence[Any], accumulate: int = 1, **options: Any
) -> tuple[Recorder, MemoryLogger]:
    """Train; the masks of dropout are drawn from a seed for each batch, as the textbook draws them."""
    recorder, logger = Recorder(gradnorm, accumulate), MemoryLogger()
    callbacks = [BeforeBatch(seed), gradnorm, recorder]
    options = {"callbacks": callbacks, "logger": logger, "accumulate_grad_batches": accumulate, **options}
    trainer(**options).fit(model, Batches(batches))
    return recorder, logger


def balance(model: Any, case: Case, heads: bool, **options: Any) -> GradNorm:
    return GradNorm(list(model.tasks), shared_layer=case.layer, heads=case.heads if heads else None, **options)


def assert_trains_as_the_textbook_says(
    trainer: MakeTrainer,
    case: Case,
    heads: bool,
    optimizer: Callable[[Any], Any] = lambda twin: network_sgd(twin.parameters()),
    accumulate: int = 1,
    norm_of: Any = "weight",
    **options: Any,
) -> None:
    """The norms and the weights of every step, and the parameters and buffers at the end."""
    batches = case.batches(STEPS * accumulate)
    twin, trajectory = learn(case, batches, optimizer, accumulate=accumulate, norm_of=norm_of)
    model = case.make()
    gradnorm = balance(model, case, heads, norm_of=norm_of)
    recorder, logger = fit(trainer, model, gradnorm, batches, accumulate, **options)

    for task in model.tasks:
        norms = [step[task] for step in trajectory.grad_norms]
        assert logger.scalars[f"gradnorm/grad_norm/{task}"] == pytest.approx(norms, rel=1e-6)
    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-8, state=whole_state)


@table(LAYERS)
def test_the_shared_layer_may_be(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@table(SURROUNDINGS)
def test_around_the_shared_layer_there_may_be(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@table(CALLS | BEHIND)
def test_encoder_and_heads_may_be_called_with(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@table(CHECKPOINTS)
def test_activations_may_be_checkpointed_in(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


AT_Z = {
    **CALLS,
    "the heads run twice": replace(CALLS["the heads run twice"], modes=(False,)),
    "the heads, named, run twice": replace(
        CALLS["the heads run twice"],
        modes=(True,),
    ),
}
del AT_Z["a dataclass"]  # of which torch does not see the tensors


@table(AT_Z)
def test_the_norm_may_be_taken_at_a_representation_where(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads, norm_of="activation")


@pytest.mark.slow
@table({name: replace(case, marks=()) for name, case in CHECKPOINTS.items()})
def test_the_norm_may_be_taken_at_the_representation_with_checkpoints_in(
    case: Case, heads: bool, quiet_trainer: MakeTrainer
) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads, norm_of="activation")


@pytest.mark.slow
@table(LAYERS | SURROUNDINGS | CALLS | CHECKPOINTS)
def test_two_batches_may_make_one_step_with(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads, accumulate=2)


def with_heads(cases: Mapping[str, Case], heads: bool) -> Any:
    return table({name: replace(case, modes=(heads,)) for name, case in cases.items()})


@with_heads(IN_PLACE, False)
def test_a_head_may_begin_in_place_without_heads(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@with_heads(IN_PLACE, True)
def test_a_head_that_begins_in_place_is_refused_with_heads(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    """What it overwrites, those after it read: the tasks cannot be told apart at the heads."""
    model = case.make()
    with pytest.raises(ValueError, match=r"changes the representation in place.*inplace=False, or leave heads out"):
        fit(quiet_trainer, model, balance(model, case, heads), case.batches(1))


@with_heads(TIED, False)
def test_without_heads_the_gradient_of_a_tied_weight_is_the_whole_one(
    case: Case, heads: bool, quiet_trainer: MakeTrainer
) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@with_heads(TIED, True)
def test_with_heads_a_tied_weight_is_refused(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    model = case.make()
    with pytest.raises(ValueError, match="reaches the shared layer by a way that does not pass its head"):
        fit(quiet_trainer, model, balance(model, case, heads), case.batches(1))


def test_a_dataclass_that_torch_does_not_know_is_refused_with_heads(quiet_trainer: MakeTrainer) -> None:
    case = CALLS["a dataclass"]
    model = case.make()
    with pytest.raises(ValueError, match=r"does not pass its head as far as one can see.*Leave heads out"):
        fit(quiet_trainer, model, balance(model, case, heads=True), case.batches(1))


def test_the_attention_that_is_trained_is_the_fused_one() -> None:
    for name, fused in {
        "F.scaled_dot_product_attention in the trunk": 1,
        "F.scaled_dot_product_attention in the heads": 3,
        "MultiheadAttention in the heads": 3,
        "TransformerEncoderLayer": 1,
    }.items():
        case = SURROUNDINGS[name]
        model = case.make()
        losses = model.task_losses(case.batches(1)[0])
        assert sum("Flash" in node for node in node_names(losses.values())) == fused, name


def node_names(tensors: Iterable[Tensor]) -> list[str]:
    """The names of all nodes of the graph above these tensors."""
    seen: set[Any] = set()
    to_visit: list[Any] = [tensor.grad_fn for tensor in tensors]
    while to_visit:
        node = to_visit.pop()
        if node is not None and node not in seen:
            seen.add(node)
            to_visit.extend(following for following, _ in node.next_functions)
    return [node.name() for node in seen]


@table({name: case for name, case in SURROUNDINGS.items() if "Norm" in name or "Dropout" in name})
def test_nothing_is_computed_or_drawn_twice(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    model, plain = case.make(), case.make()
    states = []
    for one, callbacks in ((model, [balance(model, case, heads)]), (plain, [])):
        torch.manual_seed(5)
        quiet_trainer(callbacks=callbacks).fit(one, Batches(case.batches(STEPS)))
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "the callback has drawn random numbers"
    counts = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(count == STEPS for count in counts)
    assert counts or "Norm" not in str(model)


class Counted(nn.Module):
    """A parametrization that counts how often the weight is computed."""

    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight


@pytest.mark.parametrize("heads", [False, True], ids=["no heads", "heads"])
@pytest.mark.parametrize(
    "layer",
    ["encoder.layer", None],
)
def test_a_parametrized_weight_is_computed_once_in_a_step(
    layer: str | None, heads: bool, quiet_trainer: MakeTrainer
) -> None:
    case = replace(LAYERS["Linear"], layer=layer)
    model, counted = case.make(), Counted()
    nn.utils.parametrize.register_parametrization(model.encoder.layer, "weight", counted)
    counted.calls = 0
    fit(quiet_trainer, model, balance(model, case, heads), case.batches(STEPS))
    assert counted.calls == STEPS


# ---- reentrant checkpoints and recomputation -------------------------------------------------------------------------


@table(REENTRANT)
def test_a_reentrant_checkpoint_through_which_nothing_can_be_read_is_refused(
    case: Case, heads: bool, quiet_trainer: MakeTrainer
) -> None:
    """By torch, or by the callback: in any case the message says what to do."""
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

    def counted(engine: Engine[Any], task: str, *args: Any) -> object:
        readings.append(task)
        return read(engine, task, *args)

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
    """What comes before the shared layer is compiled; reading does not get so far."""

    def __init__(self) -> None:
        super().__init__(plain_layer)
        self.stem_of_its_own = self.encoder.stem
        self.encoder.stem = torch.compile(self.encoder.stem, backend="aot_eager")

    def for_textbook(self) -> Shape:
        self.encoder.stem = self.stem_of_its_own
        return self


@compiling
@pytest.mark.parametrize("heads", [False, True], ids=["no heads", "heads"])
def test_what_comes_before_the_shared_layer_may_be_compiled(heads: bool, quiet_trainer: MakeTrainer) -> None:
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


class Quasi(Shape):
    """LBFGS evaluates the network several times in one step, and expects the same function each time."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


def test_lbfgs_which_evaluates_the_losses_several_times_in_one_step_is_refused(quiet_trainer: MakeTrainer) -> None:
    case = Case(lambda: Quasi(plain_layer))
    model = case.make()
    with pytest.raises(ValueError, match="LBFGS evaluates the losses several times within one step"):
        fit(quiet_trainer, model, balance(model, case, False), case.batches(1))
