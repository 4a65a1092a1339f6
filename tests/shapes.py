"""Shapes of networks that people train: what the shared layer is, what stands around it, how the heads are called.

A `Case` is one row of a table: the network, what its inputs look like, the name given as `shared_layer` and the parameters
that this name must stand for. All networks have three tasks, are float64 and are built from a seed, so that two calls give
the same parameters: one goes to the Trainer, one to the textbook.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from models import FEATURES, HIDDEN, INPUTS, OUTPUTS, TASKS, Automatic, Batch
from textbook import Forward
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

SIZE = 4
WORDS = 9
Build = Callable[[], nn.Module]


def defect(reason: str, strict: bool = True) -> Any:
    return pytest.mark.xfail(strict=strict, reason=reason)


PASSED_OVER = defect("shared_layer=None passes over a last layer whose parameters are not called 'weight'")
LOOKED_AT = defect("looking for the shared layer computes parametrized weights: one power iteration too many")
BIAS_TOO = defect("the module has no parameter 'weight' but weight_g and weight_v: its bias is taken too")


def chain(**layers: nn.Module) -> nn.Sequential:
    """A Sequential whose layers have names."""
    return nn.Sequential(OrderedDict(layers))


def readout(features: int = FEATURES) -> nn.Sequential:
    """A head for a representation of any shape with so many values for each example."""
    return nn.Sequential(nn.Flatten(), nn.Linear(features, OUTPUTS))


class Shape(Automatic):
    """An encoder and a head for each task, each made by a function."""

    def __init__(self, encoder: Build, head: Build = readout, seed: int = 3) -> None:
        self._builders = (encoder, head)
        super().__init__(3, seed)

    def build(self) -> None:
        encoder, head = self._builders
        self.encoder = encoder()
        for task in self.tasks:
            setattr(self, f"{task}_head", head())

    def head(self, task: str) -> nn.Module:
        return self.get_submodule(f"{task}_head")

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        return {task: self.head(task)(z) for task in self.tasks}

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target)

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        return {task: self.loss(output, batch[task]) for task, output in self.outputs(batch).items()}

    def for_textbook(self) -> Shape:
        """The same network without what cannot be differentiated twice: modules have a `plain` way to say the same."""
        for module in self.modules():
            if hasattr(module, "plain"):
                module.plain = True
        return self

    def forward_for_textbook(self, batch: Batch) -> Forward:
        return Forward(self.task_losses(batch))


@dataclass(frozen=True)
class Case:
    """One network, and what `shared_layer` names in it."""

    make: Callable[[], Shape]
    layer: str | None = "encoder.layer"
    """What is given as `shared_layer`."""
    W: tuple[str, ...] = ("encoder.layer.weight",)
    """The parameters which that is."""
    inputs: tuple[int, ...] = (INPUTS,)
    """Shape of one example."""
    words: bool = False
    """The inputs are indices below `WORDS`."""
    marks: tuple[Any, ...] = ()
    """Marks of pytest, of the case that is not as it should be, or that warns."""
    heads: Mapping[str, str] = field(default_factory=lambda: {task: f"{task}_head" for task in TASKS[:3]})

    def batches(self, count: int, seed: int = 17) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for _ in range(count):
            shape = (SIZE, *self.inputs)
            x = (
                torch.randint(WORDS, shape, generator=generator)
                if self.words
                else torch.randn(shape, generator=generator, dtype=torch.float64)
            )
            targets = {
                task: (0.5 + 0.7 * i) * torch.randn(SIZE, OUTPUTS, generator=generator, dtype=torch.float64)
                for i, task in enumerate(TASKS[:3])
            }
            batches.append({"x": x, **targets})
        return batches


def simple(encoder: Build, inputs: tuple[int, ...] = (INPUTS,), features: int = FEATURES, **options: Any) -> Case:
    """A case whose heads are linear in the representation."""
    return Case(lambda: Shape(encoder, lambda: readout(features)), inputs=inputs, **options)


# ---- what the shared layer is ----------------------------------------------------------------------------------------


def between(layer: nn.Module, stem: nn.Module | None = None) -> nn.Sequential:
    """The layer between a layer before it and a nonlinearity after it."""
    return chain(stem=stem or nn.Linear(INPUTS, HIDDEN), before=nn.Tanh(), layer=layer, after=nn.Tanh())


class Functional(nn.Module):
    """Uses parameters without a module around them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, HIDDEN)
        self.mixing = nn.Parameter(0.4 * torch.randn(HIDDEN, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(self.stem(x)) @ self.mixing)


class Twosome(nn.Module):
    """A bilinear layer, which takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, HIDDEN)
        self.layer = nn.Bilinear(HIDDEN, INPUTS, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.tanh(self.stem(x)), x))


class Bag(nn.EmbeddingBag):
    """The mean of a bag's embeddings; the fused kernel has no second derivative, a mean of embeddings has."""

    plain = False

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.embedding(x, self.weight).mean(1) if self.plain else super().forward(x)


class Attention(nn.Module):
    """A sequence's attention to itself, by `nn.MultiheadAttention` or by `F.scaled_dot_product_attention`."""

    def __init__(self, width: int = 4, functional: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.functional, self.causal = functional, causal
        if functional:
            self.qkv = nn.Linear(width, 3 * width)
            self.layer = nn.Linear(width, width)
        else:
            self.layer = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if not self.functional:
            return self.layer(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.layer(attended.transpose(1, 2).flatten(2))


class Recurrent(nn.Module):
    """An LSTM or a GRU, and perhaps a linear layer behind it."""

    def __init__(self, kind: type[nn.RNNBase], project: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, 4)
        self.rnn = kind(4, FEATURES, batch_first=True)
        self.project = nn.Linear(FEATURES, FEATURES) if project else None

    def forward(self, x: Tensor) -> Tensor:
        last = self.rnn(self.stem(x))[0][:, -1]
        return last if self.project is None else torch.tanh(self.project(last))


PARAMETRIZED = "encoder.layer.parametrizations.weight"
RNN = ("encoder.rnn.weight_ih_l0", "encoder.rnn.weight_hh_l0", "encoder.rnn.bias_ih_l0", "encoder.rnn.bias_hh_l0")
parametrizations = nn.utils.parametrizations


def parametrized(make: Callable[[nn.Module], nn.Module], *originals: str, size: int = FEATURES, **options: Any) -> Case:
    return simple(
        lambda: between(make(nn.Linear(HIDDEN, size))),
        features=size,
        W=tuple(f"{PARAMETRIZED}.{original}" for original in originals),
        **options,
    )


def old_style(norm: Callable[[nn.Module], nn.Module], *parameters: str, **options: Any) -> Case:
    """`torch.nn.utils.weight_norm` and its like, which put a computed `weight` in the place of the parameter."""
    marks = (pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*deprecated"), *options.pop("marks", ()))
    W = tuple(f"encoder.layer.{parameter}" for parameter in parameters)
    return simple(lambda: between(norm(nn.Linear(HIDDEN, FEATURES))), W=W, marks=marks, **options)


def attentive(*parameters: str, **options: Any) -> Case:
    W = tuple(f"encoder.attention.layer.{parameter}" for parameter in parameters)
    return simple(
        lambda: chain(stem=nn.Linear(INPUTS, 4), attention=Attention()),
        (3, INPUTS),
        12,
        **{"layer": W[0], "W": W, **options},
    )


LAYERS: dict[str, Case] = {
    "nn.Parameter, used functionally": simple(Functional, layer="encoder.mixing", W=("encoder.mixing",)),
    "Linear": simple(lambda: between(nn.Linear(HIDDEN, FEATURES))),
    "Bilinear": simple(Twosome),
    "Conv1d": simple(lambda: between(nn.Conv1d(3, 2, 3), nn.Conv1d(2, 3, 1)), (2, 6), 8),
    "Conv2d": simple(lambda: between(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 3, 1)), (2, 4, 4), 8),
    "Conv2d, grouped and strided": simple(
        lambda: between(nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Conv2d(2, 4, 1)), (2, 5, 5), 16
    ),
    "Conv3d": simple(lambda: between(nn.Conv3d(3, 2, 2), nn.Conv3d(2, 3, 1)), (2, 3, 3, 3), 16),
    "ConvTranspose1d": simple(lambda: between(nn.ConvTranspose1d(3, 2, 2), nn.Conv1d(2, 3, 1)), (2, 3), 8),
    "ConvTranspose2d": simple(lambda: between(nn.ConvTranspose2d(3, 2, 2), nn.Conv2d(2, 3, 1)), (2, 3, 3), 32),
    "ConvTranspose3d": simple(lambda: between(nn.ConvTranspose3d(3, 2, 2), nn.Conv3d(2, 3, 1)), (2, 2, 2, 2), 54),
    "Embedding": simple(lambda: chain(layer=nn.Embedding(WORDS, 3), after=nn.Tanh()), (4,), 12, words=True),
    "Embedding, with a padding index": simple(
        lambda: chain(layer=nn.Embedding(WORDS, 3, padding_idx=0), after=nn.Tanh()), (4,), 12, words=True
    ),
    "EmbeddingBag": simple(lambda: chain(layer=Bag(WORDS, FEATURES), after=nn.Tanh()), (4,), words=True),
    "LayerNorm, by its name": simple(lambda: between(nn.LayerNorm(HIDDEN)), features=HIDDEN),
    "GroupNorm, by its name": simple(lambda: between(nn.GroupNorm(2, 4), nn.Conv1d(2, 4, 1)), (2, 3), 12),
    "BatchNorm, by its name": simple(lambda: between(nn.BatchNorm1d(HIDDEN)), features=HIDDEN),
    "PReLU, by its name": simple(lambda: between(nn.PReLU(HIDDEN)), features=HIDDEN),
    "MultiheadAttention: in_proj_weight": attentive("in_proj_weight"),
    "MultiheadAttention: all its parameters": attentive(
        "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias", layer="encoder.attention.layer"
    ),
    "MultiheadAttention, by default: its out_proj": attentive("out_proj.weight", layer=None),
    "weight_norm": parametrized(parametrizations.weight_norm, "original0", "original1"),
    "weight_norm, by default": parametrized(parametrizations.weight_norm, "original0", "original1", layer=None),
    "spectral_norm": parametrized(parametrizations.spectral_norm, "original"),
    "spectral_norm, by default": parametrized(
        parametrizations.spectral_norm, "original", layer=None, marks=(LOOKED_AT,)
    ),
    "weight_norm, the old one: weight_v": old_style(nn.utils.weight_norm, "weight_v", layer="encoder.layer.weight_v"),
    "weight_norm, the old one": old_style(nn.utils.weight_norm, "weight_g", "weight_v", marks=(BIAS_TOO,)),
    "spectral_norm, the old one": old_style(nn.utils.spectral_norm, "weight_orig", marks=(BIAS_TOO,)),
    "orthogonal": parametrized(parametrizations.orthogonal, "original"),
    "orthogonal, square": parametrized(parametrizations.orthogonal, "original", size=HIDDEN),
    "LSTM: weight_ih_l0": simple(lambda: Recurrent(nn.LSTM), (3, INPUTS), layer=RNN[0], W=RNN[:1]),
    "LSTM: all its parameters": simple(lambda: Recurrent(nn.LSTM), (3, INPUTS), layer="encoder.rnn", W=RNN),
    "LSTM, by default": simple(lambda: Recurrent(nn.LSTM), (3, INPUTS), layer=None, W=RNN, marks=(PASSED_OVER,)),
    "LSTM and a Linear: the Linear, by default": simple(
        lambda: Recurrent(nn.LSTM, project=True), (3, INPUTS), layer=None, W=("encoder.project.weight",)
    ),
    "GRU: weight_ih_l0": simple(lambda: Recurrent(nn.GRU), (3, INPUTS), layer=RNN[0], W=RNN[:1]),
    "GRU: all its parameters": simple(lambda: Recurrent(nn.GRU), (3, INPUTS), layer="encoder.rnn", W=RNN),
    "GRU, by default": simple(lambda: Recurrent(nn.GRU), (3, INPUTS), layer=None, W=RNN, marks=(PASSED_OVER,)),
}
