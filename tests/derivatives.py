"""Losses with derivatives with respect to the inputs, or through `torch.func`, as in physics-informed networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from models import FEATURES, Automatic, Batch, network_sgd
from textbook import Forward
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Network = Callable[[Tensor], Tensor]
"""From inputs, shape (n, 5), to a prediction, shape (n, 3): the encoder and one head."""


def plain(f: Network, x: Tensor) -> Tensor:
    return f(x)


def _each(f: Network) -> Network:
    """The network of one sample."""
    return lambda sample: f(sample[None])[0]


def _gradient(f: Network, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return found


def _penalized(f: Network, x: Tensor) -> Tensor:
    """A prediction and a gradient penalty, of one call of the network."""
    x = x.clone().requires_grad_()
    y = f(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return torch.cat([y, slope.norm(dim=1, keepdim=True) - 1], 1)


def _dual(f: Network, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return torch.cat(list(forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x))))), 1)


def _of_sum(f: Network) -> Network:
    return lambda x: f(x).sum(0)


ORDINARY: Mapping[str, Callable[[Network, Tensor], Tensor]] = {
    "autograd.grad": _gradient,
    "a gradient penalty": _penalized,
    "autograd.grad of a checkpoint": lambda f, x: _gradient(lambda x: checkpoint(f, x, use_reentrant=False), x),
    "a checkpoint of autograd.grad": lambda f, x: checkpoint(_gradient, f, x, use_reentrant=False),
    "functional.jacobian": lambda f, x: torch.autograd.functional.jacobian(_of_sum(f), x, create_graph=True),
    "functional.jacobian, vectorized": lambda f, x: torch.autograd.functional.jacobian(
        _of_sum(f), x, create_graph=True, vectorize=True
    ),
}
"""Ways that leave tensors as they are: whatever is called is part of the ordinary graph."""

TRANSFORMED: Mapping[str, Callable[[Network, Tensor], Tensor]] = {
    "vmap": lambda f, x: vmap(_each(f))(x),
    "vmap of grad": lambda f, x: vmap(grad(lambda sample: _each(f)(sample).square().sum()))(x),
    "vmap of jacrev": lambda f, x: vmap(jacrev(_each(f)))(x),
    "vmap of jacfwd": lambda f, x: vmap(jacfwd(_each(f)))(x),
    "vmap of hessian": lambda f, x: vmap(hessian(_each(f)))(x),
    "grad": lambda f, x: grad(lambda x: f(x).square().sum())(x),
    "jvp": lambda f, x: torch.cat(jvp(f, (x,), (torch.ones_like(x),)), 1),
    "forward-mode derivatives": _dual,
    "a prediction and its gradient": lambda f, x: torch.cat([f(x), grad(lambda x: f(x).square().sum())(x)], 1),
}
"""Ways in which the network is called inside a transform."""

WAYS = ORDINARY | TRANSFORMED


class Derived(Automatic):
    """Each task has a loss of one of these ways, ``plain`` if it has no other; a network without biases."""

    def __init__(self, ways: Mapping[str, str], T: int = 3) -> None:
        self.ways = ways
        super().__init__(T)

    def build(self) -> None:
        super().build()
        self.encoder[0] = nn.Linear(5, 7, bias=False)  # type: ignore[operator]
        for task in self.tasks:
            setattr(self, f"{task}_head", nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 3)))

    def forward_for_textbook(self, batch: Batch) -> Forward:
        seen: list[Tensor] = []
        shared = None

        def encode(x: Tensor) -> Tensor:
            seen.append(self.encoder(x))
            return seen[-1]

        losses = {}
        for number, task in enumerate(self.tasks):
            head = self.get_submodule(f"{task}_head")
            if task in self.ways:
                losses[task] = WAYS[self.ways[task]](lambda x, head=head: head(encode(x)), batch["x"]).square().mean()  # type: ignore[misc]
            else:
                shared = encode(batch["x"]) if shared is None else shared
                losses[task] = F.mse_loss(head(shared), batch[task])
            losses[task] = (1 + number) * losses[task]
        return Forward(losses, representation=seen)

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        return self.forward_for_textbook(batch).losses

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return network_sgd(self.parameters())


def all_of(way: str) -> dict[str, str]:
    """Every task has its loss in this way."""
    return dict.fromkeys(("seg", "depth", "normal"), way)


def one_of(way: str) -> dict[str, str]:
    """One of three tasks has."""
    return {"depth": way}


class Replaced(Automatic):
    """Its losses are those of `functional_call` with a step already taken, as a meta-learner's are."""

    def _replaced(self, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
        fast = {name: 0.9 * p for name, p in self.named_parameters()}
        seen: list[Tensor] = []

        def call(module: str, *args: Any) -> Any:
            inside = {n.removeprefix(f"{module}."): p for n, p in fast.items() if n.startswith(f"{module}.")}
            return functional_call(self.get_submodule(module), inside, args)

        seen.append(call("encoder", batch["x"]))
        return {task: F.mse_loss(call(f"{task}_head", seen[0]), batch[task]) for task in self.tasks}, seen

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        return self._replaced(batch)[0]

    def forward_for_textbook(self, batch: Batch) -> Forward:
        losses, seen = self._replaced(batch)
        return Forward(losses, representation=seen)
