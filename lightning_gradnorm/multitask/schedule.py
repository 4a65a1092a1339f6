"""When a learning-rate scheduler steps: under manual optimization, Lightning leaves this to the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import lightning as L
import torch

from lightning_gradnorm._messages import check, did_you_mean, is_integer

Scheduler = torch.optim.lr_scheduler.LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau
SchedulerFactory = Callable[[torch.optim.Optimizer], Scheduler]

_check = partial(check, "MultiTaskModule")


@dataclass(frozen=True)
class Schedule:
    """A scheduler's factory, with Lightning's keys for it."""

    scheduler: SchedulerFactory
    interval: str = "epoch"
    frequency: int = 1
    monitor: str = "val/loss"

    @classmethod
    def of(cls, given: SchedulerFactory | Mapping[str, Any] | None) -> Schedule | None:
        """Return the schedule from your argument: a factory, a dict as in Lightning, or None.

        Raises:
            ValueError: an unknown key, or a value out of range.
        """
        if given is None:
            return None
        keys = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
        known = list(cls.__dataclass_fields__)
        for key in keys:
            _check(key in known, "lr_scheduler", f"a dict with keys among {known}", key)
        _check(callable(keys.get("scheduler")), "lr_scheduler", "a callable, or a dict with one as 'scheduler'", given)
        schedule = cls(**keys)
        interval, frequency = schedule.interval, schedule.frequency
        _check(interval in ("step", "epoch"), "lr_scheduler interval", "'step' or 'epoch'", interval)
        _check(is_integer(frequency, least=1), "lr_scheduler frequency", "an integer, at least 1", frequency)
        return schedule

    def make(self, optimizer: torch.optim.Optimizer) -> Scheduler:
        """Return the scheduler of an optimizer."""
        scheduler = self.scheduler(optimizer)
        _check(isinstance(scheduler, Scheduler), "lr_scheduler", "a function that makes a torch scheduler", scheduler)
        return scheduler

    def step(self, module: L.LightningModule, interval: str) -> None:
        """Step the module's scheduler if it is due; ``interval`` has just ended: ``"step"`` or ``"epoch"``.

        Raises:
            ValueError: the metric that a `ReduceLROnPlateau` monitors is not logged.
        """
        trainer = module.trainer
        count = trainer.global_step if interval == "step" else trainer.current_epoch + 1
        if interval != self.interval or count % self.frequency:
            return
        scheduler = module.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            logged = trainer.callback_metrics
            if self.monitor not in logged:
                raise ValueError(
                    f"MultiTaskModule: lr_scheduler monitors '{self.monitor}', which is not logged; "
                    f"{did_you_mean(self.monitor, sorted(logged))}"
                )
            scheduler.step(logged[self.monitor])
        elif scheduler is not None:
            cast(torch.optim.lr_scheduler.LRScheduler, scheduler).step()
