"""Random images with dense targets full of holes, and their pixels one by one in plain Python for brute force."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

SIZE = (5, 6)
CLASSES, KEYPOINTS = 13, 48
Targets = dict[str, Tensor]
Vector = list[float]


def unit(*components: float) -> Tensor:
    """One pixel's normal of length 1, (1, 3, 1, 1)."""
    vector = torch.tensor(components, dtype=torch.float64)
    return (vector / vector.norm()).float().reshape(1, 3, 1, 1)


def targets(batch: int = 3, seed: int = 0, size: tuple[int, int] = SIZE) -> Targets:
    """About a third of everything is not known. Keypoints are points (batch, 48, 3)."""
    random = torch.Generator().manual_seed(seed)
    height, width = size

    def holes(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random) < 1 / 3

    labels = torch.randint(0, CLASSES, (batch, height, width), generator=random)
    depth = 0.5 + 9 * torch.rand(batch, 1, height, width, generator=random)
    normals = torch.nn.functional.normalize(torch.randn(batch, 3, height, width, generator=random), dim=1)
    place = torch.rand(batch, KEYPOINTS, 2, generator=random) * torch.tensor([width, height])
    visible = ~holes(batch, KEYPOINTS, 1)
    return {
        "segmentation": labels.masked_fill(holes(batch, height, width), -1),
        "depth": depth.masked_fill(holes(batch, 1, height, width), 0.0),
        "normals": normals.masked_fill(holes(batch, 1, height, width), 0.0),
        "keypoints": torch.cat([place * visible, visible.float()], dim=-1),
    }


def predictions(batch: int = 3, seed: int = 1, size: tuple[int, int] = SIZE) -> Targets:
    """What an untrained network might say."""
    random = torch.Generator().manual_seed(seed)
    channels = {"segmentation": CLASSES, "depth": 1, "normals": 3, "keypoints": KEYPOINTS}
    return {task: torch.randn(batch, count, *size, generator=random) for task, count in channels.items()}


def pixels(prediction: Tensor, target: Tensor) -> Iterator[tuple[Vector, Vector]]:
    """The channels of prediction and target, pixel by pixel; all pixels, known or not."""
    target = target if target.ndim == 4 else target.unsqueeze(1)
    for image in range(len(target)):
        for row in range(target.shape[2]):
            for column in range(target.shape[3]):
                yield prediction[image, :, row, column].tolist(), target[image, :, row, column].tolist()


def depths(prediction: Tensor, target: Tensor) -> list[tuple[float, float]]:
    """(predicted, true) of the pixels of known depth."""
    return [(found, true) for (found,), (true,) in pixels(prediction, target) if true != 0]


def cosines(prediction: Tensor, target: Tensor) -> list[float]:
    """Of the pixels with a normal."""
    return [
        float(np.dot(found, true) / np.linalg.norm(found) / np.linalg.norm(true))
        for found, true in pixels(prediction, target)
        if any(true)
    ]


def angles(prediction: Tensor, target: Tensor) -> list[float]:
    """In degrees, of the pixels with a normal."""
    return [math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) for cosine in cosines(prediction, target)]


def keypoint_distances(prediction: Tensor, points: Tensor) -> list[float]:
    """In pixels, of the keypoints that can be seen."""
    found = []
    for image, of_image in enumerate(points.tolist()):
        for kind, (x, y, visible) in enumerate(of_image):
            if visible:
                row, column = np.unravel_index(prediction[image, kind].numpy().argmax(), prediction.shape[2:])
                found.append(math.hypot(column + 0.5 - x, row + 0.5 - y))
    return found
