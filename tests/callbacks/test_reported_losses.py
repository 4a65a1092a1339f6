"""Losses as people report them: made, masked, shaped and combined in ways that nobody here would have thought of.

What can be trained is held against the textbook or against the same training written plainly; what cannot, is named.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from harness import Batches, MemoryLogger, Recorder, assert_agrees, assert_clean, case, traces
from loops import Network
from models import FEATURES, OUTPUTS, Automatic, Batch, learn_from_textbook, network_sgd, vector_batches, vector_encoder
from textbook import Forward
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd import aggregation as A
from torchjd import scalarization as S
from torchmetrics import MeanMetric
from wrong_inputs import fails

from lightning_gradnorm import (
    Aggregation,
    Balancer,
    FixedWeights,
    GradientNormMonitor,
    GradNorm,
    MultiTaskModule,
    Scalarization,
    Task,
)
from lightning_gradnorm.strategies import GradNormRule

STEPS = 5
NAMES = ["seg", "depth"]
HEADS = {task: f"{task}_head" for task in NAMES}
MakeTrainer = Callable[..., L.Trainer]


class Pair(Automatic):
    """Two tasks; `given` says what a batch gives, to the Trainer and to the textbook alike."""

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


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


# ---- losses of all kinds, against the textbook -------------------------------------------------------------------------


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
    """Two views, each of which predicts the other's detached projection (SimSiam)."""

    def given(self, batch: Batch) -> dict[str, Tensor]:
        views = [self.encoder(batch["x"]), self.encoder(batch["x"] + 0.1)]
        predicted = [self.said("depth", z) for z in views]
        projected = [self.said("seg", z) for z in views]
        likeness = [F.cosine_similarity(predicted[i], projected[1 - i].detach()).mean() for i in (0, 1)]
        return {"seg": F.mse_loss(projected[0], batch["seg"]), "depth": 1.5 - sum(likeness) / 2}


KINDS = [LearnedVariances, FocalAndDice, CommonTerm, PenaltyOnOneWeight, GradientPenalty, SecondDerivative, Adversarial]
KINDS += [Teacher, Queue, Codebook, StoppedGradients]


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", None], ids=["auto", "no-heads"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_all_kinds_are_balanced_as_the_textbook_says(
    kind: type[Pair], heads: Any, quiet_trainer: MakeTrainer
) -> None:
    batches, model, twin = vector_batches(2, STEPS), kind(), kind()
    follows = isinstance(twin, Teacher)
    trajectory = learn_from_textbook(
        twin, batches, before_micro_batch=lambda index: twin.follow() if follows and index else None
    )
    if follows:
        twin.follow()
    assert abs(trajectory.weights[-1]["seg"] - 1) > 1e-4
    gradnorm, before = GradNorm(NAMES, heads=heads), traces(model)
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin, state=state_of)
    assert_clean(model, before)


class Generator(Pair):
    """A generator that reconstructs and deceives, and a discriminator with an optimizer of its own."""

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


@pytest.mark.parametrize("heads", ["auto", None], ids=["auto", "no-heads"])
def test_a_generator_is_balanced_beside_its_discriminator(heads: Any, quiet_trainer: MakeTrainer) -> None:
    batches, model, twin = vector_batches(2, STEPS), Generator(), Generator()
    generator, judge = twin.optimizers_of()

    def judge_first(index: int) -> None:
        judge.zero_grad()
        twin.judged(batches[index]).backward(inputs=list(twin.judge.parameters()))
        judge.step()

    trajectory = textbook.train(
        twin, twin.forward_for_textbook, batches, [twin.seg_head.weight], generator,
        coefficients={"seg": 1.0, "depth": 0.3}, before_micro_batch=judge_first,
    )  # fmt: skip
    gradnorm = GradNorm(NAMES, heads=heads)
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin, state=state_of)


def test_a_learned_coefficient_is_the_users_own(quiet_trainer: MakeTrainer) -> None:
    """The weight scales the task's gradient; the coefficient learns as without us, from the loss alone."""

    class Learned(LearnedVariances):
        def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
            losses = Pair.given(self, batch)
            s = self.log_variances
            total = torch.stack([torch.exp(-s[i]) * loss + s[i] for i, loss in enumerate(losses.values())]).sum()
            return {"loss": total, **losses}

    weights, (batch,) = {"seg": 0.4, "depth": 1.6}, vector_batches(2, 1)
    model, twin = Learned(), Learned()
    quiet_trainer(callbacks=[FixedWeights(weights, tasks=NAMES)]).fit(model, Batches([batch]))
    losses, s = Pair.given(twin, batch), twin.log_variances
    total = sum(weights[t] * torch.exp(-s[i]).detach() * loss for i, (t, loss) in enumerate(losses.items()))
    total = total + sum(torch.exp(-s[i]) * loss.detach() + s[i] for i, loss in enumerate(losses.values()))
    optimizer = network_sgd(twin.parameters())
    total.backward()
    optimizer.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-12, msg=name)


# ---- a batch without labels --------------------------------------------------------------------------------------------

CONSTANTS: dict[str, Callable[[], Any]] = {
    "0.0": lambda: 0.0,
    "0": lambda: 0,
    "tensor(0.0)": lambda: torch.tensor(0.0),
    "zeros(1)": lambda: torch.zeros(1),
    "zeros(requires_grad=True)": lambda: torch.zeros((), requires_grad=True),
    "computed of zeros(requires_grad=True)": lambda: 2 * torch.zeros(1, requires_grad=True).sum(),
}


class Unlabelled(Pair):
    """In one batch, `depth` is something else."""

    def __init__(self, at: int, instead: Callable[[], Any]) -> None:
        super().__init__()
        self.at, self.instead = at, instead

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        losses: dict[str, Any] = self.given(batch)
        if batch_idx == self.at:
            losses["depth"] = self.instead()
        return {
            "loss": sum(loss.sum() if isinstance(loss, Tensor) else loss or 0 for loss in losses.values()),
            **losses,
        }


class UnlabelledRows(Unlabelled):
    """A loss for each labelled example: none in one batch."""

    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        return {task: (self.said(task, z) - batch[task]).square().mean(1) / 4 for task in NAMES}


STRATEGIES: dict[str, Callable[[], Any]] = {
    "GradNorm": lambda: GradNorm(NAMES),
    "GradNorm, named heads": lambda: GradNorm(NAMES, heads=HEADS),
    "GradNorm, no heads": lambda: GradNorm(NAMES, heads=None),
    "UW": lambda: Scalarization(S.UW(2), tasks=NAMES),
    "FAMO": lambda: Scalarization(S.FAMO(2), tasks=NAMES),
    "UPGrad": lambda: Aggregation(A.UPGrad(), tasks=NAMES),
}


def trained(trainer: MakeTrainer, model: L.LightningModule, callback: Any) -> dict[str, Any]:
    """What the network and the strategy have learnt."""
    trainer(callbacks=[callback]).fit(model, Batches(vector_batches(2, STEPS)))
    return {**model.state_dict(), **{f"weight of {task}": torch.tensor(w) for task, w in callback.weights.items()}}


def nothing() -> None:
    return None


@pytest.mark.each_value_once
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("at", [0, 2], ids=["first", "later"])
@pytest.mark.parametrize("instead", [*CONSTANTS, "no value"])
def test_a_loss_that_is_a_constant_0_is_that_of_an_absent_task(
    instead: str, at: int, strategy: str, quiet_trainer: MakeTrainer
) -> None:
    kind = UnlabelledRows if instead == "no value" else Unlabelled
    made = CONSTANTS.get(instead, lambda: torch.zeros(0, requires_grad=True) * 2)
    found = trained(quiet_trainer, kind(at, made), STRATEGIES[strategy]())
    expected = trained(quiet_trainer, kind(at, nothing), STRATEGIES[strategy]())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("instead", [*CONSTANTS, "no value"])
def test_the_monitor_leaves_a_constant_out(instead: str, quiet_trainer: MakeTrainer) -> None:
    shown = []
    for made in (CONSTANTS.get(instead, lambda: torch.zeros(0, requires_grad=True) * 2), nothing):
        monitor = GradientNormMonitor(NAMES, every_n_steps=1)
        logger = MemoryLogger()
        quiet_trainer(callbacks=[monitor], logger=logger).fit(Unlabelled(2, made), Batches(vector_batches(2, STEPS)))
        shown.append({key: of_key for key, of_key in logger.scalars.items() if "norm" in key})
    assert shown[0] == shown[1] != {}


@pytest.mark.parametrize("instead", CONSTANTS)
def test_a_balancer_takes_a_constant_for_an_absent_task(instead: str) -> None:
    found = []
    for made in (CONSTANTS[instead], nothing):
        model = Network(2)
        optimizer = network_sgd(model.parameters())
        with Balancer(model, GradNormRule(NAMES)) as balancer:
            for index, batch in enumerate(vector_batches(2, STEPS)):
                losses = model(batch) if index != 2 else {**model(batch), "depth": made()}
                optimizer.zero_grad()
                balancer.backward(losses)
                optimizer.step()
                balancer.step()
            found.append((balancer.weights, [p.detach().clone() for p in model.parameters()]))
            with torch.no_grad():
                assert float(balancer.prepare_loss({"seg": torch.ones(()), "depth": made()})) == 1.0
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-12)


def a_number() -> float:
    return 0.5


def a_tensor() -> Tensor:
    return torch.tensor(0.5)


@pytest.mark.parametrize("instead", [a_number, a_tensor])
def test_another_constant_is_a_mistake_at_first_and_warned_of_later(instead: str, quiet_trainer: MakeTrainer) -> None:
    """``max(kl, 0.5)`` is a number where the divergence is small; ``.item()`` is one everywhere."""
    fails(
        quiet_trainer,
        Unlabelled(0, instead),
        GradNorm(NAMES),
        "'depth'",
        "or None",
        batches=vector_batches(2, 3),
    )
    with pytest.warns(UserWarning, match="'depth' was a constant in a batch .*counts as absent") as warned:
        found = trained(quiet_trainer, Unlabelled(2, instead), GradNorm(NAMES))
    assert len([one for one in warned if "constant" in str(one.message)]) == 1
    expected = trained(quiet_trainer, Unlabelled(2, nothing), GradNorm(NAMES))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)


# ---- numbers of few digits, tensors of another class -------------------------------------------------------------------


class Low(L.LightningModule):
    """A network in half precision, the losses of which are what it says they are."""

    def __init__(self, dtype: torch.dtype, size: float) -> None:
        super().__init__()
        self.encoder, self.heads = nn.Linear(2, 2), nn.ModuleDict({task: nn.Linear(2, 1) for task in NAMES})
        self.to(dtype)
        self.size = size

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        z = self.encoder(batch.to(self.dtype))
        losses = {task: (0 * head(z) + head(z) - head(z).detach()).sum() for task, head in self.heads.items()}
        losses = {"seg": losses["seg"] + self.size, "depth": losses["depth"] + 2.0}
        assert losses["seg"].dtype == self.dtype
        return {"loss": 1e-3 * sum(losses.values()), **losses}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 3000.0), (torch.bfloat16, 1.0)], ids=str)
def test_losses_of_half_precision_are_averaged_in_single_precision(
    dtype: torch.dtype, size: float, quiet_trainer: MakeTrainer
) -> None:
    """In their own a sum of 400 stops growing at 256, or is infinite from 65 504 on."""
    gradnorm = GradNorm(NAMES)
    quiet_trainer(callbacks=[gradnorm], accumulate_grad_batches=400).fit(
        Low(dtype, size), Batches([torch.ones(1, 2)] * 400)
    )
    assert gradnorm.rule.initial_losses.tolist() == [size, 2.0]
    assert gradnorm.rule.skipped == 0


class WithPosition(Tensor):
    """A tensor that remembers where it comes from, as those of medical images do. What is computed of it is of its class."""


class Positioned(Pair):
    def given(self, batch: Batch) -> dict[str, Tensor]:
        return super().given({**batch, "x": batch["x"].as_subclass(WithPosition)})


@pytest.mark.each_value_once
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_strategy_remembers_of_a_tensors_subclass_is_plain(
    strategy: str, quiet_trainer: MakeTrainer, tmp_path: Any
) -> None:
    found = []
    for kind in (Positioned, Pair):
        callback = STRATEGIES[strategy]()
        trainer = quiet_trainer(callbacks=[callback])
        trainer.fit(kind(), Batches(vector_batches(2, STEPS)))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        torch.load(tmp_path / "last.ckpt", weights_only=True)
        found.append(callback.weights)
    assert found[0] == found[1]


# ---- functions that overwrite what they have saved ---------------------------------------------------------------------


class OverwritesSaved(torch.autograd.Function):
    """Mean squared error whose gradient is computed in the forward pass and scaled in place in the backward pass.

    By way of ``.data``, since a kernel does not count as a change in place either.
    """

    @staticmethod
    def forward(ctx: Any, said: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward((2 / said.numel()) * (said - target))
        return (said - target).square().mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (saved,) = ctx.saved_tensors
        if gradient != 1:
            saved.data.mul_(gradient)
        return saved, None


class OverwritesArrived(torch.autograd.Function):
    """A norm by a constant that writes its gradient over the one that has arrived."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z * 1.5

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient.data.mul_(1.5)
        return gradient


class FusedLoss(Pair):
    """The loss of `seg` is of a fused kernel; with coefficient 1 or another."""

    coefficient = 0.5
    fused = True

    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        said = self.said("seg", z)
        seg = OverwritesSaved.apply(said, batch["seg"]) if self.fused else F.mse_loss(said, batch["seg"])
        return {"seg": seg, "depth": self.error("depth", z, batch)}

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        losses = self.given(batch)
        return {"loss": self.coefficient * losses["seg"] + losses["depth"], **losses}


class FusedLossOf1(FusedLoss):
    coefficient = 1.0


@pytest.mark.parametrize("kind", [FusedLoss, FusedLossOf1])
def test_a_fused_loss_is_refused_where_it_would_be_passed_twice(
    kind: type[FusedLoss], quiet_trainer: MakeTrainer
) -> None:
    expected = ("'seg'", "OverwritesSavedBackward", "overwrite", "name shared_layer and heads")
    for options in ({}, {"heads": None}, {"heads": None, "shared_layer": "encoder.2"}):
        callback = GradNorm(NAMES, **options)
        fails(quiet_trainer, kind(), callback, "GradNorm", *expected, batches=vector_batches(2, 3))
    monitor = GradientNormMonitor(NAMES, every_n_steps=1)
    fails(quiet_trainer, kind(), monitor, "GradientNormMonitor", *expected[:3], batches=vector_batches(2, 3))


@pytest.mark.parametrize("kind", [FusedLoss, FusedLossOf1])
def test_a_fused_loss_is_balanced_below_its_head(kind: type[FusedLoss], quiet_trainer: MakeTrainer) -> None:
    batches, model, twin = vector_batches(2, STEPS), kind(), kind()
    twin.fused = False
    trajectory = learn_from_textbook(twin, batches, coefficients={"seg": kind.coefficient, "depth": 1.0})
    gradnorm = GradNorm(NAMES, heads=HEADS, shared_layer="encoder.2")
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)


class FusedNorm(Pair):
    """Between the shared layer and the heads, or in a head, something overwrites the gradient that arrives."""

    fused, in_head = True, False

    def scaled(self, z: Tensor) -> Tensor:
        return OverwritesArrived.apply(z) if self.fused else z * 1.5

    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        z = z if self.in_head else self.scaled(z)
        return {task: self.error(task, self.scaled(z) if self.in_head else z, batch) for task in NAMES}


class FusedNormInHead(FusedNorm):
    in_head = True


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", HEADS, None], ids=["auto", "heads", "no-heads"])
@pytest.mark.parametrize("kind", [FusedNorm, FusedNormInHead])
def test_a_function_that_overwrites_what_arrives_is_lent_a_copy(
    kind: type[FusedNorm], heads: Any, quiet_trainer: MakeTrainer
) -> None:
    batches, model, twin = vector_batches(2, STEPS), kind(), kind()
    twin.fused = False
    trajectory = learn_from_textbook(twin, batches)
    gradnorm = GradNorm(NAMES, heads=heads, shared_layer="encoder.2")
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)


# ---- what is refused ---------------------------------------------------------------------------------------------------


class ParameterAsLoss(Pair):
    """One loss is a parameter itself, which is used elsewhere too: a hook on it would stay, and would weight both."""

    def build(self) -> None:
        super().build()
        self.multiplier = nn.Parameter(torch.ones(()))

    def given(self, batch: Batch) -> dict[str, Tensor]:
        return {"seg": self.multiplier * super().given(batch)["seg"], "depth": self.multiplier}


class LeftOut(Pair):
    """Adds up what is finite alone, and returns all."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        losses = self.given(batch)
        if batch_idx == 1:
            losses["depth"] = losses["depth"] * torch.nan
        return {"loss": sum(loss for loss in losses.values() if torch.isfinite(loss)), **losses}


class LogsMetric(Pair):
    def build(self) -> None:
        super().build()
        self.mean = MeanMetric()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.given(batch)
        self.mean(losses["depth"].detach())
        self.log("seg", losses["seg"])
        self.log("depth", self.mean)
        return torch.stack([*losses.values()]).sum()


REFUSED = [
    case("a parameter itself", ParameterAsLoss, NAMES, ["'depth'", "a parameter itself", "1 * parameter"]),
    case("left out of the sum in one batch", LeftOut, NAMES, ["'depth'", "took no part", "leaves it out, give None"]),
    case("a metric", LogsMetric, dict(zip(NAMES, NAMES, strict=True)), ["'depth'", "MeanMetric", "a metric"]),
]


@pytest.mark.parametrize(("kind", "tasks", "expected"), REFUSED)
def test_a_loss_that_cannot_be_weighted_is_named(
    kind: type[Pair], tasks: Any, expected: list[str], quiet_trainer: MakeTrainer
) -> None:
    for strategy in (GradNorm, partial(GradNorm, heads=None), partial(FixedWeights, {"seg": 0.5, "depth": 1.5})):
        fails(quiet_trainer, kind(), strategy(tasks=tasks), *expected, batches=vector_batches(2, 3))


# ---- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("a.b", "c/d e"), ("weights", "tasks"), ("表", "Größe"), ("Seg", "seg ")], ids=str)
def test_a_task_may_have_any_name(names: tuple[str, str], quiet_trainer: MakeTrainer, tmp_path: Any) -> None:
    class Renamed(Pair):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            losses = self.given(batch)
            return {"loss": sum(losses.values()), **dict(zip(names, losses.values(), strict=True))}

    found = []
    for kind, tasks in ((Renamed, names), (Pair, NAMES)):
        gradnorm, logger = GradNorm(tasks), MemoryLogger()
        trainer = quiet_trainer(callbacks=[gradnorm], logger=logger)
        trainer.fit(kind(), Batches(vector_batches(2, STEPS)))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
        found.append([gradnorm.weights[task] for task in tasks])
        assert [logger.scalars[f"gradnorm/weight/{task}"][-1] for task in tasks] == pytest.approx(found[-1])
        assert state["GradNorm"]["tasks"] == list(tasks)
    assert found[0] == found[1]


def test_a_task_of_our_own_module_may_return_a_constant(quiet_trainer: MakeTrainer) -> None:
    def masked(said: Tensor, target: Tensor) -> Tensor:
        known = ~target.isnan()
        return F.mse_loss(said[known], target[known]) if known.any() else torch.zeros(())

    batches = [(batch["x"], {task: batch[task] for task in NAMES}) for batch in vector_batches(2, STEPS)]
    found = []
    for unlabelled in (torch.full_like(batches[2][1]["depth"], torch.nan), None):
        batches[2][1]["depth"] = unlabelled
        network = Pair()
        tasks = {task: Task(head=network.get_submodule(f"{task}_head"), loss=masked) for task in NAMES}
        gradnorm, module = GradNorm(), MultiTaskModule(encoder=network.encoder, tasks=tasks, optimizer=network_sgd)
        quiet_trainer(callbacks=[gradnorm]).fit(module, Batches(batches))
        found.append({**module.state_dict(), **{t: torch.tensor(w) for t, w in gradnorm.weights.items()}})
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-12, msg=name)
