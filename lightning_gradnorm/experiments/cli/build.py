"""Builds objects from a configuration, and checks each node against the constructor that it names."""

from __future__ import annotations

import inspect
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from lightning_gradnorm._messages import did_you_mean, nearest

_HYDRAS_OWN = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def build(config: DictConfig, group: str, **given: Any) -> Any:
    """Return the object that the node ``group`` describes, or ``None`` if it names no ``_target_``.

    Missing values (``???``) get the constructor's defaults. Nested nodes become objects first.

    Args:
        config: the whole configuration, which resolves interpolations.
        group: name of the node, for example ``"balancing"`` or ``"callbacks.checkpoint"``.
        given: more arguments for the constructor.

    Raises:
        ValueError: the constructor does not have a key, or requires one that is missing.

    Example:
        >>> config = OmegaConf.create({"head": {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}})
        >>> build(config, "head")
        Linear(in_features=3, out_features=2, bias=True)
        >>> build(OmegaConf.create({"head": {"_target_": "torch.nn.Linear", "in_feature": 3}}), "head")
        Traceback (most recent call last):
        ValueError: head: torch.nn.Linear has no parameter 'in_feature'; did you mean 'in_features'? It has in_features, ...
    """
    node = OmegaConf.select(config, group)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return None
    plain = _checked(OmegaConf.to_container(node, resolve=True), where=group, given=set(given))
    # "all" passes plain dicts and lists, which a checkpoint can hold, instead of OmegaConf's.
    return instantiate(plain, **given, _convert_="all")


def build_model(config: DictConfig) -> Any:
    """Return the model with the tasks in ``config.tasks``, or with all tasks if that is null or absent.

    Raises:
        ValueError: the model does not have a task, or does not let you choose tasks.
    """
    tasks = config.get("tasks")
    if tasks is None:
        return build(config, "model")
    if not isinstance(tasks, ListConfig):
        raise ValueError(f"tasks should be null or a list of names, such as [depth]; got {tasks!r}")
    target = OmegaConf.select(config, "model._target_")
    if "only" not in inspect.signature(get_object(target)).parameters:
        raise ValueError(
            f"tasks selects tasks of a MultiTaskModule; the model is {target}, which has no parameter 'only'. "
            f"Use tasks=null."
        )
    return build(config, "model", only=list(tasks))


def _checked(node: Any, *, where: str, given: set[str]) -> Any:
    """Return the node without missing values, after checking it against the signature of each ``_target_``."""
    if isinstance(node, list):
        return [_checked(item, where=f"{where}[{i}]", given=set()) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    present = {key: value for key, value in node.items() if value != MISSING}
    if "_target_" in present:
        _check_arguments(present, where=where, given=given)
    return {key: _checked(value, where=f"{where}.{key}", given=set()) for key, value in present.items()}


def _check_arguments(node: dict[str, Any], *, where: str, given: set[str]) -> None:
    target = node["_target_"]
    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    except ValueError:  # written in C, without a signature
        return
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in node:
        if not (key in by_name or key in _HYDRAS_OWN or is_open):
            all_of_them = f" It has {', '.join(by_name)}." if nearest(key, by_name) else ""
            raise ValueError(f"{where}: {target} has no parameter '{key}'; {did_you_mean(key, by_name)}{all_of_them}")
    if node.get("_partial_") or "_args_" in node:
        return
    for name, parameter in by_name.items():
        if parameter.default is parameter.empty and name not in node and name not in given:
            raise ValueError(f"{where}.{name} should be set: {target} has no default for it. Add {where}.{name}=…")
