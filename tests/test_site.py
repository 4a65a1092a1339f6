"""The documentation site: its links work, its generated pages are complete, its examples run. Needs no mkdocs."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import re
import shutil
import sys
import textwrap
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from configurations import compose_alone, options
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_gradnorm
from lightning_gradnorm.experiments.cli.config import conf_dir, left_out
from lightning_gradnorm.experiments.cli.schema import schema_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

sys.path.insert(0, str(ROOT / "scripts"))
try:
    site_pages = importlib.import_module("site_pages")
    strategy_tables = importlib.import_module("strategy_tables")
finally:
    sys.path.remove(str(ROOT / "scripts"))

WRITTEN = {file.relative_to(DOCS).as_posix(): file.read_text(encoding="utf-8") for file in sorted(DOCS.rglob("*.md"))}
GROUPS = sorted({file.parent.relative_to(conf_dir()).as_posix() for file in conf_dir().glob("*/**/*.yaml")})
NOTEBOOKS = sorted(file.stem for file in (ROOT / "notebooks").glob("*.ipynb"))
MADE_NAMES = [
    "changelog.md",
    "configuration/index.md",
    *(f"configuration/{site_pages.page_of(one)}" for one in GROUPS),
    *(f"tutorials/{name}.md" for name in NOTEBOOKS),
    *(f"strategies/{name}.md" for name in options("balancing")),
]


@cache
def made() -> dict[str, str]:
    """The pages that are made, not written."""
    pages: dict[str, str] = site_pages.pages()
    return pages


@cache
def page(name: str) -> str:
    """A page as the site has it."""
    if name in strategy_tables.PAGES:
        on_the_site: str = strategy_tables.on_the_site(WRITTEN[name])
        return on_the_site
    return WRITTEN[name] if name in WRITTEN else made()[name]


def without_code(markdown: str) -> str:
    markdown = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", "", markdown)


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", WRITTEN[name], flags=re.MULTILINE | re.DOTALL)


def navigation(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    inside = entry.values() if isinstance(entry, dict) else entry
    return [page for part in inside for page in navigation(part)]


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WRITTEN, *MADE_NAMES])
def test_links_and_pictures_of_a_page_exist(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page(name))):
        if target.startswith(("http://", "https://", "#")):
            continue
        path = (DOCS / name).parent / target.partition("#")[0]
        inside = path.resolve().relative_to(ROOT).as_posix().removeprefix("docs/")
        assert path.resolve().exists() or inside in MADE_NAMES, f"{name}: {target}"


@pytest.mark.parametrize("name", strategy_tables.PAGES)
def test_the_committed_tables_are_up_to_date_and_link_to_files_of_the_clone(name: str) -> None:
    text = WRITTEN[name]
    assert text == strategy_tables.filled(text), "run python scripts/strategy_tables.py"
    linked = re.findall(r"^\| \[`(\w+)`\]\((\S+)\)", text, flags=re.MULTILINE)
    assert sorted(one for one, _ in linked) == sorted(options("balancing"))
    assert all((DOCS / target).is_file() for _, target in linked)


def test_the_tables_need_no_solver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda name: None)
    monkeypatch.setattr(strategy_tables, "ROOT", tmp_path)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/strategies.md").write_text("<!-- strategies --><!-- end -->", encoding="utf-8")
    strategy_tables.strategies.cache_clear()
    strategy_tables.main()
    strategy_tables.strategies.cache_clear()
    assert "CAGrad" in (tmp_path / "docs/strategies.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", WRITTEN)
def test_files_that_a_page_includes_exist(name: str) -> None:
    for included in re.findall(r'^--8<-- "([^":]+)', page(name), flags=re.MULTILINE):
        assert (DOCS / included).is_file(), f"{name}: {included}"


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = navigation(yaml.safe_load(text)["nav"])
    assert len(listed) == len(set(listed))
    names = {*WRITTEN, *MADE_NAMES}
    assert set(listed) <= names
    by_hook = {name for name in names if name.startswith(("results/", "configuration/", "strategies/"))}
    assert names - by_hook <= set(listed)


def test_the_generated_pages_are_listed() -> None:
    assert sorted(made()) == sorted(MADE_NAMES)


# ---- the Python pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", lightning_gradnorm.__all__)
def test_a_public_name_is_explained_on_the_python_pages(name: str) -> None:
    found = next(found for found, text in WRITTEN.items() if f"::: lightning_gradnorm.{name}\n" in f"{text}\n")
    assert f"({Path(found).name}#lightning_gradnorm.{name})" in WRITTEN["api/index.md"]


def test_the_python_pages_name_what_exists() -> None:
    named = [name for text in WRITTEN.values() for name in re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE)]
    assert len(named) > 40
    for name in named:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        assert (found.__doc__ or "").strip(), name


# ---- the configuration reference -------------------------------------------------------------------------------------


def keys_of(node: DictConfig) -> set[str]:
    """All keys of a composed configuration, without those between a ``_target_`` of foreign code and its arguments."""
    found = set()
    for key in node:
        if not str(key).startswith("_"):
            found.add(str(key))
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                found |= keys_of(child)
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_every_file_of_a_group_is_in_the_reference_with_its_comment(group: str) -> None:
    told = page(f"configuration/{site_pages.page_of(group)}")
    for file in (conf_dir() / group).glob("*.yaml"):
        assert f"\n## `{group}={file.stem}`" in told
        assert f"[`{file.stem}`]({site_pages.page_of(group)}#{file.stem})" in page("configuration/index.md")
        first = file.read_text(encoding="utf-8").splitlines()[0]
        is_comment = first.startswith("# ")
        expected = re.findall(r"[A-Za-z]{4,}", first.removeprefix("# @package _global_")) if is_comment else []
        assert all(word in told for word in expected)


@pytest.mark.parametrize(
    ("group", "option"),
    [
        (group, one)
        for group in ("balancing", "data", "callbacks", "logger", "model", "trainer")
        for one in options(group)
    ],
)
def test_every_key_that_an_option_composes_is_in_the_reference(group: str, option: str) -> None:
    """The option alone, without the rest of a configuration."""
    node = compose_alone(group, option)
    told = page(f"configuration/{site_pages.page_of(group)}")
    for key in keys_of(node) if node else ():
        is_there = f"| `{key}` |" in told or re.search(rf"^ *{key}:|{{ ?{key}:|\.{key}\b|, {key}:", told, re.MULTILINE)
        assert is_there, f"{group}={option}: {key}"


def test_every_parameter_of_every_schema_has_its_row_with_its_default_and_its_meaning() -> None:
    without_meaning = []
    for path, constructor in site_pages._SCHEMAS.items():
        rows = {row.name: row for row in site_pages.parameters_of(constructor)}
        name = constructor.__name__
        fields = dataclasses.fields(schema_of(constructor, leave_out=left_out(constructor)))
        names = {field.name for field in fields if not field.name.startswith("_")}
        assert set(rows) == names, path
        without_meaning += [f"{name}.{row}" for row in rows if not rows[row].meaning]
        for field in fields:
            if isinstance(field.default, int | float) and field.name in rows:
                assert rows[field.name].default.lower() == repr(field.default).lower()
    assert without_meaning == []


def test_single_values_of_the_commands_have_a_row_and_a_sentence() -> None:
    told = page("configuration/index.md")
    for file in ("config.yaml", "eval.yaml"):
        content = yaml.safe_load((conf_dir() / file).read_text(encoding="utf-8"))
        for key in content.keys() - {"defaults", "hydra"}:
            assert re.search(rf"^\| `{key}` \| `[^`]+` \| \S.+\|$", told, re.MULTILINE), key


def test_every_strategy_has_a_formula() -> None:
    for name in options("balancing"):
        assert re.search(r"^\*\*Formula:\*\* \S", page(f"strategies/{name}.md"), flags=re.MULTILINE), name


def test_the_examples_of_the_generator_are_right() -> None:
    for module, fewest in ((site_pages, 4), (strategy_tables, 3)):
        failed, tried = doctest.testmod(module)
        assert failed == 0
        assert tried >= fewest


# ---- what the pages say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in WRITTEN if python_blocks(name)])
def test_python_on_a_page_can_be_read(name: str) -> None:
    for block in python_blocks(name):
        compile(textwrap.dedent(block), name, "exec")


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_the_complete_example_for_your_own_model_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first, *others = python_blocks("plug_in.md")
    found: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(first, "plug_in.md", "exec"), found)
    weights = found["gradnorm"].weights
    assert sum(weights.values()) == pytest.approx(2.0)
    assert weights["price"] < weights["kind"]  # its targets are a hundred times as large
    for block in others:
        exec(compile(block, "plug_in.md", "exec"), found)
    assert list(found["model"].tasks) == ["price", "kind"]


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("name", ["index.md", "strategies.md", "composite_losses.md", "monitor_and_report.md"])
def test_the_callbacks_on_a_page_train(name: str) -> None:
    """Each `trainer` on the page trains a model that returns all losses the pages name."""
    names = ["seg", "depth", "pde", "boundary", "initial", "interior", "data", "physics", "l2"]
    found: dict[str, Any] = {"L": SimpleNamespace(Trainer=partial(L.Trainer, max_epochs=1, **QUIET))}
    found |= {"model": EveryLoss(names), "loader": DataLoader(torch.randn(8, 3), batch_size=4)}
    for block in python_blocks(name):
        found.pop("trainer", None)
        exec(compile(block, name, "exec"), found)
        if "trainer" in found and found["trainer"].global_step == 0:
            found["trainer"].fit(found["model"], found["loader"])
            assert found["trainer"].global_step == 2


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class EveryLoss(L.LightningModule):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
        self.heads = nn.ModuleDict({name: nn.Linear(4, 1) for name in names})

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        z = self.encoder(batch)
        losses = {name: head(z).square().mean() for name, head in self.heads.items()}
        return {"loss": sum(losses.values(), torch.zeros(())), **losses}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_means_and_deviations_everywhere_match_the_results_page() -> None:
    results = " ".join(WRITTEN["reproducing.md"].split())
    pages = {name: text for name, text in WRITTEN.items() if "/" not in name and name != "reproducing.md"}
    pages["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    told = [(name, number) for name, text in pages.items() for number in re.findall(r"[\d.]+ ± [\d.]+", text)]
    assert [(name, number) for name, number in told if number not in results] == []
    assert len(re.findall(r"[\d.]+ ± [\d.]+", results)) >= 8


def test_the_packages_that_build_the_site_are_pinned() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.findall(r'"([\w-]+)', re.search(r"^docs = \[(.*)\]$", project, re.MULTILINE)[1])  # type: ignore[index]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert {"mkdocs", "mkdocs-material", "mkdocstrings"} <= set(wanted)
    assert all(re.search(rf"^{name}==", pinned, re.MULTILINE) for name in wanted)
