"""Queries on the autograd graph, before backward: which nodes a gradient will pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils import _pytree as pytree

from lightning_gradnorm._messages import is_number

_run_backward: Callable[..., tuple[Tensor | None, ...]] = torch.autograd.Variable._execution_engine.run_backward


def node_of(tensor: Tensor) -> Node:
    """Return the node of the autograd graph at which the gradient of ``tensor`` arrives."""
    node = tensor.grad_fn  # `get_gradient_edge` takes ten times as long; only a leaf needs it
    return get_gradient_edge(tensor).node if node is None else node


def first_order_pass(
    outputs: Sequence[Tensor] | Sequence[GradientEdge], targets: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients at ``targets``, ``None`` where none arrives, and keep the graph.

    This is ``torch.autograd.grad(outputs, targets, gradients, retain_graph=True, allow_unused=True)`` without its checks of
    the arguments. In a training step, where other code has filled the caches, these take longer than a small pass: about
    0.1 ms for each task.

    Args:
        outputs: where the pass begins.
        targets: where it ends, at least one.
        gradients: the gradient at each of the outputs, of the same shape.

    Raises:
        RuntimeError: there is no target, or one carries no gradient.

    Example:
        >>> import torch
        >>> w = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> first_order_pass([w * w], [w, torch.ones(1, requires_grad=True)], [torch.ones(2)])
        (tensor([4., 6.]), None)
    """
    if not targets:  # the engine would add to the parameters' .grad
        raise RuntimeError("a first-order pass needs at least one target; got none")
    return _run_backward(tuple(outputs), tuple(gradients), True, False, tuple(targets), True, accumulate_grad=False)


def has_gradient(value: object) -> TypeGuard[Tensor]:
    """Return True for a tensor that is part of a graph."""
    return isinstance(value, Tensor) and value.requires_grad


def is_custom(node: Node) -> bool:
    """Return True for the backward pass of a custom autograd function; the graph knows nothing about it but its inputs."""
    return isinstance(node, BackwardCFunction) or "CppNode" in node.name()


def is_constant(loss: object) -> bool:
    """Return True for a loss that nothing can be learned from: a number, no value at all, or no path to anything trained.

    The loss of a batch without labels is often written this way.

    Example:
        >>> import torch
        >>> [is_constant(one) for one in (0.0, torch.tensor(0.0), torch.zeros(1, requires_grad=True).sum())]
        [True, True, True]
        >>> is_constant(0 * torch.nn.Linear(2, 2)(torch.ones(2)).sum())
        False

        A sum that begins with a number, as in a metric, is judged by the rest:

        >>> zero = torch.tensor(0.0)
        >>> is_constant(zero + torch.zeros(1, requires_grad=True).sum()), is_constant(zero + torch.nn.Linear(2, 1).weight.sum())
        (True, False)
    """
    if not isinstance(loss, Tensor) or is_wrapped(loss):
        return is_number(loss)
    if loss.numel() == 0 or not loss.requires_grad:
        return not loss.is_complex()
    node = loss.grad_fn
    # Follow the last inputs: they lead to a layer's own weights, not through the whole network before it.
    while node is not None and (following := node.next_functions):
        node = following[-1][0] or following[0][0]
    if isinstance(getattr(node, "variable", None), nn.Parameter):
        return False  # the usual case
    seen = {node_of(loss)}
    to_visit = list(seen)
    while to_visit:  # ends at the first parameter
        node = to_visit.pop()
        leaf = getattr(node, "variable", None)
        if is_custom(node) or isinstance(leaf, nn.Parameter) or (isinstance(leaf, Tensor) and leaf.numel() > 1):
            return False
        new = [child for child in children(node) if child not in seen]
        seen.update(new)
        to_visit += new
    return True


def tensors_with_gradient(tree: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts that are part of the back-propagated graph.

    A tensor inside `torch.func.vmap` or `grad` is unwrapped first: its own graph is that of an inner derivative.
    """
    return [leaf for leaf in map(_unwrapped, pytree.tree_leaves(tree)) if has_gradient(leaf)]


def is_transformed() -> bool:
    """Return True inside a transform of `torch.func` (vmap, grad, jvp, hessian) or a level of forward-mode derivatives.

    Tensors are wrapped there: a gradient that arrives at one is not, or not only, the gradient of the backward pass.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_wrapped(tensor: Tensor) -> bool:
    """Return True for a tensor that only exists inside a transform of `torch.func`."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def _unwrapped(value: Any) -> Any:
    while isinstance(value, Tensor) and is_wrapped(value):
        value = _functorch.get_unwrapped(value)
    return value


def children(node: Node) -> list[Node]:
    """Return the nodes to which ``node`` passes the gradient."""
    return [child for child, _ in node.next_functions if child is not None]


def reachable_nodes(start: Iterable[Node], *, stop: Collection[Node] = ()) -> set[Node]:
    """Return the nodes that a gradient from ``start`` reaches, including ``start``, but none behind ``stop``."""
    seen = set(start)
    to_visit = list(seen)
    while to_visit:
        node = to_visit.pop()
        if node in stop:
            continue
        # Not by `children`: this runs in every batch.
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                to_visit.append(child)
    return seen


def _sources(start: Iterable[Node], stop: Collection[Node]) -> dict[Node, list[Node]]:
    """Return each reachable node with the nodes from which a gradient arrives there."""
    sources: dict[Node, list[Node]] = {node: [] for node in start}
    to_visit = list(sources)
    while to_visit:
        node = to_visit.pop()
        if node in stop:
            continue
        for following in children(node):
            if following not in sources:
                sources[following] = []
                to_visit.append(following)
            sources[following].append(node)
    return sources


def nodes_on_paths(
    start: Iterable[Node], targets: Iterable[Tensor | Node], *, stop: Collection[Node] = ()
) -> set[Node]:
    """Return the nodes on any path from ``start`` to ``targets``, both ends included; empty if there is no path.

    Args:
        start: where the gradient comes from, for example ``[node_of(loss)]``.
        targets: tensors whose gradient you want, parameters or intermediate results; or their nodes.
        stop: nodes that no path may pass. A path may end there if the node belongs to a target.

    Example:
        >>> import torch
        >>> w, x = torch.ones(2, requires_grad=True), torch.ones(2)
        >>> loss = (w * x).sum()
        >>> sorted(node.name() for node in nodes_on_paths([node_of(loss)], [w]))
        ['MulBackward0', 'SumBackward0', 'torch::autograd::AccumulateGrad']
        >>> nodes_on_paths([node_of(loss)], [torch.ones(2, requires_grad=True)])
        set()
    """
    sources = _sources(start, stop)
    found: set[Node] = set()
    ends = (node_of(target) if isinstance(target, Tensor) else target for target in targets)
    to_visit = [node for node in ends if node in sources]
    while to_visit:
        node = to_visit.pop()
        if node not in found:
            found.add(node)
            to_visit.extend(sources[node])
    return found


def leaves_behind(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters that ``tensors`` depend on.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> sorted(tuple(leaf.shape) for leaf in leaves_behind([layer(torch.ones(1, 2))]))
        [(2,), (2, 2)]
    """
    found = (getattr(node, "variable", None) for node in reachable_nodes(map(node_of, tensors)))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_leaf]


def reason_not_retraversable(nodes: Iterable[Node]) -> str | None:
    """Return why these nodes cannot be traversed again beside the ordinary backward pass, and the fix; or None.

    A compiled graph frees its buffers (or, if it comes from the compiler's cache, silently returns wrong numbers). FSDP's
    nodes gather and free weights when a gradient passes them. A reentrant checkpoint does not support torch.autograd.grad. The
    outputs of DDP with a static graph let it average the gradients in the first pass that comes by, which would be ours.
    """
    causes = {
        "Compiled": "a module compiled with torch.compile, whose graph cannot be traversed twice. Name the heads with heads=, "
        "and a shared_layer in the last module that is compiled before them",
        "RegisterPostBackward": "a module sharded by FSDP, which cannot be passed twice. Name the heads with heads=, and a "
        "shared_layer in the last module that is sharded before them",
        "CheckpointFunction": "an activation checkpoint that cannot be passed twice. Call it with use_reentrant=False",
        "DDPSink": "an output of DistributedDataParallel(static_graph=True), which cannot be passed twice. Leave static_graph "
        "out, or show the losses in the model's forward",
    }
    # With find_unused_parameters there is such a node too, which does no harm.
    names = {n.name() for n in nodes if not (hasattr(n, "ddp_weakref") and not n.ddp_weakref().static_graph)}
    return next((f"{cause}." for word, cause in causes.items() if any(word in name for name in names)), None)
