"""Scalarizers and aggregators in a plain loop, used as in TorchJD's manual: the reference for the callbacks.

One process, no Lightning. From the package under test it only takes the seed of the random numbers and the requirements that a
strategy declares. It calls a scalarizer with the losses and back-propagates through it; it calls an aggregator with the whole
matrix of gradients, computed one by one with ``torch.autograd.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from textbook import Forward
from torch import Tensor, nn

from lightning_gradnorm.strategies.facts import facts_of
from lightning_gradnorm.strategies.rng import seeded_rng

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
        # The value is the loss itself; the gradient that passes on from it has the user's coefficient.
        own = {t: L.detach() + coefficients.get(t, 1.0) * (L - L.detach()) for t, L in losses.items()}
        self.last |= {task: loss.detach() for task, loss in losses.items()}
        if self.scalarizer is None or set(self.last) < set(self.tasks):
            return torch.stack(list(own.values())).sum(), ones
        values = torch.stack([own.get(task, self.last[task]) for task in self.tasks])
        with seeded_rng(self.seed, self.calls):
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
        if facts_of(scalarizer).needs_losses_after_step and scalarized.calls:
            before_batch(number * accumulate + len(step) - 1)
            with torch.no_grad():
                again = forward(step[-1]).losses
            scalarizer.update(torch.stack([again.get(t, scalarized.last[t]) for t in tasks]))
        if facts_of(scalarizer).steps_each_epoch and (number + 1) % (len(steps) // epochs) == 0:
            scalarizer.step()
        found.note(weights, scalarizer)
    return found


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """The tensors as one vector; ``None`` counts as zeros."""
    return torch.cat(
        [(torch.zeros_like(of) if t is None else t).flatten() for t, of in zip(tensors, like, strict=True)]
    )


def pieces(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flat`."""
    return [part.view_as(of) for part, of in zip(vector.split([of.numel() for of in like]), like, strict=True)]


def coefficients_of(vector: Tensor, rows: Tensor) -> Tensor:
    """``λ`` of ``λ @ rows = vector``, if the rows are independent: computed from the result, not by the aggregator."""
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
    """Train the heads by their own gradients, and the trunk by ``aggregator(J)``;
    at the parameters, all that is outside of the heads."""
    model.train()
    found = ByHand(list(tasks))
    seed = torch.initial_seed() % 2**62
    scalarized, calls = Scalarized(tasks, scalarizer, seed, learner), 0
    everything = [p for p in model.parameters() if p.requires_grad]
    shared = model.get_submodule("encoder").parameters() if at == "representation" else _outside_heads(model)
    trunk = [p for p in shared if p.requires_grad]
    others = [p for p in everything if not any(p is q for q in trunk)]
    learned = [] if scalarizer is None else list(scalarizer.parameters())

    def asked(J: Tensor) -> Tensor:
        nonlocal calls
        with seeded_rng(seed, calls):
            vector = aggregator(J)
        calls += 1
        return vector

    def add(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], factor: float = 1.0) -> None:
        for p, g in zip(parameters, gradients, strict=True):
            if g is not None:
                p.grad = factor * g if p.grad is None else p.grad + factor * g

    for number, step in enumerate(_steps(batches, accumulate, 1)):
        optimizer.zero_grad()
        mean_J, seen = torch.zeros(len(tasks), sum(p.numel() for p in trunk), dtype=torch.float64), set()
        for index, batch in enumerate(step):
            before_batch(number * accumulate + index)
            given = forward(batch)
            z = given.representation
            total, loss_weights = scalarized(given.losses, {})
            if learned:
                add(learned, _gradient([total], learned))
            c = {task: (coefficients or {}).get(task, 1.0) for task in tasks}
            L = {
                t: w.item() * c[t] * given.losses[t]
                for t, w in zip(tasks, loss_weights, strict=True)
                if t in given.losses
            }
            present = [i for i, task in enumerate(tasks) if task in L]
            add(others, _gradient([torch.stack(list(L.values())).sum()], others), 1 / accumulate)
            if given.rest is not None:
                add(everything, _gradient([given.rest], everything), 1 / accumulate)
            at_what = z if at == "representation" else trunk
            J = torch.stack([flat(_gradient([L[tasks[i]]], at_what), at_what) for i in present])
            if at == "representation":
                vector = asked(J)
                add(trunk, _gradient(z, trunk, pieces(vector, z)), 1 / accumulate)
            else:
                mean_J[present] += J / len(step)
                seen |= set(present)
        if at == "parameters":
            present = sorted(seen)
            J = mean_J[present]
            vector = asked(J)
            # Lightning divides by `accumulate` in an incomplete step too.
            add(trunk, pieces(vector, trunk), len(step) / accumulate)
        weights = torch.zeros(len(tasks), dtype=J.dtype)
        weights[present] = coefficients_of(vector, J)
        found.norms.append(dict.fromkeys(tasks, 0.0) | {tasks[i]: float(J[k].norm()) for k, i in enumerate(present)})
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scalarized.step(1 / len(step))
        found.note(loss_weights * weights, scalarizer)
    return found


def _outside_heads(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "_head" not in name]


def _gradient(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], arriving: Sequence[Tensor] | None = None
) -> Sequence[Tensor | None]:
    return torch.autograd.grad(outputs, inputs, arriving, retain_graph=True, allow_unused=True)
