"""Chooses the viewpoint of a picture."""

from __future__ import annotations

import math

import numpy as np

from lightning_gradnorm.experiments.problems.dense.rooms.camera import FX, FY, Camera, rotations
from lightning_gradnorm.experiments.problems.dense.rooms.furniture import Random
from lightning_gradnorm.experiments.problems.dense.rooms.layout import LAYOUTS, VIEWS, LayoutViews
from lightning_gradnorm.experiments.problems.dense.rooms.primitives import Booleans, Floats, Primitive
from lightning_gradnorm.experiments.problems.dense.rooms.scene import Scene

CLEARANCE = 0.45
"""Minimum distance of a camera from anything, in meters, so no depth is below 0.3."""

AHEAD = 2.0
"""Minimum distance ahead to the end of the room, in meters."""

LOWEST, HIGHEST = 1.1, 1.8
"""Height of a camera above the floor, in meters."""

MIN_ANGLES, MAX_ANGLES = (0.0, -0.45, -0.05), (2 * math.pi, 0.2, 0.05)
"""Yaw, pitch and roll in radians: any direction, more down than up, nearly upright."""


def draw_camera(rng: Random, scene: Scene, tries: int = 64, rounds: int = 20) -> tuple[Camera, Floats] | None:
    """Draw a camera that a person could hold, and the keypoints of the view, ``(48, 3)``, as shares of the image.

    The camera is clear of everything in the room and sees one of the eleven layouts. Poses with much of the furniture
    in view are kept. Among these, rare layouts have the same chance as common ones.

    Args:
        rng: Source of the poses.
        scene: The room.
        tries: Number of poses drawn at once.
        rounds: Maximum number of such draws.

    Returns:
        The camera and the keypoints, or ``None`` if the room is too full for any pose.
    """
    low = np.array([CLEARANCE, LOWEST, CLEARANCE])
    high = np.array([scene.size[0] - CLEARANCE, HIGHEST, scene.size[2] - CLEARANCE])
    for _ in range(rounds):
        positions = rng.uniform(low, high, size=(tries, 3))
        turned = rotations(*rng.uniform(MIN_ANGLES, MAX_ANGLES, size=(tries, 3)).T)
        preference = rng.permutation(len(LAYOUTS))
        views = LayoutViews(scene.size, positions, turned)
        fits = (views.view >= 0) & (_distance_ahead(scene.size, positions, -turned[:, 2]) > AHEAD)
        fits[fits] &= _is_clear(scene.primitives, positions[fits])
        if fits.any():
            area = np.where(fits, _area_in_view(scene.primitives, positions, turned), -1.0)
            layouts = np.array([layout for layout, _ in VIEWS])[views.view]
            worthy = fits & (area >= 0.4 * area.max())
            chosen = int(np.where(worthy, preference[layouts], len(LAYOUTS)).argmin())
            return Camera(positions[chosen], turned[chosen]), views.keypoints(chosen)
    return None


def _area_in_view(primitives: tuple[Primitive, ...], positions: Floats, turned: Floats) -> Floats:
    """Return the total area of the largest faces of the primitives with their centers in each image, ``(n,)``."""
    centers = np.array([part.center for part in primitives]).reshape(-1, 3)
    halves = np.array([part.half for part in primitives]).reshape(-1, 3)
    areas = np.sort(halves, axis=1)[:, 1:].prod(axis=1)
    offsets = centers - positions[:, None]
    x, y, z = (np.sum(offsets * turned[:, None, axis], axis=-1) for axis in range(3))
    inside = (z < 0) & (np.abs(FX * x) < -0.5 * z) & (np.abs(FY * y) < -0.5 * z)
    area: Floats = np.sum(inside * areas, axis=1)
    return area


def _distance_ahead(size: Floats, positions: Floats, directions: Floats) -> Floats:
    """Return the distance to the end of the room, ``(n,)``."""
    with np.errstate(divide="ignore"):
        distances: Floats = (np.where(directions > 0, size - positions, -positions) / directions).min(axis=1)
    return distances


def _is_clear(primitives: tuple[Primitive, ...], positions: Floats) -> Booleans:
    """Return which positions, ``(n, 3)``, are at least `CLEARANCE` away from all primitives."""
    centers = np.array([part.center for part in primitives]).reshape(-1, 3)
    halves = np.array([part.half for part in primitives]).reshape(-1, 3)
    cos, sin = (np.array([f(part.yaw) for part in primitives]) for f in (math.cos, math.sin))
    x, y, z = np.moveaxis(positions[:, None] - centers, -1, 0)
    own = np.stack([cos * x - sin * z, y, sin * x + cos * z], axis=-1)
    beyond = np.maximum(np.abs(own) - halves, 0.0)
    clear: Booleans = (np.sum(beyond**2, axis=-1) >= CLEARANCE**2).all(axis=1)
    return clear
