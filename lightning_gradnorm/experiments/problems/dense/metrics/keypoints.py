"""Error of keypoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_gradnorm.experiments.problems.dense.targets import keypoints_of, peaks


class KeypointError(Metric):
    """Mean distance from the largest pixel of the predicted map to the true keypoint, in percent of the image's diagonal.

    The mean is over all visible keypoints in the whole set, NaN if there are none. Source: RoomNet (Lee et al.,
    ICCV 2017), also used in the GradNorm paper.

    Shape: prediction ``(batch, K, h, w)``; target heat maps of the same shape or points ``(batch, K, 3)``, each
    (x, y, visible) in pixels of the prediction from the upper left edge. Heat maps give the truth only to the pixel.

    Example:
        >>> maps = torch.zeros(1, 1, 6, 8)
        >>> maps[0, 0, 0, 0] = 1.0
        >>> KeypointError()(maps, torch.tensor([[[3.5, 4.5, 1.0]]]))  # 5 pixels off, of a diagonal of 10
        tensor(50.)
    """

    full_state_update = False
    higher_is_better = False
    sum_of_all: Tensor
    keypoints: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sum_of_all", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("keypoints", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, prediction: Tensor, target: Tensor) -> None:
        positions, visible = keypoints_of(target)
        if prediction.shape[:2] != visible.shape or (target.ndim == 4 and prediction.shape != target.shape):
            raise ValueError(
                f"KeypointError: the prediction should have one map per keypoint of the target, of shape "
                f"{tuple(target.shape)}; got {tuple(prediction.shape)}."
            )
        height, width = prediction.shape[2:]
        distances = (peaks(prediction) - positions.float())[visible].norm(dim=-1)
        self.sum_of_all += 100 * distances.sum() / (height**2 + width**2) ** 0.5
        self.keypoints += distances.numel()

    @override
    def compute(self) -> Tensor:
        return self.sum_of_all / self.keypoints
