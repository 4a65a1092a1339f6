"""What each part of a composite loss gives to the gradient of some parameters in the course of one optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_gradnorm.gradients.buffers import BufferGuard
from lightning_gradnorm.gradients.graph import node_of, nodes_on_paths, reason_not_retraversable
from lightning_gradnorm.gradients.readers import flat_row

REST = "rest_of_loss"
"""What is in the back-propagated loss besides the parts that were named."""


@dataclass
class LossTerm:
    """Sums over the backward passes of one optimizer step."""

    row: Tensor
    """Contribution to the gradient of the parameters, shape (n,)."""
    reaches: list[bool]
    """Which of the parameters the part depends on."""
    weighted: Tensor
    """The factors with which the part was back-propagated…"""
    plain: Tensor
    """… and those that it has in the loss as the model computes it. Their ratio is the part's weight."""


@dataclass
class _Reading:
    """A part of the loss that is about to be back-propagated."""

    name: str
    loss: Tensor
    plain: Tensor
    row: Tensor
    reaches: list[bool]
    weighted: Tensor | None = None


class LossTermGradients:
    """Sums up each part's contribution to ``.grad`` over the backward passes of one optimizer step.

    Before a backward pass, `read` takes the gradient of each part as it stands in the total, by a first-order pass of its
    own. Hooks, placed by `attach_hooks`, see by how much the part is multiplied beyond that, by a balancing strategy say, and
    `finalize` puts both together. The graph that the backward pass will use, and all that it computes, stays as it is.

    Args:
        buffers: all of the model's, kept as they are where a reading runs a checkpointed region again.
        asked_by: the beginning of each error.
    """

    def __init__(self, buffers: Iterable[Tensor], *, asked_by: str) -> None:
        self.parameters: list[Tensor] = []
        self.parts: dict[str, LossTerm] = {}
        self._buffers = BufferGuard(buffers)
        self._asked_by = asked_by
        self._examined: set[str] = set()
        self._readings: list[_Reading] = []
        self._hooks = ExitStack()

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Begin with new sums, of the gradients of these parameters."""
        self.parameters, self.parts = list(parameters), {}

    def read(self, total: Tensor, losses: Sequence[tuple[str, Tensor]], *, share: float, scale: float) -> None:
        """Read the gradients of all parts of a total that is about to be back-propagated.

        Args:
            total: what the model back-propagates.
            losses: the parts, by name; those that are no part of this total are passed over.
            share: what the total will be multiplied by: 1 over the number of micro-batches.
            scale: what a loss scaler multiplies it by besides. It is in all passes, as it is in backward, for the sake of
                small numbers in half precision; what comes out of them is divided by it.

        Raises:
            ValueError: a part contains another, or the graph cannot be walked twice.
        """
        self._readings = []
        if not (total.requires_grad and self.parameters):
            return
        seed = torch.full_like(total, share * scale)
        # As in the backward pass itself: outside autocast, and with no second batch seen by a checkpointed BatchNorm.
        with (
            torch.autocast(total.device.type, enabled=False),
            self._buffers.preserved(",".join(n for n, _ in losses)),
        ):
            seeds = self._grad(total, [loss for _, loss in losses], seed)
            found = [(name, loss, own) for (name, loss), own in zip(losses, seeds, strict=True) if own is not None]
            self._examine(total, [(name, loss) for name, loss, _ in found])
            for name, loss, own in found:
                row, reaches = self._row(loss, own, scale)
                self._readings.append(_Reading(name, loss, own, row, reaches))
            stop = {node_of(loss) for _, loss, _ in found}
            if nodes_on_paths([node_of(total)], self.parameters, stop=stop):
                with ExitStack() as hooks:
                    for _, loss, _ in found:
                        hooks.callback(loss.register_hook(torch.zeros_like).remove)  # type: ignore[no-untyped-call]
                    row, reaches = self._row(total, seed, scale)
                self._readings.append(_Reading(REST, total, seed, row, reaches, weighted=seed))

    def attach_hooks(self) -> None:
        """Place hooks, behind all that are there, on the parts that were read: the backward pass is about to begin."""
        for reading in self._readings:
            if reading.name != REST:
                handle = reading.loss.register_hook(partial(_note, reading))  # type: ignore[no-untyped-call]
                self._hooks.callback(handle.remove)

    def finalize(self) -> None:
        """Add what was read to the sums, as the backward pass that is over has weighted it."""
        self._hooks.close()
        for reading in self._readings:
            if reading.weighted is None:
                continue  # the pass did not come to it
            weight = torch.where(reading.plain == 0, 1, reading.weighted / reading.plain).reshape(())
            row = reading.row * weight.to(reading.row)
            weighted, plain = (one.to(row).reshape(()).abs() for one in (reading.weighted, reading.plain))
            part = self.parts.get(reading.name)
            if part is None:
                self.parts[reading.name] = LossTerm(row, reading.reaches, weighted, plain)
            else:
                part.row = part.row + row
                part.reaches = [a or b for a, b in zip(part.reaches, reading.reaches, strict=True)]
                part.weighted, part.plain = part.weighted + weighted, part.plain + plain
        self._readings = []

    def release_graph(self) -> None:
        """Let go of the current forward pass's tensors; what was finalized stays."""
        self._hooks.close()
        self._readings = []

    def _row(self, output: Tensor, seed: Tensor, scale: float) -> tuple[Tensor, list[bool]]:
        found = self._grad(output, self.parameters, seed)
        return flat_row(found, self.parameters) / scale, [one is not None for one in found]

    @staticmethod
    def _grad(output: Tensor, inputs: Sequence[Tensor], seed: Tensor) -> Sequence[Tensor | None]:
        if not inputs:
            return ()
        return torch.autograd.grad(output, list(inputs), seed, retain_graph=True, allow_unused=True)

    def _examine(self, total: Tensor, parts: Sequence[tuple[str, Tensor]]) -> None:
        if self._examined >= {name for name, _ in parts} | {REST}:
            return
        self._examined |= {name for name, _ in parts} | {REST}
        if cause := reason_not_retraversable(nodes_on_paths([node_of(total)], self.parameters)):
            raise ValueError(
                f"{self._asked_by}: the loss reaches the parameters through {cause.split(',')[0].rstrip('.')}, whose graph "
                f"cannot be walked twice. Look at the gradients in a short run without it."
            )
        for name, loss in parts:
            others = [(other, tensor) for other, tensor in parts if other != name]
            same = next((other for other, tensor in others if tensor is loss), None)
            inside = [(other, tensor) for other, tensor in others if node_of(tensor) is not node_of(loss)]
            between = nodes_on_paths([node_of(loss)], [tensor for _, tensor in inside])
            nested = same or next((other for other, tensor in inside if node_of(tensor) in between), None)
            if nested is not None:
                parts_of_sum = [other for other, _ in others if other != nested] + [nested]
                raise ValueError(
                    f"{self._asked_by}: the loss '{name}' contains the loss '{nested}', so that their gradients are not parts "
                    f"of one sum. Name those that are: losses={parts_of_sum}, say."
                )


def _note(reading: _Reading, seed: Tensor) -> None:
    reading.weighted = seed.detach().clone()
