"""A model's architecture inside its checkpoint: the modules without their weights, as bytes.

A Lightning checkpoint holds weights and plain hyperparameters, which is not enough to rebuild a model composed of modules. So
we also pickle the modules, without their weights. They are read back by torch's restricted unpickler, which builds only what
is on a list: modules, losses, metrics and optimizers of torch, torchmetrics and this package. A file of unknown origin cannot
run code of its own.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

KEY = "lightning_gradnorm_architecture"
_KINDS = (nn.Module, Metric, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


def pack(parts: Mapping[str, Any]) -> Tensor | str:
    """Return the parts (modules, losses, optimizer factories) as a tensor of bytes, or the reason why this failed.

    Example:
        >>> packed = pack({"encoder": nn.Linear(1000, 1000)})
        >>> packed.dtype, len(packed) < 10_000
        (torch.uint8, True)
        >>> unpack(packed)["encoder"]
        Linear(in_features=1000, out_features=1000, bias=True)
    """
    memo = {id(tensor): _hollow(tensor) for tensor in _tensors_in(parts)}
    buffer = io.BytesIO()
    try:
        torch.save(copy.deepcopy(dict(parts), memo), buffer)
    except Exception as reason:  # a user's class may raise anything when copied or pickled
        return f"{type(reason).__name__}: {reason}"
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpack(packed: Tensor | str, *, trusted: bool = False) -> dict[str, Any]:
    """Return the parts passed to `pack`; their weights are zeros, to be loaded.

    Args:
        packed: what `pack` returned.
        trusted: build classes of any package.

    Raises:
        ValueError: the parts could not be packed, or contain classes of other packages.
    """
    if isinstance(packed, str):
        raise ValueError(f"its modules could not be pickled ({packed})")
    content = packed.numpy().tobytes()
    if trusted:
        parts = torch.load(io.BytesIO(content), weights_only=False, map_location="cpu")
    else:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
        found = {name: _known(name) for name in names}
        if unknown := [name for name, known in found.items() if known is None]:
            raise ValueError(f"it contains {', '.join(unknown)}")
        with torch.serialization.safe_globals([(known, name) for name, known in found.items()]):
            parts = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    for tensor in _tensors_in(parts):
        tensor.data = tensor.data.contiguous()
    return dict(parts)


def _tensors_in(parts: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors in the state dicts of all modules among the parts."""
    for part in parts.values():
        for value in part.values() if isinstance(part, Mapping) else [part]:
            if isinstance(value, nn.Module):
                yield from (one for one in value.state_dict(keep_vars=True).values() if isinstance(one, Tensor))


def _hollow(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape that takes the memory of one number."""
    data = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _known(name: str) -> Any:
    """Return the class or function with that dotted name if building it is allowed; else None."""
    if name == "functools.partial":
        return functools.partial
    module_name, _, attribute = name.rpartition(".")
    if module_name.split(".")[0] not in ("torch", "torchmetrics", "lightning_gradnorm"):
        return None
    found = getattr(importlib.import_module(module_name), attribute, None)
    is_plain = (
        module_name in ("torch.nn.functional", "torchmetrics.metric")
        or module_name.startswith("torchmetrics.utilities.")
        or name == "lightning_gradnorm.multitask.task.adam"  # the default optimizer
    )
    return found if is_plain or (inspect.isclass(found) and issubclass(found, _KINDS)) else None
