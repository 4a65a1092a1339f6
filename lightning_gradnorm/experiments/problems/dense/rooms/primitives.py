"""The parts of a scene: boxes and upright cylinders, each with one material and one class."""

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
"""NYUv2's 13 classes, in the order of the labels 0 to 12."""

PATTERNS = ("plain", "checker", "stripes", "noise")


@dataclass(frozen=True)
class Material:
    """Two colors and their pattern on a surface.

    Args:
        color: Red, green and blue, linear, each in [0, 1].
        second: The other color of the pattern.
        pattern: One of `PATTERNS`.
        scale: Length of one square, stripe or grain in meters.
        glow: Light emitted by the surface, as a multiple of its color.
    """

    color: Vector
    second: Vector = (0.0, 0.0, 0.0)
    pattern: str = "plain"
    scale: float = 1.0
    glow: float = 0.0


@dataclass(frozen=True)
class Primitive:
    """A box or an upright cylinder, rotated about the vertical.

    World coordinates are right-handed with ``y`` up, in meters. A room's lower corner is the origin.

    Args:
        label: Name of its class, one of `CLASSES`.
        material: Its material.
        center: Its center.
        half: Half its extent along its own three axes. For a cylinder, the first and third are the radius.
        yaw: Rotation of its own axes about ``y`` in radians, counter-clockwise from above.
        round: True for a cylinder.
    """

    label: str
    material: Material
    center: Vector
    half: Vector
    yaw: float = 0.0
    round: bool = False

    def moved(self, x: float, z: float, yaw: float, y: float = 0.0) -> Primitive:
        """Rotate about the world's origin by ``yaw``, then translate.

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
    """Make a box from its range along each axis.

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
