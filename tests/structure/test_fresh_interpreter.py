"""The modules that an import loads, in a fresh interpreter."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
from structure import allowed
from structure.source import PACKAGE, ROOT, modules

import lightning_gradnorm

OF_THE_EXPERIMENTS = ("PIL", "hydra", "matplotlib", "omegaconf", "rich", "tensorboard", "yaml")
PURE = ("gradients", "strategies", "engine")
CORE = [
    ".".join([PACKAGE, *module.path.removesuffix(".py").split("/")]).removesuffix(".__init__")
    for module in modules()
    if module.part != "experiments"
]


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_package_itself_loads_neither_lightning_nor_torch() -> None:
    done = run(f"import sys, {PACKAGE}; print({{'lightning', 'torch'}} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """What an interpreter has loaded after each part, in this order; only a bare import of Lightning leaves no trace."""
    code = "import importlib, json, sys\nfound, before = {}, set()\n"
    for part in (*PURE, ""):
        if not part:
            code += "import lightning\nbefore = set(sys.modules) - set(found['engine modules'])\n"
            code += f"from {PACKAGE} import *\nassert GradNorm and MultiTaskModule\n"
        package = f"{PACKAGE}.{part}".rstrip(".")
        for title, names in (
            (part, [package]),
            (f"{part} modules", [name for name in CORE if name.startswith(package)]),
        ):
            code += f"for name in {names}: importlib.import_module(name)\n"
            code += f"found[{title!r}] = sorted(set(sys.modules) - before)\n"
    done = run(f"{code}print(json.dumps(found))")
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_core_loads_no_package_of_the_experiments_beyond_what_lightning_loads(loaded: dict[str, list[str]]) -> None:
    names = loaded[" modules"]
    assert set(CORE) <= set(names)
    assert [name for name in names if name.partition(".")[0] in OF_THE_EXPERIMENTS] == []
    assert [name for name in names if name.startswith(f"{PACKAGE}.experiments")] == []


def test_the_pure_torch_parts_load_no_lightning(loaded: dict[str, list[str]]) -> None:
    """The engine last: first the part itself, then all of its modules."""
    may_load = {path.partition("/")[0] for path, name in allowed.IMPORTS if name == "lightning"}
    for part in PURE:
        for title, may in ((part, False), (f"{part} modules", part in may_load)):
            assert f"{PACKAGE}.{part}" in loaded[title]
            loads = not {"lightning", "pytorch_lightning"}.isdisjoint(loaded[title])
            assert loads == may, title


@pytest.mark.parametrize(("function", "command"), [("train", "train"), ("evaluate", "eval"), ("report", "report")])
def test_a_command_without_the_extra_explains_in_one_line_what_to_install(function: str, command: str) -> None:
    done = run(
        f"import sys; sys.modules['hydra'] = None; from {PACKAGE}.experiments.cli.commands import {function}; {function}()"
    )
    assert done.returncode == 1
    assert done.stdout == ""
    told = f'gradnorm-{command} needs the experiments extra: pip install "lightning-gradnorm[experiments]"\n'
    assert done.stderr == told


# ---- the names of the package ----------------------------------------------------------------------------------------


def test_lazy_imports_match_what_type_checkers_see() -> None:
    root = next(module for module in modules() if module.path == "__init__.py")
    homes: dict[str, Any] = {}
    for node in ast.walk(root.tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
            homes[node.module.removeprefix(f"{PACKAGE}.")] = tuple(alias.name for alias in node.names)
    assert {home: names for home, names in lightning_gradnorm._HOMES.items() if names} == homes
    assert sorted(name for names in homes.values() for name in names) == sorted(lightning_gradnorm.__all__)


@pytest.mark.parametrize("name", lightning_gradnorm.__all__)
def test_a_public_name_is_found_again_by_pickle(name: str) -> None:
    found = getattr(lightning_gradnorm, name)
    assert pickle.loads(pickle.dumps(found)) is found
    assert found.__module__.startswith(f"{PACKAGE}.")
    assert name in dir(lightning_gradnorm)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_gradnorm' has no attribute 'GradNrom'"):
        lightning_gradnorm.GradNrom  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'GradNrom'"):
        from lightning_gradnorm import GradNrom  # noqa: F401
