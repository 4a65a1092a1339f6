"""Finds the task losses of a LightningModule while they are still part of the graph.

Four sources: the mapping that ``training_step`` returns; the values that the module logs; the return value of something inside
the module (`CalledLosses`); or `watch`, called by the module itself. During training we replace the method that sees a loss,
on the module instance.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import lightning as L

from lightning_gradnorm._messages import check_by_task, checked_names, did_you_mean, nearest
from lightning_gradnorm.callbacks.called_losses import CalledLosses
from lightning_gradnorm.engine.module_hooks import Remove, ReplacedMethod, not_traced, patch_attribute
from lightning_gradnorm.engine.rule import DeclaresTasks

Watch = Callable[[Mapping[str, Any]], None]


class LossSource:
    """Finds the losses that you name in a module that knows nothing of us, and compares the names with those it shows.

    Args:
        caller: the callback's name; begins each error.
        losses: keys of what ``training_step`` returns; name → name under which the module logs the loss; or ``None`` for all
            tasks of a module that declares them.
        parameter: the callback's name for this argument. ``"tasks"`` are at least two, and must be named unless the module
            declares them. ``"losses"`` are at least one, and may stay unnamed.
        losses_from: dotted path to what returns the losses; the names are keys, attributes or indices of the return value. Or
            name → path.
    """

    def __init__(
        self,
        caller: str,
        losses: Sequence[str] | Mapping[str, str] | None,
        parameter: Literal["tasks", "losses"] = "tasks",
        losses_from: str | Mapping[str, str] | None = None,
    ) -> None:
        self.caller = caller
        self._given = losses
        self._parameter = parameter
        is_tasks = parameter == "tasks"
        self._least, self._noun, self._period = (
            (2, "task", "first batches") if is_tasks else (1, "loss", "measured steps")
        )
        self.names: tuple[str, ...] = () if losses is None else self._checked(losses)
        """The names; empty before `resolve` if they are the module's own, and after it if they stay open."""
        is_logged = isinstance(losses, Mapping) and losses_from is None
        self.logged_names = dict(losses) if isinstance(losses, Mapping) and is_logged else None
        """Name → name under which the loss is logged, if losses are found in the logs."""
        self._called = None if losses_from is None else self._checked_calls(losses, losses_from)
        self.were_watched = False
        """Whether the module has called `watch` itself."""
        self.without_gradient: dict[str, None] = {}
        """Names shown under ``torch.no_grad``."""
        self.declared = False
        """Whether the module declares its tasks. Then it shows its losses and knows which are absent: nothing is checked."""
        self.logged: set[str] = set()
        """All names that the module has logged in this training."""
        self.shown: dict[str, None] = {}
        """All names under which losses were returned or watched, in order of appearance."""

    def _checked(self, losses: Sequence[str] | Mapping[str, str]) -> tuple[str, ...]:
        return checked_names(losses, caller=self.caller, parameter=self._parameter, least=self._least)

    def _checked_calls(
        self, losses: Sequence[str] | Mapping[str, str] | None, losses_from: str | Mapping[str, str]
    ) -> CalledLosses:
        parameter = self._parameter
        if isinstance(losses_from, Mapping):
            check_by_task(losses_from, self.names, caller=self.caller, parameter="losses_from")
            for name, path in losses_from.items():
                if not isinstance(path, str) or not path:
                    raise TypeError(
                        f"{self.caller}: losses_from['{name}'] should be a dotted path such as 'module.loss'; got {path!r}"
                    )
            if isinstance(losses, Mapping):
                raise ValueError(
                    f"{self.caller}: losses_from names a place for each loss, and {parameter} a name for each. Give "
                    f"{parameter}={list(losses)} with these places, or losses_from as one place."
                )
        elif not isinstance(losses_from, str) or not losses_from:
            raise TypeError(
                f"{self.caller}: losses_from should be a dotted path such as 'module.loss', or a mapping from task to path; "
                f"got {losses_from!r}"
            )
        if losses is None:
            raise ValueError(f"{self.caller}: losses_from needs {parameter}, the names of the losses; got None")
        return CalledLosses(
            self.caller, losses if isinstance(losses, Mapping) else dict(zip(losses, losses, strict=True)), losses_from
        )

    def __str__(self) -> str:
        """Return a description of where the losses are found."""
        if self._called is not None:
            return str(self._called)
        if self.logged_names is not None:
            return "logged as " + ", ".join(self.logged_names.values())
        return "watched" if self.were_watched or self.declared else "returned by training_step"

    def resolve(self, module: L.LightningModule) -> dict[str, str] | None:
        """Find the tasks in a module. Return task → head if the module declares them, else None.

        Raises:
            ValueError: the module has no such task, or none at all.
        """
        self.logged, self.shown, self.without_gradient, self.were_watched = set(), {}, {}, False
        declared = dict(module.task_heads) if isinstance(module, DeclaresTasks) else None
        self.declared = declared is not None
        name = type(module).__name__
        if self._given is None:
            self.names = () if declared is None else self._checked(list(declared))
            if declared is None and self._parameter == "tasks":
                raise ValueError(
                    f"{self.caller}: tasks=None takes all tasks of a MultiTaskModule. Name the losses of {name}: "
                    f"tasks=['seg', 'depth'] as training_step returns them, or tasks={{'seg': 'train/seg_loss', …}} as it logs "
                    f"them, or losses_from='…' as something inside {name} returns them."
                )
        if declared is None:
            return None
        if self._called is not None:
            raise ValueError(
                f"{self.caller}: losses_from is for models that return only their total, but {name} shows the losses of its "
                f"tasks itself. Leave it out."
            )
        if self.logged_names is not None:
            raise ValueError(
                f"{self.caller}: {self._parameter} names the losses as they are logged, {sorted(self.logged_names.values())}, "
                f"but {name} shows them itself. Use {self._parameter}=None for all of its tasks, or a list of their names."
            )
        for task in self.names:
            if task not in declared:
                raise ValueError(
                    f"{self.caller}: {self._noun} '{task}' is not in {name}; {did_you_mean(task, declared)}"
                )
        return {task: declared[task] for task in self.names}

    # ---- capturing them ----------------------------------------------------------------------------------------------

    def capture(self, module: L.LightningModule, watch: Watch) -> Remove:
        """Hand the losses to ``watch`` in each training step, until the returned function is called."""
        if self._called is not None:
            return self._called.capture(module, watch)
        if self.logged_names is not None:
            return self._capture_logged(module, watch, {logged: name for name, logged in self.logged_names.items()})
        if module.automatic_optimization:
            return self._capture_returned(module, watch)
        return ExitStack().close

    def _capture_returned(self, module: L.LightningModule, watch: Watch) -> Remove:
        training_step = module.training_step

        @wraps_innermost(training_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            output = training_step(*args, **kwargs)
            if isinstance(output, Mapping):
                watch({name: value for name, value in output.items() if name != "loss"})
            elif output is not None and not self.shown:
                logged = self._logged_by(module) or "{'seg': 'train/seg_loss', …}"
                raise TypeError(
                    f"{self.caller}: {type(module).__name__}.training_step should return a mapping with 'loss' and its "
                    f"parts; got {type(output).__name__}. Return {{'loss': loss, 'seg': seg, …}}; or name the losses as "
                    f"they are logged: {self._parameter}={logged}; or name what returns them: "
                    f"losses_from='…'; or call watch({{'seg': seg, …}}) on this callback."
                )
            return output

        return patch_attribute(module, "training_step", ReplacedMethod(module, "training_step", step))

    def _logged_by(self, module: L.LightningModule) -> dict[str, str]:
        """Return name → the similar name that the module has logged, or an empty dict unless each name has its own."""
        logged = {entry.meta.name for entry in (getattr(module.trainer, "_results", None) or {}).values()}
        found: dict[str, str] = {}
        for name in self.names:
            similar = [one for one in logged - set(found.values()) if name in one]
            if not similar:
                return {}
            found[name] = min(similar, key=lambda one: ("loss" not in one, len(one), one))
        return found

    def _capture_logged(self, module: L.LightningModule, watch: Watch, names: Mapping[str, str]) -> Remove:
        log = module.log

        @wraps_innermost(log)
        def log_and_watch(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if module.trainer.training:
                self.logged.add(name)
                if name in names:
                    watch({names[name]: value})
            log(name, value, *args, **kwargs)  # which detaches the value

        return patch_attribute(module, "log", ReplacedMethod(module, "log", not_traced(log_and_watch)))

    # ---- comparing the names: each method returns a message, or None -------------------------------------------------

    def find_unlogged(self, seen: Iterable[str], *, is_late: bool) -> str | None:
        """Return a message about a loss that was not logged, if it is late or another logged name is similar."""
        expected = self.logged_names or {}
        for name, logged in expected.items():
            if name in seen:
                continue
            near = nearest(logged, self.logged - set(expected.values()))
            if is_late or near:
                return (
                    f"{self.caller}: '{logged}' was not logged in the {self._period}, which logged {sorted(self.logged)}"
                    f"{_question(near)}(In training_step, log the loss before its backward.)"
                )
        return None

    def find_misnamed(self, *, is_all: bool) -> str | None:
        """Return a message about a loss that was not shown, if no more will come or another name is similar."""
        for name in () if self.declared or self.logged_names is not None else self.names:
            if name in self.shown:
                continue
            near = nearest(name, self.shown.keys() - set(self.names))
            if is_all or near:
                return (
                    f"{self.caller}: {self._noun} '{name}' is not among the losses of the {self._period}, which are "
                    f"{sorted(self.shown)}{_question(near)}(A {self._noun} that is absent from a batch is given as None.)"
                    f"{self._no_gradient_note(name)}"
                )
        return None

    def _no_gradient_note(self, name: str) -> str:
        is_noted = name in self.without_gradient
        return f" The loss '{name}' was computed under torch.no_grad() or inference_mode()." if is_noted else ""

    def find_unwatched(self, module: L.LightningModule) -> str | None:
        """Return a message if no loss was shown by a module that must show them itself."""
        if self.shown or self.declared or self.logged_names is not None:
            return None
        if self._called is not None:
            noted = self._no_gradient_note(next(iter(self.without_gradient), ""))
            return (
                f"{self.caller}: no loss came from {self._called.places} in the {self._period}. Name in losses_from what "
                f"training_step calls with gradients. (A module is seen if it is called itself, not its forward.){noted}"
            )
        if module.automatic_optimization:
            return None
        what = "task loss" if self._noun == "task" else "loss"
        example = self.names[0] if self.names else "data"
        return (
            f"{self.caller}: no {what} was seen in the {self._period}. {type(module).__name__} optimizes manually, so it "
            f"should call watch({{'{example}': loss, …}}) on this callback before manual_backward."
        )


def _question(near: str | None) -> str:
    return ". " if near is None else f"; did you mean '{near}'? "


def wraps_innermost(method: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`functools.wraps` of the innermost function: Lightning looks behind only one wrapper for a ``batch_idx`` parameter."""
    return functools.wraps(inspect.unwrap(method))


def explain_errors(module: L.LightningModule, explain: Callable[[RuntimeError], str | None]) -> Remove:
    """Turn a ``RuntimeError`` in ``training_step`` into a ``ValueError`` with the message from ``explain``, if it has one."""
    training_step = module.training_step

    @wraps_innermost(training_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        try:
            return training_step(*args, **kwargs)
        except RuntimeError as error:
            if (message := explain(error)) is None:
                raise
            raise ValueError(message) from error

    return patch_attribute(module, "training_step", ReplacedMethod(module, "training_step", step))
