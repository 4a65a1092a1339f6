"""Networks without a trunk, or whose trunk is called several times, and aggregations of their gradients by brute force.

Brute force also finds the shared parameters: those where at least two losses have a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from by_hand import flat
from models import network_sgd
from torch import Tensor, nn
from torch.nn import functional as F

Batch = dict[str, Tensor]


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class AnyNetwork(L.LightningModule):
    """A module whose losses are in no way those of heads behind an encoder."""

    tasks: tuple[str, ...]
    inputs: Mapping[str, int]
    """Of a batch: name → width."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.build()
        self.double()

    def build(self) -> None:
        raise NotImplementedError

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def rest(self, batch: Batch) -> Tensor | float:
        """The terms of the total other than the losses."""
        return 0.0

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The losses that the batch has, and the total."""
        losses = {task: loss for task, loss in self.losses(batch).items() if f"no {task}" not in batch}
        return losses, torch.stack(list(losses.values())).sum() + self.rest(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        losses, total = self(batch)
        return {"loss": total, **dict.fromkeys(self.tasks), **losses}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return network_sgd(self.parameters())

    @classmethod
    def batches(cls, count: int, size: int = 4, lacks: Callable[[int], str | None] = lambda i: None) -> list[Batch]:
        generator = torch.Generator().manual_seed(5)
        made = []
        for i in range(count):
            batch = {name: _randn(generator, size, width) for name, width in cls.inputs.items()}
            if (task := lacks(i)) is not None:
                batch[f"no {task}"] = torch.ones(size)
            made.append(batch)
        return made


class HeatEquation(AnyNetwork):
    """A physics-informed network: one perceptron at three sets of points, with derivatives of the second order."""

    tasks = ("interior", "boundary", "initial")
    inputs = dict.fromkeys(tasks, 2)

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        x = batch["interior"].clone().requires_grad_()
        u = self.net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
        residual = du[:, 1] - 0.3 * ddu[:, 0]
        return {
            "interior": residual.square().mean(),
            "boundary": 3 * (self.net(batch["boundary"]) - 1).square().mean(),
            "initial": (self.net(batch["initial"]) - batch["initial"][:, :1].sin()).square().mean(),
        }


class WithDecay(HeatEquation):
    """The same with a penalty that belongs to no task: on the weights and on the network's output."""

    def rest(self, batch: Batch) -> Tensor:
        decay = sum(parameter.square().sum() for parameter in self.parameters())
        return 0.1 * decay + 0.2 * self.net(batch["boundary"]).square().mean()


class Autoencoder(AnyNetwork):
    """A variational one: the decoder belongs to the reconstruction alone."""

    tasks = ("reconstruction", "kl")
    inputs = {"x": 5, "noise": 2}  # noqa: RUF012

    def build(self) -> None:
        self.encode = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.decode = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        mean, log_variance = self.encode(batch["x"]).chunk(2, dim=1)
        z = mean + batch["noise"] * (log_variance / 2).exp()
        kl = (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean()
        return {"reconstruction": F.mse_loss(self.decode(z), batch["x"]), "kl": 0.1 * kl}


class ThreeViews(AnyNetwork):
    """A trunk that is called once for each task, with that task's own inputs, and a head for each."""

    tasks = ("left", "middle", "right")
    inputs = {task: 3 for task in tasks} | {f"y_{task}": 2 for task in tasks}  # noqa: C420

    def build(self) -> None:
        self.trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
        for task in self.tasks:
            setattr(self, f"{task}_head", nn.Linear(4, 2))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        found = {task: self.get_submodule(f"{task}_head")(self.trunk(batch[task])) for task in self.tasks}
        return {task: (1 + i) * F.mse_loss(y, batch[f"y_{task}"]) for i, (task, y) in enumerate(found.items())}

    def rest(self, batch: Batch) -> Tensor:
        return 0.3 * self.trunk(batch["left"]).square().mean() + 0.1 * self.left_head.weight.square().sum()


class Chain(AnyNetwork):
    """Each task shares something with its neighbor; nothing is common to all three."""

    tasks = ("first", "second", "third")
    inputs = {"x": 3}  # noqa: RUF012

    def build(self) -> None:
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        chosen = {"first": (0, 1), "second": (1, 2), "third": (2, 3)}
        return {
            task: (self.layers[j](torch.tanh(self.layers[i](batch["x"]))) - 1).square().mean()
            for task, (i, j) in chosen.items()
        }


NETWORKS: dict[str, type[AnyNetwork]] = {
    "a heat equation": HeatEquation,
    "a heat equation and weight decay": WithDecay,
    "an autoencoder": Autoencoder,
    "three views": ThreeViews,
    "a chain": Chain,
}


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))


def train_by_brute_force(
    model: AnyNetwork,
    batches: Sequence[Batch],
    aggregate: Callable[[Tensor], Tensor],
    accumulate: int = 1,
    each_step: Callable[[], object] = lambda: None,
    clip: float | None = None,
) -> list[Tensor]:
    """Train; return the norms of the tasks' gradients in each step, shape (T,)."""
    parameters, T = list(model.parameters()), len(model.tasks)
    sizes = [parameter.numel() for parameter in parameters]
    reached = torch.zeros(T, len(parameters), dtype=torch.bool)
    optimizer = model.configure_optimizers()
    norms = []
    for start in range(0, len(batches), accumulate):
        J, seen = torch.zeros(T, sum(sizes), dtype=torch.float64), set()
        total: list[Any] = [None] * len(parameters)

        def add(i: int, gradient: Tensor | None, into: list[Any] = total) -> None:
            if gradient is not None:
                into[i] = gradient if into[i] is None else into[i] + gradient

        for batch in batches[start : start + accumulate]:
            losses, whole = model(batch)
            for i, gradient in enumerate(_gradients(whole / accumulate, parameters)):
                add(i, gradient)
            for row, task in enumerate(model.tasks):
                if task in losses:
                    seen.add(row)
                    found = _gradients(losses[task] / accumulate, parameters)
                    reached[row] |= torch.tensor([gradient is not None for gradient in found])
                    J[row] += flat(found, parameters)
        is_shared = reached.sum(0) >= 2
        J = J[:, is_shared.repeat_interleave(torch.tensor(sizes))]
        combined = aggregate(J[sorted(seen)]) - J.sum(0)  # in place of the tasks' sum
        shared = is_shared.nonzero().flatten().tolist()
        for i, piece in zip(shared, combined.split([sizes[i] for i in shared]), strict=True):
            add(i, piece.view_as(parameters[i]))
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        each_step()
        optimizer.step()
        norms.append(J.norm(dim=1))
    return norms


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest between two parameters."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)
