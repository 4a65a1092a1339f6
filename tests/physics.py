"""A small physics-informed network: one trunk called at three sets of points, no heads, losses made of derivatives."""

from __future__ import annotations

from typing import Any

import torch
from models import Automatic, Batch
from torch import Tensor, nn

PARTS = ("pde", "boundary", "initial")


def physics_batches(count: int, size: int = 8, seed: int = 21, lacking: bool = False) -> list[Batch]:
    """Points `{"pde": (size, 2), "boundary": (size, 2), "initial": (size, 2)}`; if `lacking`, each third batch lacks a part."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for step in range(count):
        points = 2 * torch.rand(3, size, 2, generator=generator, dtype=torch.float64) - 1
        points[1, :, 1] = points[1, :, 1].sign()
        points[2, :, 0] = 0.0
        batch = dict(zip(PARTS, points, strict=True))
        if lacking and step % 3 == 1:
            del batch[PARTS[step % 7 % 3]]
        batches.append(batch)
    return batches


class Physics(Automatic):
    """Burgers' equation, and a penalty that belongs to no part."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.tasks = PARTS

    def build(self) -> None:
        self.encoder = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))

    def heads(self) -> dict[str, str]:
        return {}

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        losses = {}
        if "pde" in batch:
            x = batch["pde"].clone().requires_grad_()
            u = self.encoder(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (curvature,) = torch.autograd.grad(slope[:, 1].sum(), x, create_graph=True)
            residual = slope[:, :1] + u * slope[:, 1:] - 0.1 * curvature[:, 1:]
            losses["pde"] = residual.square().mean()
        if "boundary" in batch:
            losses["boundary"] = 4 * self.encoder(batch["boundary"]).square().mean()
        if "initial" in batch:
            x = batch["initial"]
            losses["initial"] = 0.1 * (self.encoder(x) + torch.sin(torch.pi * x[:, 1:])).square().mean()
        return losses

    def rest(self) -> Tensor:
        """The other terms that are minimized."""
        return 0.01 * sum((p.square().sum() for p in self.parameters()), torch.zeros((), dtype=torch.float64))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        losses = self.task_losses(batch)
        return {
            "loss": torch.stack(list(losses.values())).sum() + self.rest(),
            **dict.fromkeys(self.tasks),
            **losses,
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=2e-4)
