"""The norms of a convolution's gradients where its output comes to the heads by way of a mean over the positions.

Behind such a pooling, the tasks' gradients at the layer's outputs differ in no more than one number for each sample b and
channel o, whatever the position p::

    D_i[b, o, p] = S[b, o, p] · v_i[b, o]

S is what lies between layer and pooling: zeros and ones for a ReLU. With the patches U of the input,
``∇_W L_i[o] = Σ_bp D_i[b, o, p] U[b, p]`` becomes::

    ∇_W L_i[o] = Σ_b v_i[b, o] M[b, o],   M[b, o] = Σ_p S[b, o, p] U[b, p]

M takes the products of one task's gradient, and then each task a P-th of them, P being the number of positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from lightning_gradnorm.gradients.layer import LayerGradients
from lightning_gradnorm.gradients.paths import node_of

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

_PRODUCTS: Mapping[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: conv1d_weight,
    nn.Conv2d: conv2d_weight,
    nn.Conv3d: conv3d_weight,
}

_AT_ONCE = 8 * 2**20
"""Bytes of M and U that are made at a time: they fit into a processor's cache."""


class _Pattern:
    """S, shape (B, O, P): the first task's gradient itself, and where that is nothing, the next one's."""

    def __init__(self, D: Tensor) -> None:
        self.S = D
        self._where = self._peaks_of(D)
        """The position of the largest value for each sample and channel, shape (B, O, 1)."""

    @staticmethod
    def _peaks_of(D: Tensor) -> Tensor:
        return torch.cat([part.abs().argmax(dim=2, keepdim=True) for part in _pieces(D)])

    def numbers_of(self, D: Tensor) -> Tensor | None:
        """Return v_i, shape (B, O), with which S gives this gradient but for rounding; ``None`` if there is none."""
        v = self._ratios(D)
        if v is None and bool(D.isfinite().all()):
            self._learn(D)
            v = self._ratios(D)
        return v

    def _ratios(self, D: Tensor) -> Tensor | None:
        """Ask it of each channel of each sample: a large gradient may belong to a sample that is all black."""
        of_S, of_D = (gradient.gather(2, self._where) for gradient in (self.S, D))
        ratios = torch.where(of_S == 0, 0.0, of_D / of_S)
        most = 8 * torch.finfo(D.dtype).eps * of_D.abs()
        for part, S, v, bound in zip(*map(_pieces, (D, self.S, ratios, most)), strict=True):
            off = torch.addcmul(part, S, v, value=-1).abs_().amax(dim=2, keepdim=True)
            if not (off <= bound).all():  # as where something is not finite
                return None
        return ratios.squeeze(2)

    def _learn(self, D: Tensor) -> None:
        """Take S from this gradient where no task before has had one."""
        is_known = self.S.gather(2, self._where) != 0
        self._where = torch.where(is_known, self._where, self._peaks_of(D))
        self.S = torch.where(is_known, self.S, D)


def _pieces(values: Tensor) -> Sequence[Tensor]:
    """Return a few samples at a time: no copy of a whole gradient is made to look at it, and one piece tells most apart."""
    return torch.split(values, 4)


class PooledGradients(LayerGradients):
    """Reads ``∇_W L_i`` of a convolution; the norms of several tasks it finds from what their gradients have in common.

    That they have it is not taken from the network: it is seen in the numbers, of each task in each pass. Where it is not
    so, the gradients are read as they are; if it is not so from the beginning, without another try.

    A task is pending while something is known of it at the output alone, until the backward pass is over. It may be complete
    by then: nothing more will be read of it, and its norm will do.

    Args:
        layer: whose ``weight`` is ``W``; each call between `before` and `after`.
        tasks: how many there are.
        is_ours: says of a hook of the layer that it comes from a reader; see `LayerGradients`.
    """

    module: Convolution

    def __init__(self, layer: Convolution, tasks: int, is_ours: Callable[[Any], bool] = lambda hook: False) -> None:
        super().__init__(layer, is_ours)
        self._tasks = tasks
        self._is_given_up: bool | None = None
        """``None`` until two tasks have been compared. What comes later does not change it: a training that is resumed
        there would not know of it."""
        self._pattern: _Pattern | None = None
        self._numbers: dict[str, Tensor] = {}
        """Task → v_i, of those that are pending and no longer alone."""
        self._complete: set[str] = set()
        """Those of the pending tasks of which nothing more will be read."""
        self._alone: tuple[str, Tensor] | None = None
        """The only task so far and its gradient: what a second one has in common with it is still to be seen."""

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
        """Reckon with all but the tasks' own products at what four gradients cost, and these at what memory costs."""
        P = output.shape[2:].numel()
        is_worth_it = inputs.numel() > 0 and self._tasks * P > 4 * (P + self._tasks)
        return is_worth_it and not self._is_given_up

    def _is_product_with(self, W: Tensor, node: Node) -> bool:
        return node.name() == "ConvolutionBackward0" and any(of is node_of(W) for of, _ in node.next_functions)

    def read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add the task's contribution to the gradient of ``W``, or note the numbers that it is made of."""
        if len(self._calls) > 1:  # each has a pattern of its own; what is pending is of the first
            self._multiply()
            self._calls.clear()
        super().read(task, outputs, gradients)

    def _take(self, task: str, found: Sequence[Tensor | None]) -> None:
        (D,) = found
        assert D is not None
        alone, self._alone = self._alone, None
        if self._pattern is None and (alone is None or alone[0] == task):
            self._alone = task, D if alone is None else alone[1] + D
            return
        arrived = [(task, D)] if alone is None else [alone, (task, D)]
        numbers = self._numbers_of([gradient.flatten(2) for _, gradient in arrived])
        if numbers is None:
            self._read_as_they_are(arrived)
            return
        self._is_given_up = False
        for (one, _), v in zip(arrived, numbers, strict=True):
            self._numbers[one] = self._numbers[one] + v if one in self._numbers else v

    def _numbers_of(self, gradients: Sequence[Tensor]) -> list[Tensor] | None:
        """Return v_i of each of them; ``None`` unless all are of one pattern."""
        if self._pattern is None:
            self._pattern = _Pattern(gradients[0])
        numbers = [self._pattern.numbers_of(D) for D in gradients]
        found = [v for v in numbers if v is not None]
        return found if len(found) == len(numbers) else None

    def _read_as_they_are(self, arrived: Sequence[tuple[str, Tensor]]) -> None:
        rows = [(task, self._product(D)) for task, D in arrived]
        if not self._numbers:
            self._pattern = None
        if all(bool(D.isfinite().all()) for _, D in arrived):
            self._multiply()
            self._calls.clear()
            self._is_given_up = self._is_given_up is None
        for task, row in rows:
            self._settle(task, row)

    def _settle(self, task: str, row: Tensor) -> None:
        """Add what was read of the task as it is; keep its norm alone if nothing more will be read of it."""
        is_complete = task in self._complete
        self._complete.discard(task)
        self._add(task, row)
        if is_complete:
            super().close(task)

    def _product(self, D: Tensor) -> Tensor:
        """Return ``∇_W L`` for a gradient at the output."""
        layer, inputs = self.module, self._inputs_of(self._calls[0])
        product = _PRODUCTS[type(layer)]
        return product(inputs, layer.weight.shape, D, layer.stride, layer.padding, layer.dilation).flatten()

    def _products(self, tasks: Sequence[str]) -> Iterator[Tensor]:
        """Yield the gradients of these tasks, of one piece of the input channels after another, as (O, T, values)."""
        assert self._pattern is not None
        inputs, S = self._inputs_of(self._calls[0]), self._pattern.S
        v = torch.stack([self._numbers[task] for task in tasks])
        B, O, P = S.shape  # noqa: E741
        of_one = (O + P) * self.module.weight[0, 0].numel() * S.element_size()  # channel of one sample, in M and U
        samples = max(1, min(B, _AT_ONCE // of_one))
        for channels in torch.split(inputs, max(1, _AT_ONCE // (of_one * samples)), dim=1):
            parts = zip(
                torch.split(channels, samples), torch.split(S, samples), torch.split(v, samples, dim=1), strict=True
            )
            yield reduce(torch.add, (self._product_of_part(*part) for part in parts))

    def _product_of_part(self, inputs: Tensor, S: Tensor, v: Tensor) -> Tensor:
        """Return what some samples contribute; ``v`` is of shape (T, B, O)."""
        M = torch.bmm(S, patches(inputs, self.module))
        return torch.bmm(v.permute(2, 0, 1).contiguous(), M.transpose(0, 1))  # contiguous for the sake of speed

    def _multiply(self) -> None:
        """Turn what is known at the output into rows; of a task of which nothing more is read, into its norm."""
        if self._alone is not None:
            (task, D), self._alone = self._alone, None
            self._settle(task, self._product(D))
        complete = [task for task in self._numbers if task in self._complete]
        if complete:
            norms = [torch.linalg.vector_norm(part, dim=2) for part in self._products(complete)]
            self._closed |= zip(complete, torch.linalg.vector_norm(torch.cat(norms), dim=0).unbind(), strict=True)
        to_come = [task for task in self._numbers if task not in self._complete]
        if to_come:
            gradients = torch.cat(list(self._products(to_come)), dim=2)
            for task, gradient in zip(to_come, gradients.unbind(1), strict=True):
                self._add(task, gradient.flatten())
        self._complete.difference_update(self._numbers)
        self._numbers.clear()

    @property
    def _pending(self) -> Collection[str]:
        return {*self._numbers, *([] if self._alone is None else [self._alone[0]])}

    def close(self, task: str) -> None:
        """Take note that nothing more of this task will be read: its norm will do."""
        is_pending = task in self._pending
        if is_pending and task in self._rows:
            self._multiply()
        elif is_pending:
            self._complete.add(task)
            return
        super().close(task)

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
        self._pattern = None

    def clear(self) -> None:
        """Forget what was read: a new optimizer step begins."""
        self._numbers.clear()
        self._complete.clear()
        self._alone = None
        super().clear()


def patches(inputs: Tensor, layer: Convolution) -> Tensor:
    """Return U, shape (B, P, channels · kernel), such that the convolution's output is a product of it with ``W``.

    `torch.nn.functional.unfold` does it for pictures alone, and on a CPU takes three times as long.

    Example:
        >>> layer, x = nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, bias=False), torch.randn(5, 3, 8, 8)
        >>> product = patches(x, layer) @ layer.weight.flatten(1).T
        >>> bool(torch.allclose(product, layer(x).flatten(2).mT, atol=1e-6))
        True
    """
    assert not isinstance(layer.padding, str)
    padded = F.pad(inputs, [size for padding in reversed(layer.padding) for size in (padding, padding)])
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    positions = [
        (size - wide * (of - 1) - 1) // step + 1
        for size, of, step, wide in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    of_sample, of_channel, *of_place = padded.stride()
    U = padded.as_strided(
        (*inputs.shape[:2], *kernel, *positions),
        (
            of_sample,
            of_channel,
            *(step * wide for step, wide in zip(of_place, dilation, strict=True)),
            *(step * far for step, far in zip(of_place, stride, strict=True)),
        ),
    )
    return U.reshape(inputs.shape[0], -1, math.prod(positions)).mT
