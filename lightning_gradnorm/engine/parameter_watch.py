"""Tracks which parameters the tasks share, how often they have changed, and which optimizer steps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_gradnorm.engine.step_state import BatchState
from lightning_gradnorm.gradients.graph import leaves_behind


class ParameterWatch:
    """Watches the shared layer, or all parameters of the model if there is no layer.

    Args:
        model: the trained model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.layer: Mapping[str, Tensor] = {}
        """The shared layer, once it is known."""
        self._behind_all: list[Tensor] = []

    def look_at(self, batch: BatchState) -> None:
        """Find what all tasks of a batch reach, if no shared layer can tell several optimizers apart."""
        if self.layer or self._behind_all or len(batch.losses) < 2:
            return
        behind = [leaves_behind(one.tensor for one in of_task) for of_task in batch.losses.values()]
        ids = [set(map(id, leaves)) for leaves in behind]
        wanted = set.intersection(*ids) or set().union(*ids)
        self._behind_all = list({id(leaf): leaf for leaves in behind for leaf in leaves if id(leaf) in wanted}.values())

    def parameters(self) -> Iterable[Tensor]:
        """Return the watched parameters."""
        return self.layer.values() or self._behind_all or self._model.parameters()

    def versions(self) -> list[int]:
        """Return how often each parameter has changed."""
        return [parameter._version for parameter in self.parameters()]

    def is_stepped_by(self, optimizer: torch.optim.Optimizer, among: Sequence[torch.optim.Optimizer]) -> bool:
        """Return True if a step of this optimizer belongs to the tasks: it moves what they share, or none of ``among`` does.

        Others, such as a discriminator's, may step while the gradients of the tasks are still accumulated.
        """
        if len(among) < 2:
            return True
        watched = set(map(id, self.parameters()))
        owners = [one for one in among if any(id(p) in watched for group in one.param_groups for p in group["params"])]
        return not owners or any(one is optimizer for one in owners)
