"""Trainings with a strategy, split into the batches of several ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

from models import TASKS, multi_task_module, vector_batches
from ranks import (
    MayLack,
    MayLackManual,
    Step,
    shares,
)
from strategies import STRATEGIES, tasks_for

STEPS = 6
ROWS = 16  # of the whole batch of one optimizer step
KINDS = ["at the heads", "from the losses", "manual", "MultiTaskModule"]
TOLERANCE = 1e-8


class Case(NamedTuple):
    """One training: its strategy and how it runs."""

    name: str
    kind: str = "at the heads"
    accumulate: int = 1
    ddp: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join([self.name, self.kind, f"x {self.accumulate}", *self.ddp])


def build(name: str, kind: str, accumulate: int = 1, model_of: type[MayLack] = MayLack) -> tuple[Any, Any]:
    """The same network trained in one of four ways, and the strategy's callback for it."""
    T = tasks_for(name)
    if kind == "MultiTaskModule":
        return multi_task_module(T, accumulate_grad_batches=accumulate), STRATEGIES[name]()
    model = MayLackManual(T, accumulate=accumulate) if kind == "manual" else model_of(T)
    balancing = STRATEGIES[name](tasks=list(TASKS[:T]), heads=model.heads() if kind == "at the heads" else None)
    if isinstance(model, MayLackManual):
        model.gradnorm = [balancing]
    return model, balancing


def cut(case: Case, ranks: int = 2) -> list[Step]:
    batches = vector_batches(tasks_for(case.name), STEPS, size=ROWS)
    return [shares(batch, ranks, case.accumulate) for batch in batches]
