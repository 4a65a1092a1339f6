"""The commands in this process: called as from a shell, and in place of the processes that they would start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, TextIO

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from machines import MODULE

from lightning_gradnorm.experiments.cli import job_runner, train


def as_in_a_terminal(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.chdir(folder)
    patch.setenv("COLUMNS", "200")
    patch.delenv("HYDRA_FULL_ERROR", raising=False)


_look_up_mode = Hydra.get_mode


def _mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Return ``hydra.mode``, for which Hydra composes the configuration a first time: only if an option may set it."""
    is_open = any(word.startswith(("search", "hydra.mode")) for word in overrides)
    return _look_up_mode(hydra, config_name, overrides) if is_open else None


def status_of(main: Callable[[], None], arguments: Sequence[str]) -> int:
    """Run a command and return its exit status."""
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *arguments])
        patch.setattr(Hydra, "get_mode", _mode)
        try:
            main()
        except SystemExit as left:
            return int(left.code or 0)
        finally:
            assert sys.argv == ["command", *arguments]
    return 0


def run_in(folder: Path, main: Callable[[], None], *arguments: str) -> None:
    """Run a command in a folder; it is to succeed, and leaves nothing in this process."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        as_in_a_terminal(patch, folder)
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
            patch.delenv(name)
        assert status_of(main, arguments) == 0


def start_no_process(patch: pytest.MonkeyPatch) -> None:
    """Have the runs of a study train in this process, one after the other: half a second each instead of many."""

    def run(words: Sequence[str], *, stdout: TextIO, **_: Any) -> CompletedProcess[str]:
        assert tuple(words[:3]) == (sys.executable, *MODULE)
        with redirect_stdout(stdout), redirect_stderr(stdout):
            return CompletedProcess(list(words), status_of(train.main, words[3:]))

    patch.setattr(job_runner.subprocess, "run", run)
