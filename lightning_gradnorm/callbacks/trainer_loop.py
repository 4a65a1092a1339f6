"""Lightning's Trainer as the engine's training loop: ranks, loss scaler, accumulation."""

from __future__ import annotations

import lightning as L
import torch

from lightning_gradnorm.engine.ranks import Ranks


class TrainerLoop:
    """See `engine.loop.Loop`.

    Args:
        trainer: the Trainer that trains.
        callback: the callback at work. In trial steps, such as LearningRateFinder's, it is not among the Trainer's.
    """

    def __init__(self, trainer: L.Trainer, callback: L.Callback) -> None:
        self._trainer = trainer
        self._callback = callback
        self.ranks = Ranks(trainer.world_size, trainer.global_rank)

    def is_training(self) -> bool:
        """Return True unless these are trial steps."""
        trainer = self._trainer
        return trainer.training and any(one is self._callback for one in trainer.callbacks)  # type: ignore[attr-defined]

    def pass_scale(self) -> float:
        """Return the scaler's factor over the number of accumulated batches."""
        return self.step_scale(1)

    def step_scale(self, passes: int) -> float:
        """Return the factor between the summed gradients of ``passes`` backward passes and those of the mean loss."""
        return self.loss_scale() * self.accumulated_fraction(passes)

    def accumulated_fraction(self, passes: int) -> float:
        """Return how much of the mean loss over its batches ``passes`` backward passes of one step have back-propagated.

        With manual optimization users divide the loss themselves: 1.
        """
        is_automatic = self._trainer.lightning_module.automatic_optimization
        return passes / self._trainer.accumulate_grad_batches if is_automatic else 1.0

    def loss_scale(self) -> float:
        """Return the factor by which the loss scaler has multiplied the loss; 1 without one."""
        return loss_scale(self._trainer)

    def force_skip(self) -> bool:
        """Report an overflow to the loss scaler that it cannot have seen. Return False if there is no scaler."""
        scaler = _scaler(self._trainer)
        if scaler is None:
            return False
        for optimizer in self._trainer.optimizers:
            for found in scaler._found_inf_per_device(optimizer).values():
                found.fill_(1)
        return True


def loss_scale(trainer: L.Trainer) -> float:
    """Return the factor by which the loss scaler has multiplied the loss; 1 without one."""
    scaler = _scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def scaler_skips(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> bool:
    """Return True if the loss scaler has found an overflow, for which it will skip this optimizer's step."""
    scaler = _scaler(trainer)
    # There is no public question for it; GradScaler.step asks the same a moment later.
    return scaler is not None and any(bool(found) for found in scaler._found_inf_per_device(optimizer).values())


def _scaler(trainer: L.Trainer) -> torch.amp.GradScaler | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None
