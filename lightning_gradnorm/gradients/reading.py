"""Reads the tasks' gradients as they arrive in a backward pass: one by one, or those of several tasks in one product.

In a small layer, a vector-Jacobian product costs far less than the call that computes it. So gradients that arrive at the
same tensors wait until enough of them have come, and one product with all of them (`torch.autograd.grad` with
``is_grads_batched``) reads them together. The graph below those tensors is intact until autograd passes their own nodes. A
hook there reads what is still waiting.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_gradnorm.gradients.buffers import BufferGuard
from lightning_gradnorm.gradients.graph import first_order_pass, is_custom, node_of, nodes_on_paths
from lightning_gradnorm.gradients.readers import GradientReader, Outputs, WeightGradients, flat_row
from lightning_gradnorm.gradients.repeated_passes import RepeatedPasses

_FEWEST = 4
"""Fewer gradients are read one by one. Measured on a CPU at Linear 64, batch 32: two together take 1.6 times as long as
one by one, four 0.9, eight 0.5, 32 0.2."""
_MOST = 64
"""Gradients in one product. More gain nothing."""
_LARGEST = 2**16
"""Numbers, in all gradients on the way to the layer, up to which a product is small. On a CPU, 32 together take 0.2 of the
time of one by one with 12,000 numbers (Linear 64, batch 32), 0.8 with 65,000 (128, 128) and 0.85 with 160,000 (256, 64). With
260,000 (256, 256) they are not faster. Not measured on a GPU."""
_MOST_NUMBERS = 2**20
"""Numbers in one product. This bounds its memory to 4 MiB in float32."""
_TOLERANCES = {64: 1e-9, 32: 1e-3}
"""By bits of the lowest precision: the largest difference that rounding explains, as a share of the gradient's norm."""


@dataclass(eq=False)
class _Place:
    """The tensors at which some gradients arrive in the current backward pass."""

    tensors: Sequence[Tensor]
    most: int
    """How many gradients are read together; 0 if each is read by itself."""
    tasks: list[str] = field(default_factory=list)
    gradients: list[Sequence[Tensor]] = field(default_factory=list)
    """For each task that waits, one gradient for each tensor."""
    hooks: list[Any] = field(default_factory=list)


class TaskReading:
    """Reads gradients with a `GradientReader`, beside the ordinary backward pass.

    Args:
        buffers: restores running statistics.
        repeats: checks that the graph can be passed more than once.
        on_read: called with the reader and the tasks that have just been read.
    """

    def __init__(
        self, buffers: BufferGuard, repeats: RepeatedPasses, on_read: Callable[[GradientReader, Sequence[str]], object]
    ) -> None:
        self._buffers, self._repeats, self._on_read = buffers, repeats, on_read
        self.is_running = False
        """Whether a gradient is being read. That calls the hooks in the graph, too."""
        self._places: dict[tuple[int, ...], _Place] = {}
        self._reader: WeightGradients | None = None
        self._ratios: dict[str, float] = {}
        """Task → `_numbers_on_the_way` where its gradient arrived."""
        self._verified: set[str] = set()
        self._alone: set[str] = set()
        """Tasks that cannot be read together with others."""

    def read(
        self, reader: GradientReader, task: str, outputs: Outputs, gradients: Sequence[Tensor], *, heads: int = 0
    ) -> object:
        """Read a gradient that has arrived, now or before autograd passes the graph below.

        Args:
            reader: reads it.
            task: the task.
            outputs: where it has arrived.
            gradients: the gradient at each of them.
            heads: the number of heads whose gradients may arrive at the same tensors.

        Returns:
            What the reader returns; ``None`` if the gradient is read later.
        """
        if self.is_running:
            return None
        if heads >= _FEWEST and isinstance(reader, WeightGradients) and self._keep(reader, task, outputs, gradients):
            return None
        return self._read_alone(reader, task, outputs, gradients)

    def look_at(self, losses: Mapping[str, Iterable[Node]], targets: Sequence[Tensor]) -> None:
        """Called before a backward pass in which gradients are read at these losses, given by their nodes."""
        self._repeats.look_at(losses, targets)

    def finish(self) -> None:
        """Called when a backward pass is over. Read what still waits: the pass has ended above the place."""
        for place in list(self._places.values()):
            self._read_waiting(place)
        self.forget_graph()

    def forget_graph(self) -> None:
        """Release the graph of the last forward pass."""
        for place in self._places.values():
            for hook in place.hooks:
                hook.remove()
        self._places.clear()
        self._repeats.forget_graph()

    # ---- waiting -----------------------------------------------------------------------------------------------------

    def _keep(self, reader: WeightGradients, task: str, outputs: Any, gradients: Sequence[Tensor]) -> bool:
        """Let a gradient wait for others at the same tensors, if that is worth it. Return True if it waits."""
        if task in self._alone:
            return False
        key = tuple(map(id, outputs))
        if key not in self._places:
            self._places[key] = self._new_place(reader, task, outputs)
        place = self._places[key]
        if not place.most:
            return False
        place.tasks.append(task)
        place.gradients.append(gradients)
        if len(place.tasks) == place.most:
            self._read_waiting(place)
        return True

    def _new_place(self, reader: WeightGradients, task: str, tensors: Sequence[Tensor]) -> _Place:
        if reader is not self._reader:
            self._reader = reader
            for known in (self._ratios, self._verified, self._alone):
                known.clear()
        if task not in self._ratios:
            self._ratios[task] = _numbers_on_the_way(tensors, reader.targets)
        numbers = max(self._ratios[task] * sum(tensor.numel() for tensor in tensors), 1.0)
        # A hook of the user's would be called with the gradients of several tasks at once.
        has_hooks = any(one._backward_hooks or one.retains_grad for one in (*tensors, *reader.targets))
        if numbers > _LARGEST or has_hooks:
            return _Place((), 0)  # which does not keep a large tensor alive
        place = _Place(tensors, min(_MOST, int(_MOST_NUMBERS // numbers)))
        nodes = {node_of(tensor) for tensor in tensors}
        place.hooks = [node.register_prehook(lambda _: self._read_waiting(place)) for node in nodes]
        return place

    def _read_waiting(self, place: _Place) -> None:
        if self.is_running or not place.tasks:
            return
        tasks, gradients = place.tasks, place.gradients
        place.tasks, place.gradients = [], []
        assert self._reader is not None
        if len(tasks) < _FEWEST or not self._read_together(self._reader, tasks, place.tensors, gradients):
            for task, of_task in zip(tasks, gradients, strict=True):
                self._read_alone(self._reader, task, place.tensors, of_task)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _read_alone(self, reader: GradientReader, task: str, outputs: Outputs, gradients: Sequence[Tensor]) -> object:
        self.is_running = True
        try:
            with self._buffers.preserved(task):
                gradients = self._repeats.checked(task, outputs, gradients, reader.targets)
                answer = reader.read(task, outputs, gradients)
            self._on_read(reader, (task,))
            return answer
        finally:
            self.is_running = False

    def _read_together(
        self, reader: WeightGradients, tasks: Sequence[str], tensors: Any, gradients: Sequence[Sequence[Tensor]]
    ) -> bool:
        """Read gradients in one product. Return False, now and in later passes, if that does not give the same numbers."""
        is_verified = self._verified.issuperset(tasks)
        self.is_running = True
        try:
            with torch.no_grad(), nullcontext() if is_verified else warnings.catch_warnings():
                if not is_verified:
                    warnings.simplefilter("error")  # torch warns of operations that it has to repeat for each task
                stacked = [torch.stack(at_tensor) for at_tensor in zip(*gradients, strict=True)]
                with self._buffers.preserved(*tasks):
                    rows = reader.rows_together(tensors, stacked, len(tasks))
                if rows is None:
                    return False  # the reader counts such tasks
                if not is_verified:
                    self._verify(reader, tasks, tensors, gradients, rows)
        except Exception:  # an operation that cannot be batched. Reading one by one raises any other error again.
            self._alone.update(tasks)
            return False
        finally:
            self.is_running = False
        for task, row in zip(tasks, rows, strict=True):
            reader.add(task, row)
        self._on_read(reader, tasks)
        return True

    def _verify(
        self, reader: WeightGradients, tasks: Sequence[str], tensors: Any, gradients: Any, rows: Tensor
    ) -> None:
        """Compare rows that were read together with rows read one by one.

        Raises:
            ArithmeticError: they differ.
        """
        alone = []
        for task, of_task in zip(tasks, gradients, strict=True):
            with self._buffers.preserved(task):
                found = first_order_pass(tensors, reader.targets, of_task)
            alone.append(flat_row(found, reader.targets))
        expected = torch.stack(alone)
        difference, size = (rows - expected).norm(dim=1), expected.norm(dim=1)
        bits = min(torch.finfo(one.dtype).bits for one in (*tensors, *reader.targets))
        if bool((difference > _TOLERANCES.get(bits, 0.05) * size).any()):
            raise ArithmeticError("gradients that are read together differ from those read one by one")
        # Numbers that are not finite tell nothing; they are reported elsewhere.
        if bool(difference.isfinite().all()):
            self._verified.update(tasks)


def _numbers_on_the_way(tensors: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Return how many numbers all gradients between tensors and targets have, for each value of ``tensors``.

    Infinite if a product for several tasks might call code that is not made for it: custom functions, subclasses of Tensor.
    """
    nodes = nodes_on_paths(map(node_of, tensors), targets)
    is_plain = all(type(one) in (Tensor, nn.Parameter) and one.layout == torch.strided for one in (*tensors, *targets))
    if not nodes or not is_plain or any(one.grad_fn is None for one in tensors) or any(map(is_custom, nodes)):
        return math.inf
    numbers = sum(math.prod(arrives.shape) for node in nodes for arrives in node._input_metadata)
    return float(numbers / max(sum(one.numel() for one in tensors), 1))
