"""UW-SO, soft optimal uncertainty weighting: Kirchdorfer, Elich, Kutsche, Stuckenschmidt, Schott, Köhler, *Analytical
Uncertainty-Based Loss Weighting in Multi-Task Learning*, GCPR 2024 (arXiv 2408.07985), Equation 4.

With the losses in it treated as constants::

    w_i = exp(1 / (τ L_i)) / Σ_j exp(1 / (τ L_j))

``1 / L_i`` is the weight at which uncertainty weighting (`Uncertainty`) converges for an L1 loss. For a squared error it is
half of that; the choice of τ makes up for it. Other implementations add 1e-8 to the loss; here nothing is added.
"""  # noqa: D205

from __future__ import annotations

import torch
from torch import Tensor
from torchjd.scalarization import Scalarizer

from lightning_gradnorm._messages import check, is_number
from lightning_gradnorm.strategies.loss_weights import LossWeights


class UWSO(LossWeights, Scalarizer):
    """``Σ_i w_i L_i`` with the weights above, which sum to 1.

    The smaller a loss, the larger its weight. A loss that is small compared to ``1 / τ`` gets all of it, and the other tasks
    stop learning; losses of exactly 0 share it. Choose τ so that ``1 / (τ L_i)`` is near 1 for the smallest loss you expect;
    the paper searches for it.

    Args:
        tau: the temperature.

    Example:
        >>> losses = torch.tensor([1.0, 0.5], requires_grad=True)
        >>> UWSO(tau=1.0)(losses).backward()
        >>> losses.grad
        tensor([0.2689, 0.7311])
    """

    weights_sum_to = "1"

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        check("UWSO", is_number(tau) and tau > 0.0, "tau", "positive", tau)
        self.tau = tau

    def next_weights(self, losses: Tensor) -> Tensor:
        """Return the weights, shape (T,)."""
        self.refuse_negative(losses, "weighs by the inverse losses")
        # A softmax of infinities would be NaN; abs, because 1 / -0.0 is -inf.
        exponents = (1 / (self.tau * losses.abs())).clamp(max=torch.finfo(losses.dtype).max)
        return exponents.softmax(dim=0)
