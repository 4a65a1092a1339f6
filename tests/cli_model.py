"""A model and data that LightningCLI of either package is given by class path."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


class TwoHeads:
    """What a user's LightningModule computes; the module of each package derives from it."""

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, hidden, dtype=torch.float64)
        self.a, self.b = nn.Linear(hidden, 1, dtype=torch.float64), nn.Linear(hidden, 1, dtype=torch.float64)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, torch.Tensor]:
        z = self.encoder(batch)
        losses = {"a": F.mse_loss(self.a(z), batch[:, :1]), "b": 9 * F.mse_loss(self.b(z), batch[:, 1:2])}
        return {"loss": losses["a"] + losses["b"], **losses}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)  # type: ignore[attr-defined]


class Numbers:
    """Random inputs; and targets, for a `MultiTaskModule`."""

    def __init__(self, targets: bool = False) -> None:
        super().__init__()
        self.targets = targets

    def train_dataloader(self) -> DataLoader[Any]:
        inputs = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        items: Any = [(row, {"a": row[:1], "b": 9 * row[1:2]}) for row in inputs] if self.targets else inputs
        return DataLoader(items, batch_size=4)
