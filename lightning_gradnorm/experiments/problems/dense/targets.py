"""Which parts of a dense target count: pixels with a depth, with a normal, with a label; keypoints that can be seen.

Losses, metrics and pictures all ask here, so that they agree on it. "Not known" is written as the usual copies of NYUv2
have it: label -1, depth 0, a normal that is the zero vector, a keypoint with visibility 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -1
"""The label of pixels without a class."""


def valid_depth(target: Tensor) -> Tensor:
    """Return where a depth is known: it is finite and not 0.

    Shape: any, to bool of the same shape.

    Example:
        >>> valid_depth(torch.tensor([2.5, 0.0, torch.nan]))
        tensor([ True, False, False])
    """
    return target.isfinite() & (target != 0)


def valid_normals(target: Tensor) -> Tensor:
    """Return where a normal is known: its components are finite and not all 0.

    Unlike in implementations that ask whether the components' sum is 0, (1, -1, 0)/√2 is a normal like any other.

    Shape: ``(batch, 3, h, w)`` to bool ``(batch, h, w)``.

    Example:
        >>> normals = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.7071, -0.7071, 0.0]])
        >>> valid_normals(normals.T.reshape(1, 3, 1, 3))
        tensor([[[ True, False,  True]]])
    """
    return target.isfinite().all(dim=1) & (target != 0).any(dim=1)


def keypoints_of(target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keypoints' positions and which of them can be seen.

    Args:
        target: points ``(batch, K, 3)``, each (x, y, visible), or heat maps ``(batch, K, h, w)``: a keypoint is in the
            middle of the pixel where its map is largest, and one whose map is 0 everywhere cannot be seen.

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
    """Return which keypoints can be seen, bool ``(batch, K)``; of a target as `keypoints_of` takes it."""
    return target[..., 2] > 0 if is_points(target) else target.amax(dim=(-2, -1)) > 0


def is_points(target: Tensor) -> bool:
    """Say whether the target of keypoints holds points; heat maps otherwise.

    Raises:
        ValueError: it holds neither.
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
    """Return where each map is largest: the center of that pixel, (x, y) in pixels from the upper left edge.

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
    """Return a Gaussian of height 1 around each keypoint that can be seen, 0 everywhere for the others.

    Args:
        points: ``(batch, K, 3)``, each (x, y, visible), in pixels of the map from its upper left edge: the first pixel's
            center is at (0.5, 0.5).
        size: (height, width) of the maps.
        sigma: standard deviation in pixels.

    Shape: to ``(batch, K, height, width)``; without batch, or with any other leading dimensions, likewise.

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
