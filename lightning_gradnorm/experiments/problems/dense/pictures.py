"""Draws image, prediction and truth of a dense task side by side, for TensorBoard's ``add_image``.

All functions are pure and return RGB, uint8 ``(3, height, width)``. Unknown parts of a target are black, which is not the
color of any class, depth or normal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradnorm._messages import did_you_mean
from lightning_gradnorm.experiments.problems.dense.targets import (
    heat_maps,
    is_points,
    keypoints_of,
    valid_depth,
    valid_normals,
)

PALETTE = (
    (30, 135, 135),
    (195, 30, 0),
    (255, 240, 0),
    (135, 45, 45),
    (195, 255, 225),
    (0, 60, 90),
    (90, 0, 150),
    (255, 30, 255),
    (240, 135, 15),
    (150, 165, 120),
    (75, 0, 255),
    (90, 255, 135),
    (255, 150, 240),
)
"""Thirteen colors from a search that maximized the distance between any two of them, and black, for normal vision and for
each of the three types of color blindness: at least 28 units of CIELAB (a difference of 2 is barely visible)."""

DEPTH_COLORS = (
    (36, 41, 129),
    (4, 75, 129),
    (2, 102, 138),
    (4, 128, 148),
    (18, 155, 154),
    (11, 184, 148),
    (100, 209, 127),
    (181, 227, 118),
    (254, 241, 124),
)
"""From near to far, in equal steps of depth: dark blue over green to light yellow, in equal steps of CIELAB lightness, so
you can read it in gray, too."""

GAP = 4
"""White pixels between the pictures of a strip."""


def strip(task: str, image: Tensor, prediction: Tensor, target: Tensor, *, sigma: float = 1.0) -> Tensor:
    """Return image, prediction and target of one sample side by side, each as large as the image.

    Args:
        task: segmentation, depth, normals or keypoints.
        image: ``(3, H, W)`` in [0, 1].
        prediction: the network's output without the batch dimension: logits ``(classes, h, w)``, depth ``(1, h, w)``,
            normals ``(3, h, w)``, heat maps ``(K, h, w)``.
        target: the target for the loss without the batch dimension.
        sigma: width of keypoints that are given as points, in pixels of the prediction.

    Raises:
        ValueError: the task is unknown.

    Shape: to ``(3, H, 3 W + 2 GAP)``.

    Example:
        >>> strip("depth", torch.rand(3, 32, 48), torch.rand(1, 8, 12), torch.rand(1, 8, 12)).shape
        torch.Size([3, 32, 152])
    """
    if task not in TASKS:
        raise ValueError(f"strip: there is no picture of a task '{task}'; {did_you_mean(task, TASKS)}")
    image, prediction, target = (_plain(tensor) for tensor in (image, prediction, target))
    picture = _bytes(image)
    if task == "keypoints" and is_points(target.unsqueeze(0)):
        height, width = prediction.shape[1:]
        target = heat_maps(target, (height, width), sigma)
    painted = _PAINTERS[task](picture, prediction, target)
    gap = torch.full((3, image.shape[1], GAP), 255, dtype=torch.uint8)
    return torch.cat([picture, gap, painted[0], gap, painted[1]], dim=2)


def stack(strips: Sequence[Tensor]) -> Tensor:
    """Return strips of the same width as one picture, one below the other.

    Shape: each ``(3, H, W)``, to ``(3, n H + (n − 1) GAP, W)``.

    Example:
        >>> stack([torch.zeros(3, 32, 152, dtype=torch.uint8)] * 2).shape
        torch.Size([3, 68, 152])
    """
    gap = torch.full((3, GAP, strips[0].shape[2]), 255, dtype=torch.uint8)
    return torch.cat([part for one in strips for part in (gap, one)][1:], dim=1)


def paint_labels(labels: Tensor) -> Tensor:
    """Return each label in its `PALETTE` color, and negative ones in black. The colors repeat after 13.

    Shape: ``(h, w)`` to ``(3, h, w)``.
    """
    colors = torch.tensor(PALETTE, dtype=torch.uint8)[labels.long() % len(PALETTE)]
    return torch.where((labels < 0).unsqueeze(-1), 0, colors).to(torch.uint8).movedim(-1, 0)


def paint_depth(depth: Tensor, nearest: float, farthest: float) -> Tensor:
    """Return depth in `DEPTH_COLORS`, with unknown pixels in black.

    Args:
        depth: ``(1, h, w)``.
        nearest: depth of the first color, also used for anything nearer.
        farthest: depth of the last color.

    Shape: to ``(3, h, w)``.
    """
    colors = torch.tensor(DEPTH_COLORS, dtype=torch.float32)
    valid = valid_depth(depth[0])
    share = (torch.where(valid, depth[0], nearest) - nearest) / max(farthest - nearest, 1e-6)
    place = share.clamp(0, 1) * (len(colors) - 1)
    below = place.long().clamp(max=len(colors) - 2)
    mixed = torch.lerp(colors[below], colors[below + 1], (place - below).unsqueeze(-1))
    return torch.where(valid, _bytes(mixed.movedim(-1, 0) / 255), 0).to(torch.uint8)


def paint_normals(normals: Tensor) -> Tensor:
    """Return the directions as RGB, ``(n + 1) / 2``: red right, green up, blue toward the camera.

    Shape: ``(3, h, w)`` of any length, to ``(3, h, w)``.
    """
    valid = valid_normals(normals.unsqueeze(0))
    return torch.where(valid, _bytes((F.normalize(normals, dim=0) + 1) / 2), 0).to(torch.uint8)


def paint_keypoints(picture: Tensor, maps: Tensor) -> Tensor:
    """Return the heat maps over a dimmed picture, with one color per keypoint type. Zero heat is transparent.

    Args:
        picture: RGB, uint8 ``(3, H, W)``.
        maps: ``(K, h, w)``; 1 and more is opaque.

    Shape: to ``(3, H, W)``.
    """
    maps = _enlarge(maps, picture)
    heat, kind = maps.max(dim=0)
    # Lightened, so dark colors stand out from the picture.
    colors = torch.tensor(PALETTE, dtype=torch.float32)[kind % len(PALETTE)].movedim(-1, 0) / 2 + 127
    gray = picture.float().mean(dim=0, keepdim=True).expand_as(colors) / 2
    return _bytes(torch.lerp(gray, colors, heat.nan_to_num().clamp(0, 1)) / 255)


# ---- of each task: prediction and target, painted --------------------------------------------------------------------

_Pair = tuple[Tensor, Tensor]


def _segmentation(picture: Tensor, logits: Tensor, labels: Tensor) -> _Pair:
    return _enlarge(paint_labels(logits.argmax(dim=0)), picture), _enlarge(paint_labels(labels), picture)


def _depth(picture: Tensor, prediction: Tensor, target: Tensor) -> _Pair:
    """Paint both with the color range of the target, unless all of it is unknown."""
    known = next((d[valid_depth(d)] for d in (target, prediction) if valid_depth(d).any()), torch.ones(1))
    nearest, farthest = known.min().item(), known.max().item()
    painted = [_enlarge(paint_depth(depth, nearest, farthest), picture) for depth in (prediction, target)]
    return painted[0], painted[1]


def _normals(picture: Tensor, prediction: Tensor, target: Tensor) -> _Pair:
    return _enlarge(paint_normals(prediction), picture), _enlarge(paint_normals(target), picture)


def _keypoints(picture: Tensor, prediction: Tensor, target: Tensor) -> _Pair:
    """Paint only the visible types, because the maps of the others may be untrained."""
    _, visible = keypoints_of(target.unsqueeze(0))
    shown = torch.where(visible[0][:, None, None], prediction, 0.0)
    return paint_keypoints(picture, shown), paint_keypoints(picture, target)


_PAINTERS: dict[str, Callable[[Tensor, Tensor, Tensor], _Pair]] = {
    "segmentation": _segmentation,
    "depth": _depth,
    "normals": _normals,
    "keypoints": _keypoints,
}

TASKS = tuple(_PAINTERS)
"""The tasks that `strip` can draw."""


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float()


def _bytes(values: Tensor) -> Tensor:
    """From [0, 1] to 0 … 255."""
    return (255 * values.nan_to_num().clamp(0, 1)).round().to(torch.uint8)


def _enlarge(values: Tensor, picture: Tensor) -> Tensor:
    """Repeat pixels until the values are as large as the picture, without blending."""
    size = picture.shape[-2:]
    return F.interpolate(values.unsqueeze(0).float(), size=size, mode="nearest-exact")[0].to(values.dtype)
