"""Finds the layers that you name, and suggests names if they do not exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_gradnorm._messages import did_you_mean
from lightning_gradnorm.gradients.replay import is_sharded

ALL = "all"
"""Names every trained parameter of the network as the shared layer."""


def find_module(root: nn.Module, name: str, *, caller: str) -> nn.Module:
    """Return the submodule ``name`` of ``root``.

    Args:
        root: the model.
        name: dotted name, for example ``"encoder.4"``.
        caller: the argument that held the name, for the beginning of the error: ``"GradNorm: heads['seg']"``.

    Raises:
        ValueError: the module does not exist; lists those that do.
    """
    modules = _modules(root)
    if plain_name(name) not in modules:
        raise ValueError(f"{caller} '{name}' is not in {type(root).__name__}; {did_you_mean(name, modules)}")
    return modules[plain_name(name)]


def path_to(root: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Return the modules on the path from ``root`` (named "") to the module or parameter ``name``, excluding the latter."""
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


def find_shared_layers(root: nn.Module, named: str | Sequence[str], *, caller: str) -> dict[str, nn.Parameter]:
    """Return the parameters ``W`` by name: of one layer, of several, or of the whole network.

    Args:
        root: the model.
        named: as for `find_shared_layer`; several such names; or ``"all"``: everything that is trained now.
        caller: the beginning of the error, ``"GradNorm"``.

    Raises:
        ValueError: no such layer, or the parameters are sharded and no single module call gathers them.
    """
    if isinstance(named, str) and (named != ALL or named in _modules(root) or named in _named_parameters(root)):
        return find_shared_layer(root, named, caller=caller)
    if named == ALL:
        every = {plain_name(n): p for n, p in root.named_parameters()}
        found = {n: p for n, p in every.items() if p.requires_grad} or every
    else:
        found = {n: p for name in named for n, p in find_shared_layer(root, name, caller=caller).items()}
    if sharded := [name for name, module in root.named_modules() if is_sharded(module)]:
        raise ValueError(
            f"{caller}: shared_layer={named!r} takes gradients of several layers of {type(root).__name__}, but this rank holds "
            f"only pieces of them ('{plain_name(sharded[0])}' is sharded). Name one layer, or use DDP."
        )
    return found


def find_shared_layer(root: nn.Module, name: str, *, caller: str) -> dict[str, nn.Parameter]:
    """Return the parameters ``W`` by name. All of them may be frozen for now.

    Args:
        root: the model.
        name: dotted name of a parameter or of a module: its ``weight``, or all its parameters if it has none. A module that
            contains others stands for the last trained weight inside it, or for the last weight of all if none is trained.
        caller: the beginning of the error, ``"GradNorm"``.

    Raises:
        ValueError: the layer does not exist, has no parameters, or some of them are frozen.
    """
    name, modules = plain_name(name), _modules(root)
    parameters = _named_parameters(root)
    if name not in parameters and name not in modules:
        hint = did_you_mean(name, [*modules, *parameters])
        if name in ("*", "network", "parameters", "model"):
            hint = "for all trained parameters give 'all'"
        if name in ("auto", "None", "none"):
            hint = "leave it out (shared_layer=None), and the layer is found"
        raise ValueError(f"{caller}: shared_layer '{name}' is not in {type(root).__name__}; {hint}")
    found = layer_parameters(root, name) or _last_weight_inside(root, name)
    if not found:
        raise ValueError(
            f"{caller}: shared_layer '{name}' of {type(root).__name__} is a {type(modules[name]).__name__}, which has no "
            f"parameters. Name the last layer with parameters that all tasks share: {_with_weights(modules)}."
        )
    frozen = [n for n, p in found.items() if not p.requires_grad]
    if frozen and len(frozen) < len(found):
        trained = [n for n, p in parameters.items() if p.requires_grad and p.ndim >= 2]
        raise ValueError(
            f"{caller}: shared_layer '{name}' is frozen in part ({_shortened(frozen)} should have requires_grad=True; got "
            f"False). Name one that is trained ({_shortened(trained)}), or leave shared_layer out: then it is found."
        )
    return found


def layer_parameters(root: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters that make up one layer, by name; empty if ``name`` is a module that only contains others.

    Args:
        root: the model.
        name: of a parameter; or of a module, which stands for its ``weight``, or all its own parameters if it has none.
    """
    parameters = _named_parameters(root)
    if name in parameters:
        return {name: parameters[name]}
    # A parametrized weight (weight norm, for example) is computed from other parameters. The older
    # torch.nn.utils.weight_norm and spectral_norm put these beside the bias.
    inside = {n: p for n, p in parameters.items() if n.startswith(f"{name}.")}
    parametrized = {n: p for n, p in inside.items() if n.startswith(f"{name}.parametrizations.weight.")}
    weight = {n: p for n, p in inside.items() if n == f"{name}.weight"}
    older = {n: p for n, p in inside.items() if n.removeprefix(f"{name}.") in _OLDER_NAMES}
    is_container = any(True for _ in _modules(root)[name].children())
    return weight or parametrized or older or ({} if is_container else inside)


_OLDER_NAMES = ("weight_g", "weight_v", "weight_orig")


def trained_layers(root: nn.Module, *, frozen: bool = False) -> dict[str, dict[str, nn.Parameter]]:
    """Return all trained parameters, layer by layer: layer → name → parameter; or all ``frozen`` ones.

    A layer has the name that `layer_parameters` accepts: the module's, if the parameter is its weight or one of several that
    make it up, as in an LSTM; else the parameter's.
    """
    modules = _modules(root)
    layers: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in root.named_parameters():
        if parameter.requires_grad != frozen:
            name = plain_name(name)
            layers.setdefault(_layer_of(name, modules), {})[name] = parameter
    return layers


def _layer_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    module, _, own = name.rpartition(".")
    owner, is_inside, parametrized = module.partition(".parametrizations.")
    if is_inside:
        return owner if parametrized == "weight" else name
    if not module or own in ("weight", *_OLDER_NAMES):
        return module or name
    holder = modules[module]
    has_weight = any(n in ("weight", *_OLDER_NAMES) for n, _ in holder.named_parameters(recurse=False))
    is_list = isinstance(holder, nn.ParameterList | nn.ParameterDict)
    return name if has_weight or is_list or any(True for _ in holder.children()) else module


def _last_weight_inside(root: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the last layer inside a module with a trained weight of two or more dimensions.

    If none is trained, return the last of the frozen ones; without these, all parameters inside.
    """
    inside = {n: p for n, p in _named_parameters(root).items() if n.startswith(f"{name}.")}
    for layers in (trained_layers(root), trained_layers(root, frozen=True)):
        for layer in reversed(layers.values()):
            if inside.keys() & layer.keys() and any(p.ndim >= 2 for p in layer.values()):
                return layer
    return inside


def encoder_layer(root: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the last trained layer inside ``root.encoder``; empty if that module does not exist."""
    encoder = getattr(root, "encoder", None)
    found = _last_weight_inside(root, "encoder") if isinstance(encoder, nn.Module) else {}
    return found if all(parameter.requires_grad for parameter in found.values()) else {}


def _named_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(n): p for n, p in root.named_parameters(remove_duplicate=False)}


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _with_weights(modules: dict[str, nn.Module]) -> str:
    found = [name for name, module in modules.items() if any(True for _ in module.parameters(recurse=False))]
    return ", ".join(f"'{name}'" for name in found[:20]) + (", …" if len(found) > 20 else "") or "it has none"


def find_parameters(root: nn.Module, name: str, *, caller: str) -> dict[str, nn.Parameter]:
    """Return all parameters of the module ``name``, or the one parameter of that name, including frozen ones.

    Args:
        root: the LightningModule.
        name: dotted name of a module or of a parameter; ``"all"`` for every parameter. The error for another name also
            suggests ``"shared"``, which the monitor resolves itself.
        caller: the argument that held the name, for the beginning of the error.

    Raises:
        ValueError: neither exists, or the module has no parameters.
    """
    name, modules = plain_name(name), _modules(root)
    parameters = {plain_name(n): p for n, p in root.named_parameters(remove_duplicate=False)}
    if name in parameters:
        return {name: parameters[name]}
    if name == ALL and name not in modules:
        return {plain_name(n): p for n, p in root.named_parameters()}
    if name not in modules:
        known = did_you_mean(name, ["shared", ALL, *modules, *parameters])
        raise ValueError(f"{caller} '{name}' is not in {type(root).__name__}; {known}")
    # By identity: a tied parameter has several names, and is listed under the first.
    inside = {id(parameter) for parameter in modules[name].parameters()}
    found = {plain_name(n): p for n, p in root.named_parameters() if id(p) in inside}
    if not found:
        raise ValueError(
            f"{caller} '{name}' of {type(root).__name__} is a {type(modules[name]).__name__}, which has no parameters. Name a "
            f"layer that has: {_with_weights(modules)}."
        )
    return found
