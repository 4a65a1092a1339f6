"""Assigns forward and backward passes to optimizer steps, whatever the optimizer or the user does with them."""

from __future__ import annotations

from typing import Generic

from torch import Tensor

from lightning_gradnorm.engine.inspection import Inspection
from lightning_gradnorm.engine.measurement import AnyRule, Measurement
from lightning_gradnorm.engine.parameter_watch import ParameterWatch
from lightning_gradnorm.engine.step_state import BatchState, OptimizerStepState


class Passes(Generic[AnyRule]):
    """Keeps the state of the current batch and of the current optimizer step.

    A pass may belong to no step: its gradients are dropped, or it ends in an error. A step may need several passes, to
    accumulate or to evaluate the losses again. And a step may come unannounced, even within a backward pass.

    Args:
        measurement: feeds the rule.
        inspection: decides what to read.
    """

    def __init__(self, measurement: Measurement[AnyRule], inspection: Inspection) -> None:
        self.rule = measurement.rule
        self.measurement = measurement
        self.inspection = inspection
        self._loop, self._tasks = measurement.setting.loop, measurement.setting.tasks
        self.watched = ParameterWatch(measurement.setting.model)
        self.batch = BatchState()
        self._held: dict[str, Tensor] = {}
        """The weights of the last finished step, which may still be in progress."""
        self._finished: int | None = None
        """The optimizer step of the last call of `finish_step`; it may still be in progress."""
        self._before_pass: list[int] | None = None
        """The versions of the watched parameters before the backward pass, if an optimizer may step unannounced."""
        self._is_last_pass = True
        """Whether the optimizer is known to step on the backward pass alone."""
        self._set_aside: OptimizerStepState | None = None
        """What the step has collected, while the losses are evaluated again."""
        self._step = self._new_step()

    def start_batch(self) -> None:
        """Release everything of the last batch. No optimizer step is in progress."""
        self._finished = None
        self._release_batch()

    def _release_batch(self) -> None:
        """Release everything of the last forward and backward pass."""
        self._recover_from_failed_backward()
        self.batch = BatchState()
        self._end_repetition()
        self.inspection.start_batch()

    # A closure may evaluate the losses several times in one optimizer step: LBFGS, a line search, SAM. If the weights moved in
    # between, the optimizer's function would change. So the rule learns from the first evaluation, and its weights apply to all
    # of them.

    def _begin_evaluation(self) -> None:
        """Called in each forward pass. Set the step's state aside if this is not the first evaluation in the step."""
        self._recover_from_failed_backward()
        batch = self.batch
        if not (batch.backwards or (self._step.backwards and not batch.is_repeated)):
            return  # the usual case
        if self._finished == self._loop.steps() or self.has_moved:
            self._release_batch()
            self.batch = BatchState(is_repeated=True, finished=batch.all_backpropagated, steps=batch.steps)
            self._set_aside = self._step
            weights = self._step.weights if self._step.backwards else self._held
            self._step = OptimizerStepState(self.measurement.replaces_gradients, weights)

    def _end_repetition(self) -> None:
        if self._set_aside is not None:
            self._step, self._set_aside = self._set_aside, None

    @property
    def has_moved(self) -> bool:
        """Whether the shared parameters have changed since the last backward pass of an unfinished step, or within it."""
        step = self._step
        return bool(step.backwards) and step.versions is not None and step.versions != self.watched.versions()

    def _recover_from_failed_backward(self) -> None:
        """Forget the step if its last backward pass ended in an error that the user's code has caught."""
        if self.batch.in_backward and self._loop.backward_has_failed():
            self.batch = BatchState(steps=self.batch.steps)
            self._end_repetition()
            self.inspection.start_batch()
            self._forget_gradients()

    def _is_without_gradients(self) -> bool:
        """Return True if the user has removed the gradients of the step that begins.

        Return False if a loss is not finite, which the rule counts and warns about, and on several ranks, which must agree.
        """
        held, losses = self._step.held, list(self._step.losses.values())
        if self._loop.ranks.size > 1 or held is None or not held.were_set_to_none():
            return False
        return all(bool(loss.isfinite()) for loss in losses)

    def _forget_gradients(self) -> None:
        """Forget everything about gradients that no optimizer will step on."""
        self.measurement.discard_step()
        if self.measurement.reader is not None:
            self.measurement.reader.forget()
        self._step = self._new_step()
        batch = self.batch
        batch.losses, batch.backpropagated, batch.reached = batch.waiting(), set(), set()

    def is_in_backward(self) -> bool:
        """Return True in a backward pass. Module calls then come from a checkpoint, for the second time."""
        self._recover_from_failed_backward()
        return self.batch.in_backward

    # ---- the optimizer step ------------------------------------------------------------------------------------------

    def start_step(self) -> None:
        """Forget what was collected since the last optimizer step."""
        if self.measurement.reader is not None:
            self.measurement.reader.reset()
        self._set_aside = None
        self._step = self._new_step()

    def _new_step(self) -> OptimizerStepState:
        return OptimizerStepState(self.measurement.should_measure)

    def _weights_by_task(self) -> dict[str, Tensor]:
        weights = self.rule.loss_weights.clone()  # the rule may change them in place
        return dict(zip(self._tasks, weights.unbind(), strict=True))

    @property
    def pending_backwards(self) -> int:
        """Backward passes since the last optimizer step."""
        return self._step.backwards
