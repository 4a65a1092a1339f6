"""Computes the color of each pixel: the surface's pattern, lit by a lamp.

Uses only sums, products, quotients, roots and integer arithmetic, which round the same way everywhere. No pixel depends on
the number of pixels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_gradnorm.experiments.problems.dense.rooms.camera import FX, Camera
from lightning_gradnorm.experiments.problems.dense.rooms.casting import Faces, Hits, hit_normals, hit_points
from lightning_gradnorm.experiments.problems.dense.rooms.primitives import PATTERNS, Floats, Integers, Material
from lightning_gradnorm.experiments.problems.dense.rooms.scene import Scene

Pixels = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]


def shade(scene: Scene, camera: Camera, faces: Faces, hits: Hits, noise: np.random.Generator) -> Pixels:
    """Color an image, ``(3, h, w)``, ``uint8``."""
    points = hit_points(hits)
    materials = [*scene.surfaces, *(part.material for part in scene.primitives)]
    material = faces.material[hits.face]
    glow = np.array([each.glow for each in materials])[material]
    linear = _colors(materials, faces, hits, points) * (_lit(scene, camera, hit_normals(faces, hits), points) + glow)
    # The response of a camera, as a root, then the noise of the sensor.
    response = 255 * np.sqrt(linear) + noise.integers(-5, 6, size=linear.shape)
    pixels: Pixels = np.clip(response, 0, 255).astype(np.uint8)
    return pixels


def _lit(scene: Scene, camera: Camera, normals: Floats, points: Floats) -> Floats:
    """Return the light at each point by Lambert's law and the inverse square of the distance, ``(3, h, w)``."""
    x, y, z = camera.to_camera(scene.light)[:, None, None] - points
    square = x * x + y * y + z * z
    facing = np.maximum(normals[0] * x + normals[1] * y + normals[2] * z, 0.0) / np.sqrt(square)
    lamp = scene.power * facing / (1 + 0.25 * square)
    lit: Floats = scene.ambient + lamp * scene.tint[:, None, None]
    return lit


def _colors(materials: list[Material], faces: Faces, hits: Hits, points: Floats) -> Floats:
    """Return the colors of the surfaces under white light, ``(3, h, w)``."""
    face, material = hits.face, faces.material[hits.face]
    scale = np.array([each.scale for each in materials])[material]
    u, v = (_along(axis, faces.center, face, points) / scale for axis in (faces.first, faces.second))
    pattern = np.array([PATTERNS.index(each.pattern) for each in materials])[material]
    column, row = np.floor(u), np.floor(v)
    share = np.zeros(face.shape)
    for name, values in (("checker", (column + row) % 2), ("stripes", column % 2)):
        np.copyto(share, values, where=pattern == PATTERNS.index(name))
    grainy = pattern == PATTERNS.index("noise")
    share[grainy] = _value_noise(u[grainy], v[grainy], material[grainy])
    # Far away, where a square is smaller than a pixel or two, use the mean of both colors.
    pixel = hits.depth / (FX * hits.depth.shape[1])
    contrast = np.clip(scale / pixel - 0.5, 0.0, 1.0)
    share = np.where(pattern == PATTERNS.index("plain"), 0.0, 0.5 + (share - 0.5) * contrast)
    one, other = (np.array([getattr(each, name) for each in materials]).T for name in ("color", "second"))
    colors: Floats = one[:, material] + share * (other - one)[:, material]
    return colors


def _along(axis: Floats, center: Floats, face: Integers, points: Floats) -> Floats:
    """Return the distances of points from the centers of their faces along an axis of the face, ``(h, w)``."""
    x, y, z = (component[face] for component in axis.T)
    distance: Floats = points[0] * x + points[1] * y + points[2] * z - np.sum(axis * center, axis=1)[face]
    return distance


def _value_noise(u: Floats, v: Floats, seed: Integers) -> Floats:
    """Return random numbers in [0, 1] at the points of a grid, interpolated in between."""
    column, row = np.floor(u), np.floor(v)
    fx, fy = u - column, v - row
    left, low, key = (array.astype(np.int64).astype(np.uint32) for array in (column, row, seed))
    below = _hash(left, low, key) * (1 - fx) + _hash(left + np.uint32(1), low, key) * fx
    above = _hash(left, low + np.uint32(1), key) * (1 - fx) + _hash(left + np.uint32(1), low + np.uint32(1), key) * fx
    noise: Floats = below * (1 - fy) + above * fy
    return noise


def _hash(x: Words, y: Words, key: Words) -> Floats:
    word = x * np.uint32(0x9E3779B1) ^ y * np.uint32(0x85EBCA77) ^ key * np.uint32(0xC2B2AE3D)
    word = (word ^ word >> np.uint32(15)) * np.uint32(0x2C1B3C6D)
    word = (word ^ word >> np.uint32(12)) * np.uint32(0x297A2D39)
    uniform: Floats = (word >> np.uint32(8)) / 2.0**24
    return uniform
