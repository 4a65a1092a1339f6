"""Chooses the training images to hold out for validation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

NEIGHBORS = 10
"""Number of consecutive images that count as a scene if scenes are unknown. They often show the same room."""


def split_by_scene(
    count: int, scenes: Sequence[Hashable] | None, share: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hold out random whole scenes until at least ``share`` of the images is held out.

    Args:
        count: Number of images.
        scenes: The scene of each image; None to count ten consecutive images as one.
        share: Share of the images to hold out; 0 for none.
        seed: Seed of the draw.

    Returns:
        The remaining indices and those held out, both in order.

    Raises:
        ValueError: No images would remain.

    Example:
        >>> train, val = split_by_scene(5, ["hall", "hall", "attic", "attic", "attic"], share=0.2, seed=0)
        >>> train.tolist(), val.tolist()
        ([0, 1], [2, 3, 4])
    """
    scenes = [i // NEIGHBORS for i in range(count)] if scenes is None else scenes
    _, scene_of = np.unique(np.asarray([str(scene) for scene in scenes]), return_inverse=True)
    sizes = np.bincount(scene_of)
    held = np.zeros(len(sizes), dtype=bool)
    for scene in np.random.default_rng([seed, len(sizes)]).permutation(len(sizes)):
        if sizes[held].sum() >= share * count:
            break
        held[scene] = True
    if held.all():
        raise ValueError(
            f"NYUv2: val_share should leave training images, and whole scenes are held out; {share} of {count} images in "
            f"{len(sizes)} scene{'s' * (len(sizes) > 1)} leaves none. Lower it, or use 0 for no validation."
        )
    chosen = held[scene_of]
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
