"""Losses that people train with, each in a network of two tasks that the textbook can also train."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import FEATURES, INPUTS, OUTPUTS, Automatic, Batch, network_sgd, vector_encoder
from textbook import Forward
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ["seg", "depth"]


class Pair(Automatic):
    """Two tasks; `given` computes a batch's losses, both for the Trainer and for the textbook."""

    def __init__(self) -> None:
        super().__init__(2)

    def said(self, task: str, z: Tensor) -> Tensor:
        said: Tensor = self.get_submodule(f"{task}_head")(z)
        return said

    def error(self, task: str, z: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(self.said(task, z), batch[task])

    def given(self, batch: Batch) -> dict[str, Any]:
        z = self.encoder(batch["x"])
        return {task: self.error(task, z, batch) for task in NAMES}

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        losses = self.given(batch)
        return {"loss": sum(losses.values()), **losses}

    def forward_for_textbook(self, batch: Batch) -> Forward:
        return Forward(self.given(batch))


class LearnedVariances(Pair):
    """Each task's loss with a learned log-variance in it (Kendall et al.)."""

    def build(self) -> None:
        super().build()
        self.log_variances = nn.Parameter(torch.tensor([0.3, -0.2]))

    def given(self, batch: Batch) -> dict[str, Tensor]:
        pairs = zip(super().given(batch).items(), self.log_variances, strict=True)
        return {task: torch.exp(-s) * loss + 0.5 * s + 2 for (task, loss), s in pairs}


class FocalAndDice(Pair):
    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        truths = {task: (batch[task] > 0).double() for task in NAMES}
        p = torch.sigmoid(self.said("seg", z))
        right = torch.where(truths["seg"] > 0, p, 1 - p)
        q = torch.softmax(self.said("depth", z), 1)
        overlap = (2 * (q * truths["depth"]).sum() + 1) / (q.sum() + truths["depth"].sum() + 1)
        return {"seg": (-((1 - right) ** 2) * right.log()).mean(), "depth": 1 - overlap}


class CommonTerm(Pair):
    """A penalty on the representation is in both losses."""

    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        penalty = 0.3 * z.square().mean()
        return {task: self.error(task, z, batch) + penalty for task in NAMES}


class PenaltyOnOneWeight(Pair):
    """One task is the L1 norm of a layer, and nothing else."""

    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        return {"seg": self.error("seg", z, batch), "depth": 0.1 * self.encoder[2].weight.abs().sum()}


class GradientPenalty(Pair):
    """One task asks the critic for gradients of length 1 (WGAN-GP): a backward pass inside the loss."""

    def given(self, batch: Batch) -> dict[str, Tensor]:
        x = batch["x"].clone().requires_grad_()
        z = self.encoder(x)
        (slope,) = torch.autograd.grad(self.said("depth", z).sum(), x, create_graph=True)
        return {"seg": self.error("seg", z, batch), "depth": (slope.norm(dim=1) - 1).square().mean()}


class SecondDerivative(Pair):
    """The residual of a differential equation, and data."""

    def build(self) -> None:
        self.encoder = vector_encoder()
        self.last = nn.Linear(FEATURES, 1)

    def given(self, batch: Batch) -> dict[str, Tensor]:
        x = batch["x"].clone().requires_grad_()
        u = self.last(self.encoder(x))
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
        return {"seg": F.mse_loss(u, batch["seg"][:, :1]), "depth": (second[:, 0] + u[:, 0]).square().mean()}

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.last.weight]


class Adversarial(Pair):
    """One task is the other's loss at an example made from its gradient."""

    def given(self, batch: Batch) -> dict[str, Tensor]:
        x = batch["x"].clone().requires_grad_()
        clean = self.error("seg", self.encoder(x), batch)
        (slope,) = torch.autograd.grad(clean, x, retain_graph=True)
        attacked = self.encoder(x.detach() + 0.1 * slope.sign())
        return {"seg": clean, "depth": self.error("seg", attacked, batch)}

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.seg_head.weight]


class Teacher(Pair):
    """One task follows a moving average of the network."""

    def build(self) -> None:
        super().build()
        self.teacher = copy.deepcopy(nn.Sequential(self.encoder, self.depth_head))

    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        with torch.no_grad():
            wanted = self.teacher(batch["x"] + 0.1)
        said = self.said("depth", z)
        return {"seg": self.error("seg", z, batch), "depth": F.mse_loss(said, wanted) + 0.01 * said.square().mean()}

    @torch.no_grad()
    def follow(self) -> None:
        for average, now in zip(self.teacher[0].parameters(), self.encoder.parameters(), strict=True):
            average.lerp_(now, 0.1)

    def on_train_batch_end(self, *args: Any) -> None:
        self.follow()


class Queue(Pair):
    """A contrastive loss against a queue of older examples, which each batch changes in place."""

    def build(self) -> None:
        super().build()
        self.register_buffer("queue", torch.randn(8, OUTPUTS))
        self.place = 0

    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        query = F.normalize(self.said("depth", z), dim=1)
        with torch.no_grad():
            key = F.normalize(self.said("depth", self.encoder(batch["x"] + 0.1)), dim=1)
        similar = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone().T], 1) / 0.2
        self.queue[self.place : self.place + 4] = key
        self.place = (self.place + 4) % 8
        contrast = F.cross_entropy(similar, torch.zeros(4, dtype=torch.long))
        return {"seg": self.error("seg", z, batch), "depth": contrast}


class Codebook(Pair):
    """A straight-through estimator with codebook and commitment losses."""

    def build(self) -> None:
        super().build()
        self.codes = nn.Parameter(torch.randn(5, FEATURES))

    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        code = self.codes[torch.cdist(z, self.codes).argmin(1)]
        committed = F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, code.detach())
        return {"seg": self.error("seg", z + (code - z).detach(), batch), "depth": committed}


class StoppedGradients(Pair):
    """Two views; each predicts the other's detached projection (SimSiam)."""

    def given(self, batch: Batch) -> dict[str, Tensor]:
        views = [self.encoder(batch["x"]), self.encoder(batch["x"] + 0.1)]
        predicted = [self.said("depth", z) for z in views]
        projected = [self.said("seg", z) for z in views]
        likeness = [F.cosine_similarity(predicted[i], projected[1 - i].detach()).mean() for i in (0, 1)]
        return {"seg": F.mse_loss(projected[0], batch["seg"]), "depth": 1.5 - sum(likeness) / 2}


class FreeBits(Pair):
    """Reconstruction, and a divergence for each latent number that costs nothing below a threshold."""

    def build(self) -> None:
        super().build()
        self.mean, self.log_variance = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)

    def given(self, batch: Batch) -> dict[str, Tensor]:
        h = self.encoder(batch["x"])
        mean, log_variance = self.mean(h), self.log_variance(h)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean(0)
        z = mean + 0.3 * torch.exp(log_variance / 2)
        return {"seg": self.error("seg", z, batch), "depth": divergence.clamp(min=0.02).sum()}

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.log_variance.weight]


class ActorAndCritic(Pair):
    """A policy gradient with the detached advantage and an entropy bonus, and the value's error."""

    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        policy = torch.distributions.Categorical(logits=self.said("seg", z))
        value, wanted = self.said("depth", z)[:, 0], batch["depth"][:, 0]
        gained = policy.log_prob(torch.tensor([0, 1, 2, 0])) * (wanted - value).detach()
        return {"seg": 3 - gained.mean() - 0.01 * policy.entropy().mean(), "depth": (value - wanted).square().mean()}


class Distilled(Pair):
    """Both losses use the same output: against labels, and against an older network's output."""

    def build(self) -> None:
        super().build()
        self.old = nn.Linear(INPUTS, OUTPUTS)

    def given(self, batch: Batch) -> dict[str, Tensor]:
        said = self.said("seg", self.encoder(batch["x"]))
        with torch.no_grad():
            soft = F.softmax(self.old(batch["x"]) / 2, 1)
        kept = F.kl_div(F.log_softmax(said / 2, 1), soft, reduction="batchmean")
        return {"seg": F.mse_loss(said, batch["seg"]), "depth": 4 * kept}

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.seg_head.weight]


class Generator(Pair):
    """A generator that reconstructs and deceives, and a discriminator with its own optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def build(self) -> None:
        self.encoder, self.seg_head = vector_encoder(), nn.Linear(FEATURES, OUTPUTS)
        self.judge = nn.Sequential(nn.Linear(OUTPUTS, 4), nn.Tanh(), nn.Linear(4, 1))

    def optimizers_of(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        generator = [*self.encoder.parameters(), *self.seg_head.parameters()]
        return network_sgd(generator), network_sgd(self.judge.parameters())

    def configure_optimizers(self) -> Any:
        return self.optimizers_of()

    def judged(self, batch: Batch) -> Tensor:
        made = self.seg_head(self.encoder(batch["x"])).detach()
        return F.softplus(-self.judge(batch["seg"])).mean() + F.softplus(self.judge(made)).mean()

    def given(self, batch: Batch) -> dict[str, Tensor]:
        made = self.seg_head(self.encoder(batch["x"]))
        return {"seg": F.l1_loss(made, batch["seg"]), "depth": F.softplus(-self.judge(made)).mean()}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        generator, judge = self.optimizers()  # type: ignore[misc]
        for optimizer, loss in ((judge, self.judged), (generator, self.deceive)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def deceive(self, batch: Batch) -> Tensor:
        losses = self.given(batch)
        self.trainer.callbacks[0].watch(losses)
        return losses["seg"] + 0.3 * losses["depth"]


KINDS = [LearnedVariances, FocalAndDice, CommonTerm, PenaltyOnOneWeight, GradientPenalty, SecondDerivative, Adversarial]
KINDS += [Teacher, Queue, Codebook, StoppedGradients, FreeBits, ActorAndCritic, Distilled]
