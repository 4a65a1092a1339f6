"""Random networks with nothing named: the layer and the heads found, against brute force and the textbook."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import textbook
import torch
from textbook import Forward
from torch import Tensor, nn

from lightning_gradnorm import Balancer
from lightning_gradnorm.strategies import GradNormRule

WIDTH = 5
STEPS = 4


@dataclass
class Batch:
    """The inputs, and where the forward pass leaves its usual course."""

    inputs: list[Tensor]
    detour: str = "none"


class RandomNetwork(nn.Module):
    """Layers that each read the sum of some earlier ones, and tasks that each read some of these, through heads or not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.sources = draw.choice([1, 1, 2])
        self.tasks = [f"task{i}" for i in range(draw.choice([2, 2, 3, 4]))]
        self.reads = {i: [] for i in range(self.sources)}
        self.layers = nn.ModuleDict()
        for i in range(self.sources, self.sources + draw.randint(2, 8)):
            self.reads[i] = draw.sample(range(i), k=min(i, draw.choice([1, 1, 2, 3])))
            layer = nn.Linear(WIDTH, WIDTH, bias=draw.random() < 0.7)
            self.layers[str(i)] = layer.requires_grad_(draw.random() < 0.9)
        last = len(self.reads) - 1
        of_layers = list(range(self.sources, last + 1))
        self.of_task = {t: draw.sample(of_layers, k=min(len(of_layers), draw.choice([1, 1, 2]))) for t in self.tasks}
        if draw.random() < 0.7:
            self.of_task = {task: sorted({*nodes, last}) for task, nodes in self.of_task.items()}
        self.heads = nn.ModuleDict({task: self._head(draw) for task in self.tasks})
        self.functional = {task: draw.random() < 0.2 for task in self.tasks}
        self.columns = draw.random() < 0.2
        self.output = nn.Linear(WIDTH, len(self.tasks))
        self.double()
        for parameter in self.parameters():
            parameter.data = 0.8 * torch.randn(parameter.shape, dtype=torch.float64)

    def _head(self, draw: random.Random) -> nn.Module:
        if draw.random() < 0.4:
            return nn.Linear(WIDTH, 2)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))

    def values(self, inputs: list[Tensor]) -> dict[int, Tensor]:
        values = dict(enumerate(inputs))
        for name, layer in self.layers.items():
            values[int(name)] = torch.tanh(layer(sum(values[i] for i in self.reads[int(name)])))
        return values

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        values = self.values(batch.inputs)
        losses = {}
        order = self.tasks[::-1] if batch.detour == "heads exchanged" else self.tasks
        for index, (task, other) in enumerate(zip(self.tasks, order, strict=True)):
            z = sum(values[i] for i in self.of_task[task])
            if self.columns:
                loss = (self.output(z)[:, index] - 1).square().mean()
            elif batch.detour == "a head left out" and index == 0:
                loss = z.square().mean()
            else:
                read = z.sin() if self.functional[task] else z
                loss = (self.heads[other](read) - 1).square().mean()
            if batch.detour == "a way around" and index == 0:
                loss = loss + 0.3 * z.square().mean()
            losses[task] = (1 + index) * loss
        return losses

    def shared_layer(self) -> str | None:
        """The deepest trained layer that all tasks read, the last of several; by brute force."""
        depth: dict[int, int] = {}
        below: dict[int, set[int]] = {}
        for i, reads in self.reads.items():
            is_trained = i >= self.sources and self.layers[str(i)].weight.requires_grad
            depth[i] = is_trained + max((depth[j] for j in reads), default=0)
            below[i] = set().union(*(below[j] for j in reads), {i} if is_trained else set())
        shared = set.intersection(*(set().union(*(below[i] for i in nodes)) for nodes in self.of_task.values()))
        best = max(shared, key=lambda i: (depth[i], i), default=None)
        return None if best is None else f"layers.{best}"


def batches(network: RandomNetwork, seed: int) -> list[Batch]:
    draw = random.Random(seed)
    detours = ["none", *draw.choices(["none", "heads exchanged", "a head left out", "a way around"], k=STEPS - 1)]
    return [Batch([torch.randn(4, WIDTH, dtype=torch.float64) for _ in range(network.sources)], d) for d in detours]


def network_and_batches(seed: int) -> tuple[RandomNetwork, list[Batch]]:
    torch.manual_seed(seed)
    network = RandomNetwork(seed)
    return network, batches(network, seed)


def few(seed: int) -> Any:
    return pytest.param(seed, marks=() if seed < 4 else pytest.mark.slow)


@pytest.mark.parametrize("block", [few(block) for block in range(50)])
def test_the_deepest_shared_layer_is_found_and_read_as_the_textbook_reads_it(block: int) -> None:
    trained = with_heads = 0
    for seed in range(10 * block, 10 * block + 10):
        network, steps = network_and_batches(seed)
        expected = network.shared_layer()
        if expected is None:
            continue
        named = {task: f"heads.{task}" for task in network.tasks}
        are_named = seed % 3 == 0 and not network.columns
        balancer = Balancer(network, GradNormRule(network.tasks), heads=named if are_named else "auto")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        found = []
        for batch in steps:
            optimizer.zero_grad()
            balancer.backward(network.losses(batch))
            optimizer.step()
            balancer.step()
            found.append(balancer.weights)
        assert f"W = {expected}.weight " in repr(balancer), seed
        with_heads += "heads: none" not in repr(balancer)
        trained += 1

        twin, steps = network_and_batches(seed)
        textbook_optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.05)
        trajectory = textbook.train(
            twin,
            lambda batch, twin=twin: Forward(twin.losses(batch)),
            steps,
            [twin.get_submodule(expected).weight],
            textbook_optimizer,
        )
        for weights, wanted in zip(found, trajectory.weights, strict=True):
            assert weights == pytest.approx(wanted, rel=0, abs=1e-9), seed
        for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, rtol=0, atol=1e-9, msg=f"{seed}: {name}")
    assert trained >= 3
    assert with_heads >= 2
