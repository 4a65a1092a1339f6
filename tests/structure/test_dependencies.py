"""Every third-party import is declared in pyproject.toml, in the core or in the extra whose code makes it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from structure.source import PACKAGE, ROOT, imports, is_foreign

from lightning_gradnorm.experiments.cli.commands import MODULES_OF_THE_EXTRA

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")

IMPORTED_AS = {
    "hydra-core": "hydra",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "typing-extensions": "typing_extensions",
}
"""Distribution → module, where their names differ."""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
ON_USE = ("cmapss", "data", "nyuv2", "tabular")
"""Extras that a data set needs when it is read: imported in functions only."""


def modules_of(requirements: Sequence[str]) -> set[str]:
    names = {re.match(r"[\w-]+", one)[0].lower() for one in requirements}  # type: ignore[index]
    return {IMPORTED_AS.get(name, name) for name in names - {"lightning-gradnorm"}}


CORE = modules_of(PROJECT["dependencies"])
EXPERIMENTS = CORE | modules_of(EXTRAS["experiments"])
DATA = modules_of([one for extra in ON_USE for one in EXTRAS[extra]])


def test_the_core_depends_on_torch_lightning_torchmetrics_and_torchjd() -> None:
    assert CORE - {"typing_extensions"} == {"torch", "lightning", "torchmetrics", "torchjd"}  # torch requires that one


def test_imports_of_the_experiments_are_declared() -> None:
    found = [one for one in imports() if one.module.part == "experiments" and is_foreign(one)]
    at_top = {(one.module.path, one.distribution) for one in found if one.is_at_top}
    anywhere = {(one.module.path, one.distribution) for one in found}
    assert [one for one in sorted(at_top) if one[1] not in EXPERIMENTS] == []
    assert [one for one in sorted(anywhere) if one[1] not in EXPERIMENTS | DATA] == []


def test_no_dependency_is_declared_that_nothing_imports() -> None:
    used = {one.distribution for one in imports()}
    assert {"torch", "lightning"} <= used
    assert sorted((EXPERIMENTS | DATA) - used) == []


def test_the_commands_check_for_all_that_their_extra_installs() -> None:
    assert set(MODULES_OF_THE_EXTRA) == modules_of(EXTRAS["experiments"])


@pytest.mark.parametrize("extra", [*ON_USE, "plots", "sweeps"])
def test_an_extra_of_the_experiments_includes_the_common_requirements(extra: str) -> None:
    assert f"{PACKAGE.replace('_', '-')}[experiments]" in EXTRAS[extra]


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_every_dependency_that_the_tests_install_is_pinned(file: str) -> None:
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    wanted = [*PROJECT["dependencies"], *EXTRAS["experiments"], *EXTRAS["test"], *EXTRAS["dev"]]
    names = {re.match(r"[\w-]+", one)[0].lower() for one in wanted} - {"lightning-gradnorm"}  # type: ignore[index]
    assert sorted(names - {name.lower().replace("_", "-") for name in pinned}) == []
