"""A shared layer that the model no longer has is an error, and changes no weight."""

from __future__ import annotations

import pytest
from loops import Network, gradnorm_rule
from models import FEATURES, HIDDEN, vector_batches
from torch import nn

from lightning_gradnorm import Balancer

REPLACED = "the shared layer that Network had when training began has been replaced"


@pytest.mark.parametrize("heads", [False, True])
def test_a_layer_that_is_replaced_in_mid_training_is_an_error(heads: bool) -> None:
    model, (one, other) = Network(3), vector_batches(3, 2)
    balancer = Balancer(model, gradnorm_rule(), shared_layer="encoder.2", heads=model.heads() if heads else None)
    balancer.backward(model(one))
    balancer.step()
    before = balancer.weights
    assert len(set(before.values())) > 1
    model.encoder[2] = nn.Linear(HIDDEN, FEATURES).double()
    balancer.backward(model(other))
    with pytest.raises(ValueError, match=REPLACED):
        balancer.step()
    assert balancer.weights == before
