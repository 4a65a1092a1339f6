"""ReLoBRaLo, relative loss balancing with random lookback: Bischof, Kraus, *Multi-Objective Loss Balancing for
Physics-Informed Deep Learning* (arXiv 2110.09813; CMAME 439, 2025).

For T losses, from step t = 0 on::

    bal_i(t, s) = T · exp(L_i(t) / (τ L_i(s))) / Σ_j exp(L_j(t) / (τ L_j(s)))
    hist_i(t)   = ρ w_i(t−1) + (1 − ρ) bal_i(t, 0)           ρ is 0 or 1, drawn in each step; its mean is `rho`
    w_i(t)      = α hist_i(t) + (1 − α) bal_i(t, t−1)        w_i(0) = 1

A loss that has fallen less than the others weighs more. All losses are treated alike, that of the equation like those of its
boundary conditions. Where the sources disagree, we follow the equations:

- the authors' code (rbischof/relative_balancing) takes ``w(1) = bal(1, 0)`` whole, uses the losses of its second step as
  ``L(0)``, does not look back by default (``rho=1``), and adds 1e-12 to denominators;
- PhysicsNeMo and PaddleScience use ``alpha=0.95`` and ``rho=0.99``, and add 1e-8.

One case the equations leave open: a loss that was 0 has no ratio. We count it as unchanged, with a ratio of 1.
"""  # noqa: D205

from __future__ import annotations

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.scalarization import Scalarizer

from lightning_gradnorm._messages import check, is_number
from lightning_gradnorm.strategies.loss_weights import LossWeights


class ReLoBRaLo(LossWeights, Scalarizer, Stateful):
    """``Σ_i w_i L_i`` with the weights above, which sum to T.

    It draws random numbers from torch's CPU generator; within `Scalarization` it has its own, the same on all ranks.

    Args:
        alpha: how much of the weights is kept from step to step.
        tau: the temperature: the smaller it is, the more the loss that fell least stands out.
        rho: the probability of using the earlier weights instead of those since the first step.

    Example:
        >>> relobralo = ReLoBRaLo(alpha=0.0, tau=1.0)
        >>> relobralo(torch.tensor([4.0, 1.0])).item()
        5.0
        >>> losses = torch.tensor([2.0, 1.0], requires_grad=True)  # the first has halved
        >>> relobralo(losses).backward()
        >>> losses.grad
        tensor([0.7551, 1.2449])
    """

    remembers = "weights, first and last losses, random draws"
    first: Tensor
    last: Tensor
    weights: Tensor

    def __init__(self, alpha: float = 0.999, tau: float = 1.0, rho: float = 0.999) -> None:
        super().__init__()
        check("ReLoBRaLo", is_number(alpha) and 0.0 <= alpha <= 1.0, "alpha", "from 0 to 1", alpha)
        check("ReLoBRaLo", is_number(tau) and tau > 0.0, "tau", "positive", tau)
        check("ReLoBRaLo", is_number(rho) and 0.0 <= rho <= 1.0, "rho", "from 0 to 1", rho)
        self.alpha, self.tau, self.rho = alpha, tau, rho
        for name in ("first", "last", "weights"):
            self.register_buffer(name, torch.empty(0))

    def next_weights(self, losses: Tensor) -> Tensor:
        """Return the weights, shape (T,)."""
        self.refuse_negative(losses, "compares the losses of two steps by their ratio")
        is_first = self.last.numel() == 0
        first, last, weights = (self.recalled(name, losses) for name in ("first", "last", "weights"))
        if is_first:
            first, weights = losses, self.equal_weights(losses)
        else:
            looks_back = bool(torch.rand(()) >= self.rho)
            history = self._balanced(losses, first) if looks_back else weights
            weights = self.alpha * history + (1 - self.alpha) * self._balanced(losses, last)
        self.first, self.last, self.weights = first, losses, weights
        return weights

    def _balanced(self, losses: Tensor, earlier: Tensor) -> Tensor:
        was_positive = earlier > 0
        ratios = torch.where(was_positive, losses / torch.where(was_positive, earlier, 1.0), 1.0)
        # A softmax of infinities would be NaN.
        exponents = (ratios / self.tau).clamp(max=torch.finfo(losses.dtype).max)
        return len(losses) * exponents.softmax(dim=0)
