"""Solves the small problems in T unknowns behind Nash-MTL, FairGrad, CAGrad and MGDA, exactly.

Everything is in float64 on the CPU, whatever the precision of the Gramian ``G = J Jᵀ``. Each function returns ``None`` if it
finds no solution, for example because the problem has none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_RIDGE = 1e-13
"""The least squared distance of a unit gradient from the span of others. Linearly dependent ones would have 0 or, by rounding,
less; the problem is then solved with this one moved out of the span."""


def in_double(gramian: Tensor) -> Tensor:
    """Return the Gramian in float64 on the CPU, where T × T numbers are handled fastest."""
    return gramian.detach().to(device="cpu", dtype=torch.float64)


def fair_shares(gramian: Tensor, alpha: float = 1.0) -> Tensor | None:
    """Return the weights ``w > 0`` with ``G w = w^(−1/alpha)``, in float64.

    This is equation 4 of *Fair Resource Allocation in Multi-Task Learning* (Ban, Ji, ICML 2024, arXiv 2402.15638); with
    ``alpha=1``, ``G w = 1/w``, it is Nash-MTL's (Navon et al., ICML 2022, arXiv 2202.01017, equation 3 and Claim 3.1).

    With ``q = 1/alpha``, the weights minimize the convex ``½ wᵀG w − Σ w_i^(1−q) / (1−q)`` (for ``q = 1``, ``Σ log w_i``). We
    take Newton steps ``w_i ← w_i (1 + s δ_i)``. Along such a step the curvature grows at most by ``(1 − s ρ)^(−1−q)``, where
    ``ρ = max(−δ_i)``. The step ``s`` minimizes the bound that follows. So the function decreases in every step, the weights
    stay positive, and near the solution ``s`` tends to 1, which keeps the convergence quadratic.

    Args:
        gramian: G, shape (T, T).
        alpha: positive.

    Returns:
        Shape (T,); ``None`` if no finite weights exist: a gradient is zero, or a nonnegative combination of them is.

    Example:
        >>> G = torch.tensor([[4.0, 1.0], [1.0, 9.0]])
        >>> w = fair_shares(G)
        >>> G.double() @ w * w
        tensor([1.0000, 1.0000], dtype=torch.float64)
    """
    G, q = in_double(gramian), 1 / alpha
    squares = G.diagonal()
    if not float(squares.min()) > 0:
        return None
    w = squares ** (-1 / (1 + q))
    # The best multiple of w, because wᵀG w = Σ w_i^(1−q) holds at the solution.
    w = w * ((w ** (1 - q)).sum() / (w @ G @ w)) ** (1 / (1 + q))
    for _ in range(60):
        powers = w ** (1 - q)
        H = G * w * w[:, None]  # the Hessian with respect to log-sized changes δ, but for its second part:
        H.diagonal().add_(powers, alpha=q)
        root, failed = torch.linalg.cholesky_ex(H)
        if failed:
            return None
        # The gradient is H 1 − (1 + q) powers, hence this short form of the Newton step.
        change = (1 + q) * torch.cholesky_solve(powers[:, None], root)[:, 0] - 1
        least, most = (float(one) for one in torch.aminmax(change))
        rho = max(-least, 0.0)
        step = -math.expm1(-math.log1p(q * rho) / q) / rho if rho > 0 else 1.0
        w = w * (1 + step * change)
        if max(rho, most) < 1e-6:  # then the error is about its square
            # Where the terms of the equation are this much larger than their sum, rounding has chosen the weights.
            return w if float((H.diagonal() / powers).max()) < 1e13 else None
    return None


def shortest_combination(gramian: Tensor) -> Tensor | None:
    """Return the weights of the shortest convex combination of the gradients, in float64: ``min wᵀG w, w ≥ 0, Σ w = 1``.

    This is MGDA's problem (Désidéri, Comptes Rendus Mathématique 2012; Sener, Koltun, NeurIPS 2018, arXiv 1810.04650,
    equation 3).

    Args:
        gramian: G, shape (T, T).

    Returns:
        Shape (T,). If several weights give the same combination, one of them.

    Example:
        >>> shortest_combination(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    G = in_double(gramian)
    is_zero = (G.diagonal() == 0).double()
    if bool(is_zero.any()):
        return is_zero / is_zero.sum()
    found = _least_on_simplex(G, torch.zeros_like(G[0]), 1.0)
    return None if found is None else found / found.sum()


def conflict_averse(gramian: Tensor, c: float, norm_eps: float = 1e-4) -> Tensor | None:
    """Return CAGrad's weights, in float64 (Liu et al., NeurIPS 2021, arXiv 2110.14048, Algorithm 1).

    The direction is ``d = ḡ + v J``, with the mean gradient ``ḡ`` and the weights ``w = v / Σ v`` on the simplex that minimize
    ``g_w · ḡ + c ‖ḡ‖ ‖g_w‖``, where ``g_w = w J``. As in TorchJD, G is divided by its trace first.

    Args:
        gramian: G, shape (T, T).
        c: at least 0; with 0 the result is the mean.
        norm_eps: all weights are 0 if the norm of ``g_w``, for the divided G, is less than this: the gradients have (almost)
            no common direction of descent.

    Returns:
        Shape (T,).

    Example:
        >>> conflict_averse(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), c=0.5)
        tensor([0.5000, 1.0590], dtype=torch.float64)
    """
    G, T = in_double(gramian), len(gramian)
    trace, nothing = float(G.trace()), torch.zeros_like(G[0])
    if not math.isfinite(trace):
        return None
    if trace <= 0:
        return nothing
    if c == 0:
        return nothing + 1 / T
    slopes = G.sum(dim=1) / (T * trace)  # g_i · ḡ
    radius = c * math.sqrt(max(float(slopes.sum()) / T, 0.0))
    if radius == 0:
        return nothing
    v = _least_on_simplex(G / trace, slopes, radius)
    if v is None:
        return None
    return v + 1 / T if radius >= norm_eps * float(v.sum()) else nothing


def _least_on_simplex(G: Tensor, slopes: Tensor, radius: float) -> Tensor | None:
    """Minimize ``slopes·w + radius √(wᵀG w)`` over ``w ≥ 0, Σ w = 1``; return ``v = radius w / √(wᵀG w)``.

    The solution has ``v ≥ 0``, ``y = G v + slopes − ν ≥ 0``, ``v_i y_i = 0`` and ``vᵀG v = radius²`` for a number ν. An active
    set method finds it: for given positive weights, ``y = 0`` gives ``v = ν p − s`` with ``p = G⁻¹ 1`` and
    ``s = G⁻¹ slopes``, and the last equation is quadratic in ν. We start at the best corner of the simplex. If a weight becomes
    negative on the way to the minimum, it stays 0; otherwise the task with the least ``y_i < 0`` joins. The function decreases
    each time, so no set comes twice. Sets change by one task, so a table of ``y`` as a function of ``v`` changes by one
    exchange of ``v_i`` and ``y_i``. Plain floats: for so few numbers, they are faster than tensors.
    """
    T = len(G)
    norms = G.diagonal().clamp(min=0).sqrt()
    size = float(norms.max())
    if not size > 0:
        return torch.ones_like(slopes)
    # Gradients of length 1, so that a short one is as precise as a long one. A zero gradient stays zero.
    norms = torch.where(norms > 1e-100 * size, norms, size)
    C = G / norms / norms[:, None]
    a, b, diagonal = (one.tolist() for one in (1 / norms, slopes / norms, C.diagonal().clamp(min=0).sqrt()))
    whole = torch.cat([C, torch.stack([slopes / norms, 1 / norms], dim=1)], dim=1)
    corner = min(range(T), key=lambda i: (b[i] + radius * diagonal[i]) / a[i])
    x = [0.0] * T  # normalized: Σ a_i x_i = 1
    x[corner] = 1 / a[corner]
    on, joined, v, best = {corner}, corner, None, math.inf
    # Where gradients are almost dependent, an exchange back leaves large rounding errors. Only a fresh table decides.
    table, is_fresh = _table(whole, on), True
    for _ in range(20 * T):
        oo = -sum(a[i] * table[i][-1] for i in on)
        os = -sum(a[i] * table[i][-2] for i in on)
        ss = -sum(b[i] * table[i][-2] for i in on)
        square = radius**2 * oo - (oo * ss - os * os)
        if square > 0:
            total = math.sqrt(square)  # Σ a_i v_i
            nu = (os + total) / oo  # also the function's value
            to = {i: table[i][-2] - nu * table[i][-1] for i in on}
            way, longest = {i: to[i] / total - x[i] for i in on}, 1.0
        else:  # it falls forever along this way
            way, longest = {i: table[i][-2] - os / oo * table[i][-1] for i in on}, math.inf
        length, leaves = min(((-x[i] / way[i], i) for i in on if way[i] < 0), default=(math.inf, -1))
        if square <= 0 and leaves < 0:
            return None
        if length < longest:
            if leaves == joined and length <= 0 and is_fresh:
                break  # rounding: the last one to join does not help
            for i in on:
                x[i] += length * way[i]
            x[leaves] = 0.0
            on.remove(leaves)
            if length > 0:
                _exchange(table, leaves)
            else:
                table = _table(whole, on)
            is_fresh = length <= 0
            continue
        v = [max(to[i], 0.0) if i in on else 0.0 for i in range(T)]
        x = [one / total for one in v]
        y, joined = min(((table[i][-2] - nu * table[i][-1], i) for i in range(T) if i not in on), default=(0.0, -1))
        is_least = y >= -1e-14 * max(v)
        if is_fresh:
            if is_least or nu >= best:
                break
            best = nu
        elif is_least:
            table, is_fresh = _table(whole, on), True
            continue
        on.add(joined)
        _exchange(table, joined)
    else:
        return None
    return None if v is None else torch.tensor(v, dtype=torch.float64) / norms


def _table(whole: Tensor, on: set[int]) -> list[list[float]]:
    """Return the table in which the tasks in ``on`` have changed sides."""
    table: list[list[float]] = whole.tolist()
    for i in on:
        _exchange(table, i)
    return table


def _exchange(table: list[list[float]], j: int) -> None:
    """Rewrite the equations ``y_i = Σ_k table[i][k] v_k`` so that ``v_j`` and ``y_j`` change sides."""
    pivot = table[j][j] = max(table[j][j], _RIDGE)
    row = [-one / pivot for one in table[j]]
    row[j] = 1 / pivot
    for i, other in enumerate(table):
        if i != j:
            factor, other[j] = other[j], 0.0
            table[i] = [one + factor * more for one, more in zip(other, row, strict=True)]
    table[j] = row
