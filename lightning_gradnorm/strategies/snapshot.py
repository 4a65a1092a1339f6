"""What a strategy remembers, as plain tensors and numbers: torchjd's scalarizers, weightings and aggregators, ours, a user's.

``state_dict()`` is not enough: it has the parameters and the buffers that are no longer ``None``, but not the plain attributes
in which most of torchjd's strategies keep their history, nor an optimizer of their own, and ``load_state_dict`` refuses a
buffer that the fresh object has not made yet.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_VERSION = 1
"""Of the layout of `snapshot`."""

_PLAIN = (type(None), bool, int, float, complex, str)
_FUNCTIONS = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Hooks, the dicts of parameters, buffers and submodules, and whether it trains."""


class _Rebuilt(NamedTuple):
    """Attributes that cannot be saved, and need not be: `rebuild` makes them again out of the others."""

    attributes: frozenset[str]
    rebuild: Callable[[Any], None]


def _rebuild_nash_mtl(weighting: Any) -> None:
    if weighting.step > 0:  # it builds its problem in its very first call alone
        weighting._init_optim_problem()


_REBUILT: Mapping[str, _Rebuilt] = {
    # cvxpy's problem and the variables in it, whose values are all set anew each time before it is solved.
    "_NashMTLWeighting": _Rebuilt(
        frozenset({"prob", "phi_alpha", "alpha_param", "prvs_alpha_param", "G_param", "normalization_factor_param"}),
        _rebuild_nash_mtl,
    )
}

_ON_CPU = frozenset({"GradVacWeighting", "PCDWeighting"})
"""Classes that compute on the CPU wherever their input is: their tensors stay there."""


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Return everything that the module remembers, loadable with ``torch.load(weights_only=True)``.

    That is, of the module and all its submodules: the parameters, the buffers and every plain attribute, the options it was
    built with included. An attribute may be a tensor, number, string, list, tuple, dict, set, deque, NumPy array, torch
    generator, torch optimizer of the module's parameters, or a Python object of such attributes. All are copies.

    Not carried, because an object built with the same arguments has it: functions, classes and hooks, and whether the module
    is in training mode. Not carried, because it is not the module's: torch's global random generator, from which torchjd draws.
    A list or tensor that two attributes share is two equal ones after `load_snapshot`; but a parameter or buffer stays
    the same one wherever else it is named.

    Raises:
        TypeError: an attribute is none of these, so that its content would be lost.

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
    encode = _Encoder(type(module).__name__, {id(tensor): name for name, tensor in _tensors_of(module)}).encode
    return {
        "version": _VERSION,
        "modules": {
            path: {
                "class": type(part).__qualname__,
                "parameters": {name: _copy_of(value) for name, value in part._parameters.items()},
                "buffers": {name: _copy_of(value) for name, value in part._buffers.items()},
                "attributes": {
                    name: encode(value, _joined(path, name)) for name, value in _attributes_of(part).items()
                },
            }
            for path, part in module.named_modules()
        },
    }


def load_snapshot(module: nn.Module, state: Mapping[str, Any], device: torch.device | str | None = None) -> None:
    """Give a fresh module the memory of another one, built with the same arguments: bit by bit it goes on as that would.

    A parameter stays the object it is, on its device and in its precision, so that an optimizer that has it keeps it.

    Args:
        module: as it was built, and its ``name_tasks`` called if it has one; not used yet.
        state: what `snapshot` has returned, here or from a file. It may be restored more than once.
        device: that of the losses or gradients to come, for what the fresh module has not made yet. By default that stays on
            the device where the state has it.

    Raises:
        ValueError: the module's class, parts, attributes or shapes are not those of the state. It may then be restored in part.

    Warns:
        UserWarning: an option has another value in the state, which wins, as it does with torch's optimizers.
    """
    owner = type(module).__name__
    if state.get("version") != _VERSION:
        raise ValueError(
            f"{owner}: the state should be of version {_VERSION}; got {state.get('version')!r}. "
            f"Resume with the version of lightning-gradnorm that wrote it."
        )
    saved, parts = state["modules"], dict(module.named_modules())
    if saved[""]["class"] != type(module).__qualname__:
        raise ValueError(f"{owner}: the state is that of a {saved['']['class']}. Resume with the same strategy.")
    _same_names(f"{owner}: submodules", saved, parts)
    if device is not None:
        device = torch.empty(0, device=device).device  # 'cuda' alone would not be equal to the gradients' 'cuda:0'
    for path, part in parts.items():
        if saved[path]["class"] != type(part).__qualname__:
            raise ValueError(
                f"{owner}: '{path}' is a {type(part).__qualname__}, in the state a {saved[path]['class']}. "
                f"Resume with the same strategy."
            )
        _restore_tensors(part, saved[path], _joined(owner, path), _device_for(part, device))
    tensors = dict(_tensors_of(module))
    for path, part in parts.items():
        attributes, where = saved[path]["attributes"], _joined(owner, path)
        _warn_of_other_options(part, attributes, where)
        decoder = _Decoder(tensors, _device_for(part, device))
        decoder.restore_into(part, _attributes_of(part), attributes, where)
        if type(part).__name__ in _REBUILT:
            _REBUILT[type(part).__name__].rebuild(part)


class LazyBufferModule(nn.Module):
    """Base of modules whose buffers begin empty and get their size with the first call.

    ``load_state_dict`` gives a buffer that is still empty the checkpoint's size and precision.

    Example:
        >>> class Last(LazyBufferModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("losses", torch.empty(0))
        >>> fresh = Last()
        >>> fresh.load_state_dict({"losses": torch.tensor([1.0, 2.0])})
        <All keys matched successfully>
        >>> fresh.losses
        tensor([1., 2.])
    """

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and buffer is not None and buffer.numel() == 0:
                self._buffers[name] = torch.empty_like(saved, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _device_for(part: nn.Module, device: torch.device | None) -> torch.device | None:
    return None if type(part).__name__ in _ON_CPU else device


def _attributes_of(part: nn.Module) -> dict[str, Any]:
    rebuilt = _REBUILT[type(part).__name__].attributes if type(part).__name__ in _REBUILT else frozenset()
    return {
        name: value
        for name, value in vars(part).items()
        if name not in _OF_EVERY_MODULE and name not in rebuilt and not isinstance(value, _FUNCTIONS)
    }


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _copy_of(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone().requires_grad_(value.requires_grad and value.is_leaf)


def _same_names(what: str, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    missing, unknown = sorted(set(saved) - set(present)), sorted(set(present) - set(saved))
    if missing or unknown:
        raise ValueError(
            f"{what}: the state has {missing or 'nothing'} that this one lacks, and lacks {unknown or 'nothing'} that this "
            f"one has. Build it with the same arguments and the same version of its library, and restore it before it is used."
        )


def _restore_tensors(part: nn.Module, saved: Mapping[str, Any], where: str, device: torch.device | None) -> None:
    _same_names(f"{where}: parameters", saved["parameters"], part._parameters)
    _same_names(f"{where}: buffers", saved["buffers"], part._buffers)
    for name, value in saved["parameters"].items():
        parameter = part._parameters[name]
        if value is None or parameter is None:
            made = None if value is None else nn.Parameter(_moved(value, device), requires_grad=value.requires_grad)
            part._parameters[name] = made
            continue
        _check_shape(f"{where}.{name}", value, parameter)
        with torch.no_grad():
            parameter.copy_(value)
    for name, value in saved["buffers"].items():
        part._buffers[name] = None if value is None else _like(part._buffers[name], value, f"{where}.{name}", device)


def _check_shape(where: str, value: Tensor, present: Tensor) -> None:
    if value.shape != present.shape:
        raise ValueError(
            f"{where}: should be of shape {tuple(value.shape)} as in the state; it is of shape {tuple(present.shape)}. "
            f"Build it with the same arguments and as many tasks, and restore it before it is used."
        )


def _moved(value: Tensor, device: torch.device | None) -> Tensor:
    return value.detach().to(device=device, copy=True)


def _like(present: Any, value: Tensor, where: str, device: torch.device | None) -> Tensor:
    """Return a copy of the state's tensor, with its precision, where the tensor is that it takes the place of."""
    if isinstance(present, Tensor):
        if present.numel() > 0:
            _check_shape(where, value, present)
        device = present.device
    return _moved(value, device).requires_grad_(value.requires_grad)


def _warn_of_other_options(part: nn.Module, saved: Mapping[str, Any], where: str) -> None:
    # An option is known by its name: that of an argument of the class, with or without an underscore.
    for argument in inspect.signature(type(part).__init__).parameters:
        for name in (argument, f"_{argument}"):
            old, new = saved.get(name), vars(part).get(name)
            if isinstance(old, _PLAIN) and isinstance(new, _PLAIN) and name in saved and old != new:
                warnings.warn(
                    f"{where}: {argument} is {old!r} in the state and {new!r} here; the state's is taken. "
                    f"To change it, set it after the state is restored.",
                    UserWarning,
                    stacklevel=3,
                )


def _content_of(value: Any) -> dict[str, Any] | None:
    """Return the attributes of a Python object that has nothing besides them."""
    try:
        reduced = value.__reduce_ex__(2)
    except Exception:  # whatever it raises, it says that it cannot be copied
        return None
    if isinstance(reduced, str) or isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        return None
    maker, arguments, content, *items = reduced + (None,) * (5 - len(reduced))
    is_plain = maker is getattr(copyreg, "__newobj__") and arguments == (type(value),) and not any(items)  # noqa: B009
    # A state of its own, from __getstate__, is not what its attributes are.
    if (
        not is_plain
        or not (content is None or isinstance(content, dict))
        or (content or {}).keys() != vars(value).keys()
    ):
        return None
    return dict(vars(value))


class _Encoder(NamedTuple):
    """Plain values stay what they are; the others become ``{"kind": …}``."""

    owner: str
    names: Mapping[int, str]
    """Of the module's parameters and buffers, by identity."""
    inside: tuple[int, ...] = ()
    """The objects that are being encoded, against circles."""

    def encode(self, value: Any, where: str) -> Any:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, Tensor):
            return {"kind": "own", "name": self.names[id(value)]} if id(value) in self.names else _copy_of(value)
        if id(value) in self.inside:
            raise TypeError(
                f"{self.owner}: the attribute '{where}' contains itself, so that its state cannot be saved."
            )
        self = self._replace(inside=(*self.inside, id(value)))
        if type(value) in (list, tuple, set, frozenset, deque, torch.Size):
            kept = {"maxlen": value.maxlen} if isinstance(value, deque) else {}
            return {
                "kind": type(value).__name__,
                "items": [self.encode(item, f"{where}[{index}]") for index, item in enumerate(value)],
                **kept,
            }
        if type(value) is dict:
            items = [[self.encode(key, where), self.encode(item, f"{where}[{key!r}]")] for key, item in value.items()]
            return {"kind": "dict", "items": items}
        if isinstance(value, torch.dtype):
            return {"kind": "dtype", "name": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"kind": "device", "name": str(value)}
        if isinstance(value, torch.Generator):
            return {"kind": "generator", "device": str(value.device), "state": value.get_state()}
        if type(value) is np.ndarray or isinstance(value, np.generic):
            return self._of_array(value, where)
        if isinstance(value, torch.optim.Optimizer):
            return self._of_optimizer(value, where)
        content = _content_of(value)
        if content is None:
            raise self._error(value, where)
        return {
            "kind": "object",
            "class": type(value).__qualname__,
            "attributes": {
                name: self.encode(item, f"{where}.{name}")
                for name, item in content.items()
                if not isinstance(item, _FUNCTIONS)
            },
        }

    def _error(self, value: Any, where: str) -> TypeError:
        return TypeError(
            f"{self.owner}: the attribute '{where}' is a {type(value).__module__}.{type(value).__qualname__}, whose content "
            f"cannot be saved. Keep what it remembers in tensors, numbers, lists or dicts, or register it as a submodule."
        )

    def _of_array(self, value: Any, where: str) -> dict[str, Any]:
        try:
            content = torch.from_numpy(np.array(value))  # a copy
        except TypeError as reason:
            raise self._error(value, where) from reason
        return {"kind": "array" if isinstance(value, np.ndarray) else "number", "content": content}

    def _of_optimizer(self, optimizer: torch.optim.Optimizer, where: str) -> dict[str, Any]:
        groups = [[self.names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
        if any(name is None for group in groups for name in group):
            raise TypeError(
                f"{self.owner}: the optimizer '{where}' has parameters that are not the module's, so that they cannot be found "
                f"again. Make them nn.Parameters of it."
            )
        return {
            "kind": "optimizer",
            "class": type(optimizer).__qualname__,
            "defaults": self.encode(dict(optimizer.defaults), where),
            "parameters": groups,
            "state": copy.deepcopy(optimizer.state_dict()),
        }


class _Decoder(NamedTuple):
    """The reverse of `_Encoder`; what can only be filled, such as an object, is filled in place."""

    tensors: Mapping[str, Tensor]
    device: torch.device | None

    def restore_into(self, holder: Any, present: Mapping[str, Any], saved: Mapping[str, Any], where: str) -> None:
        unknown = sorted(set(present) - set(saved))
        if unknown:  # the reverse is in order: what a call makes, a fresh object does not have
            _same_names(f"{where}: attributes", {}, dict.fromkeys(unknown))
        holder.__dict__.update({n: self.decode(value, present.get(n), f"{where}.{n}") for n, value in saved.items()})

    def decode(self, saved: Any, present: Any, where: str) -> Any:
        if isinstance(saved, Tensor):
            return _like(present, saved, where, self.device)
        if not isinstance(saved, dict):
            return saved
        kind = saved["kind"]
        if kind in _CONTAINERS:
            # By its place, so that an object in a list is found again.
            old = (
                list(present)
                if isinstance(present, (list, tuple, deque)) and len(present) == len(saved["items"])
                else ()
            )
            items = [
                self.decode(item, old[index] if index < len(old) else None, f"{where}[{index}]")
                for index, item in enumerate(saved["items"])
            ]
            return deque(items, saved["maxlen"]) if kind == "deque" else _CONTAINERS[kind](items)
        if kind == "dict":
            known = present if isinstance(present, dict) else {}
            keys = [self.decode(key, None, where) for key, _ in saved["items"]]
            values = [item for _, item in saved["items"]]
            return {k: self.decode(v, known.get(k), f"{where}[{k!r}]") for k, v in zip(keys, values, strict=True)}
        return getattr(self, f"_{kind}")(saved, present, where)

    def _own(self, saved: Mapping[str, Any], present: Any, where: str) -> Tensor:
        return self.tensors[saved["name"]]

    def _dtype(self, saved: Mapping[str, Any], present: Any, where: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, saved["name"])
        return dtype

    def _device(self, saved: Mapping[str, Any], present: Any, where: str) -> torch.device:
        return self.device or torch.device(saved["name"])

    def _generator(self, saved: Mapping[str, Any], present: Any, where: str) -> torch.Generator:
        generator = present if isinstance(present, torch.Generator) else torch.Generator(saved["device"])
        generator.set_state(saved["state"].cpu().clone())
        return generator

    def _array(self, saved: Mapping[str, Any], present: Any, where: str) -> Any:
        return saved["content"].cpu().numpy().copy()

    def _number(self, saved: Mapping[str, Any], present: Any, where: str) -> Any:
        return saved["content"].cpu().numpy()[()]

    def _optimizer(self, saved: Mapping[str, Any], present: Any, where: str) -> torch.optim.Optimizer:
        optimizer = present if isinstance(present, torch.optim.Optimizer) else self._made_optimizer(saved, where)
        if type(optimizer).__qualname__ != saved["class"]:
            raise ValueError(f"{where}: is a {type(optimizer).__qualname__}, in the state a {saved['class']}.")
        asked = [[id(self.tensors[name]) for name in group] for group in saved["parameters"]]
        if asked != [[id(p) for p in group["params"]] for group in optimizer.param_groups]:
            raise ValueError(
                f"{where}: the optimizer should be of the parameters {saved['parameters']}; it is of others."
            )
        optimizer.load_state_dict(copy.deepcopy(saved["state"]))  # it would go on to change the state's own tensors
        return optimizer

    def _made_optimizer(self, saved: Mapping[str, Any], where: str) -> torch.optim.Optimizer:
        """Make what the fresh object would make only in its first call."""
        factory = getattr(torch.optim, saved["class"], None)
        if factory is None:
            raise ValueError(
                f"{where}: a {saved['class']} is not one of torch's optimizers, and this object has not made it yet. "
                f"Make it when the object is made."
            )
        groups = [{"params": [self.tensors[name] for name in group]} for group in saved["parameters"]]
        defaults = self.decode(saved["defaults"], None, where)
        known = inspect.signature(factory).parameters  # AdamW's defaults have what only Adam takes
        made: torch.optim.Optimizer = factory(groups, **{k: v for k, v in defaults.items() if k in known})
        return made

    def _object(self, saved: Mapping[str, Any], present: Any, where: str) -> Any:
        if type(present).__qualname__ != saved["class"]:
            raise ValueError(
                f"{where}: should be a {saved['class']} as in the state; it is a {type(present).__qualname__}. "
                f"Build it with the same arguments."
            )
        there = {name: value for name, value in vars(present).items() if not isinstance(value, _FUNCTIONS)}
        self.restore_into(present, there, saved["attributes"], where)
        return present


_CONTAINERS: Mapping[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "Size": torch.Size,
}
