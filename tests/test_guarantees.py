"""tests/README.md names tests that exist, and leaves out none that the project's README calls proof."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TEXT = (TESTS / "README.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.partition("## What is guaranteed")[2].partition("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith(("| guarantee", "| **"))
]
GUARANTEES = {name: (re.findall(r"`(\S+\.py)`", fast), re.findall(r"`(\S+\.py)`", slow)) for name, fast, slow in ROWS}
FILES = sorted({file for columns in GUARANTEES.values() for files in columns for file in files})
NOT_FAST = ("slow", "each_value_once", "both_packages", "hypothesis", "gpu")
"""What puts a test into the slow set, in part at least."""


def test_there_are_guarantees() -> None:
    assert len(GUARANTEES) > 50
    assert [name for name, (fast, slow) in GUARANTEES.items() if not fast + slow] == []


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_tests_exists(file: str) -> None:
    assert (TESTS / file).is_file()


@pytest.mark.parametrize("file", sorted({file for _, slow in GUARANTEES.values() for file in slow}))
def test_a_file_of_slow_tests_has_some(file: str) -> None:
    assert any(word in (TESTS / file).read_text() for word in NOT_FAST)


def test_modules_that_are_linked_exist() -> None:
    linked = re.findall(r"\]\(([^):]+)\)", TEXT)
    assert len(linked) > 20
    assert [name for name in linked if not (TESTS / name).exists()] == []


def test_tests_that_the_documentation_cites_hold_a_guarantee() -> None:
    page = TESTS.parent / "docs" / "guarantees.md"
    proofs = re.findall(r"`tests/(\S+?\.py)(?:::\w+)?`", page.read_text())
    assert len(proofs) > 20
    assert sorted(set(proofs) - set(FILES)) == []


def test_every_file_of_tests_of_the_core_holds_a_guarantee() -> None:
    core = ("callbacks", "engine", "gradients", "monitor", "multitask", "strategies", "structure")
    existing = {str(file.relative_to(TESTS)) for part in core for file in (TESTS / part).rglob("test_*.py")}
    assert sorted(existing - set(FILES)) == []
