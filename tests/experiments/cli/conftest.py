"""The commands, called as from a shell: in this process, and in a separate one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import as_in_a_terminal, run_in, status_of

from lightning_gradnorm.experiments.callbacks.save_last import SaveLast

Call = Callable[..., str]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`run_once(main, *arguments)` runs a command and returns the folder it ran in, for tests that only read there.

    The same command is run once for all tests of the module.
    """
    folders: dict[tuple[Any, ...], Path] = {}

    def run(main: Callable[[], None], *arguments: str) -> Path:
        command = (main, *arguments)
        if command not in folders:
            folders[command] = tmp_path_factory.mktemp("once")
            run_in(folders[command], main, *arguments)
        return folders[command]

    return run


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`interrupting(n)` presses Ctrl-C after the n-th step."""

    def arm(left: int) -> None:
        save = SaveLast.on_train_batch_end

        def pressed(self: Any, trainer: Any, *arguments: Any) -> None:
            nonlocal left
            save(self, trainer, *arguments)
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(SaveLast, "on_train_batch_end", pressed)

    return arm


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`call(main, *arguments, status=0)` runs a command in ``tmp_path`` and returns its output."""
    as_in_a_terminal(monkeypatch, tmp_path)

    def run(main: Callable[[], None], *arguments: str, status: int = 0) -> str:
        found = status_of(main, arguments)
        seen = capsys.readouterr()
        assert found == status, seen.out + seen.err
        assert "Traceback" not in seen.err
        assert "HYDRA_FULL_ERROR" not in os.environ
        return seen.out + seen.err

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(*arguments, **environment)` starts Python in ``tmp_path`` and kills whatever still runs at the end.

    What it prints is in ``stdout``. It has a session of its own, as a command in a terminal has: Ctrl-C there is for all
    processes of the session's group.
    """
    started = []

    def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
