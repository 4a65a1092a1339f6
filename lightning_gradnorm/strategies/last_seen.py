"""The last norm and loss of each task, which stand in for it while it is absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class LastSeen:
    """Fills in the numbers of absent tasks, for ``absent_tasks="last_seen"``.

    Args:
        like: has the shape (T,), the precision and the device of the weights.

    Example:
        >>> last = LastSeen(torch.ones(2))
        >>> everyone = torch.tensor([True, True])
        >>> last.note(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.7]), everyone)
        >>> last.fill(torch.tensor([2.0, 0.0]), torch.tensor([0.4, 0.0]), torch.tensor([True, False]))
        (tensor([2., 3.]), tensor([0.4000, 0.7000]), tensor([True, True]))
    """

    def __init__(self, like: Tensor) -> None:
        self._norms, self._losses = torch.zeros(2, *like.shape, dtype=like.dtype, device=like.device).unbind()
        self._is_known = torch.zeros_like(like, dtype=torch.bool)

    def fill(self, norms: Tensor, losses: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return norms, losses and the tasks that count: present now, or earlier unless no task is now. ``None``: all."""
        if present is None:
            return norms, losses, None
        stays = present | ~self._is_known
        norms, losses = torch.where(stays, norms, self._norms), torch.where(stays, losses, self._losses)
        return norms, losses, present | (self._is_known & present.any())

    def note(self, norms: Tensor, losses: Tensor, usable: Tensor) -> None:
        """Remember the numbers of the tasks that are present and have usable numbers, bool of shape (T,)."""
        self._norms = torch.where(usable, norms, self._norms)
        self._losses = torch.where(usable, losses, self._losses)
        self._is_known = self._is_known | usable

    def to(self, like: Tensor) -> None:
        """Move all numbers to the device and precision of the weights."""
        self._norms, self._losses = self._norms.to(like), self._losses.to(like)
        self._is_known = self._is_known.to(like.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all state."""
        return {"norms": self._norms.clone(), "losses": self._losses.clone(), "is_known": self._is_known.clone()}

    def resumed(self, state: Mapping[str, Any] | None) -> LastSeen:
        """Return a copy with this state, in the order of the tasks; empty if ``None``, as from older checkpoints."""
        found = LastSeen(self._norms)
        if state is not None:
            found._norms, found._losses = state["norms"].to(self._norms), state["losses"].to(self._norms)
            found._is_known = state["is_known"].to(self._is_known)
        return found
