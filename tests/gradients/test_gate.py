"""The gate at the representation does not interfere with a user's other computations next to an aggregation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches
from models import Automatic, Batch, Manual, as_inputs_and_targets, multi_task_module, vector_batches
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd.aggregation import MGDA, Sum, UPGrad, Weighting

from lightning_gradnorm import Aggregation
from lightning_gradnorm.strategies import DBMTL

NAMES = ["seg", "depth"]
MakeTrainer = Callable[..., L.Trainer]
AT = pytest.mark.parametrize("at", ["representation", "parameters"])
HEADS = pytest.mark.parametrize("with_heads", [False, True], ids=["no-heads", "heads"])


def aggregation(model: Automatic, aggregator: Any, with_heads: bool = True, **options: Any) -> Aggregation:
    return Aggregation(aggregator, NAMES, heads=model.heads() if with_heads else None, **options)


class TakesGradients(Automatic):
    """Computes its own gradient in `training_step`."""

    def __init__(self) -> None:
        super().__init__(2)
        self.seen: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        losses = self.task_losses(batch)
        (found,) = torch.autograd.grad(losses["seg"], [self.encoder[2].weight], retain_graph=True)
        self.seen.append(float(found.norm()))
        return {"loss": losses["seg"] + losses["depth"], **losses}


@AT
@HEADS
def test_a_gradient_that_the_user_takes_for_himself_is_the_gradient(
    at: str, with_heads: bool, quiet_trainer: MakeTrainer
) -> None:
    model, plain = TakesGradients(), TakesGradients()
    quiet_trainer(callbacks=[aggregation(model, Sum(), with_heads, at=at)]).fit(model, Batches(vector_batches(2, 4)))
    quiet_trainer().fit(plain, Batches(vector_batches(2, 4)))
    assert model.seen == pytest.approx(plain.seen, rel=1e-12)
    assert min(plain.seen) > 0.01


class Penalized(Automatic):
    """A gradient penalty that is no task: it is differentiated twice, through the encoder."""

    def __init__(self) -> None:
        super().__init__(2)
        self.penalties: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        batch = {**batch, "x": batch["x"].clone().requires_grad_()}
        losses = self.task_losses(batch)
        total = losses["seg"] + losses["depth"]
        (slope,) = torch.autograd.grad(total, [batch["x"]], create_graph=True)
        penalty = slope.square().sum()
        self.penalties.append(float(penalty.detach()))
        return {"loss": total + 0.1 * penalty, **losses}


def test_a_gradient_penalty_is_differentiated_through_the_gate(quiet_trainer: MakeTrainer) -> None:
    model, plain = Penalized(), Penalized()
    quiet_trainer(callbacks=[aggregation(model, Sum(), with_heads=False)]).fit(model, Batches(vector_batches(2, 5)))
    quiet_trainer().fit(plain, Batches(vector_batches(2, 5)))
    assert min(plain.penalties) > 1e-4
    assert model.penalties == pytest.approx(plain.penalties, rel=1e-9)
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


class Around(Automatic):
    """The loss of `depth` also reads the encoder's first layer, of the very forward pass."""

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        inner: list[Tensor] = []
        with_hook = self.encoder[1].register_forward_hook(lambda *args: inner.append(args[2]))
        losses = super().task_losses(batch)
        with_hook.remove()
        return {**losses, "depth": losses["depth"] + inner[0].square().mean()}


@HEADS
def test_a_way_around_the_representation_is_refused(with_heads: bool, quiet_trainer: MakeTrainer) -> None:
    model = Around(2)
    with pytest.raises(ValueError, match=r"task 'depth' reaches the inside of 'encoder' by a path that does not pass"):
        quiet_trainer(callbacks=[aggregation(model, MGDA(), with_heads)]).fit(model, Batches(vector_batches(2, 2)))


def test_at_the_parameters_it_is_refused_where_heads_are_named_alone(quiet_trainer: MakeTrainer) -> None:
    model = Around(2)
    with pytest.raises(ValueError, match=r"'depth' reaches what the tasks share by a path that .* Leave heads out"):
        quiet_trainer(callbacks=[aggregation(model, MGDA(), at="parameters")]).fit(model, Batches(vector_batches(2, 2)))


def test_an_encoder_that_is_not_called_is_named(quiet_trainer: MakeTrainer) -> None:
    class NotCalled(Automatic):
        def task_losses(self, batch: Batch) -> dict[str, Tensor]:
            z = self.encoder.forward(batch["x"])
            return {t: F.mse_loss(getattr(self, f"{t}_head")(z), batch[t]) for t in self.tasks}

    model = NotCalled(2)
    with pytest.raises(ValueError, match=r"cannot be read at 'encoder', which was not called in the forward pass"):
        quiet_trainer(callbacks=[aggregation(model, MGDA())]).fit(model, Batches(vector_batches(2, 2)))


class Annealed(Automatic):
    """From its third batch on, the loss of `depth` has a term of the representation."""

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        losses = {t: F.mse_loss(getattr(self, f"{t}_head")(z), batch[t]) for t in self.tasks}
        if batch_idx >= 2:
            losses["depth"] = losses["depth"] + z.square().mean()
        return {"loss": losses["seg"] + losses["depth"], **losses}


def test_a_way_around_a_head_that_opens_in_mid_training_is_read_at_the_loss(quiet_trainer: MakeTrainer) -> None:
    states = []
    for with_heads in (True, False):
        model = Annealed(2)
        callback = aggregation(model, MGDA(), with_heads=with_heads)
        quiet_trainer(callbacks=[callback]).fit(model, Batches(vector_batches(2, 4)))
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=1e-9)


class OneByOne(Manual):
    """A backward pass for each task."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        losses = self.task_losses(batch)
        self.gradnorm[0].watch(losses)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(losses["seg"], retain_graph=True)
        self.manual_backward(losses["depth"])
        optimizer.step()


@HEADS
def test_a_backward_pass_for_each_task_is_refused_at_the_representation(
    with_heads: bool, quiet_trainer: MakeTrainer
) -> None:
    model = OneByOne(2)
    balancing = aggregation(model, MGDA(), with_heads)
    model.gradnorm = [balancing]  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"task 'depth' has its own backward pass.*sum of the losses"):
        quiet_trainer(callbacks=[balancing]).fit(model, Batches(vector_batches(2, 2)))


def test_a_backward_pass_for_each_task_is_right_at_the_parameters(quiet_trainer: MakeTrainer) -> None:
    ended = []
    for kind in (OneByOne, Manual):
        model = kind(2)
        balancing = aggregation(model, MGDA(), at="parameters")
        model.gradnorm = [balancing]  # type: ignore[list-item]
        quiet_trainer(callbacks=[balancing]).fit(model, Batches(vector_batches(2, 4)))
        ended.append(balancing.weights)
    assert ended[0] == pytest.approx(ended[1], rel=1e-12)


class GradientsInValidation(Automatic):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.enable_grad():
            self.encoder(batch["x"]).sum().backward()
            self.encoder(batch["x"])
        self.zero_grad()


def test_validation_in_mid_epoch_may_take_gradients(quiet_trainer: MakeTrainer) -> None:
    model, plain = GradientsInValidation(2), Automatic(2)
    options = {"val_check_interval": 2, "inference_mode": False}
    batches = vector_batches(2, 6)
    quiet_trainer(callbacks=[aggregation(model, UPGrad())], **options).fit(
        model, Batches(batches), Batches(batches[:2])
    )
    quiet_trainer(callbacks=[aggregation(plain, UPGrad())]).fit(plain, Batches(batches))
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)


class TwoOutputs(Automatic):
    """Its encoder also returns what no head reads."""

    def build(self) -> None:
        super().build()
        trunk, unread = self.encoder, nn.Linear(5, 2)

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.trunk, self.unread = trunk, unread

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"z": self.trunk(x), "unread": self.unread(x)}

        self.encoder = Both()  # type: ignore[assignment]

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])["z"]
        return {t: F.mse_loss(getattr(self, f"{t}_head")(z), batch[t]) for t in self.tasks}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)


@HEADS
def test_outputs_that_no_head_reads_have_no_gradient(with_heads: bool, quiet_trainer: MakeTrainer) -> None:
    model = TwoOutputs(2)
    before = copy.deepcopy(model.encoder.unread.weight)
    quiet_trainer(callbacks=[aggregation(model, UPGrad(), with_heads)]).fit(model, Batches(vector_batches(2, 3)))
    assert torch.equal(model.encoder.unread.weight, before), "weight decay acts on what has a gradient"


def test_a_copy_of_the_encoder_made_in_mid_training_is_left_alone(quiet_trainer: MakeTrainer) -> None:
    class WithTeacher(Automatic):
        def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
            teacher = copy.deepcopy(self.encoder)
            output = super().training_step(batch, batch_idx)
            output["loss"] = output["loss"] + 0 * teacher(batch["x"]).sum()
            return output

    model, plain = WithTeacher(2), Automatic(2)
    quiet_trainer(callbacks=[aggregation(model, UPGrad())]).fit(model, Batches(vector_batches(2, 4)))
    quiet_trainer(callbacks=[aggregation(plain, UPGrad())]).fit(plain, Batches(vector_batches(2, 4)))
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_frozen_trunk_behind_inputs_with_gradients_trains_its_heads(quiet_trainer: MakeTrainer) -> None:
    class Frozen(Automatic):
        def task_losses(self, batch: Batch) -> dict[str, Tensor]:
            return super().task_losses({**batch, "x": batch["x"].clone().requires_grad_()})

    model = Frozen(2)
    model.encoder.requires_grad_(False)
    heads = pickle.dumps(model.seg_head.state_dict())
    with pytest.warns(UserWarning, match="what the tasks share is frozen"):
        quiet_trainer(callbacks=[aggregation(model, UPGrad(), at="parameters")]).fit(
            model, Batches(vector_batches(2, 3))
        )
    assert pickle.dumps(model.seg_head.state_dict()) != heads


# ---- absent tasks and other models -----------------------------------------------------------------------------------


class MayLack(Automatic):
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        z = self.encoder(batch["x"])
        losses = {t: F.mse_loss(getattr(self, f"{t}_head")(z), batch[t]) for t in self.tasks if t in batch}
        return {"loss": torch.stack(list(losses.values())).sum(), **dict.fromkeys(self.tasks), **losses}


class FixedShares(Weighting):  # type: ignore[type-arg]
    """A user's own, whose options go by the tasks' places and are no tensors."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("shares", torch.tensor([0.3, 0.7], dtype=torch.float64))
        else:
            self.shares = [0.3, 0.7]  # type: ignore[assignment]

    def forward(self, stat: Tensor, /) -> Tensor:
        return torch.as_tensor(self.shares, dtype=stat.dtype)[: len(stat)].clone()


@pytest.mark.parametrize("buffer", [False, True])
def test_positional_options_stay_with_their_task_when_another_is_absent(
    buffer: bool, quiet_trainer: MakeTrainer
) -> None:
    batches = vector_batches(2, 4)
    for batch in batches[2:]:
        del batch["seg"]
    model = MayLack(2)
    balancing = aggregation(model, FixedShares(buffer))
    quiet_trainer(callbacks=[balancing]).fit(model, Batches(batches))
    assert balancing.weights == {"seg": 0.3, "depth": 0.7}
    assert balancing.state_dict()["fallbacks"] == 0


def test_an_average_of_gradients_is_taken_up_again_when_an_absent_task_is_back(quiet_trainer: MakeTrainer) -> None:
    batches = vector_batches(2, 6)
    del batches[0]["seg"], batches[3]["seg"]
    model = MayLack(2)
    balancing = aggregation(model, DBMTL(), at="parameters")
    quiet_trainer(callbacks=[balancing]).fit(model, Batches(batches))
    assert balancing.state_dict()["fallbacks"] == 0


def test_the_same_trainer_with_another_model_begins_anew(quiet_trainer: MakeTrainer) -> None:
    balancing = Aggregation(UPGrad())
    trainer = quiet_trainer(callbacks=[balancing])
    batches = as_inputs_and_targets(vector_batches(2, 3))
    trainer.fit(multi_task_module(2), Batches(batches))
    assert set(balancing.weights) == {"seg", "depth"}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(multi_task_module(3), Batches(as_inputs_and_targets(vector_batches(3, 3))))
    assert set(balancing.weights) == {"seg", "depth", "normal"}
