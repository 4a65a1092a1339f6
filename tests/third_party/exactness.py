"""Compares a training with the textbook, step by step: the weights, and the gradients that reach the network."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import textbook
import torch
from third_party.project import Project
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_gradnorm.callbacks.packages import works_in_both_packages


class Tape(L.Callback):
    """Records what each step starts from, and its outcome. Place it in front of GradNorm, whose weights it notes."""

    def __init__(self) -> None:
        self.twin: Any = None
        self.balancing: Any = None
        self.starts: list[tuple[Any, dict[str, Tensor], Tensor]] = []
        self.weights: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.layer: list[str] = []

    def __deepcopy__(self, memo: Any) -> Tape:
        return self

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        named = [callback for callback in trainer.callbacks if hasattr(callback, "mean_weights")]
        self.balancing = named[0]
        memo: dict[int, Any] = {id(trainer): None}
        self.twin = copy.deepcopy(pl_module, memo)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.starts.append((copy.deepcopy(batch), state, torch.get_rng_state()))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if len(self.gradients) < len(self.starts):  # not that of a second optimizer
            trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
            named = pl_module.named_parameters()
            self.gradients.append({name: p.grad.clone() for name, p in named if id(p) in trained})

    def on_train_batch_end(self, *_: Any) -> None:
        self.weights.append(dict(self.balancing.weights))
        self.layer = list(self.balancing._engine.inspection.plan.shared_layer)


works_in_both_packages(Tape)


class _Notes:
    """Takes the place of the network's optimizer and records the gradients."""

    def __init__(self, twin: Any) -> None:
        self.named = dict(twin.named_parameters())
        self.gradients: list[dict[str, Tensor]] = []

    def step(self) -> None:
        self.gradients.append({name: p.grad for name, p in self.named.items() if p.grad is not None})


def distances(project: Project, tape: Tape, *, alpha: float = 1.5) -> tuple[float, float]:
    """Return how far weights and gradients are from a double backward on a copy: the largest difference over all steps.

    Weights as they are; gradients relative to the largest entry of a parameter. (Where that is nothing but rounding, as for a
    bias in front of a batch norm: relative to a thousandth of the largest of all.)
    """
    twin, notes, starts = tape.twin, _Notes(tape.twin), tape.starts
    shared = [notes.named[name] for name in tape.layer]

    def restart(step: int) -> None:
        twin.load_state_dict(starts[step][1])
        torch.set_rng_state(starts[step][2])

    before = torch.get_default_dtype()
    torch.set_default_dtype(shared[0].dtype)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            run = textbook.train(
                twin,
                lambda batch: project.losses(twin, batch),
                [batch for batch, *_ in starts],
                shared,
                notes,  # type: ignore[arg-type]
                coefficients=project.coefficients,
                before_micro_batch=restart,
                alpha=alpha,
            )
    finally:
        torch.set_default_dtype(before)
    of_weights = max(
        abs(step[task] - weight)
        for step, expected in zip(tape.weights, run.weights, strict=True)
        for task, weight in expected.items()
    )
    assert max(abs(weight - 1) for step in run.weights for weight in step.values()) > 0.02, "the weights did not move"
    of_gradients = 0.0
    for found, expected in zip(tape.gradients, notes.gradients, strict=True):
        largest = {name: float(expected[name].abs().max()) for name in found}
        floor = max(largest.values()) / 1000
        for name, gradient in found.items():
            difference = float((gradient - expected[name]).abs().max())
            of_gradients = max(of_gradients, difference / max(largest[name], floor))
    return of_weights, of_gradients
