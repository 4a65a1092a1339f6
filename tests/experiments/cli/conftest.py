"""The commands, as a shell would call them: in this process, and in one of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

Call = Callable[..., str]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`call(main, *arguments, status=0)` runs a command in ``tmp_path`` and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(main: Callable[[], None], *arguments: str, status: int = 0) -> str:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        found = 0
        try:
            main()
        except SystemExit as left:
            found = int(left.code or 0)
        seen = capsys.readouterr()
        assert found == status, seen.out + seen.err
        assert "Traceback" not in seen.err
        assert "HYDRA_FULL_ERROR" not in os.environ
        assert sys.argv == ["command", *arguments]
        return seen.out + seen.err

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(*arguments, **environment)` starts Python in ``tmp_path``; what still runs at the end is killed.

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
