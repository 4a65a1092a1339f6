"""Lightning's Trainer as the engine's training loop: ranks, loss scaler, accumulation."""

from __future__ import annotations

import lightning as L
import torch

from lightning_gradnorm.callbacks.packages import is_one_of, overrides
from lightning_gradnorm.engine.ranks import Ranks


class TrainerLoop:
    """See `engine.loop.Loop`. In trial steps, such as LearningRateFinder's, the Trainer does not have the callback.

    These questions are asked several times in each step, and Lightning answers each through a chain of properties. So what
    stays the same during a training is looked up once.

    Args:
        trainer: the Trainer, in training.
        callback: the callback that this loop serves.
    """

    def __init__(self, trainer: L.Trainer, callback: L.Callback) -> None:
        self.trainer = trainer
        self._callback = callback
        self._module, self._strategy = trainer.lightning_module, trainer.strategy
        self._training = type(trainer.state.stage).TRAINING  # type: ignore[union-attr]
        self.ranks = Ranks(trainer.world_size, trainer.global_rank)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._lightnings_scaler = scaler if isinstance(scaler, torch.amp.GradScaler) else None
        # A user's own backward may run any number of backward passes.
        self._backward_is_lightnings = not overrides(self._module, "backward")
        # A user's own optimizer_step may omit the step, or take it behind Lightning's back.
        self._step_is_lightnings = not overrides(self._module, "optimizer_step")

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The Trainer's optimizers."""
        return self._strategy.optimizers

    def is_training(self) -> bool:
        """Return True unless these are trial steps."""
        if self.trainer.state.stage is not self._training:
            return False
        return id(self._callback) in map(id, self.trainer.callbacks)  # type: ignore[attr-defined]

    def steps(self) -> int:
        """Return the number of optimizer steps before the one in progress."""
        return self.trainer.global_step

    def is_by_hand(self) -> bool:
        """Return True with manual optimization, the module's own ``optimizer_step``, or optimizers hidden from the Trainer."""
        if not (self._step_is_lightnings and self._module.automatic_optimization):
            return True
        return any(is_one_of(optimizer, "_MockOptimizer") for optimizer in self.optimizers)

    def has_parts(self) -> bool:
        """Return True if the Trainer has several optimizers."""
        return len(self.optimizers) > 1

    def backward_has_failed(self) -> bool:
        """Return True if torch is in no backward pass: the module has caught its error, such as out of memory."""
        return torch._C._current_graph_task_id() == -1

    def steps_after_each_backward(self) -> bool:
        """Return True if an optimizer step is known to consist of one backward pass."""
        return self._backward_is_lightnings and self.trainer.accumulate_grad_batches == 1 and not self.is_by_hand()

    def pass_scale(self) -> float:
        """Return the scaler's factor over the number of accumulated batches."""
        return self.step_scale(1)

    def step_scale(self, passes: int) -> float:
        """Return the factor between the summed gradients of ``passes`` backward passes and those of the mean loss.

        With manual optimization users divide the loss by the number of batches themselves.
        """
        batches = self.trainer.accumulate_grad_batches if self._module.automatic_optimization else None
        return self.loss_scale() * (passes / batches if batches else 1.0)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        if self._lightnings_scaler is not None or self._module.automatic_optimization:
            return self._lightnings_scaler
        # With manual optimization some users keep their own.
        return next((one for one in vars(self._module).values() if isinstance(one, torch.amp.GradScaler)), None)

    def loss_scale(self) -> float:
        """Return the factor by which the loss scaler has multiplied the loss; 1 without one."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def skips(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return True if the loss scaler has found an overflow and will skip this optimizer's step."""
        # It has no public method for this; GradScaler.step calls the same one a moment later.
        return self._scaler is not None and any(map(bool, self._scaler._found_inf_per_device(optimizer).values()))

    def is_accumulating(self) -> bool:
        """Return True if the optimizer's step is not due after this backward pass."""
        return not self.is_by_hand() and self.trainer.fit_loop._should_accumulate()
