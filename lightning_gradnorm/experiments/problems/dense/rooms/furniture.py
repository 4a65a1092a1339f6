"""Random pieces of furniture as lists of primitives.

The frame of a piece has ``x`` along the wall behind it, ``y`` up and ``z`` away from that wall. Its origin is on the floor
in the middle of the back edge. Lengths are in meters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lightning_gradnorm.experiments.problems.dense.rooms.primitives import Material, Primitive, Vector, box, cylinder

Random = np.random.Generator

WOODS = ((0.36, 0.20, 0.09), (0.55, 0.36, 0.18), (0.22, 0.12, 0.07), (0.70, 0.55, 0.36), (0.62, 0.60, 0.56))
FABRICS = ((0.45, 0.10, 0.10), (0.12, 0.20, 0.42), (0.16, 0.32, 0.18), (0.50, 0.46, 0.40), (0.20, 0.20, 0.22))
SHEETS = ((0.85, 0.84, 0.80), (0.62, 0.70, 0.82), (0.80, 0.62, 0.62), (0.70, 0.78, 0.62), (0.86, 0.80, 0.60))
PAINTS = ((0.80, 0.74, 0.60), (0.70, 0.76, 0.78), (0.84, 0.82, 0.78), (0.66, 0.74, 0.62), (0.82, 0.68, 0.60))
BRIGHT = ((0.75, 0.12, 0.10), (0.10, 0.35, 0.70), (0.90, 0.70, 0.10), (0.12, 0.50, 0.22), (0.45, 0.15, 0.50))
GRAYS = ((0.10, 0.10, 0.11), (0.35, 0.35, 0.36), (0.75, 0.75, 0.76))


@dataclass(frozen=True)
class Piece:
    """One piece of furniture.

    Args:
        width: Extent along the wall.
        depth: Extent away from the wall.
        parts: Its primitives in its own frame.
    """

    width: float
    depth: float
    parts: tuple[Primitive, ...]


def pick(rng: Random, colors: tuple[Vector, ...], spread: float = 0.15) -> Vector:
    """Pick a color and change its brightness a little, by up to ``spread``."""
    shade = rng.uniform(1 - spread, 1 + spread)
    red, green, blue = (min(1.0, channel * shade) for channel in colors[rng.integers(len(colors))])
    return red, green, blue


def darker(color: Vector, factor: float) -> Vector:
    """Scale a color."""
    return color[0] * factor, color[1] * factor, color[2] * factor


def wood(rng: Random) -> Material:
    """Make a wood with a grain."""
    color = pick(rng, WOODS)
    return Material(color, darker(color, 0.7), "noise", rng.uniform(0.03, 0.12))


def fabric(rng: Random, colors: tuple[Vector, ...] = FABRICS) -> Material:
    """Make a fabric: plain, striped, checked or mottled."""
    color = pick(rng, colors)
    pattern = ("plain", "stripes", "checker", "noise")[rng.integers(4)]
    return Material(color, darker(color, rng.uniform(0.45, 0.85)), pattern, rng.uniform(0.06, 0.2))


def legs(label: str, material: Material, width: float, depth: float, height: float, thick: float) -> list[Primitive]:
    """Put four legs under the corners of a top."""
    inset = width / 2 - thick
    columns = ((-inset - thick / 2, -inset + thick / 2), (inset - thick / 2, inset + thick / 2))
    rows = ((thick / 2, 1.5 * thick), (depth - 1.5 * thick, depth - thick / 2))
    return [box(label, material, x, (0, height), z) for x in columns for z in rows]


def clutter(rng: Random, width: float, depth: float, height: float, count: int) -> list[Primitive]:
    """Put small things side by side on a top: piles of books, vases, boxes and lamps."""
    things: list[Primitive] = []
    slot = width / max(count, 1)
    for number in range(count):
        x = -width / 2 + slot * (number + rng.uniform(0.4, 0.6))
        z = depth * rng.uniform(0.4, 0.6)
        kind = rng.integers(4)
        if kind == 0:
            things += _pile_of_books(rng, x, z, height, min(slot, depth))
        elif kind == 1:
            radius = min(rng.uniform(0.04, 0.08), slot * 0.35)
            top = height + rng.uniform(0.12, 0.3)
            things.append(cylinder("objects", fabric(rng, BRIGHT), x, z, radius, (height, top)))
        elif kind == 2:
            half = min(rng.uniform(0.06, 0.14), slot * 0.35, depth * 0.35)
            top = height + rng.uniform(0.08, 0.25)
            things.append(
                box("objects", fabric(rng, BRIGHT), (x - half, x + half), (height, top), (z - half, z + half))
            )
        else:
            radius = min(rng.uniform(0.09, 0.14), slot * 0.4)
            things.append(cylinder("objects", Material(pick(rng, GRAYS)), x, z, 0.025, (height, height + 0.25)))
            shade = Material((0.95, 0.85, 0.6), glow=rng.uniform(0.3, 0.9))
            things.append(cylinder("objects", shade, x, z, radius, (height + 0.25, height + 0.45)))
    return things


def _pile_of_books(rng: Random, x: float, z: float, height: float, room: float) -> list[Primitive]:
    pile, bottom = [], height
    for _ in range(rng.integers(2, 5)):
        half, deep, thick = min(rng.uniform(0.1, 0.14), room * 0.4), min(0.1, room * 0.3), rng.uniform(0.025, 0.06)
        cover = Material(pick(rng, BRIGHT + FABRICS))
        book = box("books", cover, (-half, half), (bottom, bottom + thick), (-deep, deep))
        pile.append(book.moved(x, z, yaw=rng.uniform(-0.15, 0.15)))
        bottom += thick
    return pile


def bed(rng: Random) -> Piece:
    """Make a bed with its head at the wall."""
    width, length, top = rng.uniform(1.0, 1.9), rng.uniform(2.0, 2.15), rng.uniform(0.45, 0.6)
    frame, sheet, blanket = wood(rng), fabric(rng, SHEETS), fabric(rng, FABRICS + SHEETS)
    half = width / 2
    parts = [
        box("bed", frame, (-half, half), (0.0, top - 0.2), (0.06, length)),
        box("bed", frame, (-half, half), (0.0, rng.uniform(0.8, 1.2)), (0.0, 0.06)),
        box("bed", sheet, (-half + 0.02, half - 0.02), (top - 0.2, top), (0.06, length - 0.02)),
        box("bed", blanket, (-half - 0.02, half + 0.02), (top - 0.3, top + 0.04), (length * 0.35, length + 0.02)),
    ]
    places = (-width / 4, width / 4) if width > 1.3 else (0.0,)
    for x in places:
        reach = min(0.32, width / 2 / len(places) - 0.05)
        pillow = Material(pick(rng, SHEETS, 0.05))
        parts.append(box("bed", pillow, (x - reach, x + reach), (top, top + 0.12), (0.1, 0.48)))
    return Piece(width + 0.06, length + 0.04, tuple(parts))


def sofa(rng: Random) -> Piece:
    """Make a sofa, or an armchair if it is narrow."""
    width = rng.uniform(0.9, 1.1) if rng.uniform() < 0.3 else rng.uniform(1.5, 2.4)
    depth, seat, back, arm = rng.uniform(0.8, 1.0), rng.uniform(0.38, 0.46), rng.uniform(0.75, 0.95), 0.18
    cover, half = fabric(rng), width / 2
    parts = [
        box("sofa", cover, (-half + arm, half - arm), (0.06, seat), (0.2, depth)),
        box("sofa", cover, (-half + arm, half - arm), (0.06, back), (0.0, 0.2)),
        box("sofa", cover, (-half, -half + arm), (0.0, seat + 0.18), (0.0, depth - 0.02)),
        box("sofa", cover, (half - arm, half), (0.0, seat + 0.18), (0.0, depth - 0.02)),
    ]
    for number in range(rng.integers(0, 3)):
        x = (-half + arm + 0.25) if number == 0 else (half - arm - 0.25)
        cushion = fabric(rng, BRIGHT + SHEETS)
        parts.append(box("sofa", cushion, (x - 0.2, x + 0.2), (seat, seat + 0.36), (0.2, 0.32)))
    return Piece(width, depth, tuple(parts))


def table(rng: Random, width: float, depth: float, height: float) -> Piece:
    """Make a table with four legs, or a round one with a single leg, with things on it."""
    material = wood(rng)
    if rng.uniform() < 0.3:
        width = depth
        parts = [
            cylinder("table", material, 0, depth / 2, depth / 2, (height - 0.04, height)),
            cylinder("table", material, 0, depth / 2, 0.05, (0.03, height - 0.04)),
            cylinder("table", material, 0, depth / 2, depth / 4, (0.0, 0.03)),
        ]
    else:
        parts = [
            box("table", material, (-width / 2, width / 2), (height - 0.05, height), (0, depth)),
            *legs("table", material, width, depth, height - 0.05, 0.06),
        ]
    reach = 0.5 if parts[0].round else 0.9
    parts += clutter(rng, width * reach, depth, height, int(rng.integers(0, 4)))
    return Piece(width, depth, tuple(parts))


def coffee_table(rng: Random) -> Piece:
    """Make a low table."""
    return table(rng, rng.uniform(0.8, 1.2), rng.uniform(0.5, 0.7), rng.uniform(0.38, 0.48))


def dining_table(rng: Random) -> Piece:
    """Make a dining table."""
    return table(rng, rng.uniform(1.1, 1.8), rng.uniform(0.75, 0.95), rng.uniform(0.72, 0.77))


def desk(rng: Random) -> Piece:
    """Make a desk."""
    return table(rng, rng.uniform(1.0, 1.6), rng.uniform(0.6, 0.75), rng.uniform(0.72, 0.77))


def chair(rng: Random) -> Piece:
    """Make a chair that faces away from the wall."""
    width, depth, seat = rng.uniform(0.4, 0.5), rng.uniform(0.42, 0.52), rng.uniform(0.43, 0.48)
    frame = wood(rng) if rng.uniform() < 0.6 else Material(pick(rng, GRAYS))
    cover, half, back = (frame if rng.uniform() < 0.4 else fabric(rng)), width / 2, rng.uniform(0.85, 1.05)
    parts = [
        box("chair", cover, (-half, half), (seat - 0.06, seat), (0.04, depth)),
        box("chair", cover, (-half, half), (seat + 0.12, back), (0.0, 0.04)),
        box("chair", frame, (-half, -half + 0.04), (seat - 0.06, seat + 0.12), (0.0, 0.04)),
        box("chair", frame, (half - 0.04, half), (seat - 0.06, seat + 0.12), (0.0, 0.04)),
    ]
    if rng.uniform() < 0.3:
        parts.append(cylinder("chair", frame, 0, depth / 2, 0.035, (0.04, seat - 0.06)))
        parts.append(cylinder("chair", frame, 0, depth / 2, half, (0.0, 0.04)))
    else:
        parts += legs("chair", frame, width, depth, seat - 0.06, 0.04)
    return Piece(width, depth, tuple(parts))


def cabinet(rng: Random) -> Piece:
    """Make a wardrobe, a dresser or a nightstand, with doors or drawers."""
    sizes = (((0.9, 1.8), (1.8, 2.2)), ((0.8, 1.4), (0.7, 1.0)), ((0.4, 0.55), (0.45, 0.6)))
    widths, heights = sizes[rng.integers(len(sizes))]
    width, height, depth = rng.uniform(*widths), rng.uniform(*heights), rng.uniform(0.38, 0.6)
    body, half = wood(rng), width / 2
    front = replace(body, second=darker(body.color, 0.4), pattern="stripes", scale=rng.uniform(0.2, 0.45))
    parts = [
        box("furniture", body, (-half, half), (0.0, height), (0.0, depth - 0.02)),
        box("furniture", front, (-half + 0.03, half - 0.03), (0.06, height - 0.04), (depth - 0.02, depth)),
    ]
    if height < 1.2:
        parts += clutter(rng, width * 0.9, depth, height, int(rng.integers(0, 3)) + (width > 0.7))
    return Piece(width, depth, tuple(parts))


def bookshelf(rng: Random) -> Piece:
    """Make an open shelf with rows of books and things."""
    width, height, depth = rng.uniform(0.7, 1.4), rng.uniform(1.2, 2.1), rng.uniform(0.26, 0.34)
    body, half, board = wood(rng), width / 2, 0.03
    parts = [
        box("furniture", body, (-half, -half + board), (0.0, height), (0.0, depth)),
        box("furniture", body, (half - board, half), (0.0, height), (0.0, depth)),
        box("furniture", body, (-half + board, half - board), (0.0, height), (0.0, 0.02)),
    ]
    shelves = int(rng.integers(3, 6))
    gap = (height - board) / shelves
    for number in range(shelves + 1):
        bottom = number * gap
        parts.append(box("furniture", body, (-half + board, half - board), (bottom, bottom + board), (0.02, depth)))
        if number == shelves or rng.uniform() < 0.15:
            continue
        inner = width - 2 * board
        end = -half + board + inner * rng.uniform(0.45, 0.98)
        top = bottom + board + min(gap - board - 0.02, rng.uniform(0.2, 0.3))
        backs = Material(pick(rng, BRIGHT), pick(rng, FABRICS), "stripes", rng.uniform(0.03, 0.06))
        parts.append(box("books", backs, (-half + board, end), (bottom + board, top), (0.02, depth * 0.85)))
        if end < half - 0.3:
            radius = min(0.07, depth / 3)
            parts.append(
                cylinder("objects", fabric(rng, BRIGHT), half - 0.15, depth / 2, radius, (bottom + board, top))
            )
    return Piece(width, depth, tuple(parts))


def television(rng: Random) -> Piece:
    """Make a television on a low cabinet."""
    width, depth, height = rng.uniform(1.1, 1.8), rng.uniform(0.4, 0.5), rng.uniform(0.4, 0.6)
    body, half = wood(rng), rng.uniform(0.42, 0.65)
    screen = Material((0.03, 0.03, 0.04))
    if rng.uniform() < 0.4:
        screen = Material(pick(rng, BRIGHT), pick(rng, SHEETS), "noise", rng.uniform(0.1, 0.3), glow=0.6)
    bottom, top, z = height + 0.06, height + 0.06 + half * 1.12, depth * 0.45
    parts = (
        box("furniture", body, (-width / 2, width / 2), (0.0, height), (0.0, depth)),
        box("tv", Material((0.05, 0.05, 0.05)), (-0.15, 0.15), (height, bottom), (z - 0.08, z + 0.08)),
        box("tv", Material((0.04, 0.04, 0.04)), (-half, half), (bottom, top), (z - 0.03, z + 0.03)),
        box("tv", screen, (-half + 0.03, half - 0.03), (bottom + 0.03, top - 0.03), (z + 0.03, z + 0.035)),
    )
    return Piece(width, depth, parts)


def lamp(rng: Random) -> Piece:
    """Make a floor lamp."""
    height, metal = rng.uniform(1.4, 1.75), Material(pick(rng, GRAYS))
    shade = Material((0.95, 0.86, 0.62), glow=rng.uniform(0.3, 0.9))
    parts = (
        cylinder("objects", metal, 0, 0.2, 0.15, (0.0, 0.03)),
        cylinder("objects", metal, 0, 0.2, 0.02, (0.03, height - 0.3)),
        cylinder("objects", shade, 0, 0.2, 0.19, (height - 0.3, height)),
    )
    return Piece(0.4, 0.4, parts)


def plant(rng: Random) -> Piece:
    """Make a plant in a pot, or a bin instead of the plant."""
    radius, height = rng.uniform(0.13, 0.2), rng.uniform(0.25, 0.4)
    parts = [cylinder("objects", fabric(rng, BRIGHT + GRAYS), 0, 0.25, radius, (0.0, height))]
    if rng.uniform() < 0.6:
        leaves = Material((0.10, 0.32, 0.10), (0.03, 0.14, 0.04), "noise", 0.06)
        parts.append(cylinder("objects", leaves, 0, 0.25, radius + 0.05, (height, height + rng.uniform(0.3, 0.8))))
    return Piece(0.5, 0.5, tuple(parts))


def crate(rng: Random) -> Piece:
    """Make a box or suitcase on the floor, slightly rotated."""
    width, depth, height = rng.uniform(0.3, 0.6), rng.uniform(0.25, 0.45), rng.uniform(0.25, 0.5)
    material = fabric(rng, BRIGHT + WOODS)
    body = box("objects", material, (-width / 2, width / 2), (0.0, height), (-depth / 2, depth / 2))
    return Piece(0.75, 0.75, (body.moved(0.0, 0.375, yaw=rng.uniform(-0.5, 0.5)),))


def window(rng: Random) -> Piece:
    """Make a window with a frame and a bar, flat on the wall, at a random height."""
    width, bottom, top = rng.uniform(0.8, 2.0), rng.uniform(0.8, 1.0), rng.uniform(1.9, 2.15)
    frame, half, edge = Material(pick(rng, GRAYS[2:] + WOODS)), width / 2, 0.06
    sky = Material((0.70, 0.85, 1.0), (0.75, 0.90, 0.80), "noise", rng.uniform(0.3, 0.8), glow=rng.uniform(0.5, 1.1))
    if rng.uniform() < 0.25:
        sky = Material((0.85, 0.84, 0.78), (0.60, 0.60, 0.56), "stripes", 0.06, glow=rng.uniform(0.2, 0.5))  # blinds
    parts = (
        box("window", sky, (-half, half), (bottom, top), (0.0, 0.015)),
        box("window", frame, (-half - edge, -half), (bottom - edge, top + edge), (0.0, 0.05)),
        box("window", frame, (half, half + edge), (bottom - edge, top + edge), (0.0, 0.05)),
        box("window", frame, (-half, half), (bottom - edge, bottom), (0.0, 0.05)),
        box("window", frame, (-half, half), (top, top + edge), (0.0, 0.05)),
        box("window", frame, (-edge / 2, edge / 2), (bottom, top), (0.0, 0.04)),
    )
    return Piece(width + 2 * edge, 0.05, parts)


def picture(rng: Random) -> Piece:
    """Make a framed picture at eye level."""
    half, tall, middle = rng.uniform(0.2, 0.55), rng.uniform(0.2, 0.4), rng.uniform(1.4, 1.7)
    frame = Material(pick(rng, WOODS + GRAYS))
    motif = Material(pick(rng, BRIGHT + SHEETS), pick(rng, BRIGHT + FABRICS), "noise", rng.uniform(0.08, 0.3))
    if rng.uniform() < 0.3:
        motif = replace(motif, pattern="checker", scale=rng.uniform(0.08, 0.2))
    rim = 0.04
    parts = (
        box("picture", frame, (-half, half), (middle - tall, middle + tall), (0.0, 0.03)),
        box("picture", motif, (-half + rim, half - rim), (middle - tall + rim, middle + tall - rim), (0.03, 0.035)),
    )
    return Piece(2 * half, 0.035, parts)


def door(rng: Random) -> Piece:
    """Make a closed door, which NYUv2's 13 classes count as wall."""
    half, leaf = rng.uniform(0.4, 0.48), wood(rng)
    knob = Material(pick(rng, GRAYS))
    parts = (
        box("wall", leaf, (-half, half), (0.0, 2.05), (0.0, 0.04)),
        box("wall", knob, (half - 0.12, half - 0.05), (1.0, 1.05), (0.04, 0.09)),
    )
    return Piece(2 * half, 0.09, parts)
