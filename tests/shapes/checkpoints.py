"""Networks with activation checkpointing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from models import FEATURES, HIDDEN, INPUTS, OUTPUTS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shapes import (
    Case,
    Heads,
    Run,
    between,
    chain,
    plain_layer,
    simple,
)
from shapes.surroundings import dropped


class Checkpointed(nn.Module):
    """Recomputes its contents in backward, instead of storing them."""

    plain = False

    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.plain else checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def checkpointed_encoder() -> nn.Module:
    return Checkpointed(plain_layer(), use_reentrant=False)


def checkpointed_readout(use_reentrant: bool) -> nn.Module:
    return Checkpointed(nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, OUTPUTS)), use_reentrant)


def early_block(use_reentrant: bool) -> nn.Sequential:
    """A checkpointed block with the shared layer behind it."""
    return between(
        nn.Linear(HIDDEN, FEATURES),
        chain(
            first=nn.Linear(INPUTS, 6),
            block=Checkpointed(nn.Sequential(nn.Tanh(), nn.Linear(6, HIDDEN)), use_reentrant),
        ),
    )


def last_block(use_reentrant: bool) -> nn.Sequential:
    """The shared layer is in a checkpointed block."""
    return chain(stem=nn.Linear(INPUTS, HIDDEN), block=Checkpointed(plain_tail(), use_reentrant))


def plain_tail() -> nn.Sequential:
    return chain(before=nn.Tanh(), layer=nn.Linear(HIDDEN, FEATURES), after=nn.Tanh())


INSIDE: dict[str, Any] = {"layer": "encoder.inner.layer", "W": ("encoder.inner.layer.weight",)}
IN_BLOCK: dict[str, Any] = {"layer": "encoder.block.inner.layer", "W": ("encoder.block.inner.layer.weight",)}

CHECKPOINTS: dict[str, Case] = {
    "the encoder, use_reentrant=False": simple(checkpointed_encoder, **INSIDE),
    "the heads, use_reentrant=False": simple(plain_layer, head=lambda: checkpointed_readout(use_reentrant=False)),
    "encoder and heads, use_reentrant=False": simple(
        checkpointed_encoder, head=lambda: checkpointed_readout(use_reentrant=False), **INSIDE
    ),
    "the encoder with Dropout in it, use_reentrant=False": simple(
        lambda: Checkpointed(dropped(), use_reentrant=False), **INSIDE
    ),
    "an earlier block, use_reentrant=False": simple(lambda: early_block(use_reentrant=False)),
    "an earlier block, use_reentrant=True": simple(lambda: early_block(use_reentrant=True)),
    "the shared layer's block, use_reentrant=False": simple(lambda: last_block(use_reentrant=False), **IN_BLOCK),
    "the shared layer's block, use_reentrant=True": simple(
        lambda: last_block(use_reentrant=True), **IN_BLOCK, modes=(True,)
    ),
    "the heads, use_reentrant=True": simple(
        plain_layer, head=lambda: checkpointed_readout(use_reentrant=True), modes=(True,)
    ),
    "an earlier block and the heads, use_reentrant=True": simple(
        lambda: early_block(use_reentrant=True), head=lambda: checkpointed_readout(use_reentrant=True), modes=(True,)
    ),
}


def checkpointed_calls(use_reentrant: bool) -> Run:
    """The heads themselves are checkpointed, so their hooks run inside."""

    def run(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
        z = encoder(x)
        return {task: checkpoint(head, z, use_reentrant=use_reentrant) for task, head in heads.items()}

    return run


CHECKPOINTS["calls of the heads, use_reentrant=False"] = simple(plain_layer, run=checkpointed_calls(False))

REENTRANT: dict[str, Case] = {
    "the heads": replace(CHECKPOINTS["the heads, use_reentrant=True"], modes=(False,)),
    "calls of the heads": simple(plain_layer, run=checkpointed_calls(True), modes=(False,)),
    "calls of the heads, named": simple(plain_layer, run=checkpointed_calls(True), modes=(True,)),
}
