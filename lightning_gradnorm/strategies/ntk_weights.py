"""Weights from the neural tangent kernel, as estimated from a single gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_gradnorm.strategies.norm_weighting import Memory, NormFormula
from lightning_gradnorm.strategies.smoothing import moving_average


class NTKWeights(NormFormula):
    r"""Give all terms of a sum of squares the same rate of convergence, as far as their gradients show it.

    Wang, Yu, Perdikaris, *When and Why PINNs Fail to Train: A Neural Tangent Kernel Perspective*, Journal of Computational
    Physics 2022 (arXiv 2007.14527), section 7::

        λ_i = Σ_j Tr K_j / Tr K_i,     Tr K_i = Σ_points ||∂u_i(x) / ∂θ||²

    The trace takes one backward pass per point. For ``L_i = mean_x u_i(x)²`` a single pass gives instead::

        k_i = ||∇_θ √L_i||² = ||∇_θ L_i||² / (4 L_i)
        w_i = Σ_j k_j / k_i

    ``k_i`` is the Rayleigh quotient of the kernel ``K_i`` at the residuals ``u_i``, over the number of points. If all
    eigenvalues are equal, it is ``Tr K_i / points``, the mean eigenvalue. Otherwise each eigenvalue is weighted by the squared
    component of the residuals: directions that are already learned are ignored, and the large eigenvalues count too much at
    the start. Unlike the trace, it depends on the residuals. The terms should be means of squares; for others the formula is
    a heuristic. (jaxpi divides the mean of the traces, not their sum, by the trace, so its weights are T times smaller. One
    public library has the ratio upside down.)

    Args:
        ema: β, the share of the past in bias-corrected averages of ``k_i``; 0, as in the paper, for no averaging.
        update_every: the network's optimizer steps from one weight update to the next.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_gradnorm.strategies import NormWeightingRule
        >>> rule = NormWeightingRule(["pde", "boundary"], NTKWeights())
        >>> _ = rule.step(norms=torch.tensor([4.0, 2.0]), losses=torch.tensor([1.0, 1.0]))  # k = 4, 1
        >>> rule.weights
        tensor([1.2500, 5.0000])
    """

    of_all_parameters: ClassVar[bool] = True

    def __init__(self, ema: float = 0.0, update_every: int = 1) -> None:
        super().__init__(update_every=update_every)
        self._check_share("ema", ema)
        self.ema = ema

    def weigh(
        self, memory: Memory, norms: Tensor, losses: Tensor, present: Tensor, tasks: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return the averages of ``k_i``, and the weights that are inversely proportional to them."""
        squares = torch.where(losses > 0, norms.square(), torch.nan)
        k = moving_average(self.ema, *memory, squares / (4 * losses))
        return k, torch.where(present, k, 0.0).sum() / k

    def explain(self, task: str, loss: float) -> str:
        """Return why a task with this loss prevented the update, as the beginning of a sentence."""
        if loss <= 0:
            return f"the loss of task '{task}' should be a mean of squares, above 0; it is {loss:g}"
        return super().explain(task, loss)
