"""A network as a LightningModule: with automatic optimization, by hand, and as a `MultiTaskModule`."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
import torch._functorch.config
from torch import Tensor, nn
from typing_extensions import override

from benchmarking.networks import NETWORKS
from lightning_gradnorm import MultiTaskModule, Task
from lightning_gradnorm.experiments.problems.pde import PINN, Burgers, CollocationDataModule


def mean_square(prediction: Tensor, target: Any = None) -> Tensor:
    """Return a very cheap loss."""
    return prediction.square().mean()


def trunk_and_heads(
    kind: str, tasks: int, compiled: bool, *, walked_once: bool = True
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return the network's trunk and heads, identical in each call, each compiled separately.

    Args:
        kind: name of the network.
        tasks: number of tasks.
        compiled: use `torch.compile`.
        walked_once: allow a backward pass to free a compiled graph, as by default.
    """
    torch.manual_seed(0)
    network = NETWORKS[kind]
    trunk, heads = network.trunk(), {f"task_{i}": network.head(i) for i in range(tasks)}
    if not compiled:
        return trunk, heads
    # Compilations of earlier runs count toward dynamo's limit. Beyond it, dynamo silently runs eagerly.
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = walked_once  # type: ignore[attr-defined]
    # Static shapes: after other networks, dynamo would compile for dynamic shapes.
    of_these_shapes: Any = partial(torch.compile, dynamic=False)
    return of_these_shapes(trunk), {task: of_these_shapes(head) for task, head in heads.items()}


class Model(L.LightningModule):
    """A typical user's model: a trunk, T heads, and T losses in the returned mapping."""

    walked_once = True

    def __init__(self, kind: str, tasks: int, compiled: bool = False) -> None:
        super().__init__()
        self.encoder, heads = trunk_and_heads(kind, tasks, compiled, walked_once=self.walked_once)
        self.heads = nn.ModuleDict(heads)
        self.head_names = {task: f"heads.{task}" for task in heads}
        self.shared_layer = NETWORKS[kind].shared_layer

    @property
    def shared_weight(self) -> nn.Parameter:
        return self.get_parameter(f"{self.shared_layer}.weight")

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        z = self.encoder(batch)
        losses = {task: mean_square(head(z)) for task, head in self.heads.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class ByHand(Model):
    """The same network with manual optimization. `differentiate` sets the gradient of each parameter."""

    walked_once = False

    def __init__(self, kind: str, tasks: int, compiled: bool = False) -> None:
        super().__init__(kind, tasks, compiled)
        self.automatic_optimization = False

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        z = self.encoder(batch)
        losses = [mean_square(head(z)) for head in self.heads.values()]
        # A backward pass, and computations with its gradients, belong outside autocast.
        with torch.autocast(self.device.type, enabled=False):
            self.differentiate(z, losses)
        optimizer.step()  # type: ignore[union-attr]

    def differentiate(self, z: Tensor, losses: list[Tensor]) -> None:
        raise NotImplementedError


class Module(MultiTaskModule):
    """The same network as a `MultiTaskModule`."""

    def __init__(self, kind: str, tasks: int, compiled: bool = False) -> None:
        encoder, heads = trunk_and_heads(kind, tasks, compiled)
        super().__init__(
            encoder,
            {task: Task(head, mean_square) for task, head in heads.items()},
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-4),
        )

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        super().training_step((batch, dict.fromkeys(self.tasks, batch)), batch_idx)


class Physics(PINN):
    """Burgers' equation with its three losses and no heads, always on the same points, those of experiment=pinn_burgers."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        super().__init__(Burgers(), NETWORKS[kind].trunk())
        data = CollocationDataModule(self.equation, {"pde": 256, "boundary": 32, "initial": 64}, resample=False)
        data.setup()
        self.points = data.train_data.points

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:  # type: ignore[override]
        points = {task: one.to(self.device) for task, one in self.points.items()}
        return super().training_step(points, batch_idx)
