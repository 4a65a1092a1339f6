"""`Balancer` in two processes without Lightning gives the numbers of one process on the concatenated batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import (
    Network,
    all_reduce_gradients,
    distance,
    gradnorm_rule,
    on_two_ranks,
    parameter_distance,
    shares,
    train,
)
from models import TASKS, Batch, network_sgd, vector_batches
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm import Balancer
from lightning_gradnorm.strategies import AggregationRule, ScalarizationRule

STEPS = 12
RULES: dict[str, Callable[[], Any]] = {
    "GradNorm": gradnorm_rule,
    "UW": lambda: ScalarizationRule(TASKS[:3], S.UW(3)),
    "UPGrad": lambda: AggregationRule(TASKS[:3], A.UPGrad()),
    "UPGrad at the parameters": lambda: AggregationRule(TASKS[:3], A.UPGrad(), of_parameters=True),
}


def train_on_rank(
    rank: int,
    batches: Sequence[Batch],
    make: Callable[[], Any],
    *,
    with_ddp: bool,
    heads: bool,
    accumulate: int = 1,
    prepare: bool = False,
    ddp: Mapping[str, bool] | None = None,
) -> Any:
    model = Network()
    called: Any = DistributedDataParallel(model, **(ddp or {})) if with_ddp else model
    optimizer, weights = network_sgd(model.parameters()), []
    with Balancer(called, make(), heads=model.heads() if heads else None) as balancer:
        for index, batch in enumerate(shares(batches, rank, accumulate)):
            last = (index + 1) % accumulate == 0
            if with_ddp:
                called.require_backward_grad_sync = last  # what no_sync() sets
            losses = called(batch)
            if prepare:
                (balancer.prepare_loss(losses) / accumulate).backward()
            else:
                balancer.backward(losses, backward=lambda loss: (loss / accumulate).backward())
            if last:
                if not with_ddp:
                    all_reduce_gradients(model)
                optimizer.step()
                balancer.step()
                optimizer.zero_grad()
                weights.append(balancer.weights)
    return weights, model


@pytest.mark.each_value_once
@pytest.mark.parametrize("with_ddp", [True, False], ids=["DDP", "all-reduce by hand"])
@pytest.mark.parametrize(
    ("name", "heads", "accumulate"),
    [
        ("GradNorm", True, 1),
        ("GradNorm", True, 2),
        ("GradNorm", False, 2),
        ("UW", False, 1),
        ("UPGrad", True, 1),
        ("UPGrad", False, 1),
        ("UPGrad at the parameters", True, 1),
        ("UPGrad at the parameters", False, 2),
    ],
)
def test_two_processes_agree_with_one(name: str, heads: bool, accumulate: int, with_ddp: bool, tmp_path: Path) -> None:
    batches = vector_batches(3, STEPS, size=8)
    options: dict[str, Any] = {"with_ddp": with_ddp, "heads": heads, "accumulate": accumulate}
    first, second = on_two_ranks(partial(train_on_rank, batches=batches, make=RULES[name], **options), tmp_path)
    model = Network()
    expected, _ = train(model, RULES[name](), batches, heads=model.heads() if heads else None)
    assert first[0] == second[0]
    assert parameter_distance(first[1], second[1]) == 0
    assert distance(first[0], expected) <= 1e-9
    assert parameter_distance(first[1], model) <= 1e-9


@pytest.mark.parametrize("make", [gradnorm_rule, RULES["UPGrad at the parameters"]], ids=["GradNorm", "UPGrad"])
def test_two_processes_agree_with_one_when_somebody_else_back_propagates(make: Any, tmp_path: Path) -> None:
    """`prepare_loss` learns from the autograd engine when the pass is over, as DDP itself does."""
    batches = vector_batches(3, STEPS, size=8)
    options: dict[str, Any] = {"with_ddp": True, "heads": True, "accumulate": 2, "prepare": True}
    first, second = on_two_ranks(partial(train_on_rank, batches=batches, make=make, **options), tmp_path)
    model = Network()
    expected, _ = train(model, make(), batches)
    assert first[0] == second[0]
    assert distance(first[0], expected) <= 1e-9
    assert parameter_distance(first[1], model) <= 1e-9


@pytest.mark.parametrize("name", ["GradNorm", "UPGrad at the parameters"])
def test_heads_stay_apart_where_ddp_joins_its_outputs_in_one_node(name: str, tmp_path: Path) -> None:
    """In the graph, each loss then reaches the parameters of all heads. Its gradient does not."""
    batches = vector_batches(3, STEPS, size=8)
    options: dict[str, Any] = {"with_ddp": True, "heads": False, "ddp": {"find_unused_parameters": True}}
    first, second = on_two_ranks(partial(train_on_rank, batches=batches, make=RULES[name], **options), tmp_path)
    model = Network()
    expected, _ = train(model, RULES[name](), batches)
    assert first[0] == second[0]
    assert distance(first[0], expected) <= 1e-9
    assert parameter_distance(first[1], model) <= 1e-9


def _static(rank: int, name: str, batches: Sequence[Batch]) -> str:
    try:
        train_on_rank(rank, batches, RULES[name], with_ddp=True, heads=False, ddp={"static_graph": True})
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("name", ["GradNorm", "UPGrad at the parameters"])
def test_a_pass_that_would_let_ddp_average_too_early_is_refused(name: str, tmp_path: Path) -> None:
    for told in on_two_ranks(partial(_static, name=name, batches=vector_batches(3, 2, size=8)), tmp_path):
        assert "an output of DistributedDataParallel(static_graph=True)" in told, told


def _shown_inside(rank: int, batches: Sequence[Batch]) -> Any:
    """Show the losses in the forward pass, where DDP has not joined them yet."""
    model, weights = Network(), []
    called = DistributedDataParallel(model, static_graph=True)
    optimizer = network_sgd(model.parameters())
    with Balancer(called, gradnorm_rule(), heads=None) as balancer:
        forward = model.forward

        def shown(batch: Batch) -> dict[str, Tensor]:
            balancer.watch(losses := forward(batch))
            return losses

        model.forward = shown  # type: ignore[method-assign]
        for batch in shares(batches, rank):
            balancer.backward(loss=sum(called(batch).values()))
            optimizer.step()
            balancer.step()
            optimizer.zero_grad()
            weights.append(balancer.weights)
        del model.forward
    return weights, model


def test_losses_shown_in_the_forward_pass_may_be_of_a_static_graph(tmp_path: Path) -> None:
    batches, model = vector_batches(3, STEPS, size=8), Network()
    first, second = on_two_ranks(partial(_shown_inside, batches=batches), tmp_path)
    expected, _ = train(model, gradnorm_rule(), batches)
    assert first[0] == second[0]
    assert distance(first[0], expected) <= 1e-9
    assert parameter_distance(first[1], model) <= 1e-9


class Checkpointed(Network):
    """Recomputes its encoder in the backward pass."""

    use_reentrant = True

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        encoder = self.encoder
        trunk = partial(checkpoint, encoder, use_reentrant=self.use_reentrant)
        self._modules["encoder"] = _Calls(encoder, trunk)
        try:
            return super().forward(batch)
        finally:
            self._modules["encoder"] = encoder


class _Calls(nn.Module):
    def __init__(self, encoder: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.call = encoder, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x.clone().requires_grad_())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("heads", [True, False])
def test_prepare_loss_works_with_activation_checkpoints(use_reentrant: bool, heads: bool) -> None:
    """A reentrant checkpoint runs a backward pass within the pass; the end of the outer one is what counts."""
    batches, model, plain = vector_batches(3, STEPS), Checkpointed(), Network()
    model.use_reentrant = use_reentrant

    def prepared(balancer: Balancer, losses: dict[str, Tensor], n: int) -> None:
        balancer.prepare_loss(losses).backward()

    found, _ = train(
        model,
        gradnorm_rule(),
        batches,
        backpropagate=prepared,
        heads=model.heads() if heads else None,
        shared_layer="encoder.2",
    )
    expected, _ = train(plain, gradnorm_rule(), batches)
    assert distance(found, expected) <= 1e-9
    assert parameter_distance(model, plain) <= 1e-9


# ---- wrong input -----------------------------------------------------------------------------------------------------


def _refusal(rank: int, make: Callable[[int], Any]) -> str:
    try:
        make(rank)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def _in_another_order(rank: int) -> Balancer:
    return Balancer(Network(), gradnorm_rule() if rank == 0 else type(gradnorm_rule())(TASKS[2::-1]))


def _with_another_layer(rank: int) -> Balancer:
    return Balancer(Network(), gradnorm_rule(), shared_layer=f"encoder.{2 * rank}")


def _with_other_weights(rank: int) -> Balancer:
    return Balancer(Network(), gradnorm_rule(initial_weights={"seg": 1.0 + rank, "depth": 1.0, "normal": 1.0}))


def _with_incomplete_heads(rank: int) -> Balancer:
    return Balancer(Network(), gradnorm_rule(), heads=Network().heads() if rank == 0 else {"seg": "seg_head"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            _in_another_order,
            r"all ranks should have the same tasks; rank 0 has \['seg', 'depth', 'normal'\], rank 1 has",
        ),
        (
            _with_another_layer,
            "all ranks should have the same shared_layer; rank 0 has encoder.0, rank 1 has encoder.2",
        ),
        (
            _with_other_weights,
            r"all ranks should have the same initial weights; rank 0 has \[1.0, 1.0, 1.0\], rank 1 has",
        ),
        (_with_incomplete_heads, "all ranks should have the same heads; rank 0 has"),
    ],
)
def test_ranks_that_disagree_are_an_error_on_all_of_them(
    make: Callable[[int], Any], message: str, tmp_path: Path
) -> None:
    for told in on_two_ranks(partial(_refusal, make=make), tmp_path):
        assert told.startswith("Balancer: ")
        assert re.search(message, told), told
        assert told.endswith("Build the model and the rule in the same way on every rank.")


def _uneven_ranks(rank: int, batches: Sequence[Batch]) -> Any:
    """Rank 0 has one micro-batch of each batch's three parts, rank 1 has two; neither divides."""
    model, weights = Network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with Balancer(model, gradnorm_rule(), heads=model.heads()) as balancer:
        for batch in batches:
            for micro in [0] if rank == 0 else [1, 2]:
                balancer.backward(model({name: value.chunk(3)[micro] for name, value in batch.items()}))
            all_reduce_gradients(model)
            optimizer.step()
            balancer.step()
            optimizer.zero_grad()
            weights.append(balancer.weights)
    return weights, model


def test_ranks_with_different_numbers_of_micro_batches_have_the_same_weights(tmp_path: Path) -> None:
    batches, model = vector_batches(3, STEPS, size=9), Network()
    first, second = on_two_ranks(partial(_uneven_ranks, batches=batches), tmp_path)
    # The gradients that are added up are those of three micro-batches, and are then divided by two ranks.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02 * 3 / 2)
    expected, _ = train(model, gradnorm_rule(), batches, optimizer=optimizer)
    assert first[0] == second[0]
    assert distance(first[0], expected) <= 1e-9
    assert parameter_distance(first[1], model) <= 1e-9


def _rank_without_tasks(rank: int, batches: Sequence[Batch]) -> Any:
    """Rank 1 has no task at all in its last batches; its gradients are zero."""
    model, weights = Network(), []
    optimizer = network_sgd(model.parameters())
    with Balancer(model, gradnorm_rule(), heads=model.heads()) as balancer:
        for index, batch in enumerate(shares(batches, rank)):
            losses = model(batch)
            if rank == 1 and index >= 3:
                balancer.backward({}, loss=0 * sum(losses.values()))
            else:
                balancer.backward(losses)
            all_reduce_gradients(model)
            optimizer.step()
            balancer.step()
            optimizer.zero_grad()
            weights.append(balancer.weights)
    return weights


def test_a_rank_without_tasks_keeps_step_with_the_others(tmp_path: Path) -> None:
    first, second = on_two_ranks(partial(_rank_without_tasks, batches=vector_batches(3, 6, size=8)), tmp_path)
    assert first == second
    assert first[5] != first[2]


def thaw(rank: int | None, batches: Sequence[Batch], make: Callable[[], Any], **options: Any) -> Any:
    """Train on a rank's half, or on all, with an encoder that is frozen in the first three batches."""
    model, weights = Network(), []
    optimizer = network_sgd(model.parameters())
    with Balancer(model, make(), **options) as balancer:
        for index, batch in enumerate(batches if rank is None else shares(batches, rank)):
            model.encoder.requires_grad_(index >= 3)
            balancer.backward(model(batch))
            if rank is not None:
                all_reduce_gradients(model)
            optimizer.step()
            balancer.step()
            optimizer.zero_grad()
            weights.append(balancer.weights)
    return weights, model


@pytest.mark.filterwarnings("ignore:Balancer. .* frozen")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GradNorm", {"shared_layer": "encoder.2"}),
        ("GradNorm", {}),
        ("GradNorm", {"norm_of": "activation"}),
        ("UPGrad", {}),
    ],
    ids=["the layer named", "the layer found", "norms at the representation", "UPGrad"],
)
def test_two_processes_wait_together_for_a_frozen_encoder(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    batches = vector_batches(3, 7, size=8)
    first, second = on_two_ranks(partial(thaw, batches=batches, make=RULES[name], **options), tmp_path)
    expected, model = thaw(None, batches, RULES[name], **options)
    assert first[0] == second[0]
    assert distance(first[0], expected) <= 1e-9
    assert parameter_distance(first[1], model) <= 1e-9
    assert first[0][2] == dict.fromkeys(TASKS[:3], 1.0) != first[0][6]
