"""Fixtures and counters for the tests of compiled models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_gradnorm.gradients import ReplayedGradients


@pytest.fixture
def fresh_compiler() -> None:
    """Nothing is compiled yet."""
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def replays(monkeypatch) -> list[str]:
    """The names of modules that were run again, each time one more."""
    names: list[str] = []
    run_again = ReplayedGradients._run_again

    def noted(reader: ReplayedGradients, *args: Any) -> None:
        names.append(reader._name)
        run_again(reader, *args)

    monkeypatch.setattr(ReplayedGradients, "_run_again", noted)
    return names
