"""Explains user errors in one sentence instead of a traceback through Hydra."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError  # type: ignore[import-untyped]

from lightning_gradnorm._messages import nearest
from lightning_gradnorm.experiments.cli import signatures

_WRONG_INPUT = (
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    ModuleNotFoundError,
)


def wrong_input() -> tuple[type[Exception], ...]:
    """Return the exceptions that a wrong option, file or installation raises. Any other is a bug and keeps its traceback."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # if not imported, it cannot have raised
    return _WRONG_INPUT if lightning is None else (*_WRONG_INPUT, lightning.MisconfigurationException)


_VARIABLE = "HYDRA_FULL_ERROR"

PLUGINS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    **dict.fromkeys(("optuna", "tpe", "random", "cmaes", "nsgaii", "motpe", "grid"), "hydra-optuna-sweeper"),
}
"""Options of ``hydra/launcher`` and ``hydra/sweeper`` that need another package."""


def wants_traceback() -> bool:
    """Return True if Hydra's environment variable asks for tracebacks."""
    return os.environ.get(_VARIABLE) == "1"


@contextmanager
def hydra_raises(*, really: bool = True) -> Iterator[None]:
    """Make Hydra raise its errors instead of printing them and exiting. ``really=False`` undoes this inside."""
    before = os.environ.pop(_VARIABLE, None)
    if really:
        os.environ[_VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
        if before is not None:
            os.environ[_VARIABLE] = before


@contextmanager
def of_processes() -> Iterator[None]:
    """Raise user errors of a training process here, as if this process had trained.

    Raises:
        ValueError: the process ended with a user error; contains its message.
    """
    from torch.multiprocessing.spawn import ProcessRaisedException

    try:
        yield
    except ProcessRaisedException as error:
        lines = str(error).splitlines()
        frames = [place for place, line in enumerate(lines) if line.startswith('  File "')]
        ends = [
            place for place in range(frames[-1] if frames else 0, len(lines)) if re.match(r"[\w.]+: ", lines[place])
        ]
        if not ends:
            raise
        kind, message = lines[ends[0]].split(": ", 1)
        if kind.rpartition(".")[2] not in {known.__name__ for known in wrong_input()}:
            raise
        raise ValueError("\n".join([message, *lines[ends[0] + 1 :]])) from error


def leave(command: str, error: BaseException) -> None:
    """Print the error and exit with status 1.

    Raises:
        SystemExit: always.
    """
    sys.stderr.write(f"{command}: {explain(error)}\n({_VARIABLE}=1 {command} … shows the traceback.)\n")
    sys.exit(1)


def explain(error: BaseException) -> str:
    r"""Return one message with what you asked for, what exists and the likely fix.

    Example:
        >>> explain(MissingConfigException("…", missing_cfg_file="balancing/gradnrom", options=["equal", "gradnorm"]))
        "there is no balancing 'gradnrom'; did you mean 'gradnorm'?\n  balancing has: equal, gradnorm"
    """
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return explain(error.__cause__)
    if isinstance(error, ImportError):
        from lightning_gradnorm.strategies.factory import missing_solver

        if (missing := missing_solver(error)) is not None:
            return missing
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return _no_such_option(error)
    if isinstance(error, OverrideParseException):
        return (
            f"cannot parse '{error.override}': {error.message.splitlines()[0]}. Quote values with brackets or spaces."
        )
    of_config = _in_chain(error)
    cause: BaseException | None = of_config
    while isinstance(cause, InterpolationResolutionError):
        cause = cause.__context__
    if cause is not of_config and isinstance(cause, wrong_input()) and not isinstance(cause, OmegaConfBaseException):
        return explain(cause)  # a resolver's own message
    if isinstance(of_config, (ConfigAttributeError, ConfigKeyError)) and isinstance(of_config.parent_node, DictConfig):
        asked = re.search(r"use (\+\S.*)", str(error))
        return _where(error) + _no_such_key(of_config, None if asked is None else asked[1])
    if (again := re.search(r"An item is already at '(.*)'", str(error))) is not None:
        return f"'{again[1]}' already exists: set its new value without the +"
    if (monitored := re.search(r"monitor='(.+?)'.* in the returned metrics: \[(.*?)\]", str(error))) is not None:
        logged = [name for name in re.findall(r"'(.+?)'", monitored[2]) if name.startswith("val/")]
        return f"there is no metric '{monitored[1]}' to monitor{_guess(monitored[1], logged)}\n  logged: {', '.join(logged)}"
    if isinstance(of_config, ValidationError):
        message = str(of_config).splitlines()[0]
        key = f"{of_config.full_key}: " if of_config.full_key else ""
        return f"{_where(error)}{key}{message[0].lower()}{message[1:]}"
    if of_config is not None and of_config is not error:
        return f"{str(error).rstrip('.')}: {of_config}"
    return str(error) or type(error).__name__


def _in_chain(error: BaseException) -> OmegaConfBaseException | None:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OmegaConfBaseException):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _where(error: BaseException) -> str:
    """Return Hydra's name for the file with the error, if the error is in a file."""
    head = str(error).split(":", 1)[0]
    if not head.startswith("In '"):
        return ""
    name = head.removeprefix("In ").strip("'")
    return f"{name}.yaml: "


def _no_such_option(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    group = group.lstrip("/")
    options = list(error.options or ())
    if group.split("/")[:2] in (["hydra", "launcher"], ["hydra", "sweeper"]) and option in PLUGINS:
        return (
            f"{group}={option} needs {PLUGINS[option]}, which is not installed. Install it: "
            f"pip install 'lightning-gradnorm[sweeps]'"
        )
    if not group:
        return f"there is no configuration '{option}'"
    follows = "\n  The model defaults to the name of the data: set model=… too." if group == "model" else ""
    return f"there is no {group} '{option}'{_guess(option, options)}\n  {group} has: {', '.join(options)}{follows}"


def _no_such_key(error: OmegaConfBaseException, added: str | None) -> str:
    """Return the message for a key that does not exist, with the likely key.

    Args:
        error: the error from OmegaConf.
        added: the override that would add the key.
    """
    node, name = error.parent_node, str(error.key)
    keys = [str(key) for key in node if not str(key).startswith("_")]
    full_key = str(error.full_key or name)
    place = full_key.rpartition(".")[0] or "the configuration"
    target = str(node.get("_target_", "")) if OmegaConf.get_type(node) is dict else None
    takes = _parameters_of(target) if target else ()
    lines = [f"there is no '{full_key}'"]
    elsewhere = _places(node, full_key)
    near = nearest(name, [*keys, *takes])
    if name in takes:
        lines[0] += f", but {target} accepts it. To add it, put a + before it: {added or f'+{full_key}=…'}"
    elif others := _options_with(full_key):
        lines[0] += f" here; it belongs to {others}"
    elif name in elsewhere or near is None:
        similar = [name] if name in elsewhere else difflib.get_close_matches(name, elsewhere, n=2)
        group = "" if name in elsewhere or "." not in full_key else f"{full_key.partition('.')[0]}."
        found = [key for one in similar for key in elsewhere[one] if key.startswith(group)][:3]
        lines[0] += f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
    else:
        above = full_key.rpartition(".")[0]
        lines[0] += f"; did you mean '{'' if near in keys else '+'}{f'{above}.' if above else ''}{near}'?"
    lines.append(f"{place} has: {', '.join(keys) or 'nothing'}")
    if takes:
        lines.append(
            f"{target} also accepts, each with a + before it: {', '.join(key for key in takes if key not in keys)}"
        )
    elif target is not None and added is not None and len(lines[0]) == len(f"there is no '{full_key}'"):
        lines.append(f"To add a new key to the configuration, put a + before it: {added}")
    return "\n  ".join(lines)


def _options_with(full_key: str) -> str:
    """Return the options of the key's group that have the key, and how to choose one; empty if no option has it."""
    from lightning_gradnorm.experiments.cli.config import conf_dir, keys_of_option

    group, _, key = full_key.partition(".")
    files = sorted((conf_dir() / group).glob("*.yaml")) if key and "." not in key else []
    found = [file.stem for file in files if key in keys_of_option(file)]
    shown = [f"{group}={name}" for name in found[:3]] + ["…"] * (len(found) > 3)
    if len(found) != 1:
        return ", ".join(shown)
    experiment = conf_dir() / "experiment" / f"{found[0]}.yaml"
    is_chosen = experiment.is_file() and f"override /{group}: {found[0]}\n" in experiment.read_text(encoding="utf-8")
    return f"{shown[0]}: add {f'experiment={found[0]} or ' if is_chosen else ''}{shown[0]}"


def _parameters_of(target: str) -> tuple[str, ...]:
    """Return the parameters of a constructor without importing it, or none if its source does not list them."""
    try:
        found = signatures.parameters(signatures.find(target))
    except signatures.UnreadableError:
        return ()
    return tuple(one.name for one in found if one.name not in ("params", "self"))


def _places(node: Any, full_key: str) -> dict[str, list[str]]:
    """Return where each key occurs in the whole configuration: name → dotted names, nearest to ``full_key`` first."""
    whole = OmegaConf.to_container(node._get_root(), resolve=False)
    found: dict[str, list[str]] = {}
    for key in _dotted(whole):
        if not key.startswith("hydra.") and "._" not in key:
            found.setdefault(key.rpartition(".")[2], []).append(key)
    group = full_key.partition(".")[0]
    return {name: sorted(keys, key=lambda key: not key.startswith(f"{group}.")) for name, keys in found.items()}


def _dotted(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{prefix}{key}"
        yield from _dotted(value, f"{prefix}{key}.")


def _guess(name: str, existing: list[str]) -> str:
    near = nearest(name, existing)
    return f"; did you mean '{near}'?" if near else ""
