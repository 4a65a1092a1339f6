"""The package's source as data: its modules, and what each of them imports."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lightning_gradnorm"
_WITHOUT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    path: str
    """Relative to the package, ``engine/layers.py``."""
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree, parsed when it is needed: listing the modules is a part of collecting the tests."""
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        """All lines of the file."""
        return len(self.text.splitlines())

    @property
    def lines_of_code(self) -> int:
        """Its lines without those that hold nothing but a docstring or a comment, or nothing."""
        documented = {
            line
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in node.body
            if isinstance(inner, ast.Expr)
            and isinstance(inner.value, ast.Constant)
            and isinstance(inner.value.value, str)
            for line in range(inner.lineno, (inner.end_lineno or 0) + 1)
        }
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        said = {
            line
            for token in tokens
            if token.type not in _WITHOUT_CODE
            for line in range(token.start[0], token.end[0] + 1)
        }
        return len(said - documented)

    @property
    def part(self) -> str:
        """The part of the architecture it belongs to: a subpackage, or the name of a file at the top, ``__init__``."""
        return self.path.partition("/")[0].removesuffix(".py")


@dataclass(frozen=True)
class Import:
    """One import in one file."""

    module: Module
    name: str
    """Dotted and complete: ``lightning_gradnorm.engine.layers``, ``torch.utils.tensorboard``."""
    is_at_top: bool
    """Outside functions: importing the file makes it."""

    @property
    def distribution(self) -> str:
        """The first part of the name."""
        return self.name.partition(".")[0]


@cache
def modules() -> list[Module]:
    """Return all files of the package."""
    package = ROOT / PACKAGE
    return [
        Module(path.relative_to(package).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    ]


@cache
def imports() -> list[Import]:
    """Return every import in the package, also those in functions and under ``TYPE_CHECKING``."""
    return [found for module in modules() for found in imports_of(module)]


def imports_of(module: Module) -> list[Import]:
    """Return the imports of one file. ``importlib.import_module`` and ``needed`` with a literal name count."""
    in_functions = {
        id(inner)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    return [
        Import(module, name, id(node) not in in_functions)
        for node in ast.walk(module.tree)
        for name in _names_imported_by(node)
    ]


def _names_imported_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [_complete(node.module or "", alias.name) for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in ("__import__", "find_spec", "import_module", "needed"):
            return [str(node.args[0].value)]
    return []


def _complete(module: str, name: str) -> str:
    """Return ``module.name`` if that is a module of the package, ``module`` otherwise."""
    place = ROOT.joinpath(*module.split("."), name)
    return f"{module}.{name}" if place.is_dir() or place.with_suffix(".py").is_file() else module


def part_imported(found: Import) -> str | None:
    """Return the part of the architecture that is imported, or ``None`` for other packages."""
    package, _, rest = found.name.partition(".")
    return (rest.partition(".")[0] or "__init__") if package == PACKAGE else None


def is_foreign(found: Import) -> bool:
    """Return True if it is a third-party package."""
    return found.distribution not in {PACKAGE, *sys.stdlib_module_names}
