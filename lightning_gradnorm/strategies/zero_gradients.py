"""Tasks whose gradient at the shared layer is exactly zero.

A loss has coefficient 0 in a warm-up, its labels are all masked, a constraint is satisfied. The paper's rule would raise
such a task's weight for ever, and push all others to zero. It counts as absent instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PATIENCE = 50
"""Updates in a row without a gradient after which a task is reported."""


class ZeroGradients:
    """Leaves tasks without a gradient out of an update, and counts for how many updates that lasts.

    Example:
        >>> zero = ZeroGradients(["fit", "kl"])
        >>> zero.present(torch.tensor([0.3, 0.0]), None)
        tensor([ True, False])
        >>> zero.present(torch.tensor([0.3, 0.1]), None) is None
        True
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tasks
        self._updates: Tensor | None = None

    def present(self, norms: Tensor, present: Tensor | None, *, may_look: bool = True) -> Tensor | None:
        """Return the tasks that take part: those present with a gradient that is not zero. ``None``: all of them.

        Unless the host may look at the norms, on a GPU it would wait for them, a mask is always returned.
        """
        is_zero = norms == 0
        if may_look and not bool(is_zero.any()):
            self._updates = None
            return present
        counts = torch.zeros_like(norms) if self._updates is None else self._updates.to(norms)
        has_none = is_zero if present is None else is_zero & present
        self._updates = torch.where(has_none, counts + 1, torch.where(is_zero, counts, 0.0))
        return ~is_zero if present is None else present & ~is_zero

    @property
    def lasting(self) -> list[str]:
        """The tasks that have had no gradient for long. Synchronizes with the device."""
        if self._updates is None:
            return []
        return [task for task, count in zip(self._tasks, self._updates.tolist(), strict=True) if count >= PATIENCE]
