"""Optimizers that evaluate the losses several times in one step: SAM, line searches, LBFGS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class SAM(torch.optim.SGD):
    """Foret et al. 2021: climb along the gradient, take the gradient there, come back, step. By a closure, or by hand."""

    rho = 0.05

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        self.climbed = [(p, self.rho * p.grad / norm) for p in parameters]
        for p, e in self.climbed:
            p.add_(e)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, e in self.climbed:
            p.sub_(e)
        torch.optim.SGD.step(self)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        assert closure is not None
        loss = torch.enable_grad()(closure)()
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()
        return loss


class Backtracking(torch.optim.Optimizer):
    """Halves its step until the loss falls enough (Armijo's rule): the number of evaluations is not known in advance."""

    def __init__(self, parameters: Any, lr: float = 4.0) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        evaluate = torch.enable_grad()(closure)
        before = evaluate()
        parameters = [p for group in self.param_groups for p in group["params"]]
        start = [(p.clone(), p.grad.clone()) for p in parameters]
        slope = sum(float(gradient.square().sum()) for _, gradient in start)
        lr = self.param_groups[0]["lr"]
        while lr > 1e-3:
            for p, (old, gradient) in zip(parameters, start, strict=True):
                p.copy_(old - lr * gradient)
            if float(evaluate()) <= float(before) - 0.3 * lr * slope:
                break
            lr /= 2
        return before


class Once(torch.optim.SGD):
    """Evaluates its closure once, as almost all do."""


class Twice(torch.optim.SGD):
    """Evaluates the same function twice, which should change nothing."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:  # type: ignore[override]
        assert closure is not None
        torch.enable_grad()(closure)()
        return super().step(closure)


CLIMBERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SAM": partial(SAM, lr=0.05, momentum=0.9),
    "LBFGS": partial(torch.optim.LBFGS, lr=0.1, max_iter=4),
    "LBFGS with a line search": partial(torch.optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
    "backtracking": Backtracking,
}
