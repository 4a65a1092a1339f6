"""Small made-up indoor images whose geometry is known exactly: a floor, a ceiling and three walls, and things in them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import Frame

SIZE = (48, 64)
SCENES = ["attic_0001", "attic_0001", "hall_0002", "hall_0002", "hall_0003", "cellar_0001", "cellar_0001"]


def rays(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """x/z and y/z (y down) of each pixel's center for the camera of NYUv2, written out: 480 x 640, counted from one."""
    height, width = size
    x = ((np.arange(width) + 0.5) * 640 / width + 0.5 - 325.58244941119034) / 518.85790117450188
    y = ((np.arange(height) + 0.5) * 480 / height + 0.5 - 253.73616633400465) / 519.46961112127485
    return np.meshgrid(x, y)


def room(size: tuple[int, int], half_width: float, floor: float, ceiling: float, length: float):
    """Depth and normals of an empty room seen along its length, and which of its surfaces each pixel shows."""
    x, y = rays(size)
    with np.errstate(divide="ignore"):
        distances = np.stack([
            np.where(x < 0, half_width / -x, np.inf),  # left wall
            np.where(x > 0, half_width / x, np.inf),  # right wall
            np.where(y > 0, floor / y, np.inf),
            np.where(y < 0, ceiling / -y, np.inf),
            np.full(size, length),
        ])  # fmt: skip
    surface = distances.argmin(axis=0)
    facing = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1]], dtype=np.float32)
    return distances.min(axis=0), facing[surface].transpose(2, 0, 1), surface


def frame(seed: int, size: tuple[int, int] = SIZE) -> Frame:
    """A room with random colors and labels, holes in everything that can have holes."""
    draw = np.random.default_rng([7, seed])
    depth, normals, surface = room(size, *draw.uniform([1.5, 1.2, 1.0, 3.0], [2.5, 1.8, 1.6, 6.0]))
    labels = draw.permutation(13)[surface].astype(np.int8)
    top, left = draw.integers(0, size[0] // 2), draw.integers(0, size[1] // 2)
    labels[top : top + size[0] // 4, left : left + size[1] // 4] = draw.integers(13)
    labels[draw.uniform(size=size) < 0.1] = -1
    holes = draw.uniform(size=size) < 0.05
    return Frame(
        image=draw.integers(0, 256, size=(3, *size), dtype=np.uint8),
        segmentation=labels,
        depth=np.where(holes, 0, depth).astype(np.float32),
        normals=np.where(holes | (draw.uniform(size=size) < 0.05), 0, normals).astype(np.float32),
    )


def frames(count: int, first: int = 0, size: tuple[int, int] = SIZE) -> list[Frame]:
    return [frame(first + i, size) for i in range(count)]


def inside(surface: np.ndarray) -> np.ndarray:
    """Where all of a pixel's neighbors are of the same surface."""
    same = np.ones(surface.shape, dtype=bool)
    same[0] = same[-1] = same[:, 0] = same[:, -1] = False
    for axis in (0, 1):
        for by in (-1, 1):
            same &= np.roll(surface, by, axis) == surface
            same &= np.roll(np.roll(surface, by, axis), 1, 1 - axis) == surface
            same &= np.roll(np.roll(surface, by, axis), -1, 1 - axis) == surface
    return same


def digests(folder: Path) -> dict[str, str]:
    """The bytes of every file of a folder, in short."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
