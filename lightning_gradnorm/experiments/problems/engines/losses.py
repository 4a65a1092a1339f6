"""Loss for the remaining life that weights samples near the failure more: AMNL's second edition (see `strategies.amnl`)."""

from __future__ import annotations

from torch import Tensor, nn


class FailureBiasedMSE(nn.Module):
    """The mean squared error of a remaining life, with more weight near the failure: second edition, section 14.

    ``mean_b w(y_b) (ŷ_b − y_b)²`` with ``w(y) = 1 + (largest − 1) clip(1 − y / cap, 0, 1)``, a plain mean over the batch.

    Args:
        cap: the life from which on the weight is 1.
        largest: the weight at the failure, ``y = 0``.

    Example:
        >>> import torch
        >>> life = torch.tensor([0.0, 62.5, 125.0, 200.0])
        >>> [FailureBiasedMSE()(y + 1, y).item() for y in life]
        [2.0, 1.5, 1.0, 1.0]
    """

    def __init__(self, cap: float = 125.0, largest: float = 2.0) -> None:
        super().__init__()
        if not cap > 0:
            raise ValueError(f"FailureBiasedMSE: cap should be positive; got {cap}.")
        if not largest > 0:
            raise ValueError(f"FailureBiasedMSE: largest should be positive; got {largest}.")
        self.cap, self.largest = cap, largest

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean over all entries of ``target``."""
        if prediction.shape != target.shape:
            raise ValueError(
                f"FailureBiasedMSE: prediction and target should have the same shape; got {tuple(prediction.shape)} and "
                f"{tuple(target.shape)}. Squeeze or unsqueeze one of them."
            )
        weights = 1 + (self.largest - 1) * (1 - target / self.cap).clamp(0, 1)
        return (weights * (prediction - target) ** 2).mean()

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"cap={self.cap}, largest={self.largest}"
