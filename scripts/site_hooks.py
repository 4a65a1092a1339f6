"""Hooks for mkdocs: generated pages, lists in the navigation, links, drawings, docstrings."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

import lightning_gradnorm

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs reads a hook by its path

import site_pages
import strategy_tables

WIDE = ("strategies.md", "guarantees.md")
MANY_COLUMNS = re.compile(r"^\|(?:[^|\n]*\|){8,}$", flags=re.MULTILINE)
RESULTS = site_pages.ROOT / "docs" / "results"


def on_config(config: Any) -> Any:
    """Add the groups of the configuration and the results to the navigation."""
    groups = [{f"{group}=": f"configuration/{site_pages.page_of(group)}"} for group in site_pages.groups()]
    results = [{_title(file): f"results/{file.name}"} for file in sorted(RESULTS.glob("*.md"))]
    details = [f"strategies/{one.name}.md" for one in strategy_tables.strategies()]
    _section(config["nav"], "Strategies").extend(sorted(details))
    _section(config["nav"], "Command line", "Configuration").extend(groups)
    if repository := os.environ.get("READTHEDOCS_GIT_CLONE_URL"):  # nothing else knows where the project is hosted
        config["repo_url"], config["repo_name"] = repository.removesuffix(".git"), "Repository"
    config["copyright"] = f"Version {lightning_gradnorm.__version__} · {config['copyright']}"
    _section(config["nav"], "Results").extend(results)
    return config


def _section(nav: list[Any], *titles: str) -> list[Any]:
    """Return the entries of a section, given the titles of its parents and its own."""
    for title in titles:
        nav = next(entry[title] for entry in nav if isinstance(entry, dict) and title in entry)
    return nav


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    for path, text in site_pages.pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links to repository files outside the site with their text, and make room for wide tables."""
    if page.file.src_uri in WIDE or MANY_COLUMNS.search(markdown):
        page.meta["hide"] = ["toc"]
    if page.file.src_uri in strategy_tables.PAGES:
        markdown = strategy_tables.on_the_site(markdown)
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)+(?:tests|scripts|notebooks|lightning_gradnorm)/[^)]*\)", r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Inline drawings, so they use the colors of the page, and keep the range behind a number in one line."""
    html = re.sub(r"(?<=<td)[^>]*>[^<]*(?=</td>)", _unbroken, html)
    return re.sub(r'<img [^>]*src="(\w+\.svg)"[^>]*>', _inlined, html)


def _unbroken(cell: re.Match[str]) -> str:
    ranges = re.sub(r"\(([\d.]+) to ([\d.]+)\)", r"(\1&nbsp;to&nbsp;\2)", cell[0])
    return re.sub(r"± (?=[\d.])", "±&nbsp;", ranges)


def _inlined(image: re.Match[str]) -> str:
    drawing = (site_pages.ROOT / "docs" / image[1]).read_text(encoding="utf-8")
    return f'<span class="drawing">{drawing}</span>'


class PlainDocstrings(griffe.Extension):
    """Converts our docstring style: `Example:` with a doctest, and a few Sphinx formulas."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = site_pages.as_markdown(obj.docstring.value)


def _title(file: Path) -> str:
    first = file.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ")
