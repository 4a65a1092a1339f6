"""GABA, from a book on predictive maintenance (book-ai.org), second edition, sections 17.1 and 18.2 to 18.4.

With ``g_i = ||∇L_i||₂`` over the shared parameters, K tasks and ``S = Σ_i g_i``::

    λ_i = (S − g_i) / ((K − 1) S)                   its Equation 4; for two tasks λ_1 = g_2 / (g_1 + g_2)
    λ̄_i ← beta · λ̄_i + (1 − beta) · λ_i             its Equation 5; begins at 1/K
    w_i = max(λ̄_i, floor) / Σ_j max(λ̄_j, floor)     its Equation 6

The first ``warmup`` calls return ``w_i = 1/K``, and their norms are not averaged (18.4). Section 13.4 writes ``λ_i ∝ 1/g_i``
instead, which is the same only for two tasks. The book leaves two cases open: we take ``λ_i = 1/K`` if all norms are zero, and
do not average norms that are not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.aggregation import Weighting
from torchjd.linalg import PSDMatrix

from lightning_gradnorm._messages import check, is_integer, is_number
from lightning_gradnorm.strategies.snapshot import LazyBufferModule


class GABA(LazyBufferModule, Weighting[PSDMatrix], Stateful):
    """The weights ``w_i`` for the Gramian of the tasks' gradients, whose diagonal is ``g_i²``.

    Args:
        beta: decay of the moving average.
        floor: lower bound of the weights before they are scaled to sum 1 again; at most 1/K.
        warmup: number of first calls with equal weights.

    Example:
        The smaller gradient gets the larger weight:

        >>> GABA(beta=0.0, warmup=0)(torch.diag(torch.tensor([1.0, 3.0]) ** 2))
        tensor([0.7500, 0.2500])
    """

    remembers = "mean shares"
    weights_sum_to = "1"
    average: Tensor
    calls: Tensor

    def __init__(self, beta: float = 0.99, floor: float = 0.05, warmup: int = 100) -> None:
        super().__init__()
        check("GABA", is_number(beta) and 0.0 <= beta < 1.0, "beta", "at least 0 and less than 1", beta)
        check("GABA", is_number(floor) and floor >= 0.0, "floor", "at least 0", floor)
        check("GABA", is_integer(warmup, least=0), "warmup", "a whole number of at least 0", warmup)
        self.beta, self.floor, self.warmup = beta, floor, warmup
        self.register_buffer("average", torch.empty(0))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        """Return the weights, shape (K,)."""
        K = gramian.shape[0]
        if self.average.numel() == 0:
            if self.floor * K > 1:
                raise ValueError(
                    f"GABA: {K} weights of sum 1 cannot all be {self.floor} or more. Use floor={1 / K:.3g} or less."
                )
            self.average = gramian.new_full((K,), 1 / K, dtype=torch.promote_types(gramian.dtype, torch.float32))
        if len(self.average) != K:
            raise ValueError(
                f"GABA: the moving average is of {len(self.average)} tasks, the Gramian of {K}. "
                f"Call reset() before the number of tasks changes."
            )
        self.average = self.average.to(gramian.device)
        self.calls = self.calls + 1
        if int(self.calls) <= self.warmup or K == 1:
            return torch.full_like(gramian[0], 1 / K)
        norms = gramian.detach().diagonal().to(self.average).clamp(min=0).sqrt()
        if bool(norms.isfinite().all()):
            total = norms.sum()
            shares = (total - norms) / ((K - 1) * total) if bool(total > 0) else torch.full_like(norms, 1 / K)
            self.average = self.beta * self.average + (1 - self.beta) * shares
        weights = self.average.clamp(min=self.floor)
        return (weights / weights.sum()).to(gramian)

    def reset(self) -> None:
        """Forget the moving average, and start with the warm-up again."""
        self.average, self.calls = self.average.new_empty(0), torch.zeros_like(self.calls)
