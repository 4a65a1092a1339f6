"""The commands, as a shell would call them, in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

Call = Callable[..., str]


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
