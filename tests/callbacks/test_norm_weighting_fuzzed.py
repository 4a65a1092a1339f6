"""Trainings with bad losses: `NormWeighting` does what the bare rule does with the norms that the test took by itself."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches
from torch import Tensor, nn

from lightning_gradnorm import InverseNorm, LRAnnealing, NormWeighting, NTKWeights
from lightning_gradnorm.strategies import NormFormula, NormWeightingRule

BATCHES = 40
MakeTrainer = Callable[..., L.Trainer]
EVIL = [0.0, -1.0, math.inf, math.nan, 1e-20, 1e20]


def formula_of(draw: random.Random, tasks: list[str]) -> NormFormula:
    every = draw.choice([1, 1, 3])
    priorities = draw.choice([None, {task: draw.uniform(0.1, 9.0) for task in tasks}])
    return draw.choice(
        [
            InverseNorm(
                draw.choice([0.0, 0.9]), draw.choice(["mean", "total", 2.0]), draw.random() < 0.5, priorities, every
            ),
            LRAnnealing(tasks[-1], draw.uniform(0.05, 1.0), draw.choice(["max_mean", "l2"]), every),
            NTKWeights(draw.choice([0.0, 0.9]), every),
        ]
    )


def tamed(loss: Tensor) -> Tensor:
    """What is back-propagated of a loss."""
    finite = torch.nan_to_num(loss, 0.0, 0.0, 0.0)
    return finite * (1e-3 / finite.detach().abs().clamp(min=1.0))


class Fuzzed(L.LightningModule):
    """Shows its losses to `expected`, a bare rule, before the callback sees them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = draw = random.Random(seed)
        self.tasks = [f"task{i}" for i in range(draw.choice([2, 3, 7]))]
        self.formula = formula_of(draw, self.tasks)
        self.rate = draw.choice([0.0, 0.05, 0.2])
        self.with_heads = draw.random() < 0.5
        self.expected = NormWeightingRule(self.tasks, self.formula, dtype=torch.float64)
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in self.tasks})
        self.double()
        self.updates = 0

    def layer(self) -> list[nn.Parameter]:
        return [self.trunk.weight] if self.with_heads else list(self.parameters())

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor | None]:
        z = self.trunk(batch).tanh()
        losses = {}
        for i, task in enumerate(self.tasks):
            if self.draw.random() < self.rate:
                continue
            factor = self.draw.choice(EVIL) if self.draw.random() < self.rate else 10.0 ** (i % 3)
            losses[task] = factor * (self.heads[task](z) - i).square().mean()
        losses = losses or {self.tasks[0]: self.heads[self.tasks[0]](z).square().mean()}
        if self.expected.should_measure:
            self._update_expected(losses)
        self.expected.count_step()
        total = torch.stack([tamed(loss) for loss in losses.values()]).sum()
        return {"loss": total, **dict.fromkeys(self.tasks), **losses}

    def _update_expected(self, losses: dict[str, Tensor]) -> None:
        rows = []
        for task in self.tasks:
            if task in losses:
                share = tamed(losses[task])
                found = torch.autograd.grad(share, self.layer(), retain_graph=True, allow_unused=True)
                pairs = zip(found, self.layer(), strict=True)
                rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
            else:
                rows.append(torch.zeros(sum(p.numel() for p in self.layer()), dtype=torch.float64))
        sizes = {
            "l2": lambda row: row.square().sum().sqrt(),
            "max": lambda row: row.abs().max(),
            "mean": lambda row: row.abs().mean(),
        }
        norms = torch.stack([torch.stack([sizes[kind](row) for kind in self.formula.norms]) for row in rows])
        values = torch.stack(
            [losses[t].detach() if t in losses else torch.zeros((), dtype=torch.float64) for t in self.tasks]
        )
        present = torch.tensor([task in losses for task in self.tasks])
        update = self.expected.step(norms.squeeze(1) if norms.shape[1] == 1 else norms, values, present)
        self.updates += int(update.taken)

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Compare(L.Callback):
    """After each step the weights are those of the bare rule, positive and finite."""

    def __init__(self, balancing: NormWeighting) -> None:
        self.balancing = balancing

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        weights = list(self.balancing.weights.values())
        assert all(0 < one < math.inf for one in weights)
        assert weights == pytest.approx(pl_module.expected.weights.tolist(), rel=1e-9), f"step {trainer.global_step}"


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(s, marks=pytest.mark.slow) for s in range(12, 150))])
def test_a_fuzzed_training_has_the_weights_of_the_bare_rule(quiet_trainer: MakeTrainer, seed: int) -> None:
    torch.manual_seed(seed)
    model = Fuzzed(seed)
    layer = "trunk" if model.with_heads else "all"
    balancing = NormWeighting(model.formula, model.tasks, shared_layer=layer, heads="auto" if seed % 2 else None)
    batches = [torch.randn(5, 3, dtype=torch.float64) for _ in range(BATCHES)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="NormWeighting: ")
        quiet_trainer(callbacks=[balancing, Compare(balancing)], max_epochs=1).fit(model, Batches(batches))
    assert model.updates > 0
    assert balancing.rule.skipped == model.expected.skipped
