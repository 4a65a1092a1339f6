"""Losses as people report them: computed, masked, shaped and combined in unexpected ways.

If it can be trained, it is compared with the textbook or with the same training in plain code; otherwise the error names it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from harness import Batches, MemoryLogger, Recorder, assert_agrees, assert_clean, case, traces
from loops import Network
from models import Batch, learn_from_textbook, network_sgd, vector_batches
from shapes.losses import KINDS, NAMES, Generator, GradientPenalty, LearnedVariances, Pair, SecondDerivative, Teacher
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
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

HEADS = {task: f"{task}_head" for task in NAMES}
MakeTrainer = Callable[..., L.Trainer]


# ---- losses of all kinds, against the textbook -------------------------------------------------------------------------


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", None], ids=["auto", "no-heads"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_all_kinds_agree_with_the_textbook(kind: type[Pair], heads: Any, quiet_trainer: MakeTrainer) -> None:
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
    assert_agrees(recorder, model, trajectory, twin, state=nn.Module.state_dict)
    assert_clean(model, before)


class BackwardOneByOne(Pair):
    """Each loss has its own backward pass, through a retained graph; one step for both."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        losses, optimizer = self.given(batch), self.optimizers()
        self.trainer.callbacks[0].watch(losses)
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(losses["seg"], retain_graph=True)
        self.manual_backward(losses["depth"])
        optimizer.step()  # type: ignore[union-attr]


class InChunks(Pair):
    """One loss is computed in checkpointed chunks, as for large vocabularies."""

    def given(self, batch: Batch) -> dict[str, Tensor]:
        def error(z: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(self.said("seg", z), target, reduction="sum")

        z = self.encoder(batch["x"])
        pairs = zip(z.chunk(2), batch["seg"].chunk(2), strict=True)
        chunks: list[Tensor] = [checkpoint(error, *pair, use_reentrant=False) for pair in pairs]
        return {"seg": torch.stack(chunks).sum() / batch["seg"].numel(), "depth": self.error("depth", z, batch)}


class BothErrors(torch.autograd.Function):
    """Two losses of one custom function."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        return a.square().mean(), b.square().mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(2 * g * one / one.numel() for g, one in zip(gradients, ctx.saved_tensors, strict=True))


class OfOneFunction(Pair):
    def given(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        both = BothErrors.apply(*(self.said(task, z) - batch[task] for task in NAMES))
        return dict(zip(NAMES, both, strict=True))


class Offloaded(Pair):
    """Activations are kept elsewhere until the backward pass, which asks for them more than once."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        with torch.autograd.graph.save_on_cpu():
            return super().training_step(batch, batch_idx)


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", None], ids=["auto", "no-heads"])
@pytest.mark.parametrize("kind", [BackwardOneByOne, InChunks, OfOneFunction, Offloaded])
def test_the_weights_do_not_depend_on_how_the_losses_are_computed(
    kind: type[Pair], heads: Any, quiet_trainer: MakeTrainer
) -> None:
    batches, model, twin = vector_batches(2, STEPS), kind(), Pair()
    trajectory = learn_from_textbook(twin, batches)
    gradnorm = GradNorm(NAMES, heads=heads)
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin)


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
    assert_agrees(recorder, model, trajectory, twin, state=nn.Module.state_dict)


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


@pytest.mark.parametrize("kind", [GradientPenalty, SecondDerivative])
def test_losses_made_of_gradients_are_looked_at_again(kind: type[Pair], quiet_trainer: MakeTrainer) -> None:
    """By FAMO, after the step."""
    batches, model, twin, famo = vector_batches(2, STEPS), kind(), kind(), S.FAMO(2).double()
    optimizer = network_sgd(twin.parameters())
    for batch in batches:
        losses = torch.stack([*twin.given(batch).values()])
        (weights,) = torch.autograd.grad(famo(leaf := losses.detach().requires_grad_()), leaf)
        optimizer.zero_grad()
        (weights * losses).sum().backward()
        optimizer.step()
        famo.update(torch.stack([*twin.given(batch).values()]).detach())
    callback = Scalarization(S.FAMO, tasks=NAMES)
    quiet_trainer(callbacks=[callback]).fit(model, Batches(batches))
    assert [callback.weights[task] for task in NAMES] == pytest.approx(weights.tolist(), abs=1e-12)
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


class Unlabeled(Pair):
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


class UnlabeledRows(Unlabeled):
    """A loss for each labeled example: none in one batch."""

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
    """The state of the network and the strategy."""
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
    kind = UnlabeledRows if instead == "no value" else Unlabeled
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
        quiet_trainer(callbacks=[monitor], logger=logger).fit(Unlabeled(2, made), Batches(vector_batches(2, STEPS)))
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
        Unlabeled(0, instead),
        GradNorm(NAMES),
        "'depth'",
        "or None",
        batches=vector_batches(2, 3),
    )
    with pytest.warns(UserWarning, match="'depth' was a constant in a batch .*counts as absent") as warned:
        found = trained(quiet_trainer, Unlabeled(2, instead), GradNorm(NAMES))
    assert len([one for one in warned if "constant" in str(one.message)]) == 1
    expected = trained(quiet_trainer, Unlabeled(2, nothing), GradNorm(NAMES))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)


# ---- numbers of few digits, tensors of another class -------------------------------------------------------------------


class Low(L.LightningModule):
    """A network in half precision whose losses have the given values."""

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


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 3000.0), (torch.bfloat16, 1 + 2**-7)], ids=str)
def test_losses_of_half_precision_are_averaged_in_single_precision(
    dtype: torch.dtype, size: float, quiet_trainer: MakeTrainer
) -> None:
    """In their own a sum of 40 has lost the last digits, or is infinite from 65 504 on."""
    gradnorm = GradNorm(NAMES)
    quiet_trainer(callbacks=[gradnorm], accumulate_grad_batches=40).fit(
        Low(dtype, size), Batches([torch.ones(1, 2)] * 40)
    )
    assert gradnorm.rule.initial_losses.tolist() == [size, 2.0]
    assert gradnorm.rule.skipped == 0


class WithPosition(Tensor):
    """A tensor that remembers its origin, as in medical imaging. Results computed from it have its class."""


class Positioned(Pair):
    def given(self, batch: Batch) -> dict[str, Tensor]:
        return super().given({**batch, "x": batch["x"].as_subclass(WithPosition)})


@pytest.mark.each_value_once
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_state_from_a_tensor_subclass_is_plain(strategy: str, quiet_trainer: MakeTrainer, tmp_path: Any) -> None:
    found = []
    for kind in (Positioned, Pair):
        callback = STRATEGIES[strategy]()
        trainer = quiet_trainer(callbacks=[callback])
        trainer.fit(kind(), Batches(vector_batches(2, STEPS)))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        torch.load(tmp_path / "last.ckpt", weights_only=True)
        found.append(callback.weights)
    assert found[0] == found[1]


# ---- what is refused ---------------------------------------------------------------------------------------------------


class ParameterAsLoss(Pair):
    """One loss is a parameter itself, which is used elsewhere too: a hook on it would stay, and would weight both."""

    def build(self) -> None:
        super().build()
        self.multiplier = nn.Parameter(torch.ones(()))

    def given(self, batch: Batch) -> dict[str, Tensor]:
        return {"seg": self.multiplier * super().given(batch)["seg"], "depth": self.multiplier}


class LeftOut(Pair):
    """Adds up only the finite losses, and returns all."""

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
    for unlabeled in (torch.full_like(batches[2][1]["depth"], torch.nan), None):
        batches[2][1]["depth"] = unlabeled
        network = Pair()
        tasks = {task: Task(head=network.get_submodule(f"{task}_head"), loss=masked) for task in NAMES}
        gradnorm, module = GradNorm(), MultiTaskModule(encoder=network.encoder, tasks=tasks, optimizer=network_sgd)
        quiet_trainer(callbacks=[gradnorm]).fit(module, Batches(batches))
        found.append({**module.state_dict(), **{t: torch.tensor(w) for t, w in gradnorm.weights.items()}})
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-12, msg=name)
