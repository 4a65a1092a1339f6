"""Losses of dense tasks, each a mean over the known part of the target.

All take (prediction, target) and return a scalar. Unknown pixels are left out of the sum *and* of the count, so a loss does
not shrink with the number of holes, and no gradient reaches the prediction there. Losses use at least float32, because
the sum over a batch of pixels would overflow in half precision.

A batch without a single known pixel has loss 0 and gradient 0, connected to the prediction so that ``backward()`` works. It
is not NaN like a mean over nothing. Balancing strategies that use losses will see such a step as perfect. If such batches
are frequent, leave the task out of their targets (or set it to ``None``), which `MultiTaskModule` treats as "absent from
this step". If the very first loss is 0, GradNorm cannot use it as ``L_i(0)`` and raises an error.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm._messages import check, did_you_mean, is_number
from lightning_gradnorm.experiments.problems.dense.targets import (
    IGNORED,
    heat_maps,
    is_points,
    valid_depth,
    valid_normals,
    visible_keypoints,
)


class SegmentationLoss(nn.Module):
    """Cross-entropy of each pixel that has a label.

    Args:
        ignore_index: the label of pixels without a class.

    Shape: logits ``(batch, classes, h, w)``, labels ``(batch, h, w)``.

    Example:
        >>> labels = torch.tensor([[[0, -1]]])
        >>> SegmentationLoss()(torch.zeros(1, 13, 1, 2), labels)  # log 13
        tensor(2.5649)
    """

    def __init__(self, ignore_index: int = IGNORED) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean over all pixels with a label."""
        batch, *size = target.shape
        expected = (batch, *prediction.shape[1:2], *size)
        _check_shape(self, prediction, target, expected, "the labels' with the classes as second dimension")
        # reduction="mean" would be NaN without labels, and "sum" is not deterministic on a GPU.
        losses = F.cross_entropy(_single(prediction), target.long(), ignore_index=self.ignore_index, reduction="none")
        return _mean(losses, target != self.ignore_index)


class SquaredDepthLoss(nn.Module):
    """Squared depth error in meters² over pixels of known depth, as in the GradNorm paper.

    Shape: ``(batch, 1, h, w)`` both.

    Example:
        >>> target = torch.tensor([2.0, 0.0]).reshape(1, 1, 1, 2)  # the second is not known
        >>> SquaredDepthLoss()(torch.full((1, 1, 1, 2), 5.0), target)
        tensor(9.)
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean over all pixels of known depth."""
        difference, valid = _depth_difference(self, prediction, target)
        return _mean(difference.square(), valid)


class AbsoluteDepthLoss(nn.Module):
    """Absolute depth error in meters over pixels of known depth, as in MTAN and LibMTL.

    Shape: ``(batch, 1, h, w)`` both.

    Example:
        >>> target = torch.tensor([2.0, 0.0]).reshape(1, 1, 1, 2)
        >>> AbsoluteDepthLoss()(torch.full((1, 1, 1, 2), 5.0), target)
        tensor(3.)
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean over all pixels of known depth."""
        difference, valid = _depth_difference(self, prediction, target)
        return _mean(difference.abs(), valid)


class NormalsLoss(nn.Module):
    """``1 - cos`` of the angle between prediction and normal, over pixels with a normal.

    The prediction's length does not matter down to ``shortest``. Below it, the loss is linear in the prediction. The gradient,
    which grows like 1/length, thus stays bounded, and a prediction of exactly zero still learns.

    Args:
        shortest: length below which predictions are no longer scaled to length 1.

    Shape: ``(batch, 3, h, w)`` both.

    Example:
        >>> wall = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
        >>> NormalsLoss()(5 * wall, wall), NormalsLoss()(-wall, wall)
        (tensor(0.), tensor(2.))
    """

    def __init__(self, shortest: float = 1e-2) -> None:
        super().__init__()
        is_length = is_number(shortest) and 0 < shortest < 1
        check("NormalsLoss", is_length, "shortest", "a number between 0 and 1", shortest)
        self.shortest = shortest

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean over all pixels with a normal."""
        _check_shape(self, prediction, target)
        valid = valid_normals(target)
        prediction, target = _single(prediction), _single(torch.where(valid.unsqueeze(1), target, 0.0))
        # F.cosine_similarity takes five times as long. Clamp before the root, which has no gradient at 0.
        lengths = [v.square().sum(dim=1).clamp(min=self.shortest**2).sqrt() for v in (prediction, target)]
        cosine = (prediction * target).sum(dim=1) / (lengths[0] * lengths[1])
        return _mean(1 - cosine, valid)


class KeypointLoss(nn.Module):
    """Squared error of heat maps, one map per type of keypoint, with a Gaussian of height 1 at the keypoint.

    Args:
        invisible: target for the maps of invisible keypoints: ``"ignore"`` does not train them, as in RoomNet, where most
            types do not exist in a given room; ``"empty"`` trains them to zero, so a map also predicts if its keypoint
            is visible.
        sigma: standard deviation of the Gaussians drawn for targets with points, in pixels of the prediction.

    Shape: prediction ``(batch, K, h, w)``; target heat maps of the same shape, 0 everywhere for invisible keypoints,
    or points ``(batch, K, 3)``, each (x, y, visible) in pixels of the prediction from the upper left edge.

    Example:
        >>> prediction = torch.zeros(1, 2, 4, 4)
        >>> points = torch.tensor([[[1.5, 2.5, 1.0], [0.0, 0.0, 0.0]]])  # the second cannot be seen
        >>> round(KeypointLoss(sigma=0.1)(prediction, points).item(), 4)  # one pixel of sixteen is off by one
        0.0625
        >>> round(KeypointLoss(sigma=0.1, invisible="empty")(prediction, points).item(), 4)  # one of thirty-two
        0.0312
    """

    def __init__(self, invisible: str = "ignore", sigma: float = 1.0) -> None:
        super().__init__()
        if invisible not in (known := ("ignore", "empty")):
            raise ValueError(
                f"KeypointLoss: there is no invisible={invisible!r}; {did_you_mean(str(invisible), known)}"
            )
        check("KeypointLoss", is_number(sigma) and sigma > 0, "sigma", "a positive number of pixels", sigma)
        self.invisible = invisible
        self.sigma = sigma

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean over all pixels of the trained maps."""
        holds_points, size = is_points(target), (prediction.shape[2], prediction.shape[3])
        if holds_points:
            _check_shape(self, prediction, target, (*target.shape[:2], *size), "a map (h, w) for each point")
        else:
            _check_shape(self, prediction, target)
        if self.invisible == "ignore":
            visible = visible_keypoints(target)
            prediction, target = prediction[visible], target[visible]  # most maps belong to invisible keypoints
        if holds_points:
            target = heat_maps(_single(target), size, self.sigma)
        squares = (_single(prediction) - _single(target)).square()
        return squares.sum() / max(squares.numel(), 1)


def _depth_difference(loss: nn.Module, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    _check_shape(loss, prediction, target)
    valid = valid_depth(target)
    # Fill holes first: a NaN before a `where` has a NaN gradient, even if it is not selected.
    return _single(prediction) - _single(torch.where(valid, target, 0.0)), valid


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of the valid values, or 0 without any."""
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


def _single(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _check_shape(
    loss: nn.Module,
    prediction: Tensor,
    target: Tensor,
    expected: tuple[int, ...] | None = None,
    meaning: str = "the same",
) -> None:
    """Refuse shapes that would broadcast: (batch, 1, h, w) with (batch, h, w) compares every image with every other."""
    expected = tuple(target.shape) if expected is None else expected
    if tuple(prediction.shape) != expected:
        raise ValueError(
            f"{type(loss).__name__}: a target of shape {tuple(target.shape)} needs a prediction of {meaning}, {expected}; "
            f"got {tuple(prediction.shape)}. Set the head's size to the output size of the data."
        )
