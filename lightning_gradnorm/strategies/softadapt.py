"""SoftAdapt: Heydari, Thompson, Mehmood, *SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with
Multi-Part Loss Functions* (arXiv 1912.12355), section 3.1.

With ``s_i`` the slope of the loss ``L_i`` over its last steps, and ``f_i`` its mean over the same steps::

    original         w_i = exp(β s_i) / Σ_j exp(β s_j)
    loss-weighted    w_i = f_i exp(β s_i) / Σ_j f_j exp(β s_j)
    normalized       as the original, of s_i / Σ_j |s_j| in place of s_i

The slope is a finite difference; of order 1, ``s_i = L_i(t) − L_i(t−1)``. A loss that falls less than the others weighs more.
Where the sources disagree, we do this:

- The authors' code (dr-aheydari/SoftAdapt) applies the coefficients of a *forward* difference to the last losses, which for
  orders above 1 gives the slope at the oldest of them; we take the slope at the newest.
- It divides the slopes of the normalized variant by their sum, which is negative while the losses fall and then gives the most
  weight to the loss that falls fastest. Like its first version, we divide by the sum of their absolute values.
- It adds 1e-8 to denominators; we add nothing.
- Its README has weights of 1 until there are slopes; ours are 1/T, the same sum as later.
- PhysicsNeMo uses the ratio ``L_i(t) / L_i(t−1)`` instead of the slope, and weights that sum to T; that is `ReLoBRaLo` with
  ``alpha=0``. NequIP multiplies by weights that the user chose.
"""  # noqa: D205

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.scalarization import Scalarizer

from lightning_gradnorm._messages import check, is_integer, is_number
from lightning_gradnorm.strategies.loss_weights import LossWeights


class SoftAdapt(LossWeights, Scalarizer, Stateful):
    """``Σ_i w_i L_i`` with the weights above, which sum to 1.

    A slope has the unit of its loss, so ``beta`` of the first two variants must fit the size of the losses.

    Args:
        beta: how much slopes count; if negative, the loss that falls fastest weighs most.
        variant: which of the three.
        order: of the finite difference over the last ``order + 1`` losses; lower while there are fewer losses. High
            orders follow the noise of single steps.
        update_every: N: the weights change every N steps, and the formula compares mean losses of N steps.

    Example:
        >>> softadapt = SoftAdapt(beta=1.0)
        >>> softadapt(torch.tensor([2.0, 1.0])).item()
        1.5
        >>> losses = torch.tensor([1.0, 1.0], requires_grad=True)  # the first has fallen
        >>> softadapt(losses).backward()
        >>> losses.grad
        tensor([0.2689, 0.7311])
    """

    remembers = "weights, last losses"
    weights_sum_to = "1"
    history: Tensor
    known: Tensor
    mean: Tensor
    in_mean: Tensor
    weights: Tensor

    def __init__(
        self,
        beta: float = 0.1,
        variant: Literal["original", "loss-weighted", "normalized"] = "original",
        order: int = 1,
        update_every: int = 1,
    ) -> None:
        super().__init__()
        check("SoftAdapt", is_number(beta) and math.isfinite(beta), "beta", "finite", beta)
        variants = ("original", "loss-weighted", "normalized")
        check("SoftAdapt", variant in variants, "variant", "'original', 'loss-weighted' or 'normalized'", variant)
        check("SoftAdapt", is_integer(order, least=1), "order", "a whole number of at least 1", order)
        check(
            "SoftAdapt", is_integer(update_every, least=1), "update_every", "a whole number of at least 1", update_every
        )
        self.beta, self.variant, self.order, self.update_every = beta, variant, order, update_every
        for name in ("history", "mean", "weights"):  # history: newest first
            self.register_buffer(name, torch.empty(0))
        for name in ("known", "in_mean"):  # the number of losses in history, and of those in the mean
            self.register_buffer(name, torch.tensor(0))

    def next_weights(self, losses: Tensor) -> Tensor:
        """Return the weights, shape (T,)."""
        if self.variant == "loss-weighted":
            self.refuse_negative(losses, "is a factor of its own weight")
        is_first = self.weights.numel() == 0
        weights = self.equal_weights(losses) if is_first else self.recalled("weights", losses)
        history = self.recalled("history", losses.expand(self.order + 1, -1))
        mean, self.in_mean = self.recalled("mean", losses), self.in_mean + 1
        mean = mean + (losses - mean) / self.in_mean
        if int(self.in_mean) == self.update_every:
            history = torch.cat([mean[None], history[:-1]])
            self.known = (self.known + 1).clamp(max=self.order + 1)
            mean, self.in_mean = torch.zeros_like(mean), torch.zeros_like(self.in_mean)
            if int(self.known) > 1:
                weights = self._adapted(history[: int(self.known)])
        self.history, self.mean, self.weights = history, mean, weights
        return weights

    def _adapted(self, history: Tensor) -> Tensor:
        """Return the weights for two or more losses of each task, the newest first."""
        slopes = history.new_tensor(_slope_at_newest(len(history) - 1)) @ history
        if self.variant == "normalized":
            total = slopes.abs().sum()
            slopes = slopes / torch.where(total > 0, total, 1.0)
        exponents = self.beta * slopes
        if self.variant == "loss-weighted":
            exponents = exponents + history.mean(dim=0).log()
        # The logarithm of a zero loss is infinite, and a softmax of infinities alone would be NaN.
        return torch.nan_to_num(exponents, nan=0.0).softmax(dim=0)


def _slope_at_newest(order: int) -> list[float]:
    """Return the coefficients of a backward difference, the newest value's first: ``Σ_k ∇^k / k``.

    Example:
        >>> _slope_at_newest(1), _slope_at_newest(2)
        ([1.0, -1.0], [1.5, -2.0, 0.5])
    """
    return [
        float((-1) ** age * sum(math.comb(k, age) / k for k in range(max(age, 1), order + 1)))
        for age in range(order + 1)
    ]
