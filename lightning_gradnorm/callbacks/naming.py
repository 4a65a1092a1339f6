"""Finds the layers that a user names, and says what exists where a name does not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import Tensor, nn


def did_you_mean(name: str, existing: Iterable[str]) -> str:
    """Return the end of an error's sentence: the near match of ``name``, or all that exists.

    Example:
        >>> did_you_mean("encoder.layr4", ["encoder.layer4", "head"])
        "did you mean 'encoder.layer4'?"
        >>> did_you_mean("trunk", ["encoder", "head"])
        "it has 'encoder', 'head'"
    """
    existing = list(existing)
    near = difflib.get_close_matches(name, existing, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    shown = ", ".join(f"'{one}'" for one in existing[:20]) + (", …" if len(existing) > 20 else "")
    return f"it has {shown or 'none'}"


def find_module(root: nn.Module, name: str, *, asked_by: str) -> nn.Module:
    """Return the submodule ``name`` of ``root``.

    Args:
        root: the LightningModule.
        name: dotted name, for example ``"encoder.4"``.
        asked_by: what the name was given as, the beginning of the error: ``"GradNorm: heads['seg']"``.

    Raises:
        ValueError: there is no such module; says which there are.
    """
    modules: dict[str, nn.Module] = dict(root.named_modules(remove_duplicate=False))
    modules.pop("")
    if name not in modules:
        raise ValueError(f"{asked_by} '{name}' is not in {type(root).__name__}; {did_you_mean(name, modules)}")
    return modules[name]


def find_shared_layer(root: nn.Module, name: str | None, *, asked_by: str) -> dict[str, nn.Parameter]:
    """Return the parameters ``W`` by name.

    Args:
        root: the LightningModule.
        name: dotted name of a module (its ``weight``; all its parameters if it has none) or of a parameter. ``None``
            stands for the last module with a weight of two or more dimensions inside ``root.encoder``.
        asked_by: the beginning of the error, ``"GradNorm"``.

    Raises:
        ValueError: no such layer, or it has nothing to train.
    """
    if name is None:
        name = _last_layer_of_encoder(root, asked_by=asked_by)
    modules = dict(root.named_modules(remove_duplicate=False))  # a module held under two names may be named by either
    parameters = dict(root.named_parameters(remove_duplicate=False))
    if name in parameters:
        found = {name: parameters[name]}
    elif name and name in modules:
        # A parametrized weight (weight norm, say) is computed from parameters of its own.
        inside = {n: p for n, p in parameters.items() if n.startswith(f"{name}.")}
        parametrized = {n: p for n, p in inside.items() if n.startswith(f"{name}.parametrizations.weight.")}
        weight = {n: p for n, p in inside.items() if n == f"{name}.weight"}
        found = weight or parametrized or inside
        if not found:
            raise ValueError(
                f"{asked_by}: shared_layer '{name}' of {type(root).__name__} is a {type(modules[name]).__name__}, which has no "
                f"parameters. Name the last layer that all tasks share and that has: {_with_weights(modules)}."
            )
    else:
        modules.pop("")
        raise ValueError(
            f"{asked_by}: shared_layer '{name}' is not in {type(root).__name__}; "
            f"{did_you_mean(name, [*modules, *parameters])}"
        )
    frozen = [n for n, p in found.items() if not p.requires_grad]
    if frozen:
        raise ValueError(
            f"{asked_by}: shared_layer '{name}' is frozen ({', '.join(frozen)} should have requires_grad=True; got "
            f"False). Name the last shared layer that is trained."
        )
    return found


def _with_weights(modules: dict[str, nn.Module]) -> str:
    found = [name for name, module in modules.items() if name and isinstance(getattr(module, "weight", None), Tensor)]
    return ", ".join(f"'{name}'" for name in found[:20]) + (", …" if len(found) > 20 else "") or "there is none"


def _last_layer_of_encoder(root: nn.Module, *, asked_by: str) -> str:
    encoder = getattr(root, "encoder", None)
    how = "Name the last layer that all tasks share, for example shared_layer='encoder.layer4'"
    if not isinstance(encoder, nn.Module):
        raise ValueError(
            f"{asked_by}: shared_layer=None looks inside 'encoder', which {type(root).__name__} lacks. {how}."
        )
    layers: list[str] = [
        name
        for name, module in encoder.named_modules(prefix="encoder")
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim >= 2
    ]
    if not layers:
        raise ValueError(
            f"{asked_by}: shared_layer=None found no module with a weight of two or more dimensions in "
            f"{type(root).__name__}.encoder. {how}."
        )
    return layers[-1]
