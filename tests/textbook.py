"""GradNorm as a textbook would write it: the reference for the callback.

Double backward (`create_graph=True`), one plain loop, one process, float64, no Lightning. Slow and obvious on purpose:
it takes nothing from the package under test, so an error goes unseen only if it is made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Losses = Mapping[str, Tensor]


@dataclass
class Forward:
    """One micro-batch's results: the raw task losses, the other terms in `loss`, and the heads' input."""

    losses: dict[str, Tensor]
    rest: Tensor | None = None
    representation: list[Tensor] = field(default_factory=list)


@dataclass
class Trajectory:
    """One entry per optimizer step; the lists of updates have one entry per weight update."""

    tasks: list[str]
    weights: list[dict[str, float]] = field(default_factory=list)  # in force after the step
    grad_norms: list[dict[str, float]] = field(default_factory=list)  # G_i
    rates: list[dict[str, float]] = field(default_factory=list)  # r_i
    objective: list[float] = field(default_factory=list)  # L_grad


def train(
    model: nn.Module,
    forward: Callable[[Any], Forward],
    micro_batches: Sequence[Any],
    shared: Sequence[nn.Parameter],
    network_optimizer: torch.optim.Optimizer,
    *,
    alpha: float = 1.5,
    weight_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = partial(torch.optim.Adam, lr=0.025),
    initial_losses: int | Mapping[str, float] = 1,
    initial_weights: Mapping[str, float] | None = None,
    priorities: Mapping[str, float] | None = None,
    update_every: int = 1,
    stop_after: int | None = None,
    min_weight: float = 1e-4,
    coefficients: Mapping[str, float] | None = None,
    accumulate: int | Sequence[int] = 1,
    norm_of: str = "weight",
    tasks: Sequence[str] | None = None,
    skip_steps: Sequence[int] = (),
    absent_tasks: str = "leave_out",
    before_micro_batch: Callable[[int], object] = lambda index: None,
    by_closure: bool = False,
    weight_space: str = "linear",
    smoothing: float = 0.0,
) -> Trajectory:
    """Train `model` with GradNorm, `accumulate` micro-batches to an optimizer step (a list: step by step).

    `tasks` names all of them where a batch may lack some (then use an optimizer of the weights that has no state): a
    task's loss is the mean over the micro-batches that have it, its gradient the mean over all of them. No weight step
    is taken in `skip_steps`, nor as long as a task's loss has never been positive. With `absent_tasks="last_seen"` an
    absent task has the loss and, but for its weight, the gradient norm of the last weight update it was present in.
    `by_closure`: the network's optimizer evaluates the losses itself, as often as it likes, with the weights that were in
    force when the step began. In the `weight_space` "log" the weights' optimizer moves their logarithms. With `smoothing`
    the norms (but for the weight) and losses are means over all updates so far, each worth β times as much as the next.
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    w: Tensor | None = None
    run: Trajectory | None = None
    first_losses: dict[str, list[Tensor]] = {}
    history: dict[str, list[tuple[Tensor, Tensor]]] = {}
    last_seen: dict[str, tuple[Tensor, Tensor]] = {}
    sizes = [accumulate] * (len(micro_batches) // accumulate) if isinstance(accumulate, int) else list(accumulate)
    micro_batch = 0
    for step, size in enumerate(sizes):
        passes = []
        for _ in range(size):
            before_micro_batch(micro_batch)
            passes.append(forward(micro_batches[micro_batch]))
            micro_batch += 1
        if w is None or run is None:
            run = Trajectory(list(tasks or passes[0].losses))
            start = torch.tensor([(initial_weights or {}).get(t, 1.0) for t in run.tasks], dtype=torch.float64)
            start = len(run.tasks) * start / start.sum()
            leaf = (start.log() if weight_space == "log" else start).requires_grad_()
            w_optimizer = weight_optimizer([leaf])
        w = leaf.exp() if weight_space == "log" else leaf
        shown = [[f.losses[t] for f in passes if t in f.losses] for t in run.tasks]
        here = [i for i, of_task in enumerate(shown) if of_task]
        names = [run.tasks[i] for i in here]
        c = torch.tensor([(coefficients or {}).get(t, 1.0) for t in names], dtype=torch.float64)
        p = torch.tensor([(priorities or {}).get(t, 1.0) for t in run.tasks], dtype=torch.float64)
        L = torch.stack([torch.stack(shown[i]).mean() for i in here])
        share = torch.stack([torch.stack(shown[i]).sum() / size for i in here])  # where absent it adds nothing
        total = (w[here] * c * share).sum()
        for f in passes:
            if f.rest is not None:
                total = total + f.rest / size
        old = w.detach()[here].clone()
        network_gradient = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)

        frozen = stop_after is not None and step >= stop_after
        measured = step % update_every == 0 and not frozen and step not in skip_steps
        if measured:
            where = list(shared) if norm_of == "weight" else [z for f in passes for z in f.representation]
            norms = []
            for i in range(len(here)):
                gradients = torch.autograd.grad(
                    w[here][i] * c[i] * share[i], where, create_graph=True, allow_unused=True
                )
                norms.append(torch.cat([g.flatten() for g in gradients if g is not None]).norm())
            G = torch.stack(norms)
            if smoothing:
                for i, t, norm, loss in zip(here, names, G, L, strict=True):
                    history.setdefault(t, []).append(((norm / w[i]).detach(), loss.detach()))
                means = [_faded_mean(history[t], smoothing) for t in names]
                G, L = w[here] * torch.stack([n for n, _ in means]), torch.stack([loss for _, loss in means])
            given, count = ({}, initial_losses) if isinstance(initial_losses, int) else (initial_losses, 1)
            for t, loss in zip(names, L.detach(), strict=True):
                seen = first_losses.setdefault(t, [])
                if len(seen) < count and (seen or loss > 0 or alpha == 0):
                    seen.append(loss)
            if absent_tasks == "last_seen":
                for i, t, norm, loss in zip(here, names, G, L, strict=True):
                    last_seen[t] = (norm / w[i]).detach(), loss.detach()
                gone = [i for i, t in enumerate(run.tasks) if t in last_seen and i not in here]
                if gone:
                    unweighted, losses = zip(*(last_seen[run.tasks[i]] for i in gone), strict=True)
                    G = torch.cat([G, w[gone] * torch.stack(unweighted)])
                    L = torch.cat([L, torch.stack(losses)])
                    here, names = here + gone, names + [run.tasks[i] for i in gone]
        waiting = [t for t, seen in first_losses.items() if not seen and t not in given]
        if measured and not waiting:
            known = {t: torch.stack(seen).mean() for t, seen in first_losses.items() if seen}
            L0 = torch.stack([torch.tensor(given[t]).double() if t in given else known[t] for t in names])
            ratio = L.detach() / L0
            r = ratio / ratio.mean()
            target = (G.mean() * (p / p.mean())[here] * r**alpha).detach()
            L_grad = (G - target).abs().sum()
            (leaf.grad,) = torch.autograd.grad(L_grad, leaf)
            run.grad_norms.append(dict(zip(names, G.detach().tolist(), strict=True)))
            run.rates.append(dict(zip(names, r.tolist(), strict=True)))
            run.objective.append(float(L_grad.detach()))
            w_optimizer.step()
            with torch.no_grad():
                w = (leaf.exp() if weight_space == "log" else leaf.clone()).clamp(min=min_weight)
                w[here] *= (len(run.tasks) - (w.sum() - w[here].sum())) / w[here].sum()
                leaf.copy_(w.log() if weight_space == "log" else w)

        for parameter, gradient in zip(parameters, network_gradient, strict=True):
            parameter.grad = gradient
        if by_closure:
            window = micro_batches[micro_batch - size : micro_batch]
            network_optimizer.step(
                partial(_evaluate, parameters, forward, window, dict(zip(names, old * c, strict=True)))
            )
        else:
            network_optimizer.step()
        run.weights.append(dict(zip(run.tasks, w.detach().tolist(), strict=True)))
    assert run is not None, "no micro-batch was given"
    return run


def _faded_mean(history: Sequence[tuple[Tensor, Tensor]], beta: float) -> tuple[Tensor, Tensor]:
    share = torch.tensor([beta**age for age in reversed(range(len(history)))], dtype=torch.float64)
    norms, losses = (torch.stack(numbers) for numbers in zip(*history, strict=True))
    return (share * norms).sum() / share.sum(), (share * losses).sum() / share.sum()


def _evaluate(
    parameters: Sequence[nn.Parameter],
    forward: Callable[[Any], Forward],
    window: Sequence[Any],
    factors: Mapping[str, Tensor],
) -> Tensor:
    """Set the gradient of the weighted loss where the parameters are now."""
    passes = [forward(micro_batch) for micro_batch in window]
    total = torch.stack([factors[t] * loss for one in passes for t, loss in one.losses.items()]).sum() / len(window)
    for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters), strict=True):
        parameter.grad = gradient
    return total.detach()
