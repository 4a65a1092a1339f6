"""`Balancer` with an aggregation of the parameters' gradients: held against brute force, in every kind of plain loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchjd.aggregation as jd
from any_network import (
    NETWORKS,
    AnyNetwork,
    Autoencoder,
    Batch,
    HeatEquation,
    WithDecay,
    difference,
    train_by_brute_force,
)
from harness import assert_clean, traces
from loops import on_two_ranks
from minima import exactly
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_gradnorm import Balancer
from lightning_gradnorm.strategies import AggregationRule

STEPS, TOLERANCE = 6, 1e-9


def rule_of(network: type[AnyNetwork], made: Any = jd.UPGrad) -> AggregationRule:
    return AggregationRule(network.tasks, made(), of_parameters=True)


def train(
    network: type[AnyNetwork],
    rule: AggregationRule,
    batches: list[Batch],
    accumulate: int = 1,
    clip: float | None = None,
    wrap: Callable[[nn.Module], Any] = lambda model: model,
) -> AnyNetwork:
    model = network()
    called, before, optimizer = wrap(model), traces(model), model.configure_optimizers()
    with Balancer(called, rule) as balancer:
        for index, batch in enumerate(batches):
            losses, total = called(batch)
            balancer.backward(losses, loss=total, backward=lambda loss: (loss / accumulate).backward())
            if (index + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                balancer.step()
                optimizer.zero_grad()
    assert_clean(model, before)
    return model


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("made", [jd.UPGrad, jd.MGDA, jd.ConFIG, partial(jd.TrimmedMean, trim_number=0)])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_it_trains_as_by_brute_force(network: type[AnyNetwork], made: Any, accumulate: int) -> None:
    batches, twin = network.batches(STEPS), network()
    train_by_brute_force(twin, batches, exactly(made()), accumulate, clip=0.5)
    model = train(network, rule := rule_of(network, made), batches, accumulate, clip=0.5)
    assert difference(model, twin) <= TOLERANCE
    assert rule.fallbacks == 0


@pytest.mark.parametrize("missing", [(0, 1), (2, 3, 5)], ids=["at first", "later"])
def test_tasks_may_be_absent(missing: tuple[int, ...]) -> None:
    batches = WithDecay.batches(STEPS, lacks=lambda i: "boundary" if i in missing else None)
    train_by_brute_force(twin := WithDecay(), batches, jd.UPGrad())
    assert difference(train(WithDecay, rule_of(WithDecay), batches), twin) <= TOLERANCE


class Drawn(jd.Aggregator):  # type: ignore[misc]
    """Draws new weights in each call: exactly once per step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0.0

    def forward(self, matrix: Tensor, /) -> Tensor:
        self.calls += 1
        return matrix.T @ torch.rand(len(matrix), dtype=matrix.dtype)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_an_aggregator_that_remembers_is_asked_once_a_step(accumulate: int) -> None:
    rule = rule_of(HeatEquation, Drawn)
    train(HeatEquation, rule, HeatEquation.batches(STEPS), accumulate)
    assert rule.aggregator.calls == STEPS // accumulate
    assert rule.state_dict()["drawn"] == STEPS // accumulate


@pytest.mark.parametrize("make", [rule_of, partial(rule_of, made=Drawn)], ids=["UPGrad", "of the matrix"])
def test_a_step_that_the_scaler_skips_leaves_no_trace(make: Callable[..., AggregationRule]) -> None:
    batches, trained, states = HeatEquation.batches(STEPS), [], []
    for skipped in (None, 2):
        model, rule = HeatEquation(), make(HeatEquation)
        optimizer, scaler = model.configure_optimizers(), torch.amp.GradScaler("cpu", init_scale=1024.0)
        with Balancer(model, rule) as balancer:
            for index, batch in enumerate(batches if skipped is None else [*batches[:2], batches[2], *batches[2:]]):
                losses, total = model(batch)
                if index == skipped:
                    total = total * torch.inf
                balancer.backward(losses, loss=total, backward=lambda loss, s=scaler: s.scale(loss).backward())  # type: ignore[misc]
                scaler.step(optimizer)
                balancer.step(scaler=scaler)
                scaler.update()
                optimizer.zero_grad()
        trained.append(model)
        states.append(rule.state_dict())
    assert scaler.get_scale() == 512
    assert difference(*trained) <= TOLERANCE
    assert states[0]["drawn"] == states[1]["drawn"] == STEPS
    assert states[0]["fallbacks"] == states[1]["fallbacks"] == 0
    if make is rule_of:
        train_by_brute_force(twin := HeatEquation(), batches, jd.UPGrad())
        assert difference(trained[1], twin) <= TOLERANCE


def _on_rank(rank: int, network: type[AnyNetwork], made: Any, batches: list[Batch]) -> AnyNetwork:
    halves = [{name: value.chunk(2)[rank] for name, value in batch.items()} for batch in batches]
    return train(network, rule_of(network, made), halves, wrap=DistributedDataParallel)


@pytest.mark.parametrize(
    ("network", "made"), [(WithDecay, jd.UPGrad), (Autoencoder, jd.ConFIG)], ids=["heat equation", "autoencoder"]
)
def test_two_ranks_match_one(network: type[AnyNetwork], made: Any, tmp_path: Path) -> None:
    batches = network.batches(STEPS, size=8)
    models = on_two_ranks(partial(_on_rank, network=network, made=made, batches=batches), tmp_path)
    train_by_brute_force(twin := network(), batches, made())
    assert difference(models[0], models[1]) == 0
    assert difference(models[0], twin) <= TOLERANCE


def test_a_sharded_model_is_refused_by_name() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = HeatEquation()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(
            ValueError, match=r"Balancer: at='parameters' .* 'net.0.weight' is sharded .*representation"
        ):
            Balancer(model, rule_of(HeatEquation))
    finally:
        dist.destroy_process_group()


class Apart(HeatEquation):
    """A network for each set of points."""

    def build(self) -> None:
        for task in self.tasks:
            setattr(self, task, nn.Linear(2, 1))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {task: self.get_submodule(task)(batch[task]).square().mean() for task in self.tasks}


def test_tasks_that_share_nothing_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"Balancer: at='parameters' .* in Apart the tasks .* share no trained parameter"
    ):
        train(Apart, rule_of(Apart), Apart.batches(1))
