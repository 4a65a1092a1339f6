"""What a scene is made of: boxes and upright cylinders, each of one material and one class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]
Vector = tuple[float, float, float]

CLASSES = (
    "bed",
    "books",
    "ceiling",
    "chair",
    "floor",
    "furniture",
    "objects",
    "picture",
    "sofa",
    "table",
    "tv",
    "wall",
    "window",
)
"""The 13 classes of NYUv2, in the order of the labels 0 to 12."""

PATTERNS = ("plain", "checker", "stripes", "noise")


@dataclass(frozen=True)
class Material:
    """Two colors and how they alternate over a surface.

    Args:
        color: Red, green and blue, linear, each in [0, 1].
        second: The other color of the pattern.
        pattern: One of `PATTERNS`.
        scale: Length of one square, stripe or grain, in meters.
        glow: Light that the surface itself gives off, as a multiple of its color.
    """

    color: Vector
    second: Vector = (0.0, 0.0, 0.0)
    pattern: str = "plain"
    scale: float = 1.0
    glow: float = 0.0


@dataclass(frozen=True)
class Primitive:
    """A box, or a cylinder that stands upright, turned about the vertical.

    World coordinates are right-handed with ``y`` up, in meters; a room's lower corner is the origin.

    Args:
        label: Name of its class, one of `CLASSES`.
        material: What it is made of.
        center: Its middle.
        half: Half its extent along its own three axes. A cylinder's first and third are its radius.
        yaw: How far its own axes are turned about ``y``, counter-clockwise seen from above, in radians.
        round: Whether it is a cylinder.
    """

    label: str
    material: Material
    center: Vector
    half: Vector
    yaw: float = 0.0
    round: bool = False

    def moved(self, x: float, z: float, yaw: float, y: float = 0.0) -> Primitive:
        """Turn about the world's origin by ``yaw``, then shift.

        Example:
            >>> part = Primitive("chair", Material((1, 1, 1)), center=(1.0, 0.5, 0.0), half=(0.2, 0.5, 0.3))
            >>> [round(number, 6) for number in part.moved(2.0, 0.0, yaw=math.pi / 2).center]
            [2.0, 0.5, -1.0]
        """
        cos, sin = math.cos(yaw), math.sin(yaw)
        cx, cy, cz = self.center
        center = (cos * cx + sin * cz + x, cy + y, cos * cz - sin * cx + z)
        return Primitive(self.label, self.material, center, self.half, self.yaw + yaw, self.round)


def box(
    label: str, material: Material, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float]
) -> Primitive:
    """Make a box from the range that it fills along each axis.

    Example:
        >>> box("table", Material((1, 1, 1)), x=(0, 2), y=(0, 1), z=(0, 4)).half
        (1.0, 0.5, 2.0)
    """
    center: Any = tuple((low + high) / 2 for low, high in (x, y, z))
    half: Any = tuple((high - low) / 2 for low, high in (x, y, z))
    return Primitive(label, material, center, half)


def cylinder(label: str, material: Material, x: float, z: float, radius: float, y: tuple[float, float]) -> Primitive:
    """Make an upright cylinder around the axis through ``(x, z)``, over the range ``y``."""
    low, high = y
    return Primitive(label, material, (x, (low + high) / 2, z), (radius, (high - low) / 2, radius), round=True)
