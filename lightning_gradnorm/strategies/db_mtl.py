"""DB-MTL: Lin, Jiang, Ye, Zhang, Chen, Chen, Liu, Kwok, *Dual-Balancing for Multi-Task Learning* (arXiv 2308.12029), section 3
and Algorithm 1.

A logarithm balances the losses, ``Σ_i log(L_i + ε)``, so that each counts by its relative change. The gradients ``g_i`` of
those logarithms are averaged over the steps and scaled to the norm of the largest::

    ḡ_i(t) = β_t ḡ_i(t−1) + (1 − β_t) g_i(t)       ḡ_i(0) = 0       β_t = beta / t^sigma
    d = Σ_i a_i ḡ_i                                a_i = max_j ||ḡ_j|| / ||ḡ_i||

The paper divides by the norm without safeguards; here a gradient of zero has ``a_i = 0`` (LibMTL adds 1e-8 to the norm).
"""  # noqa: D205

from __future__ import annotations

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.aggregation import Aggregator, Weighting
from torchjd.linalg import Matrix, PSDMatrix
from torchjd.scalarization import Scalarizer

from lightning_gradnorm._messages import check, is_number
from lightning_gradnorm.strategies.snapshot import LazyBufferModule


class LogSum(Scalarizer):
    """``Σ_i log(L_i + epsilon)``: the loss part of DB-MTL. The weight of a task is ``1 / (L_i + epsilon)``.

    Args:
        epsilon: keeps the logarithm finite; 1e-8 in the paper's code.

    Example:
        >>> losses = torch.tensor([2000.0, 2.0], requires_grad=True)
        >>> LogSum()(losses).backward()
        >>> losses.grad
        tensor([0.0005, 0.5000])
    """

    def __init__(self, epsilon: float = 1e-8) -> None:
        super().__init__()
        check("LogSum", is_number(epsilon) and epsilon >= 0.0, "epsilon", "at least 0", epsilon)
        self.epsilon = epsilon

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the sum of the logarithms.

        Raises:
            ValueError: a loss is so negative that it has no logarithm.
        """
        if bool((values + self.epsilon <= 0).any()):
            raise ValueError(
                f"LogSum: the losses should be positive, since it takes their logarithm; got {values.tolist()}."
            )
        return torch.log(values + self.epsilon).sum()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(epsilon={self.epsilon})"


class DBMTLWeighting(Weighting[PSDMatrix]):
    """``a_i = max_j ||g_j|| / ||g_i||`` of the gradients' Gramian: DB-MTL's gradient part with ``beta=0``.

    Example:
        >>> DBMTLWeighting()(torch.diag(torch.tensor([1.0, 3.0, 0.0]) ** 2))
        tensor([3., 1., 0.])
    """

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        """Return ``a_i``, shape (T,)."""
        norms = gramian.diagonal().clamp(min=0).sqrt()
        return torch.where(norms == 0, 0.0, norms.max() / torch.where(norms == 0, 1.0, norms))


class DBMTL(LazyBufferModule, Aggregator, Stateful):
    """The gradient part of DB-MTL. Pass it the gradients of `LogSum`'s terms.

    It averages the same n numbers in every step, such as the gradients of the shared parameters. The gradients at a
    representation belong to other samples in every step: use ``beta=0`` there, which has no memory.
    A matrix that is not finite is not averaged; its result is not finite either.

    Args:
        beta: decay of the moving average; 0.9 in the paper.
        sigma: how fast averaging fades, ``β_t = beta / t^sigma``; 0 or 0.5 in the paper's experiments.

    Example:
        >>> DBMTL(beta=0.0)(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([3., 3.])
    """

    average: Tensor
    updates: Tensor

    @property
    def averages_over_steps(self) -> bool:
        """True if there is a moving average."""
        return self.beta > 0

    @property
    def remembers(self) -> str:
        """What its state holds."""
        return "mean gradients" if self.beta > 0 else ""

    def __init__(self, beta: float = 0.9, sigma: float = 0.0) -> None:
        super().__init__()
        check("DBMTL", is_number(beta) and 0.0 <= beta < 1.0, "beta", "at least 0 and less than 1", beta)
        check("DBMTL", is_number(sigma) and sigma >= 0.0, "sigma", "at least 0", sigma)
        self.beta, self.sigma = beta, sigma
        self.weighting = DBMTLWeighting()
        self.register_buffer("average", torch.empty(0))
        self.register_buffer("updates", torch.tensor(0))

    def forward(self, matrix: Matrix, /) -> Tensor:
        """Return ``d``, shape (n,), for T gradients of n numbers."""
        averaged = self._averaged(matrix) if self.beta > 0 else matrix
        return self.weighting(averaged @ averaged.T) @ averaged

    def _averaged(self, matrix: Tensor) -> Tensor:
        if int(self.updates) == 0:
            self.average = torch.zeros_like(matrix)
        if self.average.shape != matrix.shape:
            raise ValueError(
                f"DBMTL: the moving average is of gradients of shape {tuple(self.average.shape)}; got "
                f"{tuple(matrix.shape)}. Average what keeps its size: the gradients of the parameters "
                f"(at='parameters'), or nothing (beta=0). For other tasks or parameters call reset()."
            )
        if not bool(matrix.isfinite().all()):
            return matrix
        self.updates = self.updates + 1
        beta = self.beta / int(self.updates) ** self.sigma
        self.average = beta * self.average.to(matrix) + (1 - beta) * matrix.detach()
        return self.average

    def reset(self) -> None:
        """Forget the moving average."""
        self.average, self.updates = self.average.new_empty(0), torch.zeros_like(self.updates)
