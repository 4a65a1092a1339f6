"""Tasks whose gradient at the shared layer is exactly zero.

A loss may have coefficient 0 in a warm-up, its labels may all be masked, or a constraint may be satisfied. The paper's rule
would raise such a task's weight forever, and push all others to zero. So it counts as absent.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

PATIENCE = 50
"""Updates in a row without a gradient after which we report a task."""


def tasks_with_gradient(norms: Tensor, present: Tensor | None, *, may_look: bool = True) -> Tensor | None:
    """Return the tasks that are present with a gradient that is not zero, bool of shape (T,). ``None``: all of them.

    Unless the host may read the norms (on a GPU it would wait for them), the result is always a mask.

    Example:
        >>> import torch
        >>> tasks_with_gradient(torch.tensor([0.3, 0.0]), None)
        tensor([ True, False])
        >>> tasks_with_gradient(torch.tensor([0.3, 0.1]), None) is None
        True
    """
    if may_look and 0.0 not in norms.tolist():
        return present
    is_zero = norms == 0
    return ~is_zero if present is None else present & ~is_zero


class ZeroGradients:
    """Counts updates in which a present task had no gradient. Works on host numbers.

    Example:
        >>> zero = ZeroGradients(["fit", "kl"])
        >>> for _ in range(50):
        ...     zero.note([True, True], [True, False])
        >>> zero.lasting, zero.updates
        (['kl'], 50)
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tasks
        self._in_a_row: dict[str, int] = {}
        self.updates = 0
        """Updates in which at least one present task had no gradient."""

    def note(self, shown: list[bool], with_gradient: list[bool]) -> None:
        """Called with the tasks that had a loss in an update, and those with a gradient."""
        all_have_one = shown == with_gradient
        if all_have_one and not self._in_a_row:
            return
        for task, is_shown, has_gradient in zip(self._tasks, shown, with_gradient, strict=True):
            if is_shown and has_gradient:
                self._in_a_row.pop(task, None)
            elif is_shown:
                self._in_a_row[task] = self._in_a_row.get(task, 0) + 1
        self.updates += not all_have_one

    @property
    def lasting(self) -> list[str]:
        """The tasks that have had no gradient for `PATIENCE` updates."""
        return [task for task, count in self._in_a_row.items() if count >= PATIENCE]
