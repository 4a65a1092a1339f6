"""Scalarizers and aggregators in a plain loop, as TorchJD's manual has them used: what the callbacks are held against.

One process, no Lightning, and nothing of the package under test but the seed of its random numbers. A scalarizer is called
with the losses and back-propagated through; an aggregator is called with the whole matrix of the gradients, which are taken
one by one with ``torch.autograd.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from textbook import Forward
from torch import Tensor, nn
from torchjd.scalarization import DWA, FAMO

from lightning_gradnorm.balancing.randomness import own_randomness

Learner = Callable[[list[Tensor]], torch.optim.Optimizer]
learner = partial(torch.optim.Adam, lr=0.025)


@dataclass
class ByHand:
    """One entry per optimizer step."""

    tasks: list[str]
    weights: list[dict[str, float]] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)  # of the scalarizer
    norms: list[dict[str, float]] = field(default_factory=list)  # of the gradients that are aggregated

    def note(self, weights: Tensor, scalarizer: nn.Module | None = None) -> None:
        """Write down what is in force after a step."""
        self.weights.append(dict(zip(self.tasks, weights.tolist(), strict=True)))
        if scalarizer is not None:
            self.states.append({name: value.clone() for name, value in scalarizer.state_dict().items()})


class Scalarized:
    """A scalarizer, the optimizer of its parameters, its random numbers, and the last losses of absent tasks."""

    def __init__(self, tasks: Sequence[str], scalarizer: nn.Module | None, seed: int, optimizer: Learner) -> None:
        self.tasks, self.scalarizer, self.seed = list(tasks), scalarizer, seed
        parameters = [] if scalarizer is None else list(scalarizer.parameters())
        self.optimizer = optimizer([*parameters]) if parameters else None
        self.last: dict[str, Tensor] = {}
        self.calls = 0

    def __call__(self, losses: Mapping[str, Tensor], coefficients: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Return what is to be back-propagated, and ``∂s/∂L_i``; an absent task enters with its last loss."""
        ones = torch.ones(len(self.tasks), dtype=torch.float64)
        # The value is the loss itself; the gradient that goes on from it has the user's coefficient.
        own = {t: L.detach() + coefficients.get(t, 1.0) * (L - L.detach()) for t, L in losses.items()}
        self.last |= {task: loss.detach() for task, loss in losses.items()}
        if self.scalarizer is None or set(self.last) < set(self.tasks):
            return torch.stack(list(own.values())).sum(), ones
        values = torch.stack([own.get(task, self.last[task]) for task in self.tasks])
        with own_randomness(self.seed, self.calls):
            total = self.scalarizer(values)
        self.calls += 1
        (weights,) = torch.autograd.grad(total, values, retain_graph=True)
        return total, weights

    def step(self, factor: float) -> None:
        """Take a step of the scalarizer's parameters, with ``factor`` times what their gradients have added up to."""
        if self.optimizer is not None:
            for parameter in self.optimizer.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.grad *= factor
            self.optimizer.step()
            self.optimizer.zero_grad()


def _steps(batches: Sequence[Any], accumulate: int, epochs: int) -> list[list[Any]]:
    return [list(batches[i : i + accumulate]) for _ in range(epochs) for i in range(0, len(batches), accumulate)]


def scalarize(
    model: nn.Module,
    forward: Callable[[Any], Forward],
    batches: Sequence[Any],
    scalarizer: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    tasks: Sequence[str],
    accumulate: int = 1,
    epochs: int = 1,
    coefficients: Mapping[str, float] | None = None,
    scalarizer_optimizer: Learner = learner,
    before_batch: Callable[[int], object] = lambda index: None,
    clip: float | None = None,
) -> ByHand:
    """Train ``model`` on ``scalarizer(losses)``, batch by batch."""
    model.train()
    found = ByHand(list(tasks))
    scalarized = Scalarized(tasks, scalarizer, torch.initial_seed() % 2**62, scalarizer_optimizer)
    steps = _steps(batches, accumulate, epochs)
    for number, step in enumerate(steps):
        optimizer.zero_grad()
        for index, batch in enumerate(step):
            before_batch(number * accumulate + index)
            given = forward(batch)
            total, weights = scalarized(given.losses, coefficients or {})
            total = total / accumulate  # Lightning's, of an incomplete step too
            if given.rest is not None:
                total = total + given.rest / accumulate
            total.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scalarized.step(accumulate / len(step))
        if isinstance(scalarizer, FAMO) and scalarized.calls:
            before_batch(number * accumulate + len(step) - 1)
            with torch.no_grad():
                again = forward(step[-1]).losses
            scalarizer.update(torch.stack([again.get(t, scalarized.last[t]) for t in tasks]))
        if isinstance(scalarizer, DWA) and (number + 1) % (len(steps) // epochs) == 0:
            scalarizer.step()
        found.note(weights, scalarizer)
    return found


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """The tensors as one vector, zero where there is none."""
    return torch.cat(
        [(torch.zeros_like(of) if t is None else t).flatten() for t, of in zip(tensors, like, strict=True)]
    )


def pieces(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flat`."""
    return [part.view_as(of) for part, of in zip(vector.split([of.numel() for of in like]), like, strict=True)]


def coefficients_of(vector: Tensor, rows: Tensor) -> Tensor:
    """``λ`` of ``λ @ rows = vector``, if the rows are independent: found from the result, not asked of the aggregator."""
    return torch.linalg.lstsq(rows.T, vector[:, None]).solution[:, 0]


def aggregate(
    model: nn.Module,
    forward: Callable[[Any], Forward],
    batches: Sequence[Any],
    aggregator: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    tasks: Sequence[str],
    at: str = "representation",
    scalarizer: nn.Module | None = None,
    accumulate: int = 1,
    coefficients: Mapping[str, float] | None = None,
    before_batch: Callable[[int], object] = lambda index: None,
    clip: float | None = None,
) -> ByHand:
    """Train the heads by their own gradients, and what is behind the representation by ``aggregator(J)``."""
    model.train()
    found = ByHand(list(tasks))
    seed = torch.initial_seed() % 2**62
    scalarized, calls = Scalarized(tasks, scalarizer, seed, learner), 0
    everything = [p for p in model.parameters() if p.requires_grad]

    def asked(J: Tensor) -> Tensor:
        nonlocal calls
        with own_randomness(seed, calls):
            vector = aggregator(J)
        calls += 1
        return vector

    def noted(J: Tensor, vector: Tensor, present: list[int]) -> Tensor:
        found.norms.append(dict.fromkeys(tasks, 0.0) | {tasks[i]: float(J[k].norm()) for k, i in enumerate(present)})
        return torch.zeros(len(tasks), dtype=J.dtype).index_copy(0, torch.tensor(present), coefficients_of(vector, J))

    for number, step in enumerate(_steps(batches, accumulate, 1)):
        sums = [torch.zeros_like(p) for p in everything]
        rows: Tensor | None = None
        for index, batch in enumerate(step):
            before_batch(number * accumulate + index)
            given = forward(batch)
            z = given.representation
            total, loss_weights = scalarized(given.losses, {})
            if scalarizer is not None and list(scalarizer.parameters()):
                for p, g in zip(
                    scalarizer.parameters(),
                    torch.autograd.grad(total, list(scalarizer.parameters()), retain_graph=True),
                    strict=True,
                ):
                    p.grad = g if p.grad is None else p.grad + g
            weighted = {
                t: (loss_weights[list(tasks).index(t)] * (coefficients or {}).get(t, 1.0)).item() * L
                for t, L in given.losses.items()
            }
            present = [i for i, t in enumerate(tasks) if t in weighted]
            of_z = torch.autograd.grad(
                z, everything, [torch.ones_like(t) for t in z], retain_graph=True, allow_unused=True
            )
            trunk = [p for p, g in zip(everything, of_z, strict=True) if g is not None]
            places = [i for i, g in enumerate(of_z) if g is not None]
            others = [i for i, g in enumerate(of_z) if g is None]
            whole = torch.stack(list(weighted.values())).sum()
            for i, g in zip(
                others,
                torch.autograd.grad(whole, [everything[i] for i in others], retain_graph=True, allow_unused=True),
                strict=True,
            ):
                if g is not None:
                    sums[i] += g / accumulate
            target = z if at == "representation" else trunk
            J = torch.stack(
                [
                    flat(torch.autograd.grad(weighted[tasks[i]], target, retain_graph=True, allow_unused=True), target)
                    for i in present
                ]
            )
            if at == "representation":
                vector = asked(J)
                of_trunk = torch.autograd.grad(z, trunk, pieces(vector, z), retain_graph=True)
                for i, g in zip(places, of_trunk, strict=True):
                    sums[i] += g / accumulate
            else:
                spread = J.new_zeros(len(tasks), J.shape[1]).index_copy(0, torch.tensor(present), J) / accumulate
                rows = spread if rows is None else rows + spread
                seen = set(present) if index == 0 else seen | set(present)
            if given.rest is not None:
                for i, g in enumerate(
                    torch.autograd.grad(given.rest, everything, retain_graph=True, allow_unused=True)
                ):
                    if g is not None:
                        sums[i] += g / accumulate
        if rows is not None:
            # The mean over the batches there are; Lightning divides by `accumulate` in an incomplete step too.
            present, share = sorted(seen), len(step) / accumulate
            J = rows[present] / share
            vector = asked(J)
            for i, g in zip(places, pieces(vector, trunk), strict=True):
                sums[i] += g * share
        weights = loss_weights * noted(J, vector, present)
        for p, g in zip(everything, sums, strict=True):
            p.grad = g
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scalarized.step(1 / len(step))
        found.note(weights, scalarizer)
    return found
