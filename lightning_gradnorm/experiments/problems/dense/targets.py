"""The valid parts of a dense target: pixels with a depth, normal or label, and visible keypoints.

Losses, metrics and pictures share these functions, so they agree. Unknown values are marked as in the usual copies of
NYUv2: label -1, depth 0, a zero vector as normal, a keypoint with visibility 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -1
"""The label of pixels without a class."""


def valid_depth(target: Tensor) -> Tensor:
    """Return where the depth is known: finite and not 0.

    Shape: any, to bool of the same shape.

    Example:
        >>> valid_depth(torch.tensor([2.5, 0.0, torch.nan]))
        tensor([ True, False, False])
    """
    return target.isfinite() & (target != 0)


def valid_normals(target: Tensor) -> Tensor:
    """Return where the normal is known: its components are finite and not all 0.

    Some implementations test if the sum of the components is 0. Here, (1, -1, 0)/√2 is a normal like any other.

    Shape: ``(batch, 3, h, w)`` to bool ``(batch, h, w)``.

    Example:
        >>> normals = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.7071, -0.7071, 0.0]])
        >>> valid_normals(normals.T.reshape(1, 3, 1, 3))
        tensor([[[ True, False,  True]]])
    """
    return target.isfinite().all(dim=1) & (target != 0).any(dim=1)


def keypoints_of(target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of the keypoints and which of them are visible.

    Args:
        target: points ``(batch, K, 3)``, each (x, y, visible), or heat maps ``(batch, K, h, w)``. A keypoint is at the
            center of its map's largest pixel. If the map is 0 everywhere, it is invisible.

    Returns:
        Positions (x, y) in pixels from the upper left edge, ``(batch, K, 2)``; visible, bool ``(batch, K)``.

    Raises:
        ValueError: the target has neither of these shapes.

    Example:
        >>> positions, visible = keypoints_of(torch.tensor([[[3.0, 1.0, 1.0], [0.0, 0.0, 0.0]]]))
        >>> positions[visible].tolist(), visible.tolist()
        ([[3.0, 1.0]], [[True, False]])
    """
    return target[..., :2] if is_points(target) else peaks(target), visible_keypoints(target)


def visible_keypoints(target: Tensor) -> Tensor:
    """Return which keypoints are visible, bool ``(batch, K)``. Takes the same targets as `keypoints_of`."""
    return target[..., 2] > 0 if is_points(target) else target.amax(dim=(-2, -1)) > 0


def is_points(target: Tensor) -> bool:
    """Return True if a keypoint target contains points, False if it contains heat maps.

    Raises:
        ValueError: it contains neither.
    """
    if target.ndim == 3 and target.shape[-1] == 3:
        return True
    if target.ndim == 4:
        return False
    raise ValueError(
        f"The target of keypoints should be points (batch, K, 3), each (x, y, visible), or heat maps (batch, K, h, w); "
        f"got shape {tuple(target.shape)}."
    )


def peaks(maps: Tensor) -> Tensor:
    """Return the center of each map's largest pixel, (x, y) in pixels from the upper left edge.

    Shape: ``(batch, K, h, w)`` to ``(batch, K, 2)``, float32.

    Example:
        >>> maps = torch.zeros(1, 1, 4, 6)
        >>> maps[0, 0, 3, 5] = 1.0
        >>> peaks(maps)
        tensor([[[5.5000, 3.5000]]])
    """
    at, width = maps.flatten(start_dim=2).argmax(dim=-1), maps.shape[-1]
    return torch.stack([at % width, at // width], dim=-1) + 0.5


def heat_maps(points: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Return a Gaussian of height 1 around each visible keypoint, and 0 everywhere for the others.

    Args:
        points: ``(batch, K, 3)``, each (x, y, visible), in pixels of the map from its upper left edge. The center of the
            first pixel is at (0.5, 0.5).
        size: (height, width) of the maps.
        sigma: standard deviation in pixels.

    Shape: to ``(batch, K, height, width)``. The leading dimensions can be any others.

    Example:
        >>> heat_maps(torch.tensor([[[2.5, 0.5, 1.0]]]), (1, 4), sigma=1.0)
        tensor([[[[0.1353, 0.6065, 1.0000, 0.6065]]]])
    """
    x, y, visible = points.unbind(dim=-1)

    def profile(center: Tensor, length: int) -> Tensor:
        distance = torch.arange(length, device=points.device) + 0.5 - center.unsqueeze(-1)
        return torch.exp(-distance.square() / (2 * sigma**2))

    drawn = profile(y, size[0]).unsqueeze(-1) * profile(x, size[1]).unsqueeze(-2)
    return torch.where((visible > 0)[..., None, None], drawn, 0.0)
