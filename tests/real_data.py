"""Locations of real data that the project does not ship."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "LIGHTNING_GRADNORM_DATA"


def real_data(*parts: str) -> Path:
    """Return a file or folder of the real data, or skip the test with the reason.

    Args:
        parts: The path below the folder: ``real_data("cmapss", "train_FD001.txt")``.
    """
    given = os.environ.get(VARIABLE)
    folder = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    found = folder.joinpath(*parts)
    if not found.exists():
        pytest.skip(f"needs {'/'.join(parts)} in ${VARIABLE} or in ../shared/data; it is not there")
    return found
