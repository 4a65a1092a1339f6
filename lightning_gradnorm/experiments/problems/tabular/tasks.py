"""One regression task per target of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradnorm.experiments.problems.tabular.metrics import RMSE, CoefficientOfDetermination, RelativeRMSE
from lightning_gradnorm.multitask import Task


class MaskedMSELoss(nn.Module):
    """The mean squared error over the targets that are not NaN. Without such targets, it is 0 with gradient 0.

    Shape: Any, the same for prediction and target; returns a scalar.

    Example:
        >>> MaskedMSELoss()(torch.tensor([1.0, 5.0]), torch.tensor([3.0, float("nan")]))
        tensor(4.)
    """

    @override
    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.shape != target.shape:
            raise ValueError(
                f"MaskedMSELoss: prediction and target should have the same shape; got {tuple(prediction.shape)} and "
                f"{tuple(target.shape)}. Squeeze or unsqueeze one of them."
            )
        missing = target.isnan()
        # Fill the target instead of masking the product: 0 times NaN is NaN, also in the gradient.
        squares = (prediction - target.nan_to_num()).masked_fill(missing, 0.0) ** 2
        return squares.sum() / (~missing).sum().clamp(min=1)


def tabular_tasks(
    in_features: int, scales: Mapping[str, Sequence[float]], hidden: Sequence[int] = ()
) -> dict[str, Task]:
    """Return one regression task per target, with squared loss and the metrics ``rmse``, ``relative_rmse`` and ``r2``.

    A head's initial prediction is the mean of the training rows. The first losses are then variances, so GradNorm's
    training rates measure real learning. ``rmse`` is in the target's original units.

    Args:
        in_features: Length of the representation.
        scales: For each task, the mean of the targets over the training rows and their unit: `TabularDataModule.scales`.
        hidden: Units of a head's hidden layers; empty for a linear head.

    Example:
        >>> tasks = tabular_tasks(100, {"heating": (22.5, 1.0), "cooling": (0.0, 9.5)})
        >>> tasks["heating"].head.bias.item(), list(tasks["cooling"].metrics)
        (22.5, ['rmse', 'relative_rmse', 'r2'])
    """
    return {
        name: Task(
            _head(in_features, hidden, mean),
            MaskedMSELoss(),
            {
                "rmse": RMSE(mean, unit),
                "relative_rmse": RelativeRMSE(mean, unit),
                "r2": CoefficientOfDetermination(mean, unit),
            },
        )
        for name, (mean, unit) in scales.items()
    }


def _head(in_features: int, hidden: Sequence[int], mean: float) -> nn.Module:
    layers: list[nn.Module] = []
    for width_in, width_out in zip([in_features, *hidden], hidden, strict=False):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    last = nn.Linear([in_features, *hidden][-1], 1)
    torch.nn.init.constant_(last.bias, mean)
    return nn.Sequential(*layers, last) if hidden else last
