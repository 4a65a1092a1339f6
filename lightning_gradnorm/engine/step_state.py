"""What is gathered on the way of one backward pass, and from one optimizer step to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import Node


@dataclass
class Window:
    """What is gathered from one optimizer step to the next."""

    measured: bool
    """Whether the gradients of this step are read."""
    weights: dict[str, Tensor]
    """Those in force, each a scalar."""
    backwards: int = 0
    """How many backward passes there were: the micro-batches."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Sum of each task's losses that were back-propagated, detached."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many losses each sum is made of: in how many micro-batches the task was present."""
    applied: dict[str, Tensor] = field(default_factory=dict)
    """The weights of tasks whose losses are of so low a precision that their weight was rounded to it."""

    def add(self, task: str, loss: Tensor) -> None:
        """Count in a loss that is being back-propagated."""
        value = loss.detach().reshape(())
        self.losses[task] = self.losses[task] + value if task in self.losses else value
        self.counts[task] = self.counts.get(task, 0) + 1


@dataclass
class Pass:
    """What belongs to one training batch: its forward pass and the backward that follows."""

    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    """The losses that were watched, by task; kept alive until they are back-propagated."""
    fired: set[str] = field(default_factory=set)
    """Tasks whose loss has been reached by a backward pass."""
    absent: set[str] = field(default_factory=set)
    """Tasks that were said to be absent."""
    branches: dict[str, set[Node]] = field(default_factory=dict)
    """The branches that the tasks' heads read."""
    in_head: str | None = None
    """The task whose head was called last."""
    in_backward: bool = False
    """Whether a backward pass is on its way: what is called now is called by a checkpoint, once more."""
    is_whole_step: bool = False
    """Whether the optimizer will step on this backward pass and no other, here or on another rank."""
    backwards: int = 0
    """How many backward passes there were."""
    steps: int = 0
    """How many steps of an optimizer there were."""

    owners: dict[int, str] = field(default_factory=dict)
    """By each loss's ``id``, the task that it was watched for."""

    def add(self, task: str, loss: Tensor) -> int:
        """Take in a loss that is watched; return its place among those of its task."""
        watched = self.losses.setdefault(task, [])
        watched.append(loss)
        self.owners[id(loss)] = task
        return len(watched) - 1

    def is_read_once(self, task: str, *, at_heads: bool) -> bool:
        """Say whether the task's gradient comes by in one piece: by one branch of its head, or from one loss."""
        return len(self.branches.get(task, ()) if at_heads else self.losses[task]) == 1

    def task_of(self, loss: Tensor) -> str | None:
        """Return the task that this very tensor was watched for."""
        return self.owners.get(id(loss))
