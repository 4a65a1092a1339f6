"""Derivatives of a function by its inputs, still part of the graph, so that a loss of them can be back-propagated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradient(values: Tensor, points: Tensor) -> Tensor:
    """Return the gradient of each point's value by the point's coordinates.

    Args:
        values: One number for each point, computed from it alone, shape ``(n,)`` or ``(n, 1)``.
        points: Shape ``(n, d)``, with ``requires_grad``.

    Shape: ``(n, d)``.

    Example:
        >>> x = torch.tensor([[1.0, 3.0], [2.0, 5.0]], requires_grad=True)
        >>> gradient(x[:, 0] ** 2 * x[:, 1], x)
        tensor([[ 6.,  1.],
                [20.,  4.]], grad_fn=...)
    """
    # The derivative of the sum: no other point's value depends on a point.
    (found,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    return found


def second_derivatives(slopes: Tensor, points: Tensor) -> list[Tensor]:
    """Return ∂²u/∂x_k² for each coordinate k, shape ``(n,)`` each, from `gradient`; one pass a coordinate.

    Example:
        >>> x = torch.tensor([[1.0, 3.0]], requires_grad=True)
        >>> [one.item() for one in second_derivatives(gradient(x[:, 0] ** 3 * x[:, 1] ** 2, x), x)]
        [54.0, 2.0]
    """
    return [gradient(slopes[:, k], points)[:, k] for k in range(points.shape[1])]


def directional_derivatives(
    function: Callable[[Tensor], Tensor], points: Tensor, directions: Tensor, order: int
) -> Tensor:
    """Return the derivatives of this order along each of the directions.

    All of them in as many passes as the order, of so many points as there are points and directions. Of the fourth order
    that is faster than coordinate by coordinate, where every pass is through a larger graph and there are more of them.

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
