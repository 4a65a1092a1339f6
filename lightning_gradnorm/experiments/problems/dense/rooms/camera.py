"""NYUv2's camera, at any image size and in any pose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradnorm.experiments.problems.dense.rooms.primitives import Floats

# NYUv2's values for its 640 x 480 images, as shares of width and height: images of other sizes are resized versions.
FX, FY = 518.86 / 640, 519.47 / 480
CX, CY = 325.58 / 640, 253.74 / 480


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Its frame is ``x`` right, ``y`` up, ``z`` toward the viewer, so it looks along ``-z``. The depth of a point is its
    distance along the optical axis, ``-z``, as in NYUv2, not the length of the ray.

    Args:
        position: In world coordinates, in meters, shape ``(3,)``.
        rotation: The camera's right, up and backward directions in world coordinates, one per row, shape ``(3, 3)``.
    """

    position: Floats
    rotation: Floats

    def to_camera(self, points: Floats) -> Floats:
        """Express world points, ``(..., 3)``, in the camera's frame."""
        return self.turn(points - self.position)

    def turn(self, directions: Floats) -> Floats:
        """Express world directions, ``(..., 3)``, in the camera's frame.

        Written out, because the last bits of a matrix product may depend on the number of directions.
        """
        x, y, z = directions[..., 0:1], directions[..., 1:2], directions[..., 2:3]
        return x * self.rotation[:, 0] + y * self.rotation[:, 1] + z * self.rotation[:, 2]


def rotations(yaw: Floats, pitch: Floats, roll: Floats) -> Floats:
    """Return camera rotations, ``(n, 3, 3)``, from angles in radians, each of shape ``(n,)``.

    At zero a camera looks along ``-z``. ``yaw`` turns it to the left, ``pitch`` up, ``roll`` counter-clockwise.

    Example:
        >>> right, up, backward = rotations(np.array([np.pi / 2]), np.zeros(1), np.zeros(1))[0]
        >>> [round(float(number)) for number in -backward]
        [-1, 0, 0]
    """
    cy, sy, cp, sp, cr, sr = (f(angle) for angle in (yaw, pitch, roll) for f in (np.cos, np.sin))
    right = np.stack([cy, 0 * cy, -sy], axis=-1)
    up = np.stack([sp * sy, cp, sp * cy], axis=-1)
    backward = np.cross(right, up)
    rolled_right = cr[:, None] * right + sr[:, None] * up
    rolled_up = cr[:, None] * up - sr[:, None] * right
    return np.stack([rolled_right, rolled_up, backward], axis=1)


def pixel_rays(height: int, width: int) -> tuple[Floats, Floats]:
    """Return the rays through the pixel centers: ``x`` by column, ``(width,)``, and ``y`` by row, ``(height,)``.

    The ray of a pixel is ``(x, y, -1)`` in the camera's frame, so a point at ``t`` times the ray has depth ``t``.

    Example:
        >>> x, y = pixel_rays(480, 640)
        >>> round(float(x[0]), 4), round(float(y[0]), 4)
        (-0.6265, 0.4875)
    """
    columns, rows = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    return (columns - CX) / FX, (CY - rows) / FY
