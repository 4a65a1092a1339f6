"""Nash-MTL, solved to machine precision, without an extra package: see `NashMTL`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.aggregation import GramianWeightedAggregator, Weighting
from torchjd.linalg import PSDMatrix

from lightning_gradnorm._messages import check
from lightning_gradnorm.strategies.solvers import fair_shares, in_double


class NashMTLWeighting(Weighting[PSDMatrix], Stateful):
    """The weights of `NashMTL`, from the gradients' Gramian G: ``G w = 1/w``, ``w > 0``.

    Args:
        n_tasks: T.
        max_norm: the direction ``w J``, whose norm is √T, is shortened to this norm if it is longer; 0 for never.
        update_weights_every: the weights are solved for in the first call, and then in every one of this many.

    Example:
        >>> NashMTLWeighting(2, max_norm=0.0)(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0000])
    """

    remembers = "last solution"

    def __init__(self, n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1) -> None:
        super().__init__()
        check("NashMTL", n_tasks > 0, "n_tasks", "at least 1", n_tasks)
        check("NashMTL", max_norm >= 0.0, "max_norm", "at least 0", max_norm)
        check("NashMTL", update_weights_every > 0, "update_weights_every", "at least 1", update_weights_every)
        self.n_tasks, self.max_norm, self.update_weights_every = n_tasks, max_norm, update_weights_every
        self.reset()

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        """Return ``w``, shape (T,).

        Raises:
            ValueError: the Gramian is not of T tasks, or no finite weights exist.
        """
        weights = bargain(self, gramian)
        if weights is None:
            raise ValueError(
                f"NashMTL: the gradients of {len(gramian)} tasks have no finite weights for n_tasks={self.n_tasks}: one of "
                f"them is zero, or they cancel each other"
            )
        return weights.to(gramian)

    def reset(self) -> None:
        """Forget the last solution."""
        self.step = 0
        self.prvs_alpha = torch.ones(self.n_tasks, dtype=torch.float64)


class NashMTL(GramianWeightedAggregator, Stateful):
    """The direction that all tasks agree on when they bargain for it: the Nash bargaining solution of their improvements.

    Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, *Multi-Task Learning as a Bargaining Game*, ICML 2022,
    arXiv 2202.01017: equation 3 and Algorithm 1. ``torchjd.aggregation.NashMTL`` approximates the same solution by
    ``optim_niter`` convex problems, keeps its last weights where their solver fails, and needs the extra ``solvers``. This one
    takes Newton steps to about 1e-12 (`fair_shares`) and needs no extra. Where no finite weights exist, it raises an error.

    Args:
        n_tasks: T.
        max_norm: the result is shortened to this norm if it is longer; 0 for never.
        update_weights_every: the weights are solved for in the first call, and then in every one of this many.

    Example:
        >>> NashMTL(2)(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([0.7071, 0.7071])
    """

    gramian_weighting: NashMTLWeighting

    def __init__(self, n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1) -> None:
        super().__init__(NashMTLWeighting(n_tasks, max_norm, update_weights_every))

    def reset(self) -> None:
        """Forget the last solution."""
        self.gramian_weighting.reset()

    def __repr__(self) -> str:
        of = self.gramian_weighting
        options = f"max_norm={of.max_norm}, update_weights_every={of.update_weights_every}"
        return f"{type(self).__name__}(n_tasks={of.n_tasks}, {options})"


@torch.no_grad()
def bargain(of: Any, gramian: Tensor) -> Tensor | None:
    """Return the weights for a Gramian, in float64; ``None`` if none are finite, or it is of another number of tasks.

    Args:
        of: the options and the state, as TorchJD's weighting names them, or that weighting itself.
        gramian: shape (T, T).
    """
    G = in_double(gramian)
    if len(G) != of.n_tasks:
        return None
    if of.step % of.update_weights_every == 0:
        solution = fair_shares(G)
        if solution is None:
            return None
        of.prvs_alpha = solution if isinstance(of.prvs_alpha, Tensor) else solution.numpy()
    of.step += 1
    weights: Tensor = torch.as_tensor(of.prvs_alpha, dtype=torch.float64)
    norm = float((weights @ G @ weights).clamp(min=0).sqrt()) if of.max_norm > 0 else 0.0
    return weights * (of.max_norm / norm) if norm > of.max_norm else weights
