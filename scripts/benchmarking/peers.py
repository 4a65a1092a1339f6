"""GradNorm from other packages, and TorchJD as documented, all with the same manual optimization."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torchjd.aggregation import Aggregator, UPGrad
from torchjd.autojac import jac_to_grad, mtl_backward
from typing_extensions import override

from benchmarking.models import ByHand

ALPHA = 1.5


class Textbook(ByHand):
    """The paper's Algorithm 1 to the letter: differentiates ``L_grad`` through the gradients, only for the weights."""

    def __init__(self, kind: str, tasks: int, compiled: bool = False) -> None:
        super().__init__(kind, tasks, compiled)
        self.weights = nn.Parameter(torch.ones(tasks))
        self.initial: Tensor | None = None

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.weights_optimizer = torch.optim.Adam([self.weights], lr=0.025)
        return torch.optim.Adam([*self.encoder.parameters(), *self.heads.parameters()], lr=1e-4)

    @override
    def differentiate(self, z: Tensor, losses: list[Tensor]) -> None:
        weighted = [weight * loss for weight, loss in zip(self.weights, losses, strict=True)]
        gradients = [torch.autograd.grad(loss, self.shared_weight, create_graph=True)[0] for loss in weighted]
        norms = torch.stack([gradient.norm() for gradient in gradients])
        now = torch.stack([loss.detach() for loss in losses])
        self.initial = now if self.initial is None else self.initial
        ratio = now / self.initial
        target = (norms.mean() * (ratio / ratio.mean()) ** ALPHA).detach()
        (self.weights.grad,) = torch.autograd.grad((norms - target).abs().sum(), self.weights, retain_graph=True)
        in_force = self.weights.detach().clone()
        self.manual_backward(sum(weight * loss for weight, loss in zip(in_force, losses, strict=True)))
        self.weights_optimizer.step()
        with torch.no_grad():
            self.weights.clamp_(min=1e-4).mul_(len(losses) / self.weights.sum())


class GradNormPytorch(ByHand):
    """gradnorm-pytorch's `GradNormLossWeighter`, with the weight of the shared layer."""

    def __init__(self, kind: str, tasks: int, compiled: bool = False) -> None:
        super().__init__(kind, tasks, compiled)
        self.weighter = gradnorm_pytorch()(
            num_losses=tasks, restoring_force_alpha=ALPHA, grad_norm_parameters=self.shared_weight
        )

    @override
    def differentiate(self, z: Tensor, losses: list[Tensor]) -> None:
        self.weighter(losses)


class LibMTLGradNorm(ByHand):
    """LibMTL's GradNorm with its default, norms over all shared parameters, fed as its Trainer feeds it."""

    def __init__(self, kind: str, tasks: int, compiled: bool = False) -> None:
        super().__init__(kind, tasks, compiled)
        weighting = libmtl_gradnorm()()
        weighting.task_num, weighting.rep_grad = tasks, False
        weighting.epoch, weighting.train_loss_buffer = 1, torch.ones(tasks, 1)  # it does not balance in epoch 0
        weighting.get_share_params = self.encoder.parameters
        # Written for torch 1, where zero_grad() leaves zeros, which receive the weighted gradient.
        weighting.zero_grad_share_params = partial(self.encoder.zero_grad, set_to_none=False)
        weighting.device = self.device
        weighting.init_param()
        self.weighting = weighting

    @override
    def differentiate(self, z: Tensor, losses: list[Tensor]) -> None:
        self.weighting.device = self.device  # Lightning has moved the model
        held = torch.zeros(len(losses), device=self.device)
        for place, loss in enumerate(losses):
            held[place] = loss
        self.weighting.backward(held, alpha=ALPHA)


class TorchJD(ByHand):
    """An aggregator over the shared parameters, as in TorchJD's documentation."""

    def __init__(self, kind: str, tasks: int, compiled: bool = False, aggregator: Aggregator | None = None) -> None:
        super().__init__(kind, tasks, compiled)
        self.aggregator = aggregator or UPGrad()

    @override
    def differentiate(self, z: Tensor, losses: list[Tensor]) -> None:
        mtl_backward(losses, features=z)
        jac_to_grad(list(self.encoder.parameters()), self.aggregator)


@cache
def gradnorm_pytorch() -> Any:
    return importlib.import_module("gradnorm_pytorch").GradNormLossWeighter


@cache
def libmtl_gradnorm() -> Any:
    """Return only LibMTL's class. ``import LibMTL`` needs torchvision, and modules that torchvision no longer has."""
    found = importlib.util.find_spec("LibMTL")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'LibMTL'")
    folder = Path(found.submodule_search_locations[0])
    for name, place in (("LibMTL", folder), ("LibMTL.weighting", folder / "weighting")):
        package = ModuleType(name)
        package.__path__ = [str(place)]
        sys.modules[name] = package
    return importlib.import_module("LibMTL.weighting.GradNorm").GradNorm
