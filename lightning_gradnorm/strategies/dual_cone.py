"""UPGrad and DualProj without an extra package: they project onto the dual cone of the gradients, see `PivotingProjector`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchjd import aggregation as jd
from torchjd.linalg import DualConeProjector, PSDMatrix

from lightning_gradnorm._messages import check
from lightning_gradnorm.strategies.solvers import in_double

_BLOCKS = 10
"""Exchanges of all wrong entries at once, before we exchange one at a time."""


class PivotingProjector(DualConeProjector):
    """Projects onto the dual cone of the gradients, the directions that increase no loss, by exchanging active constraints.

    Quinton, Rey, *Jacobian Descent For Multi-Objective Optimization*, arXiv 2406.16232, Proposition 1: for each weight vector u
    the least ``vᵀG v`` with ``v ≥ u``. Then ``v_i = u_i`` or ``(G v)_i = 0`` for each task i. We guess which, solve all vectors
    at once, and exchange the entries with ``v_i < u_i`` or ``(G v)_i < 0`` (block principal pivoting: Júdice, Pires, Computers
    & Operations Research 1994). This could repeat itself, so after a few rounds only the last such entry is exchanged (Murty,
    Opsearch 1974), which ends for every positive definite G. All of it is in float64 on the CPU.

    It takes the place of ``torchjd.linalg.QuadprogProjector``, which needs the extra ``solvers``. The options mean the same.
    TorchJD's default ``norm_eps=1e-4`` leaves short gradients unprojected, as those at the representation often are.

    Args:
        norm_eps: G is divided by its trace. If the trace is less than this, G counts as zero, so nothing is projected.
        reg_eps: added to the diagonal of the divided G, which makes it positive definite.

    Example:
        >>> G = torch.tensor([[1.0, -1.0], [-1.0, 4.0]])
        >>> PivotingProjector(reg_eps=0.0)(torch.tensor([0.5, 0.0]), G)
        tensor([0.5000, 0.1250])
    """

    def __init__(self, *, norm_eps: float = 0.0, reg_eps: float = 1e-4) -> None:
        check("PivotingProjector", norm_eps >= 0.0, "norm_eps", "at least 0", norm_eps)
        check("PivotingProjector", reg_eps >= 0.0, "reg_eps", "at least 0", reg_eps)
        self.norm_eps, self.reg_eps = norm_eps, reg_eps

    def __call__(self, U: Tensor, G: PSDMatrix) -> Tensor:
        """Return the weights of the projections, in the shape of U, with the dtype and device of G.

        Args:
            U: the weights of the vectors to project, shape (..., T).
            G: the gradients' Gramian, shape (T, T).

        Raises:
            ValueError: no weights are found: G is not finite, or not positive definite because ``reg_eps`` is too small.
        """
        gramian = in_double(G)
        trace = float(gramian.trace())
        gramian = gramian / trace if trace > 0 and trace >= self.norm_eps else torch.zeros_like(gramian)
        gramian.diagonal().add_(self.reg_eps)
        found = _least_above(in_double(U).reshape(-1, len(G)), gramian) if math.isfinite(trace) else None
        if found is None:
            raise ValueError(
                f"{self}: no weights found; the Gramian should be finite and, with reg_eps on its diagonal, positive definite"
            )
        return found.reshape(U.shape).to(G)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(norm_eps={self.norm_eps}, reg_eps={self.reg_eps})"


def _least_above(u: Tensor, G: Tensor) -> Tensor | None:
    """Return for each row of u the ``v ≥ u`` with the least ``vᵀG v``, shape (n, T); ``None`` if it is not found."""
    T, sizes = len(G), G.abs()
    identity, free, v = torch.eye(T, dtype=G.dtype), torch.zeros_like(u, dtype=torch.bool), u
    for step in range(100 + 10 * T):
        # Relative to the terms of each sum. More if rounding keeps exchanging an entry that is right on either side.
        error = min(1e-13 * 1.1**step, 1e-10) * v.abs()
        # Not "less than", because NaN is wrong, too.
        wrong = ~torch.where(free, v >= u - error.amax(dim=1, keepdim=True), v @ G >= -(error @ sizes))
        if not bool(wrong.any()):
            return torch.maximum(v, u) if bool(v.isfinite().all()) else None
        if step >= _BLOCKS:
            wrong &= wrong.cumsum(dim=1) == wrong.sum(dim=1, keepdim=True)
        free = free ^ wrong
        # (G v)_i = 0 for those that are free, v_i = u_i for the others.
        equations, right = torch.where(free[:, :, None], G, identity), torch.where(free, 0.0, u)
        v = torch.linalg.solve_ex(equations, right[:, :, None])[0][:, :, 0]
    return None


class UPGradWeighting(jd.UPGradWeighting):
    """The weights of `UPGrad`, from the gradients' Gramian.

    Args:
        pref_vector: weights of the projected gradients, shape (T,); ``1/T`` by default.
        projector: a `PivotingProjector` by default.

    Example:
        >>> UPGradWeighting()(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 0.5000])
    """

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__(pref_vector, projector or PivotingProjector())


class UPGrad(jd.UPGrad):
    """The mean of the gradients after each has been projected onto the directions that increase no loss.

    Quinton, Rey, *Jacobian Descent For Multi-Objective Optimization*, arXiv 2406.16232. This is
    ``torchjd.aggregation.UPGrad``, which needs the extra ``solvers`` for its projector; ours needs none.

    Args:
        pref_vector: weights of the projected gradients, shape (T,); ``1/T`` by default.
        projector: a `PivotingProjector` by default.

    Raises:
        ValueError: in a call, the projector finds no weights.

    Example:
        >>> UPGrad()(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([1.0000, 0.5000])
    """

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__(pref_vector, projector or PivotingProjector())


class DualProjWeighting(jd.DualProjWeighting):
    """The weights of `DualProj`, from the gradients' Gramian.

    Args:
        pref_vector: weights of the gradients in their mean, shape (T,); ``1/T`` by default.
        projector: a `PivotingProjector` by default.

    Example:
        >>> DualProjWeighting()(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 0.5000])
    """

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__(pref_vector, projector or PivotingProjector())


class DualProj(jd.DualProj):
    """The mean gradient, projected onto the directions that increase no loss.

    Lopez-Paz, Ranzato, *Gradient Episodic Memory for Continual Learning*, NeurIPS 2017, arXiv 1706.08840: equation 11. This is
    ``torchjd.aggregation.DualProj``, which needs the extra ``solvers`` for its projector; ours needs none.

    Args:
        pref_vector: weights of the gradients in their mean, shape (T,); ``1/T`` by default.
        projector: a `PivotingProjector` by default.

    Raises:
        ValueError: in a call, the projector finds no weights.

    Example:
        >>> DualProj()(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([1.0000, 0.5000])
    """

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__(pref_vector, projector or PivotingProjector())
