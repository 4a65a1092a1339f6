"""Two processes that share one network between them (FSDP2, `ModelParallelStrategy`) give the weights of one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Automatic, vector_batches
from ranks import shares, train
from sharded import train_sharded
from strategies import STRATEGIES

from lightning_gradnorm import GradNorm

STEPS, T = 12, 3
TASKS = ["seg", "depth", "normal"]


@cache
def _alone(norm_of: Any) -> Any:
    model = Automatic(T)
    gradnorm = GradNorm(TASKS, shared_layer="encoder.2", heads=model.heads(), norm_of=norm_of)
    steps = [shares(batch, 1, 1) for batch in vector_batches(T, STEPS, size=8)]
    (one,) = train(model, gradnorm, steps)
    return one


ALL: Sequence[tuple[str, dict[str, Any]]] = [
    ("layers within the encoder", {"accumulate": 2}),
    ("encoder and heads", {}),
    ("encoder and heads", {"manual": True, "accumulate": 2}),
    ("encoder and heads", {"options": {"norm_of": "activation"}}),
    ("each layer", {}),
    ("layers within the encoder", {}),
]


@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}, {options}", marks=[pytest.mark.slow] if place else [])
        for place, (case, options) in enumerate(ALL)
    ],
)
def test_two_processes_that_share_the_network_give_the_weights_of_one(
    case: str, options: dict[str, Any], tmp_path: Path
) -> None:
    failures = train_sharded(tmp_path, case, **options)
    assert not failures, failures[0]
    one = _alone(options.get("options", {}).get("norm_of", "weight"))
    assert max(abs(weight - 1) for weight in one.weights[-1].values()) > 0.05
    for rank in (0, 1):
        told = torch.load(tmp_path / f"{rank}.pt")
        assert told["sharded"]
        for found, expected in zip(told["weights"], one.weights, strict=True):
            assert found == pytest.approx(expected, abs=1e-9)
        for name, value in one.network.items():
            torch.testing.assert_close(told["network"][name], value, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_sharded_heads_that_are_not_named_are_refused(tmp_path: Path) -> None:
    failures = train_sharded(tmp_path, "encoder and heads", heads=False)
    assert "through a module sharded by FSDP, which cannot be passed twice. Name the heads with heads=" in "".join(
        failures
    )


# ---- other strategies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "case", "accumulate", "heads"),
    [
        ("UPGrad at the representation", "layers within the encoder", 2, True),
        pytest.param("UPGrad at the representation", "each layer", 1, True, marks=pytest.mark.slow),
        pytest.param("UPGrad at the representation", "encoder and heads", 1, True, marks=pytest.mark.slow),
        pytest.param("IMTL", "encoder and heads", 1, True, marks=pytest.mark.slow),
        pytest.param("UW of the losses", "encoder and heads", 1, False, marks=pytest.mark.slow),
        pytest.param("FAMO of the losses", "layers within the encoder", 2, True, marks=pytest.mark.slow),
    ],
)
def test_a_strategy_on_processes_that_shard_the_network_matches_one_process(
    strategy: str, case: str, accumulate: int, heads: bool, tmp_path: Path
) -> None:
    failures = train_sharded(tmp_path, case, strategy=strategy, accumulate=accumulate, heads=heads)
    assert not failures, failures[0]
    model = Automatic(T)
    balancing = STRATEGIES[strategy](tasks=TASKS, heads=model.heads() if heads else None)
    steps = [
        [[{k: torch.cat([one[k] for one in of_ranks]) for k in of_ranks[0]} for of_ranks in zip(*step, strict=True)]]
        for step in (shares(batch, 2, accumulate) for batch in vector_batches(T, STEPS, size=8))
    ]
    (one,) = train(model, balancing, steps)
    for rank in (0, 1):
        told = torch.load(tmp_path / f"{rank}.pt")
        assert told["sharded"]
        for found, expected in zip(told["weights"], one.weights, strict=True):
            assert found == pytest.approx(expected, abs=1e-9)
        for name, value in one.network.items():
            torch.testing.assert_close(told["network"][name], value, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_gradients_at_parameters_that_are_sharded_are_refused(tmp_path: Path) -> None:
    failures = train_sharded(tmp_path, "encoder and heads", strategy="UPGrad at the parameters")
    assert "at='parameters' needs whole gradients, but ModelParallelStrategy shards" in "".join(failures)
