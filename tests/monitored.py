"""The monitor's expected values, computed by hand, and recorders that compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from harness import state_by_part
from models import (
    FEATURES,
    INPUTS,
    Automatic,
    Manual,
    OnlyLogs,
    WithCoefficients,
    multi_task_module,
)
from ranks import Notes
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd.aggregation import MGDA

from lightning_gradnorm import Aggregation, FixedWeights, GradNorm

MakeTrainer = Callable[..., L.Trainer]
TASKS = ["seg", "depth", "normal"]
STEPS = 5
FIXED = {"seg": 2.0, "depth": 0.25, "normal": 0.75}

Numbers = dict[str, float]


def by_hand(
    contributions: Mapping[str, Sequence[Tensor]], whole: Sequence[Tensor], history: dict[str, list[bool]] | None = None
) -> Numbers:
    """All that the monitor logs of a step, of the parts' gradients and of that of the whole loss.

    ``history`` has, for each pair, whether they conflicted in the steps before; this step is added.
    """
    history = {} if history is None else history
    flat = {name: torch.cat([g.reshape(-1) for g in gradients]) for name, gradients in contributions.items()}
    update = torch.cat([g.reshape(-1) for g in whole])
    rest = update - torch.stack(list(flat.values())).sum(dim=0)
    found = {f"norm/{name}": float(g.norm()) for name, g in flat.items()}
    found["imbalance"] = max(found.values()) / min(found.values())
    for one, g in flat.items():
        found[f"share/{one}"] = float(g @ update / (update @ update))
        for other, h in flat.items():
            if list(flat).index(one) < list(flat).index(other):
                found[f"cosine/{one}/{other}"] = float(F.cosine_similarity(g, h, dim=0))
                pair = history.setdefault(f"conflict/{one}/{other}", [])
                pair.append(float(g @ h) < 0)
                found[f"conflict/{one}/{other}"] = sum(pair) / len(pair)
    if rest.norm() > 1e-12:
        found["norm/rest_of_loss"] = float(rest.norm())
        found["share/rest_of_loss"] = float(rest @ update / (update @ update))
    return {f"monitor/{name}": value for name, value in found.items()}


def expected(
    twin: Automatic,
    state: dict[str, Tensor],
    batches: Sequence[Any],
    weights: Mapping[str, float],
    what: str,
    history: dict[str, list[bool]] | None = None,
) -> Numbers:
    """Autograd's result for one optimizer step's batches, of all ranks, with the network at that time."""
    with torch.no_grad():
        for name, value in state_by_part(twin).items():
            value.copy_(state[name])
    coefficients = twin.coefficients if isinstance(twin, WithCoefficients) else dict.fromkeys(TASKS, 1.0)
    parts = dict.fromkeys(twin.tasks, torch.zeros((), dtype=torch.float64))
    rest = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        forward = twin.forward_for_textbook(batch)
        for name, loss in forward.losses.items():
            parts[name] = parts[name] + weights[name] * coefficients[name] * loss / len(batches)
        rest = rest if forward.rest is None else rest + forward.rest / len(batches)
    parameters = list(twin.get_submodule(what).parameters())
    gradients = {n: torch.autograd.grad(p, parameters, retain_graph=True) for n, p in parts.items() if p.requires_grad}
    whole = torch.autograd.grad(torch.stack([rest, *parts.values()]).sum(), parameters)
    return by_hand(gradients, whole, history)


class Watcher(Notes):
    """Records, for each batch, the network and the weights before it, and the monitor's logged values after it."""

    def __init__(self, weights: Callable[[], Mapping[str, float]] = lambda: dict.fromkeys(TASKS, 1.0)) -> None:
        super().__init__()
        self.weights = weights

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        state = {name: value.clone() for name, value in state_by_part(pl_module).items()}
        self.before = state, dict(self.weights())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        shown = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("monitor/")}
        self.notes.append((*self.before, shown))


def model_of(kind: str) -> tuple[Any, Automatic, dict[str, Any]]:
    """A model, its copy for the calculation by hand, and how the monitor learns of its losses."""
    return {
        "a mapping": lambda: (Automatic(3), Automatic(3), {"losses": TASKS}),
        "all that is returned": lambda: (Automatic(3), Automatic(3), {}),
        "coefficients and a rest": lambda: (WithCoefficients(3), WithCoefficients(3), {}),
        "logged names": lambda: (OnlyLogs(3), Automatic(3), {"losses": OnlyLogs(3).logged_names()}),
        "manual": lambda: (Manual(3), Automatic(3), {"losses": TASKS}),
        "MultiTaskModule": lambda: (multi_task_module(3), Automatic(3), {}),
    }[kind]()


MODELS = ["a mapping", "all that is returned", "coefficients and a rest", "logged names", "manual", "MultiTaskModule"]
BESIDE: dict[str, Callable[[list[str] | None], Any]] = {
    "alone": lambda losses: None,
    "FixedWeights": lambda losses: FixedWeights(FIXED, tasks=losses),
    "GradNorm": lambda losses: GradNorm(losses, shared_layer="encoder.2"),
    "Aggregation": lambda losses: Aggregation(MGDA(), losses),
}


class WithOwnLayers(Automatic):
    """`normal` has its own trunk next to the one that the others share."""

    def build(self) -> None:
        super().build()
        self.extra = nn.Linear(INPUTS, FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        z, own = self.encoder(batch["x"]), self.extra(batch["x"])
        read = {"seg": z, "depth": z, "normal": own}
        losses = {task: F.mse_loss(getattr(self, f"{task}_head")(read[task]), batch[task]) for task in TASKS}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}
