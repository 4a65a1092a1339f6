"""What the engine collects during one batch, and from one optimizer step to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_gradnorm.gradients import GradientReader


def mean_of(loss: Tensor) -> Tensor:
    """Return the mean of a loss's values, detached: a plain tensor of float32 or float64.

    A sum of many, over micro-batches, would lose digits in bfloat16, and soon become infinite in float16. A subclass of Tensor,
    such as one that carries an image's position, would end up in the state of the rule, and in checkpoints.
    """
    values = loss.detach()
    if type(values) is not Tensor and not is_traceable_wrapper_subclass(values):
        values = values.as_subclass(Tensor)
    if not values.ndim and values.dtype in (torch.float32, torch.float64):
        return values.clone()  # the usual case: the same number, in a third of the time
    return values.mean(dtype=None if values.dtype == torch.float64 else torch.float32)


@dataclass(eq=False)
class WatchedLoss:
    """A loss at the time it was shown. It may change in place later: ``loss = a; loss += b``."""

    tensor: Tensor
    """The tensor that was shown."""
    node: Node
    """The node at which its gradient arrives."""
    output_nr: int
    """Which output of that node it is."""
    value: Tensor
    """Its mean at that time, detached."""
    version: int
    """How often the tensor had been changed in place."""

    @classmethod
    def of(cls, loss: Tensor) -> WatchedLoss:
        """Return the loss as it is now."""
        node = loss.grad_fn
        assert node is not None  # `check_loss` refuses a leaf
        return cls(loss, node, loss.output_nr, mean_of(loss), loss._version)

    @property
    def edge(self) -> GradientEdge:
        """Where its gradient arrives."""
        return GradientEdge(self.node, self.output_nr)

    @property
    def has_changed(self) -> bool:
        """Whether it has changed in place since."""
        return self.tensor._version != self.version


def nodes_by_task(losses: Mapping[str, Sequence[WatchedLoss]]) -> dict[str, list[Node]]:
    """Return the nodes at which the gradients of the losses arrive."""
    return {task: [loss.node for loss in of_task] for task, of_task in losses.items()}


class HeldGradients:
    """The gradients of some parameters right after a backward pass. Keeps none of them alive."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.grad is not None]
        self._versions = self._now()

    def _now(self) -> list[int | None]:
        return [None if p.grad is None else p.grad._version for p in self._parameters]

    def were_dropped(self) -> bool:
        """Return True if there were any, and all of them have been set to ``None`` or to zero since."""
        if self._now() == self._versions:  # the usual case, without waiting for a device
            return False
        left = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        return not any(bool(gradient.any()) for gradient in left)

    def were_set_to_none(self) -> bool:
        """Return True if there were any, and all of them have been set to ``None`` since. Does not wait for a device."""
        return bool(self._parameters) and all(parameter.grad is None for parameter in self._parameters)


@dataclass
class OptimizerStepState:
    """Collected from one optimizer step to the next."""

    measured: bool
    """Whether the task gradients of this step are read."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The weights of its last backward pass, each a scalar; empty before the first."""
    backwards: int = 0
    """Backward passes so far: the micro-batches."""
    versions: list[int] | None = None
    """How often each shared parameter had changed before the last pass, if the optimizer may move them unannounced."""
    held: HeldGradients | None = None
    """The gradients of the shared parameters after the last pass, if the optimizer may not step on them."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Sum of each task's back-propagated losses, detached."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of backward passes in each sum."""
    rounded_weights: dict[str, Tensor] = field(default_factory=dict)
    """The weights of tasks whose losses have a precision so low that the weight was rounded to it."""

    def add(self, task: str, value: Tensor, *, is_first: bool) -> None:
        """Add a loss that is being back-propagated: the first of its task in this batch, or another part of it."""
        self.losses[task] = self.losses[task] + value if task in self.losses else value
        self.counts[task] = self.counts.get(task, 0) + is_first


@dataclass
class BatchState:
    """Collected during one batch: its forward pass and the backward pass that follows. Each optimizer step starts a new one."""

    is_repeated: bool = False
    """Whether the optimizer evaluates the losses again within a step. The rule learns only from the first evaluation."""
    finished: set[str] = field(default_factory=set)
    """Tasks with a loss that was back-propagated before the last optimizer step of this batch."""
    losses: dict[str, list[WatchedLoss]] = field(default_factory=dict)
    """The watched losses by task; kept alive until they are back-propagated."""
    backpropagated: set[str] = field(default_factory=set)
    """Tasks whose loss a backward pass has reached."""
    reached: set[WatchedLoss] = field(default_factory=set)
    """The losses that a backward pass has reached."""
    absent: set[str] = field(default_factory=set)
    """Tasks given as ``None``."""
    branches: dict[str, set[Node]] = field(default_factory=dict)
    """The branches that each task's head reads."""
    transformed: set[GradientReader] = field(default_factory=set)
    """Readers whose module was called inside a transform of `torch.func`, where they see nothing."""
    in_head: str | None = None
    """The task whose head was called last."""
    in_backward: bool = False
    """Whether a backward pass is running. Module calls now come from a checkpoint, for the second time."""
    is_whole_step: bool = False
    """Whether the optimizer will step on this backward pass alone, without other ranks."""
    backwards: int = 0
    """Backward passes in this batch."""
    change_of_loss: Tensor | float = 0.0
    """What the weights add to the back-propagated loss, ``Σ (w_i − 1) c_i L_i``, if the engine needs this sum."""
    steps: int = 0
    """Optimizer steps in this batch."""
    read_at_losses: set[str] = field(default_factory=set)
    """Tasks whose gradient is read by a first-order pass from the loss: those without a head, or that do not keep to it."""
    tasks_of: dict[int, str] = field(default_factory=dict)
    """``id`` of each watched loss → its task."""

    def end_step(self) -> None:
        """Keep what remains of the batch after an optimizer step: losses that were not back-propagated yet."""
        self.losses = left = self.waiting()
        self.branches = {task: nodes for task, nodes in self.branches.items() if task in left}
        self.tasks_of = {id(one.tensor): task for task, losses in left.items() for one in losses}
        self.finished |= self.backpropagated
        self.backpropagated, self.reached = set(), set()
        # The change of the loss by the weights stays: the optimizer has not read it yet.

    def add(self, task: str, loss: Tensor) -> WatchedLoss:
        """Add a loss to watch."""
        watched = WatchedLoss.of(loss)
        self.losses.setdefault(task, []).append(watched)
        self.tasks_of[id(loss)] = task
        return watched

    @property
    def all_backpropagated(self) -> set[str]:
        """Tasks with a loss that was back-propagated in this batch, before its last optimizer step or since."""
        return self.finished | self.backpropagated

    def waiting(self) -> dict[str, list[WatchedLoss]]:
        """Return the losses that are yet to be back-propagated."""
        left = {task: [one for one in losses if one not in self.reached] for task, losses in self.losses.items()}
        return {task: losses for task, losses in left.items() if losses}

    def is_read_once(self, task: str) -> bool:
        """Return True if the task's gradient arrives in one piece: through one branch of its head, or from one loss."""
        at_loss = task in self.read_at_losses
        return len(self.losses[task] if at_loss else self.branches.get(task, ())) == 1

    def reading_nodes(self) -> set[Node]:
        """Return the nodes at which the gradients of the tasks are read: their branches, or their losses."""
        of_losses = [loss.node for task in self.read_at_losses for loss in self.losses.get(task, ())]
        at_heads = [nodes for task, nodes in self.branches.items() if task not in self.read_at_losses]
        return set().union(of_losses, *at_heads)

    def task_of(self, loss: Tensor) -> str | None:
        """Return the task for which this very tensor is watched."""
        return self.tasks_of.get(id(loss))
