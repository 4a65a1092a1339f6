"""A room's layout as keypoints: 48 types, the ordered corners of 11 kinds of view.

A view of an empty box room is one of eleven layouts, which differ in the visible surfaces and edges: the
types 0 to 10 of the LSUN room layout challenge (2015), which RoomNet (Lee et al., ICCV 2017) predicts by keypoints. The
keypoints of a layout are the room's visible corners and the points where its edges leave the image. There are 8, 6, 6, 4,
4, 6, 4, 4, 2, 2 and 2 of them, 48 in total. Furniture does not hide keypoints.

A corner's name lists the walls that meet there. The wall in front of the viewer is *front*: ``l`` or ``r`` for left or
right, ``f`` or ``b`` for front or back, ``u`` or ``d`` for up (ceiling) or down (floor). ``"lfu"`` is the corner of the
left wall, the front wall and the ceiling. ``"lfu>lbu"`` is the point where the edge from that corner toward ``lbu``,
between left wall and ceiling, leaves the image. If two walls are in view, the left one is the front wall.
"""

from __future__ import annotations

import itertools

import numpy as np

from lightning_gradnorm.experiments.problems.dense.rooms.camera import CX, CY, FX, FY
from lightning_gradnorm.experiments.problems.dense.rooms.primitives import Booleans, Floats, Integers

LAYOUTS = (
    ("lfu", "lfu>lbu", "lfd", "lfd>lbd", "rfd", "rfd>rbd", "rfu", "rfu>rbu"),  # three walls, floor and ceiling
    ("lfd", "lfd>lfu", "lfd>lbd", "rfd", "rfd>rfu", "rfd>rbd"),  # three walls and the floor
    ("lfu", "lfu>lbu", "lfu>lfd", "rfu", "rfu>rbu", "rfu>rfd"),  # three walls and the ceiling
    ("rfu", "rfu>lfu", "rfu>rfd", "rfu>rbu"),  # two walls and the ceiling
    ("rfd", "rfd>lfd", "rfd>rfu", "rfd>rbd"),  # two walls and the floor
    ("rfu", "rfu>lfu", "rfu>rbu", "rfd", "rfd>lfd", "rfd>rbd"),  # two walls, floor and ceiling
    ("rfu>lfu", "lfu>rfu", "rfd>lfd", "lfd>rfd"),  # one wall, floor and ceiling
    ("lfd>lfu", "lfu>lfd", "rfd>rfu", "rfu>rfd"),  # three walls
    ("rfu>lfu", "lfu>rfu"),  # one wall and the ceiling
    ("rfd>lfd", "lfd>rfd"),  # one wall and the floor
    ("rfd>rfu", "rfu>rfd"),  # two walls
)
"""The eleven layouts, LSUN's types 0 to 10, with their keypoints in order."""

KEYPOINTS = tuple((layout, point) for layout, points in enumerate(LAYOUTS) for point in points)
"""The 48 keypoint types: a layout's number and a keypoint's name."""

MIN_EXTENT = 0.04
"""Minimum visible length of an edge, as a share of the image's width or height, to avoid slivers of walls."""

# A room's corners, as 0 or 1 for the low or high end of x, y and z, and its edges, as pairs of corners.
CORNERS: Integers = np.array(list(itertools.product((0, 1), repeat=3)))
EDGES = tuple((a, b) for a, b in itertools.combinations(range(8), 2) if np.abs(CORNERS[a] - CORNERS[b]).sum() == 1)


def _corner(name: str, front: int) -> int:
    """Return a corner by its name. The front wall is 0 at low z, 1 at high x, 2 at high z or 3 at low x."""
    x, z = (1 if name[0] == "r" else -1), (-1 if name[1] == "f" else 1)
    for _ in range(front):  # a quarter to the right
        x, z = -z, x
    return 4 * (x > 0) + 2 * (name[2] == "u") + (z > 0)


def _ends(point: str, front: int) -> tuple[int, int]:
    """Return an edge as its start and end corner. Both are the same for a keypoint at a corner."""
    start, _, towards = point.partition(">")
    return _corner(start, front), _corner(towards or start, front)


def _pattern(points: tuple[str, ...], front: int) -> Booleans:
    """Return which of the 12 edges and 8 corners are visible in a layout, shape ``(20,)``."""
    ends = [_ends(point, front) for point in points]
    corners = {a for a, b in ends if a == b}
    leaving = {(min(pair), max(pair)) for pair in ends}
    edges = [edge in leaving or set(edge) <= corners for edge in EDGES]
    return np.array([*edges, *(corner in corners for corner in range(8))])


VIEWS = tuple((layout, front) for layout in range(len(LAYOUTS)) for front in range(4))
"""Every layout in front of every wall."""

PATTERNS = np.stack([_pattern(LAYOUTS[layout], front) for layout, front in VIEWS])


class LayoutViews:
    """The edges of a box room as seen by cameras.

    Args:
        size: The room's extent along x, y and z in meters, shape ``(3,)``. Its lower corner is the origin.
        positions: The cameras' positions inside it, shape ``(n, 3)``.
        rotations: Their rotations, as in `Camera`, shape ``(n, 3, 3)``.
    """

    def __init__(self, size: Floats, positions: Floats, rotations: Floats) -> None:
        offsets = CORNERS * size - positions[:, None]
        x, y, z = (np.sum(offsets * rotations[:, None, axis], axis=-1) for axis in range(3))
        # Homogeneous image coordinates, right and down in shares of width and height, with the depth as w.
        right, down, w = FX * x - CX * z, -FY * y - CY * z, -z
        self._points = np.stack([right, down, w], axis=-1)
        # Inside the image if all four are positive. Then the depth is positive, too.
        self._inside = np.stack([right, w - right, down, w - down], axis=-1)
        start, end = np.array(EDGES).T
        self._low, self._high = _clip(self._inside[:, start], self._inside[:, end])
        self.corners: Booleans = np.all(self._inside >= 0, axis=-1)
        """Which corners are in the image, shape ``(n, 8)``."""
        self.edges: Booleans = np.asarray(self._low < self._high)
        """Which edges are at least partly in the image, shape ``(n, 12)``."""
        seen = np.concatenate([self.edges, self.corners], axis=1)
        matches = (seen[:, None] == PATTERNS).all(axis=-1)
        self.view: Integers = np.where(matches.any(axis=1), matches.argmax(axis=1), -1)
        """Index of each view in `VIEWS`, shape ``(n,)``; -1 for none of the eleven layouts, or with a sliver of an edge."""
        self.view[self.edges.any(axis=1) & (self._extents() < MIN_EXTENT)] = -1

    def keypoints(self, camera: int) -> Floats:
        """Return a camera's keypoints, ``(48, 3)``: x and y in [0, 1] from the upper left, and 1 if visible.

        Invisible keypoints are zero.
        """
        layout, front = VIEWS[self.view[camera]]
        table = np.zeros((len(KEYPOINTS), 3))
        for row, (number, point) in enumerate(KEYPOINTS):
            if number == layout:
                table[row] = [*self._locate(camera, *_ends(point, front)), 1.0]
        return table

    def _locate(self, camera: int, start: int, towards: int) -> Floats:
        point = self._points[camera, start]
        if start != towards:
            edge = EDGES.index((min(start, towards), max(start, towards)))
            share = self._high[camera, edge] if start < towards else 1 - self._low[camera, edge]
            point = point + share * (self._points[camera, towards] - point)
        place: Floats = point[:2] / point[2]
        return place

    def _extents(self) -> Floats:
        """Return the length of each camera's shortest visible edge segment in the image, shape ``(n,)``."""
        start, end = (self._points[:, list(corners)] for corners in zip(*EDGES, strict=True))
        pieces = [start + share[..., None] * (end - start) for share in (self._low, self._high)]
        with np.errstate(divide="ignore", invalid="ignore"):
            near, far = (piece[..., :2] / piece[..., 2:] for piece in pieces)
            extents = np.abs(far - near).max(axis=-1)
        shortest: Floats = np.where(self.edges, extents, np.inf).min(axis=1)
        return shortest


def _clip(start: Floats, end: Floats) -> tuple[Floats, Floats]:
    """Clip segments, given by the signed distances of their ends from the clipping planes, ``(..., planes)``.

    Returns the shares of the way from start to end where the inner part begins and ends. Nothing is inside unless the
    first is less than the second.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = start / (start - end)
    low = np.where(start < 0, np.where(end < 0, np.inf, crossing), 0.0).max(axis=-1)
    high = np.where(end < 0, np.where(start < 0, -np.inf, crossing), 1.0).min(axis=-1)
    return low, high
