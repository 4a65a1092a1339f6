"""Takes losses out of the return value of a module, method or function inside the model, if the model returns only a total."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradnorm._messages import did_you_mean
from lightning_gradnorm.engine.module_hooks import (
    Remove,
    ReplacedMethod,
    not_traced,
    patch_attribute,
    supports_hooks,
    wrap_call,
)
from lightning_gradnorm.gradients.graph import has_gradient

Show = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class _Place:
    """Something that can be called, and where it is kept."""

    owner: Any
    key: str
    called: Any


class CalledLosses:
    """Finds the losses in the return values of one place for all tasks, or of one place per task.

    Args:
        caller: begins each error.
        names: task → dotted position of its loss in the return value, if there is one place.
        losses_from: the dotted path of that place; or task → path; its return value is the task's loss.
    """

    def __init__(self, caller: str, names: Mapping[str, str], losses_from: str | Mapping[str, str]) -> None:
        self._caller = caller
        if isinstance(losses_from, str):
            self._inside = {losses_from: dict(names)}
        else:
            self._inside = {}
            for task, path in losses_from.items():
                self._inside.setdefault(path, {})[task] = ""
        for path, tasks in self._inside.items():
            if len(tasks) > 1 and "" in tasks.values():
                raise ValueError(
                    f"{caller}: losses_from names '{path}' for the tasks {list(tasks)}, but its return value can be the loss "
                    f"of only one task. If it returns several, give losses_from='{path}', and in tasks the place of each loss."
                )

    def __str__(self) -> str:
        return "from " + ", ".join(self._inside)

    @property
    def places(self) -> str:
        """The paths, in quotes."""
        return ", ".join(f"'{path}'" for path in self._inside)

    def capture(self, root: nn.Module, show: Show) -> Remove:
        """Hand the losses to ``show`` whenever one of the places is called, until the returned function is called.

        Raises:
            ValueError: the model has no such place, or it cannot be called.
        """
        with ExitStack() as hooks:
            for path, tasks in self._inside.items():
                hooks.callback(self._capture_one(root, path, tasks, show))
            return hooks.pop_all().close

    def _capture_one(self, root: nn.Module, path: str, tasks: Mapping[str, str], show: Show) -> Remove:
        place = self._find(root, path)

        def take(output: Any) -> Any:
            return self._take(path, tasks, output, show)

        if isinstance(place.called, nn.Module) and supports_hooks(place.called):
            return wrap_call(place.called, after=take)

        def call(*args: Any, **kwargs: Any) -> Any:
            output = place.called(*args, **kwargs)
            changed = take(output)
            return output if changed is None else changed

        return _replace(place, not_traced(call), f"{self._caller}: losses_from '{path}'")

    def _find(self, root: nn.Module, path: str) -> _Place:
        owner: Any = root
        found: Any = root
        walked: list[str] = []
        for key in path.split("."):
            owner, found = found, _item(found, key)
            if found is None:
                where = f"'{'.'.join(walked)}' ({type(owner).__name__})" if walked else "it"
                hint = did_you_mean(key, _keys(owner))
                if key == "self" and not walked:
                    hint = f"leave 'self.' out: losses_from='{path.removeprefix('self.')}'"
                raise ValueError(
                    f"{self._caller}: losses_from '{path}' is not in {type(root).__name__}: {where} has no '{key}'; {hint}"
                )
            walked.append(key)
        if not callable(found):
            raise ValueError(
                f"{self._caller}: losses_from '{path}' should be a module, a method or a function that returns the losses; got "
                f"{type(found).__name__}"
            )
        return _Place(owner, walked[-1], found)

    def _take(self, path: str, tasks: Mapping[str, str], output: Any, show: Show) -> Any:
        """Show the losses in ``output``. Return its replacement if it is a tensor with a loss in each entry or column."""
        if isinstance(output, Tensor) and output.ndim and any(tasks.values()):
            # A separate entry of the tensor would not be part of the loss. So we rebuild the tensor from its entries.
            are_columns = output.ndim == 2 and all(inside.startswith("T.") for inside in tasks.values())
            parts = output.unbind(int(are_columns))
            names = {task: inside.removeprefix("T.") if are_columns else inside for task, inside in tasks.items()}
            show({task: self._look_up(path, task, inside, parts, "Tensor") for task, inside in names.items()})
            return torch.stack(parts, int(are_columns)) if output.requires_grad else None
        for task, inside in tasks.items():
            value = self._look_up(path, task, inside, output) if inside else output
            losses = list(_tensors(value))
            trained = [loss for loss in losses if has_gradient(loss)]
            for loss in trained or losses or [value]:
                show({task: loss})
        return None

    def _look_up(self, path: str, task: str, inside: str, output: Any, kind: str | None = None) -> Any:
        value = output
        for key in inside.split("."):
            found = _item(value, key)
            if found is None and key not in _keys(value):
                kind = kind or type(value).__name__
                what = f"{self._caller}: the loss of task '{task}' should be '{inside}' in what '{path}' returns, but"
                if isinstance(value, Tensor) and value.ndim:
                    raise ValueError(
                        f"{what} the entries of a tensor are found only if it is all that is returned: otherwise they are not "
                        f"part of the loss. Name a module or a method that returns the tensor itself, or call watch()."
                    )
                if not _keys(value):
                    raise ValueError(f"{what} got a {kind}. Name what returns each: losses_from={{'{task}': '…'}}.")
                raise ValueError(f"{what} this {kind} has no '{key}'; {did_you_mean(key, _keys(value))}")
            value, kind = found, None
        return value


def _tensors(value: Any) -> Iterator[Any]:
    """Yield the losses in a value: the value itself, or the items of a mapping, a list or a tuple."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    else:
        yield value


def _item(holder: Any, key: str) -> Any:
    """Return an item by key or index, or an attribute; ``None`` if it has neither."""
    if isinstance(holder, Mapping) and key in holder:
        return holder[key]
    if isinstance(holder, Sequence) and not isinstance(holder, str) and key.isdigit():
        return holder[int(key)] if int(key) < len(holder) else None
    return getattr(holder, key, None)


def _keys(holder: Any) -> list[str]:
    """Return the keys that `_item` finds in a holder."""
    if isinstance(holder, Mapping):
        return [str(key) for key in holder]
    if isinstance(holder, Sequence) and not hasattr(holder, "_fields"):
        return [str(index) for index in range(len(holder))]
    if isinstance(holder, Tensor):
        return []
    own = [*vars(holder)] if hasattr(holder, "__dict__") else []
    own += [name for kind in type(holder).__mro__ if not _is_framework(kind) for name in vars(kind)]
    inside = [name for name, _ in holder.named_children()] if isinstance(holder, nn.Module) else []
    return [name for name in dict.fromkeys([*inside, *own]) if not name.startswith("_") and name not in _LIGHTNINGS]


_LIGHTNINGS = ("training", "prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices")
"""Attributes of every LightningModule."""


def _is_framework(kind: type) -> bool:
    return kind is object or kind.__module__.partition(".")[0] in (
        "torch",
        "lightning",
        "pytorch_lightning",
        "lightning_fabric",
    )


def _replace(place: _Place, call: Callable[..., Any], asked: str) -> Remove:
    """Replace the callable at a place by ``call``."""
    owner, key = place.owner, place.key
    if isinstance(owner, MutableMapping | MutableSequence):
        index: Any = key if isinstance(owner, Mapping) else int(key)
        owner[index] = call

        def undo() -> None:
            owner[index] = place.called

        return undo
    try:
        return patch_attribute(owner, key, ReplacedMethod(owner, key, call))
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{asked} cannot be replaced in a {type(owner).__name__}, which we need to see its return value. Name a module or "
            f"a method that calls it."
        ) from error
