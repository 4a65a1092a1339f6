"""Every notebook runs from top to bottom, and its output matches its text."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("lightnings_log")

FOLDER = Path(__file__).parents[2] / "notebooks"


def _run(path: Path, instead: tuple[str, str] | None = None) -> tuple[dict[str, Any], list[Any]]:
    """Run the code cells in one namespace; return it and the value that each cell shows, if it shows any.

    Args:
        path: the notebook.
        instead: words in its code, and others to run instead.
    """
    assert instead is None or instead[0] in path.read_text()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    values = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]).replace(*instead or ("", "")))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            values.append(eval(compile(ast.Expression(last.value), path.name, "eval"), namespace))
    return namespace, [value for value in values if value is not None]


def test_each_notebook_runs_below_and_opens_with_what_you_will_see() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {
        "burgers",
        "plug_in",
        "read_results",
        "toy_experiment",
        "vae",
    }
    for path in FOLDER.glob("*.ipynb"):
        first = json.loads(path.read_text())["cells"][0]
        assert "You will see" in "".join(first["source"]), path.stem


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebook_names_only_files_that_are_there(path: Path) -> None:
    prose = "".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        assert "://" in target or (FOLDER / target).exists(), target


@pytest.mark.parametrize("epochs", [5, pytest.param(15, marks=pytest.mark.slow)])
def test_the_small_task_gains_by_gradnorm_where_a_loss_of_another_scale_stifles_it(
    epochs: int, capsys: Capture
) -> None:
    """As it is written it trains for 15 epochs."""
    shorter = ("max_epochs=15", f"max_epochs={epochs}")
    _, (plain, balanced, (weights, _), _) = _run(FOLDER / "plug_in.ipynb", shorter)
    assert balanced["kind: accuracy"] > plain["kind: accuracy"]
    assert weights["kind"] > weights["size"]
    said = capsys.readouterr().out
    assert "`size` carries 100 % of the update on `encoder.2`" in said
    assert "did you mean 'encoder.2'?" in said


@pytest.mark.slow
def test_on_burgers_equation_combining_gradients_helps_and_weights_do_not(capsys: Capture) -> None:
    names, (*results, _) = _run(FOLDER / "burgers.ipynb")
    errors = [result["test/relative_l2"] for result in results]
    assert errors[2] < 0.75 * min(errors[:2])
    assert sum(names["gradnorm"].weights.values()) == pytest.approx(3)
    assert "`pde` and `initial` pull against each other" in capsys.readouterr().out


@pytest.mark.slow
def test_a_vae_is_saved_by_settled_units_and_by_the_likelihood_and_not_by_equal_norms(capsys: Capture) -> None:
    """Whether the reconstruction error is a mean or a sum then makes no difference."""
    names, _ = _run(FOLDER / "vae.ipynb")
    errors = {
        name: result["error per pixel"]
        for results in ("plain", "equal_norms", "settled", "likelihood")
        for name, result in names[results].items()
    }
    dead = [errors[name] for name in ("sum of both, mean", "equal norms, mean", "equal norms, sum")]
    assert min(dead) > 0.07
    for name in ("30 : 1 at the start", "likelihood"):
        assert max(errors[f"{name}, mean"], errors[f"{name}, sum"]) < 0.035
    assert errors["likelihood, mean"] == pytest.approx(errors["likelihood, sum"], rel=0.03)
    assert "`kl` carries" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has held more than 90 % of the weight:UserWarning")  # the task on a small scale
def test_in_the_toy_experiment_the_smallest_target_gets_the_largest_weight(capsys: Capture) -> None:
    names, (_, ends, _) = _run(FOLDER / "toy_experiment.ipynb")
    assert ends["GradNorm"] < ends["equal weights"]
    assert names["balanced_ten"].ratios[-1] < names["equal_ten"].ratios[-1] < 10
    weights = list(names["balanced_ten"].weights[-1].values())
    by_sigma = [weight for _, weight in sorted(zip(names["TEN_SIGMAS"], weights, strict=True))]
    assert sum(weights) == pytest.approx(10)
    assert by_sigma[:5] == sorted(by_sigma[:5], reverse=True)
    assert "task_1: σ =  3" in capsys.readouterr().out


@pytest.mark.slow
def test_the_dashboard_and_the_report_are_read_from_the_runs_own_files(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names, (folders, picture) = _run(FOLDER / "read_results.ipynb")
    assert folders == ["0_equal_0", "1_equal_1", "2_gradnorm_0", "3_gradnorm_1"]
    said = capsys.readouterr().out
    assert "http://localhost:6006/#custom_scalars" in said
    assert "2_gradnorm_0" in said.partition("Test metrics")[2], "the table of all runs"
    curves = names["curves"]
    _, shares = curves("0_equal_0", "monitor/share/")["task_1"]
    assert min(shares) > 0.99
    weights = curves("2_gradnorm_0", "gradnorm/weight/")
    for one, other in zip(weights["task_0"][1], weights["task_1"][1], strict=True):
        assert one + other == pytest.approx(2)
    assert len(picture.axes) == 6
    names["plt"] = None  # as where matplotlib is not installed
    title, run, ends = names["draw"]()[0]
    assert (title, run) == ("task weights w", "2_gradnorm_0")
    assert ends["task_0"] == (weights["task_0"][1][0], weights["task_0"][1][-1])
    if importlib.util.find_spec("lightning_gradnorm.experiments.cli.report") is not None:
        assert "4 of 4 runs are finished" in said
        assert (names["RUNS"] / "report" / "report.html").is_file()
        assert "| gradnorm | 2 |" in said
