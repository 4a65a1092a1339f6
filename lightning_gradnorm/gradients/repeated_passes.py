"""Finds custom autograd functions that cannot be passed twice, by passing them twice.

Fused kernels save memory by overwriting. A fused cross-entropy computes a gradient in its forward pass and multiplies it in
place by the one that arrives; a fused norm writes its result over the gradient it received. One backward pass never notices.
But an extra first-order pass would spoil both, without an error, since kernels do not count as changes in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradnorm.gradients.graph import (
    first_order_pass,
    is_custom,
    node_of,
    nodes_on_paths,
    reason_not_retraversable,
)
from lightning_gradnorm.gradients.readers import Outputs, flat_row

_FACTOR = 0.7310586  # a function that overwrites may skip a factor of 1
_NAME_THEM = "; or, if it is in the loss or in a head, name shared_layer and heads, which are then read below it"
_TRUSTED = ("torch", "lightning_gradnorm")


class _Search(NamedTuple):
    """A search for custom functions on the way from some nodes to others."""

    start: set[Node]
    end: set[Node]
    custom: list[str]
    """The names of those found."""
    can_be_passed: bool
    """Whether the whole way can be passed again."""


class RepeatedPasses:
    """Checks, before a first-order pass, that it gives the same result each time, and lends it gradients to overwrite.

    Args:
        begin: begins the error, before the name of the loss.
        way_out: ends it.
    """

    def __init__(self, begin: str, way_out: str = _NAME_THEM) -> None:
        self._begin, self._way_out = begin, way_out
        self._has_custom: dict[tuple[str, bool], bool] = {}
        """Checked passes → whether they contain a custom function."""
        self._last: _Search | None = None

    def forget_graph(self) -> None:
        """Release the graph that was searched last."""
        self._last = None

    def look_at(self, starts: Mapping[str, Iterable[Node]], targets: Sequence[Tensor], *, once: bool = True) -> None:
        """Prepare for `checked` at these edges, name → nodes: search the graph behind all of them at once."""
        if not once or any((name, True) not in self._has_custom for name in starts):
            self._search(set().union(*starts.values()), targets)

    def checked(
        self, name: str, outputs: Outputs, gradients: Sequence[Tensor], targets: Sequence[Tensor], *, once: bool = True
    ) -> Sequence[Tensor]:
        """Return the gradients with which to pass from ``outputs`` to ``targets``.

        Args:
            name: of the loss.
            outputs: where the pass begins.
            gradients: the gradients that arrived there.
            targets: where it ends.
            once: whether to check a pass that begins there only the first time.

        Raises:
            ValueError: two passes give different gradients.
        """
        key = name, isinstance(outputs[0], GradientEdge)
        if not (once and key in self._has_custom):
            start = {one.node if isinstance(one, GradientEdge) else node_of(one) for one in outputs}
            search = self._search(start, targets)
            self._has_custom[key] = bool(search.custom)
            if search.custom and search.can_be_passed:
                self._compare(name, outputs, gradients, targets, ", ".join(search.custom))
        return [one.clone() for one in gradients] if self._has_custom[key] else gradients

    def _search(self, start: set[Node], targets: Sequence[Tensor]) -> _Search:
        """Search the graph between the start and the targets, or return the last search if it answers for this one."""
        end, last = set(map(node_of, targets)), self._last
        # Many tasks begin at the same tensors; and where nothing was found behind all of them, there is nothing behind one.
        if last is not None and last.end == end and (last.start == start or (not last.custom and last.start > start)):
            return last
        nodes = nodes_on_paths(start, end)
        custom = sorted({node.name() for node in nodes if is_custom(node) and not _is_trusted(node)})
        self._last = _Search(start, end, custom, not reason_not_retraversable(nodes))
        return self._last

    def _compare(
        self, name: str, outputs: Outputs, gradients: Sequence[Tensor], targets: Sequence[Tensor], custom: str
    ) -> None:
        seeds = [_FACTOR * (one if bool(one.any()) else torch.ones_like(one)) for one in gradients]

        def one_pass() -> Tensor:
            own = [one.clone() for one in seeds]
            return flat_row(first_order_pass(outputs, targets, own), targets)

        first, cause = one_pass(), None
        try:
            difference = (first - one_pass()).norm()
            is_same = not bool(difference > 0.05 * first.norm())  # numbers that are not finite are reported elsewhere
        except Exception as error:  # the saved tensors are gone, or count as changed in place
            is_same, cause = False, error
        if not is_same:
            raise ValueError(
                f"{self._begin} '{name}' cannot be read beside the ordinary backward pass: a second pass through the custom "
                f"autograd function {custom} gives another gradient than the first, as with fused kernels that overwrite what "
                f"they have saved. Use its ordinary form{self._way_out}."
            ) from cause


def _is_trusted(node: Any) -> bool:
    function = getattr(type(node), "_forward_cls", None)
    return function is not None and function.__module__.partition(".")[0] in _TRUSTED
