"""Detects a task that holds nearly all of the weight without using it: it cannot be learned, or has nothing left to learn."""

from __future__ import annotations

import math
from statistics import fmean, pvariance

SHARE = 0.9
"""Share of the sum of the weights: a task that holds more dominates."""
STRETCH = 100
"""Updates in a row after which we judge whether the loss has fallen."""


class Domination:
    """Judges stretches of 100 updates in which one task holds more than 90 % of the weight. Works on host numbers.

    The loss has fallen if its mean over the second half of a stretch is below that over the first half by more than the
    standard error of their difference. It has vanished if it is below 1 % of its ``L_i(0)`` and far ahead of the others'.

    Example:
        >>> domination = Domination()
        >>> for _ in range(100):
        ...     domination.note("noise", loss=2.3, ratio=1.0, rate=1.2)
        >>> domination.updates, domination.found["noise"][:40]
        (100, "task 'noise' has held more than 90 % of ")
    """

    def __init__(self) -> None:
        self.task: str | None = None
        """The task that dominates now."""
        self._losses: list[float] = []
        self.updates = 0
        """Updates in stretches that were found dominated."""
        self.found: dict[str, str] = {}
        """Task → message about it."""

    def note(self, task: str | None, loss: float = 0.0, ratio: float = 1.0, rate: float = 1.0) -> None:
        """Called for each update with the task that dominates, or ``None``.

        Args:
            task: its name.
            loss: its ``L_i``.
            ratio: its ``L_i / L_i(0)``.
            rate: that ratio over the mean of all tasks' ratios.
        """
        if task != self.task:
            self.task = task
            self._losses.clear()
        if task is None:
            return
        self._losses.append(loss)
        if len(self._losses) < STRETCH:
            return
        first, last = self._losses[: STRETCH // 2], self._losses[STRETCH // 2 :]
        noise = math.sqrt((pvariance(first) + pvariance(last)) / len(first))
        why = ""
        if fmean(last) >= fmean(first) - noise:
            why = (
                f"and its loss has not fallen (mean {fmean(first):.4g} over the first half, {fmean(last):.4g} over the "
                f"second). If the task is solved, ignore this. If it never learns"
            )
        elif 0 <= ratio < 0.01 and rate < 0.1:
            why = (
                f"though its loss has all but vanished ({100 * ratio:.2g} % of L_i(0)). So has its gradient, and GradNorm "
                f"compensates for that, most of all with alpha=0. A larger alpha limits it. Other fixes"
            )
        if why:
            self.updates += STRETCH
            self.found.setdefault(
                task,
                f"task '{task}' has held more than {100 * SHARE:.0f} % of the weight for {STRETCH} updates, {why}: "
                f"leave the task out, give it a lower priority (priorities=…), raise min_weight, slow the weights down "
                f"(optimizer=partial(torch.optim.Adam, lr=0.005)), or freeze them after a while (stop_after=…).",
            )
        self._losses.clear()
