"""The readers that may read the gradient of a model's shared layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lightning_gradnorm.engine.compiled import is_compiled
from lightning_gradnorm.engine.layers import path_to
from lightning_gradnorm.engine.module_hooks import supports_hooks
from lightning_gradnorm.gradients import (
    ReplayedGradients,
    RowReader,
    WeightGradients,
)
from lightning_gradnorm.gradients.replay import is_sharded


def weight_readers(root: nn.Module, W: Mapping[str, Tensor], uncompiled: Collection[nn.Module]) -> list[RowReader]:
    """Return readers of ``∇_W L_i`` in order of preference.

    The first reads on the graph of the forward pass itself. If that graph cannot be traversed a second time, the others
    run a module around ``W`` again, the innermost first, but no module inside compiled code, whose output is hidden. With
    FSDP only the outermost module works, because its call gathers and frees the pieces of a sharded weight.

    Args:
        root: the model.
        W: the shared layer's parameters by name.
        uncompiled: modules whose own code runs eagerly although they were compiled.
    """
    around = [
        (name, module)
        for name, module in path_to(root, next(iter(W)))[1:]
        if all(parameter.startswith(f"{name}.") for parameter in W) and supports_hooks(module)
    ]
    sharded = [(name, module) for name, module in around if is_sharded(module)][:1]
    if sharded:
        return [_replay(*sharded[0], W)]
    compiled = [place for place, (_, module) in enumerate(around) if is_compiled(module) and module not in uncompiled]
    outside = around[: compiled[0] + 1] if compiled else around
    return [WeightGradients(list(W.values())), *(_replay(name, module, W) for name, module in reversed(outside))]


def _replay(name: str, module: nn.Module, W: Mapping[str, Tensor]) -> ReplayedGradients:
    return ReplayedGradients(module, [parameter[len(name) + 1 :] for parameter in W], name)
