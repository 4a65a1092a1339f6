"""Weights inversely proportional to the gradient norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_gradnorm._messages import is_number
from lightning_gradnorm.strategies.norm_weighting import Memory, NormFormula
from lightning_gradnorm.strategies.smoothing import moving_average


class InverseNorm(NormFormula):
    """Give every task's gradient the same norm, or norms in the ratio of the priorities.

    With ``n_i = ||∇_W L_i||`` and their bias-corrected exponential moving averages ``n̄_i``::

        w_i = p_i · ref / n̄_i

    GradNorm with ``alpha=0`` converges to this; here it takes one step and no optimizer. Variants by others:

    - ``grad_norm`` of jaxpi (Wang, Sankaran, Wang, Perdikaris, *An Expert's Guide to Training PINNs*, arXiv 2308.08468):
      ``InverseNorm(ema=0.9, normalize=False, update_every=1000)`` with ``shared_layer="all"``. It averages the weights, not the
      norms, and adds ``1e-5 · mean`` to each norm.
    - The balancer of EnCodec (Défossez et al., arXiv 2210.13438, section 3.4): ``InverseNorm(ema=0.999, reference=R / T,
      priorities=λ, normalize=False)`` with ``norm_of="activation"`` and the decoder as ``representation``. Its averages
      include the current batch, where ours end with the batch before, and may average norms over samples; R is 1.

    Args:
        ema: β, the share of the past in the averages; 0 for no averaging.
        reference: ``ref``: the ``"mean"`` or the ``"total"`` of the averages, or a positive number. Has no effect with
            ``normalize``.
        normalize: scale the weights to sum T, so that the learning rate keeps its meaning.
        priorities: ``p_i`` by task, positive; scaled to mean 1.
        update_every: the network's optimizer steps from one weight update to the next.

    A task whose loss and gradient vanish gets nearly all of the weight: this formula has no training rate that would prevent
    it. `GradNorm` with ``alpha`` of 1 or more has one.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_gradnorm.strategies import NormWeightingRule
        >>> rule = NormWeightingRule(["fit", "kl"], InverseNorm(ema=0.0, reference=1.0, normalize=False))
        >>> _ = rule.step(norms=torch.tensor([2.0, 4.0]), losses=torch.ones(2))
        >>> rule.weights
        tensor([0.5000, 0.2500])
    """

    def __init__(
        self,
        ema: float = 0.9,
        reference: Literal["mean", "total"] | float = "mean",
        normalize: bool = True,
        priorities: Mapping[str, float] | None = None,
        update_every: int = 1,
    ) -> None:
        super().__init__(update_every=update_every, priorities=priorities)
        self._check_share("ema", ema)
        is_reference = reference in ("mean", "total") or (is_number(reference) and 0 < float(reference) < math.inf)
        self._check(is_reference, "reference", "'mean', 'total' or a positive number", reference)
        self._check(isinstance(normalize, bool), "normalize", "True or False", normalize)
        self.ema, self.reference, self.normalize = ema, reference, normalize

    def weigh(
        self, memory: Memory, norms: Tensor, losses: Tensor, present: Tensor, tasks: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return the averages of the norms, and the weights that are inversely proportional to them."""
        averages = moving_average(self.ema, *memory, norms)
        if isinstance(self.reference, int | float):
            return averages, self.reference / averages
        total = torch.where(present, averages, 0.0).sum()
        return averages, (total / present.sum() if self.reference == "mean" else total) / averages
