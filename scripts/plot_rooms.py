"""Draws a sheet of rendered rooms: image, depth, normals and classes, with the layout's keypoints in white.

python scripts/plot_rooms.py --first 100   # docs/rooms.png

Each of the 24 rooms is a block of four: image and depth (red near, blue seven meters and more) above, normals and
classes below.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from lightning_gradnorm.experiments.problems.dense.rooms import CLASSES, View, render

ROWS, COLUMNS, FAR, GAP = 4, 6, 7.0, 4


def block(view: View) -> np.ndarray:
    """Return the four pictures of a view as one, ``(2 h, 2 w, 3)``, in [0, 1]."""
    depth = matplotlib.colormaps["turbo_r"](np.clip(view.depth[0] / FAR, 0, 1))[..., :3]
    classes = matplotlib.colormaps["tab20"](view.segmentation / len(CLASSES))[..., :3]
    height, width = view.segmentation.shape
    for x, y, visible in view.keypoints:
        if visible:
            row, column = min(int(y), height - 1), min(int(x), width - 1)
            classes[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 1
    upper = np.concatenate([np.moveaxis(view.image, 0, -1) / 255, depth], axis=1)
    lower = np.concatenate([np.moveaxis(view.normals + 1, 0, -1) / 2, classes], axis=1)
    return np.pad(np.concatenate([upper, lower]), ((0, GAP), (0, GAP), (0, 0)), constant_values=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/rooms.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first room")
    parser.add_argument("--size", type=int, nargs=2, default=(60, 80), metavar=("HEIGHT", "WIDTH"))
    arguments = parser.parse_args()
    rooms = range(arguments.first, arguments.first + ROWS * COLUMNS)
    blocks = [block(render(arguments.seed, room, tuple(arguments.size))) for room in rooms]
    rows = [np.concatenate(blocks[start : start + COLUMNS], axis=1) for start in range(0, len(blocks), COLUMNS)]
    sheet = (255 * np.concatenate(rows)[:-GAP, :-GAP]).astype(np.uint8)
    # Without its lowest bits, the sensor's grain, the picture needs half the space.
    Image.fromarray(sheet // 10 * 10).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
