"""What the framework needs to know about a strategy besides its formula.

A class of ours, or your own, states what differs from the defaults as class attributes, or as properties if an option
decides. TorchJD's classes cannot, so one table holds their facts. No code outside this module names a strategy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torchjd import aggregation, scalarization

Input = Literal["gramian", "root", "matrix"]
"""The argument of an aggregator: the Gramian ``J Jᵀ``, a square root of it, or the matrix J itself."""


@dataclass(frozen=True)
class Facts:
    """Attributes that a strategy's class may have, with their defaults."""

    needs_losses_after_step: bool = False
    """``update(losses)`` is called after the network's step, with the recomputed losses of the same batch."""
    steps_each_epoch: bool = False
    """``step()`` is called when an epoch is over."""
    averages_over_steps: bool = False
    """It averages gradients over steps, entry by entry, so it needs those of parameters."""
    needs_two_batches: bool = False
    """It needs the gradients of two independent batches, which one training step does not have."""
    input: Input | None = None
    """The argument of an aggregator. By default a `Weighting` takes the Gramian, an aggregator without one the matrix."""
    in_row_span: bool = False
    """An aggregator's result is a combination of the rows, so its weights can be computed from the result."""
    remembers: str = ""
    """For the documentation: what its state holds, including ``random draws``."""
    weights_sum_to: Literal["1", "T", "1/T", "free"] = "free"
    """For the documentation: the sum of its weights."""
    weights_may_be_negative: bool = False
    """For the documentation."""
    fewest_tasks: int = 2
    """For the documentation: how many tasks it needs, with the options of its yaml."""


_TORCHJD: Mapping[type[nn.Module], Facts] = {
    scalarization.COSMOS: Facts(weights_may_be_negative=True),
    scalarization.DWA: Facts(steps_each_epoch=True, remembers="losses of two epochs", weights_sum_to="T"),
    scalarization.FAMO: Facts(needs_losses_after_step=True, remembers="logits, optimizer", weights_sum_to="1"),
    scalarization.IMTLL: Facts(remembers="log scales"),
    scalarization.Mean: Facts(weights_sum_to="1"),
    scalarization.PBI: Facts(weights_may_be_negative=True),
    scalarization.Random: Facts(remembers="random draws", weights_sum_to="1"),
    scalarization.STCH: Facts(weights_sum_to="1/T"),
    scalarization.Sum: Facts(weights_sum_to="T"),
    scalarization.UW: Facts(remembers="log variances"),
    aggregation.AlignedMTLWeighting: Facts(weights_may_be_negative=True),
    aggregation.CRMOGMWeighting: Facts(remembers="mean weights"),
    aggregation.ConFIG: Facts(input="root", in_row_span=True, weights_may_be_negative=True),
    aggregation.Constant: Facts(input="root"),
    aggregation.ExcessMTLWeighting: Facts(
        averages_over_steps=True, input="matrix", remembers="weights, squared gradients", weights_sum_to="1"
    ),
    aggregation.GradDrop: Facts(remembers="random draws"),
    aggregation.GradVacWeighting: Facts(remembers="random draws, mean cosines"),
    aggregation.IMTLGWeighting: Facts(weights_sum_to="1", weights_may_be_negative=True),
    aggregation.KrumWeighting: Facts(weights_sum_to="1", fewest_tasks=4),
    aggregation.MGDAWeighting: Facts(weights_sum_to="1"),
    aggregation.Mean: Facts(input="root", weights_sum_to="1"),
    aggregation.MoDoWeighting: Facts(needs_two_batches=True, remembers="weights"),
    aggregation.NashMTL: Facts(input="root", remembers="last solution"),
    aggregation.PCDWeighting: Facts(remembers="mean squared norms"),
    aggregation.PCGradWeighting: Facts(remembers="random draws"),
    aggregation.Random: Facts(input="root", remembers="random draws", weights_sum_to="1"),
    aggregation.SDMGradWeighting: Facts(needs_two_batches=True, remembers="weights"),
    aggregation.Sum: Facts(input="root", weights_sum_to="T"),
    aggregation.TrimmedMean: Facts(fewest_tasks=3),
}
"""What TorchJD's classes would state themselves. An aggregator that is not listed has the facts of its weighting."""


def facts_of(module: nn.Module) -> Facts:
    """Return the facts of a scalarizer, aggregator or weighting.

    Example:
        >>> facts_of(scalarization.DWA()).steps_each_epoch
        True
        >>> class Mine(scalarization.Scalarizer):
        ...     steps_each_epoch = True
        ...     def forward(self, values, /):
        ...         return values.sum()
        >>> facts_of(Mine()).steps_each_epoch
        True
    """
    names = (field.name for field in dataclasses.fields(Facts))
    stated: dict[str, Any] = {name: getattr(module, name) for name in names if hasattr(type(module), name)}
    return dataclasses.replace(_inherited(module), **stated)


def any_part(module: nn.Module, fact: str) -> bool:
    """Return True if the fact holds for the module or one of its submodules."""
    return any(getattr(facts_of(part), fact) for part in module.modules())


def _inherited(module: nn.Module) -> Facts:
    if found := next((_TORCHJD[kind] for kind in type(module).__mro__ if kind in _TORCHJD), None):
        return found
    if isinstance(module, aggregation.GramianWeightedAggregator):
        return facts_of(module.gramian_weighting)
    if isinstance(module, aggregation.WeightedAggregator):
        return facts_of(module.weighting)
    return Facts()
