"""Derivatives of a function with respect to its inputs, with a graph, so you can back-propagate a loss of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradient(values: Tensor, points: Tensor) -> Tensor:
    """Return the gradient of each point's value with respect to its coordinates.

    Args:
        values: One number per point, computed from that point alone, shape ``(n,)`` or ``(n, 1)``.
        points: Shape ``(n, d)``, with ``requires_grad``.

    Shape: ``(n, d)``.

    Example:
        >>> x = torch.tensor([[1.0, 3.0], [2.0, 5.0]], requires_grad=True)
        >>> gradient(x[:, 0] ** 2 * x[:, 1], x)
        tensor([[ 6.,  1.],
                [20.,  4.]], grad_fn=...)
    """
    # The derivative of the sum is enough, because no value depends on another point.
    (found,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    return found


def second_derivatives(slopes: Tensor, points: Tensor) -> list[Tensor]:
    """Return ∂²u/∂x_k² for each coordinate k, shape ``(n,)`` each, from `gradient`. Takes one pass per coordinate.

    Example:
        >>> x = torch.tensor([[1.0, 3.0]], requires_grad=True)
        >>> [one.item() for one in second_derivatives(gradient(x[:, 0] ** 3 * x[:, 1] ** 2, x), x)]
        [54.0, 2.0]
    """
    return [gradient(slopes[:, k], points)[:, k] for k in range(points.shape[1])]


def directional_derivatives(
    function: Callable[[Tensor], Tensor], points: Tensor, directions: Tensor, order: int
) -> Tensor:
    """Return the derivatives of this order along each direction.

    The number of passes is the order, each over all pairs of points and directions. For the fourth order, this is faster
    than differentiating by coordinate, which needs more passes through larger graphs.

    Args:
        function: Points ``(..., d)`` to values ``(..., 1)``.
        points: Shape ``(n, d)``.
        directions: Shape ``(m, d)``.
        order: 1 or more.

    Shape: ``(m, n)``.

    Example:
        >>> x, along = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> directional_derivatives(lambda x: (x[..., :1] ** 2 * x[..., 1:] ** 2), x, along, order=4).tolist()
        [[0.0], [24.0]]
    """
    moved = torch.zeros(len(directions), len(points), 1, dtype=points.dtype, device=points.device, requires_grad=True)
    derivatives = function(points + moved * directions.unsqueeze(1))
    for _ in range(order):
        derivatives = gradient(derivatives, moved)
    return derivatives[..., 0]
