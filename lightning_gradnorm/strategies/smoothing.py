"""Moving averages of each task's gradient norm and loss, because training rates of single batches are noisy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def moving_average(beta: float, averages: Tensor, updates: Tensor, numbers: Tensor) -> Tensor:
    """Return the bias-corrected exponential moving average ``a_t = Σ_s β^(t−s) x_s / Σ_s β^(t−s)``.

    Args:
        beta: the share of the past, 0 ≤ β < 1.
        averages: ``a_(t−1)``, shape (…, T).
        updates: t by task, shape (T,): the numbers seen so far, this one included.
        numbers: ``x_t``, shape (…, T).

    Example:
        >>> first = moving_average(0.5, torch.zeros(1), torch.ones(1), torch.tensor([3.0]))
        >>> moving_average(0.5, first, torch.tensor([2.0]), torch.tensor([0.0]))
        tensor([1.])
    """
    return averages + (1 - beta) / (1 - beta**updates) * (numbers - averages)


class Smoothing:
    """Bias-corrected exponential moving averages, for ``smoothing=β``: the first average is the number itself.

    Args:
        beta: the share of the past, 0 < β < 1.
        like: has the shape (T,), the precision and the device of the weights.

    Example:
        >>> smoothing = Smoothing(0.5, torch.ones(2))
        >>> for norms in torch.tensor([[1.0, 3.0], [4.0, 0.0]]):
        ...     averages = smoothing.average(norms, norms, torch.tensor([True, True]))
        >>> averages[0]
        tensor([3., 1.])
    """

    def __init__(self, beta: float, like: Tensor) -> None:
        self._beta = beta
        self._averages = torch.zeros(2, *like.shape, dtype=like.dtype, device=like.device)
        self._updates = torch.zeros_like(like)

    def average(self, norms: Tensor, losses: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
        """Add the numbers of usable tasks, bool of shape (T,), and return their averages; other numbers stay the same."""
        self._updates = self._updates + usable
        numbers = torch.stack([norms, losses])
        averages = moving_average(self._beta, self._averages, self._updates, numbers)
        self._averages = torch.where(usable, averages, self._averages)
        norms, losses = torch.where(usable, self._averages, numbers).unbind()
        return norms, losses

    def to(self, like: Tensor) -> None:
        """Move all numbers to the device and precision of the weights."""
        self._averages, self._updates = self._averages.to(like), self._updates.to(like)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all state."""
        norms, losses = self._averages.clone().unbind()
        return {"norms": norms.clone(), "losses": losses.clone(), "updates": self._updates.clone()}

    def resumed(self, state: Mapping[str, Any] | None) -> Smoothing:
        """Return a copy with this state, in the order of the tasks; empty if ``None``, from a run without smoothing."""
        found = Smoothing(self._beta, self._updates)
        if state is not None:
            found._averages = torch.stack([state["norms"], state["losses"]]).to(self._averages)
            found._updates = state["updates"].to(self._updates)
        return found
