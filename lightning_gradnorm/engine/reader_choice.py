"""Which ways there are, in this model, to read the gradient of the shared layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lightning_gradnorm.engine.compiled import is_compiled
from lightning_gradnorm.engine.layers import path_to
from lightning_gradnorm.engine.module_hooks import supports_hooks
from lightning_gradnorm.gradients import (
    GradientReader,
    ReplayedGradients,
    WeightGradients,
)
from lightning_gradnorm.gradients.replay import is_sharded


def weight_readers(root: nn.Module, W: Mapping[str, Tensor], opened: Collection[nn.Module]) -> list[GradientReader]:
    """Return readers of ``∇_W L_i`` in order of preference.

    First on the graph of the forward pass itself; where that cannot be walked, by running again the innermost module
    around ``W`` whose output can be got at: not one that is within compiled code, and, since the pieces of a sharded
    weight come and go with the calls of FSDP's modules, only the outermost of those.

    Args:
        root: the LightningModule.
        W: the shared layer's parameters by name.
        opened: modules whose own code runs eagerly although they were compiled.
    """
    around = [
        (name, module)
        for name, module in path_to(root, next(iter(W)))[1:]
        if all(parameter.startswith(f"{name}.") for parameter in W) and supports_hooks(module)
    ]
    sharded = [(name, module) for name, module in around if is_sharded(module)][:1]
    if sharded:
        return [_replay(*sharded[0], W)]
    closed = [place for place, (_, module) in enumerate(around) if is_compiled(module) and module not in opened]
    outside = around[: closed[0] + 1] if closed else around
    return [WeightGradients(list(W.values())), *(_replay(name, module, W) for name, module in reversed(outside))]


def _replay(name: str, module: nn.Module, W: Mapping[str, Tensor]) -> ReplayedGradients:
    return ReplayedGradients(module, [parameter[len(name) + 1 :] for parameter in W], name)
