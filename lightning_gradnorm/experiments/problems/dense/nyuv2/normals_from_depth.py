"""Surface normals from a depth map and the camera's intrinsics, for sources without normals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

RADIUS_AT_640 = 8
"""Half the window in pixels of an image 640 wide: 17 x 17 pixels, 7 cm at 2 m.

Chosen among 3, 5 and 8 on synthetic walls in the sensor's steps (2.85 mm per squared meter), never on its own images, which
are smoother. Mean error with 5 and 8: at 2 m and a slant of 37 degrees 1.7 and 0.8 degrees, at 4 m and 17 degrees 15 and
8, at 6 m and 37 degrees 14 and 2, at 8 m and 37 degrees 23 and 10. Far walls nearly parallel to the image remain
rough."""
MAX_SLANT = math.radians(80)
"""Maximum slant of a surface. A neighbor that would need a larger slant belongs to another surface."""


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera, in pixels; pixel (0, 0) is the square from (0, 0) to (1, 1), its center at (0.5, 0.5).

    Attributes:
        fx: Horizontal focal length.
        fy: Vertical focal length.
        cx: Position of the optical axis in the image, from the left edge.
        cy: Position of the optical axis in the image, from the upper edge.
    """

    fx: float
    fy: float
    cx: float
    cy: float

    def scaled(self, across: float, down: float) -> Intrinsics:
        """Return the intrinsics of the same image with ``across`` times the columns and ``down`` times the rows.

        Example:
            >>> Intrinsics(fx=100, fy=100, cx=32, cy=24).scaled(2, 1)
            Intrinsics(fx=200, fy=100, cx=64, cy=24)
        """
        return Intrinsics(self.fx * across, self.fy * down, self.cx * across, self.cy * down)

    def rays(self, rows: Array, columns: Array) -> tuple[Array, Array]:
        """Return x/z and y/z (x right, y down, z forward) of the points at the centers of these pixels."""
        return (columns + 0.5 - self.cx) / self.fx, (rows + 0.5 - self.cy) / self.fy


KINECT = Intrinsics(
    fx=518.85790117450188, fy=519.46961112127485, cx=325.58244941119034 - 0.5, cy=253.73616633400465 - 0.5
)
"""The color camera of NYUv2 at 640 x 480, from its toolbox, which counts pixels from one at their centers."""


def normals_from_depth(
    depth: Array,
    intrinsics: Intrinsics,
    rows: Array | None = None,
    columns: Array | None = None,
    radius: int | None = None,
) -> Array:
    """Fit a plane to each pixel's neighborhood, and return its unit normal on the camera's side.

    On a plane, the *inverse* depth is an affine function of the pixel, 1/z = a x/z + b y/z + c, for any slant, and
    (a, b, c) is its normal. A least-squares fit of 1/z is therefore exact on planes. Neighbors without depth are left
    out. So are neighbors further in front or behind than a surface slanted by 80 degrees would be, because they belong to
    another surface. This avoids averaging over edges.

    Args:
        depth: Meters along the optical axis, shape ``(height, width)``; 0 where unknown.
        intrinsics: The camera's intrinsics for pixels of ``depth``.
        rows: Rows to compute; all by default. The others still serve as neighbors.
        columns: Columns to compute; all by default.
        radius: Half the window in pixels, without its center; by default 8 at a width of 640 and in proportion, at least 1.

    Returns:
        ``float32``, shape ``(3, rows, columns)``: x right, y up, z toward the camera. A wall facing the camera has
        (0, 0, 1), the floor (0, 1, 0), the wall on the right (-1, 0, 0). Zero if the depth is unknown, or if fewer than
        three neighbors that are not in a line belong to the surface.

    Example:
        >>> normals_from_depth(np.full((4, 6), 2.0), Intrinsics(fx=6, fy=6, cx=3, cy=2))[:, 1, 1].tolist()
        [0.0, 0.0, 1.0]
    """
    height, width = depth.shape
    rows = np.arange(height) if rows is None else rows
    columns = np.arange(width) if columns is None else columns
    if radius is None:
        radius = max(1, round(RADIUS_AT_640 * width / 640))
    with np.errstate(divide="ignore"):
        inverse = np.where(depth > 0, 1 / depth.astype(np.float64), 0)
    padded = np.pad(inverse, radius)
    center = depth[rows[:, None], columns].astype(np.float64)
    # For good conditioning, coordinates are relative to the pixel, in units of its rays, and 1/z to the pixel's 1/z.
    sums = np.zeros((9, len(rows), len(columns)))
    for down in range(-radius, radius + 1):
        y = down / intrinsics.fy
        band = padded[rows + radius + down]
        n, sx, sxx, sq, sxq = np.zeros((5, len(rows), len(columns)))
        for across in range(-radius, radius + 1):
            x = across / intrinsics.fx
            ratio = (
                center * band[:, columns + radius + across]
            )  # the pixel's depth divided by the neighbor's, 0 if unknown
            q = ratio - 1
            # |z' - z| <= z * step in terms of z / z'. Unknown neighbors never satisfy it.
            step = math.hypot(x, y) * math.tan(MAX_SLANT)
            same = np.abs(q) <= step * ratio
            q *= same
            for total, term in zip((n, sx, sxx, sq, sxq), (same, x * same, x * x * same, q, x * q), strict=True):
                total += term
        for total, term in zip(sums, (n, sx, y * n, sxx, y * sx, y * y * n, sq, sxq, y * sq), strict=True):
            total += term
    a, b, c, determined = _solve(sums)
    ray_x, ray_y = intrinsics.rays(rows[:, None], columns)
    # At the pixel itself, the fit is 1 + c. a and b are slopes in units of rays, so they belong to the plane itself.
    normal = np.stack([-a, b, 1 + c - a * ray_x - b * ray_y])
    length = np.sqrt((normal**2).sum(axis=0))
    known = (center > 0) & determined & (length > 0)
    normal = np.where(known, normal / np.where(known, length, 1), 0) + 0.0  # no negative zeros
    return normal.astype(np.float32)


def _solve(sums: Array) -> tuple[Array, Array, Array, Array]:
    """Solve the 3 x 3 normal equations of ``q = c + a x + b y`` at every pixel. Return where they determine a plane."""
    n, sx, sy, sxx, sxy, syy, sq, sxq, syq = sums
    n = np.maximum(n, 1)
    cxx, cxy, cyy = sxx - sx * sx / n, sxy - sx * sy / n, syy - sy * sy / n
    cxq, cyq = sxq - sx * sq / n, syq - sy * sq / n
    determinant = cxx * cyy - cxy * cxy
    # Zero for points in a line, up to rounding. It is 1/12 of the scale for three neighboring pixels, more for a window.
    determined = (sums[0] >= 3) & (determinant > 1e-6 * (sxx + syy) ** 2)
    safe = np.where(determined, determinant, 1)
    a = (cxq * cyy - cyq * cxy) / safe
    b = (cyq * cxx - cxq * cxy) / safe
    c = (sq - a * sx - b * sy) / n
    return a, b, c, determined
