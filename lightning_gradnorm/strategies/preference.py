"""Equal preferences for scalarizers that require a preference vector before the number of tasks is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Made = TypeVar("Made", bound=nn.Module)


def with_equal_preferences(number_of_tasks: int, /, scalarizer: Callable[..., Made], **options: Any) -> Made:
    """Return ``scalarizer(weights=[1/T, …, 1/T], **options)`` for T tasks.

    For torchjd's ``PBI`` (Zhang, Li, *MOEA/D*, 2007), ``COSMOS`` (Ruchte, Grabocka, arXiv 2103.13392) and ``Constant``. With
    all but the number of tasks it is what a callback wants, in Python or in a configuration of Hydra's::

        _target_: lightning_gradnorm.strategies.with_equal_preferences
        _partial_: true
        scalarizer: {_target_: torchjd.scalarization.PBI, _partial_: true, theta: 5.0}

    Example:
        >>> from functools import partial
        >>> from torchjd.scalarization import COSMOS
        >>> make = partial(with_equal_preferences, scalarizer=COSMOS, lambda_=1.0)
        >>> make(4).weights
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    made = scalarizer(weights=torch.full((number_of_tasks,), 1 / number_of_tasks), **options)
    weights = vars(made).get("weights")
    # A plain attribute would stay behind when the module goes to another device or precision.
    if isinstance(weights, Tensor):
        del made.weights
        made.register_buffer("weights", weights)
    return made
