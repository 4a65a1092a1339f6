"""What a loss scaler (fp16) does to the gradients, and whether it lets a step pass."""

from __future__ import annotations

import lightning as L
import torch


def share(backwards: int, trainer: L.Trainer) -> float:
    """Return how much of the mean loss over its batches ``backwards`` passes of one optimizer step have back-propagated.

    With manual optimization it is the user who divides the loss: 1.
    """
    by_lightning = trainer.lightning_module.automatic_optimization
    return backwards / trainer.accumulate_grad_batches if by_lightning else 1.0


def unit(backwards: int, trainer: L.Trainer) -> float:
    """Return the factor by which the gradients of so many passes are larger than those of the mean loss over them."""
    return loss_scale(trainer) * share(backwards, trainer)


def loss_scale(trainer: L.Trainer) -> float:
    """Return the factor by which the loss scaler has multiplied the loss; 1 without one."""
    scaler = _scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _scaler(trainer: L.Trainer) -> torch.amp.GradScaler | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None


def scaler_skips(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> bool:
    """Say whether the loss scaler has found an overflow, for which it will skip this optimizer's step."""
    scaler = _scaler(trainer)
    # There is no public question for it; the same is asked by ``GradScaler.step`` a moment later.
    return scaler is not None and any(bool(found) for found in scaler._found_inf_per_device(optimizer).values())


def have_scaler_skip(trainer: L.Trainer) -> bool:
    """Tell the loss scaler of an overflow that it cannot have seen; say whether there is one to be told."""
    scaler = _scaler(trainer)
    if scaler is None:
        return False
    for optimizer in trainer.optimizers:
        for found in scaler._found_inf_per_device(optimizer).values():
            found.fill_(1)
    return True
