"""SegNet's decoder puts the maxima back to their positions in the encoder."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm.experiments.problems.dense.networks import SegNet
from lightning_gradnorm.experiments.problems.dense.networks.segnet import unpool


@pytest.mark.parametrize("size", [(6, 8), (7, 9), (2, 2)])
def test_unpooling_returns_each_maximum_to_its_place_and_leaves_zeros_elsewhere(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    pooled, taken_from = F.max_pool2d(x, 2, return_indices=True)
    expected = torch.zeros_like(x)
    for image, channel, i, j in itertools.product(range(2), range(3), range(size[0] // 2), range(size[1] // 2)):
        window = [
            (x[image, channel, 2 * i + a, 2 * j + b].item(), 2 * i + a, 2 * j + b) for a in (0, 1) for b in (0, 1)
        ]
        largest, row, column = max(window)
        expected[image, channel, row, column] = largest
    assert torch.equal(unpool(pooled, taken_from, x.shape[-2:]), expected)


def test_gradient_of_unpooling_is_that_of_torch() -> None:
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    pooled, taken_from = F.max_pool2d(x, 2, return_indices=True)
    ours, torchs = pooled.clone().requires_grad_(), pooled.clone().requires_grad_()
    # A Trainer(deterministic=True) of an earlier test has left it on; torch's own unpooling is not.
    torch.use_deterministic_algorithms(False)
    weights = torch.randn_like(x)
    (unpool(ours, taken_from, x.shape[-2:]) * weights).sum().backward()
    (F.max_unpool2d(torchs, taken_from, 2) * weights).sum().backward()
    assert ours.grad is not None
    assert torch.equal(ours.grad, torchs.grad)


@pytest.mark.parametrize("output_stride", [1, 4])
@pytest.mark.parametrize("size", [(64, 96), (45, 61)])
def test_each_stage_of_the_decoder_sees_values_only_where_its_pooling_found_maxima(
    output_stride: int, size: tuple[int, int]
) -> None:
    trunk = SegNet(output_stride, width=0.125)
    before_pooling: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []
    results: list[Tensor] = []

    def note_stage(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append((args[0], results[-1] if results else deepest[-1]))
        results.append(output)

    deepest: list[Tensor] = []
    for layer in trunk.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.register_forward_pre_hook(lambda module, args: before_pooling.append(args[0]))
            layer.register_forward_hook(lambda module, args, output: deepest.append(output[0]))
    for stage in trunk.decoder:
        stage.register_forward_hook(note_stage)
    with torch.no_grad():
        trunk(torch.rand(2, 3, *size))

    assert len(seen) == {1: 5, 4: 3}[output_stride]
    for pooled_map, (decoder_input, handed_up) in zip(reversed(before_pooling), seen, strict=False):
        assert decoder_input.shape == pooled_map.shape
        windows = pooled_map.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        answers = decoder_input.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        is_largest = windows == windows.amax(-1, keepdim=True)
        decided = is_largest.sum(-1) == 1  # ReLU makes windows that are all zero
        assert decided.float().mean() > 0.3
        assert torch.equal(answers.sum(-1), handed_up)
        assert torch.equal((answers * is_largest).sum(-1)[decided], handed_up[decided])
        assert (answers[~is_largest] == 0)[decided.unsqueeze(-1).expand_as(answers)[~is_largest]].all()


def test_shift_of_a_maximum_within_its_window_shifts_what_is_decoded() -> None:
    """Pooling forgets where in a window the maximum was; a network that reuses the places does not."""
    torch.manual_seed(0)
    trunk = SegNet(8, width=0.125).eval()
    maps = [torch.zeros(1, 64, 4, 4), torch.zeros(1, 64, 4, 4)]
    maps[0][..., ::2, ::2] = maps[1][..., 1::2, 1::2] = 1
    (encoded, here), (same, there) = (F.max_pool2d(m, 2, return_indices=True) for m in maps)
    assert torch.equal(encoded, same)
    stage = trunk.decoder[0]
    decoded = [stage(unpool(encoded, places, maps[0].shape[-2:])) for places in (here, there)]
    assert not torch.allclose(*decoded)


def test_decoder_is_the_mirror_image_of_the_encoder() -> None:
    trunk = SegNet(1)
    down = [(m.in_channels, m.out_channels) for m in trunk.features if isinstance(m, nn.Conv2d)]
    up = [(m.in_channels, m.out_channels) for stage in trunk.decoder for m in stage if isinstance(m, nn.Conv2d)]
    assert [(b, a) for a, b in reversed(up)][1:] == down[1:]
    assert up[-1] == (64, 64)
    assert len(up) == len(down) == 13
