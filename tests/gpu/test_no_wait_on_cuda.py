"""The host does not wait for the GPU: `pytest -m gpu`. The CPU version checks that no number is requested from the device."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import pytest
import torch
from devices import NAMES, STEPS, MakeTrainer, fit, make, on_each_device
from harness import Batches, NoNumberIsAskedFor
from models import (
    Manual,
)

from lightning_gradnorm.strategies import GradNormRule


@pytest.fixture
def as_on_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a CPU do as a GPU does: do not look at each weight update at once."""
    if device == "cpu":
        monkeypatch.setattr(GradNormRule, "syncs_every_step", False)


@contextmanager
def waiting_is_an_error(device: str) -> Iterator[None]:
    if device == "cpu":
        with NoNumberIsAskedFor():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Watched(L.Callback):
    """An error if the host waits for the device in backward passes, or in whole batches: forward to optimizer step."""

    def __init__(self, device: str, *, backward: bool = False, batches: Collection[int] = ()) -> None:
        self.device, self.backward, self.batches = device, backward, batches
        self.watched = 0
        self.open = ExitStack()

    def _begin(self) -> None:
        self.open.enter_context(waiting_is_an_error(self.device))
        self.watched += 1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.batches:
            self._begin()

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        if (
            self.backward and trainer.fit_loop.total_batch_idx
        ):  # in the first batch the layer and the heads are looked for
            self._begin()

    def on_after_backward(self, *args: Any) -> None:
        if self.backward:
            self.open.close()

    def on_train_batch_end(self, *args: Any) -> None:
        self.open.close()

    def on_exception(self, *args: Any) -> None:
        self.open.close()


@on_each_device(
    "mode",
    ["automatic", "automatic with heads", "manual", "activation with heads"],
    quick=["automatic", "automatic with heads"],
)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_backward_pass_waits_for_the_device(mode: str, make_trainer: MakeTrainer, device: str) -> None:
    model, gradnorm, batches = make(mode)
    watched = Watched(device, backward=True)
    fit(make_trainer, model, gradnorm, batches, callbacks=[watched])
    assert watched.watched == STEPS - 1


@pytest.mark.parametrize("update_every", [1, 4])
@pytest.mark.parametrize("mode", ["automatic", "automatic with heads", "activation with heads", "manual with heads"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_step_waits_for_the_device(mode: str, update_every: int, make_trainer: MakeTrainer, device: str) -> None:
    """But the first, in which L_i(0) is looked at, and the last of an epoch, which is logged."""
    model, gradnorm, batches = make(mode)
    gradnorm.update_every = update_every
    watched = Watched(device, batches=range(1, STEPS - 1))
    if isinstance(model, Manual):
        model.gradnorm = [gradnorm]
    make_trainer(callbacks=[watched, gradnorm], log_every_n_steps=2 * STEPS).fit(model, Batches(batches))
    assert watched.watched == STEPS - 2
    assert gradnorm.weights != dict.fromkeys(NAMES, 1.0)
