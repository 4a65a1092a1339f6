"""The gradients of several tasks at a small layer are read in one product, with the numbers of one by one and the textbook."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, Recorder, assert_agrees
from loops import distance, gradnorm_rule, parameter_distance, train
from models import (
    FEATURES,
    HIDDEN,
    INPUTS,
    OUTPUTS,
    TASKS,
    Automatic,
    Batch,
    learn_from_textbook,
    vector_batches,
)
from textbook import Forward
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm import Balancer, GradNorm
from lightning_gradnorm.gradients import WeightGradients, reading

T, STEPS = len(TASKS), 4
sgd = partial(torch.optim.SGD, lr=0.05)  # the size of a norm shows in the step, which Adam would hide


class Situation(Automatic):
    """Six tasks, linear heads on one representation."""

    shared_layer = "encoder.2"
    together: tuple[int, ...] = (T,)
    """How many gradients each product reads in a step."""

    def __init__(self) -> None:
        super().__init__(T)

    def head(self, task: str) -> nn.Module:
        return self.get_submodule(f"{task}_head")

    def read(self, task: str, z: Any) -> Any:
        return self.head(task)(z)

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        return {task: self.read(task, z) for task in self.tasks}

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        found = self.predictions(batch)
        return {task: F.mse_loss(found[task], batch[task]) for task in found if task in batch}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.task_losses(batch)

    def forward_for_textbook(self, batch: Batch) -> Forward:
        return Forward(self.task_losses(batch))

    def shared_parameters(self) -> list[nn.Parameter]:
        parameter = self.shared_layer if self.shared_layer.endswith("weight") else f"{self.shared_layer}.weight"
        return [self.get_parameter(parameter)]


class TwoPlaces(Situation):
    """Two tasks' heads read the output of the shared layer, the others a tensor computed from it."""

    together = (4,)

    def build(self) -> None:
        super().build()
        self.above = nn.Linear(FEATURES, FEATURES)

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        higher = torch.tanh(self.above(z))
        return {task: self.read(task, z if place < 2 else higher) for place, task in enumerate(self.tasks)}


class ManyPlaces(TwoPlaces):
    """Each head reads a tensor of its own."""

    together = ()

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        return {task: self.read(task, z.view_as(z)) for task in self.tasks}


class ReadsTuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(FEATURES, OUTPUTS), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        result: Tensor = self.one(pair[0]) + self.other(pair[1])
        return result


class Tuples(Situation):
    """The heads read a tuple of two tensors, both computed from the shared layer; one head ignores the second of them."""

    shared_layer = "encoder.0"
    together = (5,)

    def build(self) -> None:
        super().build()
        for task in self.tasks:
            setattr(self, f"{task}_head", ReadsTuple())
        self.seg_head.forward = lambda pair: self.seg_head.one(pair[0])  # type: ignore[union-attr,method-assign]

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        hidden = torch.tanh(self.encoder[0](batch["x"]))  # type: ignore[index]
        pair = torch.tanh(self.encoder[2](hidden)), hidden  # type: ignore[index]
        return {task: self.read(task, pair) for task in self.tasks}


class Unused(Situation):
    """A head is called, but what it returns is in no loss."""

    together = (5,)

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        losses = super().task_losses(batch)
        del losses["edge"]
        return losses


class CalledTwice(Situation):
    """The first task's head is called twice with the same tensor."""

    together = (T + 1,)

    def read(self, task: str, z: Any) -> Any:
        return super().read(task, z) + (super().read(task, z).square() if task == "seg" else 0.0)


class Checkpointed(Situation):
    """The trunk is recomputed in backward, with a batch norm inside."""

    shared_layer = "encoder.2"

    def build(self) -> None:
        super().build()
        self.encoder = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, FEATURES))

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        z = checkpoint(self.encoder, batch["x"], use_reentrant=False)
        return {task: self.read(task, z) for task in self.tasks}


class WithHook(Situation):
    """A hook changes the gradient at the representation."""

    together = ()

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(batch["x"])
        z.register_hook(lambda gradient: 0.5 * gradient)
        return {task: self.read(task, z) for task in self.tasks}


class HalfOfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        assert gradients[0].ndim == 2, "it is not made for the gradients of several tasks"
        return 0.5 * gradients[0]


class CustomFunction(Situation):
    """A custom autograd function is between the representation and the shared layer."""

    together = ()

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        z = torch.tanh(HalfOfGradient.apply(self.encoder(batch["x"])))
        return {task: self.read(task, z) for task in self.tasks}


class ComplexWeight(Situation):
    """The shared weight is complex."""

    shared_layer = "weight"

    def build(self) -> None:
        super().build()
        self.weight = nn.Parameter(torch.randn(INPUTS, FEATURES, dtype=torch.complex128))

    def double(self) -> Any:
        for task in self.tasks:
            self.head(task).double()
        self.encoder = nn.Identity()
        return self

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        z = (batch["x"].to(self.weight.dtype) @ self.weight).abs()
        return {task: self.read(task, z) for task in self.tasks}


class Seen:
    """Records how many gradients each product reads, and can turn products off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.counts: list[int] = []
        original = WeightGradients.rows_together

        def count(reader: WeightGradients, outputs: Any, gradients: Any, count: int) -> Any:
            self.counts.append(count)
            return original(reader, outputs, gradients, count)

        monkeypatch.setattr(WeightGradients, "rows_together", count)

    def turn_off(self) -> None:
        self._patch.setattr(reading, "_FEWEST", 1_000)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def trained(model: Situation, batches: list[Batch], **options: Any) -> list[dict[str, float]]:
    weights, _ = train(
        model, gradnorm_rule(T, optimizer=sgd), batches, shared_layer=model.shared_layer, heads=model.heads(), **options
    )
    return weights


EXACT = [Situation, TwoPlaces, ManyPlaces, Tuples, Unused, CalledTwice, Checkpointed, WithHook, ComplexWeight]


@pytest.mark.parametrize("kind", [*EXACT, CustomFunction])
def test_products_of_several_tasks_change_no_number(kind: type[Situation], seen: Seen) -> None:
    batches, model, twin = vector_batches(T, STEPS), kind(), kind()
    together = trained(model, batches)
    assert seen.counts == STEPS * [*kind.together]
    seen.turn_off()
    assert distance(together, trained(twin, batches)) <= 1e-12
    assert len(seen.counts) == STEPS * len(kind.together)
    assert parameter_distance(model, twin) <= 1e-12
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", EXACT)
def test_a_plain_loop_agrees_with_the_textbook(kind: type[Situation], accumulate: int) -> None:
    batches, model, twin = vector_batches(T, STEPS), kind(), kind()
    options = {"tasks": TASKS, "weight_optimizer": sgd, "alpha": 1.2, "accumulate": accumulate}
    trajectory = learn_from_textbook(twin, batches, **options)
    assert distance(trained(model, batches, accumulate=accumulate), trajectory.weights) <= 1e-9
    assert parameter_distance(model, twin) <= 1e-9


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_callback_agrees_with_the_textbook(
    accumulate: int, seen: Seen, quiet_trainer: Callable[..., L.Trainer]
) -> None:
    batches, model, twin = vector_batches(T, STEPS), Situation(), Situation()
    trajectory = learn_from_textbook(twin, batches, weight_optimizer=sgd, accumulate=accumulate)
    gradnorm = GradNorm(TASKS, shared_layer="encoder.2", heads=model.heads(), optimizer=sgd)
    recorder = Recorder(gradnorm, accumulate)
    trainer = quiet_trainer(callbacks=[gradnorm, recorder], accumulate_grad_batches=accumulate)
    trainer.fit(model, Batches(batches))
    assert seen.counts == STEPS * [T]
    assert_agrees(recorder, model, trajectory, twin)


class TwoPasses(Situation):
    """Two backward passes through one graph, each from some of the losses. The first keeps the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.show: Callable[[Any], object] = lambda losses: None

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        losses = self.task_losses(batch)
        self.show(losses)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        each = list(losses.values())
        self.manual_backward(torch.stack(each[:4]).sum(), retain_graph=True)
        self.manual_backward(torch.stack(each[4:]).sum())
        optimizer.step()


def test_two_backward_passes_through_one_graph_agree_with_the_textbook(
    seen: Seen, quiet_trainer: Callable[..., L.Trainer]
) -> None:
    batches, model, twin = vector_batches(T, STEPS), TwoPasses(), Situation()
    trajectory = learn_from_textbook(twin, batches, weight_optimizer=sgd, alpha=1.2)
    gradnorm = GradNorm(TASKS, shared_layer="encoder.2", heads=model.heads(), optimizer=sgd, alpha=1.2)
    model.show = gradnorm.watch
    quiet_trainer(callbacks=[gradnorm, recorder := Recorder(gradnorm)]).fit(model, Batches(batches))
    assert seen.counts == STEPS * [4]
    assert_agrees(recorder, model, trajectory, twin)


def test_gradients_are_read_after_a_backward_pass_that_ends_at_the_representation(seen: Seen) -> None:
    (batch,) = vector_batches(T, 1)
    weights = []
    for ends_there in (True, False):
        model = Situation()
        with Balancer(
            model, gradnorm_rule(T, optimizer=sgd), shared_layer="encoder.2", heads=model.heads()
        ) as balancer:
            z = model.encoder(batch["x"])
            losses = {task: F.mse_loss(model.read(task, z), batch[task]) for task in TASKS}
            ends = [z] if ends_there else list(model.parameters())
            balancer.backward(losses, backward=partial(torch.autograd.grad, inputs=ends))
            balancer.step()
            weights.append(balancer.weights)
    assert seen.counts == [T, T]
    assert distance(weights[:1], weights[1:]) <= 1e-12


def test_a_failed_backward_pass_leaves_nothing_that_waits(seen: Seen) -> None:
    one, other = vector_batches(T, 2)

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("the user's own")

    def train_one_step(batches: list[Batch]) -> dict[str, float]:
        model = Situation()
        with Balancer(
            model, gradnorm_rule(T, optimizer=sgd), shared_layer="encoder.2", heads=model.heads()
        ) as balancer:
            for batch in batches:
                z = model.encoder(batch["x"])
                found = {task: model.read(task, z) for task in TASKS}
                if batch is not batches[-1]:
                    found["seg"].register_hook(fail)  # the first head is the last in backward: five gradients wait
                losses = {task: F.mse_loss(found[task], batch[task]) for task in TASKS}
                with nullcontext() if batch is batches[-1] else pytest.raises(RuntimeError, match="the user's own"):
                    balancer.backward(losses)
            balancer.step()
            return balancer.weights

    after_failure = train_one_step([one, other])
    assert seen.counts == [T]
    assert after_failure == train_one_step([other])


class Bags(Situation):
    """The shared weight is an embedding with a sparse gradient, which allows no product of several tasks."""

    shared_layer = "encoder"

    def build(self) -> None:
        super().build()
        self.encoder = nn.EmbeddingBag(INPUTS, FEATURES, mode="sum", sparse=True)

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        z = self.encoder(torch.arange(2 * len(batch["x"])).reshape(-1, 2) % INPUTS)
        return {task: self.read(task, z) for task in self.tasks}


def test_an_operation_that_cannot_be_batched_is_tried_once(seen: Seen) -> None:
    batches, model, twin = vector_batches(T, STEPS), Bags(), Bags()
    options = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.02)}
    found = trained(model, batches, **options)
    assert seen.counts == [T]
    seen.turn_off()
    assert found == trained(twin, batches, optimizer=torch.optim.SGD(twin.parameters(), lr=0.02))


def test_a_product_that_gives_other_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    batches, model, twin = vector_batches(T, STEPS), Situation(), Situation()
    counted = WeightGradients.rows_together

    def wrong(*args: Any) -> Any:
        return counted(*args) * 1.001  # type: ignore[operator]

    monkeypatch.setattr(WeightGradients, "rows_together", wrong)
    found = trained(model, batches)
    assert seen.counts == [T]
    seen.turn_off()
    assert found == trained(twin, batches)


def test_in_half_precision_products_are_those_of_one_by_one(seen: Seen) -> None:
    batches = [{name: value.float() for name, value in batch.items()} for batch in vector_batches(T, STEPS)]

    def train_in_bfloat16(model: Situation) -> list[dict[str, float]]:
        model.float()

        def backward(balancer: Balancer, losses: dict[str, Tensor], n: int) -> None:
            balancer.backward(losses)

        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # type: ignore[method-assign]
        return trained(model, batches, backpropagate=backward)

    together = train_in_bfloat16(Situation())
    assert seen.counts == STEPS * [T]
    seen.turn_off()
    assert distance(together, train_in_bfloat16(Situation())) <= 1e-3


def test_a_large_layer_is_read_one_by_one(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    monkeypatch.setattr(reading, "_LARGEST", 3 * 4 * FEATURES)  # less than the representation, its input and the weight
    trained(Situation(), vector_batches(T, 2))
    assert not seen.counts


def test_one_product_has_a_bound_on_its_memory(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    monkeypatch.setattr(reading, "_MOST", 4)
    batches, model, twin = vector_batches(T, STEPS), Situation(), Situation()
    found = trained(model, batches)
    assert seen.counts == STEPS * [4]  # the last two are read one by one
    monkeypatch.undo()
    assert distance(found, trained(twin, batches)) <= 1e-12
