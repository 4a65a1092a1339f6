"""Where the task losses of a LightningModule come from, while they are still part of the graph.

Three sources: the mapping that ``training_step`` returns, the values that the module logs, or a module that declares its tasks
and calls `watch` itself. The methods that see a loss are replaced on the module instance for the duration of a training.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import lightning as L

from lightning_gradnorm._messages import checked_names, did_you_mean
from lightning_gradnorm.engine.module_hooks import Remove, not_traced, patch_attribute
from lightning_gradnorm.engine.rule import DeclaresTasks

Watch = Callable[[Mapping[str, Any]], None]


class LossSource:
    """Finds the losses that a user names, in a module that knows nothing of us.

    Args:
        caller: the callback's name; begins each error.
        losses: keys of what ``training_step`` returns; name → name under which the module logs the loss; or ``None`` for all
            tasks of a module that declares them.
        parameter: what the callback calls this argument. ``"tasks"`` are at least two, and must be named unless the module
            declares them. ``"losses"`` are at least one, and may stay unnamed.

    Raises:
        TypeError, ValueError: no list of different names, or too few.
    """

    def __init__(
        self,
        caller: str,
        losses: Sequence[str] | Mapping[str, str] | None,
        parameter: Literal["tasks", "losses"] = "tasks",
    ) -> None:
        self.caller = caller
        self._given = losses
        self._parameter = parameter
        self._least = 2 if parameter == "tasks" else 1
        self.noun = "task" if parameter == "tasks" else "loss"
        """What errors call one of the names."""
        self.names: tuple[str, ...] = () if losses is None else self._checked(losses)
        """The names; empty before `resolve` if they are the module's own, and after it if they stay open."""
        self.logged_names = dict(losses) if isinstance(losses, Mapping) else None
        """Name → name under which the loss is logged, if that is where losses are found."""
        self.declared = False
        """Whether the module declares its tasks."""

    def _checked(self, losses: Sequence[str] | Mapping[str, str]) -> tuple[str, ...]:
        return checked_names(losses, caller=self.caller, parameter=self._parameter, least=self._least)

    def resolve(self, module: L.LightningModule) -> dict[str, str] | None:
        """Find the tasks in a module. Return task → head if the module declares them, else None.

        Raises:
            ValueError: the module has no such task, or none at all.
        """
        declared = dict(module.task_heads) if isinstance(module, DeclaresTasks) else None
        self.declared = declared is not None
        name = type(module).__name__
        if self._given is None:
            self.names = () if declared is None else self._checked(list(declared))
            if declared is None and self._parameter == "tasks":
                raise ValueError(
                    f"{self.caller}: tasks=None takes all tasks of a MultiTaskModule; {name} should have its losses named: "
                    f"tasks=['seg', 'depth'] for keys of what training_step returns, or tasks={{'seg': 'train/seg_loss', …}} "
                    f"for what it logs."
                )
        if declared is None:
            return None
        if self.logged_names is not None:
            raise ValueError(
                f"{self.caller}: {self._parameter} names the losses as they are logged, {sorted(self.logged_names.values())}, "
                f"but {name} shows them itself. Use {self._parameter}=None for all of its tasks, or a list of their names."
            )
        unknown = [task for task in self.names if task not in declared]
        if unknown:
            raise ValueError(
                f"{self.caller}: {self.noun} '{unknown[0]}' is not in {name}; {did_you_mean(unknown[0], declared)}"
            )
        return {task: declared[task] for task in self.names}

    def capture(self, module: L.LightningModule, watch: Watch, logged: set[str]) -> Remove:
        """Hand the losses to ``watch`` in each training step, until the returned function is called.

        Args:
            module: the module.
            watch: is called before the backward pass.
            logged: every name that the module logs in training is added to it.
        """
        if self.logged_names is not None:
            return capture_logged(module, self.logged_names, watch, logged)
        if module.automatic_optimization:
            return self._capture_returned(module, watch)
        return ExitStack().close

    def _capture_returned(self, module: L.LightningModule, watch: Watch) -> Remove:
        """Hand the mapping that ``training_step`` returns to ``watch``."""
        training_step = module.training_step

        @wraps_innermost(training_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            output = training_step(*args, **kwargs)
            if output is not None:
                if not isinstance(output, Mapping):
                    raise TypeError(
                        f"{self.caller}: {type(module).__name__}.training_step should return a mapping with 'loss' and its "
                        f"parts; got {type(output).__name__}. Return {{'loss': loss, 'seg': seg, …}}, or name the losses as "
                        f"they are logged: {self._parameter}={{'seg': 'train/seg_loss', …}}."
                    )
                watch({name: value for name, value in output.items() if name != "loss"})
            return output

        return patch_attribute(module, "training_step", step)


def wraps_innermost(method: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`functools.wraps` of the innermost function: Lightning looks behind one wrapper for a ``batch_idx`` parameter."""
    return functools.wraps(inspect.unwrap(method))


def capture_logged(module: L.LightningModule, names: Mapping[str, str], watch: Watch, all_names: set[str]) -> Remove:
    """Hand what the module logs under ``names`` (task → logged name) to ``watch``, before Lightning detaches it.

    Every name it logs in training is added to ``all_names``.
    """
    log = module.log
    tasks = {logged: task for task, logged in names.items()}

    @wraps_innermost(log)
    def log_and_watch(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if module.trainer.training:
            all_names.add(name)
            if name in tasks:
                watch({tasks[name]: value})
        log(name, value, *args, **kwargs)

    return patch_attribute(module, "log", not_traced(log_and_watch))


def explain_errors(module: L.LightningModule, explain: Callable[[RuntimeError], str | None]) -> Remove:
    """Turn a ``RuntimeError`` of ``training_step`` into a ``ValueError`` with the message of ``explain``, if it has one."""
    training_step = module.training_step

    @wraps_innermost(training_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        try:
            return training_step(*args, **kwargs)
        except RuntimeError as error:
            message = explain(error)
            if message is None:
                raise
            raise ValueError(message) from error

    return patch_attribute(module, "training_step", step)
