"""Modules around the shared layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import torch
from models import FEATURES, HIDDEN, INPUTS, OUTPUTS
from torch import Tensor, nn

from shapes import (
    Build,
    Case,
    between,
    chain,
    each_once,
    plain_layer,
    readout,
    simple,
)
from shapes.layers import Attention, Recurrent


class Frozen(nn.Sequential):
    """The stem is not trained, and the layers that are named stay in eval mode, as people fine-tune."""

    def __init__(self, layers: nn.Sequential, in_eval: Collection[str]) -> None:
        super().__init__(OrderedDict(layers.named_children()))
        self.in_eval = in_eval
        self.stem.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        for name in self.in_eval:
            self.get_submodule(name).eval()
        return self


def normed(stem: nn.Module | None = None, layer: nn.Module | None = None) -> nn.Sequential:
    """Batch norm in front of the shared layer and behind it."""
    return chain(
        stem=stem or nn.Linear(INPUTS, HIDDEN),
        norm_before=nn.BatchNorm1d(HIDDEN),
        before=nn.Tanh(),
        layer=layer or nn.Linear(HIDDEN, FEATURES),
        norm_after=nn.BatchNorm1d(FEATURES),
        after=nn.Tanh(),
    )


def dropped() -> nn.Sequential:
    """Dropout in front of the shared layer and behind it."""
    return chain(
        stem=nn.Linear(INPUTS, HIDDEN),
        drop_before=nn.Dropout(0.2),
        layer=nn.Linear(HIDDEN, FEATURES),
        drop_after=nn.Dropout(0.3),
        after=nn.Tanh(),
    )


def normed_readout() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Dropout(0.2), nn.Linear(FEATURES, OUTPUTS))


def attentive_readout(functional: bool) -> nn.Sequential:
    return nn.Sequential(Attention(4, functional), nn.Flatten(), nn.Linear(12, OUTPUTS))


def transformer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.0, batch_first=True)


def attended(attention: Build, layer: str, *parameters: str, **options: Any) -> Case:
    return simple(
        lambda: chain(stem=nn.Linear(INPUTS, 4), attention=attention()),
        (3, INPUTS),
        12,
        layer=layer,
        W=tuple(f"{layer}.{parameter}" for parameter in parameters),
        **options,
    )


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


class Reversed(nn.Module):
    """A head as in domain adaptation: the encoder should unlearn what the head learns."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = readout()

    def forward(self, z: Tensor) -> Tensor:
        return self.readout(Reversal.apply(z))


class Hooked(nn.Module):
    """Changes gradients on their way back, by hooks on the representation and on the shared layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = plain_layer()
        mask = (torch.arange(HIDDEN) % 2).double()
        self.inner.layer.weight.register_hook(lambda gradient: gradient * mask)
        self.inner.layer.register_full_backward_hook(lambda module, inputs, outputs: None)

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        if z.requires_grad:
            z.register_hook(lambda gradient: 0.5 * gradient)
        return z


SURROUNDINGS: dict[str, Case] = {
    "BatchNorm before and after": simple(normed),
    "BatchNorm before and after and in the heads, with Dropout": simple(normed, head=normed_readout),
    "BatchNorm in the shared layer": simple(
        lambda: between(nn.Sequential(nn.Linear(HIDDEN, FEATURES), nn.BatchNorm1d(FEATURES))),
        W=("encoder.layer.0.weight",),
    ),
    "Dropout before and after and in the heads": simple(
        dropped, head=lambda: nn.Sequential(nn.Dropout(0.2), readout())
    ),
    "Dropout in the shared layer": simple(
        lambda: between(nn.Sequential(nn.Linear(HIDDEN, FEATURES), nn.Dropout(0.3))),
        W=("encoder.layer.0.weight",),
    ),
    "early layers frozen": simple(lambda: Frozen(normed(), in_eval=())),
    "early layers frozen and in eval mode": simple(lambda: Frozen(normed(), in_eval=("stem", "norm_before"))),
    "the encoder in eval mode": simple(lambda: Frozen(layers := normed(), in_eval=list(dict(layers.named_children())))),
    "F.scaled_dot_product_attention in the trunk": attended(
        lambda: Attention(4, functional=True), "encoder.attention.layer", "weight"
    ),
    "F.scaled_dot_product_attention behind the shared layer": attended(
        lambda: Attention(4, functional=True), "encoder.attention.qkv", "weight"
    ),
    "F.scaled_dot_product_attention, causal": attended(
        lambda: Attention(4, functional=True, causal=True), "encoder.attention.qkv", "weight"
    ),
    "F.scaled_dot_product_attention in the heads": attended(
        lambda: nn.Linear(4, 4), "encoder.attention", "weight", head=lambda: attentive_readout(functional=True)
    ),
    "MultiheadAttention in the heads": attended(
        lambda: nn.Linear(4, 4), "encoder.attention", "weight", head=lambda: attentive_readout(functional=False)
    ),
    "TransformerEncoderLayer": attended(transformer, "encoder.attention.linear2", "weight"),
    "TransformerEncoderLayer: its attention's out_proj": attended(
        transformer, "encoder.attention.self_attn.out_proj", "weight"
    ),
    "TransformerEncoderLayer in the heads": attended(
        lambda: nn.Linear(4, 4),
        "encoder.attention",
        "weight",
        head=lambda: nn.Sequential(transformer(), nn.Flatten(), nn.Linear(12, OUTPUTS)),
    ),
    "LSTM in the heads": attended(
        lambda: nn.Linear(4, 4),
        "encoder.attention",
        "weight",
        head=lambda: nn.Sequential(Recurrent(nn.LSTM, inputs=4), nn.Linear(FEATURES, OUTPUTS)),
    ),
    "gradients reversed in the heads": simple(plain_layer, head=Reversed),
    "gradients reversed in front of the heads": simple(
        plain_layer,
        run=lambda encoder, heads, x: each_once(lambda x: Reversal.apply(encoder(x)), heads, x),
    ),
    "hooks on gradients": simple(Hooked, layer="encoder.inner.layer", W=("encoder.inner.layer.weight",)),
}
