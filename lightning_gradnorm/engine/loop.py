"""The training loop, as far as the engine depends on it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_gradnorm.engine.ranks import Ranks


class Loop(Protocol):
    """Calls backward and the optimizer. `Balancer` and the Lightning callbacks each have one."""

    @property
    def ranks(self) -> Ranks:
        """The processes that train together."""

    def is_training(self) -> bool:
        """Return True if current steps belong to the training, not to a trial such as LearningRateFinder's."""

    def steps(self) -> int:
        """Return the number of optimizer steps before the one in progress, in which losses may be evaluated repeatedly."""

    def is_by_hand(self) -> bool:
        """Return True if the user's own code steps the optimizer: perhaps unannounced, or not after every backward pass."""

    def has_parts(self) -> bool:
        """Return True if several optimizers divide the parameters among them and step at different times."""

    def backward_has_failed(self) -> bool:
        """Return True if the current backward pass has ended in an error. Called until the end of the pass is announced."""

    def pass_scale(self) -> float | Tensor:
        """Return the factor between the gradients of the current backward pass and those of its losses."""

    def step_scale(self, passes: int) -> float | Tensor:
        """Return the factor between the summed gradients of ``passes`` backward passes and those of the mean loss."""

    def is_accumulating(self) -> bool:
        """Called after a backward pass. Return True if another one is known to come before the optimizer's step."""
