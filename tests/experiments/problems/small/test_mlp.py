"""The MLP matches the paper's trunk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradnorm.experiments.problems.small import MLP


def test_default_is_four_layers_of_100_relu_units() -> None:
    trunk = MLP(250)
    shapes = [tuple(layer.weight.shape) for layer in trunk.modules() if isinstance(layer, nn.Linear)]
    assert shapes == [(100, 250), (100, 100), (100, 100), (100, 100)]
    representation = trunk(torch.randn(8, 250))
    assert representation.shape == (8, 100)
    assert (representation >= 0).all()
    assert (representation == 0).any()


def test_forward_is_affine_then_activation_layer_by_layer() -> None:
    trunk = MLP(3, hidden=(5, 4), out_features=2, activation=nn.Tanh)
    x = expected = torch.randn(7, 3)
    for layer in [module for module in trunk.modules() if isinstance(module, nn.Linear)]:
        expected = torch.tanh(expected @ layer.weight.T + layer.bias)
    assert torch.allclose(trunk(x), expected, atol=1e-6)
    assert trunk.out_features == 2


def test_last_weight_matrix_belongs_to_the_layer_that_makes_the_representation() -> None:
    trunk = MLP(3, hidden=(5, 4))
    last = [module for module in trunk.modules() if getattr(module, "weight", None) is not None][-1]
    assert last.weight.shape == (4, 5)


@pytest.mark.parametrize("wrong", [{"hidden": ()}, {"hidden": (10, 0)}, {"in_features": 0}, {"out_features": 0}])
def test_layer_without_units_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"MLP: in_features, hidden and out_features should be positive"):
        MLP(**{"in_features": 3, **wrong})
