"""Heads predict maps of the requested size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import case
from network_sizes import count_parameters
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from lightning_gradnorm.experiments.problems.dense.networks import ConvHead, DeepLabHead

each_head = pytest.mark.parametrize("head", [ConvHead, DeepLabHead])


@each_head
@pytest.mark.parametrize("size", [None, (6, 10), (12, 20), (45, 61), [3, 5]])
def test_prediction_has_the_size_asked_for(head: Callable[..., nn.Module], size: Any) -> None:
    prediction = head(8, 13, size=size)(torch.rand(2, 8, 6, 10))
    assert prediction.shape == (2, 13, *(size or (6, 10)))


@each_head
def test_size_may_come_from_a_configuration_file(head: Callable[..., nn.Module]) -> None:
    size = OmegaConf.create({"size": [12, 20]}).size
    assert head(8, 1, size=size)(torch.rand(2, 8, 6, 10)).shape == (2, 1, 12, 20)


def test_one_layer_is_a_matrix_at_each_pixel() -> None:
    head = ConvHead(8, 3)
    weight, bias = head.parameters()
    z = torch.rand(2, 8, 6, 10)
    expected = torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], z) + bias[:, None, None]
    torch.testing.assert_close(head(z), expected)
    assert count_parameters(head) == 3 * 8 + 3


def test_hidden_layer_is_a_3_by_3_convolution() -> None:
    head = ConvHead(8, 3, hidden=16)
    assert count_parameters(head) == 8 * 16 * 9 + 2 * 16 + 16 * 3 + 3


def test_corners_stay_where_they_are_when_a_map_is_enlarged() -> None:
    z = torch.rand(1, 2, 3, 4)
    head = ConvHead(2, 1, size=(5, 7))
    small, large = ConvHead.forward(head, z), head.layers(z)
    assert torch.allclose(small[..., ::2, ::2], large, atol=1e-6)
    between = (large[..., :, :-1] + large[..., :, 1:]) / 2
    assert torch.allclose(small[..., ::2, 1::2], between, atol=1e-6)


def test_deeplab_head_has_the_parameters_of_torchvisions() -> None:
    with torch.device("meta"):
        # 1 x 1, three 3 x 3 and the mean, each to 256; 5 · 256 to 256; 3 x 3; eight batch norms less one... counted by hand
        branches = 2048 * 256 * (1 + 3 * 9 + 1)
        after = 5 * 256 * 256 + 256 * 256 * 9 + 256 * 13 + 13
        norms = 7 * 2 * 256
        assert count_parameters(DeepLabHead(2048, 13)) == branches + after + norms == 16_128_781


def test_deeplab_head_sees_far_and_the_whole_image() -> None:
    head = DeepLabHead(4, 1, channels=8, rates=(2, 3), dropout=0).eval()
    z = torch.rand(1, 4, 24, 24)
    changed = z.clone()
    changed[..., 0, 0] += 1
    assert not torch.allclose(head(z)[..., 23, 23], head(changed)[..., 23, 23], atol=1e-6)
    pyramid: Any = head.layers[0]
    by_branch = [branch(changed) - branch(z) for branch in pyramid.branches]
    reached = [sorted(set(torch.nonzero(change[0].abs().sum(0)).flatten().tolist())) for change in by_branch]
    assert reached == [[0], [0, 2], [0, 3]]


def test_dropout_is_for_training_only() -> None:
    head = DeepLabHead(8, 3, channels=16)
    z = torch.rand(2, 8, 6, 10)
    assert not torch.equal(head(z), head(z))
    head.eval()
    assert torch.equal(head(z), head(z))


def test_batch_of_one_image_is_refused_by_the_deeplab_head_in_training_alone() -> None:
    head = DeepLabHead(8, 3)
    with pytest.raises(
        ValueError, match=r"DeepLabHead: a training batch should have 2 images or more.*; got 1\. .*drop"
    ):
        head(torch.rand(1, 8, 6, 10))
    assert head.eval()(torch.rand(1, 8, 6, 10)).shape == (1, 3, 6, 10)


@pytest.mark.parametrize(
    ("head", "wrong", "message"),
    [
        case("no channels", ConvHead, {"in_channels": 0}, r"ConvHead: in_channels should be a positive integer; got 0"),
        case("no hidden", ConvHead, {"hidden": 0}, r"ConvHead: hidden should be a positive integer; got 0"),
        case("one side", ConvHead, {"size": (80,)}, r"ConvHead: size should be None or \(height, width\); got \(80,\)"),
        case("empty side", DeepLabHead, {"size": (80, 0)}, r"DeepLabHead: size should be .*; got \(80, 0\)"),
        case(
            "half a class", DeepLabHead, {"out_channels": 1.5}, r"out_channels should be a positive integer; got 1\.5"
        ),
        case("rate 0", DeepLabHead, {"rates": (0, 1)}, r"rates should be positive integers; got \[0, 1\]"),
    ],
)
def test_number_out_of_range_is_refused(head: Callable[..., nn.Module], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head(**{"in_channels": 4, "out_channels": 2, **wrong})


@each_head
def test_the_representation_does_not_change(head: Callable[..., nn.Module]) -> None:
    z = torch.rand(2, 8, 6, 10)
    before = z.clone()
    F.mse_loss(head(8, 3, size=(12, 20))(z), torch.zeros(2, 3, 12, 20)).backward()
    assert torch.equal(z, before)
