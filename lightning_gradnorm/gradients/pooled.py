"""The norms of a convolution's gradients where its output comes to the heads by way of a mean over the positions.

Behind such a pooling, a task's gradient is the same at all positions p: one number v_i for each sample b and channel o. Where
nothing on the way from there to the layer's output mixes samples or channels, as no activation does, it arrives as::

    D_i[b, o, p] = S[b, o, p] · v_i[b, o]

with one S for all tasks: what becomes of ones. With the patches U of the input, ``∇_W L_i[o] = Σ_bp D_i[b, o, p] U[b, p]``
becomes::

    ∇_W L_i[o] = Σ_b v_i[b, o] M[b, o],   M[b, o] = Σ_p S[b, o, p] U[b, p]

M takes the products of one task's gradient, and then each task a P-th of them, P being the number of positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from lightning_gradnorm.gradients.layer import LayerGradients, exactly
from lightning_gradnorm.gradients.paths import node_of
from lightning_gradnorm.gradients.readers import flat_row
from lightning_gradnorm.gradients.way import Way, way_to

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

_PRODUCTS: Mapping[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: conv1d_weight,
    nn.Conv2d: conv2d_weight,
    nn.Conv3d: conv3d_weight,
}

_AT_ONCE = 3 * 2**20
"""Bytes of M and U that are made at a time, while all of the trunk's activations are still there."""


class PooledGradients(LayerGradients):
    """Reads ``∇_W L_i`` of a convolution; the norms of several tasks it finds from what their gradients have in common.

    That they have it is seen in the numbers, in each pass: a task's gradient is looked at as far above the layer's output as it
    has the same shape. Where nothing but an activation, without hooks, lies between, it is known what becomes of it on the way;
    else it is compared with what arrives. Where it is not so, the gradient is read as it is.

    A task is pending while only its numbers are known, until all are complete or the backward pass is over. Complete is a task
    of which nothing more will be read: its norm will do.

    Args:
        layer: whose ``weight`` is ``W``; each call between `before` and `after`.
        tasks: how many there are.
        is_ours: says of a hook of the layer that it comes from a reader; see `LayerGradients`.
    """

    module: Convolution

    def __init__(self, layer: Convolution, tasks: int, is_ours: Callable[[Any], bool] = lambda hook: False) -> None:
        super().__init__(layer, is_ours)
        self._tasks = tasks
        self._hooks: Mapping[int, Any] = {}
        """Those at the layer's output."""
        self._way: Way | None = None
        """On which the gradients of the current pass come, and what becomes of ones:"""
        self._S: Tensor | None = None
        self._numbers: dict[str, Tensor] = {}
        """Pending task → v_i, shape (B, O)."""
        self._complete: set[str] = set()
        """Those of the pending tasks of which nothing more will be read."""

    @staticmethod
    def can_read(layer: nn.Module, weight: Tensor) -> TypeGuard[Convolution]:
        """Say whether this is a plain convolution of that weight, on a CPU."""
        return (
            isinstance(layer, Convolution)
            and type(layer) in _PRODUCTS
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)  # 'same' pads by itself
            and LayerGradients.is_plain(layer, weight)
        )

    def _pays(self, inputs: Tensor, output: Tensor) -> bool:
        return inputs.numel() > 0 and _is_worth_it(self._tasks, output.shape[2:].numel())

    def _is_product_with(self, W: Tensor, node: Node) -> bool:
        return node.name() == "ConvolutionBackward0" and any(of is node_of(W) for of, _ in node.next_functions)

    # ---- what is seen of a task --------------------------------------------------------------------------------------

    def after(self, output: Any) -> None:
        """Note where the gradient at the output will come by, and where hooks will be that somebody hangs there later."""
        noted = len(self._calls)
        super().after(output)
        if len(self._calls) > noted:
            output.register_hook(lambda gradient: None).remove()  # which leaves the place of all that follow
            self._hooks = output._backward_hooks

    def read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add the task's contribution to the gradient of ``W``, or note the numbers that it is made of."""
        if len(self._calls) > 1:  # each has an S of its own; what is pending is of the first
            self._multiply()
            self._calls.clear()
        super().read(task, outputs, gradients)

    def _take(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
        way = None if self._hooks else self._common_way(outputs)
        if way is None:
            return False
        is_seen = way.begins_at(outputs[0]) and not outputs[0]._backward_hooks
        if is_seen and way.is_short:
            return self._note(task, way, gradients[0].detach())
        if is_seen and _one_for_all_positions(gradients[0]) is None:
            return False
        seen, D = torch.autograd.grad(outputs, [way.seen, way.output], gradients, retain_graph=True, allow_unused=True)
        if seen is None or D is None:  # the task leaves the layer out
            return False
        if not self._note(task, way, seen.detach(), D.detach()):
            found = torch.autograd.grad([way.output], self._parameters, [D.detach()], retain_graph=True)
            self._add(task, flat_row(found, self._parameters))
            if self._way is None:
                self._calls.clear()  # nor will it be otherwise with the tasks to come in this pass
        return True

    def _note(self, task: str, way: Way, seen: Tensor, D: Tensor | None = None) -> bool:
        """Note the numbers of a gradient, if that is all it is, and all that arrives at the layer's output as ``D``."""
        v = _one_for_all_positions(seen)
        if v is None:
            return False
        S = way.carry(torch.ones_like(seen)) if self._S is None else self._S
        if D is not None and not _are_products(D, S, v):
            return False
        self._way, self._S = way, S
        self._numbers[task] = self._numbers[task] + v if task in self._numbers else v
        return True

    def _common_way(self, outputs: Sequence[Tensor]) -> Way | None:
        """Return the way of the tasks before in this pass, if this task takes it, too; the longest if it is the first."""
        if len(outputs) > 1:
            return None
        end = node_of(outputs[0])
        if self._way is not None and end is self._way.seen.node:
            return self._way
        own = way_to(self._calls[0].output, end)
        if self._way is None:
            return own
        return self._way if self._way.seen.node in (own.output.node, *own.nodes) else None

    # ---- products ----------------------------------------------------------------------------------------------------

    def _multiply(self) -> None:
        """Turn the numbers into rows; those of a task of which nothing more is read, into its norm."""
        if not self._numbers:
            return
        assert self._S is not None
        complete = [task for task in self._numbers if task in self._complete]
        to_come = [task for task in self._numbers if task not in self._complete]
        self._complete.difference_update(complete)
        with exactly():
            if _is_worth_it(len(self._numbers), self._S[0, 0].numel()):
                self._closed |= zip(complete, self._norms_of(complete), strict=True)
                rows = dict(zip(to_come, self._rows_of(to_come), strict=True))
            else:
                rows = {task: self._product(v) for task, v in self._numbers.items()}
        self._numbers.clear()
        for task, row in rows.items():
            self._add(task, row)
            if task in complete:
                super().close(task)

    def _norms_of(self, tasks: Sequence[str]) -> Sequence[Tensor]:
        if not tasks:
            return ()
        of_parts = [torch.linalg.vector_norm(part.flatten(2), dim=2) for of in self._products(tasks) for part in of]
        norms: Tensor = torch.linalg.vector_norm(torch.cat(of_parts), dim=0)
        return norms.unbind()

    def _rows_of(self, tasks: Sequence[str]) -> Sequence[Tensor]:
        if not tasks:
            return ()
        of_channels = [torch.stack(parts, dim=3).flatten(2) for parts in self._products(tasks)]
        return torch.cat(of_channels, dim=2).transpose(0, 1).flatten(1).unbind()

    def _product(self, v: Tensor) -> Tensor:
        """Return the gradient that these numbers stand for, as it is computed without them."""
        assert self._S is not None
        layer, S = self.module, self._S
        D = S * v.view(*v.shape, *(1 for _ in S.shape[2:]))
        product = _PRODUCTS[type(layer)]
        inputs = self._inputs_of(self._calls[0])
        return product(inputs, layer.weight.shape, D, layer.stride, layer.padding, layer.dilation).flatten()

    def _products(self, tasks: Sequence[str]) -> Iterator[list[Tensor]]:
        """Yield the gradients of these tasks, of a piece of the input channels at a time.

        Each as a list by the first dimension of the kernel, of tensors of shape (O, T, channels, rest of the kernel).
        """
        assert self._S is not None
        inputs, S = self._inputs_of(self._calls[0]), self._S.flatten(2)
        v = torch.stack([self._numbers[task] for task in tasks])
        B, O, P = S.shape  # noqa: E741
        # Of a channel of a sample, in M and in what U is made of: all rows of the padded input.
        rows = inputs.shape[2] + 2 * int(self.module.padding[0])
        numbers = O + P + rows * (P // self._S.shape[2])
        of_one = numbers * self.module.weight[0, 0, 0].numel() * S.element_size()
        samples = max(1, min(B, _AT_ONCE // of_one))
        channels_at_once = max(1, _AT_ONCE // (of_one * samples))
        for channels in inputs.chunk(math.ceil(inputs.shape[1] / channels_at_once), dim=1):
            sums: list[Tensor] = []
            for some, S_of_some, v_of_some in zip(
                torch.split(channels, samples), torch.split(S, samples), torch.split(v, samples, dim=1), strict=True
            ):
                of_tasks = v_of_some.permute(2, 0, 1).contiguous()  # for the sake of speed
                parts = [
                    torch.bmm(of_tasks, torch.bmm(S_of_some, U).transpose(0, 1)).view(O, len(tasks), some.shape[1], -1)
                    for U in patches(some, self.module)
                ]
                sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
            yield sums

    # ---- what becomes of the tasks -----------------------------------------------------------------------------------

    @property
    def _pending(self) -> Collection[str]:
        return self._numbers.keys()

    def close(self, task: str) -> None:
        """Take note that nothing more of this task will be read: its norm will do."""
        if task in self._numbers and task in self._rows:
            self._multiply()
        if task not in self._numbers:
            super().close(task)
            return
        self._complete.add(task)
        if len(self._complete) == self._tasks:  # the way down the trunk, where memory is short, is still to come
            self._multiply()
            self._let_go()

    def _is_closed(self, task: str) -> bool:
        return task in self._complete or super()._is_closed(task)

    def finish(self) -> None:
        """Turn what is pending into rows and norms: nobody knows what becomes of the layer's input after the backward pass."""
        self._multiply()

    def rescale(self, task: str, factor: Tensor) -> None:
        """Multiply what was read of a task's gradient by ``factor``."""
        self._multiply()
        super().rescale(task, factor)

    def forget(self) -> None:
        """Let go of the current forward pass's tensors; what was read of them stays."""
        super().forget()
        self._let_go()

    def _let_go(self) -> None:
        self._calls.clear()
        self._way = self._S = None

    def clear(self) -> None:
        """Forget what was read: a new optimizer step begins."""
        self._numbers.clear()
        self._complete.clear()
        super().clear()


def _is_worth_it(tasks: int, positions: int) -> bool:
    """Reckon with all but the tasks' own products at what two gradients cost, and these at what memory costs."""
    return tasks * positions > 2 * (positions + tasks)


def _are_products(D: Tensor, S: Tensor, v: Tensor) -> bool:
    """Say whether each channel of each sample of ``D`` is ``S · v``, but for rounding."""
    few = 8  # samples at a time: no copy of a whole gradient is made to look at it
    for part, S_of_part, v_of_part in zip(*(torch.split(values, few) for values in (D, S, v)), strict=True):
        of_positions = v_of_part.view(*v_of_part.shape, *(1 for _ in S.shape[2:]))
        off = torch.addcmul(part, S_of_part, of_positions, value=-1).flatten(2).abs_().amax(2)
        if not (off <= 8 * torch.finfo(D.dtype).eps * part.flatten(2).abs().amax(2)).all():
            return False
    return True


def _one_for_all_positions(gradient: Tensor) -> Tensor | None:
    """Return the number, shape (B, O), that this gradient is at all positions, if it is one, and finite."""
    at_first = (slice(None), slice(None), *(slice(1) for _ in gradient.shape[2:]))
    first = gradient[at_first]
    if not (torch.equal(gradient, first.expand_as(gradient)) and bool(first.isfinite().all())):
        return None
    return first.flatten(1).clone()  # the gradient itself goes its way, and may be added to in place


def patches(inputs: Tensor, layer: Convolution) -> Iterator[Tensor]:
    """Yield U, of shape (B, P, channels · rest of the kernel), for each step along the first dimension of the kernel.

    The convolution's output is the sum of their products with ``W``. One step from the other they are shifted by a row, so
    that with a stride of 1 they are views of the same memory.

    Example:
        >>> layer, x = nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, bias=False), torch.randn(5, 3, 8, 8)
        >>> W = layer.weight.unbind(2)
        >>> product = sum(U @ W[step].flatten(1).T for step, U in enumerate(patches(x, layer)))
        >>> bool(torch.allclose(product, layer(x).flatten(2).mT, atol=1e-6))
        True
    """
    assert not isinstance(layer.padding, str)
    padded = F.pad(inputs, [size for padding in reversed(layer.padding) for size in (padding, padding)])
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    rows, *positions = [
        (size - wide * (of - 1) - 1) // step + 1
        for size, of, step, wide in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    of_sample, of_channel, of_row, *of_place = padded.stride()
    by_row = padded.as_strided(
        (*inputs.shape[:2], *kernel[1:], padded.shape[2], *positions),
        (
            of_sample,
            of_channel,
            *(step * wide for step, wide in zip(of_place, dilation[1:], strict=True)),
            of_row,
            *(step * far for step, far in zip(of_place, stride[1:], strict=True)),
        ),
    )
    by_row = by_row.reshape(inputs.shape[0], -1, padded.shape[2], math.prod(positions))
    for step in range(kernel[0]):
        first = step * dilation[0]
        yield by_row[:, :, first : first + stride[0] * (rows - 1) + 1 : stride[0]].flatten(2).mT
