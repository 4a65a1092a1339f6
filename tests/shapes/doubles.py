"""Weights in two places, and heads that start with an in-place operation."""

from __future__ import annotations

import torch
from models import FEATURES, HIDDEN, INPUTS, OUTPUTS
from torch import Tensor, nn
from torch.nn import functional as F

from shapes import (
    WORDS,
    Case,
    Shape,
    chain,
    plain_layer,
)

# ---- weights in two places -------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """A decoder that uses the encoder's weight the other way round."""

    def __init__(self, encoder: nn.Linear) -> None:
        super().__init__()
        self.weight = encoder.weight
        self.out = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(F.linear(z, self.weight.T))


class Autoencoder(Shape):
    """One head is tied to the shared layer."""

    def __init__(self) -> None:
        super().__init__(plain_layer)

    def build(self) -> None:
        super().build()
        self.seg_head = Transposed(self.encoder.layer)  # type: ignore[arg-type]


class LanguageModel(Shape):
    """Every head's output projection is the embedding; the tasks are losses over the words."""

    def __init__(self) -> None:
        super().__init__(
            lambda: chain(layer=nn.Embedding(WORDS, FEATURES), block=nn.Linear(FEATURES, FEATURES), after=nn.Tanh()),
            lambda: chain(own=nn.Linear(FEATURES, FEATURES), projection=nn.Linear(FEATURES, WORDS, bias=False)),
            loss=lambda output, target: F.cross_entropy(
                output.mean(1), target.softmax(1) @ torch.eye(3, WORDS).double()
            ),
        )

    def build(self) -> None:
        super().build()
        for task in self.tasks:
            self.get_submodule(f"{task}_head").projection.weight = self.encoder.layer.weight  # type: ignore[union-attr]


BEHIND = {
    "a head tied to a layer behind the shared one": Case(Autoencoder, layer="encoder.stem", W=("encoder.stem.weight",))
}
TIED: dict[str, Case] = {
    "a head tied to the encoder's weight": Case(Autoencoder),
    "an embedding tied to the output projections": Case(LanguageModel, inputs=(4,), words=True),
}


# ---- in-place operations ---------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """Starts by overwriting its input."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.linear = nn.Linear(FEATURES, OUTPUTS)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(self.act(z))


class FirstInPlace(Shape):
    """Some heads start in place; the others keep no reference to z for their backward, so plain torch allows it."""

    def __init__(self, *tasks: str) -> None:
        self.in_place = tasks
        super().__init__(
            lambda: chain(stem=nn.Linear(INPUTS, HIDDEN), before=nn.Tanh(), layer=nn.Linear(HIDDEN, FEATURES)),
            lambda: nn.Sequential(nn.Tanh(), nn.Linear(FEATURES, OUTPUTS)),
        )

    def build(self) -> None:
        super().build()
        for task in self.in_place:
            setattr(self, f"{task}_head", InPlace())


IN_PLACE: dict[str, Case] = {
    "the last head": Case(lambda: FirstInPlace("normal")),
    "the first head": Case(lambda: FirstInPlace("seg")),
}
