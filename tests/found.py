"""Networks with nothing named: no `encoder`, and the callback must find the heads.

Each has the name of the deepest weight that all its tasks share, and how the callback describes the heads it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import textbook
import torch
from harness import Batches, Recorder, assert_agrees, assert_clean, traces
from models import (
    FEATURES,
    HIDDEN,
    INPUTS,
    OUTPUTS,
    Automatic,
    Batch,
    Manual,
    network_sgd,
    vector_batches,
    vector_encoder,
)
from textbook import Forward
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm import GradNorm

STEPS = 5
TOLERANCE = 1e-9
NAMES = ["seg", "depth", "normal"]
MakeTrainer = Callable[..., L.Trainer]

ALL_HEADS = "heads: depth → depth_head, normal → normal_head, seg → seg_head"


class Found(Automatic):
    """A trunk that is called trunk."""

    W: tuple[str, ...] = ("trunk.2.weight",)
    heads_found = ALL_HEADS
    can_be_copied = True
    """Whether it can be pickled and deep-copied before it is balanced."""

    def build(self) -> None:
        super().build()
        self.trunk = self.encoder
        del self.encoder

    def represent(self, x: Tensor) -> Any:
        return self.trunk(x)

    def predict(self, task: str, z: Any) -> Tensor:
        return self.get_submodule(f"{task}_head")(z)

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        z = self.represent(batch["x"])
        return {task: F.mse_loss(self.predict(task, z), batch[task]) for task in self.tasks}

    def forward_for_textbook(self, batch: Batch) -> Forward:
        return Forward(self.task_losses(batch))

    def oracle_options(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """What else the textbook is to do."""
        return {}

    def oracle_optimizer(self) -> torch.optim.Optimizer:
        return network_sgd(self.parameters())


class Residual(Found):
    """A block of two layers parallel to a single layer: the block's second layer is deeper."""

    W = ("second.weight",)

    def build(self) -> None:
        super().build()
        self.first, self.second = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, FEATURES)
        self.norm, self.down = nn.BatchNorm1d(FEATURES), nn.Linear(INPUTS, FEATURES)
        del self.trunk

    def represent(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.second(torch.tanh(self.first(x)))) + self.down(x))


class LowRank(nn.Module):
    """A frozen layer and two small parallel ones; the second begins with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(HIDDEN, FEATURES).requires_grad_(False)
        self.A, self.B = nn.Linear(HIDDEN, 2, bias=False), nn.Linear(2, FEATURES, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.A(x))


class Adapted(Found):
    """Its trunk is frozen but for a low-rank adapter."""

    W = ("trunk.2.B.weight",)

    def build(self) -> None:
        super().build()
        self.trunk = nn.Sequential(nn.Linear(INPUTS, HIDDEN).requires_grad_(False), nn.Tanh(), LowRank(), nn.Tanh())


class Recurrent(Found):
    """Reads a sequence; the recurrent layer has several weights."""

    W = tuple(f"trunk.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

    def build(self) -> None:
        super().build()
        self.trunk = nn.LSTM(1, FEATURES, batch_first=True)

    def represent(self, x: Tensor) -> Tensor:
        return self.trunk(x.unsqueeze(-1))[0][:, -1]


class Columns(Found):
    """One output layer with a column for each task: all read it, but none the same entries."""

    heads_found = "heads: none"

    def build(self) -> None:
        self.trunk, self.output = vector_encoder(), nn.Linear(FEATURES, len(self.tasks))

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        columns = self.output(self.represent(batch["x"])).unbind(1)
        return {t: F.mse_loss(column, batch[t].mean(1)) for t, column in zip(self.tasks, columns, strict=True)}


class Auxiliary(Found):
    """One task reads an earlier layer than the others."""

    W = ("trunk.0.weight",)
    heads_found = "heads: depth → depth_head, normal → normal_head, seg → seg_head"

    def build(self) -> None:
        super().build()
        self.normal_head = nn.Linear(HIDDEN, OUTPUTS)

    def represent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early = self.trunk[:2](x)
        return early, self.trunk[2:](early)

    def predict(self, task: str, z: tuple[Tensor, Tensor]) -> Tensor:
        return super().predict(task, z[0] if task == "normal" else z[1])


class Penalized(Found):
    """One task's loss has a term on the heads' input that passes no head."""

    heads_found = "heads: depth → depth_head, normal → normal_head, losses"

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        z = self.represent(batch["x"])
        losses = {task: F.mse_loss(self.predict(task, z), batch[task]) for task in self.tasks}
        return {**losses, "seg": losses["seg"] + 0.3 * z.square().mean()}


class Functional(Found):
    """Its heads are parameters without modules."""

    heads_found = "heads: none"

    def build(self) -> None:
        self.trunk = vector_encoder()
        self.weights = nn.ParameterDict({task: 0.5 * torch.randn(OUTPUTS, FEATURES) for task in self.tasks})

    def predict(self, task: str, z: Tensor) -> Tensor:
        return F.linear(z, self.weights[task])


class ChangesCourse(Found):
    """Takes another course in its third batch: two tasks exchange their heads, and the third passes its own by."""

    def build(self) -> None:
        super().build()
        self.calls = 0

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        self.calls += 1
        return super().task_losses(batch)

    def predict(self, task: str, z: Tensor) -> Tensor:
        if self.calls != 3:
            return super().predict(task, z)
        return z[:, :OUTPUTS] if task == "normal" else super().predict({"seg": "depth", "depth": "seg"}[task], z)


class ZeroAtFirst(Found):
    """One head begins with zeros: its task moves nothing in the first step."""

    def build(self) -> None:
        super().build()
        nn.init.zeros_(self.normal_head.weight)


class ByHand(Found, Manual):
    """Optimizes manually."""


class EachAlone(ByHand):
    """Back-propagates each task's loss separately."""

    shows_all_first = True

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        losses = self.task_losses(batch)
        optimizer: Any = self.optimizers()
        if batch_idx % self.accumulate == 0:
            optimizer.zero_grad()
        if self.shows_all_first:
            self.gradnorm[0].watch(losses)
        for task, loss in losses.items():
            if not self.shows_all_first:
                self.gradnorm[0].watch({task: loss})
            self.manual_backward(loss / self.accumulate, retain_graph=True)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer.step()


class EachShownAlone(EachAlone):
    """Shows each loss right before its own backward pass."""

    shows_all_first = False


class Adversarial(ByHand):
    """A critic with its own optimizer steps first; the last task's loss is the critic's output."""

    def build(self) -> None:
        super().build()
        self.critic = nn.Sequential(nn.Linear(OUTPUTS, 4), nn.Tanh(), nn.Linear(4, 1))

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        z = self.represent(batch["x"])
        losses = {task: F.mse_loss(self.predict(task, z), batch[task]) for task in self.tasks[:-1]}
        return {**losses, "normal": (self.critic(self.predict("normal", z)) - 1).square().mean()}

    def critics_loss(self, batch: Batch) -> Tensor:
        made = self.predict("normal", self.represent(batch["x"])).detach()
        return (self.critic(batch["normal"]) - 1).square().mean() + self.critic(made).square().mean()

    def optimizer_of(self, critic: bool) -> torch.optim.Optimizer:
        return network_sgd([p for name, p in self.named_parameters() if name.startswith("critic") == critic])

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        return [self.optimizer_of(critic=True), self.optimizer_of(critic=False)]

    def oracle_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer_of(critic=False)

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        critics, own = self.optimizers()
        critics.zero_grad()
        self.manual_backward(self.critics_loss(batch))
        critics.step()
        losses = self.task_losses(batch)
        self.gradnorm[0].watch(losses)
        own.zero_grad()
        self.manual_backward(torch.stack(list(losses.values())).sum())
        own.step()

    def oracle_options(self, batches: Sequence[Batch]) -> dict[str, Any]:
        critics = self.optimizer_of(critic=True)

        def step(index: int) -> None:
            critics.zero_grad()
            self.critics_loss(batches[index]).backward()
            critics.step()

        return {"before_micro_batch": step}


NETWORKS: Mapping[str, Callable[..., Found]] = {
    "a trunk of another name": Found,
    "a residual block": Residual,
    "a low-rank adapter in a frozen trunk": Adapted,
    "an LSTM": Recurrent,
    "an output layer with a column for each task": Columns,
    "an auxiliary task at an earlier layer": Auxiliary,
    "a penalty on what the heads read": Penalized,
    "heads that are parameters": Functional,
    "another course in the third batch": ChangesCourse,
    "manual optimization": ByHand,
    "one backward pass for each task": EachAlone,
    "a critic that steps first": Adversarial,
}


def state(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def train_unnamed(
    trainer: MakeTrainer, model: Any, batches: list[Any], accumulate: int = 1, **options: Any
) -> tuple[GradNorm, Recorder]:
    """Train with nothing named but the tasks."""
    gradnorm = GradNorm(NAMES, **options)
    if not model.automatic_optimization:
        model.gradnorm = [gradnorm]
    of_trainer = {"accumulate_grad_batches": accumulate} if model.automatic_optimization else {}
    recorder, before = Recorder(gradnorm, accumulate), traces(model)
    trainer(callbacks=[gradnorm, recorder], **of_trainer).fit(model, Batches(batches))
    if model.can_be_copied:
        assert_clean(model, before)
    assert traces(model) == before
    return gradnorm, recorder


def assert_follows_textbook(
    trainer: MakeTrainer,
    make: Callable[[], Found],
    *,
    accumulate: int = 1,
    oracle: Mapping[str, Any] | None = None,
    heads: Any = "auto",
    **options: Any,
) -> str:
    """Train with nothing named, and with the textbook; return the callback's description of what it found."""
    batches, twin, model = vector_batches(3, STEPS * accumulate), make(), make()
    W = [twin.get_parameter(name) for name in twin.W]
    of_oracle = {"accumulate": accumulate, **twin.oracle_options(batches), **(oracle or {}), **options}
    trajectory = textbook.train(twin, twin.forward_for_textbook, batches, W, twin.oracle_optimizer(), **of_oracle)
    assert max(abs(weight - 1) for weight in trajectory.weights[-1].values()) > 1e-3
    gradnorm, recorder = train_unnamed(trainer, model, batches, accumulate, heads=heads, **options)
    assert_agrees(recorder, model, trajectory, twin, tolerance=TOLERANCE, state=state)
    for name in twin.W:
        assert f"{name} (" in repr(gradnorm)
    return repr(gradnorm)
