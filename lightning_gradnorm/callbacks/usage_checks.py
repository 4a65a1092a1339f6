"""Detects usage errors: unusable arguments and Trainers; during training, a loss never shown or never back-propagated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch

from lightning_gradnorm.callbacks.losses import LossSource
from lightning_gradnorm.callbacks.packages import is_one_of
from lightning_gradnorm.engine.engine import Engine
from lightning_gradnorm.engine.graph_checks import require_backpropagated
from lightning_gradnorm.engine.ranks import Ranks
from lightning_gradnorm.engine.step_state import BatchState
from lightning_gradnorm.gradients.graph import has_gradient

_PATIENCE = 50
"""Batches with a backward pass in which an expected loss may be missing: the module may train something else first."""


class UsageChecks:
    """Watches one training; without ``ranks`` none has begun. Certain mistakes raise at once, others warn once."""

    def __init__(self, source: LossSource, ranks: Ranks | None = None) -> None:
        self._source = source
        self._ranks = ranks
        self.seen: set[str] = set()
        """Tasks whose loss has been shown."""
        self.stepped = False
        """Whether an optimizer has taken a step."""
        self.shared_stepped = False
        """Whether such a step moved what the tasks share."""
        self._batches = 0
        self._epochs = 0
        self._warned_of: set[str] = set()
        self._warnings: set[str] = set()

    def on_idle_losses(self, losses: Mapping[str, Any]) -> None:
        """Called with losses shown outside training. Warn if no Trainer has ever started but these are trained on."""
        is_trained = torch.is_grad_enabled() and any(map(has_gradient, losses.values()))
        if self._ranks is None and is_trained:
            self._warn_once(
                "watch was called, but this callback is not in use: no Trainer has started it. Give it to the Trainer that "
                "trains the module, L.Trainer(callbacks=[gradnorm]). The losses are not balanced.",
            )

    def on_losses(self, losses: Mapping[str, Any]) -> dict[str, Any]:
        """Called with losses that are shown. Return those that can be trained on, without those computed under no_grad."""
        trained = dict(losses)
        if not torch.is_grad_enabled():
            idle = [name for name, loss in losses.items() if not has_gradient(loss)]
            self._source.without_gradient |= dict.fromkeys(idle)
            trained = {name: loss for name, loss in losses.items() if name not in idle}
        self._source.shown |= dict.fromkeys(trained)
        return trained

    def on_before_backward(self, module: L.LightningModule, batch: BatchState) -> None:
        """Called before each backward pass.

        Raises:
            ValueError: a task was never among the losses, and no more will come or another one has a similar name.
        """
        if batch.losses or batch.absent or (module.automatic_optimization and self._source.shown):
            _raise(self._source.find_misnamed(is_all=module.automatic_optimization))

    def on_batch_end(self, module: L.LightningModule, batch: BatchState) -> None:
        """Called at the end of each batch.

        Raises:
            ValueError: a loss was not shown, or was shown and not back-propagated.
        """
        self._batches += bool(batch.backwards or batch.steps)
        if batch.losses or batch.absent or batch.finished:
            _raise(self._source.find_misnamed(is_all=True))
            self._warn_of_missing(batch)
            # Otherwise training_step showed its losses and then returned None, which Lightning accepts.
            if batch.backwards or (batch.steps and not module.automatic_optimization):
                require_backpropagated(batch.losses, batch.all_backpropagated, caller=self._source.caller)
        self._check_shown(module, is_late=self._batches >= _PATIENCE)

    def _check_shown(self, module: L.LightningModule, *, is_late: bool) -> None:
        if self._batches:
            _raise(self._source.find_unlogged(self.seen, is_late=is_late))
            _raise(self._source.find_unwatched(module) if is_late else None)

    def _warn_of_missing(self, batch: BatchState) -> None:
        accounted = {*batch.losses, *batch.finished, *batch.absent, *self._warned_of}
        missing = [task for task in self._source.names if task in self.seen and task not in accounted]
        if missing and not self._source.declared:
            self._warned_of.update(missing)
            self._warn_once(
                f"the losses of tasks {missing} were shown in earlier batches, but not in this one; they count as absent "
                f"wherever they are not shown. Where losses are returned or watched, give None to mark a task as absent.",
            )

    def on_epoch_end(self, module: L.LightningModule, engine: Engine[Any] | None) -> None:
        """Called at the end of each epoch. Notifies the rule, too.

        Raises:
            ValueError: a loss was never shown.
        """
        self._check_shown(module, is_late=True)
        self._epochs += 1
        if engine is not None:
            engine.measurement.end_epoch()

    def check_stepped(self, module: L.LightningModule, *, is_over: bool = False) -> None:
        """Called before each batch and after the last: a module may step at the end of an epoch. Warn if none has stepped."""
        if is_over and self.seen and self.stepped and not self.shared_stepped:
            self._warn_once(
                f"no optimizer of {type(module).__name__} that holds what the tasks share has taken a step, so no weight "
                f"has moved. Name a shared_layer that is trained, or step the optimizer that holds it."
            )
        if self._epochs and self.seen and not self.stepped:
            self._warn_once(
                f"no optimizer step was seen in the first epoch, so no weight has moved. {type(module).__name__} "
                f"optimizes manually: it should call step() on what self.optimizers() returns.",
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.add(message)
            (self._ranks or Ranks.current()).warn(f"{self._source.caller}: {message}")


def _raise(message: str | None) -> None:
    if message is not None:
        raise ValueError(message)


def refuse_strategy(strategy: Any, *, caller: str) -> None:
    """Raise ValueError if a Trainer's strategy keeps the model in pieces that cannot be balanced."""
    if is_one_of(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(
            f"{caller}: {type(strategy).__name__} keeps only a shard of the shared layer on each rank, and one layer "
            f"cannot be gathered alone. Use strategy='ddp', or ModelParallelStrategy with fully_shard."
        )
    if is_one_of(strategy, "ModelParallelStrategy") and strategy.device_mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"{caller}: tensor parallelism splits the representation, which is not supported. Use "
            f"ModelParallelStrategy(tensor_parallel_size=1), or strategy='ddp'."
        )


def refuse_company(callback: object, others: Sequence[object]) -> None:
    """Raise ValueError if ``others`` contains another balancing callback."""
    name = type(callback).__name__
    for other in others:
        if other is not callback:
            raise ValueError(
                f"{name}: a Trainer should have one balancing callback; got {name} and {type(other).__name__}. Remove "
                f"one: both would weight the same losses."
            )


def explain_lost_state(caller: str, what: str, checkpoint: object) -> str:
    """Return a warning for a checkpoint without the callback's state; ``what`` describes what is lost."""
    return (
        f"{caller}: the checkpoint {checkpoint} has no state of {caller}; {what} start over. To keep them, resume from a "
        f"checkpoint of a run that had {caller} among its callbacks."
    )
