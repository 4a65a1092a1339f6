"""Collects these tests with `-m third_party` only: they need packages that the other tests do not install."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if config.getoption("markexpr") == "third_party" else True
