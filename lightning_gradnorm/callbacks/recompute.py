"""Recomputes the losses of a batch after the network's step, for strategies that need them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_gradnorm.engine.module_hooks import patch_attribute
from lightning_gradnorm.engine.rule import DeclaresTasks
from lightning_gradnorm.gradients import BufferGuard

_METRICS_OWN = ("_update_count", "_computed", "_forward_cache", "_is_synced")


class LossRecomputer:
    """Recomputes the losses of the last batch without side effects.

    Random numbers repeat, so dropout masks are the same. Running statistics and metrics are restored, and nothing is
    logged.

    Args:
        module: one that declares its tasks, as `MultiTaskModule` does; or one with automatic optimization, whose
            ``training_step`` we can call again.
        caller: begins the error.
        strategy: the strategy that needs the losses.

    Raises:
        ValueError: the module optimizes manually, so another call would be another step.
    """

    def __init__(self, module: L.LightningModule, *, caller: str, strategy: str) -> None:
        if not module.automatic_optimization and not isinstance(module, DeclaresTasks):
            raise ValueError(
                f"{caller}: {strategy} needs the losses after the step, but calling {type(module).__name__}.training_step "
                f"again would take another step, since it optimizes manually. Use automatic optimization, or MultiTaskModule."
            )
        self._module = module
        self._random: list[Tensor] = []

    @property
    def _devices(self) -> list[torch.device]:
        return [self._module.device] if self._module.device.type == "cuda" else []

    def record_random_state(self) -> None:
        """Record the random state. Called when a batch begins."""
        self._random = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def losses(
        self, trainer: L.Trainer, batch: Any, batch_idx: int, logged_names: Mapping[str, str] | None
    ) -> Mapping[str, list[Any]]:
        """Return the losses by task as the module declares or logs them; empty if it shows them to the callback."""
        module = self._module
        logged: dict[str, Any] = {}

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            logged[name] = value

        with (
            ExitStack() as stack,
            torch.enable_grad(),  # a loss may contain gradients: a penalty, a differential equation
            isolate_rng(include_cuda=False),
            self._same_randomness(),
            BufferGuard(module.buffers()).preserved(""),
            _kept_metrics(module),
            trainer.precision_plugin.train_step_context(),
        ):
            stack.callback(patch_attribute(module, "log", log))
            if isinstance(module, DeclaresTasks):
                return {task: [loss] for task, loss in module.task_losses(batch).items()}
            takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
            module.training_step(*([batch, batch_idx] if takes_index else [batch]))
        if logged_names is not None:
            return {task: [logged[name]] for task, name in logged_names.items() if name in logged}
        return {}

    @contextmanager
    def _same_randomness(self) -> Iterator[None]:
        with torch.random.fork_rng(self._devices, device_type="cuda"):
            cpu, *of_devices = self._random
            torch.set_rng_state(cpu)
            for device, state in zip(self._devices, of_devices, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@contextmanager
def _kept_metrics(module: nn.Module) -> Iterator[None]:
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    own = [{name: vars(one)[name] for name in {*_METRICS_OWN, *one._defaults} & vars(one).keys()} for one in metrics]
    before = copy.deepcopy(own)
    try:
        yield
    finally:
        for metric, kept in zip(metrics, before, strict=True):
            vars(metric).update(kept)
