"""Renders a picture of a room with all targets from a seed and a number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradnorm.experiments.problems.dense.rooms.casting import cast, faces_of, hit_normals
from lightning_gradnorm.experiments.problems.dense.rooms.scene import draw_scene
from lightning_gradnorm.experiments.problems.dense.rooms.shading import Pixels, shade
from lightning_gradnorm.experiments.problems.dense.rooms.viewpoint import draw_camera

Size = tuple[int, int]


@dataclass(frozen=True)
class View:
    """A picture of a room. ``H, W`` is the size of the image, ``h, w`` that of the targets.

    Args:
        image: Red, green and blue, ``uint8``, ``(3, H, W)``.
        segmentation: Classes 0 to 12, ``uint8``, ``(h, w)``.
        depth: Distance along the optical axis in meters, ``float32``, ``(1, h, w)``.
        normals: Unit normals in the camera's frame, x right, y up, z toward the camera, ``float32``, ``(3, h, w)``.
        keypoints: For each of the 48 types, x and y in pixels of the ``h, w`` grid and 1 if visible, otherwise
            three zeros, ``float32``, ``(48, 3)``. The image spans 0 to w, with pixel centers at halves.
    """

    image: Pixels
    segmentation: Pixels
    depth: npt.NDArray[np.float32]
    normals: npt.NDArray[np.float32]
    keypoints: npt.NDArray[np.float32]


def render(seed: int, scene: int, image_size: Size, output_size: Size | None = None) -> View:
    """Draw room number ``scene``, and return a picture with its targets.

    The result depends only on the arguments. Room, camera and labels do not depend on ``image_size``. The labels come
    from rays through the centers of the output's own pixels and are not resized.

    Args:
        seed: Seed of the data set.
        scene: Number of the room.
        image_size: Height and width of the image.
        output_size: Height and width of the labels; by default those of the image.

    Example:
        >>> view = render(seed=0, scene=7, image_size=(60, 80), output_size=(30, 40))
        >>> view.image.shape, view.depth.shape
        ((3, 60, 80), (1, 30, 40))
    """
    output_size = image_size if output_size is None else output_size
    scenery, pose, grain = (np.random.default_rng([seed, scene, part]) for part in range(3))
    room = draw_scene(scenery)
    while (found := draw_camera(pose, room)) is None:  # too full to stand in
        room = draw_scene(scenery)
    camera, shares = found
    faces = faces_of(room, camera)
    seen = cast(faces, *output_size)
    hits = seen if image_size == output_size else cast(faces, *image_size)
    return View(
        image=shade(room, camera, faces, hits, grain),
        segmentation=faces.label[seen.face].astype(np.uint8),
        depth=seen.depth[None].astype(np.float32),
        normals=hit_normals(faces, seen).astype(np.float32),
        keypoints=(shares * [output_size[1], output_size[0], 1.0]).astype(np.float32),
    )
