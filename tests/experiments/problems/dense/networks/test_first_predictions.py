"""Predictions of a dense head before training."""

from __future__ import annotations

import pytest
import torch

from lightning_gradnorm.experiments.problems.dense.networks import ConvHead, DeepLabHead, SegNet
from lightning_gradnorm.experiments.problems.dense.networks.heads import DenseHead


@pytest.mark.parametrize("out_channels", [1, 3, 13, 48])
@pytest.mark.parametrize("head", [ConvHead, DeepLabHead])
def test_first_predictions_are_of_order_one_for_every_task(head: type[DenseHead], out_channels: int) -> None:
    torch.manual_seed(0)
    options = {"channels": 32} if head is DeepLabHead else {}
    representation = torch.randn(8, 64, 16, 16).relu()  # mean square 1/2
    predictions = torch.cat([head(64, out_channels, **options)(representation).flatten() for _ in range(20)])
    assert 0.3 < predictions.square().mean().sqrt() < 1.5


def test_the_first_depths_of_segnet_are_meters_off_not_tens_of_meters() -> None:
    torch.manual_seed(0)
    trunk = SegNet(width=0.25)
    depths = ConvHead(trunk.out_channels, 1)(trunk(torch.rand(4, 3, 64, 64)))
    assert depths.abs().max() < 10
