"""Branches: views of the representation z, one for each head, whose gradient is seen as it comes back.

If every head reads a view of its own, the gradient that arrives at that view is this task's alone, and the ordinary
backward pass of the summed loss delivers all of them: heads and trunk are traversed once. A branch changes no value and
no gradient. Autograd works through later-created nodes first, so a branch made right before its head runs is reached
right after that head's backward, and its gradient can be consumed before the next head starts: one copy of |z| is alive
at a time, not T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

Receive = Callable[[Sequence[Tensor], Sequence[Tensor]], object]
"""Called in backward with tensors of the representation and the gradients that arrived at them.

What it returns says what becomes of them: `TAKEN`, they go no further; anything else, they go on as they came.
"""

TAKEN = object()
"""Said by a `Receive` that sees itself to what reaches the representation."""

Tree = TypeVar("Tree")


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, receive: Receive, tensors: tuple[Tensor, ...], *views: Tensor) -> tuple[Tensor, ...]:
        ctx.receive = receive
        ctx.tensors = tensors
        ctx.set_materialize_grads(False)  # an output the head did not use has no gradient, rather than one of zeros
        return tuple(view.view_as(view) for view in views)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        arrived = [(tensor, grad) for tensor, grad in zip(ctx.tensors, gradients, strict=True) if grad is not None]
        if arrived:
            tensors, grads = zip(*arrived, strict=True)
            if ctx.receive(tensors, grads) is TAKEN:
                return None, None, *(None for _ in gradients)
        return None, None, *gradients


def branch(representation: Tree, receive: Receive) -> tuple[Tree, Node | None]:
    """Return a view of ``representation`` that tells ``receive`` which gradient arrives at it.

    Args:
        representation: a tensor, or tensors in nested tuples, lists and dicts (the feature maps of a pyramid, say).
            What carries no gradient is handed on as it is.
        receive: called during backward, once for each pass through the branch, as ``receive(tensors, gradients)`` with
            those tensors of ``representation`` that got a gradient. It may run ``torch.autograd.grad(tensors, ...,
            retain_graph=True)``: the graph below is still whole at that moment. Returning `TAKEN` ends their way here.

    Returns:
        The same structure with views in it, and the branch's node in the autograd graph (``None`` where nothing in
        ``representation`` carries a gradient, or gradients are switched off: then ``representation`` itself is returned).

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> view, _ = branch(x * 3, lambda tensors, gradients: print("arrived:", gradients[0].tolist()))
        >>> view.square().sum().backward()
        arrived: [6.0, 12.0]
        >>> x.grad.tolist()
        [18.0, 36.0]
    """
    if not torch.is_grad_enabled():
        return representation, None
    if isinstance(representation, Tensor):  # nearly always; a tree takes its time
        if not representation.requires_grad:
            return representation, None
        (view,) = _Branch.apply(receive, (representation,), representation)  # type: ignore[no-untyped-call]
        return view, view.grad_fn
    leaves, structure = pytree.tree_flatten(representation)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not places:
        return representation, None
    tensors = tuple(leaves[i] for i in places)
    views = _Branch.apply(receive, tensors, *tensors)  # type: ignore[no-untyped-call]
    for place, view in zip(places, views, strict=True):
        leaves[place] = view
    return pytree.tree_unflatten(leaves, structure), views[0].grad_fn


def fan_out(
    representation: Tree, tasks: Iterable[str], receive: Callable[[str, Sequence[Tensor], Sequence[Tensor]], None]
) -> dict[str, Tree]:
    """Return one view of ``representation`` for each task; see `branch`, which makes them.

    Args:
        representation: what the encoder returned: a tensor or a nested structure of tensors.
        tasks: the tasks' names.
        receive: called in backward as ``receive(task, tensors, gradients)``, for example a reader's ``read`` method.

    Example:
        >>> from lightning_gradnorm.gradients import WeightGradients
        >>> trunk, heads = torch.nn.Linear(3, 4), {"a": torch.nn.Linear(4, 1), "b": torch.nn.Linear(4, 1)}
        >>> reader = WeightGradients([trunk.weight])
        >>> z = fan_out(trunk(torch.ones(2, 3)), heads, reader.read)
        >>> sum(heads[task](z[task]).square().mean() for task in heads).backward()
        >>> reader.norms(["a", "b"]).shape
        torch.Size([2])
    """

    def receiver(task: str) -> Receive:
        return lambda tensors, gradients: receive(task, tensors, gradients)

    return {task: branch(representation, receiver(task))[0] for task in tasks}
