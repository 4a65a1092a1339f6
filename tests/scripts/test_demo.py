"""The two sentences at the end of `make demo`, and the commands that it prints."""

from __future__ import annotations

import io
from pathlib import Path

import demo
import pytest
from rich.console import Console

from lightning_gradnorm.experiments.report import Run

EQUAL = {
    "test/accuracy/left": 0.9,
    "test/loss/left": 0.4,
    "test/loss/sum": 3.0,
    "test/r2/sum": 0.8,
    "test/loss/third": 0.6,
    "test/loss": 4.0,
}


def test_the_result_is_explained_by_task_and_the_sum_put_into_perspective() -> None:
    better = {**EQUAL, "test/accuracy/left": 0.95, "test/r2/sum": 0.7, "test/loss/sum": 3.5, "test/loss/third": 0.5}
    first, second = demo.explained(Run("equal", EQUAL), Run("gradnorm", better))
    assert "better in left (accuracy 0.9 → 0.95), third (loss 0.6 → 0.5), worse in sum (r2 0.8 → 0.7)." in first
    assert "75% of it is the loss of 'sum'" in second
    worse, _ = demo.explained(Run("gradnorm", better), Run("equal", EQUAL))
    assert "better in sum (r2 0.7 → 0.8), worse in left (accuracy 0.95 → 0.9), third (loss 0.5 → 0.6)." in worse


@pytest.mark.parametrize("width", [20, 200])
def test_a_command_is_printed_in_full_at_any_width(width: int) -> None:
    out = io.StringIO()
    command = "gradnorm-train experiment=multimnist 'tasks=[left]' hydra.run.dir=outputs/demo/2026-11-30_12-00-00/equal"
    demo.say(Console(file=out, width=width), command)
    assert out.getvalue() == f"{command}\n"


def test_make_demo_installs_no_development_tools() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    rule = makefile.partition("\n.venv/.demo-installed:")[2].partition("\n\n")[0]
    assert '--editable ".[data]"' in rule
    assert "dev" not in rule
    assert makefile.partition("\ndemo:")[2].splitlines()[0] == " .venv/.demo-installed"
