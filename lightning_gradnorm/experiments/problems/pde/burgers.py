"""Burgers' equation, whose smooth start steepens to a shock."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradnorm.experiments.problems.pde.derivatives import gradient
from lightning_gradnorm.experiments.problems.pde.equation import Array, Equation, Function, with_gradient


class Burgers(Equation):
    r"""Burgers' equation :math:`u_t + u u_x = \nu u_{xx}`, x in [-1, 1], t in [0, 1].

    It starts from :math:`u(x, 0) = -\sin(\pi x)` and is zero at x = ±1. With the usual viscosity, a shock forms at x = 0
    after t = 0.3. The reference is the Cole–Hopf integral

    .. math:: u(x, t) = -\frac{\int \sin(\pi(x - \eta))\, f(x - \eta)\, e^{-\eta^2 / 4 \nu t} d\eta}
        {\int f(x - \eta)\, e^{-\eta^2 / 4 \nu t} d\eta}, \quad f(y) = e^{-\cos(\pi y) / 2 \pi \nu},

    by Gauss–Hermite quadrature.

    Source: Basdevant et al., Spectral and finite difference solutions of the Burgers equation, Computers & Fluids 14, 1986;
    as a test of physics-informed networks Raissi, Perdikaris, Karniadakis, J. Comput. Phys. 378, 2019, appendix A.

    Args:
        viscosity: ν; the usual one is 0.01/π. The smaller, the steeper the shock.
        nodes: Nodes of the quadrature; 200 give 10 digits or more with the usual viscosity.

    Raises:
        ValueError: A number is not positive.

    Example:
        >>> points = torch.tensor([[0.5, 0.0], [0.5, 1.0], [-0.5, 1.0]], dtype=torch.float64)
        >>> Burgers().reference(points).flatten().round(decimals=4).tolist()
        [-1.0, -0.3762, 0.3762]
    """

    coordinates = ("x", "t")
    lower, upper = (-1.0, 0.0), (1.0, 1.0)
    tasks = ("pde", "boundary", "initial")
    grid_shape = (201, 101)

    def __init__(self, viscosity: float = 0.003183098861837907, nodes: int = 200) -> None:
        self._check_positive(viscosity=viscosity, nodes=nodes)
        self.viscosity, self.nodes = float(viscosity), int(nodes)

    @override
    def draw(self, task: str, count: int, stream: np.random.Generator) -> Array:
        if task == "pde":
            return self.inside(count, stream)
        points = self.on_faces(count, stream, along=[0])
        if task == "initial":
            points = self.inside(count, stream)
            points[:, 1] = 0.0
        return points

    @override
    def reference(self, points: Tensor) -> Tensor:
        z, weights = (torch.from_numpy(one).to(points) for one in np.polynomial.hermite.hermgauss(self.nodes))
        x, t = points[..., :1], points[..., 1:]
        y = math.pi * (x - 2 * (self.viscosity * t).sqrt() * z)
        # f divided by its largest value at each point, because its exponent is about 50.
        f = weights * torch.softmax(-torch.cos(y) / (2 * math.pi * self.viscosity), dim=-1)
        return -(f * torch.sin(y)).sum(-1, keepdim=True) / f.sum(-1, keepdim=True)

    @override
    def residual(self, task: str, function: Function, points: Tensor) -> Tensor:
        if task == "boundary":
            return function(points)[:, 0]
        if task == "initial":
            return function(points)[:, 0] + torch.sin(math.pi * points[:, 0])
        x = with_gradient(points)
        u = function(x)
        slopes = gradient(u, x)
        u_xx = gradient(slopes[:, 0], x)[:, 0]
        return slopes[:, 1] + u[:, 0] * slopes[:, 0] - self.viscosity * u_xx
