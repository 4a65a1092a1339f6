"""The network that represents the solution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradnorm.experiments.problems.pde.equation import Equation


class TanhMLP(nn.Module):
    """Fully connected layers with tanh, from a point to the solution there.

    Coordinates are standardized first, so uniform points have mean 0 and standard deviation 1. Weights have Glorot and
    Bengio's normal initialization, biases start at zero.

    Source: Wang, Teng, Perdikaris (arXiv 2001.04536) and their code.

    Args:
        equation: The equation, which gives the box.
        hidden: Units of each hidden layer.

    Raises:
        ValueError: There is no hidden layer, or one has no units.

    Shape: ``(n, d)`` to ``(n, 1)``.

    Example:
        >>> from lightning_gradnorm.experiments.problems.pde import Burgers
        >>> TanhMLP(Burgers(), hidden=[20, 20])(torch.zeros(5, 2)).shape
        torch.Size([5, 1])
    """

    lower: Tensor
    upper: Tensor

    def __init__(self, equation: Equation, hidden: Sequence[int] = (50, 50, 50)) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"TanhMLP: hidden should be at least one layer of positive width; got {list(hidden)}.")
        self.register_buffer("lower", torch.tensor(equation.lower), persistent=False)
        self.register_buffer("upper", torch.tensor(equation.upper), persistent=False)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise([len(equation.lower), *hidden]):
            layers += [nn.Linear(width_in, width_out), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    @override
    def forward(self, points: Tensor) -> Tensor:
        middle, deviation = (self.upper + self.lower) / 2, (self.upper - self.lower) / math.sqrt(12)
        values: Tensor = self.layers((points - middle) / deviation)
        return values
