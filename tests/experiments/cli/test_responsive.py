"""The commands' imports: nothing heavy for `--help` or for errors about unknown names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"accelerate", "lightning", "matplotlib", "numpy", "optuna", "tensorboard", "torch", "torchjd", "torchmetrics"}

CODE = """
import json, sys
from lightning_gradnorm.experiments.cli.commands import {command} as main
sys.argv = ["gradnorm", *json.loads(sys.argv[1])]
try:
    main()
except SystemExit as left:
    print("\\n" + json.dumps([left.code or 0, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


@pytest.mark.parametrize(
    ("command", "arguments", "status", "expected"),
    [
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
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_neither_torch_nor_lightning_is_imported_for(
    tmp_path: Path, command: str, arguments: list[str], status: int, expected: str
) -> None:
    words = [sys.executable, "-c", CODE.format(command=command), json.dumps(arguments)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    *said, last = done.stdout.splitlines()
    assert expected in done.stderr + "\n".join(said)
    left, imported = json.loads(last)
    assert left == status
    assert HEAVY.isdisjoint(imported), HEAVY & set(imported)
    assert "lightning_gradnorm" in imported
