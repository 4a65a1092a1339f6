"""Kinds of shared layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FEATURES, HIDDEN, INPUTS
from torch import Tensor, nn
from torch.nn import functional as F

from shapes import (
    WORDS,
    Case,
    between,
    chain,
    simple,
)


class Functional(nn.Module):
    """Uses parameters without a module around them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, HIDDEN)
        self.mixing = nn.Parameter(0.4 * torch.randn(HIDDEN, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(self.stem(x)) @ self.mixing)


class Fourier(nn.Module):
    """Mixes the frequencies of a sequence, as Fourier neural operators do: its parameter is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, HIDDEN)
        self.modes = nn.Parameter(torch.randn(HIDDEN // 2 + 1, FEATURES, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((torch.fft.rfft(torch.tanh(self.stem(x))) @ self.modes).abs())


class SparseEmbedding(nn.Embedding):
    """Its gradient is a sparse tensor, which cannot be differentiated again."""

    plain = False

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight, sparse=not self.plain)


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

    def __init__(self, kind: type[nn.RNNBase], project: bool = False, inputs: int = INPUTS) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, 4)
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
    "nn.Parameter, complex": simple(Fourier, layer="encoder.modes", W=("encoder.modes",)),
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
    "Embedding, with sparse gradients": simple(
        lambda: chain(layer=SparseEmbedding(WORDS, 3), after=nn.Tanh()), (4,), 12, words=True
    ),
    "EmbeddingBag": simple(lambda: chain(layer=Bag(WORDS, FEATURES), after=nn.Tanh()), (4,), words=True),
    "LayerNorm, by its name": simple(lambda: between(nn.LayerNorm(HIDDEN)), features=HIDDEN),
    "GroupNorm, by its name": simple(lambda: between(nn.GroupNorm(2, 4), nn.Conv1d(2, 4, 1)), (2, 3), 12),
    "BatchNorm, by its name": simple(lambda: between(nn.BatchNorm1d(HIDDEN)), features=HIDDEN),
    "PReLU, by its name": simple(lambda: between(nn.PReLU(HIDDEN)), features=HIDDEN),
    "MultiheadAttention: in_proj_weight": attentive("in_proj_weight"),
    "MultiheadAttention, by its name: its out_proj": attentive("out_proj.weight", layer="encoder.attention.layer"),
    "MultiheadAttention, by default: its out_proj": attentive("out_proj.weight", layer=None),
    "weight_norm": parametrized(parametrizations.weight_norm, "original0", "original1"),
    "weight_norm, by default": parametrized(parametrizations.weight_norm, "original0", "original1", layer=None),
    "spectral_norm": parametrized(parametrizations.spectral_norm, "original"),
    "spectral_norm, by default": parametrized(parametrizations.spectral_norm, "original", layer=None),
    "weight_norm, the old one: weight_v": old_style(nn.utils.weight_norm, "weight_v", layer="encoder.layer.weight_v"),
    "weight_norm, the old one": old_style(nn.utils.weight_norm, "weight_g", "weight_v"),
    "spectral_norm, the old one": old_style(nn.utils.spectral_norm, "weight_orig"),
    "orthogonal": parametrized(parametrizations.orthogonal, "original"),
    "orthogonal, square": parametrized(parametrizations.orthogonal, "original", size=HIDDEN),
    "LSTM: weight_ih_l0": simple(lambda: Recurrent(nn.LSTM), (3, INPUTS), layer=RNN[0], W=RNN[:1]),
    "LSTM: all its parameters": simple(lambda: Recurrent(nn.LSTM), (3, INPUTS), layer="encoder.rnn", W=RNN),
    "LSTM, by default": simple(lambda: Recurrent(nn.LSTM), (3, INPUTS), layer=None, W=RNN),
    "LSTM and a Linear: the Linear, by default": simple(
        lambda: Recurrent(nn.LSTM, project=True), (3, INPUTS), layer=None, W=("encoder.project.weight",)
    ),
    "GRU: weight_ih_l0": simple(lambda: Recurrent(nn.GRU), (3, INPUTS), layer=RNN[0], W=RNN[:1]),
    "GRU: all its parameters": simple(lambda: Recurrent(nn.GRU), (3, INPUTS), layer="encoder.rnn", W=RNN),
    "GRU, by default": simple(lambda: Recurrent(nn.GRU), (3, INPUTS), layer=None, W=RNN),
}
