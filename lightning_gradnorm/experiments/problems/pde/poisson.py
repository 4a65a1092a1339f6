"""Poisson's equation in one dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradnorm.experiments.problems.pde.derivatives import gradient, second_derivatives
from lightning_gradnorm.experiments.problems.pde.equation import Equation, Function, with_gradient


class Poisson(Equation):
    r"""Poisson's equation :math:`-u'' = (k\pi)^2 \sin(k\pi x)` on [-1, 1], u zero at the ends; the solution is sin(kπx).

    For tests and first steps: it is learned in seconds.

    Args:
        k: The number of half waves in a unit.

    Raises:
        ValueError: ``k`` is no positive integer, without which the solution would not vanish at the ends.

    Example:
        >>> Poisson(k=1).reference(torch.tensor([[0.5]]))
        tensor([[1.]])
    """

    coordinates = ("x",)
    lower, upper = (-1.0,), (1.0,)
    grid_shape = (201,)

    def __init__(self, k: int = 1) -> None:
        self._check_positive(k=k)
        if k != int(k):
            raise ValueError(f"Poisson: k should be an integer, so that the solution is zero at the ends; got {k}.")
        self.k = int(k)

    @override
    def reference(self, points: Tensor) -> Tensor:
        return torch.sin(self.k * math.pi * points)

    @override
    def residual(self, task: str, function: Function, points: Tensor) -> Tensor:
        if task == "boundary":
            return function(points)[:, 0]
        x = with_gradient(points)
        (u_xx,) = second_derivatives(gradient(function(x), x), x)
        return u_xx + (self.k * math.pi) ** 2 * self.reference(points)[:, 0]
