"""Do two checkpoints hold the same training?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def content(checkpoint: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    return loaded


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from leaves(value, f"{path}.{index}")
    else:
        yield path, node


def assert_same(found: Path, expected: Path) -> None:
    """All that training depends on: network, its optimizer, GradNorm's state, the places of the loops and the data."""

    def state(checkpoint: Path) -> dict[str, Any]:
        loaded = content(checkpoint)
        kept = {key: value for key, value in loaded.items() if key not in ("callbacks", "hyper_parameters")}
        return dict(leaves({**kept, "GradNorm": loaded["callbacks"]["GradNorm"]}))

    first, second = state(found), state(expected)
    assert first.keys() == second.keys()
    for part in ("state_dict.encoder", "optimizer_states.0.state.0.exp_avg_sq", "GradNorm.optimizer.state.0.exp_avg"):
        assert any(name.startswith(f".{part}") for name in first), part
    assert {".GradNorm.weights", ".GradNorm.initial_losses", ".GradNorm.weights_mean"} <= first.keys()
    for name, value in first.items():
        is_tensor = isinstance(value, torch.Tensor)
        same = torch.equal(value, second[name]) if is_tensor else value == second[name]
        assert same, f"{name}: {value} instead of {second[name]}"


def farthest(found: Path, expected: Path) -> tuple[float, float]:
    """The largest differences of a task's weight and of a parameter of the network."""
    weights, network = 0.0, 0.0
    one, other = content(found), content(expected)
    assert one["global_step"] == other["global_step"] > 0
    state, other_state = one["callbacks"]["GradNorm"], other["callbacks"]["GradNorm"]
    for name in ("weights", "weights_mean"):
        weights = max(weights, float((state[name] - other_state[name]).abs().max()))
    assert (state["weights"] - 1).abs().max() > 1e-3  # there is something to agree about
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, value in one["state_dict"].items():
        network = max(network, float((value - other["state_dict"][name]).abs().max()))
    return weights, network
