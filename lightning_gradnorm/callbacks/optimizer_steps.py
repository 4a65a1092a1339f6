"""What optimizers of the network do without Lightning's hooks: raw steps, and closures whose values they compare."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from lightning_gradnorm.callbacks.trainer_loop import TrainerLoop
from lightning_gradnorm.engine.engine import Engine
from lightning_gradnorm.engine.module_hooks import Remove


def follow_optimizers(loop: TrainerLoop, engine: Engine[Any], finish_step: Callable[[], None]) -> Remove:
    """Follow the Trainer's optimizers until the returned function is called.

    With manual optimization, ``optimizer.optimizer.step()`` and ``self.optimizers(use_pl_optimizer=False)`` pass Lightning's
    hooks by. With any, a line search compares values of the loss: these must belong to the weighted gradients.

    Args:
        loop: the Trainer.
        engine: weights the losses.
        finish_step: called before a step that Lightning does not announce.
    """
    hooks = ExitStack()
    compares = [optimizer for optimizer in loop.trainer.optimizers if _may_compare_values(optimizer)]
    engine.sums_change_of_loss = bool(compares)

    def before_step(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self, *rest = args
        closure = rest[0] if rest else kwargs.get("closure")
        if closure is None:
            if loop.is_by_hand() and engine.pending_backwards:
                finish_step()
            return None

        def weighted() -> Any:
            loss = closure()
            return loss if loss is None else loss + engine.batch.change_of_loss

        return (self, weighted), {name: value for name, value in kwargs.items() if name != "closure"}

    for optimizer in loop.trainer.optimizers if loop.is_by_hand() else compares:
        hooks.callback(optimizer.register_step_pre_hook(before_step).remove)
    return hooks.close


def _may_compare_values(optimizer: torch.optim.Optimizer) -> bool:
    """Return False for those of torch that evaluate a closure once and look at nothing but the gradients."""
    return not type(optimizer).__module__.startswith("torch.optim.") or isinstance(optimizer, torch.optim.LBFGS)
