"""Tiny float64 networks, their batches, and the parts that the textbook needs to train them.

Every network is built from a seed, so two calls give identical parameters: one goes to the Trainer, one to the oracle.
Each network's `forward_for_textbook` repeats its `training_step` in plain torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import textbook
import torch
from textbook import Forward
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm import GradNorm, MultiTaskModule, Task

TASKS = ("seg", "depth", "normal", "edge", "keypoint", "albedo")
INPUTS, HIDDEN, FEATURES, OUTPUTS = 5, 7, 6, 3
Batch = dict[str, Tensor]

network_sgd = partial(torch.optim.SGD, lr=0.02, momentum=0.9)  # SGD, not Adam: Adam would hide a wrong gradient scale


def vector_batches(T: int, count: int, seed: int = 11, size: int = 4) -> list[Batch]:
    """Regression batches `{"x": (size, 5), task: (size, 3)}`; the targets' scales differ by task, as losses do in practice."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        batch = {"x": torch.randn(size, INPUTS, generator=generator, dtype=torch.float64)}
        for i, task in enumerate(TASKS[:T]):
            batch[task] = (0.5 + 0.7 * i) * torch.randn(size, OUTPUTS, generator=generator, dtype=torch.float64)
        batches.append(batch)
    return batches


def as_inputs_and_targets(batches: Sequence[Batch]) -> list[tuple[Tensor, Batch]]:
    """The same batches in the form a `MultiTaskModule` takes."""
    return [(batch["x"], {name: value for name, value in batch.items() if name != "x"}) for batch in batches]


def image_batches(T: int, count: int, seed: int = 13) -> list[Batch]:
    """`{"x": (3, 2, 6, 6), task: (3, 1, 6, 6)}`."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        batch = {"x": torch.randn(3, 2, 6, 6, generator=generator, dtype=torch.float64)}
        for i, task in enumerate(TASKS[:T]):
            batch[task] = (0.5 + i) * torch.randn(3, 1, 6, 6, generator=generator, dtype=torch.float64)
        batches.append(batch)
    return batches


def vector_encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, FEATURES), nn.Tanh())


class Automatic(L.LightningModule):
    """A user's module as design 3.1 shows it: encoder, heads, a dict returned by an untouched `training_step`."""

    def __init__(self, T: int = 3, seed: int = 0, reverse: bool = False) -> None:
        super().__init__()
        self.tasks = TASKS[:T]
        self.reverse = reverse  # returns its losses in another order, under the same names
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)  # built on the CPU
            self.build()
        self.double()

    def build(self) -> None:
        self.encoder = vector_encoder()
        for task in self.tasks:
            setattr(self, f"{task}_head", nn.Linear(FEATURES, OUTPUTS))

    def heads(self) -> dict[str, str]:
        return {task: f"{task}_head" for task in self.tasks}

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        return {task: F.mse_loss(getattr(self, f"{task}_head")(z), batch[task]) for task in self.tasks}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        losses = self.task_losses(batch)
        if self.reverse:
            losses = dict(reversed(losses.items()))
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return network_sgd(self.parameters())

    def shared_parameters(self) -> list[nn.Parameter]:
        """What `shared_layer=None` must find: the last weight of two or more dimensions inside the encoder."""
        return [self.encoder[2].weight]  # type: ignore[union-attr,list-item]

    def forward_for_textbook(self, batch: Batch) -> Forward:
        z = self.encoder(batch["x"])
        losses = {task: F.mse_loss(getattr(self, f"{task}_head")(z), batch[task]) for task in self.tasks}
        return Forward(losses, representation=[z])


class WithoutTargets(L.LightningModule):
    """An encoder and heads that a test creates; each task's loss is the mean square of its head's output."""

    encoder: nn.Module
    heads: nn.ModuleDict

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        z = self.encoder(batch)
        losses = {task: (i + 1) * head(z).square().mean() for i, (task, head) in enumerate(self.heads.items())}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithCoefficients(Automatic):
    """`loss` has the user's own coefficient on each task, and a regularizer that is no task."""

    coefficients: Mapping[str, float] = {
        "seg": 2.0,
        "depth": 0.5,
        "normal": 1.25,
        "edge": 3.0,
        "keypoint": 0.1,
        "albedo": 1.0,
    }

    def regularizer(self) -> Tensor:
        penalty = torch.zeros((), dtype=torch.float64)
        for parameter in self.parameters():
            penalty = penalty + parameter.square().sum()
        return 0.01 * penalty

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        losses = self.task_losses(batch)
        weighted = torch.stack([self.coefficients[task] * loss for task, loss in losses.items()]).sum()
        return {"loss": weighted + self.regularizer(), **losses}

    def forward_for_textbook(self, batch: Batch) -> Forward:
        forward = super().forward_for_textbook(batch)
        forward.rest = self.regularizer()
        return forward


class Convolutional(Automatic):
    """Convolutions and batch norm: its running statistics show whether a layer was run more than once."""

    def build(self) -> None:
        self.encoder = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Conv2d(4, 3, 3, padding=1),
            nn.BatchNorm2d(3),
        )
        for task in self.tasks:
            head = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 1, 1))
            setattr(self, f"{task}_head", head)

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.encoder[3].weight]  # type: ignore[union-attr,list-item]


class WithDropout(Automatic):
    """Dropout behind the shared layer and in the heads: a second forward pass would draw a second mask."""

    def build(self) -> None:
        self.encoder = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, FEATURES), nn.Dropout(0.3))
        for task in self.tasks:
            setattr(self, f"{task}_head", nn.Sequential(nn.Dropout(0.2), nn.Linear(FEATURES, OUTPUTS)))


class Pyramid(nn.Module):
    """An encoder that returns several feature maps, as `{"fine": z, "coarse": z'}` or as `(z, z')`."""

    def __init__(self, container: type[dict[str, Tensor]] | type[tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.container = container
        self.stem = nn.Linear(INPUTS, HIDDEN)
        self.top = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x: Tensor) -> Any:
        fine = torch.tanh(self.stem(x))
        coarse = torch.tanh(self.top(fine))
        return {"fine": fine, "coarse": coarse} if self.container is dict else (fine, coarse)


class PyramidHead(nn.Module):
    """Reads both feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.from_fine = nn.Linear(HIDDEN, OUTPUTS)
        self.from_coarse = nn.Linear(FEATURES, OUTPUTS)

    def forward(self, z: Any) -> Tensor:
        fine, coarse = (z["fine"], z["coarse"]) if isinstance(z, dict) else z
        return self.from_fine(fine) + self.from_coarse(coarse)


class Nested(Automatic):
    """The representation is a dict or a tuple of tensors."""

    def __init__(self, T: int = 3, seed: int = 0, container: type = dict) -> None:
        self.container = container
        super().__init__(T, seed)

    def build(self) -> None:
        self.encoder = Pyramid(self.container)
        for task in self.tasks:
            setattr(self, f"{task}_head", PyramidHead())

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.encoder.top.weight]

    def forward_for_textbook(self, batch: Batch) -> Forward:
        z = self.encoder(batch["x"])
        losses = {task: F.mse_loss(getattr(self, f"{task}_head")(z), batch[task]) for task in self.tasks}
        return Forward(losses, representation=list(z.values()) if isinstance(z, dict) else list(z))


class Manual(Automatic):
    """Manual optimization with its own accumulation; it passes its losses to `gradnorm` before `manual_backward`."""

    def __init__(self, T: int = 3, seed: int = 0, accumulate: int = 1) -> None:
        super().__init__(T, seed)
        self.automatic_optimization = False
        self.accumulate = accumulate
        self.gradnorm: list[GradNorm] = []  # set by the test; empty: train without

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        losses = self.task_losses(batch)
        for gradnorm in self.gradnorm:
            gradnorm.watch(losses)
        optimizer: Any = self.optimizers()
        if batch_idx % self.accumulate == 0:
            optimizer.zero_grad()
        self.manual_backward(torch.stack(list(losses.values())).sum() / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer.step()


class OnlyLogs(Automatic):
    """Returns nothing but its loss; the task losses are seen where they are logged."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        losses = self.task_losses(batch)
        first, *others = losses.items()
        self.log(f"train/{first[0]}_loss", first[1])
        self.log_dict({f"train/{task}_loss": loss for task, loss in others})
        return torch.stack(list(losses.values())).sum()

    def logged_names(self) -> dict[str, str]:
        return {task: f"train/{task}_loss" for task in self.tasks}


def multi_task_module(T: int = 3, seed: int = 0, **options: Any) -> MultiTaskModule:
    """The `Automatic` network as a `MultiTaskModule`: same seed, same parameters, same order of construction."""
    network = Automatic(T, seed)
    tasks = {task: Task(head=getattr(network, f"{task}_head"), loss=F.mse_loss) for task in network.tasks}
    return MultiTaskModule(encoder=network.encoder, tasks=tasks, **{"optimizer": network_sgd, **options})


class Regularized(Automatic):
    """`loss` has a term that is no task, on the parameters and on the representation itself."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        given = self.forward_for_textbook(batch)
        return {"loss": sum(given.losses.values()) + given.rest, **given.losses}

    def forward_for_textbook(self, batch: Any) -> Any:
        given = super().forward_for_textbook(batch)
        given.rest = 0.3 * given.representation[0].square().mean() + 0.01 * self.encoder[0].weight.square().sum()
        return given


def learn_from_textbook(
    twin: Automatic, batches: list[Any], shared: list[nn.Parameter] | None = None, **options: Any
) -> textbook.Trajectory:
    """Train the twin as the textbook does, by default with the model's own shared layer."""
    shared = twin.shared_parameters() if shared is None else shared
    return textbook.train(twin, twin.forward_for_textbook, batches, shared, network_sgd(twin.parameters()), **options)
