"""Detects the directions of the three channels of a source's normals by comparison with normals from its depth."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradnorm._messages import check
from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import Frame
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_from_depth import KINECT, normals_from_depth

Array = npt.NDArray[Any]

AUTO = "auto"
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "up": (1, 1), "down": (1, -1), "towards": (2, 1), "away": (2, -1)}
"""Our axis and sign for each possible direction of a channel, as seen by the camera."""
HOW_TO_SAY = (
    "one direction for each channel: right or left, up or down, towards (the camera) or away, as 'right away up'"
)

MAX_ANGLE = 25
"""Maximum mean angle in degrees between the normals of a source and those from its depth, to accept a convention."""
MIN_MARGIN = 15
"""Degrees by which every other convention must be worse. On a published frame: 6 degrees, the next best 38."""
MIN_PIXELS = 50
IMAGES = 8
"""Maximum number of images to compare until the convention is clear."""


@dataclass(frozen=True)
class Convention:
    """The directions of the three channels of a normal, in order.

    Example:
        >>> Convention.parse("right away up").to_ours(np.array([0.0, -0.6, 0.8])).tolist()
        [0.0, 0.8, 0.6]
    """

    channels: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Convention:
        """Read a convention such as ``"right away up"``.

        Raises:
            ValueError: It does not have three directions, one of each pair.
        """
        channels = tuple(text.split()) if isinstance(text, str) else ()
        axes = sorted(DIRECTIONS[channel][0] for channel in channels if channel in DIRECTIONS)
        check("NYUv2", axes == [0, 1, 2] and len(channels) == 3, "normals_convention", f"'auto' or {HOW_TO_SAY}", text)
        return cls(channels)

    def to_ours(self, normals: Array) -> Array:
        """Return normals, channels first, as (right, up, towards)."""
        ours = np.empty_like(normals)
        for channel, direction in zip(normals, self.channels, strict=True):
            axis, sign = DIRECTIONS[direction]
            ours[axis] = sign * channel
        return ours

    def __str__(self) -> str:
        return " ".join(self.channels)


OURS = Convention(("right", "up", "towards"))
CONVENTIONS = tuple(
    Convention(channels)
    for channels in itertools.permutations(DIRECTIONS, 3)
    if len({DIRECTIONS[c][0] for c in channels}) == 3
)
"""All 48 conventions."""


@dataclass(frozen=True)
class Comparison:
    """Angles between normals and those from the depth in each convention.

    Attributes:
        ranking: Every convention and its mean angle in degrees, the smallest first.
        pixels: Number of compared pixels.
        images: Number of compared images.
    """

    ranking: tuple[tuple[Convention, float], ...]
    pixels: int
    images: int

    @property
    def convention(self) -> Convention | None:
        """The best convention if it is close and no other is, otherwise None."""
        (best, angle), (_, next_angle) = self.ranking[:2]
        clear = self.pixels >= MIN_PIXELS and angle <= MAX_ANGLE and next_angle - angle >= MIN_MARGIN
        return best if clear else None

    def __str__(self) -> str:
        (best, angle), (other, next_angle) = self.ranking[:2]
        images = f"{self.images} image{'s' * (self.images > 1)}"
        if not self.pixels:
            return f"no pixel of {images} has both"
        return (
            f"'{best}' is {angle:.0f} degrees from the normals of the depth on average, the next best, '{other}', "
            f"{next_angle:.0f}, in {self.pixels} pixels of {images}"
        )


def compare_with_depth(frames: Iterable[Frame]) -> Comparison:
    """Compare the normals of images with those from their depth, one image after the other until the convention is clear.

    Each convention's mean angle is over about every eighth pixel of the images. The scale of the depth does not
    matter, and the camera's intrinsics, assumed to be NYUv2's, hardly do. A wall that faces the camera does not show
    which way is right and up. In that case, the next image decides.

    Args:
        frames: At least one frame, with normals and depth of the same size.
    """
    sums, pixels, images = np.zeros(len(CONVENTIONS)), 0, 0
    for frame in frames:
        assert isinstance(frame.normals, np.ndarray)
        height, width = frame.depth.shape
        step = max(1, height // 60)
        rows, columns = np.arange(step // 2, height, step), np.arange(step // 2, width, step)
        derived = normals_from_depth(frame.depth, KINECT.scaled(width / 640, height / 480), rows, columns)
        given = frame.normals[:, rows[:, None], columns]
        both = derived.any(axis=0) & given.any(axis=0)
        derived, given = derived[:, both], given[:, both]
        for position, convention in enumerate(CONVENTIONS):
            cosines = (convention.to_ours(given) * derived).sum(axis=0)
            sums[position] += np.degrees(np.arccos(np.clip(cosines, -1, 1))).sum(dtype=np.float64)
        pixels, images = pixels + int(both.sum()), images + 1
        order = np.argsort(sums, kind="stable")
        ranking = tuple((CONVENTIONS[i], float(sums[i]) / max(pixels, 1)) for i in order)
        comparison = Comparison(ranking, pixels, images)
        if comparison.convention is not None:
            break
    return comparison
