"""Inspection: decides where the task gradients of a model are read, before and during the first batch.

`inspect_model` makes the plan. In the first batch we select the reader, and `Discovery` finds what you have not named. Later
forward passes are compared with the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_gradnorm.engine.compiled import hides_its_graph
from lightning_gradnorm.engine.discovery import Discovery, tasks_off_course
from lightning_gradnorm.engine.graph_checks import GraphChecks
from lightning_gradnorm.engine.measurement import Measurement
from lightning_gradnorm.engine.module_hooks import Remove, wrap_call
from lightning_gradnorm.engine.plan import Plan, inspect_model
from lightning_gradnorm.engine.step_state import BatchState, OptimizerStepState
from lightning_gradnorm.gradients import GradientReader, RowReader, WeightGradients


@dataclass(frozen=True)
class ReadingHooks:
    """The engine's reactions to calls of the model's modules."""

    before_head: Callable[[str, Any, Any], Any]
    before_call: Callable[[GradientReader, Any, Any], None]
    after_call: Callable[[GradientReader, Any], Any]
    is_forward_pass: Callable[[], bool]
    """Whether a module called now belongs to a forward pass that is trained on."""
    forget_graph: Callable[[], None]
    """Called when the graph of the last forward pass is released."""


class Inspection:
    """Places the gradient readers on a model, until `close`.

    Args:
        measurement: receives the gradients.
        hooks: the engine's reactions to module calls.

    Raises:
        ValueError: the model has no such layer, head or representation.
    """

    def __init__(self, measurement: Measurement[Any], hooks: ReadingHooks) -> None:
        self._measurement = measurement
        self._setting = setting = measurement.setting
        self._on_call = hooks
        self._hooks = ExitStack()
        with self._hooks:  # if anything fails, everything placed so far is removed
            self.plan, heads, self._uncompiled = inspect_model(measurement)
            self._hooks.callback(self._uncompiled.close)
            candidates = self.plan.candidates
            measurement.reader = candidates[0] if candidates else None
            self.checks = GraphChecks(setting.caller, candidates, at_heads=self.plan.at_heads)
            self.named_heads = heads if self.plan.at_heads else {}
            """Task → head, for heads that you have named."""
            self._place_branches(self.named_heads)
            is_visible = not hides_its_graph(setting.model)
            self._needs_layer = is_visible and measurement.searches_layer
            self.reads_gradients = bool(candidates) or self._needs_layer
            """Whether task gradients are read at all."""
            self._needs_heads = is_visible and setting.heads == "auto" and self.reads_gradients
            self._found_heads: dict[str, str] = {}
            self._has_warned = False
            self._told: Plan | None = None  # what `news` described last
            self._discovery: Discovery | None = None
            if self._needs_layer or self._needs_heads:
                self._discovery = Discovery(setting, hooks.is_forward_pass, self.plan.shared_layer)
                self._hooks.callback(self._discovery.close)
            self._candidate_hooks: dict[GradientReader, Remove] = {}
            for reader in candidates:
                if reader.module is not None:
                    before, after = partial(hooks.before_call, reader), partial(hooks.after_call, reader)
                    self._candidate_hooks[reader] = wrap_call(reader.module, before=before, after=after)
                    self._hooks.callback(self._candidate_hooks[reader])
            self._hooks = self._hooks.pop_all()

    def _place_branches(self, heads: Mapping[str, nn.Module]) -> None:
        for task, head in heads.items():
            self._hooks.callback(wrap_call(head, before=partial(self._on_call.before_head, task), first=True))

    def news(self) -> str | None:
        """Return a description of the plan once the layer and the heads are known, and again when it changes; else ``None``."""
        is_known = self._discovery is None or (bool(self.plan.shared_layer) and not self._needs_heads)
        if self.plan is self._told or not is_known:
            return None
        self._told = self.plan
        return str(self.plan)

    def close(self) -> None:
        """Remove everything from the model."""
        self._hooks.close()
        self._discovery = None
        self.start_batch()

    def start_batch(self) -> None:
        """Called before each forward pass. Release the last one, and place hooks on what was found in it."""
        self._uncompiled.begin_pass()
        if self._discovery is not None:
            self._discovery.start_batch()
            model, found, self._found_heads = self._setting.model, self._found_heads, {}
            self._place_branches({task: model.get_submodule(head) for task, head in found.items()})
            if not (self._needs_layer or self._needs_heads):
                self._discovery.close()
                self._discovery = None
        self._on_call.forget_graph()
        for reader in self.checks.readers:
            reader.release_graph()

    def inspect_batch(self, batch: BatchState, step: OptimizerStepState, loss: Tensor) -> None:
        """Called before each backward pass. Decide where to read each task of the batch.

        Raises:
            ValueError: what we would read is not the task's gradient.
        """
        self.checks.require_disjoint_losses(batch)
        # Other ranks may have losses when this one has none. So all ranks join in.
        concerns_us = bool(batch.losses) or self._setting.loop.ranks.size > 1
        discovery = self._discovery if concerns_us else None
        if discovery is not None and self._needs_layer:
            self._find_layer(discovery, batch, step)
        reader = self._measurement.reader
        if step.measured and reader is not None and reader.is_frozen and concerns_us:
            if batch.losses:  # not while a critic is trained and the rest is frozen
                self._wait(reader)
            step.measured = False
            batch.read_at_losses = set(self._setting.tasks)
        if step.measured:
            if batch.losses:
                self._select(self.checks.select_reader(batch))
            if discovery is not None and self._needs_heads:
                self._find_heads(discovery, batch)
            self._decide_where_to_read(batch, loss)

    def explain_inplace_error(self, error: str, in_head: str | None) -> str | None:
        """Return how to fix an in-place change of the representation, if torch's error is about one."""
        if not (("of _Branch" in error or "of _Gate" in error) and "inplace" in error):
            return None
        caller = self._setting.caller
        if in_head is None:
            first = "before the heads read it" if self.named_heads else "by the module that reads it"
            return (
                f"{caller}: the representation is changed in place, as relu_(z) and ReLU(inplace=True) do, {first}. Use "
                f"relu(z)."
            )
        way_out = "leave heads out" if self.named_heads else "give heads=None"
        return (
            f"{caller}: the head of task '{in_head}' changes the representation in place, as ReLU(inplace=True) does, and "
            f"thus the input of the other heads. Make its first operation inplace=False, or {way_out}: then each loss gets "
            f"its own first-order pass."
        )

    def _find_layer(self, discovery: Discovery, batch: BatchState, step: OptimizerStepState) -> None:
        """Find the shared layer. Until then, use the encoder's last layer, or do not measure the step."""
        W = discovery.find_layer(batch.waiting())
        self._needs_layer = W is None or not discovery.has_seen_all
        if W is None:
            step.measured &= bool(self.plan.candidates) or not discovery.has_new_losses
        elif set(map(id, W.values())) != set(map(id, self.plan.shared_layer.values())):
            step.measured &= not step.losses  # the gradients of earlier passes were read at another layer
            self._select(None)
            reader = self._measurement.candidates(W, ())[0]
            self.plan = replace(self.plan, shared_layer=W, candidates=[reader])
            self.checks = GraphChecks(self._setting.caller, [reader], at_heads=bool(self.named_heads))
            self._measurement.reader = reader

    def _select(self, reader: GradientReader | None) -> None:
        """Read with this reader from now on; remove the hooks of the other candidates."""
        self._measurement.reader = reader
        for other in [other for other in self._candidate_hooks if other is not reader]:
            self._candidate_hooks.pop(other)()
        if len(self.plan.candidates) > 1 and reader is not None:
            self.plan = replace(self.plan, candidates=(reader,))

    def _wait(self, reader: GradientReader) -> None:
        """Warn, once, that nothing is balanced while the place where gradients are read is frozen.

        Raises:
            ValueError: norms have been taken there before.
        """
        setting, of_layer = self._setting, self.plan.shared_layer
        if self.checks.is_selected and isinstance(reader, RowReader):
            raise ValueError(
                f"{setting.caller}: {reader.label} has been frozen (requires_grad=False) during training. Name the last "
                f"shared layer that is trained to the end, or use stop_after. (If toggle_optimizer freezes it for some "
                f"backward passes, call watch only before those that train it.)"
            )
        if not self._has_warned:
            self._has_warned = True
            what = f"shared_layer '{setting.shared_layer or next(iter(of_layer))}'" if of_layer else reader.label
            named = "shared_layer" if of_layer else "representation" if reader.module is not None else None
            way_out = "" if named is None else f"name a {named} that is trained, or "
            setting.loop.ranks.warn(
                f"{setting.caller}: {what} is frozen (requires_grad=False), so the task gradients cannot be compared there. "
                f"Nothing is balanced until it is trained. If it is to stay frozen, "
                f"{way_out}balance by the losses alone, as Scalarization does."
            )

    def _find_heads(self, discovery: Discovery, batch: BatchState) -> None:
        reader = self._measurement.reader
        heads = discovery.find_heads(batch.losses, [] if reader is None else reader.targets)
        if heads is not None:
            if self._setting.shared_layer is not None and isinstance(reader, WeightGradients):
                discovery.warn_if_hardly_shared(batch.waiting(), self.plan.shared_layer)
            self._needs_heads, self._found_heads = False, heads
            self.plan = replace(self.plan, heads=heads)

    def _decide_where_to_read(self, batch: BatchState, loss: Tensor) -> None:
        """Read at the heads of the tasks whose gradient passes only their head in this forward pass, else at the losses."""
        reader = self._measurement.reader
        if self.named_heads:
            self.checks.require_separate_heads(loss, batch)
        if reader is None or not (self.named_heads or batch.branches):
            batch.read_at_losses = set(self._setting.tasks)
        else:
            off = tasks_off_course(batch.losses, batch.branches, loss, reader.targets)
            # A task without a head is always read at its loss, and was checked in its first batch.
            self.checks.require_readable_at_losses((off - batch.read_at_losses) & (self.plan.heads or {}).keys(), batch)
            batch.read_at_losses |= off
