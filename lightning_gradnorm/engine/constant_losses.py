"""Losses that are constants in some batches: ``0.0``, or a tensor without a gradient, if there was nothing to learn from."""

from __future__ import annotations

from torch import Tensor

from lightning_gradnorm.engine.ranks import Ranks
from lightning_gradnorm.gradients.graph import has_gradient, is_constant


class ConstantLosses:
    """Decides which constants are the loss of an absent task, and which are a mistake.

    A 0 adds nothing: the task is absent. Any other constant means an absent task only if the task has had a gradient before,
    as ``max(kl, 0.5)`` is a number in some batches; we warn about it once. Before that, we take it for a mistake such as
    ``.item()`` or ``.detach()``.

    Args:
        caller: begins the warning.
        ranks: the first of them warns.
        noun: what the warning calls a loss.
    """

    def __init__(self, caller: str, ranks: Ranks, noun: str = "loss of task") -> None:
        self._caller, self._ranks, self._noun = caller, ranks, noun
        self._trained: set[str] = set()
        self._warned: set[str] = set()

    def is_absent(self, task: str, loss: object) -> bool:
        """Return True if the task has no loss in this batch; False if it has one, or something that should be one."""
        if not is_constant(loss):
            if has_gradient(loss):
                self._trained.add(task)
            return False
        if has_gradient(loss) or task in self._warned or _is_zero(loss):
            return True
        if task in self._trained:
            self._warned.add(task)
            self._ranks.warn(
                f"{self._caller}: the {self._noun} '{task}' was a constant in a batch ({type(loss).__name__} without a "
                f"gradient). There it counts as absent. If it is trained on, give the loss itself, not .detach() or .item()."
            )
        return task in self._trained


def _is_zero(loss: object) -> bool:
    """Return True for 0, and for a tensor without a value."""
    return bool((loss == 0).all()) if isinstance(loss, Tensor) else loss == 0
