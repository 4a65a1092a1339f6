"""A plain model and a plain training loop with a `Balancer`, in one process or two, for tests without a Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import TASKS, Automatic, Batch, network_sgd
from ranks import in_processes
from textbook import Forward
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm import Balancer
from lightning_gradnorm.strategies import GradNormRule


class Network(nn.Module):
    """The network of `Automatic`, number by number, as a module whose forward returns the task losses."""

    def __init__(self, T: int = 3, seed: int = 0) -> None:
        super().__init__()
        same = Automatic(T, seed)
        self.tasks = TASKS[:T]
        self.encoder = same.encoder
        for task in self.tasks:
            setattr(self, f"{task}_head", getattr(same, f"{task}_head"))

    def heads(self) -> dict[str, str]:
        return {task: f"{task}_head" for task in self.tasks}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        return {task: F.mse_loss(getattr(self, f"{task}_head")(z), batch[task]) for task in self.tasks if task in batch}

    def forward_for_textbook(self, batch: Batch) -> Forward:
        z = self.encoder(batch["x"])
        heads = {task: getattr(self, f"{task}_head") for task in self.tasks if task in batch}
        return Forward({task: F.mse_loss(head(z), batch[task]) for task, head in heads.items()}, representation=[z])


Backpropagate = Callable[[Balancer, dict[str, Tensor], int], None]
"""Back-propagates the losses of one of n micro-batches."""


def divide_in_backward(balancer: Balancer, losses: dict[str, Tensor], n: int) -> None:
    balancer.backward(losses, backward=lambda loss: (loss / n).backward())


def gradnorm_rule(T: int = 3, **options: Any) -> GradNormRule:
    return GradNormRule(TASKS[:T], **{"alpha": 1.2, **options})


def train(
    model: nn.Module,
    rule: Any,
    batches: Sequence[Batch],
    *,
    accumulate: int = 1,
    backpropagate: Backpropagate = divide_in_backward,
    optimizer: torch.optim.Optimizer | None = None,
    step: Callable[[Balancer, Batch], None] = lambda balancer, batch: balancer.step(),
    state: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train in a plain loop; return the weights after each step and the state at the end."""
    optimizer = optimizer or network_sgd(model.parameters())
    weights = []
    with Balancer(model, rule, **options) as balancer:
        if state is not None:
            balancer.load_state_dict(state)
        for index, batch in enumerate(batches):
            backpropagate(balancer, model(batch), accumulate)
            if (index + 1) % accumulate == 0:
                optimizer.step()
                step(balancer, batch)
                optimizer.zero_grad()
                weights.append(balancer.weights)
        return weights, copy.deepcopy(balancer.state_dict())


def distance(found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> float:
    """The largest difference of a weight after any step."""
    assert len(found) == len(expected)
    assert all(one.keys() == other.keys() for one, other in zip(found, expected, strict=True))
    return max(abs(one[t] - other[t]) for one, other in zip(found, expected, strict=True) for t in other)


def parameter_distance(found: nn.Module, expected: nn.Module) -> float:
    """The largest difference of a parameter."""
    pairs = zip(found.parameters(), expected.parameters(), strict=True)
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


def on_two_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """Call ``work(rank)`` in two processes with a gloo group; return what each returns."""

    def begin(rank: int) -> None:
        dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=30))
        torch.manual_seed(0)
        torch.save(work(rank), folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()

    in_processes(begin)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def shares(batches: Sequence[Batch], rank: int, accumulate: int = 1) -> list[Batch]:
    """This rank's half of every batch, in equal micro-batches."""
    return [
        {name: value.chunk(2)[rank].chunk(accumulate)[micro] for name, value in batch.items()}
        for batch in batches
        for micro in range(accumulate)
    ]


def all_reduce_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2


def train_on_rank(
    rank: int,
    batches: Sequence[Batch],
    make_rule: Callable[[], Any],
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = network_sgd,
    **options: Any,
) -> tuple[list[dict[str, float]], Network]:
    """Train on a rank's half of each batch; return the weights after each step and the network."""
    model = Network()
    optimizer = make_optimizer(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: all_reduce_gradients(model))
    weights, _ = train(model, make_rule(), shares(batches, rank), optimizer=optimizer, **options)
    return weights, model
