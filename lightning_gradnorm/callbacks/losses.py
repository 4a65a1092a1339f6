"""Gets hold of the task losses of a model that knows nothing of us, while they still are part of the graph.

Each function shadows one method of the LightningModule with an instance attribute and returns how to undo it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L

from lightning_gradnorm.engine.module_hooks import Undo, not_traced, shadow

Watch = Callable[[Mapping[str, Any]], None]


def _in_place_of(method: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`functools.wraps` of what is innermost: Lightning looks behind one wrapper for whether batch_idx is wanted."""
    return functools.wraps(inspect.unwrap(method))


def returned_losses(module: L.LightningModule, watch: Watch, *, asked_by: str) -> Undo:
    """Hand the mapping that ``training_step`` returns to ``watch``."""
    training_step = module.training_step

    @_in_place_of(training_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        output = training_step(*args, **kwargs)
        if output is not None:
            if not isinstance(output, Mapping):
                raise TypeError(
                    f"{asked_by}: {type(module).__name__}.training_step should return a mapping with 'loss' and the task "
                    f"losses; got {type(output).__name__}. Return {{'loss': loss, 'seg': seg, …}}, or name the losses as "
                    f"they are logged: tasks={{'seg': 'train/seg_loss', …}}."
                )
            watch({name: value for name, value in output.items() if name != "loss"})
        return output

    return shadow(module, "training_step", step)


def logged_losses(module: L.LightningModule, names: Mapping[str, str], watch: Watch, all_names: set[str]) -> Undo:
    """Hand what the module logs under ``names`` (task → logged name) to ``watch``, before Lightning detaches it.

    Every name it logs in training is added to ``all_names``.
    """
    log = module.log
    tasks = {logged: task for task, logged in names.items()}

    @_in_place_of(log)
    def log_and_watch(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if module.trainer.training:
            all_names.add(name)
            if name in tasks:
                watch({tasks[name]: value})
        log(name, value, *args, **kwargs)

    return shadow(module, "log", not_traced(log_and_watch))


def explained(module: L.LightningModule, explain: Callable[[RuntimeError], str | None]) -> Undo:
    """Have a ``RuntimeError`` that comes out of ``training_step`` say what ``explain`` says of it."""
    training_step = module.training_step

    @_in_place_of(training_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        try:
            return training_step(*args, **kwargs)
        except RuntimeError as error:
            message = explain(error)
            if message is None:
                raise
            raise ValueError(message) from error

    return shadow(module, "training_step", step)
