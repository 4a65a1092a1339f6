"""Models with parts compiled by torch.compile, against the textbook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import textbook
import torch
from harness import Recorder
from models import Automatic, learn_from_textbook
from torch import nn

T, STEPS = 3, 10
NAMES = ["seg", "depth", "normal"]
COMPILING = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's own
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
]
"""The marks of all that compiles."""


def _own_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return super(type(self), self).forward(x)


def wrapped(*names: str, **options: Any) -> Callable[[Any, str], Any]:
    def compiled(model: Any, backend: str) -> Any:
        for name in names:
            parent, _, attribute = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, attribute, torch.compile(getattr(owner, attribute), backend=backend, **options))
        return model

    return compiled


def in_place(*names: str) -> Callable[[Any, str], Any]:
    """`.compile()` does nothing for classes of torch.nn itself, so these get their own class."""

    def compiled(model: Any, backend: str) -> Any:
        for name in names:
            module = model.get_submodule(name)
            if type(module).__module__.startswith("torch."):
                module.__class__ = type("Own", (type(module),), {"forward": _own_forward})
            model.get_submodule(name).compile(backend=backend)
        return model

    return compiled


def as_a_whole(model: Any, backend: str) -> Any:
    return torch.compile(model, backend=backend)


HEADS = [f"{task}_head" for task in NAMES]


def _shared(model: Automatic, name: str) -> list[nn.Parameter]:
    module = model.get_submodule(name)
    return [module.weight] if hasattr(module, "weight") else list(module.parameters())


def learn(make: Callable[[], Automatic], shared_layer: str, batches: list[Any]) -> tuple[Automatic, Any]:
    twin = make()
    return twin, learn_from_textbook(twin, batches, shared=_shared(twin, shared_layer))


def assert_same(recorder: Recorder, model: nn.Module, trajectory: textbook.Trajectory, twin: nn.Module) -> None:
    for found, expected in zip(recorder.weights, trajectory.weights, strict=True):
        assert found == pytest.approx(expected, abs=1e-8)
    state = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-8)
