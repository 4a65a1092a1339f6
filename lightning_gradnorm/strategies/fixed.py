"""Fixed weights: the simplest rule. It reads nothing and has no state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_gradnorm._messages import check, check_positive_by_task, check_task_names
from lightning_gradnorm.strategies.resuming import kind_of


class FixedRule:
    """Multiplies each task's gradient by a number that does not change.

    Args:
        weights: task → positive number, used as given (the weights need not sum to T).
        dtype: of the weights.
        device: of the weights.

    Raises:
        ValueError: there are fewer than two tasks, or a weight is not positive and finite.

    Example:
        >>> FixedRule({"seg": 1.0, "depth": 0.25}).weights
        tensor([1.0000, 0.2500])
    """

    needs: ClassVar[Literal["nothing", "losses", "norms", "gradients"]] = "nothing"

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        name = type(self).__name__
        check(name, isinstance(weights, Mapping), "weights", "a mapping from task to number", weights)
        self.tasks = check_task_names(list(weights), caller=name)
        check_positive_by_task(weights, self.tasks, caller=name, parameter="weights")
        self._given = [float(weights[task]) for task in self.tasks]
        self.loss_weights = torch.tensor(self._given, dtype=dtype, device=device)

    @property
    def weights(self) -> Tensor:
        """The weights, shape (T,)."""
        return self.loss_weights

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Move the weights; in any precision they are the given numbers, rounded once."""
        dtype, device = dtype or self.loss_weights.dtype, device or self.loss_weights.device
        self.loss_weights = torch.tensor(self._given, dtype=dtype, device=device)

    def count_step(self) -> None:
        """Do nothing."""

    def discard_step(self) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: the weights are an argument, not state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the given weights.

        Raises:
            ValueError: the state is another strategy's.
        """
        if state:
            raise ValueError(
                f"{type(self).__name__}: the state should be empty, as fixed weights have none; it is from {kind_of(state)}."
            )
