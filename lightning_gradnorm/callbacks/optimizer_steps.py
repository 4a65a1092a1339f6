"""Tracks what the network's optimizers do without Lightning's hooks: raw steps, and closures whose values they compare."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch

from lightning_gradnorm.callbacks.trainer_loop import TrainerLoop
from lightning_gradnorm.callbacks.usage_checks import UsageChecks
from lightning_gradnorm.engine.engine import Engine
from lightning_gradnorm.engine.module_hooks import Remove, ReplacedMethod, patch_attribute


class OptimizerSteps:
    """Notifies the engine of each step of the Trainer's optimizers, until `close`.

    With manual optimization, ``optimizer.optimizer.step()`` and ``self.optimizers(use_pl_optimizer=False)`` bypass Lightning's
    hooks, and so may a module's own ``optimizer_step``. Under any optimization, a line search compares values of the loss,
    which must belong to the weighted gradients.

    Args:
        loop: the Trainer.
        engine: weights the losses.
        usage: is notified, too.
        on_counted: called when the rule has counted a step.
    """

    def __init__(
        self, loop: TrainerLoop, engine: Engine[Any], usage: UsageChecks, on_counted: Callable[[L.Trainer], None]
    ) -> None:
        self._loop, self._engine, self._usage, self._on_counted = loop, engine, usage, on_counted
        self._hooks = ExitStack()
        self._followed: list[torch.optim.Optimizer] = []
        self.update()

    def update(self) -> None:
        """Follow the Trainer's current optimizers; you may have given it others in mid-training."""
        optimizers = self._loop.optimizers
        if list(map(id, optimizers)) == list(map(id, self._followed)):
            return
        self.close()
        self._followed = list(optimizers)
        compares = [optimizer for optimizer in optimizers if _may_compare_values(optimizer)]
        self._engine.sums_change_of_loss = bool(compares)
        for optimizer in optimizers if self._loop.is_by_hand() else compares:
            self._hooks.callback(_call_before_step(optimizer, self._before_step))

    def close(self) -> None:
        """Remove everything from the optimizers."""
        self._hooks.close()
        self._followed = []

    def after_backward(self) -> None:
        """Called after each backward pass. Hooks of the parameters may have stepped during it."""
        self._engine.after_backward()
        if not self._engine.batch.is_repeated:
            self.finish_if_moved()

    def finish_step(self, optimizer: torch.optim.Optimizer | None = None, *, is_counted: bool = False) -> None:
        """Called before a step of ``optimizer``, or without one after a step that was not announced.

        Args:
            optimizer: whose step it is.
            is_counted: whether Lightning announced it, and counts it.
        """
        self._usage.stepped = True
        if optimizer is not None and not self._engine.watched.is_stepped_by(optimizer, self._loop.optimizers):
            return
        self._usage.shared_stepped = True
        skipped = is_counted and optimizer is not None and self._loop.skips(optimizer)
        if self._engine.finish_step(skipped=skipped, is_counted=is_counted, is_announced=optimizer is not None):
            self._on_counted(self._loop.trainer)

    def finish_if_moved(self) -> None:
        """Finish a step that was already taken: by hooks of the parameters, or by hand like SAM's second_step."""
        if self._engine.has_moved:
            self.finish_step()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[0] if args else kwargs.get("closure")
        if closure is None:
            if self._loop.is_by_hand() and self._engine.pending_backwards:
                self.finish_step(optimizer)
            return None
        if not self._engine.sums_change_of_loss:
            return None

        def weighted() -> Any:
            loss = closure()
            return loss if loss is None else loss + self._engine.batch.change_of_loss

        return (weighted,), {name: value for name, value in kwargs.items() if name != "closure"}


def _call_before_step(optimizer: torch.optim.Optimizer, before: Callable[..., Any]) -> Remove:
    """Call ``before(optimizer, args, kwargs)`` before each step; it may return other arguments for the step."""
    if getattr(type(optimizer).step, "hooked", False) and hasattr(optimizer, "_optimizer_step_pre_hooks"):

        def hook(one: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = before(one, args[1:], kwargs)
            return None if changed is None else ((one, *changed[0]), changed[1])

        return optimizer.register_step_pre_hook(hook).remove
    # Wrappers of another optimizer, such as Lookahead, often skip Optimizer.__init__: torch does not call their hooks.
    step = optimizer.step

    @functools.wraps(step)  # learning rate schedulers leave marks on it
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = before(optimizer, args, kwargs) or (args, kwargs)
        return step(*args, **kwargs)

    return patch_attribute(optimizer, "step", ReplacedMethod(optimizer, "step", call))


def _may_compare_values(optimizer: torch.optim.Optimizer) -> bool:
    """Return False for torch's optimizers that evaluate a closure once and use nothing but the gradients."""
    return not type(optimizer).__module__.startswith("torch.optim.") or isinstance(optimizer, torch.optim.LBFGS)
