"""Later in-place changes to a loss have no effect: adding losses up in place only changes the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Batches, Recorder
from models import Automatic, vector_batches
from torch import Tensor
from torchjd.scalarization import UW

from lightning_gradnorm import Balancer, FixedWeights, GradientNormMonitor, GradNorm, Scalarization
from lightning_gradnorm.strategies import GradNormRule

NAMES = ["seg", "depth", "normal"]
HEADS = {name: f"{name}_head" for name in NAMES}
LOGGED = {name: f"train/{name}" for name in NAMES}


def added_in_place(losses: dict[str, Tensor]) -> Tensor:
    total = losses["seg"]
    total += losses["depth"]
    total += losses["normal"]
    return total


def scaled_in_place(losses: dict[str, Tensor]) -> Tensor:
    losses["depth"] *= 0.1
    return sum(losses.values())


SUMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "loss += other": (added_in_place, lambda losses: losses["seg"] + losses["depth"] + losses["normal"]),
    "loss *= 0.1": (scaled_in_place, lambda losses: losses["seg"] + 0.1 * losses["depth"] + losses["normal"]),
}


class Adds(Automatic):
    """Shows its losses, by logging or by `watch`, and adds them up afterwards."""

    def __init__(self, add: Callable[[dict[str, Tensor]], Tensor], callback: Any = None) -> None:
        super().__init__(3)
        self.add, self.callback = add, [callback]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.task_losses(batch)
        if self.callback[0] is None:
            for name, loss in losses.items():
                self.log(LOGGED[name], loss)
        else:
            self.callback[0].watch(losses)
        return self.add(losses)


def callback(kind: str, tasks: Any) -> Any:
    return {
        "GradNorm": lambda: GradNorm(tasks, heads=None),
        "GradNorm with heads": lambda: GradNorm(tasks, heads=HEADS),
        "GradNorm alone": lambda: GradNorm(tasks),
        "FixedWeights": lambda: FixedWeights({"seg": 1.5, "depth": 0.5, "normal": 1.0}, tasks=tasks),
        "UW": lambda: Scalarization(UW, tasks),
        "monitor": lambda: GradientNormMonitor(tasks, parameters="encoder", every_n_steps=1),
    }[kind]()


@pytest.mark.each_value_once
@pytest.mark.parametrize("kind", ["GradNorm", "GradNorm with heads", "GradNorm alone", "FixedWeights", "UW"])
@pytest.mark.parametrize("form", list(SUMS))
@pytest.mark.parametrize("watches", [False, True], ids=["logged", "watched"])
def test_it_trains_as_with_a_separate_sum(kind: str, form: str, watches: bool, quiet_trainer: Any) -> None:
    found = []
    for add in SUMS[form]:
        balancing = callback(kind, NAMES if watches else LOGGED)
        model = Adds(add, balancing if watches else None)
        recorder = Recorder(balancing)
        quiet_trainer(callbacks=[balancing, recorder]).fit(model, Batches(vector_batches(3, 5)))
        found.append((recorder.weights, {name: value.clone() for name, value in model.state_dict().items()}))
    (weights, state), (expected, expected_state) = found
    for step, of_twin in zip(weights, expected, strict=True):
        assert step == pytest.approx(of_twin, abs=1e-12)
    for name, value in state.items():
        torch.testing.assert_close(value, expected_state[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", list(SUMS))
def test_the_monitor_refuses_it_by_name(form: str, quiet_trainer: Any) -> None:
    changed = "seg" if form == "loss += other" else "depth"
    monitor = callback("monitor", LOGGED)
    with pytest.raises(ValueError, match=f"GradientNormMonitor: the loss '{changed}' has been changed in place.*Write"):
        quiet_trainer(callbacks=[monitor]).fit(Adds(SUMS[form][0]), Batches(vector_batches(3, 2)))


def test_a_balancer_that_is_to_add_them_up_refuses_it_by_name() -> None:
    model, (batch,) = Automatic(3), vector_batches(3, 1)
    with Balancer(model, GradNormRule(NAMES)) as balancer:
        losses = model.task_losses(batch)
        balancer.watch(losses)
        total = added_in_place(losses)
        with pytest.raises(ValueError, match=r"Balancer: the loss of task .seg. has been changed in place.*loss=…"):
            balancer.backward()
        losses = model.task_losses(batch)
        balancer.watch(losses)
        total = added_in_place(losses)
        balancer.backward(loss=total)
        balancer.step()
    assert sum(balancer.weights.values()) == pytest.approx(3)
