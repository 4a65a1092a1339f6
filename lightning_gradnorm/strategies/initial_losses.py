"""``L_i(0)``: the losses that training rates are measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm.strategies.resuming import ResumeOptions, say_what_is_in_force


class InitialLosses:
    """Each task's mean loss over the first updates in which it counts, or a given number.

    While ``alpha > 0`` a task's first loss is its first positive one.

    Args:
        tasks: the tasks' names.
        given: the number of updates to average over; or numbers by task, for some or all. The others use their first loss.
        alpha: the asymmetry.
        like: has the precision and the device of the weights.

    Example:
        >>> initial = InitialLosses(["seg", "depth"], 2, 1.5, torch.ones(2))
        >>> for losses in torch.tensor([[4.0, 1.0], [2.0, 1.0], [0.5, 0.5]]):
        ...     _ = initial.propose(losses, None)
        ...     initial.accept()
        >>> initial.values
        tensor([3., 1.])
    """

    def __init__(self, tasks: Sequence[str], given: int | Mapping[str, float], alpha: float, like: Tensor) -> None:
        self._tasks, self._given, self._alpha = tasks, given, alpha
        self._proposed: tuple[Tensor, Tensor] | None = None
        self._place(like)

    def _place(self, like: Tensor) -> None:
        numbers = self._given if isinstance(self._given, Mapping) else {}
        count = 1 if isinstance(self._given, Mapping) else self._given
        self.values = like.new_tensor([numbers.get(task, 0.0) for task in self._tasks])
        """``L_i(0)`` as far as it is known, shape (T,); 0 for a task that has not been seen."""
        self._needed = like.new_tensor([0 if task in numbers else count for task in self._tasks])
        self._updates_seen = torch.zeros_like(self.values)
        self.are_final = False
        """Whether all values are final, and positive unless ``alpha`` is 0."""
        self._is_fresh = True

    def to(self, like: Tensor) -> None:
        """Move all numbers. Given numbers are converted again, so float64 does not get numbers rounded to float32."""
        if self._is_fresh:
            self._place(like)
        for name in ("values", "_needed", "_updates_seen"):
            setattr(self, name, getattr(self, name).to(like))

    def propose(self, losses: Tensor, present: Tensor | None) -> Tensor:
        """Return the values if the update with these losses is taken; `accept` then commits them."""
        counts = self._updates_seen < self._needed
        if present is not None:
            counts &= present
        if self._alpha > 0:
            counts &= (losses > 0) | (self._updates_seen > 0)
        updates_seen = self._updates_seen + counts
        mean = self.values + (losses - self.values) / updates_seen.clamp(min=1)
        self._proposed = torch.where(counts, mean, self.values), updates_seen
        return self._proposed[0]

    def accept(self) -> None:
        """Commit the last proposal. Synchronizes with the device."""
        assert self._proposed is not None
        self.values, self._updates_seen = self._proposed
        self._is_fresh = False
        final = (self._updates_seen >= self._needed) & ((self.values > 0) | (self._alpha == 0))
        self.are_final = bool(final.all())

    def state_dict(self) -> dict[str, Tensor]:
        """Return all state."""
        return {
            "initial_losses": self.values.clone(),
            "updates_seen": self._updates_seen.clone(),
            "updates_in_initial": self._needed.clone(),
        }

    def resumed(self, state: Mapping[str, Any], is_new: Tensor, resume_options: ResumeOptions) -> InitialLosses:
        """Return a copy with a checkpoint's values, in the order of the tasks; values it does not know stay as here.

        With ``resume_options="given"``, numbers given here replace the checkpoint's, and a count given here continues from
        the updates already seen. After a given number the count starts anew.
        """
        values, seen = (state[name].to(self.values) for name in ("initial_losses", "updates_seen"))
        was_given = (seen == 0) & (values != 0)
        # Older checkpoints do not store the count: we assume this run's, except where a number was given.
        saved = state.get("updates_in_initial", torch.where(was_given, 0.0, self._needed)).to(self.values)
        is_unknown = is_new | ((seen == 0) & (values == 0))
        is_number = self._needed == 0
        # The checkpoint's precision may be lower: its numbers are this run's, rounded.
        same_number = torch.isclose(values, self.values, rtol=1e-6, atol=0.0)
        differs = ~is_unknown & ((self._needed != saved) | (is_number & ~same_number))
        if bool(differs.any()):
            there, here = self._described(values, saved, differs), self._described(self.values, self._needed, differs)
            say_what_is_in_force("initial_losses", there, here, resume_options)
        prefers_given = resume_options == "given"
        takes_own = is_unknown | (differs & is_number & prefers_given)
        counts_anew = differs & ~is_number & (saved == 0) & prefers_given
        found = InitialLosses(self._tasks, self._given, self._alpha, self.values)
        found.values = torch.where(takes_own, self.values, values.masked_fill(counts_anew, 0.0))
        found._updates_seen = seen.masked_fill(takes_own, 0.0)
        found._needed = torch.where(takes_own | prefers_given, self._needed, saved)
        found._is_fresh = False
        return found

    def _described(self, values: Tensor, needed: Tensor, which: Tensor) -> dict[str, object]:
        """Return, for some tasks, the given number, or how many losses a value averages."""
        rows = zip(self._tasks, values.tolist(), needed.tolist(), which.tolist(), strict=True)
        return {
            task: f"mean of {int(count)}" if count else float(f"{value:.4g}")
            for task, value, count, is_one in rows
            if is_one
        }
