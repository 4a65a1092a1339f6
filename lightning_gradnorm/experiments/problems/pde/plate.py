"""Kirchhoff's plate: a fourth-order equation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradnorm.experiments.problems.pde.derivatives import (
    directional_derivatives,
    gradient,
    second_derivatives,
)
from lightning_gradnorm.experiments.problems.pde.equation import Equation, Function, with_gradient


class KirchhoffPlate(Equation):
    r"""A thin square plate, simply supported, bending under a load: :math:`D \Delta^2 w = p_0 \sin(\pi x/a) \sin(\pi y/a)`.

    At the edges the deflection w is zero (``boundary``), and so is the bending moment across them (``moment``):
    :math:`D (w_{xx} + \mu w_{yy}) = 0` where x is fixed, and the same with x and y exchanged. The solution is
    :math:`p_0 a^4 / (4 \pi^4 D) \sin(\pi x/a) \sin(\pi y/a)`.

    Source: Bischof and Kraus, Multi-Objective Loss Balancing for Physics-Informed Deep Learning (arXiv 2110.09813). The
    defaults come from the authors' code.

    Args:
        side: a, in meters.
        rigidity: D, in MNm.
        load: p₀, in MN/m².
        poisson_ratio: μ.

    Raises:
        ValueError: A number is not positive.

    Example:
        >>> round(float(KirchhoffPlate().reference(torch.tensor([[5.0, 5.0]]))), 5)
        0.01848
    """

    coordinates = ("x", "y")
    tasks = ("pde", "boundary", "moment")
    grid_shape = (101, 101)

    def __init__(
        self, side: float = 10.0, rigidity: float = 20.833333333333332, load: float = 0.015, poisson_ratio: float = 0.2
    ) -> None:
        self._check_positive(side=side, rigidity=rigidity, load=load, poisson_ratio=poisson_ratio)
        self.side, self.rigidity, self.load, self.poisson_ratio = map(float, (side, rigidity, load, poisson_ratio))
        self.lower, self.upper = (0.0, 0.0), (self.side, self.side)

    def _shape(self, points: Tensor) -> Tensor:
        x, y = points[..., :1], points[..., 1:]
        return torch.sin(math.pi * x / self.side) * torch.sin(math.pi * y / self.side)

    @override
    def reference(self, points: Tensor) -> Tensor:
        return self.load * self.side**4 / (4 * math.pi**4 * self.rigidity) * self._shape(points)

    @override
    def residual(self, task: str, function: Function, points: Tensor) -> Tensor:
        if task == "boundary":
            return function(points)[:, 0]
        if task == "moment":
            x = with_gradient(points)
            w_xx, w_yy = second_derivatives(gradient(function(x), x), x)
            at_x = (points[:, 0] == self.lower[0]) | (points[:, 0] == self.upper[0])
            across, along = torch.where(at_x, w_xx, w_yy), torch.where(at_x, w_yy, w_xx)
            return self.rigidity * (across + self.poisson_ratio * along)
        angles = torch.arange(3, dtype=points.dtype, device=points.device) * math.pi / 3
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        # The mean fourth derivative along three directions 60 degrees apart is 3/8 of the Laplacian of the Laplacian.
        bending = directional_derivatives(function, points, directions, order=4).mean(0) * 8 / 3
        return self.rigidity * bending - self.load * self._shape(points)[:, 0]
