"""Optimizers with a train() and an eval() mode, such as schedule-free ones: allowed for a network, but not for weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import Batches
from models import TASKS, Automatic, vector_batches
from torch import Tensor
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm import Aggregation, GradNorm, Scalarization
from lightning_gradnorm.strategies import GradNormRule, ScalarizationRule

NAMES = TASKS[:2]


class ScheduleFree(torch.optim.Optimizer):
    """Steps on averaged points as Defazio et al. do (arXiv 2405.15682): the parameters are y in training, x in evaluation."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "is_training": False, "count": 0})

    def _go_to(self, is_training: bool, weight: float) -> None:
        for group in self.param_groups:  # what Lightning wraps shares these with its wrapper, and no attributes
            for parameter in group["params"] if group["is_training"] != is_training else ():
                z = self.state[parameter].setdefault("z", parameter.detach().clone())
                parameter.data.lerp_(z, weight)
            group["is_training"] = is_training

    def train(self) -> None:
        self._go_to(True, 0.1)

    def eval(self) -> None:
        self._go_to(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if not group["is_training"]:
                raise RuntimeError("Optimizer was not in train mode when step is called.")
            group["count"] += 1
            for parameter in group["params"]:
                z: Tensor = self.state[parameter].setdefault("z", parameter.detach().clone())
                parameter.lerp_(z, 1 / group["count"]).add_(parameter.grad, alpha=-0.9 * group["lr"])
                z.add_(parameter.grad, alpha=-group["lr"])
        return loss


REFUSED: dict[str, tuple[str, Any]] = {
    "GradNorm": ("GradNorm", lambda: GradNorm(NAMES, shared_layer="encoder.2", optimizer=ScheduleFree)),
    "a partial": ("GradNorm", lambda: GradNorm(NAMES, optimizer=partial(ScheduleFree, lr=0.1))),
    "Scalarization": ("Scalarization", lambda: Scalarization(S.UW, NAMES, optimizer=ScheduleFree)),
    "Aggregation": ("Aggregation", lambda: Aggregation(A.UPGrad, NAMES, scalarizer=S.UW, optimizer=ScheduleFree)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_for_weights_and_scalarizers_the_error_names_it_and_suggests_an_alternative(
    case: str, quiet_trainer: Any
) -> None:
    name, make = REFUSED[case]
    with pytest.raises(ValueError, match="ScheduleFree has modes") as error:
        quiet_trainer(callbacks=[make()]).fit(Automatic(2), Batches(vector_batches(2, 3)))
    assert str(error.value).startswith(f"{name}: optimizer should make a torch optimizer")
    assert "optimizer=partial(torch.optim.Adam, lr=0.025)" in str(error.value)
    assert "For the network's parameters ScheduleFree is fine" in str(error.value)


def test_a_rule_is_refused_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="ScheduleFree has modes"):
        GradNormRule(NAMES, optimizer=ScheduleFree)
    with pytest.raises(ValueError, match="ScheduleFree has modes"):
        ScalarizationRule(NAMES, S.UW(2), optimizer=ScheduleFree)
    assert ScalarizationRule(NAMES, S.GeometricMean(), optimizer=ScheduleFree)._optimizer is None  # nothing to learn


class TrainsFree(Automatic):
    """The network is trained without a schedule."""

    def on_train_epoch_start(self) -> None:
        optimizer: Any = self.optimizers()
        optimizer.train()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ScheduleFree(self.parameters())


def test_for_the_network_it_is_fine(quiet_trainer: Any) -> None:
    found = []
    for heads in ("auto", None):
        gradnorm, model = GradNorm(NAMES, shared_layer="encoder.2", heads=heads), TrainsFree(2)
        quiet_trainer(callbacks=[gradnorm]).fit(model, Batches(vector_batches(2, 12)))
        found.append(gradnorm.weights)
        assert max(abs(one - 1) for one in gradnorm.weights.values()) > 0.01
    assert found[0] == pytest.approx(found[1], abs=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "error", "told"),
    [
        (lambda p: None, TypeError, "it returned NoneType"),
        (lambda: None, TypeError, "calling it failed"),
        (torch.optim.LBFGS, ValueError, "LBFGS does not step by their gradient alone"),
    ],
)
def test_a_non_optimizer_for_a_scalarizers_parameters_is_an_error(optimizer: Any, error: Any, told: str) -> None:
    with pytest.raises(error, match=f"Scalarization: optimizer should make a torch optimizer .*{told}"):
        ScalarizationRule(NAMES, S.UW(2), optimizer=optimizer)
