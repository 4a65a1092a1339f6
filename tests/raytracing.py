"""One ray at a time through a room, in world coordinates and plain Python: the reference for the renderer."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from lightning_gradnorm.experiments.problems.dense.rooms.camera import Camera
from lightning_gradnorm.experiments.problems.dense.rooms.primitives import Primitive
from lightning_gradnorm.experiments.problems.dense.rooms.scene import Scene, draw_scene
from lightning_gradnorm.experiments.problems.dense.rooms.viewpoint import draw_camera

SURFACES = ("low x", "high x", "floor", "ceiling", "low z", "high z")


class Hit(NamedTuple):
    depth: float
    label: str
    normal: tuple[float, ...]
    """In the camera's frame."""
    surface: str
    """Name of the room's surface, or the number of the primitive."""


def room(seed: int, scene: int) -> tuple[Scene, Camera, np.ndarray]:
    """The room, the camera and the keypoints that `render(seed, scene, ...)` draws."""
    scenery, pose = (np.random.default_rng([seed, scene, part]) for part in range(2))
    drawn = draw_scene(scenery)
    while (found := draw_camera(pose, drawn)) is None:
        drawn = draw_scene(scenery)
    return drawn, *found


def ray(camera: Camera, x: float, y: float, width: int, height: int) -> list[float]:
    """The direction through the place (x, y) of an image, in world coordinates, one meter deep."""
    right, up, backward = camera.rotation.tolist()
    a = (x * 640 / width - 325.58) / 518.86
    b = (y * 480 / height - 253.74) / 519.47
    return [a * right[i] - b * up[i] - backward[i] for i in range(3)]


def trace(scene: Scene, camera: Camera, direction: list[float], with_primitives: bool = True) -> Hit:
    """What a ray from the camera meets first."""
    origin = camera.position.tolist()
    best = _leave_room(scene.size.tolist(), origin, direction)
    if with_primitives:
        for number, part in enumerate(scene.primitives):
            met = (_meet_cylinder if part.round else _meet_box)(part, origin, direction)
            if met is not None and met[0] < best[0]:
                best = (*met, part.label, str(number))
    depth, normal, label, surface = best
    return Hit(depth, label, tuple(float(row @ np.array(normal)) for row in camera.rotation), surface)


def _leave_room(size: list[float], origin: list[float], direction: list[float]):
    best = (math.inf, [0.0] * 3, "", "")
    for axis, name in enumerate(("wall", "level", "wall")):
        for high in (False, True):
            if direction[axis] == 0 or (direction[axis] > 0) != high:
                continue
            depth = ((size[axis] if high else 0.0) - origin[axis]) / direction[axis]
            if depth < best[0]:
                normal = [0.0] * 3
                normal[axis] = -1.0 if high else 1.0
                label = name if name == "wall" else ("ceiling" if high else "floor")
                best = (depth, normal, label, SURFACES[2 * axis + high])
    return best


def _own(part: Primitive, vector: list[float]) -> list[float]:
    """Turn back by the part's yaw: counter-clockwise from above takes x to -z."""
    cos, sin = math.cos(part.yaw), math.sin(part.yaw)
    x, y, z = vector
    return [cos * x - sin * z, y, sin * x + cos * z]


def _world(part: Primitive, vector: list[float]) -> list[float]:
    cos, sin = math.cos(part.yaw), math.sin(part.yaw)
    x, y, z = vector
    return [cos * x + sin * z, y, -sin * x + cos * z]


def _meet_box(part: Primitive, origin: list[float], direction: list[float]):
    """By slabs: between entering the last pair of planes and leaving the first."""
    start = _own(part, [o - c for o, c in zip(origin, part.center, strict=True)])
    way = _own(part, direction)
    enter, leave, axis_entered = -math.inf, math.inf, 0
    for axis in range(3):
        if way[axis] == 0:
            if abs(start[axis]) > part.half[axis]:
                return None
            continue
        first, last = sorted((sign * part.half[axis] - start[axis]) / way[axis] for sign in (-1, 1))
        if first > enter:
            enter, axis_entered = first, axis
        leave = min(leave, last)
    if enter > leave or enter <= 0:
        return None
    normal = [0.0] * 3
    normal[axis_entered] = -math.copysign(1.0, way[axis_entered])
    return enter, _world(part, normal)


def _meet_cylinder(part: Primitive, origin: list[float], direction: list[float]):
    ox, oy, oz = (o - c for o, c in zip(origin, part.center, strict=True))
    dx, dy, dz = direction
    radius, half, _ = part.half
    found = []
    a, b, c = dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - radius * radius
    if a > 0 and b * b - a * c >= 0:
        depth = (-b - math.sqrt(b * b - a * c)) / a
        if depth > 0 and abs(oy + depth * dy) <= half:
            found.append((depth, [(ox + depth * dx) / radius, 0.0, (oz + depth * dz) / radius]))
    for sign in (-1.0, 1.0):
        if dy * sign < 0:
            depth = (sign * half - oy) / dy
            if depth > 0 and math.hypot(ox + depth * dx, oz + depth * dz) <= radius:
                found.append((depth, [0.0, sign, 0.0]))
    return min(found, default=None)
