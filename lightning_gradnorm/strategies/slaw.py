"""SLAW, scaled loss approximate weighting: Crawshaw, Košecká, *SLAW: Scaled Loss Approximate Weighting for Efficient Multi-Task
Learning* (arXiv 2109.08218).

The standard deviation of a loss over the steps stands for the norm of its gradient::

    a_i ← β a_i + (1 − β) L_i²        b_i ← β b_i + (1 − β) L_i
    s_i = √(a_i − b_i²)               w_i = (T / s_i) / Σ_j (1 / s_j)

Rounding may make ``a_i − b_i²`` negative. So we update the variance itself, which is the same number::

    d = L_i − b_i        s_i² ← β s_i² + β (1 − β) d²        b_i ← b_i + (1 − β) d

Implementations start in different ways. We follow the authors' code (mtcrawshaw/meta): it takes plain means over the
first ``1 / (1 − β)`` steps, has weights of 1 in the first step, and no ``s_i`` below 1e-5; if one is NaN, it keeps the last
weights. Others start with averages of 0, so that at first ``s_i`` is proportional to ``|L_i|``.
"""  # noqa: D205

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.scalarization import Scalarizer

from lightning_gradnorm._messages import check, is_number
from lightning_gradnorm.strategies.loss_weights import LossWeights


class SLAW(LossWeights, Scalarizer, Stateful):
    """``Σ_i w_i L_i`` with the weights above, which sum to T.

    A loss that hardly changes gets a large weight, whatever the reason. This includes a loss that has vanished, and a task that
    is absent for a long time, since its last loss counts in every step.

    Args:
        beta: decay of the moving averages.
        epsilon: lower bound of ``s_i``, in the unit of the losses.

    Example:
        >>> slaw = SLAW()
        >>> slaw(torch.tensor([4.0, 1.0])).item()
        5.0
        >>> losses = torch.tensor([1.0, 2.0], requires_grad=True)  # deviations of 1.5 and 0.5
        >>> slaw(losses).backward()
        >>> losses.grad
        tensor([0.5000, 1.5000])
    """

    remembers = "mean losses and their deviations"
    mean: Tensor
    deviation: Tensor
    steps: Tensor

    def __init__(self, beta: float = 0.99, epsilon: float = 1e-5) -> None:
        super().__init__()
        check("SLAW", is_number(beta) and 0.0 <= beta < 1.0, "beta", "at least 0 and less than 1", beta)
        check("SLAW", is_number(epsilon) and epsilon > 0.0, "epsilon", "positive", epsilon)
        self.beta, self.epsilon = beta, epsilon
        for name in ("mean", "deviation"):
            self.register_buffer(name, torch.empty(0))
        self.register_buffer("steps", torch.tensor(0))

    def next_weights(self, losses: Tensor) -> Tensor:
        """Return the weights, shape (T,)."""
        mean, deviation = self.recalled("mean", losses), self.recalled("deviation", losses)
        self.steps = self.steps + 1
        share = max(1 / int(self.steps), 1 - self.beta)
        difference = losses - mean
        self.mean = mean + share * difference
        # The square of a large loss would be infinite; hypot avoids squares.
        self.deviation = torch.hypot(math.sqrt(1 - share) * deviation, math.sqrt(share * (1 - share)) * difference)
        scales = self.deviation.clamp(min=self.epsilon)
        inverse = scales.min() / scales
        return len(losses) * inverse / inverse.sum()
