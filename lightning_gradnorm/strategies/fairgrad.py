"""FairGrad, solved to machine precision, without an extra package: see `FairGrad`."""

from __future__ import annotations

from torch import Tensor
from torchjd.aggregation import GramianWeightedAggregator, Weighting
from torchjd.linalg import PSDMatrix

from lightning_gradnorm._messages import check
from lightning_gradnorm.strategies.solvers import fair_shares


class FairGradWeighting(Weighting[PSDMatrix]):
    """The weights of `FairGrad`, from the gradients' Gramian G: ``G w = w^(−1/alpha)``, ``w > 0``.

    Args:
        alpha: at least 0; with 0 the weights are ``1/T``.

    Example:
        >>> import torch
        >>> FairGradWeighting(alpha=1.0)(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0000])
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        check("FairGrad", alpha >= 0.0, "alpha", "at least 0", alpha)
        self.alpha = alpha

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        """Return ``w``, shape (T,).

        Raises:
            ValueError: no finite weights exist.
        """
        if self.alpha == 0:
            return gramian.new_full((len(gramian),), 1 / len(gramian))
        weights = fair_shares(gramian, self.alpha)
        if weights is None:
            raise ValueError("FairGrad: the gradients have no finite weights: one is zero, or they cancel each other")
        return weights.to(gramian)


class FairGrad(GramianWeightedAggregator):
    """The direction with alpha-fair shares of the improvement.

    Ban, Ji, *Fair Resource Allocation in Multi-Task Learning*, ICML 2024, arXiv 2402.15638: equation 4 and Algorithm 1.
    ``torchjd.aggregation.FairGrad`` solves it by least squares and needs the extra ``solvers``; this one takes Newton steps to
    about 1e-12 (`fair_shares`) and needs no extra.

    Args:
        alpha: kind of fairness, at least 0: 0 is the mean, 1 Nash-MTL's proportional fairness, and large values favor the
            worst task.

    Example:
        >>> import torch
        >>> FairGrad(alpha=1.0)(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([1., 1.])
    """

    gramian_weighting: FairGradWeighting

    def __init__(self, alpha: float) -> None:
        super().__init__(FairGradWeighting(alpha))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(alpha={self.gramian_weighting.alpha})"
