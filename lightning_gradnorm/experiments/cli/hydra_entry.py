"""Shared by both commands: runs Hydra with our configurations, and reports errors in one sentence."""

from __future__ import annotations

import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_gradnorm._messages import is_integer
from lightning_gradnorm.experiments.cli import errors, launch
from lightning_gradnorm.experiments.cli.config import register
from lightning_gradnorm.experiments.report.collect import HYDRA


class CommandLine(metaclass=Singleton):
    """The command line as given. Processes in which Hydra's launchers run jobs have a different one.

    It is a Hydra singleton because Hydra passes singletons on to those processes.
    """

    arguments: Sequence[str] | None = None
    sweep: Path | None = None
    """The folder of the sweep, if this is a sweep."""
    interrupted = False
    """Ctrl-C was pressed in this process."""
    created: Sequence[Path] = ()
    """The folders that a single run creates: its own, and those above it, innermost first."""


def arguments() -> list[str]:
    """Return the arguments after the command's name."""
    known = CommandLine.instance().arguments
    return list(sys.argv[1:] if known is None else known)


def run(task: Callable[[DictConfig], Any], *, command: str, folder: Path, config_name: str) -> None:
    """Run ``task`` with the configuration from the command line.

    Args:
        task: function to call with the configuration.
        command: the command's name, for error messages.
        folder: folder with the configurations.
        config_name: name of the main configuration.
    """
    register()
    OmegaConf.register_new_resolver("label", _label, replace=True)
    began = launch.began()
    OmegaConf.register_new_resolver("began", lambda: began, replace=True)

    def job(config: DictConfig) -> Any:
        with errors.hydra_raises(really=errors_are_raw):  # hidden from processes that a strategy starts
            try:
                return task(config)
            except errors.wrong_input() as error:
                _remove_folders_of_single_run()
                if errors_are_raw or is_multirun():  # in a sweep, Hydra reports which run failed
                    raise
                errors.leave(command, error)

    errors_are_raw = errors.wants_traceback()
    main = hydra.main(version_base="1.3", config_path=str(folder), config_name=config_name)(job)
    CommandLine.instance().arguments = sys.argv[1:]
    try:
        if errors_are_raw:
            main()
            return
        with errors.hydra_raises():
            main()
    except errors.wrong_input() as error:
        if errors_are_raw:
            raise
        errors.leave(command, error)
    finally:
        CommandLine.instance().arguments = None


def _remove_folders_of_single_run() -> None:
    """Remove the folder of a single run that failed before training, unless it existed before or has other files."""
    folder, *above = CommandLine.instance().created or [None]
    if folder is None or is_multirun() or not remove_untouched(folder):
        return
    for one in above:
        if next(one.iterdir(), None) is not None:
            break
        one.rmdir()


def remove_untouched(folder: Path) -> bool:
    """Remove a run's folder if it holds only Hydra's record of the options. Return True if it did."""
    is_untouched = folder.is_dir() and [one.name for one in folder.iterdir()] == [HYDRA]
    if is_untouched:
        shutil.rmtree(folder)
    return is_untouched


def refuse_dashes(folder: Path) -> None:
    """Refuse ``--group option``, which Hydra would take for the abbreviation of one of its own options.

    Args:
        folder: folder with the configurations.

    Raises:
        ValueError: an argument is such an option; shows how to write it.
    """
    for place, word in enumerate(words := sys.argv[1:]):
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (folder / key.partition(".")[0]).is_dir() or not key:
            continue
        following = words[place + 1] if len(words) > place + 1 and not words[place + 1].startswith("-") else "…"
        raise ValueError(f"options have no dashes: write {key}={value if equals else following}")


def is_multirun() -> bool:
    """Return True if this is one run of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def chosen(group: str) -> str | None:
    """Return the name of a group's chosen option, or ``None`` without one or outside the commands."""
    return HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None


def given_overrides() -> list[str]:
    """Return the overrides on the command line."""
    return list(get_args_parser().parse_args(arguments()).overrides)


def config_options() -> list[str]:
    """Return the command-line options that locate configurations."""
    given = get_args_parser().parse_args(arguments())
    chosen = {"--config-dir": given.config_dir, "--config-path": given.config_path, "--config-name": given.config_name}
    return [word for option, value in chosen.items() if value is not None for word in (option, value)]


def short(path: Path) -> str:
    """Return the path relative to the working directory if it lies inside, otherwise the absolute path."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def swept(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a run that the sweep varies, through the command line or the sweeper's own parameters."""
    sweeper = HydraConfig.get().sweeper if HydraConfig.initialized() else {}
    parameters = [f"{name}={values}" for name, values in (sweeper.get("params") or {}).items()]
    asked = OverridesParser.create().parse_overrides([*parameters, *given_overrides()])
    varies = {one.key_or_group: one.is_sweep_override() for one in asked}  # the last value wins
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [text for text, one in zip(overrides, parsed, strict=True) if varies.get(one.key_or_group)]


def _label(number: int, overrides: Sequence[str]) -> str:
    """Return the name of a run in a sweep, for its folder and so for TensorBoard: ``3_gradnorm_1``."""
    values = [override.partition("=")[2] for override in swept(list(overrides))]
    words = [re.sub(r"[^\w.+-]+", "-", value).strip("-") for value in values]
    return "_".join([str(number), *filter(None, words)])[:80]


def value_of(key: str, overrides: list[str]) -> str | None:
    """Return the value that the overrides give ``key``, or None.

    Example:
        >>> value_of("ckpt_path", ["seed=1", "ckpt_path=runs/last.ckpt"])
        'runs/last.ckpt'
    """
    values = [o.value() for o in OverridesParser.create().parse_overrides(overrides) if o.key_or_group == key]
    return None if not values or values[-1] is None else str(values[-1])


def check_seed(seed: Any) -> None:
    """Check that the seed is valid.

    Raises:
        ValueError: it is not an integer.
    """
    if not is_integer(seed):
        raise ValueError(f"seed should be an integer, at least 0; got {seed!r}")


def seed_everything(seed: Any) -> None:
    """Seed the generators of Python, NumPy and torch, including those of worker processes.

    Raises:
        ValueError: the seed is not an integer.
    """
    import lightning as L

    check_seed(seed)
    L.seed_everything(seed, workers=True, verbose=False)


@contextmanager
def more_overrides(first: list[str]) -> Iterator[None]:
    """Insert overrides before those on the command line, which win."""
    before = list(sys.argv)
    given = given_overrides()
    place = sys.argv.index(given[0]) if given else len(sys.argv)
    sys.argv[place:place] = first
    try:
        yield
    finally:
        sys.argv[:] = before


@contextmanager
def without_idle_warnings(*, in_folder_of_before: bool = False) -> Iterator[None]:
    """Hide warnings that appear in every run and that you cannot fix.

    Args:
        in_folder_of_before: the run resumes in its own folder, which is not empty.
    """
    with warnings.catch_warnings():
        # Our data are in memory, so worker processes only cost time. Other data have the option num_workers.
        warnings.filterwarnings("ignore", message=".* does not have many workers", category=UserWarning)
        # Comes from Lightning's own use of torch's pytrees.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        if in_folder_of_before:
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists", category=UserWarning)
        yield
