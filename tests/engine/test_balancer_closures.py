"""`Balancer` with optimizers that evaluate the losses several times in one step, by a closure or by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import textbook
import torch
from climbing import CLIMBERS
from loops import Network, distance, gradnorm_rule, parameter_distance
from models import Batch, vector_batches
from torch import Tensor
from torchjd.aggregation import UPGrad
from torchjd.scalarization import UW

from lightning_gradnorm import Balancer
from lightning_gradnorm.strategies import AggregationRule, ScalarizationRule

STEPS = 8


def by_the_textbook(optimizer: Any, batches: list[Batch], accumulate: int = 1) -> tuple[Network, list[dict]]:
    model = Network()
    W, made = [model.encoder[2].weight], optimizer(model.parameters())
    run = textbook.train(
        model, model.forward_for_textbook, batches, W, made, alpha=1.2, accumulate=accumulate, by_closure=True
    )
    return model, run.weights


def weighted(balancer: Balancer, losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([balancer.weights[task] * loss.detach() for task, loss in losses.items()]).sum()


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", None])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", CLIMBERS)
def test_a_closure_agrees_with_the_textbook(name: str, accumulate: int, heads: Any) -> None:
    batches = vector_batches(3, STEPS * accumulate)
    model = Network()
    optimizer = CLIMBERS[name](model.parameters())
    found = []
    with Balancer(model, gradnorm_rule(), shared_layer="encoder.2", heads=heads) as balancer:
        for start in range(0, len(batches), accumulate):

            def closure(start: int = start) -> Tensor:
                optimizer.zero_grad()
                values = []
                for batch in batches[start : start + accumulate]:
                    losses = model(batch)
                    balancer.backward(losses, backward=lambda loss: (loss / accumulate).backward())
                    values.append(weighted(balancer, losses))
                return torch.stack(values).mean()

            optimizer.step(closure)
            balancer.step()
            found.append(balancer.weights)
    twin, expected = by_the_textbook(CLIMBERS[name], batches, accumulate)
    assert distance(found, expected) <= 1e-9
    assert parameter_distance(model, twin) <= 1e-8
    assert balancer.rule.steps == STEPS


@pytest.mark.parametrize("rule", ["GradNorm", "UW", "UPGrad"])
def test_sam_by_hand_and_by_a_closure_are_the_same(rule: str) -> None:
    batches = vector_batches(3, STEPS)
    trained = []
    for by_hand in (True, False):
        model = Network()
        tasks = list(model.tasks)
        made: Any = {
            "GradNorm": gradnorm_rule(),
            "UW": ScalarizationRule(tasks, UW(3).double()),
            "UPGrad": AggregationRule(tasks, UPGrad()),
        }[rule]
        optimizer: Any = CLIMBERS["SAM"](model.parameters())
        with Balancer(model, made) as balancer:
            for batch in batches:
                evaluate = partial(_evaluate, balancer, model, optimizer, batch)
                if by_hand:
                    evaluate()
                    optimizer.first_step()
                    evaluate()
                    optimizer.second_step()
                else:
                    optimizer.step(evaluate)
                balancer.step()
            trained.append((balancer.weights, model))
    assert trained[0][0] == trained[1][0]
    assert parameter_distance(trained[0][1], trained[1][1]) == 0.0


def _evaluate(balancer: Balancer, model: Network, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    optimizer.zero_grad()
    balancer.backward(losses := model(batch))
    return torch.stack(list(losses.values())).sum()
