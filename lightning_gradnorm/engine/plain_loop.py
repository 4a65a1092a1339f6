"""A training loop of your own, as `Balancer` sees it: scales at the root of each backward pass, wrappers, a scaler."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_gradnorm.engine.ranks import Ranks

if TYPE_CHECKING:
    from lightning_gradnorm.engine.measurement import Measurement

_PATIENCE = 50
"""Steps after which we warn about a task without any loss."""


class PlainLoop:
    """See `engine.loop.Loop`.

    Args:
        model: the network that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.ranks = Ranks.current()
        self.scales: list[Tensor] = []
        """The initial gradients of the backward passes since the last step."""
        self.is_inside_call = False
        """Whether `Balancer.backward` is running."""
        self._passes = 0
        self._seen: set[str] = set()
        self._steps = 0
        self._repetitions = 0
        self._has_warned = False

    def note_losses(self, tasks: Collection[str]) -> None:
        """Called with the tasks of each backward pass."""
        self._seen.update(tasks)

    def finish_pass(self, *, is_repeated: bool) -> int:
        """Called after each backward pass. Return how often it has begun; forget the scales of a pass that does not count."""
        times = len(self.scales) - self._passes
        self._repetitions = self._repetitions + 1 if is_repeated else 0
        if is_repeated:
            del self.scales[self._passes :]
            self._warn_of_missing_steps()
        self._passes = len(self.scales)
        return times

    def _warn_of_missing_steps(self) -> None:
        if self._repetitions % _PATIENCE or self._has_warned or _is_in_optimizer():
            return
        self._has_warned = True
        self.ranks.warn(
            f"Balancer: step was not called during the last {_PATIENCE} backward passes, although the parameters have changed. "
            f"So the task weights have not been updated. Call balancer.step() after each optimizer.step()."
        )

    def forget_passes(self) -> None:
        """Forget the backward passes of a step that is not taken."""
        self.scales.clear()
        self._passes = 0

    def finish_step(self, tasks: Sequence[str], measurement: Measurement[Any]) -> None:
        """Called after each step. Warn once about tasks without a loss for a long time, and about what the rule then finds."""
        self.forget_passes()
        self._steps += 1
        missing = [task for task in tasks if task not in self._seen]
        if self._steps == _PATIENCE and missing and self.ranks.size == 1:
            self.ranks.warn(
                f"Balancer: no loss of tasks {missing} was seen in the first {_PATIENCE} steps, so they are not balanced. "
                f"Give them to backward, or make the rule without them."
            )
        elif self._steps == _PATIENCE:
            measurement.end_epoch()

    def is_training(self) -> bool:
        """Return True in training mode. Calls in an evaluation belong to no backward pass, and would never be released."""
        return self._model.training

    def steps(self) -> int:
        """Return the number of steps so far: `Balancer.step` comes after the optimizer's."""
        return self._steps

    def is_by_hand(self) -> bool:
        """Return True."""
        return True

    def has_parts(self) -> bool:
        """Return False: `Balancer.step` marks the steps that belong to the tasks."""
        return False

    def backward_has_failed(self) -> bool:
        """Return False: `Balancer` sees errors itself, and a prepared loss may be back-propagated much later."""
        return False

    def pass_scale(self) -> Tensor:
        """Return the scale of the current backward pass."""
        return self.scales[-1]

    def step_scale(self, passes: int) -> float | Tensor:
        """Return the sum of the scales: the gradients are sums over the passes, each times its scale."""
        scales = [scale if scale.dtype == torch.float64 else scale.float() for scale in self.scales[-passes:]]
        return functools.reduce(operator.add, scales) if passes else 1.0

    def is_accumulating(self) -> bool:
        """Return False: the loop does not tell."""
        return False


def _is_in_optimizer() -> bool:
    """Return True if an optimizer evaluates the losses itself: LBFGS may do so very often. Searches the whole stack."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "step" and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer):
            return True
        frame = frame.f_back
    return False


def call_after_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the current backward pass is over, and DDP has written the gradients."""
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(functools.partial(queue, function))  # queued again when all nodes have run, so it comes after DDP's own


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return your model inside the wrappers of DDP and Fabric."""
    while isinstance(model, DistributedDataParallel) or type(model).__name__ == "_FabricModule":
        inner = model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def scaler_has_skipped(scaler: torch.amp.GradScaler, *, caller: str) -> bool:
    """Return True if the scaler has found an overflow and skipped the optimizer's step.

    Raises:
        RuntimeError: the scaler has been updated since, and no longer knows.
    """
    if not scaler.is_enabled():
        return False
    found = [
        value for state in scaler._per_optimizer_states.values() for value in state["found_inf_per_device"].values()
    ]
    if not found:
        raise RuntimeError(
            f"{caller}: the scaler has unscaled no gradients since its last update. Call balancer.step(scaler=scaler) after "
            f"scaler.step(optimizer) and before scaler.update()."
        )
    return any(bool(value) for value in found)
