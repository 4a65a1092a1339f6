"""Finds the layers that a user names, with suggestions for names that do not exist."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_gradnorm._messages import did_you_mean


def find_module(root: nn.Module, name: str, *, caller: str) -> nn.Module:
    """Return the submodule ``name`` of ``root``.

    Args:
        root: the model.
        name: dotted name, for example ``"encoder.4"``.
        caller: what the name was given as, the beginning of the error: ``"GradNorm: heads['seg']"``.

    Raises:
        ValueError: there is no such module; says which there are.
    """
    modules = _modules(root)
    if plain_name(name) not in modules:
        raise ValueError(f"{caller} '{name}' is not in {type(root).__name__}; {did_you_mean(name, modules)}")
    return modules[plain_name(name)]


def path_to(root: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Return the modules on the path from ``root`` (named "") to the module or parameter ``name``, itself excluded."""
    parts = name.split(".")
    names = [".".join(parts[:depth]) for depth in range(len(parts))]
    return [(name, root.get_submodule(name)) for name in names]


def plain_name(name: str) -> str:
    """Return the name of a module or parameter without the parts that `torch.compile` inserts."""
    return name.replace("._orig_mod", "").removeprefix("_orig_mod.")


def _modules(root: nn.Module) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        modules.setdefault(plain_name(name), module)  # the compiled module comes before what it wraps
    modules.pop("")
    return modules


def find_shared_layer(root: nn.Module, name: str | None, *, caller: str) -> dict[str, nn.Parameter]:
    """Return the parameters ``W`` by name.

    Args:
        root: the model.
        name: dotted name of a module (its ``weight``; all its parameters if it has none) or of a parameter. ``None``
            stands for the last module with a weight of two or more dimensions inside ``root.encoder``.
        caller: the beginning of the error, ``"GradNorm"``.

    Raises:
        ValueError: no such layer, or it has nothing to train.
    """
    if name is None:
        name = _last_layer_of_encoder(root, caller=caller)
    name, modules = plain_name(name), _modules(root)
    parameters = {plain_name(n): p for n, p in root.named_parameters(remove_duplicate=False)}
    if name in parameters:
        found = {name: parameters[name]}
    elif name and name in modules:
        # A parametrized weight (weight norm, say) is computed from parameters of its own. The older
        # torch.nn.utils.weight_norm and spectral_norm put these beside the bias.
        inside = {n: p for n, p in parameters.items() if n.startswith(f"{name}.")}
        parametrized = {n: p for n, p in inside.items() if n.startswith(f"{name}.parametrizations.weight.")}
        weight = {n: p for n, p in inside.items() if n == f"{name}.weight"}
        older = {
            n: p for n, p in inside.items() if n.removeprefix(f"{name}.") in ("weight_g", "weight_v", "weight_orig")
        }
        found = weight or parametrized or older or inside
        if not found:
            raise ValueError(
                f"{caller}: shared_layer '{name}' of {type(root).__name__} is a {type(modules[name]).__name__}, which has no "
                f"parameters. Name the last layer with parameters that all tasks share: {_with_weights(modules)}."
            )
    else:
        raise ValueError(
            f"{caller}: shared_layer '{name}' is not in {type(root).__name__}; "
            f"{did_you_mean(name, [*modules, *parameters])}"
        )
    frozen = [n for n, p in found.items() if not p.requires_grad]
    if frozen:
        raise ValueError(
            f"{caller}: shared_layer '{name}' is frozen ({', '.join(frozen)} should have requires_grad=True; got "
            f"False). Name the last shared layer that is trained."
        )
    return found


def _with_weights(modules: dict[str, nn.Module]) -> str:
    found = [name for name, module in modules.items() if any(True for _ in module.parameters(recurse=False))]
    return ", ".join(f"'{name}'" for name in found[:20]) + (", …" if len(found) > 20 else "") or "there is none"


def _last_layer_of_encoder(root: nn.Module, *, caller: str) -> str:
    encoder = getattr(root, "encoder", None)
    how = "Name the last layer that all tasks share, for example shared_layer='encoder.layer4'"
    if not isinstance(encoder, nn.Module):
        raise ValueError(
            f"{caller}: shared_layer=None looks inside 'encoder', which {type(root).__name__} lacks. {how}."
        )
    # By the parameters: accessing the weight of a parametrized module would compute it (and change spectral norm's state).
    # The weights of recurrent layers have longer names, such as weight_ih_l0.
    layers: list[str] = [
        name
        for name, module in encoder.named_modules(prefix="encoder")
        if any(n.startswith("weight") and p.ndim >= 2 for n, p in module.named_parameters(recurse=False))
        or (is_parametrized(module, "weight") and any(p.ndim >= 2 for p in module.parametrizations.weight.parameters()))
    ]
    if not layers:
        raise ValueError(
            f"{caller}: shared_layer=None found no module with a weight of two or more dimensions in "
            f"{type(root).__name__}.encoder. {how}."
        )
    return layers[-1]


def find_parameters(
    root: nn.Module, name: str, *, caller: str, keywords: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Return all parameters of the module ``name``, or the one parameter of that name; frozen ones too.

    Args:
        root: the LightningModule.
        name: dotted name of a module or of a parameter.
        caller: what the name was given as, the beginning of the error.
        keywords: what may be given instead of a name.

    Raises:
        ValueError: there is neither, or the module has no parameters.
    """
    name, modules = plain_name(name), _modules(root)
    parameters = {plain_name(n): p for n, p in root.named_parameters(remove_duplicate=False)}
    if name in parameters:
        return {name: parameters[name]}
    if name not in modules:
        known = did_you_mean(name, [*keywords, *modules, *parameters])
        raise ValueError(f"{caller} '{name}' is not in {type(root).__name__}; {known}")
    # By identity: a tied parameter has several names, and is listed under the first of them.
    inside = {id(parameter) for parameter in modules[name].parameters()}
    found = {plain_name(n): p for n, p in root.named_parameters() if id(p) in inside}
    if not found:
        raise ValueError(
            f"{caller} '{name}' of {type(root).__name__} is a {type(modules[name]).__name__}, which has no parameters. Name a "
            f"layer that has: {_with_weights(modules)}."
        )
    return found
