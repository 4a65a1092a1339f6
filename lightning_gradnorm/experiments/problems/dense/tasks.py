"""The tasks of NYUv2, each with its head, loss and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn
from torchmetrics import Metric

from lightning_gradnorm._messages import check, did_you_mean
from lightning_gradnorm.experiments.problems.dense.losses import (
    KeypointLoss,
    NormalsLoss,
    SegmentationLoss,
    SquaredDepthLoss,
)
from lightning_gradnorm.experiments.problems.dense.metrics import (
    CosineError,
    DepthAbsoluteError,
    DepthRelativeError,
    DepthRMSError,
    KeypointError,
    MeanAngle,
    MeanIoU,
    MedianAngle,
    PixelAccuracy,
    SegmentationError,
    WithinAngle,
)
from lightning_gradnorm.multitask.task import Loss, Task

Head = Callable[[int, int], nn.Module]

OUT_CHANNELS = {"segmentation": 13, "depth": 1, "normals": 3, "keypoints": 48}
"""Task → channels of its prediction: classes, meters, (x, y, z), keypoint types."""

_LOSSES: dict[str, Callable[[], Loss]] = {
    "segmentation": SegmentationLoss,
    "depth": SquaredDepthLoss,
    "normals": NormalsLoss,
    "keypoints": KeypointLoss,
}


def nyuv2_tasks(
    names: Sequence[str],
    in_channels: int,
    losses: Mapping[str, Loss] | None = None,
    head: Head = partial(nn.Conv2d, kernel_size=1),
) -> dict[str, Task]:
    """Return tasks of NYUv2 by name.

    The defaults are the GradNorm paper's: everything is shared except one last layer per task, and the losses are
    pixel-wise cross-entropy, squared depth loss, cosine loss of normals and squared loss of keypoint heat maps. With
    ``losses={"depth": AbsoluteDepthLoss()}``, they match MTAN and LibMTL.

    Args:
        names: the tasks to use: segmentation, depth, normals and keypoints.
        in_channels: channels of the representation.
        losses: losses by task that replace the defaults.
        head: creates a task's head from the channels of the representation and of the prediction.

    Raises:
        ValueError: there are no names, a name is not a task of NYUv2, or a loss belongs to a task without a name.

    Example:
        >>> {name: sorted(task.metrics) for name, task in nyuv2_tasks(["segmentation", "depth"], in_channels=64).items()}
        {'segmentation': ['error', 'miou', 'pixel_accuracy'], 'depth': ['absolute_error', 'relative_error', 'rmse']}
    """
    losses = losses or {}
    makes_heads = callable(head) and not isinstance(head, nn.Module)
    expected = (
        "a function that creates a head from (in_channels, out_channels), such as partial(nn.Conv2d, kernel_size=1)"
    )
    check("nyuv2_tasks", makes_heads, "head", expected, head)
    if isinstance(names, str) or not names:
        raise ValueError(f"nyuv2_tasks: names should be a list of one or more of {list(OUT_CHANNELS)}; got {names!r}.")
    for name in names:
        if name not in OUT_CHANNELS:
            raise ValueError(f"nyuv2_tasks: NYUv2 has no task '{name}'; {did_you_mean(name, OUT_CHANNELS)}")
    for name in losses:
        if name not in names:
            raise ValueError(
                f"nyuv2_tasks: losses has a task '{name}' that is not in names; {did_you_mean(name, names)}"
            )
    return {
        name: Task(
            head(in_channels, OUT_CHANNELS[name]),
            losses[name] if name in losses else _LOSSES[name](),
            nyuv2_metrics(name),
        )
        for name in names
    }


def nyuv2_metrics(task: str) -> dict[str, Metric]:
    """Return the metrics of an NYUv2 task: those in the GradNorm paper and those in MTAN and LibMTL.

    The paper's are ``error`` (segmentation), ``rmse``, ``cosine_error`` and ``keypoint_error``.

    Args:
        task: one of segmentation, depth, normals and keypoints.
    """
    classes = OUT_CHANNELS["segmentation"]
    by_task: dict[str, Callable[[], dict[str, Metric]]] = {
        "segmentation": lambda: {
            "miou": MeanIoU(classes),
            "error": SegmentationError(classes),
            "pixel_accuracy": PixelAccuracy(classes),
        },
        "depth": lambda: {
            "rmse": DepthRMSError(),
            "absolute_error": DepthAbsoluteError(),
            "relative_error": DepthRelativeError(),
        },
        "normals": lambda: {
            "cosine_error": CosineError(),
            "mean_angle": MeanAngle(),
            "median_angle": MedianAngle(),
            "within_11": WithinAngle(11.25),
            "within_22": WithinAngle(22.5),
            "within_30": WithinAngle(30),
        },
        "keypoints": lambda: {"keypoint_error": KeypointError()},
    }
    return by_task[task]()
