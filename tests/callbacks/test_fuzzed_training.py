"""Trainings with arbitrarily bad losses: the callback agrees with the bare rule on the numbers that the test computes.

Losses are infinite, negative or exactly zero, tasks are absent or come one at a time, the optimizer evaluates its closure
twice, and a loss may be changed in place after it was shown.

`tests/strategies/test_rule_fuzzed.py` compares the rule itself with double backward. Here the test computes each task's
gradient separately, before the callback has seen the loss, and a `GradNormRule` gives the expected result.
"""

from __future__ import annotations

import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, MemoryLogger
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm import GradNorm
from lightning_gradnorm.strategies import GradNormRule, GradNormTerms

BATCHES, INPUTS, FEATURES, OUTPUTS = 40, 4, 5, 2
MakeTrainer = Callable[..., L.Trainer]


class Draw:
    """One training's random choices, and the fate of each task's loss in each batch."""

    def __init__(self, seed: int) -> None:
        draw = self.random = random.Random(seed)
        self.T = draw.choice([2, 3, 5, 12, 40])
        self.tasks = [f"task{i}" for i in range(self.T)]
        self.dtype = draw.choice([torch.float64, torch.float64, torch.float32])
        self.accumulate = draw.choice([1, 2, 3])
        self.with_heads = draw.random() < 0.5
        self.alpha = draw.choice([0.0, 0.12, 1.5, 6.0])
        # More tasks see more evil; some steps shall be taken all the same.
        self.evil = draw.choice([0.1, 0.4]) / self.T
        wild = (
            0.3 if self.dtype == torch.float64 else 0.3 / self.T
        )  # in float32 the norm of a huge gradient is no number
        self.wild, self.absence = draw.choice([0.0, wild]), draw.choice([0.0, 0.1, 0.7])
        self.is_alone = draw.random() < 0.1
        self.repeats = self.accumulate == 1 and draw.random() < 0.4
        self.in_place = draw.random() < 0.3
        lr = 10 ** draw.uniform(-4, 0)
        self.options: dict[str, Any] = {
            "alpha": self.alpha,
            "optimizer": partial(draw.choice([torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop]), lr=lr),
            "initial_losses": {task: 10 ** draw.uniform(-2, 2) for task in self.tasks},
            "priorities": draw.choice([None, {task: draw.uniform(0.5, 2) for task in self.tasks}]),
            "update_every": draw.choice([1, 1, 2]),
            "norm_of": draw.choice(["weight", "weight", "activation"]),
        }

    def factors(self) -> dict[str, float | None]:
        """Return what each task's loss is multiplied by in the coming batch."""
        alone = self.random.choice(self.tasks)
        return {task: self.factor() if not self.is_alone or task == alone else None for task in self.tasks}

    def factor(self) -> float | None:
        """Return what a task's loss is multiplied by; None: the task is absent."""
        draw = self.random
        if draw.random() < self.absence:
            return None
        if draw.random() < self.evil:
            return draw.choice([math.nan, math.inf, -math.inf, -1.0])
        if draw.random() < self.wild:
            # Not between 1e3 and 1e25, where it would be chance whether a float32 square overflows.
            return draw.choice([0.0, 10 ** draw.uniform(-30, 3), 10 ** draw.uniform(25, 30)])
        return 1.0


class Repeating(torch.optim.SGD):
    """Evaluates the losses again, somewhere else, before each step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        torch.enable_grad()(closure)()
        parameters = self.param_groups[0]["params"]
        start = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(1e-2)
        torch.enable_grad()(closure)()
        for p, before in zip(parameters, start, strict=True):
            p.copy_(before)
        torch.optim.SGD.step(self)


class Fuzzed(L.LightningModule):
    """Linear encoder, linear heads. ``seen`` has one entry for each backward since the last step: each task's own gradient."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw
        self.encoder = nn.Sequential(nn.Linear(INPUTS, FEATURES))
        self.heads = nn.ModuleDict({task: nn.Linear(FEATURES, OUTPUTS) for task in draw.tasks})
        self.to(draw.dtype)
        self.seen: list[dict[str, tuple[float, Tensor]]] = []
        self.gradnorm: list[GradNorm] = []
        self.evaluated = -1
        self.factors: dict[str, float | None] = {}
        self.is_left_out = False

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor | None] | None:
        is_first, self.evaluated = self.evaluated != batch_idx, batch_idx
        if is_first:
            self.factors = self.draw.factors()
            # The first batch is to show the names.
            self.is_left_out = batch_idx > 0 and self.draw.random.random() < 0.03
        if self.is_left_out:
            return None
        z = self.encoder(batch)
        total = 0.0 * z.sum()
        losses: dict[str, Tensor | None] = {}
        here: dict[str, tuple[float, Tensor]] = {}
        for task, factor in self.factors.items():
            if factor is None:
                losses[task] = None
                continue
            target = batch[:, :OUTPUTS] + 1.0
            losses[task] = loss = F.mse_loss(self.heads[task](z), target) * factor
            here[task] = self.apart(task, batch, target, factor)
            if self.draw.in_place:
                self.gradnorm[0].watch({task: loss})
                loss += total
                total = loss
            else:
                total = total + loss
        if is_first:
            self.seen.append(here)
        if not self.draw.in_place:
            return {"loss": total, **losses}
        self.gradnorm[0].watch({task: None for task, loss in losses.items() if loss is None})
        return {"loss": total}

    def apart(self, task: str, batch: Tensor, target: Tensor, factor: float) -> tuple[float, Tensor]:
        """Return a task's loss and its gradient, in a graph without other hooks."""
        shared, head = self.encoder[0], self.heads[task]
        z = F.linear(batch, shared.weight, shared.bias)
        loss = F.mse_loss(F.linear(z, head.weight, head.bias), target) * factor
        at = shared.weight if self.draw.options["norm_of"] == "weight" else z
        return loss.item(), torch.autograd.grad(loss, at)[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return (Repeating if self.draw.repeats else torch.optim.SGD)(self.parameters(), lr=1e-3)


class Judge(L.Callback):
    """After each batch: the weights are right, and an optimizer step has made the same change as the bare rule."""

    def __init__(self, gradnorm: GradNorm, model: Fuzzed) -> None:
        self.gradnorm, self.draw = gradnorm, model.draw
        self.start = {name: value.clone() for name, value in model.state_dict().items()}
        self.rule = GradNormRule(
            self.draw.tasks, dtype=self.draw.dtype, **{k: self.draw.options[k] for k in self.draw.options if k in RULES}
        )
        self.global_step = 0
        self.before: dict[str, Any] = {}
        self.offenders: set[str] = set()
        self.happened: Counter[str] = Counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = self.gradnorm.state_dict()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Fuzzed)
        state = self.gradnorm.state_dict()
        self.check_weights(state["weights"])
        if trainer.global_step == self.global_step:
            assert torch.equal(state["weights"], self.before["weights"]), "a weight step without an optimizer step"
            return
        self.global_step = trainer.global_step
        self.check_step(state, pl_module.seen)
        self.before = state
        pl_module.seen = []
        parameters = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
        if not bool((parameters.abs() < 1e3).all()):  # a NaN stays in the network, which is the user's affair
            pl_module.load_state_dict(self.start)
            self.happened["network replaced"] += 1

    def check_weights(self, weights: Tensor) -> None:
        assert weights.dtype == self.draw.dtype
        assert bool(weights.isfinite().all())
        assert bool((weights > 0).all()), weights
        tolerance = 1e-5 if self.draw.dtype == torch.float32 else 1e-12
        assert abs(math.fsum(weights.tolist()) - self.draw.T) <= tolerance * self.draw.T

    def check_step(self, state: dict[str, Any], seen: list[dict[str, tuple[float, Tensor]]]) -> None:
        losses, norms = torch.zeros(2, self.draw.T, dtype=self.draw.dtype)
        present = torch.zeros(self.draw.T, dtype=torch.bool)
        for i, task in enumerate(self.draw.tasks):
            ours = [one[task] for one in seen if task in one]
            if ours:
                present[i] = True
                losses[i] = sum(loss for loss, _ in ours) / len(ours)
                gradients = torch.stack([gradient for _, gradient in ours])
                # of W the gradients of the micro-batches add up; each representation is one of its own
                summed = gradients.sum(dim=0) if self.draw.options["norm_of"] == "weight" else gradients
                norms[i] = torch.linalg.vector_norm(summed) / len(seen)
        if not bool(present.any()):
            self.happened["nobody"] += 1
            assert state["steps"] == self.before["steps"]
            assert torch.equal(state["weights"], self.before["weights"])
            return
        assert state["steps"] == self.before["steps"] + 1
        if self.before["steps"] % self.draw.options["update_every"]:
            self.happened["not measured"] += 1
            assert torch.equal(state["weights"], self.before["weights"])
            return
        self.rule.load_state_dict(self.before)
        expected = self.rule.step(norms, losses, present)
        if not expected.taken:
            self.happened["skipped"] += 1
            culprits = {task for task, is_one in zip(self.draw.tasks, expected.tasks_at_fault, strict=True) if is_one}
            self.offenders |= culprits
            bad = present & ~(norms.isfinite() & losses.isfinite() & ((losses >= 0) | (self.draw.alpha == 0)))
            if bool(bad.any()):
                assert culprits == {self.draw.tasks[i] for i in bad.nonzero().flatten().tolist()}
            assert state["skipped"] == self.before["skipped"] + 1
            assert torch.equal(state["weights"], self.before["weights"])
            return
        self.happened["taken"] += 1
        assert state["skipped"] == self.before["skipped"]
        assert torch.equal(state["weights"][~present], self.before["weights"][~present])
        if self.draw.dtype == torch.float64 and not decided_by_chance(expected.terms, present):
            self.happened["compared"] += 1
            torch.testing.assert_close(state["weights"], self.rule.weights.detach(), rtol=1e-9, atol=1e-9)


RULES = ("alpha", "optimizer", "initial_losses", "priorities")


def decided_by_chance(seen: GradNormTerms, present: Tensor) -> bool:
    """Return True if a G_i is so near its target that the rounding of a norm decides the sign."""
    G, target = seen.grad_norms[present], seen.targets[present]
    larger = torch.maximum(G, target)
    return bool((((G - target).abs() <= 1e-10 * larger) & (larger > 0)).any())


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 120))])
def test_bad_losses_cost_no_more_than_their_own_step(seed: int, quiet_trainer: MakeTrainer) -> None:
    draw = Draw(seed)
    model = Fuzzed(draw)
    heads = {task: f"heads.{task}" for task in draw.tasks} if draw.with_heads else None
    gradnorm = GradNorm(draw.tasks, heads=heads, **draw.options)
    model.gradnorm = [gradnorm]
    judge, logger = Judge(gradnorm, model), MemoryLogger()
    trainer = quiet_trainer(callbacks=[gradnorm, judge], accumulate_grad_batches=draw.accumulate, logger=logger)
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(3, INPUTS, generator=generator, dtype=draw.dtype) for _ in range(BATCHES)]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, Batches(batches))

    assert trainer.state.finished
    assert trainer.global_step == math.ceil(BATCHES / draw.accumulate)
    about = [
        m.group(1)
        for w in caught
        if (m := re.search(r"GradNorm: .* of task '(\w+)' is (?:not|negative)", str(w.message)))
    ]
    assert sorted(about) == sorted(judge.offenders), "one warning for each task that was bad"
    assert judge.happened["taken"] > 0, judge.happened
    if (
        draw.dtype == torch.float64 and draw.absence < 0.5 and not draw.is_alone
    ):  # one alone is at its target, but for rounding
        assert judge.happened["compared"] > 0, judge.happened
    assert logger.scalars["gradnorm/skipped"][-1] == judge.happened["skipped"]
    assert gradnorm.state_dict()["skipped"] == judge.happened["skipped"]
