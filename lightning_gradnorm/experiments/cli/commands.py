"""The console scripts. They check for the ``experiments`` extra before they import anything that needs it."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

MODULES_OF_THE_EXTRA = ("PIL", "hydra", "numpy", "omegaconf", "rich", "tensorboard", "yaml")
"""The packages that ``lightning-gradnorm[experiments]`` installs, by their import names."""


def train() -> None:
    """Run `gradnorm-train`."""
    _run("gradnorm-train", "train")


def evaluate() -> None:
    """Run `gradnorm-eval`."""
    _run("gradnorm-eval", "evaluate")


def report() -> None:
    """Run `gradnorm-report`."""
    _run("gradnorm-report", "report")


def _run(command: str, module: str) -> None:
    if any(find_spec(name) is None for name in MODULES_OF_THE_EXTRA):
        sys.exit(f'{command} needs the experiments extra: pip install "lightning-gradnorm[experiments]"')
    importlib.import_module(f"lightning_gradnorm.experiments.cli.{module}").main()
