"""What the README names as proof exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = sorted(set(re.findall(r"`(tests/[^`]*)`", (ROOT / "README.md").read_text())))


def test_the_readme_names_tests() -> None:
    assert len(NAMED) > 20


@pytest.mark.parametrize("named", NAMED)
def test_a_test_that_the_readme_names_exists(named: str) -> None:
    path, _, function = named.partition("::")
    text = (ROOT / path).read_text()
    assert not function or re.search(rf"^def {function}\(", text, flags=re.MULTILINE)
