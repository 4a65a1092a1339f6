"""Reads how much each term of a composite loss adds to the gradient of some parameters in one optimizer step."""

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
from lightning_gradnorm.gradients.repeated_passes import RepeatedPasses

REST = "rest_of_loss"
"""The name of the remainder: everything in the back-propagated loss besides the named terms."""


@dataclass
class LossTerm:
    """Sums of one term over the backward passes of one optimizer step."""

    row: Tensor
    """Contribution to the gradient of the parameters, shape (n,)."""
    reaches: list[bool]
    """Which of the parameters the term depends on."""
    weighted: Tensor
    """The factors with which the term was back-propagated."""
    plain: Tensor
    """The factors that the term has in the model's own loss. ``weighted / plain`` is the weight from a strategy."""


@dataclass
class _Reading:
    """A term of the loss that is about to be back-propagated."""

    name: str
    loss: Tensor
    plain: Tensor
    row: Tensor
    reaches: list[bool]
    weighted: Tensor | None = None


class LossTermGradients:
    """Sums up each term's contribution to ``.grad`` over the backward passes of one optimizer step.

    A balancing strategy may scale a loss's gradient during the backward pass, by a hook on the loss. So `read` takes each
    term's gradient before the pass, as it stands in the total, by a separate first-order pass. During the pass, hooks from
    `attach_hooks` record the factor that actually arrives at each term, and `finalize` scales the gradients by it.

    Args:
        buffers: all buffers of the model; they keep their values when reading recomputes a checkpointed region.
        caller: begins each error.
    """

    def __init__(self, buffers: Iterable[Tensor], *, caller: str) -> None:
        self.parameters: list[Tensor] = []
        self.sums: dict[str, LossTerm] = {}
        """The terms that a backward pass of this step has reached."""
        self._buffers = BufferGuard(buffers)
        self._caller = caller
        self._repeats = RepeatedPasses(f"{caller}: the gradient of the loss", " while you measure")
        self._checked: set[str] = set()
        self._readings: list[_Reading] = []
        self._hooks = ExitStack()

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Start new sums of the gradients of these parameters."""
        self.parameters, self.sums = list(parameters), {}

    def read(self, total: Tensor, losses: Sequence[tuple[str, Tensor]], *, share: float, scale: float) -> None:
        """Read the gradients of all terms of a total that is about to be back-propagated.

        Args:
            total: the loss that the model back-propagates.
            losses: the terms by name; those that do not contribute to this total are ignored.
            share: the factor that the total will be multiplied by: 1 over the number of micro-batches.
            scale: the loss scaler's factor. It is also applied here, because small numbers would underflow in half precision,
                and divided out of the results.

        Raises:
            ValueError: a term contains another, or the graph cannot be traversed twice.
        """
        self._readings = []
        if not (total.requires_grad and self.parameters):
            return
        seed = torch.full_like(total, share * scale)
        # Outside autocast, like the backward pass itself. A checkpointed BatchNorm must not count the batch twice.
        with (
            torch.autocast(total.device.type, enabled=False),
            self._buffers.preserved(",".join(name for name, _ in losses)),
        ):
            inputs = [loss for _, loss in losses]
            seeds = torch.autograd.grad(total, inputs, seed, retain_graph=True, allow_unused=True) if inputs else ()
            found = [(name, loss, own) for (name, loss), own in zip(losses, seeds, strict=True) if own is not None]
            self._check_graph(total, [(name, loss) for name, loss, _ in found])
            for name, loss, own in found:
                row, reaches = self._row(name, loss, own, scale)
                self._readings.append(_Reading(name, loss, own, row, reaches))
            stop = {node_of(loss) for _, loss, _ in found}
            if nodes_on_paths([node_of(total)], self.parameters, stop=stop):
                # Some path avoids all terms. Zero gradients at the terms leave exactly the remainder's gradient.
                with ExitStack() as hooks:
                    for _, loss, _ in found:
                        hooks.callback(loss.register_hook(torch.zeros_like).remove)  # type: ignore[no-untyped-call]
                    row, reaches = self._row(REST, total, seed, scale)
                self._readings.append(_Reading(REST, total, seed, row, reaches, weighted=seed))

    def attach_hooks(self) -> None:
        """Place hooks on the terms, after all existing ones, so that they see the weighted gradient."""
        for reading in self._readings:
            if reading.name != REST:
                handle = reading.loss.register_hook(partial(_record_weighted, reading))  # type: ignore[no-untyped-call]
                self._hooks.callback(handle.remove)

    def finalize(self) -> None:
        """Add the readings to the sums, with the weights that the backward pass has applied."""
        self._hooks.close()
        for reading in self._readings:
            if reading.weighted is None:
                continue  # the backward pass did not reach this term
            # A strategy multiplies all entries of a loss by the same weight.
            largest = reading.plain.abs().argmax()
            of_plain, of_weighted = reading.plain.reshape(-1)[largest], reading.weighted.reshape(-1)[largest]
            row = reading.row * torch.where(of_plain == 0, 1, of_weighted / of_plain).to(reading.row)
            weighted, plain = (one.to(row).abs().sum() for one in (reading.weighted, reading.plain))
            term = self.sums.get(reading.name)
            if term is not None:
                row, weighted, plain = term.row + row, term.weighted + weighted, term.plain + plain
                reading.reaches = [a or b for a, b in zip(term.reaches, reading.reaches, strict=True)]
            self.sums[reading.name] = LossTerm(row, reading.reaches, weighted, plain)
        self._readings = []

    def release_graph(self) -> None:
        """Release the tensors of the current forward pass; the sums stay."""
        self._hooks.close()
        self._readings = []

    def _row(self, name: str, output: Tensor, seed: Tensor, scale: float) -> tuple[Tensor, list[bool]]:
        seeds = self._repeats.checked(name, [output], [seed], self.parameters)
        found = torch.autograd.grad(output, self.parameters, seeds, retain_graph=True, allow_unused=True)
        return flat_row(found, self.parameters) / scale, [one is not None for one in found]

    def _check_graph(self, total: Tensor, terms: Sequence[tuple[str, Tensor]]) -> None:
        """Check the graph when a term appears for the first time."""
        names = {name for name, _ in terms} | {REST}
        if self._checked >= names:
            return
        self._checked |= names
        if cause := reason_not_retraversable(nodes_on_paths([node_of(total)], self.parameters)):
            raise ValueError(
                f"{self._caller}: the loss reaches the parameters through {cause.split(',')[0].rstrip('.')}, whose graph "
                f"cannot be traversed twice. Measure the gradients in a short run without it."
            )
        for name, loss in terms:
            others = {other: tensor for other, tensor in terms if other != name}
            inside = {other: tensor for other, tensor in others.items() if node_of(tensor) is not node_of(loss)}
            between = nodes_on_paths([node_of(loss)], inside.values())
            nested = [other for other, tensor in others.items() if tensor is loss]
            nested += [other for other, tensor in inside.items() if node_of(tensor) in between]
            if nested:
                separate = [other for other in others if other != nested[0]] + nested[:1]
                raise ValueError(
                    f"{self._caller}: the loss '{name}' contains the loss '{nested[0]}', so their gradients are not parts "
                    f"of one sum. Name losses that are, for example losses={separate}."
                )


def _record_weighted(reading: _Reading, seed: Tensor) -> None:
    reading.weighted = seed.detach().clone()
