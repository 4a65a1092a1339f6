"""Learning-rate annealing: each term's gradient is scaled up to the residual's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_gradnorm._messages import did_you_mean
from lightning_gradnorm.strategies.norm_weighting import Memory, Norm, NormFormula


class LRAnnealing(NormFormula):
    """Scale each term's gradient to that of the residual, the term whose weight stays 1.

    Wang, Teng, Perdikaris, *Understanding and Mitigating Gradient Flow Pathologies in Physics-Informed Neural Networks*, SIAM
    Journal on Scientific Computing 2021 (arXiv 2001.04536), Algorithm 1. With ``L_r`` the residual of the equation::

        λ̂_i = max_θ |∇_θ L_r| / mean_θ |∇_θ L_i|       over all entries of the gradients
        λ_i ← (1 − a) λ_i + a λ̂_i                       λ_i = 1 at first, λ_r = 1

    Sources disagree. The text recommends ``a = 0.9``; the authors' code uses ``a = 0.1``, as we and most others do. Their
    code for Helmholtz' equation divides by the mean of ``|∇_θ (λ_i L_i)|``, with the current weight, which has another
    fixed point; it leaves out biases, and takes the mean over layers of each layer's mean. Ours follows the text. A λ computed
    from the gradients of one step is used from the next step on.

    Args:
        residual: the name of the task ``L_r``.
        rate: ``a``.
        norm: ``"max_mean"``, as published; or ``"l2"``: ``λ̂_i = ||∇_θ L_r|| / ||∇_θ L_i||``. The largest entry of a gradient
            is many times its mean entry, so the published form favors the other terms; ``"l2"`` makes all norms equal.
        update_every: the network's optimizer steps from one weight update to the next; 10 in the authors' code.

    Raises:
        ValueError: an argument is out of range; or, in training, ``residual`` is not among the tasks.

    Example:
        >>> from lightning_gradnorm.strategies import NormWeightingRule
        >>> rule = NormWeightingRule(["pde", "boundary"], LRAnnealing("pde", rate=1.0, norm="l2"))
        >>> _ = rule.step(norms=torch.tensor([6.0, 2.0]), losses=torch.ones(2))
        >>> rule.weights
        tensor([1., 3.])
    """

    of_all_parameters: ClassVar[bool] = True

    def __init__(
        self,
        residual: str,
        rate: float = 0.1,
        norm: Literal["max_mean", "l2"] = "max_mean",
        update_every: int = 10,
    ) -> None:
        super().__init__(update_every=update_every)
        self._check(isinstance(residual, str), "residual", "the name of a task", residual)
        self._check_share("rate", rate, may_be_one=True)
        self._check(norm in ("max_mean", "l2"), "norm", "'max_mean' or 'l2'", norm)
        self.residual, self.rate, self.norm = residual, rate, norm

    @property
    def norms(self) -> tuple[Norm, ...]:  # type: ignore[override]
        """The norms to take of each gradient."""
        return ("max", "mean") if self.norm == "max_mean" else ("l2",)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that the residual is one of the tasks."""
        super().check_tasks(tasks)
        if self.residual not in tasks:
            raise ValueError(
                f"LRAnnealing: residual '{self.residual}' is not among the tasks {list(tasks)}; "
                f"{did_you_mean(self.residual, tasks)}"
            )

    def weigh(
        self, memory: Memory, norms: Tensor, losses: Tensor, present: Tensor, tasks: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return λ twice, as the memory and as the weights. Without a residual λ does not change."""
        r = list(tasks).index(self.residual)
        largest, mean = norms.unbind(1) if norms.ndim == 2 else (norms, norms)
        weights = memory.values + self.rate * (largest[r] / mean - memory.values)
        weights[r] = 1.0
        weights = torch.where(present[r], weights, memory.values)
        return weights, weights
