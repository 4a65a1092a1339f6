"""Ways to call encoder and heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from models import FEATURES, HIDDEN, INPUTS, OUTPUTS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from shapes import (
    Case,
    Heads,
    plain_layer,
    simple,
)


class Pair(NamedTuple):
    fine: Tensor
    coarse: Tensor


@dataclass
class Features:
    """A dataclass that torch knows as a structure of tensors."""

    fine: Tensor
    coarse: Tensor


@dataclass
class UnknownFeatures:
    """A dataclass that torch does not know as a structure of tensors."""

    fine: Tensor
    coarse: Tensor


pytree.register_dataclass(Features)


class Several(nn.Module):
    """An encoder that returns two feature maps in some structure."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, HIDDEN)
        self.layer = nn.Linear(HIDDEN, FEATURES)
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        fine = torch.tanh(self.stem(x))
        return self.pack(fine, torch.tanh(self.layer(fine)))


class ReadsSeveral(nn.Module):
    def __init__(self, unpack: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.unpack = unpack
        self.from_fine = nn.Linear(HIDDEN, OUTPUTS)
        self.from_coarse = nn.Linear(FEATURES, OUTPUTS)

    def forward(self, z: Any) -> Tensor:
        fine, coarse = self.unpack(z)
        return self.from_fine(fine) + self.from_coarse(coarse)


def structured(pack: Callable[[Tensor, Tensor], Any], unpack: Callable[[Any], Any], **options: Any) -> Case:
    return simple(lambda: Several(pack), head=lambda: ReadsSeveral(unpack), **options)


class Scaled(nn.Module):
    """A head with options."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, OUTPUTS)
        self.skip = nn.Linear(INPUTS, OUTPUTS)

    def forward(self, z: Tensor, x: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        output = scale * self.linear(z)
        return output if x is None else output + self.skip(x)


def with_keywords(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
    z = encoder(x)
    return {task: head(z=z, x=None, scale=0.5) for task, head in heads.items()}


def with_the_input(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
    z = encoder(x)
    return {task: head(z, x) for task, head in heads.items()}


def siamese(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
    z = (encoder(x) - encoder(x.roll(1, 0))).abs()
    return {task: head(z) for task, head in heads.items()}


def heads_twice(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
    z = encoder(x)
    return {task: head(z) * head(-2 * z) for task, head in heads.items()}


def two_views(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
    one, other = encoder(x), encoder(-x)
    return {task: head(one) * head(other) for task, head in heads.items()}


def interleaved(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
    """The encoder runs again for each head."""
    return {task: head(encoder(x)) for task, head in heads.items()}


class Repeated(nn.Module):
    """The shared layer runs three times, as in a recurrent cell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, FEATURES)
        self.layer = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        for _ in range(3):
            z = torch.tanh(self.layer(z))
        return z


def two_terms(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target) + 0.3 * F.huber_loss(output.cos(), target)


CALLS: dict[str, Case] = {
    "the shared layer runs three times": simple(Repeated),
    "siamese: the encoder runs twice": simple(plain_layer, run=siamese),
    "the encoder and the heads run twice": simple(plain_layer, run=two_views),
    "the heads run twice": simple(plain_layer, run=heads_twice),
    "the encoder runs for each head": simple(plain_layer, run=interleaved),
    "heads called with keywords": simple(plain_layer, head=Scaled, run=with_keywords),
    "heads that also read the input": simple(plain_layer, head=Scaled, run=with_the_input),
    "a tuple": structured(lambda fine, coarse: (fine, coarse), lambda z: z),
    "a list": structured(lambda fine, coarse: [fine, coarse], lambda z: z),
    "a dict": structured(lambda fine, coarse: {"b": fine, "a": coarse}, lambda z: (z["b"], z["a"])),
    "a named tuple": structured(Pair, lambda z: (z.fine, z.coarse)),
    "a registered dataclass": structured(Features, lambda z: (z.fine, z.coarse)),
    "a dataclass": structured(UnknownFeatures, lambda z: (z.fine, z.coarse), modes=(False,)),
    "a dict of lists, with a name and a hole in it": structured(
        lambda fine, coarse: {"maps": [fine, None, coarse], "name": "two"}, lambda z: (z["maps"][0], z["maps"][2])
    ),
    "a loss of two terms": simple(plain_layer, loss=two_terms),
    "losses of shape (1,)": simple(plain_layer, loss=lambda o, t: F.mse_loss(o, t).reshape(1)),
}
