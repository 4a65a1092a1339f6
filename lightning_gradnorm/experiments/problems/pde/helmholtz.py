"""Helmholtz's equation in two dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradnorm._messages import is_number
from lightning_gradnorm.experiments.problems.pde.derivatives import gradient, second_derivatives
from lightning_gradnorm.experiments.problems.pde.equation import Equation, Function, with_gradient


class Helmholtz(Equation):
    r"""Helmholtz's equation :math:`u_{xx} + u_{yy} + k^2 u = q` on [-1, 1]², u zero at the edges.

    The source q is chosen so that the solution is :math:`\sin(a_1 \pi x) \sin(a_2 \pi y)`. The equation's loss starts a
    thousand times as large as the boundary's, which equal weights therefore learn late.

    Source: Wang, Teng, Perdikaris, Understanding and mitigating gradient flow pathologies in physics-informed neural
    networks, SIAM J. Sci. Comput. 43, 2021 (arXiv 2001.04536), section 2.3; also in Bischof and Kraus (arXiv 2110.09813).

    Args:
        k: The wave number.
        waves: Integers ``a_1`` and ``a_2``: half waves of the solution per unit length, along x and y.

    Raises:
        ValueError: ``k`` is not positive, or ``waves`` are not two positive integers.

    Example:
        >>> Helmholtz().reference(torch.tensor([[0.5, 0.125], [0.3, 1.0]])).round(decimals=3)
        tensor([[1.],
                [0.]])
    """

    coordinates = ("x", "y")
    lower, upper = (-1.0, -1.0), (1.0, 1.0)
    grid_shape = (101, 101)

    def __init__(self, k: float = 1.0, waves: Sequence[int] = (1, 4)) -> None:
        self._check_positive(k=k)
        is_pair = isinstance(waves, Sequence) and len(waves) == 2
        if not (is_pair and all(is_number(a) and a == int(a) and a > 0 for a in waves)):
            raise ValueError(f"Helmholtz: waves should be two positive integers; got {waves!r}.")
        self.k, self.waves = float(k), (int(waves[0]), int(waves[1]))

    @override
    def reference(self, points: Tensor) -> Tensor:
        x, y = points[..., :1], points[..., 1:]
        return torch.sin(self.waves[0] * math.pi * x) * torch.sin(self.waves[1] * math.pi * y)

    @override
    def residual(self, task: str, function: Function, points: Tensor) -> Tensor:
        if task == "boundary":
            return function(points)[:, 0]
        x = with_gradient(points)
        u = function(x)
        u_xx, u_yy = second_derivatives(gradient(u, x), x)
        factor = self.k**2 - math.pi**2 * (self.waves[0] ** 2 + self.waves[1] ** 2)
        return u_xx + u_yy + self.k**2 * u[:, 0] - factor * self.reference(points)[:, 0]
