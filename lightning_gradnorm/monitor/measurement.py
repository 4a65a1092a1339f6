"""Measures, in one optimizer step and over all ranks, what each term of a loss adds to the gradient of some parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_gradnorm.engine.layers import plain_name
from lightning_gradnorm.engine.ranks import Ranks
from lightning_gradnorm.gradients import (
    REST,
    GradientNorms,
    LossTermGradients,
    check_loss,
    flat_row,
    inner_products,
    row_width,
)


class StepMeasurement:
    """Measures the optimizer steps that the monitor selects, one after another.

    Args:
        caller: begins each error.
        model: whose loss is looked at.
        names: the losses; none if every scalar with a gradient counts, in which case ranks agree on the names in each step.
        parameters: by name, frozen ones too; ``None`` for those that at least two losses reach.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        names: Sequence[str],
        parameters: Mapping[str, nn.Parameter] | None,
        ranks: Ranks,
    ) -> None:
        self.terms = LossTermGradients(model.buffers(), caller=caller)
        self.is_active = False
        """Whether the current optimizer step is measured."""
        self._caller = caller
        self._model = model
        self._names = list(names)
        self._has_names = bool(names)
        self._parameters = parameters
        self._ranks = ranks
        self._reached: dict[str, set[str]] = {}
        self._candidates: dict[str, nn.Parameter] = {}
        self._watched: list[tuple[str, Tensor]] = []
        self._given: set[str] = set()

    def start_step(self) -> None:
        """Measure the optimizer step that begins now."""
        self.is_active = True
        parameters = self._parameters
        if parameters is None:
            parameters = {plain_name(name): p for name, p in self._model.named_parameters()}
        self._candidates = {name: p for name, p in parameters.items() if p.requires_grad}
        self.terms.begin(list(self._candidates.values()))

    def end_step(self) -> None:
        """Forget the step."""
        self.is_active = False
        self._candidates, self._watched, self._given = {}, [], set()
        self.terms.begin([])

    def watch(self, losses: Mapping[str, object]) -> None:
        """Measure these losses in the backward pass that follows.

        Raises:
            TypeError, ValueError: a named loss is no scalar with a gradient.
        """
        for name, loss in losses.items():
            if loss is None or (self._has_names and name not in self._names):
                continue
            if not self._has_names and not _could_be_term(loss):
                continue
            check_loss(loss, caller=f"{self._caller}: the loss '{name}'")
            assert isinstance(loss, Tensor)
            if not any(one is loss and called == name for called, one in self._watched):
                self._watched.append((name, loss))

    def read(self, total: Tensor, *, share: float, scale: float) -> None:
        """Read the watched losses' gradients before ``total`` is back-propagated; see `LossTermGradients.read`."""
        self.terms.read(total, self._watched, share=share, scale=scale)

    def end_batch(self) -> None:
        """Release the losses of this batch."""
        self._given |= {name for name, _ in self._watched}
        self._watched = []
        self.terms.release_graph()

    def require_backpropagated(self) -> None:
        """Check that every named loss that was watched in this step took part in a backward pass.

        Raises:
            ValueError: one did not.
        """
        for name in self._names if self._has_names and self._candidates else ():
            if name in self._given and name not in self.terms.sums:
                raise ValueError(
                    f"{self._caller}: what was given as the loss '{name}' took no part in the backward pass. Add it to what "
                    f"is back-propagated (by manual_backward, in manual optimization); give the very tensor, not a copy of "
                    f"it, and give it before backward."
                )

    @torch.no_grad()
    def collect(self, shown: Iterable[str]) -> tuple[GradientNorms, dict[str, float]] | None:
        """Average the step over the ranks, all of which must call this together.

        Args:
            shown: names under which this rank's model has shown losses so far, in their order.

        Returns:
            What the terms' gradients have in common, and the weight that each term had beyond the model's own coefficient;
            or None if no loss has reached a parameter yet.

        Raises:
            ValueError: shared parameters are asked for, and no two losses share any.
        """
        self._agree_on_names(shown)
        sums, parameters = self.terms.sums, list(self._candidates.values())
        if not parameters or not self._names:
            return None  # all parameters are frozen, or no loss was shown; the same holds on all ranks
        zeros = flat_row([None] * len(parameters), parameters)
        names = [*self._names, REST]
        # One line per term: was it present, its two factors, and which parameters it reached.
        table = zeros.new_zeros(len(names), 3 + len(parameters))
        for line, name in zip(table, names, strict=True):
            if name in sums:
                term = sums[name]
                line[0], line[1], line[2] = 1, term.weighted, term.plain
                line[3:] = torch.tensor(term.reaches)
        rows, weights = {}, {}
        for (present, weighted, plain, *reaches), name in zip(self._ranks.sum(table).tolist(), names, strict=True):
            if present:
                # Row by row: one sum over a table of all rows would need a second copy of all of them.
                row = self._ranks.sum(sums[name].row if name in sums else zeros)
                rows[name], weights[name] = row / self._ranks.size, weighted / plain if plain else 1.0
                reached = self._reached.setdefault(name, set())
                reached.update(called for called, reach in zip(self._candidates, reaches, strict=True) if reach)
        rows = self._cut_to_shared(rows)
        if not set(rows) - {REST}:
            return None
        return GradientNorms(list(rows), inner_products(list(rows.values()))), weights

    def _agree_on_names(self, shown: Iterable[str]) -> None:
        """Add names that a rank has shown for the first time."""
        if self._has_names:
            return
        of_all = self._ranks.gather_objects((list(shown), list(self.terms.sums)))
        known = set(self._names).union(*(terms for _, terms in of_all))
        self._names = [name for name in dict.fromkeys(n for names, _ in of_all for n in names) if name in known]

    def _cut_to_shared(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the pieces of the rows that belong to parameters which at least two losses have reached."""
        if self._parameters is not None:
            return rows
        least = min(2, len(self._names))
        by_loss = [reached for name, reached in self._reached.items() if name != REST]
        is_shared = [sum(name in reached for reached in by_loss) >= least for name in self._candidates]
        if not any(is_shared):
            if len(by_loss) < len(self._names):
                return {}  # there are losses still to come
            raise ValueError(
                f"{self._caller}: parameters='shared' are those that two of the losses {self._names} reach, and there is "
                f"none. Name a layer: parameters='encoder'."
            )
        widths = [row_width([parameter]) for parameter in self._candidates.values()]

        def cut(row: Tensor) -> Tensor:
            return torch.cat(
                [piece for piece, shared in zip(torch.split(row, widths), is_shared, strict=True) if shared]
            )

        return {name: cut(row) for name, row in rows.items()}


def _could_be_term(loss: object) -> bool:
    return isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad and not loss.is_complex()
