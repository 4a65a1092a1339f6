"""The state of a strategy as plain tensors and numbers, for torchjd's scalarizers, weightings and aggregators, ours and yours.

``state_dict()`` is not enough: most of torchjd's strategies keep their history in plain attributes, one keeps an optimizer,
and ``load_state_dict`` refuses a buffer that a fresh object has not created yet.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_VERSION = 2  # of the layout of `snapshot`

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
_FUNCTIONS = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Hooks, the dicts of parameters, buffers and submodules, and the training mode."""
_CONSTANT = {"UPGradWeighting": {"_projector"}, "DualProjWeighting": {"_projector"}}
"""Class → attributes whose objects have no state."""


def _nash_mtl_state(weighting: Any) -> dict[str, Any]:
    arrays = {name: torch.tensor(getattr(weighting, name)) for name in ("prvs_alpha", "normalization_factor")}
    return {"step": weighting.step, **arrays}


def _load_nash_mtl(weighting: Any, state: Mapping[str, Any]) -> None:
    weighting.step = state["step"]
    for name in ("prvs_alpha", "normalization_factor"):
        setattr(weighting, name, state[name].cpu().numpy())
    if weighting.step > 0:  # NashMTL builds cvxpy's problem only in its very first call
        weighting._init_optim_problem()


_EXTRA_STATE: Mapping[str, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    "_NashMTLWeighting": (_nash_mtl_state, _load_nash_mtl)
}
"""Class → replacements for the ``get_extra_state`` and ``set_extra_state`` it lacks."""


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Return copies of all state of the module and its submodules, loadable with ``torch.load(weights_only=True)``.

    This covers parameters, buffers, and attributes (including the options it was built with) that are tensors, numbers,
    strings, ``None``, lists, tuples or dicts of these, or torch optimizers of the module's parameters. Functions and classes
    are not state. If a class has ``get_extra_state`` and ``set_extra_state``, these replace its attributes.

    Raises:
        TypeError: an attribute is none of these, so its content would be lost.

    Example:
        >>> from torchjd.scalarization import DWA
        >>> dwa, fresh = DWA(), DWA()
        >>> for losses in torch.tensor([[4.0, 1.0], [2.0, 1.0]]):
        ...     _ = dwa(losses)
        ...     dwa.step()
        >>> load_snapshot(fresh, snapshot(dwa))
        >>> fresh._previous_averages
        [tensor([4., 1.]), tensor([2., 1.])]
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {"version": _VERSION, "modules": {path: _state_of(part, names) for path, part in module.named_modules()}}


def _state_of(part: nn.Module, names: Mapping[int, str]) -> dict[str, Any]:
    owner = type(part).__qualname__
    state = {"class": owner, "parameters": _copied(part._parameters, owner), "buffers": _copied(part._buffers, owner)}
    if extra := _extra_state_methods(part):
        return {**state, "extra_state": _copied(extra[0](part), owner, "get_extra_state()")}
    attributes, optimizers = _attributes_of(part), {}
    for name in [name for name, value in attributes.items() if isinstance(value, torch.optim.Optimizer)]:
        optimizer = attributes.pop(name)
        groups = [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
        if any(None in group for group in groups):
            raise TypeError(
                f"{owner}: the optimizer '{name}' has parameters that are not the module's. Make them nn.Parameters of it; or "
                f"implement get_extra_state and set_extra_state in {owner}."
            )
        saved = _copied(optimizer.state_dict(), owner, name)
        optimizers[name] = {"class": type(optimizer).__qualname__, "parameters": groups, "state": saved}
    return {**state, "attributes": _copied(attributes, owner), "optimizers": optimizers}


def _copied(value: Any, owner: str, where: str = "") -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad and value.is_leaf)
    if type(value) in (list, tuple):
        return type(value)(_copied(item, owner, f"{where}[{index}]") for index, item in enumerate(value))
    if type(value) in (dict, OrderedDict):
        items = [(key, item, f"{where}[{key!r}]" if where else str(key)) for key, item in value.items()]
        return {_copied(key, owner, place): _copied(item, owner, place) for key, item, place in items}
    raise TypeError(
        f"{owner}: '{where}' is a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved. Keep state in "
        f"tensors, numbers, strings, lists, tuples or dicts; or implement get_extra_state and set_extra_state in {owner}."
    )


def load_snapshot(module: nn.Module, state: Mapping[str, Any], device: torch.device | str | None = None) -> None:
    """Load the state of another module that was built with the same arguments; this one continues bit for bit.

    Parameters stay the same objects, on their device and in their precision, so an optimizer that holds them keeps them.

    Args:
        module: freshly built (with its tasks named if it has ``name_tasks``) and not used yet.
        state: what `snapshot` returned, here or from a file. It may be loaded more than once.
        device: where to put what the fresh module has not created yet: the device of the coming losses or gradients. By
            default that of the state.

    Raises:
        ValueError: class, submodules, attributes or shapes differ from the state's. The module may then be loaded in part.

    Warns:
        UserWarning: an option differs from the state's. The state's applies, as with torch's optimizers.
    """
    owner, parts = type(module).__qualname__, dict(module.named_modules())
    if state.get("version") != _VERSION:
        raise ValueError(
            f"{owner}: the state should be of version {_VERSION}; got {state.get('version')!r}. Resume with the version of "
            f"lightning-gradnorm that wrote it."
        )
    saved = state["modules"]
    for path in saved.keys() & parts.keys():
        where = f"submodule '{path}'" if path else "the strategy"
        _check_class(f"{owner}: {where}", saved[path]["class"], parts[path])
    _check_names(f"{owner}: submodules", parts, saved, may_lack=False)
    if device is not None:
        device = torch.empty(0, device=device).device  # 'cuda' alone would not equal the gradients' 'cuda:0'
    for path, part in parts.items():
        name = type(part).__qualname__
        _load_into(part._buffers, saved[path]["buffers"], f"{name}: buffer", device)
        _load_into(part._parameters, saved[path]["parameters"], f"{name}: parameter", device)
        for key, value in part._parameters.items():
            if value is not None and not isinstance(value, nn.Parameter):
                part._parameters[key] = nn.Parameter(value, requires_grad=value.requires_grad)
    parameters = dict(module.named_parameters())
    for path, part in parts.items():
        if extra := _extra_state_methods(part):
            extra[1](part, copy.deepcopy(saved[path]["extra_state"]))
        else:
            _load_attributes(part, saved[path], parameters, device)


def _load_attributes(
    part: nn.Module, saved: Mapping[str, Any], parameters: Mapping[str, Tensor], device: torch.device | None
) -> None:
    owner, attributes = type(part).__qualname__, _attributes_of(part)
    optimizers = {name: attributes.pop(name, None) for name in saved["optimizers"]}
    _warn_of_other_options(owner, part, saved["attributes"])
    _load_into(attributes, saved["attributes"], f"{owner}: attribute", device)
    vars(part).update(attributes)
    for name, of in saved["optimizers"].items():
        # FAMO creates its optimizer only in its first update; the options come with the state.
        groups = [{"params": [parameters[one] for one in group]} for group in of["parameters"]]
        optimizer: Any = optimizers[name] or getattr(torch.optim, of["class"], lambda _: None)(groups)
        _check_class(f"{owner}: {name}", of["class"], optimizer)
        optimizer.load_state_dict(copy.deepcopy(of["state"]))
        vars(part)[name] = optimizer


def _load_into(target: Any, saved: Mapping[str, Any], what: str, device: torch.device | None) -> None:
    # Names only in the state were created by a call, which a fresh object has not had.
    _check_names(what, target, saved, may_lack=True)
    for name, value in saved.items():
        target[name] = _loaded(value, target.get(name), f"{what} '{name}'", device)


def _loaded(saved: Any, present: Any, where: str, device: torch.device | None) -> Any:
    """Return a copy of the saved value; tensors in the state's precision, on the device of those they replace."""
    if isinstance(saved, Tensor):
        is_filled = isinstance(present, Tensor) and min(present.numel(), saved.numel()) > 0  # else: before a first call
        if is_filled and present.shape != saved.shape:
            raise ValueError(
                f"{where} should be of shape {tuple(saved.shape)} as in the state; got {tuple(present.shape)}. "
                f"Build it with the same arguments and number of tasks, and load the state before it is used."
            )
        if isinstance(present, nn.Parameter):
            present.data.copy_(saved)
            return present
        to = present.device if isinstance(present, Tensor) else device
        return saved.detach().to(device=to, copy=True).requires_grad_(saved.requires_grad)
    if isinstance(saved, torch.device):
        return device or saved
    if type(saved) in (list, tuple):
        known = dict(enumerate(present)) if isinstance(present, list | tuple) and len(present) == len(saved) else {}
        return type(saved)(_loaded(one, known.get(i), f"{where}[{i}]", device) for i, one in enumerate(saved))
    if isinstance(saved, dict):
        known = present if isinstance(present, dict) else {}
        return {key: _loaded(value, known.get(key), f"{where}[{key!r}]", device) for key, value in saved.items()}
    return saved


def matched_by_task(state: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a rule's state with all per-task tensors in the order of ``tasks``; 0 for new tasks."""
    known = list(state["tasks"])
    order = [known.index(task) if task in known else len(known) for task in tasks]

    def matched(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: matched(one) for key, one in value.items()}
        if isinstance(value, Tensor) and value.shape == (len(known),):
            return torch.cat([value, value.new_zeros(1)])[order]
        return copy.deepcopy(value)

    return {key: matched(value) for key, value in state.items()}


def _attributes_of(part: nn.Module) -> dict[str, Any]:
    left_out = _OF_EVERY_MODULE | _CONSTANT.get(type(part).__qualname__, set())
    return {name: one for name, one in vars(part).items() if name not in left_out and not isinstance(one, _FUNCTIONS)}


def _check_class(what: str, expected: str, found: object) -> None:
    if type(found).__qualname__ != expected:
        kind = type(found).__qualname__
        raise ValueError(f"{what} should be a {expected} as in the state; got a {kind}. Resume with the same.")


def _extra_state_methods(part: nn.Module) -> tuple[Callable[[Any], Any], Callable[[Any, Any], None]] | None:
    if type(part).get_extra_state is not nn.Module.get_extra_state:
        return type(part).get_extra_state, type(part).set_extra_state
    return _EXTRA_STATE.get(type(part).__qualname__)


def _check_names(what: str, present: Mapping[str, Any], saved: Mapping[str, Any], *, may_lack: bool) -> None:
    unknown, missing = sorted(set(present) - set(saved)), sorted(set(saved) - set(present))
    if unknown or (missing and not may_lack):
        raise ValueError(
            f"{what}: the state lacks {unknown or 'nothing'} that this one has, and has {missing or 'nothing'} that this one "
            f"lacks. Build it with the same arguments and version of its library, and load the state before it is used."
        )


def _warn_of_other_options(owner: str, part: nn.Module, saved: Mapping[str, Any]) -> None:
    # Options are recognized by name: an argument of the class, with or without an underscore.
    for argument in inspect.signature(type(part).__init__).parameters:
        for name in {argument, f"_{argument}"} & set(saved):
            old, new = saved[name], vars(part).get(name)
            if type(old) in _PLAIN and type(new) in _PLAIN and old != new:
                warnings.warn(
                    f"{owner}: {argument} is {old!r} in the state and {new!r} here; the state's applies. "
                    f"To change it, set it after the state is loaded.",
                    stacklevel=4,
                )


class LazyBufferModule(nn.Module):
    """Base of modules whose buffers start empty and get their size in the first call.

    ``load_state_dict`` gives a buffer that is still empty the size and precision of the checkpoint's. Each argument of the
    constructor is an attribute of the same name.
    """

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={getattr(self, name)!r}" for name in inspect.signature(type(self)).parameters)
        return f"{type(self).__name__}({given})"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and buffer is not None and buffer.numel() == 0:
                self._buffers[name] = torch.empty_like(saved, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
