"""Branches: views of the representation z, one per head, that report the gradient arriving at them.

If every head reads its own view, the gradient at that view belongs to this task alone, and the ordinary backward pass of the
summed loss delivers all task gradients: heads and trunk are traversed once. A branch changes no value and no gradient.

Create a branch right before its head runs. Autograd processes nodes created later first, so it reaches a branch right after
the backward of its head, and you can consume its gradient before the next head starts: one copy of z is alive, not T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from lightning_gradnorm.gradients.graph import has_gradient, is_transformed

Receive = Callable[[Sequence[Tensor], Sequence[Tensor]], object]
"""Called in backward with tensors of the representation and the gradients that arrived at them.

If it returns `TAKEN`, the gradients stop at the branch. Otherwise they continue unchanged.
"""

TAKEN = object()
"""Returned by a `Receive` that will pass a gradient to the representation itself."""

Tree = TypeVar("Tree")


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, receive: Receive, tensors: tuple[Tensor, ...], *views: Tensor) -> tuple[Tensor, ...]:
        ctx.receive = receive
        ctx.tensors = tensors
        ctx.set_materialize_grads(False)  # an output that the head did not use gets no gradient instead of zeros
        return tuple(view.view_as(view) for view in views)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if len(gradients) == 1 and gradients[0] is not None:  # the common case
            passed_on = None if ctx.receive(ctx.tensors, gradients) is TAKEN else gradients[0]
            return None, None, passed_on
        arrived = [(tensor, grad) for tensor, grad in zip(ctx.tensors, gradients, strict=True) if grad is not None]
        if arrived:
            tensors, grads = zip(*arrived, strict=True)
            if ctx.receive(tensors, grads) is TAKEN:
                return None, None, *(None for _ in gradients)
        return None, None, *gradients


def branch(representation: Tree, receive: Receive) -> tuple[Tree, Node | None]:
    """Return a view of ``representation`` that passes its gradient to ``receive``.

    Args:
        representation: a tensor, or tensors in nested tuples, lists and dicts (for example a feature pyramid). Anything that
            carries no gradient is returned unchanged.
        receive: called during backward, once per pass through the branch, as ``receive(tensors, gradients)`` with the
            tensors of ``representation`` that got a gradient. It may run ``torch.autograd.grad(tensors, …,
            retain_graph=True)``, because the graph below is still intact then.

    Returns:
        The same structure with views in it, and the branch's node in the autograd graph. If nothing in ``representation``
        carries a gradient, gradients are disabled, or a transform of `torch.func` is active, returns ``representation`` itself
        and None.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> view, _ = branch(x * 3, lambda tensors, gradients: print("arrived:", gradients[0].tolist()))
        >>> view.square().sum().backward()
        arrived: [6.0, 12.0]
        >>> x.grad.tolist()
        [18.0, 36.0]
    """
    if not torch.is_grad_enabled() or is_transformed():
        return representation, None
    if isinstance(representation, Tensor):  # the common case; flattening a tree is slower
        if not representation.requires_grad:
            return representation, None
        (view,) = _Branch.apply(receive, (representation,), representation)  # type: ignore[no-untyped-call]
        return view, view.grad_fn
    views: list[Tensor] = []

    def make(tensors: list[Tensor]) -> list[Tensor]:
        views.extend(_Branch.apply(receive, tuple(tensors), *tensors))  # type: ignore[no-untyped-call]
        return views

    tree = replace_tensors(representation, make)
    return tree, views[0].grad_fn if views else None


def replace_tensors(tree: Tree, make: Callable[[list[Tensor]], list[Tensor]]) -> Tree:
    """Return the same structure with the results of ``make`` in place of the tensors that carry a gradient, if any."""
    leaves, structure = pytree.tree_flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if has_gradient(leaf)]
    if not places:
        return tree
    for place, new in zip(places, make([leaves[i] for i in places]), strict=True):
        leaves[place] = new
    replaced: Tree = pytree.tree_unflatten(leaves, structure)
    return replaced


def branch_arguments(args: Any, kwargs: Any, receive: Receive) -> tuple[tuple[Any, Any], Node | None]:
    """Return a call's arguments with a branch in front of all their tensors, and the branch's node."""
    if kwargs or len(args) != 1:
        return branch((args, kwargs), receive)
    view, node = branch(args[0], receive)  # the common case
    return ((view,), kwargs), node


def fan_out(
    representation: Tree, tasks: Iterable[str], receive: Callable[[str, Sequence[Tensor], Sequence[Tensor]], None]
) -> dict[str, Tree]:
    """Return one `branch` of ``representation`` per task.

    Args:
        representation: the encoder's output: a tensor or a nested structure of tensors.
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
    return {task: branch(representation, partial(receive, task))[0] for task in tasks}
