"""The networks to time: a trunk, one head per task, and a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from typing_extensions import override

from lightning_gradnorm.experiments.problems.dense.networks import ConvHead, FCNResNet50, SegNet
from lightning_gradnorm.experiments.problems.dense.tasks import OUT_CHANNELS
from lightning_gradnorm.experiments.problems.engines.network import EngineEncoder, health_head, rul_head
from lightning_gradnorm.experiments.problems.pde import Burgers, TanhMLP
from lightning_gradnorm.experiments.problems.small import MLP


@dataclass(frozen=True)
class Network:
    """A trunk, one head per task, and a batch large enough that a step takes a while.

    Args:
        trunk: creates the trunk.
        head: creates the head of the i-th task.
        batch: shape of a batch.
        shared_layer: dotted name of the last shared layer in a model whose trunk is called ``encoder``.
        steps: default number of steps per run.
        warm_up: number of these steps that are not measured.
        block: number of steps timed together, a multiple of the steps between two updates of the weights.
    """

    trunk: Callable[[], nn.Module]
    head: Callable[[int], nn.Module]
    batch: tuple[int, ...]
    shared_layer: str
    steps: int = 33
    warm_up: int = 8
    block: int = 8


def convolutions() -> nn.Sequential:
    channels, strides = [3, 16, 32, 32, 64, 64, 64], [1, 2, 1, 2, 1, 1]
    layers: list[nn.Module] = []
    for here, there, stride in zip(channels, channels[1:], strides, strict=False):
        layers += [nn.Conv2d(here, there, 3, padding=1, stride=stride), nn.ReLU()]
    return nn.Sequential(*layers)


class Transformer(nn.TransformerEncoder):
    """Six layers and the mean over the tokens. Without dropout, attention uses torch's fused kernel."""

    def __init__(self, width: int = 128) -> None:
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        super().__init__(layer, 6, enable_nested_tensor=False)

    @override
    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens).mean(1)


def classifier(task: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def upsampling(task: int) -> nn.Module:
    up = nn.Upsample(scale_factor=2)
    first, second, third = (nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise((64, 32, 16, 1)))
    return nn.Sequential(first, nn.ReLU(), up, second, nn.ReLU(), up, third)


def linear(ins: int, outs: int) -> Callable[[int], nn.Module]:
    return lambda task: nn.Linear(ins, outs)


def pixelwise(task: int) -> nn.Module:
    channels = list(OUT_CHANNELS.values())
    return ConvHead(128, channels[task % len(channels)])


def engine(hidden: int) -> Network:
    heads = (rul_head, health_head)
    trunk = partial(EngineEncoder, hidden=hidden)
    return Network(trunk, lambda task: heads[task % len(heads)](), (256, 30, 14), "encoder.funnel.6")


NETWORKS = {
    "conv": Network(convolutions, classifier, (16, 3, 48, 48), "encoder.10"),
    "mlp": Network(partial(MLP, 128, hidden=4 * [512]), linear(512, 10), (256, 128), "encoder.layers.6"),
    "narrow": Network(partial(MLP, 64, hidden=4 * [64]), linear(64, 1), (32, 64), "encoder.layers.6", steps=41),
    "dense": Network(convolutions, upsampling, (16, 3, 48, 48), "encoder.10"),
    "toy": Network(partial(MLP, 250), linear(100, 100), (100, 250), "encoder.layers.6"),
    "transformer": Network(Transformer, linear(128, 10), (8, 64, 128), "encoder.layers.5.linear2"),
    # The paper's two: 320 x 320 to 80 x 80. A step takes seconds on a CPU, so a few are enough.
    "segnet": Network(SegNet, pixelwise, (2, 3, 320, 320), "encoder.decoder.2.6", steps=7, warm_up=2),
    "resnet": Network(FCNResNet50, pixelwise, (2, 3, 320, 320), "encoder.gather.0", steps=7, warm_up=2),
    "engine64": engine(64),
    "engine256": engine(256),
    # Without a trunk and heads: `models.Physics`.
    "burgers": Network(
        partial(TanhMLP, Burgers(), hidden=4 * [32]),
        lambda task: nn.Identity(),
        (1,),
        "",
        steps=221,
        warm_up=20,
        block=40,
    ),
}
TASK_COUNTS = (2, 3, 5, 10, 20, 40)
"""Numbers of tasks for a model given without T."""
