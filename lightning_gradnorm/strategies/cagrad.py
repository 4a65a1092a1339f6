"""CAGrad, solved exactly, without an extra package: see `CAGrad`."""

from __future__ import annotations

from torch import Tensor
from torchjd.aggregation import GramianWeightedAggregator, Weighting
from torchjd.linalg import PSDMatrix

from lightning_gradnorm._messages import check
from lightning_gradnorm.strategies.solvers import conflict_averse


class CAGradWeighting(Weighting[PSDMatrix]):
    """The weights of `CAGrad`, from the gradients' Gramian.

    Args:
        c: radius of the ball around the mean gradient, relative to its length; at least 0.
        norm_eps: all weights are 0 if the combination ``g_w`` of the dual is shorter than this, for gradients divided so that
            their squared norms sum to 1: they have (almost) no common direction of descent.

    Example:
        >>> import torch
        >>> CAGradWeighting(c=0.5)(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0590])
    """

    def __init__(self, c: float, norm_eps: float = 1e-4) -> None:
        super().__init__()
        check("CAGrad", c >= 0.0, "c", "at least 0", c)
        check("CAGrad", norm_eps >= 0.0, "norm_eps", "at least 0", norm_eps)
        self.c, self.norm_eps = c, norm_eps

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        """Return the weights, shape (T,).

        Raises:
            ValueError: the solver found none; the Gramian is not positive semidefinite.
        """
        weights = conflict_averse(gramian, self.c, self.norm_eps)
        if weights is None:
            raise ValueError("CAGrad: no weights found; the Gramian should be positive semidefinite")
        return weights.to(gramian)


class CAGrad(GramianWeightedAggregator):
    """The direction near the mean gradient that improves the worst task most.

    Liu, Liu, Jin, Stone, Liu, *Conflict-Averse Gradient Descent for Multi-task Learning*, NeurIPS 2021, arXiv 2110.14048:
    equation 3, by its dual in T weights (Algorithm 1). This is ``torchjd.aggregation.CAGrad``, which needs the extra
    ``solvers``; here an active set method solves the dual to about 1e-12 (`conflict_averse`), without an extra. TorchJD's also
    gives weights of 0, so that the trunk does not train, if the squared norms sum to less than ``norm_eps``, as they often do
    at the representation. This one does not depend on a common factor of the gradients.

    Args:
        c: radius of the ball around the mean gradient, relative to its length; at least 0.
        norm_eps: see `CAGradWeighting`.

    Example:
        >>> import torch
        >>> CAGrad(c=0.5)(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([1.0000, 1.0590])
    """

    gramian_weighting: CAGradWeighting

    def __init__(self, c: float, norm_eps: float = 1e-4) -> None:
        super().__init__(CAGradWeighting(c, norm_eps))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(c={self.gramian_weighting.c}, norm_eps={self.gramian_weighting.norm_eps})"
