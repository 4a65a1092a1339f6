"""Finds the surface and depth at each pixel exactly, with one ray per pixel.

Every flat face is a plane in the camera's frame. The inverse depth at which a ray ``(x, y, -1)`` meets it is linear in
``x`` and ``y``, a sum of a row and a column. Each face is only tested at the pixels that its outline can cover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from lightning_gradnorm.experiments.problems.dense.rooms.camera import CX, CY, FX, FY, Camera, pixel_rays
from lightning_gradnorm.experiments.problems.dense.rooms.primitives import (
    CLASSES,
    Booleans,
    Floats,
    Integers,
    Primitive,
)
from lightning_gradnorm.experiments.problems.dense.rooms.scene import Scene

Window = tuple[slice, slice]

NEAR = 0.01  # meters; a nearer outline may cover any pixel


@dataclass
class Faces:
    """Surfaces in the camera's frame: planes, rectangles, discs, and the sides of cylinders.

    Args:
        center: A point on each face, shape ``(n, 3)``; for the side of a cylinder, the center of the cylinder.
        first: Unit vector along the surface, ``(n, 3)``.
        second: Unit vector along the surface and perpendicular to ``first``; for a cylinder, its axis.
        normal: Unit normal toward the room's inside; for the side of a cylinder, the vector perpendicular to both.
        half: Half the extent along ``first`` and ``second``, ``(n, 2)``; for a cylinder, its radius and half its height.
        disc: True if the face is a disc of radius ``half[:, 0]``.
        side: True if it is the side of a cylinder.
        label: Class, ``(n,)``.
        material: Number of its material, ``(n,)``: the room's six surfaces, then the scene's primitives in order.
    """

    center: Floats
    first: Floats
    second: Floats
    normal: Floats
    half: Floats
    disc: Booleans
    side: Booleans
    label: Integers
    material: Integers


@dataclass
class Hits:
    """The surface and depth at each pixel of an image.

    Args:
        face: Number of the face, ``(h, w)``.
        depth: Distance along the optical axis in meters, ``(h, w)``.
    """

    face: Integers
    depth: Floats


# For each face of a box: the axis of the normal, its sign, and the axes along the surface.
_BOX_FACES = tuple((axis, sign, *along) for axis, along in ((0, (2, 1)), (1, (0, 2)), (2, (0, 1))) for sign in (-1, 1))


def faces_of(scene: Scene, camera: Camera) -> Faces:
    """Return the surfaces of a room and its contents that face the camera. The room's six come first."""
    axes, centers, halves = _frames(scene.primitives, camera)
    labels = np.array([CLASSES.index(part.label) for part in scene.primitives], dtype=np.int64)
    is_round = np.array([part.round for part in scene.primitives], dtype=bool)
    groups = [_walls(scene, camera)]
    for make, which in ((_box_faces, ~is_round), (_cylinder_faces, is_round)):
        materials = len(scene.surfaces) + np.flatnonzero(which)
        group = make(axes[which], centers[which], halves[which], labels[which], materials)
        # A plane is visible from the side that its normal points to.
        facing = (np.sum(group.normal * group.center, axis=1) < 0) | group.side
        groups.append(Faces(*(array[facing] for array in _arrays(group))))
    return Faces(*(np.concatenate(arrays) for arrays in zip(*map(_arrays, groups), strict=True)))


def _arrays(faces: Faces) -> list[Any]:
    return [getattr(faces, field.name) for field in fields(faces)]


def _frames(primitives: Sequence[Primitive], camera: Camera) -> tuple[Floats, Floats, Floats]:
    """Return the primitives' axes, ``(n, 3 axes, 3)``, centers, ``(n, 3)``, in the camera's frame, and half extents."""
    axes = np.zeros((len(primitives), 3, 3))
    for row, part in enumerate(primitives):
        cos, sin = math.cos(part.yaw), math.sin(part.yaw)
        axes[row] = ((cos, 0, -sin), (0, 1, 0), (sin, 0, cos))
    centers = np.array([part.center for part in primitives], dtype=float).reshape(-1, 3)
    halves = np.array([part.half for part in primitives], dtype=float).reshape(-1, 3)
    return camera.turn(axes), camera.to_camera(centers), halves


def _walls(scene: Scene, camera: Camera) -> Faces:
    """Turn a box inside out and its faces into infinite planes. The nearest one is visible, without seams."""
    axes, center = camera.turn(np.eye(3)[None]), camera.to_camera(scene.size[None] / 2)
    labels = [CLASSES.index(name) for name in ("wall", "wall", "floor", "ceiling", "wall", "wall")]
    walls = _box_faces(axes, center, scene.size[None] / 2, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    return replace(
        walls,
        normal=-walls.normal,
        half=np.full((6, 2), np.inf),
        label=np.array(labels, dtype=np.int64),
        material=np.arange(6),
    )


def _box_faces(axes: Floats, centers: Floats, halves: Floats, label: Integers, material: Integers) -> Faces:
    normal_axis, sign, first, second = np.array(_BOX_FACES).T
    normal = axes[:, normal_axis] * sign[:, None]
    count = 6 * len(axes)
    return Faces(
        center=(centers[:, None] + normal * halves[:, normal_axis, None]).reshape(count, 3),
        first=axes[:, first].reshape(count, 3),
        second=axes[:, second].reshape(count, 3),
        normal=normal.reshape(count, 3),
        half=np.stack([halves[:, first], halves[:, second]], axis=-1).reshape(count, 2),
        disc=np.zeros(count, dtype=bool),
        side=np.zeros(count, dtype=bool),
        label=np.repeat(label, 6),
        material=np.repeat(material, 6),
    )


def _cylinder_faces(axes: Floats, centers: Floats, halves: Floats, label: Integers, material: Integers) -> Faces:
    """Return bottom, side and top of each cylinder."""
    across, up, along = (np.repeat(axes[:, axis], 3, axis=0) for axis in range(3))
    radius, height = (np.repeat(halves[:, axis], 3) for axis in (0, 1))
    level = np.tile([-1.0, 0.0, 1.0], len(axes))[:, None]
    side = level[:, 0] == 0
    return Faces(
        center=np.repeat(centers, 3, axis=0) + up * level * height[:, None],
        first=across,
        second=np.where(side[:, None], up, along),
        normal=np.where(side[:, None], along, up * level),
        half=np.stack([radius, np.where(side, height, radius)], axis=-1),
        disc=~side,
        side=side,
        label=np.repeat(label, 3),
        material=np.repeat(material, 3),
    )


def cast(faces: Faces, height: int, width: int) -> Hits:
    """Find the first surface that each pixel's ray meets."""
    x, y = pixel_rays(height, width)
    depth = np.full((height, width), np.inf)
    seen = np.zeros((height, width), dtype=np.int64)
    for number, window in _windows(faces, height, width):
        rows, columns = window
        if faces.side[number]:
            met = _meet_side(faces, number, x[columns], y[rows, None])
        else:
            met = _meet_plane(faces, number, x[columns], y[rows, None])
        nearer = met < depth[window]  # False for NaN, a ray along the plane
        np.copyto(depth[window], met, where=nearer)
        np.copyto(seen[window], number, where=nearer)
    return Hits(seen, depth)


def _meet_plane(faces: Faces, number: int, x: Floats, y: Floats) -> Floats:
    """Return the depth at which rays meet a flat face, infinite if they do not."""
    center, normal, half = faces.center[number], faces.normal[number], faces.half[number]
    against = normal[0] * x + (normal[1] * y - normal[2])
    with np.errstate(divide="ignore", invalid="ignore"):
        depth: Floats = _dot(normal, center) / against
        met = against < 0
        if np.isfinite(half[0]):
            one, other = faces.first[number], faces.second[number]
            first = depth * (one[0] * x + (one[1] * y - one[2])) - _dot(one, center)
            second = depth * (other[0] * x + (other[1] * y - other[2])) - _dot(other, center)
            if faces.disc[number]:
                met &= first * first + second * second <= half[0] * half[0]
            else:
                met &= (np.abs(first) <= half[0]) & (np.abs(second) <= half[1])
    depth[~met] = np.inf
    return depth


def _meet_side(faces: Faces, number: int, x: Floats, y: Floats) -> Floats:
    """Return the depth at which rays meet a cylinder's side from outside, infinite if they do not."""
    center, axis, (radius, half) = faces.center[number], faces.second[number], faces.half[number]
    along = axis[0] * x + (axis[1] * y - axis[2])
    lift = _dot(axis, center)
    # The ray and the vector to the cylinder's center, without their components along the axis.
    a = x * x + (y * y + 1) - along * along
    b = center[0] * x + (center[1] * y - center[2]) - along * lift
    c = _dot(center, center) - lift * lift - radius * radius
    with np.errstate(divide="ignore", invalid="ignore"):
        depth: Floats = (b - np.sqrt(b * b - a * c)) / a
        met = (depth > 0) & (np.abs(depth * along - lift) <= half)
    depth[~met] = np.inf
    return depth


def _dot(one: Floats, other: Floats) -> float:
    return float(one[0] * other[0] + one[1] * other[1] + one[2] * other[2])


def _windows(faces: Faces, height: int, width: int) -> list[tuple[int, Window]]:
    """Return the faces that may be in the image, each with the pixels that its outline can cover."""
    finite = np.isfinite(faces.half[:, :1])
    reach = np.where(finite, faces.half, 0.0)
    first, second = faces.first * reach[:, :1], faces.second * reach[:, 1:]
    thick = faces.normal * np.where(faces.side, reach[:, 0], 0.0)[:, None]
    corners = np.stack(
        [faces.center + i * first + j * second + k * thick for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], axis=1
    )
    ahead = -corners[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = (CX + FX * corners[..., 0] / ahead) * width
        rows = (CY - FY * corners[..., 1] / ahead) * height
    # One extra pixel on each side for rounding.
    left, right = _pixels(columns.min(axis=1) - 1, width), _pixels(columns.max(axis=1) + 2, width)
    top, bottom = _pixels(rows.min(axis=1) - 1, height), _pixels(rows.max(axis=1) + 2, height)
    endless = ~finite[:, 0]
    anywhere = endless | (ahead < NEAR).any(axis=1)
    for bound, value in ((left, 0), (top, 0), (right, width), (bottom, height)):
        bound[anywhere] = value
    possible = endless | (ahead > 0).any(axis=1) & (left < right) & (top < bottom)
    return [
        (face, (slice(top[face], bottom[face]), slice(left[face], right[face])))
        for face in np.flatnonzero(possible).tolist()
    ]


def _pixels(place: Floats, count: int) -> Integers:
    pixels: Integers = np.nan_to_num(np.clip(place, 0, count), nan=0.0).astype(np.int64)
    return pixels


def hit_points(hits: Hits) -> Floats:
    """Return the points at the pixels, in the camera's frame, ``(3, h, w)``."""
    x, y = pixel_rays(*hits.depth.shape)
    return np.stack([hits.depth * x, hits.depth * y[:, None], -hits.depth])


def hit_normals(faces: Faces, hits: Hits) -> Floats:
    """Return the surfaces' unit normals at the pixels, in the camera's frame, ``(3, h, w)``."""
    normals = np.stack([component[hits.face] for component in faces.normal.T])
    curved = faces.side[hits.face]
    if curved.any():
        number = hits.face[curved]
        away = hit_points(hits)[:, curved] - faces.center[number].T
        axis = faces.second[number].T
        away -= np.sum(away * axis, axis=0) * axis
        normals[:, curved] = away / np.sqrt(np.sum(away * away, axis=0))
    return normals
