"""When a step ends, its losses and their graph are freed at once: nothing of ours holds them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from loops import Network, gradnorm_rule
from models import TASKS, vector_batches
from torchjd.aggregation import UPGrad

from lightning_gradnorm import Balancer
from lightning_gradnorm.strategies import AggregationRule, FixedRule

RULES: dict[str, Callable[[], Any]] = {
    "GradNorm": gradnorm_rule,
    "fixed": lambda: FixedRule(dict.fromkeys(TASKS[:3], 2.0)),
    "UPGrad": lambda: AggregationRule(TASKS[:3], UPGrad()),
}


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_no_loss_outlives_its_step(name: str, heads: bool) -> None:
    model = Network(3)
    with Balancer(model, RULES[name](), heads=model.heads() if heads else None) as balancer:
        for batch in vector_batches(3, 3):
            losses = model(batch)
            held = [weakref.ref(loss) for loss in losses.values()]
            balancer.backward(losses)
            assert all(one() is not None for one in held)
            balancer.step()
            del losses
            assert [one() for one in held] == [None, None, None]
