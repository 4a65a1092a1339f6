"""Finds the shared layer and the heads of a model, if you have not named them, from the graphs of its first batches.

The shared layer is the deepest trained weight that every task's loss depends on, provided that all tasks move some entry of
it. A head is the first module called that belongs to one task alone. All ranks decide together. A task that has not been seen
yet does not count; when it appears, the shared layer is looked for again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_gradnorm.engine.call_recorder import CallRecorder
from lightning_gradnorm.engine.layers import ALL, trained_layers
from lightning_gradnorm.engine.measurement import Setting
from lightning_gradnorm.engine.step_state import WatchedLoss, nodes_by_task
from lightning_gradnorm.gradients import BufferGuard, RepeatedPasses, flat_row, reason_not_retraversable, row_width
from lightning_gradnorm.gradients.graph import first_order_pass, has_gradient, node_of, reachable_nodes
from lightning_gradnorm.gradients.loss_graph import LossGraph, Position, names_in, reached_by

_PATIENCE = 50
"""Batches in which a task may be missing before we decide the heads without it."""

Losses = Mapping[str, Sequence[WatchedLoss]]


@dataclass
class _Seen:
    """What one rank, or all ranks, have seen so far."""

    positions: dict[str, dict[str, Position]] = field(default_factory=dict)
    """Layer → task → its depth."""
    tasks: set[str] = field(default_factory=set)
    frozen: dict[str, set[str]] = field(default_factory=dict)
    """Frozen parameter → the tasks that may depend on it."""
    opaque: str | None = None
    """Why part of a graph is hidden."""

    def merge(self, other: _Seen) -> None:
        for name, of_task in other.positions.items():
            self.positions.setdefault(name, {}).update(of_task)
        self.tasks |= other.tasks
        for name, tasks in other.frozen.items():
            self.frozen.setdefault(name, set()).update(tasks)
        self.opaque = self.opaque or other.opaque


class Discovery:
    """Inspects the graph of a batch before its backward pass.

    Args:
        setting: the model, the ranks and the tasks.
        is_recorded: whether a module called now belongs to a forward pass that is trained on.
        fallback: the layer to use if the graph is hidden, for example by compiled code; may be empty.
    """

    def __init__(self, setting: Setting, is_recorded: Callable[[], bool], fallback: Mapping[str, nn.Parameter]) -> None:
        self._setting = setting
        self._fallback = fallback
        self._calls = CallRecorder(setting.model, is_recorded)
        self._buffers = BufferGuard(setting.model.buffers())
        self._repeats = RepeatedPasses(f"{setting.caller}: the gradient of task")
        self._seen = _Seen()
        self._layer: Mapping[str, nn.Parameter] | None = None
        """The shared layer of the tasks seen so far."""
        self._graph: LossGraph | None = None
        self._batches = 0
        self._has_warned = False
        self.has_new_losses = False
        """Whether any rank had losses when `find_layer` was called last."""

    def close(self) -> None:
        """Remove all hooks from the model."""
        self._calls.close()
        self._repeats.forget_graph()

    def start_batch(self) -> None:
        """Forget the last forward pass."""
        self._calls.start_batch()
        self._graph = None
        self._repeats.forget_graph()

    def _graph_of(self, losses: Losses) -> LossGraph:
        """Return the graph of these losses. One graph serves both the layer and the heads, unless a loss came in between."""
        roots = nodes_by_task(losses)
        if self._graph is None or self._graph.roots != roots:
            self._graph = LossGraph(roots)
        return self._graph

    # ---- the shared layer --------------------------------------------------------------------------------------------

    @property
    def has_seen_all(self) -> bool:
        """Whether every task has been seen on some rank."""
        return self._seen.tasks >= set(self._setting.tasks)

    def find_layer(self, losses: Losses) -> Mapping[str, nn.Parameter] | None:
        """Return the shared layer of the tasks seen so far, by name, or ``None`` while there are fewer than two. Collective.

        Raises:
            ValueError: these tasks share no trained layer.
        """
        model, ranks = self._setting.model, self._setting.loop.ranks
        now = set().union(*ranks.gather_objects(set(losses)))
        self.has_new_losses = bool(now)
        if now <= self._seen.tasks:
            return self._layer
        layers = trained_layers(model)
        graph = self._graph_of(losses)
        positions = graph.positions({name: list(layer.values()) for name, layer in layers.items()}, self._calls.calls)
        here = _Seen(positions, set(losses), self._frozen(graph), reason_not_retraversable(graph.nodes))
        for seen in ranks.gather_objects(here):
            self._seen.merge(seen)
        if len(self._seen.tasks) < 2:
            return None
        hidden = self._fallback if self._seen.opaque else {}
        self._layer = hidden or self._deepest_moved_by_all(losses, layers, now)
        if self._layer is None:
            self._require_frozen_part()
        return self._layer

    def _frozen(self, graph: LossGraph) -> dict[str, set[str]]:
        """Return the frozen parameters, each with the tasks that may depend on it: all tasks if the graph does not tell."""
        frozen: dict[str, set[str]] = {}
        for name, parameter in self._setting.model.named_parameters():
            if not parameter.requires_grad:
                nodes = self._calls.frozen_call(name)
                frozen[name] = set(self._setting.tasks if nodes is None else graph.tasks_at(nodes))
        return frozen

    def _deepest_first(self, names: Iterable[str]) -> list[str]:
        """Return the layers that all tasks depend on. If tasks use a layer at different depths, the least depth counts.

        Layers that meet in one operation keep the order of ``names``, which is the model's and the same on all ranks.
        """
        tasks, positions = self._seen.tasks, self._seen.positions
        shared = [name for name in names if positions.get(name, {}).keys() >= tasks]
        return sorted(shared, key=lambda name: min(positions[name].values()), reverse=True)

    def _deepest_moved_by_all(
        self, losses: Losses, layers: Mapping[str, Mapping[str, nn.Parameter]], now: Collection[str]
    ) -> Mapping[str, nn.Parameter] | None:
        """Return the first layer with an entry that all tasks move. This excludes an output layer with a row for each task.

        If some task moves no layer yet, as behind a head of zeros, return the first with an entry that all others move.

        Args:
            losses: the losses of this batch on this rank.
            layers: all trained layers.
            now: the tasks that have a loss in this batch on any rank.
        """
        fallback, rows = None, [row for row, task in enumerate(self._setting.tasks) if task in now]
        start, count, names = 0, 1, self._deepest_first(layers)
        while some := names[start : start + count]:
            widths = [row_width(list(layers[name].values())) for name in some]
            moved = self._moved(losses, [parameter for name in some for parameter in layers[name].values()])[rows]
            for name, entries in zip(some, torch.split(moved, widths, dim=1), strict=True):
                does_move = entries.any(dim=1)
                if bool(entries[does_move].all(dim=0).any()):
                    if bool(does_move.all()):
                        return layers[name]
                    fallback = fallback or layers[name]
                elif int(does_move.sum()) > 1:  # a later batch with only one of these tasks could not tell
                    del self._seen.positions[name]
            start, count = start + count, 2 * count  # all at once would cost a whole gradient per task
        return fallback

    def _moved(self, losses: Losses, W: Sequence[Tensor]) -> Tensor:
        """Return the entries that each task moves, bool of shape (T, n). Collective."""
        setting = self._setting
        moved = torch.zeros(len(setting.tasks), row_width(W), dtype=torch.bool, device=W[0].device)
        self._repeats.look_at(nodes_by_task(losses), W, once=False)
        for row, task in zip(moved, setting.tasks, strict=True):
            for loss in losses.get(task, ()):
                with self._buffers.preserved(task):
                    seeds = self._repeats.checked(task, [loss.edge], [torch.ones_like(loss.tensor)], W, once=False)
                    found = first_order_pass([loss.edge], W, seeds)
                row |= flat_row(found, W) != 0
        return setting.loop.ranks.sum(moved.float()) > 0

    def _require_frozen_part(self) -> None:
        """Warn, once, that everything the tasks share is frozen for now.

        Raises:
            ValueError: the tasks share no frozen parameter either, or part of the graph is hidden.
        """
        setting = self._setting
        model = type(setting.model).__name__
        if self._seen.opaque:
            raise ValueError(
                f"{setting.caller}: shared_layer=None found no layer that all tasks share in {model}: the losses reach "
                f"{self._seen.opaque.split('. ')[0].split(', whose')[0]}. Name the layer: shared_layer='encoder.layer4'."
            )
        frozen = [name for name, of_tasks in self._seen.frozen.items() if of_tasks >= set(setting.tasks)]
        if not frozen:
            raise ValueError(
                f"{setting.caller}: shared_layer=None found no layer at which to balance {model}: {self._why_none_is_shared()}"
            )
        if not self._has_warned:
            self._has_warned = True
            setting.loop.ranks.warn(
                f"{setting.caller}: all that the tasks share in {model} is frozen ({len(frozen)} parameters, such as "
                f"'{frozen[0]}'), so their gradients cannot be compared. The weights stay as they are until a shared layer "
                f"is trained."
            )
        self._seen = _Seen()

    def _why_none_is_shared(self) -> str:
        tasks = list(self._setting.tasks)
        reaching = [set(of_task) for of_task in self._seen.positions.values()]
        apart = [task for task in tasks if len(tasks) > 2 and set(tasks) - {task} in reaching]
        if len(apart) == 1 and set(tasks) not in reaching:
            others = [task for task in tasks if task not in apart]
            return (
                f"task '{apart[0]}' shares no trained weight with the others, {others}. Leave it out of tasks, or balance by "
                f"the losses alone, as Scalarization does."
            )
        return (
            f"the tasks {tasks} share no trained weight of two or more dimensions, or only one in which each has entries of "
            f"its own. (Is what they share detached, or computed under torch.no_grad()?) Name what they share, "
            f"shared_layer='…', or balance by the losses alone, as Scalarization does."
        )

    def warn_if_hardly_shared(self, losses: Losses, W: Mapping[str, nn.Parameter]) -> None:
        """Warn if the layer that you have named is hardly shared, or is the whole network. Collective."""
        setting, name = self._setting, ", ".join(list(W)[:2]) + (", …" if len(W) > 2 else "")
        moved = self._moved(losses, list(W.values()))
        moved = moved[moved.any(dim=1)]
        shared, entries = int(moved.all(dim=0).sum()), moved.shape[1]
        if len(moved) > 1 and shared < 0.01 * entries:
            setting.loop.ranks.warn(
                f"{setting.caller}: only {shared} of the {entries} entries of the shared layer ({name}) move the losses of all "
                f"tasks, as in an output layer with a row for each task. Name the layer before it, or leave shared_layer out."
            )
        heavy = {n for n, p in setting.model.named_parameters() if p.requires_grad and p.ndim >= 2}
        if len(heavy) > 2 and heavy <= W.keys() and setting.shared_layer != ALL:
            setting.loop.ranks.warn(
                f"{setting.caller}: the shared layer ({name}) is the whole network, but norms should be taken at the last "
                f"layer that all tasks share. Name that layer, or leave shared_layer out. If this is what you want, give 'all'."
            )

    # ---- the heads ---------------------------------------------------------------------------------------------------

    def find_heads(self, losses: Losses, targets: Sequence[Tensor]) -> dict[str, str] | None:
        """Return task → head for the tasks that have one, or ``None`` while a task is missing. Collective.

        Args:
            losses: the losses of this batch.
            targets: the tensors whose gradient is read.
        """
        self._batches += 1
        # With a single task, everything would be its head.
        heads = {}
        if len(losses) > 1:
            heads = self._graph_of(losses).heads(set(map(node_of, targets)), self._calls.possible_heads)
        of_ranks = self._setting.loop.ranks.gather_objects((heads, set(losses)))
        seen = set().union(*(tasks for _, tasks in of_ranks))
        if not seen >= set(self._setting.tasks) and self._batches < _PATIENCE:
            return None
        found: dict[str, str] = {}
        for of_rank, _ in reversed(of_ranks):
            found |= of_rank
        tasks_of = Counter(found.values())
        return {task: name for task, name in sorted(found.items()) if tasks_of[name] == 1}


def tasks_off_course(
    losses: Losses, branches: Mapping[str, set[Node]], backpropagated: Tensor, targets: Sequence[Tensor]
) -> set[str]:
    """Return the tasks whose gradient does not pass their own head alone in this forward pass.

    Args:
        losses: the losses about to be back-propagated.
        branches: the branches that each head reads.
        backpropagated: the whole loss.
        targets: the tensors whose gradient is read.
    """
    owner = {node: task for task, nodes in branches.items() for node in nodes}
    ends = set(map(node_of, filter(has_gradient, targets)))
    roots = nodes_by_task(losses)
    off = set(losses) - branches.keys()
    for node, tasks in _tasks_at_ends(roots, owner.keys() | ends).items():
        if tasks != {owner.get(node)}:
            off |= tasks | ({owner[node]} if node in owner else set())
    # Also look behind nodes older than the branches: a derivative computed on CUDA is numbered by another thread.
    rest = reachable_nodes([node_of(backpropagated)], stop=owner.keys() | set().union(*roots.values()))
    return off | {owner[node] for node in rest & owner.keys()}


def _tasks_at_ends(roots: Mapping[str, Collection[Node]], ends: Collection[Node]) -> dict[Node, set[str]]:
    """Return the tasks whose gradient comes to each of the ends, if it passes no other end before."""
    found: dict[Node, set[str]] = {}
    first_at: dict[Node, str] = {}
    for task, nodes in roots.items():
        to_visit = list(nodes)
        while to_visit:
            node = to_visit.pop()
            if node in ends:
                found.setdefault(node, set()).add(task)
            elif (first := first_at.get(node)) is None:
                first_at[node] = task
                for child, _ in node.next_functions:  # not by `children`: this runs in every batch
                    if child is not None:
                        to_visit.append(child)
            elif first != task and node.next_functions:  # what two tasks compute together may lead anywhere
                reached = reached_by(roots, stop=ends)
                return {end: set(names_in(reached[end], [*roots])) for end in ends if end in reached}
    return found
