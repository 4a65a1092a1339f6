"""The commands' imports: nothing heavy for `--help` or for errors about unknown names."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"accelerate", "lightning", "matplotlib", "numpy", "optuna", "tensorboard", "torch", "torchjd", "torchmetrics"}

CASES = [
    ("train", ["--help"], 0, "== Groups"),
    ("train", ["balancing=gradnrom"], 1, "did you mean 'gradnorm'?"),
    ("train", ["balancing.alhpa=1"], 1, "did you mean 'balancing.alpha'?"),
    (
        "train",
        ["balancing=mgda", "balancing.aggregator.epsilom=1"],
        1,
        "did you mean 'balancing.aggregator.epsilon'?",
    ),
    (
        "train",
        ["balancing=famo", "balancing.scalarizer.weight_dcay=1"],
        1,
        "did you mean 'balancing.scalarizer.weight_decay'?",
    ),
    ("train", ["max_epochs=3"], 1, "did you mean 'trainer.max_epochs'?"),
    ("train", ["model.optimizer.weight_decay=1"], 1, "+model.optimizer.weight_decay=1"),
    ("train", ["alpha=big"], 1, "could not be converted to Float"),
    ("train", ["seed=a"], 1, "seed should be an integer"),
    ("train", ["-m", "balancing=equal,nope"], 1, "there is no balancing 'nope'"),
    ("train", ["trainer=torchrun"], 1, "torchrun --nproc-per-node"),
    ("train", ["ckpt_path=nope.ckpt"], 1, "no such checkpoint: nope.ckpt"),
    ("evaluate", ["--help"], 0, "Test a checkpoint"),
    ("evaluate", ["ckpt_path=nope.ckpt"], 1, "no such checkpoint: nope.ckpt"),
    ("report", ["--help"], 0, "Compare runs"),
    ("report", ["nowhere"], 2, "no such folder"),
]

ONE_AFTER_THE_OTHER = """
import contextlib, io, json, sys
from hydra.core.global_hydra import GlobalHydra
from lightning_gradnorm.experiments.cli import commands
answers = []
for name, arguments in json.load(sys.stdin):
    GlobalHydra.instance().clear()
    sys.argv, status, said = ["gradnorm", *arguments], None, io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            getattr(commands, name)()
        except SystemExit as left:
            status = left.code or 0
    answers.append([status, said.getvalue(), sorted({name.partition(".")[0] for name in sys.modules})])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, set[str]]]:
    """Status, output and imported packages after each command, all in one fresh interpreter.

    A package that one command imports is there for all that follow: look at the first test that fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER],
        input=json.dumps([(command, arguments) for command, arguments, _, _ in CASES]),
        cwd=tmp_path_factory.mktemp("empty"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        " ".join([command, *arguments]): (status, said, set(imported))
        for (command, arguments, _, _), (status, said, imported) in zip(CASES, found, strict=True)
    }


@pytest.mark.parametrize(
    ("command", "status", "expected"),
    [
        pytest.param(line := " ".join([command, *arguments]), status, expected, id=line)
        for command, arguments, status, expected in CASES
    ],
)
def test_neither_torch_nor_lightning_is_imported_for(
    answers: dict[str, tuple[int, str, set[str]]], command: str, status: int, expected: str
) -> None:
    left, said, imported = answers[command]
    assert expected in said
    assert left == status
    assert HEAVY.isdisjoint(imported), HEAVY & imported
    assert "lightning_gradnorm" in imported
