"""The convolutional trunk takes any small image and ends in a linear layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_gradnorm.experiments.problems.small import ConvEncoder


@pytest.mark.parametrize("size", [(8, 8), (9, 17), (28, 28), (36, 36), (64, 48)])
@pytest.mark.parametrize("channels", [(32, 64, 64), (6,), (5, 7, 9, 11)])
def test_images_of_any_size_become_vectors(size: tuple[int, int], channels: tuple[int, ...]) -> None:
    encoder = ConvEncoder(in_channels=3, channels=channels, out_features=10)
    representation = encoder(torch.rand(2, 3, *size))
    assert representation.shape == (2, encoder.out_features) == (2, 10)
    assert (representation >= 0).all()


def test_last_weight_matrix_is_that_of_the_linear_layer() -> None:
    weights = [m for m in ConvEncoder().modules() if getattr(m, "weight", None) is not None and m.weight.dim() >= 2]
    assert isinstance(weights[-1], nn.Linear)
    assert weights[-1].weight.shape == (128, 64 * 16)


def test_a_sample_has_the_same_encoding_in_any_batch_and_mode() -> None:
    encoder = ConvEncoder()
    images = torch.rand(4, 1, 36, 36)
    whole = encoder(images)
    assert torch.allclose(encoder(images[:1]), whole[:1], atol=1e-5)
    assert torch.equal(encoder.eval()(images), whole)


def test_representation_tells_where_a_thing_is() -> None:
    images = torch.zeros(2, 1, 36, 36)
    images[0, 0, 4:10, 4:10] = images[1, 0, 26:32, 26:32] = 1
    here, there = ConvEncoder()(images)
    assert not torch.allclose(here, there, atol=1e-3)


def test_every_parameter_gets_a_gradient() -> None:
    encoder = ConvEncoder()
    encoder(torch.rand(8, 1, 36, 36)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


@pytest.mark.parametrize("wrong", [{"channels": ()}, {"channels": (8, 0)}, {"in_channels": 0}, {"out_features": 0}])
def test_number_that_is_not_positive_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"ConvEncoder: in_channels, channels and out_features should be positive"):
        ConvEncoder(**wrong)
