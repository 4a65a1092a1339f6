"""The device that a test runs on, and a Trainer for it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from devices import CUDA, MakeTrainer


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=CUDA)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device's type; float32 is float32 on it, not TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield request.param
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.fixture
def make_trainer(quiet_trainer: MakeTrainer, device: str) -> MakeTrainer:
    """`quiet_trainer` on the device."""
    return partial(quiet_trainer, accelerator="gpu" if device == "cuda" else "cpu")
