"""The engine: weights the task losses in the backward pass and reads their gradients there, for any rule in any loop.

**Weighting.** Each task loss ``L_i`` gets a hook that multiplies its gradient by ``w_i`` in backward. In the network, a
back-propagated loss ``Σ c_i L_i + rest`` thus becomes ``Σ w_i c_i ∇L_i + ∇rest``, whatever scaler, coefficients or accumulation
come in between.

**Reading.** With heads, we read a task's gradient at the branch of the representation that its head reads
(`lightning_gradnorm.gradients`). Without heads, one first-order pass from the loss, inside the same hook, reads it. Either way
it is the task's actual contribution to the step, ``scale · w_i · c_i · ∇L_i``.

`Inspection` decides once what to read and where. After that the engine follows the plan: `start_batch`, `watch`,
`before_backward`, `after_backward`, `finish_step`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from lightning_gradnorm.engine.aggregation import AtRepresentation
from lightning_gradnorm.engine.constant_losses import ConstantLosses
from lightning_gradnorm.engine.graph_checks import require_backpropagated
from lightning_gradnorm.engine.inspection import Inspection, ReadingHooks
from lightning_gradnorm.engine.measurement import AnyRule, LossMeasurement, Measurement, NormMeasurement, Setting
from lightning_gradnorm.engine.passes import Passes
from lightning_gradnorm.engine.rule import Needs, Rule
from lightning_gradnorm.engine.shared_parameters import AtParameters
from lightning_gradnorm.engine.step_state import BatchState, HeldGradients, WatchedLoss
from lightning_gradnorm.gradients import (
    BufferGuard,
    GradientReader,
    RepeatedPasses,
    TaskReading,
    branch_arguments,
    check_loss,
)
from lightning_gradnorm.gradients.graph import is_transformed, tensors_with_gradient
from lightning_gradnorm.gradients.readers import Outputs

_MEASUREMENTS: dict[Needs, type[Measurement[Any]]] = {
    "nothing": Measurement,
    "losses": LossMeasurement,
    "norms": NormMeasurement,
    "gradients": AtRepresentation,
}


def _measurement_of(rule: Rule) -> type[Measurement[Any]]:
    return AtParameters if getattr(rule, "of_parameters", False) else _MEASUREMENTS[rule.needs]


class Engine(Passes[AnyRule]):
    """Runs a rule on a model, from construction until `close`.

    Args:
        rule: the rule.
        setting: the model, the loop, and where to read the gradients.

    Raises:
        ValueError: the model has no such layer, head or representation.
    """

    def __init__(self, rule: AnyRule, setting: Setting) -> None:
        self._caller = setting.caller
        self._hooks = ExitStack()
        with self._hooks:  # if anything fails, everything placed so far is removed
            measurement: Measurement[AnyRule] = _measurement_of(rule)(rule, setting)
            self._hooks.callback(measurement.close)
            repeats = RepeatedPasses(f"{self._caller}: the gradient of task")
            self._reading = TaskReading(BufferGuard(setting.model.buffers()), repeats, self._finalize)
            hooks = ReadingHooks(
                self._before_head,
                self._before_call,
                self._after_call,
                self._is_forward_pass,
                self._reading.forget_graph,
            )
            inspection = Inspection(measurement, hooks)
            self._hooks.callback(inspection.close)
            self._hooks = self._hooks.pop_all()
        super().__init__(measurement, inspection)
        self._constants = ConstantLosses(self._caller, self._loop.ranks)
        self.sums_change_of_loss = False
        """Whether `BatchState.change_of_loss` is needed, because some optimizer compares values of the loss."""
        self.step_was_taken = False
        """Whether the last `finish_step` reached the rule: the scaler did not skip it, and some rank had losses."""

    def close(self) -> None:
        """Remove everything from the model."""
        self._hooks.close()
        self.batch = BatchState()

    # ---- one batch ---------------------------------------------------------------------------------------------------

    def watch(self, losses: Mapping[str, Tensor | None]) -> None:
        """Weight these losses in the backward pass that follows.

        Args:
            losses: task → loss of any shape, the very tensors that make up the back-propagated loss. ``None``: the task is
                absent. Other names are ignored.

        Raises:
            TypeError, ValueError: a loss is not a tensor with a gradient, or belongs to another task.
        """
        self._begin_evaluation()
        for task in self._tasks:
            loss = losses.get(task)
            if loss is None or self._constants.is_absent(task, loss):
                self.batch.absent |= {task} & losses.keys() - self.batch.losses.keys()
            else:
                asked = f"{self._caller}: the loss of task '{task}'"
                check_loss(loss, caller=asked, otherwise="; or None, if the task is absent", is_scalar=False)
                self._watch_one(task, loss)

    def _watch_one(self, task: str, loss: Tensor) -> None:
        if loss.dtype == torch.float64 != self.rule.loss_weights.dtype:
            self.rule.to(dtype=torch.float64)
        owner = self.batch.task_of(loss)
        if owner == task:
            return  # logged twice, or both returned and watched: a second hook would apply the weight twice
        if owner is not None:
            raise ValueError(f"{self._caller}: tasks '{owner}' and '{task}' have the same tensor as their loss.")
        # The hook must not hold the tensor that holds the hook. If you keep the loss, as a metric does, you can pickle it
        # without a warning about the hook.
        watched = weakref.ref(self.batch.add(task, loss))
        hook = unserializable_hook(partial(self._on_loss_gradient, task, watched))  # type: ignore[no-untyped-call]
        loss.register_hook(hook)  # type: ignore[no-untyped-call]

    def _is_forward_pass(self) -> bool:
        if self.is_in_backward() or not self._loop.is_training():
            return False
        self._begin_evaluation()
        return True

    def _records_calls(self) -> bool:
        """Return True if a module called now belongs to a forward pass whose gradients will be read."""
        # A forward pass may start another step, but none that is measured after one that is not.
        return self._step.measured and self._is_forward_pass() and self._step.measured

    def _before_head(self, task: str, args: Any, kwargs: Any) -> Any:
        if not self._records_calls() or not torch.is_grad_enabled():
            return None
        self.batch.in_head = task
        inputs, node = branch_arguments(args, kwargs, partial(self._read_at_head, task))
        if node is not None:
            self.batch.branches.setdefault(task, set()).add(node)
        return inputs

    # A reentrant checkpoint calls its modules without gradients and makes their output part of the graph afterwards.

    def _before_call(self, reader: GradientReader, args: Any, kwargs: Any) -> None:
        if self._records_calls() and not is_transformed():
            reader.forward_pre(args, kwargs)

    def _after_call(self, reader: GradientReader, output: Any) -> Any:
        if not self._records_calls():
            return None
        if is_transformed():
            if tensors_with_gradient(output):
                self.batch.transformed.add(reader)
            return None
        try:
            return reader.forward_post(output)
        except ValueError as error:
            raise ValueError(f"{self._caller}: {error}") from None

    def explain_inplace_error(self, error: RuntimeError) -> str | None:
        """Return how to fix an in-place change of the representation, if torch's error is about one."""
        return self.inspection.explain_inplace_error(str(error), self.batch.in_head)

    # ---- backward ----------------------------------------------------------------------------------------------------

    def before_backward(self, loss: Tensor, *, is_whole_step: bool = False) -> None:
        """Called right before each backward pass.

        Args:
            loss: what is back-propagated.
            is_whole_step: whether the optimizer is known to step on this pass alone. Then we take norms as soon as a
                gradient has arrived, and keep fewer rows.
        """
        self._begin_evaluation()
        step, batch = self._step, self.batch
        if self._set_aside is None and step.losses and step.held is not None and step.held.were_dropped():
            self._forget_gradients()
        self.measurement.find_targets(batch)
        self.inspection.inspect_batch(batch, self._step, loss)
        at_losses = batch.read_at_losses & batch.losses.keys()
        if self._step.measured and at_losses and self.measurement.reader is not None:
            nodes = {task: [one.node for one in batch.losses[task]] for task in at_losses}
            self._reading.look_at(nodes, self.measurement.reader.targets)
        batch.in_backward = True
        batch.is_whole_step = is_whole_step and self._loop.ranks.size == 1
        self.watched.layer = self.inspection.plan.shared_layer
        if self._loop.has_parts():
            self.watched.look_at(batch)
        self.measurement.before_backward(loss, batch, self._step)
        if not batch.is_repeated:
            self._step.weights = self._weights_by_task()
        self._before_pass = self.watched.versions() if self._loop.is_by_hand() else None
        self._is_last_pass = is_whole_step

    def after_backward(self) -> None:
        """Called right after each backward pass."""
        self._reading.finish()
        self._step.backwards += 1
        self.batch.backwards += 1
        self.batch.in_backward = False
        if self._step.measured and self.measurement.reader is not None:
            self.measurement.reader.on_backward_end()
        moved = self._before_pass is not None and self._before_pass != self.watched.versions()
        self.measurement.after_backward(self._step, has_moved=moved)
        if self._set_aside is None:
            self._step.versions = self._before_pass  # hooks of the parameters may have stepped within the pass
            is_cheap = bool(self.inspection.plan.shared_layer)  # and not all parameters of the model
            self._step.held = HeldGradients(self.watched.parameters()) if is_cheap or not self._is_last_pass else None
        elif self._set_aside.backwards:
            self._end_repetition()  # the step is not announced yet, as in SAM's first_step and second_step by hand

    def _on_loss_gradient(self, task: str, watched: weakref.ref[WatchedLoss], gradient: Tensor) -> Tensor | None:
        if self._reading.is_running or not self.batch.in_backward or (loss := watched()) is None:
            return None  # our own first-order pass, which already has the weight; or a gradient that the user takes
        step = self._step
        step.add(task, loss.value, is_first=task not in self.batch.backpropagated)
        self.batch.backpropagated.add(task)
        self.batch.reached.add(loss)
        weight = applied = step.weights[task]
        if gradient.dtype != weight.dtype or gradient.device != weight.device:
            applied = weight.to(gradient)
            if torch.finfo(applied.dtype).bits < torch.finfo(weight.dtype).bits:
                step.rounded_weights[task] = applied.to(weight)
        weighted = gradient * applied
        if self.sums_change_of_loss:
            values = loss.value if loss.has_changed else loss.tensor.detach()
            self.batch.change_of_loss = self.batch.change_of_loss + ((weighted - gradient) * values).sum()
        if step.measured and task in self.batch.read_at_losses:
            self._read(task, [loss.edge], [weighted])
        return weighted

    def _read_at_head(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> object:
        if self.batch.in_backward and task not in self.batch.read_at_losses:  # and not a gradient that the user takes
            return self._read(task, outputs, gradients, heads=len(self.batch.branches))
        return None

    def _read(self, task: str, outputs: Outputs, gradients: Sequence[Tensor], heads: int = 0) -> object:
        reader = self.measurement.reader
        return None if reader is None else self._reading.read(reader, task, outputs, gradients, heads=heads)

    def _finalize(self, reader: GradientReader, tasks: Sequence[str]) -> None:
        if self.batch.is_whole_step and (complete := [task for task in tasks if self.batch.is_read_once(task)]):
            reader.finalize(complete)

    # ---- the optimizer step ------------------------------------------------------------------------------------------

    def finish_step(self, *, skipped: bool = False, is_counted: bool = True, is_announced: bool = False) -> bool:
        """Called once per optimizer step, after the last backward pass.

        Args:
            skipped: whether the loss scaler skips the step.
            is_counted: whether it counts in `Loop.steps`, so that we can tell a repeated evaluation from a new step.
            is_announced: whether this comes right before the optimizer's step. A step without gradients does not count.

        Returns:
            True if the rule has counted the step. All ranks call this together.
        """
        step = self._step
        self.batch.steps += 1
        if self._set_aside is not None:
            self._end_repetition()
            return False
        self._finished = self._loop.steps() if is_counted else None
        self.step_was_taken = False
        if self._loop.ranks.size == 1 and not step.losses:  # another optimizer's step, or no task was present
            step.backwards = 0
            return False
        if self.batch.backpropagated:
            require_backpropagated(self.batch.losses, self.batch.all_backpropagated, caller=self._caller)
        self.batch.end_step()
        if skipped or (is_announced and self._is_without_gradients()):
            self.measurement.discard_step()
            self._release_batch()
            self.start_step()
            return False
        self.step_was_taken = True
        self._held = step.weights or self._weights_by_task()
        counts = self.measurement.after_step(step)
        if counts:
            self.rule.count_step()
        self.start_step()
        return counts
