"""Shared by the tests of wrong inputs: the names of the three tasks, and a fit that must fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
from harness import Batches, assert_clean, assert_says, traces
from models import (
    vector_batches,
)
from torch import Tensor

MakeTrainer = Callable[..., L.Trainer]
Losses = dict[str, Tensor]
TASKS = ["seg", "depth", "normal"]
HEADS = {task: f"{task}_head" for task in TASKS}
ONES = dict.fromkeys(TASKS, 1.0)
LOGGED = {task: f"train/{task}_loss" for task in TASKS}


def fails(
    trainer: MakeTrainer,
    model: L.LightningModule,
    callback: L.Callback | list[L.Callback],
    *expected: str,
    batches: list[Any] | None = None,
    error: type[Exception] | tuple[type[Exception], ...] = (ValueError, TypeError),
    **options: Any,
) -> None:
    """Fit, and check that it fails with a message holding all of `expected` and leaves nothing on the model."""
    callbacks = callback if isinstance(callback, list) else [callback]
    before = traces(model)
    with pytest.raises(error) as raised:
        trainer(callbacks=callbacks, **options).fit(model, Batches(batches or vector_batches(3, 4)))
    assert_says(raised.value, *expected)
    assert_clean(model, before)
