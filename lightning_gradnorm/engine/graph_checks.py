"""Checks on the autograd graph, before the first backward pass, that the gradient we would read belongs to that task alone.

A head that another task reads too, a loss that bypasses its head, a shared layer behind a compiled graph: each would give
plausible numbers and a wrong balance. Here each raises an error that tells you how to fix it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import Node

from lightning_gradnorm.engine.step_state import BatchState, WatchedLoss, nodes_by_task
from lightning_gradnorm.gradients import GradientReader, ReplayedGradients, nodes_on_paths, reason_not_retraversable
from lightning_gradnorm.gradients.graph import node_of, reachable_nodes
from lightning_gradnorm.gradients.loss_graph import names_in, reached_by


class GraphChecks:
    """Selects, with the first task of the first batch, the first reader that can read it; checks all tasks against it.

    Args:
        caller: begins each error.
        candidates: readers in order of preference; empty for a rule that reads no gradients.
        at_heads: True if gradients are read at the branches of heads, False if at the losses.
    """

    def __init__(self, caller: str, candidates: Sequence[GradientReader], *, at_heads: bool) -> None:
        self._caller = caller
        self.readers = list(candidates)
        """The candidates; after selection only the selected one."""
        self._at_heads = at_heads
        self.is_selected = False
        """Whether a task has been read, so that only one reader is left."""
        self._passed: set[str] = set()
        self._disjoint: set[str] = set()
        self._separate: set[str] = set()

    def select_reader(self, batch: BatchState) -> GradientReader | None:
        """Return the reader of all tasks of a batch, at least one; check the graph of those that appear for the first time.

        Raises:
            ValueError: what we would read is not a task's gradient.
        """
        if not self.readers:
            return None
        losses = [(task, loss) for task, of_task in batch.losses.items() for loss in of_task]
        if not self.is_selected:
            # By the first loss. If none can read it, raise the error of the most preferred one.
            able = (reader for reader in self.readers if not self._why_unreadable(reader, *losses[0], batch))
            self.readers, self.is_selected = [next(able, self.readers[0])], True
        (reader,) = self.readers
        if reader in batch.transformed:
            raise ValueError(
                f"{self._caller}: {reader.label} is called inside a transform of torch.func (vmap, grad, jvp, …) or for "
                f"forward-mode derivatives, where the gradient that arrives at its output cannot be read. {reader.way_out}"
            )
        new = {task: of_task[0].node for task, of_task in batch.losses.items() if task not in self._passed}
        if len(new) > 1 and self._are_readable(new, batch):
            self._passed |= new.keys()  # all of them at once; otherwise one by one
        for task, loss in losses:
            is_known = task in self._passed
            reason = reader.why_unreadable(loss.node) if is_known else self._why_unreadable(reader, task, loss, batch)
            if reason:
                raise ValueError(f"{self._caller}: the loss of task '{task}' {reason}")
        self._passed |= new.keys()
        return reader

    def require_disjoint_losses(self, batch: BatchState) -> None:
        """Check, once for each task, that no loss contains the loss of another task.

        Raises:
            ValueError: the weight of one task would act on two.
        """
        if self._disjoint >= batch.losses.keys():
            return
        self._disjoint |= set(batch.losses)
        # Several losses may be outputs of one node, for example of unbind.
        nodes = {node: task for task, of_task in nodes_by_task(batch.losses).items() for node in of_task}
        owned: dict[str, list[Node]] = {}
        for node, task in nodes.items():
            owned.setdefault(task, []).append(node)
        reached = reached_by(owned)
        if all(names_in(reached[node], [*owned]) == [task] for task, of_task in owned.items() for node in of_task):
            return
        for start, task in nodes.items():
            for node in nodes_on_paths([start], nodes.keys() - {start}):
                if nodes.get(node, task) != task:
                    raise ValueError(
                        f"{self._caller}: the loss of task '{task}' contains that of task '{nodes[node]}', so the weight of "
                        f"'{task}' would act on both. Give each task a loss of its own, and add them up in 'loss'."
                    )

    def require_separate_heads(self, backpropagated: Tensor, batch: BatchState) -> None:
        """Check, once per task, that only its loss reaches its head, and not, for example, a regularizer of the head's output.

        Raises:
            ValueError: the gradient at the head would not be the loss's alone.
        """
        if self._separate >= batch.branches.keys():
            return
        self._separate |= set(batch.branches)
        losses = {node for nodes in nodes_by_task(batch.losses).values() for node in nodes}
        reached = reachable_nodes([node_of(backpropagated)], stop=losses)
        for task, branches in batch.branches.items():
            if task in batch.losses and branches & reached:
                raise ValueError(
                    f"{self._caller}: the backward pass reaches the head of task '{task}' by other paths than the task's loss "
                    f"(for example from a regularizer of the head's output; and the loss given must be the very tensor, not a "
                    f"copy), so the loss's own gradient cannot be separated at the head. Leave heads out: then each loss gets "
                    f"its own pass."
                )

    def require_readable_at_losses(self, tasks: Collection[str], batch: BatchState) -> None:
        """Check that a first-order pass from the loss can read the tasks that do not keep to their head.

        Raises:
            ValueError: the pass goes through a graph that cannot be traversed twice.
        """
        starts = {task: [loss.node for loss in batch.losses.get(task, ())] for task in tasks}
        for reader in self.readers if starts else ():
            if not _obstacle(set().union(*starts.values()), reader.targets):
                continue  # for all of them
            for task, of_task in starts.items():
                if cause := _obstacle(of_task, reader.targets):
                    raise ValueError(
                        f"{self._caller}: in this batch the loss of task '{task}' does not pass its head alone, but reaches "
                        f"{reader.label} through {cause}"
                    )

    def _are_readable(self, tasks: Mapping[str, Node], batch: BatchState) -> bool:
        """Return True if `_why_unreadable` would find nothing for any task, by a few walks for all of them together.

        Args:
            tasks: task → the node of its loss.
            batch: the batch.
        """
        (reader,) = self.readers
        targets, roots = reader.targets, {task: [node] for task, node in tasks.items()}
        ends, everyone = set(map(node_of, targets)), (1 << len(tasks)) - 1
        starts: set[Node] = set(tasks.values())
        reached = reached_by(roots)
        if _union(reached, ends) != everyone:
            return False  # some task does not depend on the targets
        if self._at_heads:
            bits = {task: 1 << bit for bit, task in enumerate(tasks)}
            own = {node: bits.get(task, 0) for task, nodes in batch.branches.items() for node in nodes}
            if any(reached.get(node, 0) & ~bit for node, bit in own.items()):
                return False  # some task reads another's head
            if _union(reached_by(roots, kept=own), ends):
                return False  # some task does not pass its head alone
            starts = {node for node, bit in own.items() if bit}
        if _obstacle(starts, targets):
            return False
        return not (
            isinstance(reader, ReplayedGradients)
            and nodes_on_paths([*tasks.values(), *reader.argument_nodes], reader.shared, stop=ends)
        )

    def _why_unreadable(self, reader: GradientReader, task: str, loss: WatchedLoss, batch: BatchState) -> str | None:
        """Return why this reader cannot read the task (the end of an error message), or None."""
        if reason := reader.why_unreadable(loss.node):
            return reason
        targets, label = reader.targets, reader.label
        if not nodes_on_paths([loss.node], targets):
            return (
                f"does not depend on {label}. Name a layer that all tasks share. (Activation checkpointing hides it, unless "
                f"it is called with use_reentrant=False.)"
            )
        ends = {node_of(tensor) for tensor in targets}  # a gradient that ends there does not pass the node
        own = batch.branches.get(task, set())
        if self._at_heads:
            leave_out = "Leave heads out: then each loss gets its own first-order pass."
            others = {node: other for other, nodes in batch.branches.items() if other != task for node in nodes}
            reached = sorted({others[node] for node in reachable_nodes([loss.node]) if node in others})
            if reached:
                if reason_not_retraversable(reachable_nodes([loss.node], stop=others)):
                    leave_out = "Or are they computed by one compiled function? Compile each by itself, or none."
                return (
                    f"also reads the head of '{reached[0]}' and not its head alone, so their gradients cannot be separated "
                    f"at the heads. Are the names in heads swapped? Are the losses pieces of one tensor? {leave_out}"
                )
            around = nodes_on_paths([loss.node], targets, stop=own)
            if cause := reason_not_retraversable(around - ends):
                return f"reaches {label} through {cause}"
            if around and not own:
                return (
                    f"does not visibly pass its head: a head is seen when it is called (itself, not its forward) "
                    f"with tensors, or with tuples, lists and dicts of tensors, outside the transforms of torch.func. "
                    f"{leave_out}"
                )
            if around:
                return f"reaches {label} by a path that does not pass its head. {leave_out}"
        if cause := _obstacle(own if self._at_heads else [loss.node], targets):
            return f"reaches {label} through {cause}"
        if isinstance(reader, ReplayedGradients) and nodes_on_paths(
            [loss.node, *reader.argument_nodes], reader.shared, stop=ends
        ):
            return f"reaches the shared layer by a path that does not pass {label}."
        return None


def _union(reached: Mapping[Node, int], nodes: Iterable[Node]) -> int:
    return functools.reduce(operator.or_, (reached.get(node, 0) for node in nodes), 0)


def _obstacle(start: Iterable[Node], targets: Sequence[Tensor]) -> str | None:
    """Return why the graph on the path to ``targets`` cannot be traversed again, or None. The path stops at its ends."""
    return reason_not_retraversable(nodes_on_paths(start, targets) - set(map(node_of, targets)))


def require_backpropagated(
    shown: Iterable[str], reached: Collection[str], *, caller: str, noun: str = "loss of task"
) -> None:
    """Check that the backward pass reached every loss that was shown.

    Raises:
        ValueError: it missed one.
    """
    for name in shown:
        if name not in reached:
            raise ValueError(
                f"{caller}: what was given as the {noun} '{name}' took no part in the backward pass. Add it to what is "
                f"back-propagated; give the very tensor, not a copy of it such as .clone() or .mean(), or an expression "
                f"computed a second time, such as 0.1 * loss: compute it once, then log and add that variable. Give it "
                f"before backward (in manual optimization, before manual_backward). In a batch that leaves it out, give None."
            )
