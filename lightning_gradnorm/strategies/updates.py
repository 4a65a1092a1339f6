"""Weight updates of rules that need gradient norms: their contents, and what happened to them.

Outcomes are read only when someone needs them, so the host does not wait for a GPU in each step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gradnorm.strategies.domination import SHARE, Domination
from lightning_gradnorm.strategies.zero_gradients import PATIENCE, ZeroGradients

_MAX_PENDING = 1000  # updates that the host has not read; then it does, so they do not pile up


class GradNormTerms(NamedTuple):
    """The quantities of one weight update; tensors of shape (T,), NaN at absent tasks."""

    grad_norms: Tensor
    """``G_i``"""
    rates: Tensor
    """``r_i``"""
    targets: Tensor
    """``Ḡ · p_i · r_i^alpha``"""
    gradient: Tensor
    """``∂L_grad / ∂w_i``"""
    ratios: Tensor
    """``L_i / L_i(0)``"""

    @property
    def loss(self) -> Tensor:
        """``L_grad``, a scalar."""
        return (self.grad_norms - self.targets).abs().nansum()


class WeightUpdate(NamedTuple):
    """The inputs and the outcome of one weight update; tensors of shape (T,)."""

    norms: Tensor
    losses: Tensor
    present: Tensor
    """The tasks that counted."""
    shown: Tensor
    """The tasks that had a loss."""
    with_gradient: Tensor
    """The tasks that had a loss with a gradient."""
    problems: Tensor
    """Nonzero where a number prevents the update: a loss is not finite, or negative although ``alpha > 0``; shape (T,)."""
    terms: GradNormTerms | None
    """For GradNorm only; meaningless if the update was not taken."""
    taken: Tensor
    """Whether the weights changed, a bool tensor; False if an input or the result is not usable."""

    @property
    def tasks_at_fault(self) -> Tensor:
        """The tasks whose numbers prevented the update, bool of shape (T,)."""
        bad = self.present & ~((self.problems == 0) & self.norms.isfinite())
        # If every input is fine, the result overflowed, and all tasks contributed to it.
        return torch.where(bad.any(), bad, self.present) & ~self.taken


class Outcomes:
    """Counts what went wrong in the updates of one training, and describes it.

    All counts but ``skipped`` restart with the training or its resumption: they are not part of the state.

    Args:
        tasks: the tasks' names.
        explain: returns why a task with this loss prevented the update, as the beginning of a sentence.
        counter: name under which the number of skipped updates is logged.
        absent_tasks: how absent tasks are treated, if the rule leaves the choice.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        explain: Callable[[str, float], str],
        counter: str,
        absent_tasks: Literal["leave_out", "last_seen"] | None = None,
    ) -> None:
        self._tasks, self._explain, self._counter, self._absent_tasks = tasks, explain, counter, absent_tasks
        self.skipped = 0
        """Updates that were not taken because of an unusable number."""
        self.tasks_at_fault: dict[str, float] = {}
        """Tasks whose numbers prevented an update → their loss in the last such update."""
        self.last: WeightUpdate | None = None
        """The last update that was taken."""
        self.zero_gradients = ZeroGradients(tasks)
        self.domination = Domination()
        self.remarks: dict[str, str] = {}
        """What to report to the user: a key, reported once → the message, without the caller's name."""
        self._pending: list[WeightUpdate] = []
        self._updates = self._updates_of_several = 0

    def resume(self, skipped: int) -> None:
        """Continue after this many skipped updates. Unread updates belong to the old weights and are dropped."""
        self._pending, self.skipped = [], skipped
        self.domination.note(None)

    def add(self, update: WeightUpdate, *, read: bool) -> None:
        """Add an update; with ``read``, or if many are waiting, read all updates so far."""
        self._pending.append(update)
        if read or len(self._pending) == _MAX_PENDING:
            self.read()

    def read(self) -> None:
        """Read the updates added since the last time. Synchronizes with the device."""
        if not (updates := self._pending):
            return
        table = _rows(
            [one for u in updates if u.terms for one in (u.norms, u.losses, u.terms.grad_norms, u.terms.ratios)]
        )
        presence = _rows([one for u in updates for one in (u.shown, u.with_gradient, u.present)])
        all_taken = len(updates) > 1 and bool(torch.stack([u.taken for u in updates]).all())
        self._pending = []
        for index, update in enumerate(updates):
            shown, with_gradient, present = presence[3 * index : 3 * index + 3]
            self._updates += 1
            self._updates_of_several += sum(map(operator.or_, shown, present)) > 1
            self.zero_gradients.note(shown, with_gradient)
            if all_taken or update.taken:
                self.last = update
                if update.terms is not None:
                    self._note_domination(table[4 * index : 4 * index + 4], shown, present)
            else:
                self._note_fault(update)
        self._remark()

    def _note_fault(self, update: WeightUpdate) -> None:
        self.skipped += 1
        per_task = zip(self._tasks, update.losses.tolist(), update.tasks_at_fault.tolist(), strict=True)
        at_fault = {task: loss for task, loss, is_at_fault in per_task if is_at_fault}
        self.tasks_at_fault |= at_fault
        for task, loss in at_fault.items():
            self.remarks.setdefault(
                f"{task}: not updated",
                f"{self._explain(task, loss)}; the weights stay as they are. Further such steps are counted in "
                f"{self._counter}.",
            )

    def _note_domination(self, numbers: list[list[float]], shown: list[bool], present: list[bool]) -> None:
        norms, losses, grad_norms, ratios = numbers
        T, now = len(self._tasks), self.domination.task
        dominates = [here and SHARE * T * n < G for G, n, here in zip(grad_norms, norms, present, strict=True)]
        if True in dominates:
            i = dominates.index(True)
        elif now is None or present[self._tasks.index(now)]:
            return self.domination.note(None)
        elif shown[i := self._tasks.index(now)]:
            pass  # its gradient is zero, so its weight stays
        else:
            return None  # it is absent, and keeps its weight
        all_ratios = [ratio for ratio, here in zip(ratios, present, strict=True) if here and ratio > 0]
        ratio = ratios[i] if present[i] else 1.0
        rate = ratio * len(all_ratios) / sum(all_ratios) if all_ratios else 1.0
        return self.domination.note(self._tasks[i], losses[i], ratio, rate)

    def _remark(self) -> None:
        for task in self.zero_gradients.lasting:
            takes_part = self._absent_tasks == "last_seen"
            fate = "it counts with its last numbers, if it had any" if takes_part else "its weight stays as it is"
            self.remarks.setdefault(
                f"{task}: no gradient",
                f"the gradient of task '{task}' at the shared layer has been exactly 0 in the last {PATIENCE} updates (a "
                f"coefficient of 0, masked labels, a constraint that holds?). While that lasts, the task counts as absent: "
                f"{fate}.",
            )
        for task, message in self.domination.found.items():
            self.remarks.setdefault(f"{task}: dominates", message)

    def end_epoch(self) -> None:
        """Called at the end of an epoch: check whether any of its updates had two tasks to balance."""
        self.read()
        if self._updates and not self._updates_of_several:
            takes_part = self._absent_tasks == "last_seen"
            what = "had two tasks been seen" if takes_part else "were two tasks present"
            remedies = [
                "mix the tasks in each batch (CombinedLoader(…, mode='max_size_cycle'))",
                "accumulate batches until a step covers all tasks (accumulate_grad_batches)",
            ]
            if takes_part:
                remedies.append("measure in each step (update_every=1)")
            elif self._absent_tasks == "leave_out":
                remedies.append("let an absent task count with its last numbers (absent_tasks='last_seen')")
            self.remarks.setdefault(
                "one task at a time",
                f"in none of the last {self._updates} weight updates {what}, so nothing has been balanced. Possible fixes: "
                f"{'; or '.join(remedies)}.",
            )
        self._updates = self._updates_of_several = 0


class ReadsOutcomes:
    """Base of rules that make weight updates: what happened to these. Each property synchronizes with the device."""

    outcomes: Outcomes
    """The outcomes read so far."""

    def _read_outcomes(self) -> Outcomes:
        self.outcomes.read()
        return self.outcomes

    @property
    def skipped(self) -> int:
        """Number of updates that were not taken because of an unusable number."""
        return self._read_outcomes().skipped

    @property
    def tasks_at_fault(self) -> dict[str, float]:
        """Tasks whose numbers prevented an update → their loss in the last such update."""
        return self._read_outcomes().tasks_at_fault

    @property
    def tasks_without_gradient(self) -> list[str]:
        """Tasks whose norm has been exactly 0 in the last 50 updates."""
        return self._read_outcomes().zero_gradients.lasting

    @property
    def remarks(self) -> Mapping[str, str]:
        """What to report to the user about the updates so far: key → message."""
        return self._read_outcomes().remarks

    @property
    def last(self) -> WeightUpdate | None:
        """The last update that was taken, ``None`` before the first."""
        return self._read_outcomes().last

    def end_epoch(self) -> None:
        """Check, at the end of an epoch, whether any of its updates had two tasks to balance."""
        self.outcomes.end_epoch()


def _rows(vectors: Sequence[Tensor]) -> list[Any]:
    """Return the numbers of vectors of shape (T,), and wait for a GPU at most once."""
    if not vectors:
        return []
    return [one.tolist() for one in vectors] if vectors[0].is_cpu else torch.stack(list(vectors)).tolist()
