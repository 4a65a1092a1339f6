"""The better direction of a metric, by its name."""

from __future__ import annotations

_HIGHER = {
    "accuracy",
    "auroc",
    "delta_m",
    "dice",
    "f1",
    "iou",
    "miou",
    "pixel_accuracy",
    "precision",
    "r2",
    "recall",
    "within_11",
    "within_22",
    "within_30",
}
_LOWER = {
    "absolute_error",
    "cosine_error",
    "error",
    "keypoint_error",
    "loss",
    "mae",
    "mean_angle",
    "median_angle",
    "mse",
    "nasa_score",
    "relative_error",
    "relative_l2",
    "relative_rmse",
    "rmse",
}


def higher_is_better(metric: str) -> bool | None:
    """Return True if higher is better, False if lower is better, and ``None`` if unknown.

    Example:
        >>> higher_is_better("miou"), higher_is_better("rmse"), higher_is_better("hue")
        (True, False, None)
    """
    return True if metric in _HIGHER else False if metric in _LOWER else None
