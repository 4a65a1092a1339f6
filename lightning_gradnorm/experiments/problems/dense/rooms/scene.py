"""Random furnished rooms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lightning_gradnorm.experiments.problems.dense.rooms import furniture
from lightning_gradnorm.experiments.problems.dense.rooms.furniture import Piece, Random
from lightning_gradnorm.experiments.problems.dense.rooms.primitives import Floats, Material, Primitive

PIECES: dict[str, tuple[tuple[Callable[[Random], Piece], float], ...]] = {
    "bedroom": (
        (furniture.bed, 1.0),
        (furniture.cabinet, 0.9),
        (furniture.desk, 0.6),
        (furniture.cabinet, 0.6),
        (furniture.bookshelf, 0.4),
        (furniture.television, 0.4),
        (furniture.chair, 0.6),
        (furniture.crate, 0.4),
    ),
    "living room": (
        (furniture.sofa, 1.0),
        (furniture.television, 0.9),
        (furniture.sofa, 0.6),
        (furniture.bookshelf, 0.7),
        (furniture.cabinet, 0.4),
        (furniture.lamp, 0.5),
        (furniture.plant, 0.6),
        (furniture.chair, 0.3),
    ),
    "study": (
        (furniture.desk, 1.0),
        (furniture.bookshelf, 0.9),
        (furniture.bookshelf, 0.6),
        (furniture.cabinet, 0.6),
        (furniture.sofa, 0.4),
        (furniture.chair, 0.8),
        (furniture.crate, 0.6),
        (furniture.plant, 0.4),
    ),
    "dining room": (
        (furniture.cabinet, 0.9),
        (furniture.cabinet, 0.6),
        (furniture.television, 0.3),
        (furniture.lamp, 0.5),
        (furniture.plant, 0.6),
        (furniture.chair, 0.6),
        (furniture.bookshelf, 0.4),
    ),
}
"""Furniture along the walls of each kind of room, with probabilities."""


@dataclass(frozen=True)
class Scene:
    """A box room with its contents.

    Args:
        size: Extent along x, y (up) and z in meters, shape ``(3,)``. The lower corner is the origin.
        surfaces: Materials of the walls at low and high x, of floor and ceiling, of the walls at low and high z.
        primitives: The contents of the room.
        light: Position of the lamp, shape ``(3,)``.
        tint: Color of its light, shape ``(3,)``.
        power: Light on a surface that faces the lamp from one meter away.
        ambient: Light on every surface.
    """

    size: Floats
    surfaces: tuple[Material, ...]
    primitives: tuple[Primitive, ...]
    light: Floats
    tint: Floats
    power: float
    ambient: float


class _Floor:
    """The occupied parts of a room's floor, as rectangles ``(x low, x high, z low, z high)``."""

    def __init__(self, size: Floats) -> None:
        self.width, self.length = float(size[0]), float(size[2])
        self.taken: list[tuple[float, float, float, float]] = []

    def is_free(self, x: float, z: float, half_x: float, half_z: float, beside: int | None = None) -> bool:
        """Return True if a rectangle is in the room and overlaps no occupied one, except ``beside``."""
        low_x, high_x, low_z, high_z = x - half_x, x + half_x, z - half_z, z + half_z
        return (
            min(low_x, low_z) > 0
            and high_x < self.width
            and high_z < self.length
            and not any(
                low_x < other[1] and other[0] < high_x and low_z < other[3] and other[2] < high_z
                for number, other in enumerate(self.taken)
                if number != beside
            )
        )

    def take(self, x: float, z: float, half_x: float, half_z: float, gap: float = 0.03) -> bool:
        """Occupy a rectangle with a gap around it if it is free."""
        free = self.is_free(x, z, half_x, half_z)
        if free:
            self.taken.append((x - half_x - gap, x + half_x + gap, z - half_z - gap, z + half_z + gap))
        return free


def draw_scene(rng: Random) -> Scene:
    """Draw a room and furnish it."""
    size = rng.uniform([2.8, 2.4, 3.2], [7.0, 3.1, 7.0])
    if rng.uniform() < 0.15:  # narrow and high, for views with three walls and nothing else
        size = rng.uniform([2.0, 2.8, 3.2], [2.6, 3.3, 6.0])
    pieces = PIECES[list(PIECES)[rng.integers(len(PIECES))]]
    floor = _Floor(size)
    primitives: list[Primitive] = []
    for make, probability in pieces:
        if rng.uniform() < probability:
            primitives += _along_a_wall(rng, make(rng), size, floor)
    if rng.uniform() < 0.6:
        primitives += _in_the_middle(rng, size, floor, dining=pieces is PIECES["dining room"])
    if rng.uniform() < 0.5:
        primitives += [_rug(rng, size)]
    primitives += _on_the_walls(rng, size)
    light = size * rng.uniform(0.25, 0.75, size=3)
    light[1] = size[1] - rng.uniform(0.15, 0.5)
    return Scene(
        size=size,
        surfaces=_surfaces(rng),
        primitives=tuple(primitives),
        light=light,
        tint=np.array([1.0, rng.uniform(0.86, 1.0), rng.uniform(0.7, 1.0)]),
        power=rng.uniform(0.8, 2.0),
        ambient=rng.uniform(0.12, 0.35),
    )


def _surfaces(rng: Random) -> tuple[Material, ...]:
    paint = furniture.pick(rng, furniture.PAINTS)
    pattern = ("plain", "plain", "noise", "stripes")[rng.integers(4)]
    wall = Material(paint, furniture.darker(paint, rng.uniform(0.8, 0.95)), pattern, rng.uniform(0.1, 0.3))
    ceiling = Material(furniture.pick(rng, ((0.88, 0.88, 0.86),), 0.08))
    if rng.uniform() < 0.25:  # tiles
        ceiling = Material(ceiling.color, furniture.darker(ceiling.color, 0.88), "checker", 0.6)
    kind = rng.integers(3)
    if kind == 0:
        tile = furniture.pick(rng, furniture.PAINTS + furniture.GRAYS)
        ground = Material(tile, furniture.darker(tile, rng.uniform(0.6, 0.9)), "checker", rng.uniform(0.25, 0.5))
    elif kind == 1:
        plank = furniture.pick(rng, furniture.WOODS)
        ground = Material(plank, furniture.darker(plank, 0.75), "stripes", rng.uniform(0.1, 0.2))
    else:
        carpet = furniture.pick(rng, furniture.FABRICS + furniture.PAINTS)
        ground = Material(carpet, furniture.darker(carpet, 0.8), "noise", 0.08)
    return wall, wall, ground, ceiling, wall, wall


def _wall_frame(size: Floats, wall: int, along: float, away: float) -> tuple[float, float]:
    """Return the world's x and z of a point ``along`` a wall from its left end, and ``away`` from it.

    Walls are numbered as in `layout.VIEWS`: 0 at low z, 1 at high x, 2 at high z, 3 at low x.
    """
    x, z = float(size[0]), float(size[2])
    return ((along, away), (x - away, along), (x - along, z - away), (away, z - along))[wall]


def _length(size: Floats, wall: int) -> float:
    return float(size[0] if wall % 2 == 0 else size[2])


def _place(piece: Piece, size: Floats, wall: int, along: float, away: float) -> list[Primitive]:
    x, z = _wall_frame(size, wall, along, away)
    return [part.moved(x, z, yaw=-wall * math.pi / 2) for part in piece.parts]


def _along_a_wall(rng: Random, piece: Piece, size: Floats, floor: _Floor) -> list[Primitive]:
    """Put a piece with its back to a wall if there is room, otherwise return nothing."""
    for _ in range(12):
        wall = int(rng.integers(4))
        free = _length(size, wall) - piece.width
        if free < 0.1:
            continue
        along, away = piece.width / 2 + 0.02 + rng.uniform() * (free - 0.04), rng.uniform(0.01, 0.06)
        x, z = _wall_frame(size, wall, along, away + piece.depth / 2)
        halves = (piece.width / 2, piece.depth / 2)
        if floor.take(x, z, *(halves if wall % 2 == 0 else halves[::-1])):
            return _place(piece, size, wall, along, away)
    return []


def _in_the_middle(rng: Random, size: Floats, floor: _Floor, dining: bool) -> list[Primitive]:
    """Put a table away from the walls, with chairs around it if it is a dining table."""
    seats = dining or rng.uniform() < 0.4
    piece = furniture.dining_table(rng) if seats else furniture.coffee_table(rng)
    wall = int(rng.integers(4))
    halves = (piece.width / 2, piece.depth / 2)
    for _ in range(6):
        x, z = rng.uniform(0.35, 0.65) * float(size[0]), rng.uniform(0.35, 0.65) * float(size[2])
        if floor.take(x, z, *(halves if wall % 2 == 0 else halves[::-1])):
            yaw = -wall * math.pi / 2
            table = [part.moved(0.0, -piece.depth / 2, yaw=0.0).moved(x, z, yaw=yaw) for part in piece.parts]
            return table + (_chairs(rng, piece, x, z, yaw, floor) if seats else [])
    return []


def _chairs(rng: Random, table: Piece, x: float, z: float, yaw: float, floor: _Floor) -> list[Primitive]:
    """Put chairs of one kind at the sides of the last table, each slightly rotated."""
    chair, parts, table_number = furniture.chair(rng), [], len(floor.taken) - 1
    for side, reach in enumerate((table.depth, table.width, table.depth, table.width)):
        away = reach / 2 + chair.depth / 2 + rng.uniform(-0.1, 0.25)
        turn, crooked = yaw + side * math.pi / 2, rng.uniform(-0.3, 0.3)
        place = x + away * math.sin(turn), z + away * math.cos(turn)
        # A chair may stand under the edge of the table, but not inside another piece.
        if rng.uniform() < 0.7 and floor.is_free(*place, 0.36, 0.36, beside=table_number):
            for part in chair.parts:
                middle = part.moved(0.0, -chair.depth / 2, yaw=0.0)
                # It faces away from its back, so rotate it to face the table.
                parts.append(middle.moved(0.0, away, yaw=math.pi + crooked).moved(x, z, yaw=turn))
    return parts


def _rug(rng: Random, size: Floats) -> Primitive:
    """Lay a rug, which NYUv2's 13 classes count as floor."""
    width, length = float(size[0]), float(size[2])
    half = width * rng.uniform(0.15, 0.25), 0.006, length * rng.uniform(0.15, 0.25)
    material = furniture.fabric(rng, furniture.FABRICS + furniture.BRIGHT)
    return Primitive("floor", material, (width * rng.uniform(0.4, 0.6), half[1], length * rng.uniform(0.4, 0.6)), half)


def _on_the_walls(rng: Random, size: Floats) -> list[Primitive]:
    """Hang windows, pictures and at most one door, none over another."""
    parts: list[Primitive] = []
    with_door = int(rng.integers(4)) if rng.uniform() < 0.7 else -1
    for wall in range(4):
        makers: list[Callable[[Random], Piece]] = []
        if rng.uniform() < 0.45:
            makers.append(furniture.window)
        if wall == with_door:
            makers.append(furniture.door)
        makers += [furniture.picture] * int(rng.integers(0, 3))
        end = rng.uniform(0.2, 0.6)
        for number in rng.permutation(len(makers)):
            piece = makers[number](rng)
            if end + piece.width > _length(size, wall) - 0.15:
                continue
            parts += _place(piece, size, wall, end + piece.width / 2, 0.0)
            end += piece.width + rng.uniform(0.15, 1.0)
    return parts
