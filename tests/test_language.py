"""Code, pages, configurations and notebooks keep to docs/contributing/style.md: no banned phrase, and American spelling."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STYLE = ROOT / "docs" / "contributing" / "style.md"
FOLDERS = ("lightning_gradnorm", "conf", "docs", "scripts", "tests", "notebooks")
SUFFIXES = (".py", ".md", ".yaml", ".ipynb")


def files() -> Iterator[Path]:
    yield from (path for path in sorted(ROOT.glob("*.md")))
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and path not in (STYLE, Path(__file__)):
                yield path


def banned() -> list[str]:
    rows = re.findall(r"^\| (.+?) \| .+? \|$", STYLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [row for row in rows if row not in ("not", "---")]


def text_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def phrases_in(text: str, phrases: list[str]) -> list[str]:
    """The phrases that occur as words, also across a line break, a comment's sign or a string's quotation marks."""
    joined = re.sub(r"""["']\s*\n\s*[rf]{0,2}["']""", "", text)
    plain = re.sub(r"[\s#>\"'_*]+", " ", joined)
    return [found for found in phrases if re.search(rf"(?<![\w-]){re.escape(found)}(?![\w-])", plain, re.IGNORECASE)]


def test_the_banned_phrases_are_read_from_the_style_guide() -> None:
    assert len(banned()) > 30
    assert phrases_in('f"the layers, of "\n        f"which one is frozen"', banned()) == ["of which"]
    assert phrases_in("# It goes\n# on and on.", banned()) == ["goes on"]
    assert phrases_in("def test_a_killed_run_goes_on(): ...", banned()) == ["goes on"]
    assert phrases_in("recommended", ["mend"]) == []


@pytest.mark.parametrize("folder", ["", *FOLDERS])
def test_no_banned_phrase_is_used(folder: str) -> None:
    of_folder = [path for path in files() if (path.parent == ROOT if not folder else ROOT / folder in path.parents)]
    assert of_folder
    found = {str(path.relative_to(ROOT)): phrases_in(text_of(path), banned()) for path in of_folder}
    assert {name: phrases for name, phrases in found.items() if phrases} == {}


def run(*command: str) -> str:
    """What the linter complains of."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


def test_the_spelling_is_american(prose: list[str]) -> None:
    assert run("codespell_lib") == ""
    assert run("codespell_lib", *prose) == ""


def test_the_prose_passes_the_linter(prose: list[str]) -> None:
    pages = [str(path.relative_to(ROOT)) for path in files() if path.suffix == ".md"]
    assert run("proselint", "check", *pages, *prose) == ""


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The notebooks' text and the docstrings without examples, in files that the linters can read."""
    folder = tmp_path_factory.mktemp("prose")
    for path in (path for path in files() if path.suffix == ".ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        (folder / f"{path.stem}.md").write_text(text, encoding="utf-8")
    found = []
    for path in sorted((ROOT / "lightning_gradnorm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                found.append(f"{path.name}, {getattr(node, 'name', 'module')}: {text.partition('Example:')[0]}")
    (folder / "docstrings.md").write_text("\n\n".join(found), encoding="utf-8")
    return [str(path) for path in sorted(folder.iterdir())]
