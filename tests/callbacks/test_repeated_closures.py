"""SAM, line searches and LBFGS evaluate the losses several times in a step: one weight update, and one function throughout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import textbook
import torch
from climbing import CLIMBERS, Once, Twice
from harness import Batches, Recorder, assert_agrees, state_by_part
from models import TASKS, Automatic, Batch, Manual, as_inputs_and_targets, network_sgd, vector_batches
from torch import Tensor, nn
from torchjd.aggregation import PCGrad, UPGrad
from torchjd.scalarization import UW, GeometricMean

from lightning_gradnorm import Aggregation, FixedWeights, GradNorm, MultiTaskModule, RandomWeights, Scalarization, Task

MakeTrainer = Callable[..., Any]
STEPS = 6


class Climbing(Automatic):
    """Trained by the optimizer that a test names."""

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer], T: int = 3) -> None:
        super().__init__(T)
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def by_the_textbook(optimizer: Callable[[Any], Any], batches: list[Batch], **options: Any) -> tuple[Any, Any]:
    twin = Automatic()
    options = {"by_closure": True, **options}
    made = optimizer(twin.parameters())
    return twin, textbook.train(twin, twin.forward_for_textbook, batches, [twin.encoder[2].weight], made, **options)


def gradnorm(heads: Any = "auto", **options: Any) -> GradNorm:
    named = Automatic().heads() if heads == "named" else heads
    return GradNorm(list(TASKS[:3]), shared_layer="encoder.2", heads=named, **options)


def fit(trainer: MakeTrainer, model: Any, callback: Any, batches: Any, **options: Any) -> Recorder:
    recorder = Recorder(callback, options.pop("every", 1))
    trainer(callbacks=[callback, recorder], **options).fit(model, Batches(batches))
    return recorder


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", "named", None])
@pytest.mark.parametrize("optimizer", CLIMBERS.values(), ids=CLIMBERS)
def test_one_update_per_step_agrees_with_the_textbook(optimizer: Any, heads: Any, quiet_trainer: MakeTrainer) -> None:
    batches = vector_batches(3, STEPS)
    twin, trajectory = by_the_textbook(optimizer, batches)
    model, callback = Climbing(optimizer), gradnorm(heads)
    recorder = fit(quiet_trainer, model, callback, batches)
    assert callback.rule.steps == STEPS
    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-8)


@pytest.mark.parametrize("options", [{"update_every": 2}, {"stop_after": 3}, {"initial_losses": 2}], ids=str)
def test_counters_count_steps(options: dict[str, Any], quiet_trainer: MakeTrainer) -> None:
    batches = vector_batches(3, STEPS)
    twin, trajectory = by_the_textbook(CLIMBERS["SAM"], batches, **options)
    model, callback = Climbing(CLIMBERS["SAM"]), gradnorm(**options)
    recorder = fit(quiet_trainer, model, callback, batches)
    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-8)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "GradNorm": gradnorm,
    "fixed": lambda: FixedWeights({"seg": 2.0, "depth": 0.5, "normal": 1.0}),
    "random": lambda: RandomWeights(tasks=list(TASKS[:3]), seed=1),
    "UW": lambda: Scalarization(UW, list(TASKS[:3])),
    "geometric mean": lambda: Scalarization(GeometricMean(), list(TASKS[:3])),
    "UPGrad": lambda: Aggregation(UPGrad(), list(TASKS[:3])),
    "UPGrad at parameters": lambda: Aggregation(UPGrad(), list(TASKS[:3]), at="parameters"),
}


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_evaluating_the_same_function_twice_changes_nothing(make: Any, quiet_trainer: MakeTrainer) -> None:
    trained = []
    for kind in (Once, Twice):
        model = Climbing(lambda parameters, kind=kind: kind(parameters, lr=0.02))  # type: ignore[misc]
        fit(quiet_trainer, model, callback := make(), vector_batches(3, STEPS))
        trained.append((callback.weights, model.state_dict()))
    assert trained[0][0] == trained[1][0]
    for name, value in trained[0][1].items():
        torch.testing.assert_close(trained[1][1][name], value, rtol=0, atol=0)


class Probed(Climbing):
    """Adds a separate 0 to each loss: its gradient is the weight with which the loss is back-propagated."""

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        self.probes = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        added = zip(self.task_losses(batch).items(), self.probes, strict=True)
        losses = {task: loss + probe for (task, loss), probe in added}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def on_after_backward(self) -> None:
        assert self.probes.grad is not None
        self.applied.setdefault(self.trainer.global_step, []).append(self.probes.grad.tolist())

    def on_train_start(self) -> None:
        self.applied: dict[int, list[list[float]]] = {}


@pytest.mark.parametrize("name", ["GradNorm", "random", "UW", "geometric mean"])
def test_the_weights_stay_the_same_within_a_step(name: str, quiet_trainer: MakeTrainer) -> None:
    model = Probed(CLIMBERS["LBFGS"])
    fit(quiet_trainer, model, STRATEGIES[name](), vector_batches(3, STEPS))
    for step, of_step in model.applied.items():
        assert len(of_step) > 2
        assert all(weights == of_step[0] for weights in of_step), step
    assert len({tuple(of_step[0]) for of_step in model.applied.values()}) == (STEPS if name != "random" else 1)


class Aggregated(Climbing):
    """Takes the gradients of each task by hand, in every evaluation."""

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        step = super().training_step(batch, batch_idx)
        trunk = list(self.encoder.parameters())
        self.J = [torch.autograd.grad(step[task], trunk, retain_graph=True) for task in self.tasks]
        return step

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        evaluation = self.evaluations.setdefault(self.trainer.global_step, [])
        evaluation.append((self.J, [p.grad.clone() for p in self.encoder.parameters()]))

    def on_train_start(self) -> None:
        self.evaluations: dict[int, list[Any]] = {}


@pytest.mark.parametrize("at", ["representation", "parameters"])
def test_an_aggregation_keeps_its_coefficients_within_a_step(at: Any, quiet_trainer: MakeTrainer) -> None:
    model = Aggregated(CLIMBERS["SAM"])
    callback = Aggregation(UPGrad(), list(TASKS[:3]), at=at)
    recorder = fit(quiet_trainer, model, callback, vector_batches(3, 4))
    for step, evaluations in model.evaluations.items():
        assert len(evaluations) == 2
        of_task = recorder.weights[step]
        for J, found in evaluations:
            for place, gradient in enumerate(found):
                expected = sum(of_task[task] * J[row][place] for row, task in enumerate(model.tasks))
                torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_an_aggregation_without_coefficients_works_in_each_evaluation(quiet_trainer: MakeTrainer) -> None:
    model = Aggregated(CLIMBERS["SAM"])
    fit(quiet_trainer, model, Aggregation(PCGrad(), list(TASKS[:3])), vector_batches(3, 4))
    assert [len(evaluations) for evaluations in model.evaluations.values()] == [2] * 4
    assert all(p.isfinite().all() for p in model.parameters())


# by hand --------------------------------------------------------------------------------------------------------------


class ByHand(Manual):
    """SAM by hand, as its users write it in manual optimization; several micro-batches to an evaluation."""

    how = "wrapped"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return CLIMBERS["SAM"](self.parameters())

    def evaluate(self, batches: list[Batch]) -> Tensor:
        for batch in batches:
            losses = self.task_losses(batch)
            self.gradnorm[0].watch(losses)
            loss = torch.stack(list(losses.values())).sum() / len(batches)
            self.manual_backward(loss)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        batches = batch if isinstance(batch, list) else [batch]

        def closure() -> Tensor:
            optimizer.zero_grad()
            return self.evaluate(batches)

        optimizer.zero_grad()
        if self.how == "closure":
            optimizer.step(closure)
        elif self.how == "raw closure":
            optimizer.optimizer.step(closure)
        else:
            self.evaluate(batches)
            optimizer.optimizer.first_step()
            self.evaluate(batches)
            (optimizer.optimizer if self.how == "raw" else optimizer).second_step()


@pytest.mark.parametrize("how", ["wrapped", "raw", "closure", "raw closure"])
def test_sam_by_hand_agrees_with_the_textbook(how: str, quiet_trainer: MakeTrainer) -> None:
    batches = vector_batches(3, STEPS)
    twin, trajectory = by_the_textbook(CLIMBERS["SAM"], batches)
    model, callback = ByHand(), gradnorm()
    model.how, model.gradnorm = how, [callback]
    recorder = fit(quiet_trainer, model, callback, batches)
    assert callback.rule.steps == STEPS
    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-8)


def test_each_evaluation_by_hand_may_accumulate(quiet_trainer: MakeTrainer) -> None:
    batches = vector_batches(3, 2 * STEPS)
    twin, trajectory = by_the_textbook(CLIMBERS["SAM"], batches, accumulate=2)
    model, callback = ByHand(), gradnorm()
    model.gradnorm = [callback]
    recorder = fit(quiet_trainer, model, callback, [batches[i : i + 2] for i in range(0, 2 * STEPS, 2)])
    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-8)


@pytest.mark.parametrize("how", ["wrapped", "raw", "closure", "raw closure"])
def test_an_aggregation_at_the_parameters_by_hand_is_that_of_automatic_optimization(
    how: str, quiet_trainer: MakeTrainer
) -> None:
    batches, weights, networks = vector_batches(3, STEPS), [], []
    for model in (ByHand(), Climbing(CLIMBERS["SAM"])):
        callback = Aggregation(UPGrad(), list(TASKS[:3]), at="parameters")
        model.how, model.gradnorm = how, [callback]  # type: ignore[assignment,list-item]
        weights.append(fit(quiet_trainer, model, callback, batches).weights)
        networks.append(state_by_part(model))
    assert weights[0] == [pytest.approx(of_step, rel=1e-9) for of_step in weights[1]]
    for name, value in networks[1].items():
        torch.testing.assert_close(networks[0][name], value, rtol=1e-9, atol=1e-12)


class Several(Manual):
    """Makes several steps in a batch, also with the torch optimizer out of its Lightning wrapper."""

    is_wrapped = True

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers(use_pl_optimizer=self.is_wrapped)
        for of_step in batch:
            losses = self.task_losses(of_step)
            self.gradnorm[0].watch(losses)
            optimizer.zero_grad()
            self.manual_backward(torch.stack(list(losses.values())).sum())
            optimizer.step()


@pytest.mark.parametrize("heads", ["named", None])
@pytest.mark.parametrize("is_wrapped", [True, False], ids=["wrapped", "raw"])
def test_each_of_several_steps_in_a_batch_counts(is_wrapped: bool, heads: Any, quiet_trainer: MakeTrainer) -> None:
    batches = vector_batches(3, STEPS)
    twin, trajectory = by_the_textbook(network_sgd, batches, by_closure=False)
    model, callback = Several(), gradnorm(heads)
    model.gradnorm, model.is_wrapped = [callback], is_wrapped
    recorder = fit(quiet_trainer, model, callback, [batches[i : i + 3] for i in range(0, STEPS, 3)])
    assert callback.rule.steps == STEPS
    trajectory.weights = trajectory.weights[2::3]  # the recorder looks at the end of each batch
    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-8)


@pytest.mark.parametrize("name", ["UW", "geometric mean", "UPGrad", "UPGrad at parameters"])
def test_several_steps_in_a_batch_match_several_batches(name: str, quiet_trainer: MakeTrainer) -> None:
    batches = vector_batches(3, STEPS)
    weights = []
    for whole in ([[batch] for batch in batches], [batches]):
        model, callback = Several(), STRATEGIES[name]()
        model.gradnorm = [callback]
        fit(quiet_trainer, model, callback, whole)
        weights.append(callback.weights)
    assert weights[0] == pytest.approx(weights[1], rel=1e-12)


# our own module -------------------------------------------------------------------------------------------------------


def multi_task_module(optimizer: Any, **options: Any) -> MultiTaskModule:
    like = Automatic()
    tasks = {task: Task(head=getattr(like, f"{task}_head"), loss=nn.MSELoss()) for task in TASKS[:3]}
    return MultiTaskModule(encoder=like.encoder, tasks=tasks, optimizer=optimizer, **options)


@pytest.mark.parametrize("optimizer", CLIMBERS.values(), ids=CLIMBERS)
def test_a_multi_task_module_may_be_trained_by(optimizer: Any, quiet_trainer: MakeTrainer) -> None:
    batches = vector_batches(3, STEPS)
    twin, trajectory = by_the_textbook(optimizer, batches)
    model, callback = multi_task_module(optimizer), GradNorm(shared_layer="encoder.2")
    recorder = fit(quiet_trainer, model, callback, as_inputs_and_targets(batches))
    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-8)


def test_a_multi_task_module_has_lost_the_batches_that_it_accumulated(quiet_trainer: MakeTrainer) -> None:
    model = multi_task_module(CLIMBERS["SAM"], accumulate_grad_batches=2)
    with pytest.raises(ValueError, match=r"SAM evaluates the losses several times .* accumulate_grad_batches=1"):
        fit(quiet_trainer, model, GradNorm(shared_layer="encoder.2"), as_inputs_and_targets(vector_batches(3, 2)))


def test_without_a_callback_too(quiet_trainer: MakeTrainer) -> None:
    model, twin = multi_task_module(CLIMBERS["SAM"]), Automatic()
    quiet_trainer().fit(model, Batches(as_inputs_and_targets(vector_batches(3, 3))))
    optimizer = CLIMBERS["SAM"](twin.parameters())
    for batch in vector_batches(3, 3):

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = torch.stack(list(twin.task_losses(batch).values())).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    torch.testing.assert_close(model.encoder[2].weight, twin.encoder[2].weight, rtol=1e-12, atol=1e-12)
