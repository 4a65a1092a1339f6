"""A training with `Aggregation` and the same by hand, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import by_hand
import lightning as L
import pytest
import torch
from harness import Batches, BeforeBatch, assert_clean, state_by_part, traces
from minima import exactly
from models import (
    Automatic,
    network_sgd,
    vector_batches,
)
from torch import Tensor, nn

from lightning_gradnorm import Aggregation

MakeTrainer = Callable[..., L.Trainer]
T, STEPS = 3, 12
NAMES = ["seg", "depth", "normal"]
EVERYWHERE = pytest.mark.parametrize("at", ["representation", "parameters"])
WITH_AND_WITHOUT_HEADS = pytest.mark.parametrize("with_heads", [True, False], ids=["heads", "no heads"])


class Weights(L.Callback):
    """Notes the weights after each optimizer step, and the norms that are logged with them."""

    def __init__(self, callback: Aggregation) -> None:
        self.callback = callback
        self.weights: list[dict[str, float]] = []
        self.norms: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step > len(self.weights):
            self.weights.append(self.callback.weights)
            shown = trainer.callback_metrics
            self.norms.append({t: shown[f"balancing/grad_norm/{t}"].item() for t in NAMES})


def worst(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert found.keys() == expected.keys()
    return max((torch.as_tensor(found[k] - expected[k]).abs().sum().item() for k in expected), default=0.0)


def assert_same(
    noted: Weights,
    model: nn.Module,
    hand: by_hand.ByHand,
    twin: nn.Module,
    tolerance: float = 1e-8,
    state: Callable[[nn.Module], dict[str, Tensor]] = state_by_part,
    norms_from: int = 0,
) -> None:
    """The network at the end, and the weights and norms after each step, are those found by hand."""
    difference = worst(state(model), state(twin))
    assert difference <= tolerance, f"the networks differ by {difference}"
    assert len(noted.weights) == len(hand.weights)
    assert (
        max(worst(f, e) for f, e in zip(noted.norms[norms_from:], hand.norms[norms_from:], strict=True)) <= 1e-5
    )  # logged in float32
    if noted.callback.rule.has_weights:
        differences = [worst(f, e) for f, e in zip(noted.weights, hand.weights, strict=True)]
        assert max(differences) <= 1e-6, f"the weights differ by {differences}"


def train_both(
    quiet_trainer: MakeTrainer,
    made: Callable[[], Any],
    *,
    kind: Callable[[], Any] = lambda: Automatic(T),
    batches: list[Any] | None = None,
    at: str = "representation",
    with_heads: bool = True,
    scalarizer: Callable[[], nn.Module] | None = None,
    before_batch: Callable[[int], object] = lambda index: None,
    coefficients: Any = None,
    accumulate: int = 1,
    clip: float | None = None,
    check: bool = True,
    tolerance: float = 1e-8,
    numbered: bool = False,
    norms_from: int = 0,
) -> tuple[Weights, Any]:
    batches = batches or vector_batches(T, STEPS)
    twin = kind()
    hand = by_hand.aggregate(
        twin,
        twin.forward_for_textbook,
        list(enumerate(batches)) if numbered else batches,
        exactly(made()),
        network_sgd(twin.parameters()),
        tasks=NAMES,
        at=at,
        scalarizer=None if scalarizer is None else scalarizer().double(),
        before_batch=before_batch,
        coefficients=coefficients,
        accumulate=accumulate,
        clip=clip,
    )
    torch.manual_seed(0)
    model = kind()
    callback = Aggregation(
        made(),
        NAMES,
        heads=model.heads() if with_heads else None,
        at=at,  # type: ignore[arg-type]
        scalarizer=None if scalarizer is None else scalarizer(),
    )
    noted, before = Weights(callback), traces(model)
    trainer = quiet_trainer(
        callbacks=[BeforeBatch(before_batch), callback, noted],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    trainer.fit(model, Batches(batches))
    if check:
        assert_same(noted, model, hand, twin, tolerance, norms_from=norms_from)
        assert callback.rule.fallbacks == 0
    assert_clean(model, before)
    return noted, model


WITH_EVERYTHING = pytest.mark.parametrize(
    ("at", "with_heads"),
    [
        pytest.param("representation", True, id="representation, heads"),
        pytest.param("parameters", False, id="parameters, no heads"),
        pytest.param("representation", False, id="representation, no heads", marks=pytest.mark.slow),
        pytest.param("parameters", True, id="parameters, heads", marks=pytest.mark.slow),
    ],
)
