"""A differential equation: a domain, its conditions and its exact solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_gradnorm._messages import is_number

Array = npt.NDArray[np.float64]
Function = Callable[[Tensor], Tensor]
"""Points ``(..., d)`` to the values there, ``(..., 1)``."""


class Equation:
    """A differential equation on a box with boundary conditions. The equation and each condition are one task.

    A subclass lists its tasks, ``"pde"`` first, and computes in `residual` how far a function violates each of them. Its
    `reference` is the exact solution. All computations use the dtype of the points.
    """

    coordinates: tuple[str, ...]
    """Names of the coordinates, in order."""
    lower: tuple[float, ...]
    """Lower limit of each coordinate."""
    upper: tuple[float, ...]
    """Upper limit of each coordinate."""
    tasks: tuple[str, ...] = ("pde", "boundary")
    grid_shape: tuple[int, ...]
    """Shape of the grid that compares the solution with the reference."""

    def residual(self, task: str, function: Function, points: Tensor) -> Tensor:
        """Return how far a function violates a task's equation at its points, shape ``(n,)``.

        Args:
            task: one of `tasks`.
            function: a network, or the solution.
            points: points of the task, shape ``(n, d)``.
        """
        raise NotImplementedError

    def reference(self, points: Tensor) -> Tensor:
        """Return the exact solution at the points, shape ``(..., 1)``."""
        raise NotImplementedError

    def draw(self, task: str, count: int, stream: np.random.Generator) -> Array:
        """Return points of a task, shape ``(count, d)``: inside for the equation, on the faces for boundary conditions."""
        return self.inside(count, stream) if task == "pde" else self.on_faces(count, stream)

    def losses(self, function: Function, points: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean square of each task's residual at its points."""
        return {task: self.residual(task, function, points[task]).square().mean() for task in self.tasks}

    def inside(self, count: int, stream: np.random.Generator) -> Array:
        """Return a Latin hypercube sample of the box: ``count`` slices along each coordinate with one point each."""
        slices = np.stack([stream.permutation(count) for _ in self.lower], axis=1)
        return self._scaled((slices + stream.uniform(size=slices.shape)) / count)

    def on_faces(self, count: int, stream: np.random.Generator, along: Sequence[int] | None = None) -> Array:
        """Return uniform points on the faces of the box, cycling through the faces.

        Args:
            count: number of points.
            stream: source of the random numbers.
            along: coordinates that are constant on the faces; by default all of them.
        """
        points = stream.uniform(size=(count, len(self.lower)))
        faces = [(k, end) for k in (range(len(self.lower)) if along is None else along) for end in (0.0, 1.0)]
        for number, (k, end) in enumerate(faces):
            points[number :: len(faces), k] = end
        return self._scaled(points)

    def grid(self) -> Tensor:
        """Return the points of a regular grid of shape `grid_shape` including the edges, float64 ``(n, d)``."""
        sizes = zip(self.lower, self.upper, self.grid_shape, strict=True)
        axes = [torch.linspace(low, high, size, dtype=torch.float64) for low, high, size in sizes]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(axes))

    def _scaled(self, unit: Array) -> Array:
        lower, upper = np.array(self.lower), np.array(self.upper)
        return np.asarray(lower + unit * (upper - lower), dtype=np.float64)

    def _check_positive(self, **numbers: Any) -> None:
        for name, value in numbers.items():
            if not (is_number(value) and value > 0):
                raise ValueError(f"{type(self).__name__}: {name} should be a positive number; got {value!r}.")


def with_gradient(points: Tensor) -> Tensor:
    """Return the points as a new leaf of the graph, so you can differentiate with respect to them."""
    return points.detach().requires_grad_()
