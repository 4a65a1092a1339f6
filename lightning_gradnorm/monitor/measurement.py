"""Measures, in one optimizer step and over all ranks, what each term of a loss adds to the gradient of some parameters."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_gradnorm.callbacks.losses import LossSource
from lightning_gradnorm.callbacks.trainer_loop import TrainerLoop
from lightning_gradnorm.engine.constant_losses import ConstantLosses
from lightning_gradnorm.engine.graph_checks import require_backpropagated
from lightning_gradnorm.engine.layers import plain_name
from lightning_gradnorm.engine.step_state import HeldGradients, WatchedLoss
from lightning_gradnorm.gradients import (
    REST,
    GradientNorms,
    LossTermGradients,
    check_loss,
    flat_row,
    inner_products,
    row_width,
)
from lightning_gradnorm.gradients.graph import has_gradient


class StepMeasurement:
    """Measures the optimizer steps that the monitor selects, one after another.

    If the source leaves the names of the losses open, every scalar with a gradient counts, and the ranks agree on the names in
    each step. ``parameters`` are given by name, including frozen ones; ``None`` stands for those that two or more losses reach,
    and for all if there are none.
    """

    def __init__(
        self, source: LossSource, model: nn.Module, parameters: Mapping[str, nn.Parameter] | None, loop: TrainerLoop
    ) -> None:
        self.loop = loop
        self.terms = LossTermGradients(model.buffers(), caller=source.caller)
        self.is_active = False
        """Whether the current optimizer step is measured."""
        self._source = source
        self._model = model
        self._names = list(source.names)
        self._parameters = parameters
        self._ranks = loop.ranks
        self._reached: dict[str, set[str]] = {}
        self._candidates: dict[str, nn.Parameter] = {}
        self._constants = ConstantLosses(source.caller, loop.ranks, noun="loss")
        self._watched: list[tuple[str, WatchedLoss]] = []
        self._given: dict[str, None] = {}
        self._held: HeldGradients | None = None
        self.skipped = False
        """Whether the loss scaler skips the current optimizer step."""
        self._stepped = False
        self._before: dict[str, int] = {}

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
        self.is_active = self.skipped = self._stepped = False
        self._candidates, self._watched, self._given, self._held = {}, [], {}, None
        self.terms.begin([])

    def watch(self, losses: Mapping[str, object]) -> None:
        """Measure these losses in the backward pass that follows.

        Raises:
            TypeError, ValueError: a named loss is not a scalar with a gradient.
        """
        self._source.shown |= dict.fromkeys(losses)
        for name, loss in losses.items():
            is_term = name in self._source.names if self._source.names else _could_be_term(loss)
            if loss is None or not is_term or self._constants.is_absent(name, loss):
                continue
            check_loss(loss, caller=f"{self._source.caller}: the loss '{name}'", is_scalar=False)
            assert isinstance(loss, Tensor)
            if not any(one.tensor is loss and called == name for called, one in self._watched):
                self._watched.append((name, WatchedLoss.of(loss)))
                self._given[name] = None

    def read(self, total: Tensor, *, share: float) -> None:
        """Read the watched losses' gradients before ``total`` is back-propagated; see `LossTermGradients.read`.

        Call it before Lightning calls ``on_before_backward``: from then on, balancing callbacks scale the gradients of losses.

        Raises:
            ValueError: a loss has changed in place since it was shown.
        """
        for name, loss in self._watched:
            if loss.has_changed:
                raise ValueError(
                    f"{self._source.caller}: the loss '{name}' has been changed in place since it was shown, as by "
                    f"loss += …, so its own gradient cannot be separated. Write loss = loss + …"
                )
        with isolate_rng():
            losses = [(name, loss.tensor) for name, loss in self._watched]
            self.terms.read(total, losses, share=share, scale=self.loop.loss_scale())

    def before_backward(self) -> None:
        """Called right before each backward pass, and after `read`."""
        if self._held is not None and self._held.were_dropped():  # without a step, so they do not count
            self.terms.begin(list(self._candidates.values()))
        self.terms.attach_hooks()

    def after_backward(self) -> None:
        """Called after each backward pass."""
        self.terms.finalize()
        self._held = HeldGradients(self._candidates.values())

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before each optimizer step that Lightning knows about."""
        if self.is_active:
            self.skipped = self.skipped or self.loop.skips(optimizer)  # which waits for the GPU
        # With manual optimization the step may be another part's, or not announced at all: then the parameters tell.
        self._stepped = self._stepped or self.skipped or not self.loop.is_by_hand()

    def was_stepped(self) -> bool:
        """Return True if the shared parameters have been stepped since the last `end_step`."""
        if self.loop.is_by_hand():
            now = self._versions()
            self._stepped = self._stepped or self._have_moved(now)
            if self._stepped or not self.is_active:
                self._before = now
        return self._stepped

    def _versions(self) -> dict[str, int]:
        parameters = dict(self._model.named_parameters()) if self._parameters is None else self._parameters
        return {plain_name(name): parameter._version for name, parameter in parameters.items()}

    def _have_moved(self, now: Mapping[str, int]) -> bool:
        reached = {name: set(compress(self._candidates, term.reaches)) for name, term in self.terms.sums.items()}
        by_loss = [names for name, names in {**self._reached, **reached}.items() if name != REST]
        shared = {name for name in now if sum(name in names for names in by_loss) >= 2}
        before = self._before.items()
        return any(now.get(name) != version for name, version in before if name in (shared or now))

    def end_batch(self) -> None:
        """Release the losses of this batch."""
        self._watched = []
        self.terms.release_graph()

    @torch.no_grad()
    def collect(self) -> tuple[GradientNorms, dict[str, float]] | None:
        """Average the step over the ranks. All ranks must call this together.

        Returns:
            The terms' gradients, as norms and products, and each term's weight beyond the model's own coefficient; or None if
            no loss has reached a parameter yet.

        Raises:
            ValueError: a named loss was not back-propagated.
        """
        sums, parameters = self.terms.sums, list(self._candidates.values())
        if self._source.names and parameters:
            require_backpropagated(self._given, sums, caller=self._source.caller, noun="loss")
        here = {name: (float(term.weighted), float(term.plain), term.reaches) for name, term in sums.items()}
        of_ranks = self._ranks.gather_objects((list(self._source.shown), here))
        if not self._source.names:
            known = set(self._names).union(*(terms for _, terms in of_ranks))
            self._names = [name for name in dict.fromkeys(n for shown, _ in of_ranks for n in shown) if name in known]
        if not parameters or not self._names:
            return None  # all parameters are frozen, or no loss was shown; the same holds on all ranks
        zeros = flat_row([None] * len(parameters), parameters)
        rows, weights = {}, {}
        for name in [*self._names, REST]:
            found = [terms[name] for _, terms in of_ranks if name in terms]
            if found:
                # Row by row: one sum over a table of all rows would need a second copy of all of them.
                rows[name] = self._ranks.sum(sums[name].row if name in sums else zeros) / self._ranks.size
                weighted, plain = sum(one[0] for one in found), sum(one[1] for one in found)
                weights[name] = weighted / plain if plain else 1.0
                for _, _, reaches in found:
                    self._reached.setdefault(name, set()).update(compress(self._candidates, reaches))
        rows = self._cut_to_shared(rows)
        if not set(rows) - {REST}:
            return None
        return GradientNorms(list(rows), inner_products(list(rows.values()))), weights

    def _cut_to_shared(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the pieces of the rows that belong to parameters reached by two losses; all if there are none."""
        if self._parameters is not None:
            return rows
        least = min(2, len(self._names))
        by_loss = [reached for name, reached in self._reached.items() if name != REST]
        is_shared = [sum(name in reached for reached in by_loss) >= least for name in self._candidates]
        if not any(is_shared):
            is_frozen = any(not parameter.requires_grad for parameter in self._model.parameters())
            # A layer may be unfrozen, or more losses may come.
            return {} if is_frozen or len(by_loss) < len(self._names) else rows
        widths = [row_width([parameter]) for parameter in self._candidates.values()]
        mask = torch.tensor(is_shared).repeat_interleave(torch.tensor(widths))
        return {name: row[mask.to(row.device)] for name, row in rows.items()}


def _could_be_term(loss: object) -> bool:
    return has_gradient(loss) and loss.numel() == 1 and not loss.is_complex()
