"""Every notebook runs from top to bottom, and shows what it says."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


def _run(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Run the code cells in one namespace; return it and each cell's last value."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    values = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            values.append(eval(compile(ast.Expression(last.value), path.name, "eval"), namespace))
    return namespace, values


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path) -> None:
    _run(path)


def test_the_small_task_gains_by_gradnorm_where_a_loss_of_another_scale_stifles_it(capsys) -> None:
    _, (_, plain, balanced, (weights, _), _) = _run(FOLDER / "plug_in.ipynb")
    assert balanced["kind: accuracy"] > plain["kind: accuracy"]
    assert weights["kind"] > weights["size"]
    assert "did you mean 'encoder.2'?" in capsys.readouterr().out
