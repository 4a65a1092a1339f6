"""Kinds of networks that people train: their shared layer, the modules around it, and the calls of their heads.

A `Case` is one row of a table: the network, its inputs, the name given as `shared_layer` and the parameters
that this name must refer to. All networks have three tasks, are float64 and are built from a seed, so two calls give
the same parameters: one goes to the Trainer, one to the textbook.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from models import FEATURES, HIDDEN, INPUTS, OUTPUTS, TASKS, Automatic, Batch
from textbook import Forward
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

SIZE = 4
WORDS = 9
Build = Callable[[], nn.Module]


def chain(**layers: nn.Module) -> nn.Sequential:
    """A Sequential whose layers have names."""
    return nn.Sequential(OrderedDict(layers))


def readout(features: int = FEATURES) -> nn.Sequential:
    """A head for a representation of any shape with so many values for each example."""
    return nn.Sequential(nn.Flatten(), nn.Linear(features, OUTPUTS))


Heads = Mapping[str, nn.Module]
Run = Callable[[nn.Module, Heads, Tensor], dict[str, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def each_once(encoder: Callable[[Tensor], Any], heads: Heads, x: Tensor) -> dict[str, Tensor]:
    z = encoder(x)
    return {task: head(z) for task, head in heads.items()}


class Shape(Automatic):
    """An encoder and a head for each task, each made by a function, and how they are run."""

    def __init__(
        self, encoder: Build, head: Build = readout, run: Run = each_once, loss: Loss = F.mse_loss, seed: int = 3
    ) -> None:
        self._makes, self._run, self._loss = (encoder, head), run, loss
        super().__init__(3, seed)

    def build(self) -> None:
        encoder, head = self._makes
        self.encoder = encoder()
        for task in self.tasks:
            setattr(self, f"{task}_head", head())

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        heads = {task: self.get_submodule(f"{task}_head") for task in self.tasks}
        outputs = self._run(self.encoder, heads, batch["x"])
        return {task: self._loss(output, batch[task]) for task, output in outputs.items()}

    def for_textbook(self) -> Shape:
        """The same network without what cannot be differentiated twice: modules have a `plain` way to say the same."""
        for module in self.modules():
            if hasattr(module, "plain"):
                module.plain = True
        return self

    def forward_for_textbook(self, batch: Batch) -> Forward:
        """The losses, and all that the encoder returned on the way to them."""
        representation: list[Tensor] = []

        def note(encoder: nn.Module, inputs: Any, output: Any) -> None:
            representation.extend(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))

        with self.encoder.register_forward_hook(note):
            return Forward(self.task_losses(batch), representation=representation)


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
    modes: tuple[bool, ...] = (False, True)
    """Without `heads=`, with `heads=`, or both: how it can be trained."""
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


def simple(
    encoder: Build,
    inputs: tuple[int, ...] = (INPUTS,),
    features: int = FEATURES,
    head: Build | None = None,
    run: Run = each_once,
    loss: Loss = F.mse_loss,
    **options: Any,
) -> Case:
    """A case whose heads are linear in the representation, unless they are given."""
    return Case(lambda: Shape(encoder, head or (lambda: readout(features)), run, loss), inputs=inputs, **options)


def between(layer: nn.Module, stem: nn.Module | None = None) -> nn.Sequential:
    """The layer between a layer before it and a nonlinearity after it."""
    return chain(stem=stem or nn.Linear(INPUTS, HIDDEN), before=nn.Tanh(), layer=layer, after=nn.Tanh())


def plain_layer() -> nn.Sequential:
    return between(nn.Linear(HIDDEN, FEATURES))
