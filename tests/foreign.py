"""Networks that were not written for this callback, in the Trainer and in the textbook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import textbook
from harness import Batches, BeforeBatch, MemoryLogger, Recorder, assert_agrees, seed
from models import network_sgd
from shapes import Case
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_gradnorm import GradNorm

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
    """Train the twin with the textbook; the fused attention kernels cannot be differentiated twice."""
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


def with_heads(cases: Mapping[str, Case], heads: bool) -> Any:
    return table({name: replace(case, modes=(heads,)) for name, case in cases.items()})


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
