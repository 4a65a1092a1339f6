"""One sentence for what was asked wrongly, instead of a traceback through Hydra."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from torch.multiprocessing.spawn import ProcessRaisedException
from yaml import YAMLError  # type: ignore[import-untyped]

from lightning_gradnorm._messages import nearest
from lightning_gradnorm.strategies.factory import missing_solver

WRONG_INPUT = (
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    MisconfigurationException,
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    ModuleNotFoundError,
)
"""What a wrong option, file or installation leads to. Any other exception is a defect and keeps its traceback."""

_VARIABLE = "HYDRA_FULL_ERROR"

PLUGINS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    **dict.fromkeys(("optuna", "tpe", "random", "cmaes", "nsgaii", "motpe", "grid"), "hydra-optuna-sweeper"),
}
"""Options of ``hydra/launcher`` and ``hydra/sweeper`` that Hydra has only with another package."""


def wants_traceback() -> bool:
    """Say whether the user asked for tracebacks, as Hydra lets them."""
    return os.environ.get(_VARIABLE) == "1"


@contextmanager
def hydra_raises(*, really: bool = True) -> Iterator[None]:
    """Have Hydra raise its errors instead of printing them and leaving; ``really=False`` inside takes that back."""
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
    """Have what is wrong in a process that was started for training be raised here, as if it had been trained here.

    Raises:
        ValueError: what was asked wrongly, in the process's words.
    """
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
        if kind.rpartition(".")[2] not in {known.__name__ for known in WRONG_INPUT}:
            raise
        raise ValueError("\n".join([message, *lines[ends[0] + 1 :]])) from error


def leave(command: str, error: BaseException) -> None:
    """Print what is wrong, and exit with status 1.

    Raises:
        SystemExit: always.
    """
    sys.stderr.write(f"{command}: {explain(error)}\n({_VARIABLE}=1 {command} … shows the traceback.)\n")
    sys.exit(1)


def explain(error: BaseException) -> str:
    r"""Return one message: what was asked, what exists there, what was probably meant.

    Example:
        >>> explain(MissingConfigException("…", missing_cfg_file="balancing/gradnrom", options=["equal", "gradnorm"]))
        "there is no balancing 'gradnrom'; did you mean 'gradnorm'?\n  balancing has: equal, gradnorm"
    """
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return explain(error.__cause__)
    if (missing := missing_solver(error)) is not None:
        return missing
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return _no_such_option(error)
    if isinstance(error, OverrideParseException):
        return (
            f"'{error.override}' cannot be read: {error.message.splitlines()[0]}. Quote values with brackets or spaces."
        )
    of_config = _in_chain(error)
    cause: BaseException | None = of_config
    while isinstance(cause, InterpolationResolutionError):
        cause = cause.__context__
    if cause is not of_config and isinstance(cause, WRONG_INPUT) and not isinstance(cause, OmegaConfBaseException):
        return explain(cause)  # what a resolver found wrong, in its own words
    if isinstance(of_config, (ConfigAttributeError, ConfigKeyError)) and isinstance(of_config.parent_node, DictConfig):
        return _where(error) + _no_such_key(of_config)
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
    """Return Hydra's name of the file that the error is in, if it is in a file."""
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
            f"{group}={option} needs {PLUGINS[option]}, which is not installed here. Install it: "
            f"pip install 'lightning-gradnorm[sweeps]'"
        )
    if not group:
        return f"there is no configuration '{option}'"
    follows = "\n  The model follows the data: give model=… too." if group == "model" else ""
    return f"there is no {group} '{option}'{_guess(option, options)}\n  {group} has: {', '.join(options)}{follows}"


def _no_such_key(error: OmegaConfBaseException) -> str:
    keys = [str(key) for key in error.parent_node if not str(key).startswith("_")]
    full_key = str(error.full_key or error.key)
    place = full_key.rpartition(".")[0] or "the configuration"
    return f"there is no '{full_key}'{_guess(str(error.key), keys)}\n  {place} has: {', '.join(keys) or 'nothing'}"


def _guess(name: str, existing: list[str]) -> str:
    near = nearest(name, existing)
    return f"; did you mean '{near}'?" if near else ""
