"""InverseNorm, LRAnnealing and NTKWeights from their published equations, in plain floats, and a loop that uses them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gradnorm.strategies import InverseNorm, LRAnnealing, NTKWeights
from lightning_gradnorm.strategies.norm_weighting import NormFormula

Weigh = Callable[[Mapping[str, list[float]], Mapping[str, float]], dict[str, float]]
"""From the gradients and losses of the present tasks to their weights; remembers the steps before."""


def euclidean(gradient: Sequence[float]) -> float:
    return math.sqrt(math.fsum(one * one for one in gradient))


def faded_mean(values: Sequence[float], beta: float) -> float:
    shares = [beta ** (len(values) - 1 - s) for s in range(len(values))]
    return math.fsum(share * one for share, one in zip(shares, values, strict=True)) / math.fsum(shares)


def inverse_norm(beta: float, reference: str | float = "mean", priorities: Mapping[str, float] | None = None) -> Weigh:
    seen: dict[str, list[float]] = {}

    def weigh(gradients: Mapping[str, list[float]], losses: Mapping[str, float]) -> dict[str, float]:
        for task, gradient in gradients.items():
            seen.setdefault(task, []).append(euclidean(gradient))
        means = {task: faded_mean(seen[task], beta) for task in gradients}
        total = math.fsum(means.values())
        given = {"mean": total / len(means), "total": total}.get(str(reference), reference)
        p = priorities or dict.fromkeys(means, 1.0)
        mean_priority = math.fsum(p.values()) / len(p)
        return {task: p[task] / mean_priority * float(given) / n for task, n in means.items()}

    return weigh


def annealing(residual: str, rate: float, norm: str) -> Weigh:
    weights: dict[str, float] = {}

    def weigh(gradients: Mapping[str, list[float]], losses: Mapping[str, float]) -> dict[str, float]:
        if residual not in gradients:
            return {task: weights.get(task, 1.0) for task in gradients}
        for task, gradient in gradients.items():
            if norm == "l2":
                ratio = euclidean(gradients[residual]) / euclidean(gradient)
            else:
                largest = max(map(abs, gradients[residual]))
                ratio = largest / (math.fsum(map(abs, gradient)) / len(gradient))
            weights[task] = 1.0 if task == residual else (1 - rate) * weights.get(task, 1.0) + rate * ratio
        return {task: weights[task] for task in gradients}

    return weigh


def ntk(beta: float) -> Weigh:
    seen: dict[str, list[float]] = {}

    def weigh(gradients: Mapping[str, list[float]], losses: Mapping[str, float]) -> dict[str, float]:
        for task, gradient in gradients.items():  # of √L: ∇L / (2 √L)
            of_root = [one / (2 * math.sqrt(losses[task])) for one in gradient]
            seen.setdefault(task, []).append(math.fsum(one * one for one in of_root))
        k = {task: faded_mean(seen[task], beta) for task in gradients}
        return {task: math.fsum(k.values()) / one for task, one in k.items()}

    return weigh


class RuleByHand(NamedTuple):
    make: Callable[[], NormFormula]
    equations: Callable[[], Weigh]
    update_every: int = 1
    normalize: bool = False


_PRIORITIES = {"pde": 1.0, "boundary": 2.0, "initial": 0.5}
RULES: dict[str, RuleByHand] = {
    "InverseNorm": RuleByHand(InverseNorm, lambda: inverse_norm(0.9), normalize=True),
    "InverseNorm of the total": RuleByHand(
        lambda: InverseNorm(0.5, "total", normalize=False), lambda: inverse_norm(0.5, "total")
    ),
    "InverseNorm, seldom": RuleByHand(
        lambda: InverseNorm(0.0, normalize=False, update_every=3), lambda: inverse_norm(0.0), update_every=3
    ),
    "InverseNorm of a number": RuleByHand(
        lambda: InverseNorm(0.99, 0.3, normalize=False, priorities=_PRIORITIES),
        lambda: inverse_norm(0.99, 0.3, _PRIORITIES),
    ),
    "InverseNorm with priorities": RuleByHand(
        lambda: InverseNorm(priorities=_PRIORITIES), lambda: inverse_norm(0.9, priorities=_PRIORITIES), normalize=True
    ),
    "LRAnnealing": RuleByHand(lambda: LRAnnealing("pde"), lambda: annealing("pde", 0.1, "max_mean"), update_every=10),
    "LRAnnealing, L2": RuleByHand(
        lambda: LRAnnealing("pde", 0.9, norm="l2", update_every=1), lambda: annealing("pde", 0.9, "l2")
    ),
    "NTKWeights": RuleByHand(NTKWeights, lambda: ntk(0.0)),
    "NTKWeights, averaged": RuleByHand(lambda: NTKWeights(0.9, update_every=2), lambda: ntk(0.9), update_every=2),
}


@dataclass
class Trained:
    weights: list[dict[str, float]]
    """After each step."""
    network: dict[str, Tensor]


def train_by_hand(model: Any, rule: RuleByHand, batches: Sequence[Any], W: Sequence[nn.Parameter]) -> Trained:
    """Train with one backward pass per task, the weights of the previous step, and the formula in plain floats."""
    weigh, optimizer = rule.equations(), model.configure_optimizers()
    weights, told = dict.fromkeys(model.tasks, 1.0), []
    for step, batch in enumerate(batches):
        losses = model.task_losses(batch)
        gradients = {}
        for task, loss in losses.items():
            found = torch.autograd.grad(loss, list(W), retain_graph=True, allow_unused=True)
            pairs = zip(found, W, strict=True)
            gradients[task] = [
                x for g, p in pairs for x in (torch.zeros_like(p) if g is None else g).flatten().tolist()
            ]
        optimizer.zero_grad()
        total = model.rest()
        for task, loss in losses.items():
            total = total + weights[task] * loss
        total.backward()
        optimizer.step()
        if step % rule.update_every == 0:
            found_weights = weigh(gradients, {task: float(loss.detach()) for task, loss in losses.items()})
            if rule.normalize:
                shared = math.fsum(weights[task] for task in found_weights)
                scale = shared / math.fsum(found_weights.values())
                found_weights = {task: scale * w for task, w in found_weights.items()}
            weights |= found_weights
        told.append(dict(weights))
    return Trained(told, {f"encoder.{n}": p.detach() for n, p in model.encoder.named_parameters()})
