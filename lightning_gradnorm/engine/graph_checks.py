"""Looks along the autograd graph, before the first backward pass, whether what will be read is the task's gradient.

A head that another task reads too, a loss that goes around its head, a shared layer behind a compiled graph: each would
give plausible numbers and a wrong balance. Here each is an error that says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_gradnorm.engine.step_state import Pass
from lightning_gradnorm.gradients import GradientReader, ReplayedGradients, nodes_between, unwalkable
from lightning_gradnorm.gradients.graph import node_of, nodes_behind


class Audit:
    """Chooses, with the first task that comes, the first reader that can read it, and checks all tasks against it.

    Args:
        asked_by: the callback's name, the beginning of each error.
        readers: in order of preference; empty for a strategy that reads nothing.
        at_heads: whether gradients are read at the branches of heads, or else at the losses.
    """

    def __init__(self, asked_by: str, readers: Sequence[GradientReader], *, at_heads: bool) -> None:
        self._asked_by = asked_by
        self.readers = list(readers)
        """Those among which the first task is still to choose; then the chosen one."""
        self._at_heads = at_heads
        self._chosen = False
        self._passed: set[str] = set()

    def examine(self, task: str, loss: Tensor, current: Pass) -> GradientReader | None:
        """Return the reader that is to read this task, after a look at the graph the first time the task comes.

        Raises:
            ValueError: its gradient would not be what is read.
        """
        if task in self._passed:
            return self.readers[0] if self.readers else None
        self._passed.add(task)
        if not self.readers:
            return None
        if not self._chosen:
            # If there is none, the first one's objection is the one to be understood.
            able = (reader for reader in self.readers if not self._objection(reader, task, loss, current))
            self.readers = [next(able, self.readers[0])]
            self._chosen = True
        (reader,) = self.readers
        if objection := self._objection(reader, task, loss, current):
            raise ValueError(f"{self._asked_by}: the loss of task '{task}' {objection}")
        return reader

    def _objection(self, reader: GradientReader, task: str, loss: Tensor, current: Pass) -> str | None:
        """Return what speaks against reading the task with this reader, the end of a sentence."""
        if objection := reader.objection(loss):
            return objection
        sought, where = reader.sought, reader.where
        if not nodes_between([node_of(loss)], sought):
            return (
                f"does not depend on {where}. Name a layer that all tasks share. (Activation checkpointing hides it, unless "
                f"it is called with use_reentrant=False.)"
            )
        ends = {node_of(tensor) for tensor in sought}  # a gradient arrives there without passing it
        own = current.branches.get(task, set())
        if self._at_heads:
            leave_out = "Leave heads out: then each loss gets a first-order pass of its own."
            others = {node: other for other, nodes in current.branches.items() if other != task for node in nodes}
            reached = sorted({others[node] for node in nodes_behind([node_of(loss)]) if node in others})
            if reached:
                return (
                    f"also reads the head of '{reached[0]}' and not its head alone, so that their gradients cannot be told "
                    f"apart at the heads. Are the names in heads exchanged? Are the losses pieces of one tensor? {leave_out}"
                )
            around = nodes_between([node_of(loss)], sought, stop=own)
            if around and (cause := unwalkable(around - ends)):
                return f"reaches {where} through {cause}"
            if around and not own:
                return (
                    f"does not pass its head as far as one can see: a head is seen when it is called (itself, not its forward) "
                    f"with tensors, or with tuples, lists and dicts of tensors. {leave_out}"
                )
            if around:
                return f"reaches {where} by a way that does not pass its head. {leave_out}"
        if cause := unwalkable(nodes_between(own if self._at_heads else [node_of(loss)], sought) - ends):
            return f"reaches {where} through {cause}"
        if isinstance(reader, ReplayedGradients) and nodes_between(
            [node_of(loss), *reader.before_calls], reader.shared, stop=ends
        ):
            return f"reaches the shared layer by a way that does not pass {where}."
        return None


def check_heads_apart(back_propagated: Tensor, current: Pass, *, asked_by: str) -> None:
    """Refuse to read at heads what comes to a head from elsewhere than its task's loss, from a regularizer of its output say.

    Raises:
        ValueError: names the head's task.
    """
    losses = {node_of(loss) for losses in current.losses.values() for loss in losses}
    behind = nodes_behind([node_of(back_propagated)], stop=losses)
    for task, branches in current.branches.items():
        if task in current.losses and branches & behind:
            raise ValueError(
                f"{asked_by}: what the backward pass begins with reads the head of task '{task}' besides the task's loss (in a "
                f"regularizer of its output, say; and the loss given should be the very tensor, not a copy), so that the "
                f"loss's own gradient cannot be told apart at the head. Leave heads out: then each loss gets a pass of its own."
            )


def check_apart(current: Pass, *, asked_by: str) -> None:
    """Refuse a loss of which another task's loss is a part.

    Raises:
        ValueError: the weight of one task would act on two.
    """
    losses = [(task, loss) for task, losses in current.losses.items() for loss in losses]
    nodes = {node_of(loss): task for task, loss in losses}  # several losses may be outputs of one node, as of unbind
    for task, loss in losses:
        others = [other for _, other in losses if node_of(other) is not node_of(loss)]
        for node in nodes_between([node_of(loss)], others):
            if nodes.get(node, task) != task:
                raise ValueError(
                    f"{asked_by}: the loss of task '{task}' contains that of task '{nodes[node]}', so that the weight of "
                    f"'{task}' would act on both. Give each task a loss of its own, and add them up in 'loss'."
                )
