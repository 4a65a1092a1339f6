"""The callback in a real Trainer and a double-backward loop in float64 give the same weights and the same network."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from harness import Batches, BeforeBatch, MemoryLogger, Recorder, assert_agrees, seed
from models import (
    TASKS,
    Automatic,
    Convolutional,
    Manual,
    Nested,
    OnlyLogs,
    WithCoefficients,
    WithDropout,
    as_inputs_and_targets,
    image_batches,
    learn_from_textbook,
    multi_task_module,
    vector_batches,
)
from torch import Tensor

from lightning_gradnorm import GradNorm

STEPS = 12
adam = partial(torch.optim.Adam, lr=0.025)
sgd = partial(torch.optim.SGD, lr=0.05)
MakeTrainer = Callable[..., L.Trainer]


def fit(
    trainer: MakeTrainer,
    model: L.LightningModule,
    gradnorm: GradNorm,
    batches: list[Any],
    accumulate: int = 1,
    before_batch: Callable[[int], object] = lambda index: None,
    **options: Any,
) -> Recorder:
    """Train and return the records. The Trainer accumulates for modules that do not do so themselves."""
    if isinstance(model, Manual):
        model.gradnorm = [gradnorm]
    recorder = Recorder(gradnorm, accumulate)
    if model.automatic_optimization:
        options["accumulate_grad_batches"] = accumulate
    trainer(callbacks=[BeforeBatch(before_batch), gradnorm, recorder], **options).fit(model, Batches(batches))
    return recorder


@pytest.mark.each_value_once
@pytest.mark.both_packages
@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
@pytest.mark.parametrize("T", [2, 3, 6])
@pytest.mark.parametrize("optimizer", [adam, sgd], ids=["adam", "sgd"])
@pytest.mark.parametrize(
    ("mode", "accumulate"),  # one axis, so that the fast set has all pairs
    list(itertools.product(["automatic", "automatic+heads", "manual", "manual+heads", "module"], [1, 2])),
)
def test_weights_and_network_agree_with_the_textbook(
    mode: str, accumulate: int, optimizer: Any, T: int, alpha: float, quiet_trainer: MakeTrainer
) -> None:
    batches = vector_batches(T, 2 * STEPS * accumulate)
    twin = Automatic(T, seed=T)
    trajectory = learn_from_textbook(twin, batches, alpha=alpha, weight_optimizer=optimizer, accumulate=accumulate)
    kind, _, with_heads = mode.partition("+")
    fed: list[Any] = batches
    tasks: list[str] | None = list(TASKS[:T])
    if kind == "module":
        model: L.LightningModule = multi_task_module(T, seed=T, accumulate_grad_batches=accumulate)
        tasks, fed = None, as_inputs_and_targets(batches)
    else:
        model = Automatic(T, seed=T) if kind == "automatic" else Manual(T, seed=T, accumulate=accumulate)
    gradnorm = GradNorm(tasks, heads=twin.heads() if with_heads else None, alpha=alpha, optimizer=optimizer)

    recorder = fit(quiet_trainer, model, gradnorm, fed, accumulate)

    moved = max(abs(weight - 1.0) for weight in trajectory.weights[-1].values())
    assert moved > 1e-3, "the oracle's weights did not move: this test would prove nothing"
    assert_agrees(recorder, model, trajectory, twin)


@pytest.mark.each_value_once
@pytest.mark.both_packages
@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        partial(Convolutional),
        partial(WithDropout),
        partial(WithCoefficients),
        partial(OnlyLogs),
        partial(Nested, container=dict),
        partial(Nested, container=tuple),
        partial(Automatic, reverse=True),
    ],
    ids=["batch-norm", "dropout", "coefficients", "only-logs", "dict", "tuple", "another-order"],
)
def test_existing_models_agree_with_the_textbook(
    make: Callable[..., Automatic], accumulate: int, heads: bool, quiet_trainer: MakeTrainer
) -> None:
    model, twin = make(T=3, seed=5), make(T=3, seed=5)
    batches = (image_batches if isinstance(model, Convolutional) else vector_batches)(3, STEPS * accumulate)
    coefficients = model.coefficients if isinstance(model, WithCoefficients) else None
    trajectory = learn_from_textbook(
        twin, batches, coefficients=coefficients, accumulate=accumulate, before_micro_batch=seed
    )
    tasks = model.logged_names() if isinstance(model, OnlyLogs) else list(model.tasks)
    gradnorm = GradNorm(tasks, heads=model.heads() if heads else None)

    recorder = fit(quiet_trainer, model, gradnorm, batches, accumulate, before_batch=seed)

    assert_agrees(recorder, model, trajectory, twin)


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
@pytest.mark.parametrize(
    ("name", "shared"),
    [
        (None, lambda twin: [twin.encoder[2].weight]),
        ("encoder.2", lambda twin: [twin.encoder[2].weight]),
        ("encoder.2.weight", lambda twin: [twin.encoder[2].weight]),
        ("encoder.2.bias", lambda twin: [twin.encoder[2].bias]),
        ("encoder.0", lambda twin: [twin.encoder[0].weight]),
        ("encoder", lambda twin: [twin.encoder[2].weight]),
    ],
    ids=["default", "module", "parameter", "bias", "not-the-last", "container"],
)
def test_shared_layer_is_a_module_or_a_parameter_by_name(
    name: str | None, shared: Callable[[Any], list[Tensor]], heads: bool, quiet_trainer: MakeTrainer
) -> None:
    model, twin = Automatic(3), Automatic(3)
    batches = vector_batches(3, STEPS)
    trajectory = learn_from_textbook(twin, batches, shared=shared(twin))
    gradnorm = GradNorm(list(model.tasks), shared_layer=name, heads=model.heads() if heads else None)

    assert_agrees(fit(quiet_trainer, model, gradnorm, batches), model, trajectory, twin)


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_a_batch_norm_as_shared_layer_runs_once(heads: bool, quiet_trainer: MakeTrainer) -> None:
    model, twin = Convolutional(3), Convolutional(3)
    batches = image_batches(3, STEPS)
    trajectory = learn_from_textbook(twin, batches, shared=[twin.encoder[4].weight])
    gradnorm = GradNorm(list(model.tasks), shared_layer="encoder.4", heads=model.heads() if heads else None)

    assert_agrees(fit(quiet_trainer, model, gradnorm, batches), model, trajectory, twin)


@pytest.mark.each_value_once
@pytest.mark.both_packages
@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
@pytest.mark.parametrize(
    ("option", "value", "oracle"),
    [
        ("priorities", {"seg": 2.0, "depth": 1.0, "normal": 0.25}, {}),
        ("priorities", {"normal": 0.25, "depth": 1.0, "seg": 2.0}, {}),
        ("update_every", 3, {}),
        ("update_every", 8, {}),
        ("initial_losses", 5, {}),
        ("initial_losses", {"depth": 0.5, "normal": 2.5, "seg": 1.1}, {}),
        ("initial_losses", {"depth": 0.5}, {}),
        ("initial_weights", {"depth": 4.0, "seg": 1.0, "normal": 2.5}, {}),
        ("stop_after", 7, {}),
        ("min_weight", 0.9, {}),
    ],
    ids=lambda v: str(v).replace(" ", "") if v != {} else "",
)
def test_options_have_the_same_effect_as_in_the_textbook(
    option: str, value: Any, oracle: dict[str, Any], heads: bool, quiet_trainer: MakeTrainer
) -> None:
    model, twin = Automatic(3), Automatic(3)
    batches = vector_batches(3, STEPS)
    trajectory = learn_from_textbook(twin, batches, **{option: value})
    gradnorm = GradNorm(list(model.tasks), heads=model.heads() if heads else None, **{option: value})

    assert_agrees(fit(quiet_trainer, model, gradnorm, batches), model, trajectory, twin)


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("update_every", [1, 3])
def test_first_losses_are_averaged_over_updates_not_batches(
    update_every: int, accumulate: int, quiet_trainer: MakeTrainer
) -> None:
    model, twin = Automatic(3), Automatic(3)
    batches = vector_batches(3, STEPS * accumulate)
    options = {"initial_losses": 4, "update_every": update_every}
    trajectory = learn_from_textbook(twin, batches, accumulate=accumulate, **options)
    gradnorm = GradNorm(list(model.tasks), heads=model.heads(), **options)  # type: ignore[arg-type]

    assert_agrees(fit(quiet_trainer, model, gradnorm, batches, accumulate), model, trajectory, twin)


def test_stopped_weights_stay_as_they_are(quiet_trainer: MakeTrainer) -> None:
    model = Automatic(3)
    gradnorm = GradNorm(list(model.tasks), stop_after=7)
    recorder = fit(quiet_trainer, model, gradnorm, vector_batches(3, 12))

    assert recorder.weights[5] != recorder.weights[6]
    assert all(weights == recorder.weights[6] for weights in recorder.weights[6:])


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "make",
    [partial(Automatic), partial(WithCoefficients), partial(Nested, container=dict), partial(Nested, container=tuple)],
    ids=["tensor", "coefficients", "dict", "tuple"],
)
def test_activation_norm_is_that_of_the_gradient_at_the_whole_representation(
    make: Callable[..., Automatic], accumulate: int, heads: bool, quiet_trainer: MakeTrainer
) -> None:
    model, twin = make(T=3), make(T=3)
    coefficients = model.coefficients if isinstance(model, WithCoefficients) else None
    batches = vector_batches(3, STEPS * accumulate)
    trajectory = learn_from_textbook(
        twin, batches, norm_of="activation", coefficients=coefficients, accumulate=accumulate
    )
    gradnorm = GradNorm(list(model.tasks), heads=model.heads() if heads else None, norm_of="activation")

    assert_agrees(fit(quiet_trainer, model, gradnorm, batches, accumulate), model, trajectory, twin)


def test_activation_norm_of_a_multi_task_module(quiet_trainer: MakeTrainer) -> None:
    twin, model = Automatic(3), multi_task_module(3)
    batches = vector_batches(3, STEPS)
    trajectory = learn_from_textbook(twin, batches, norm_of="activation")
    recorder = fit(quiet_trainer, model, GradNorm(norm_of="activation"), as_inputs_and_targets(batches))

    assert_agrees(recorder, model, trajectory, twin)


@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
def test_first_activation_norm_is_the_one_autograd_gives_by_hand(heads: bool, quiet_trainer: MakeTrainer) -> None:
    model, twin, logger = Nested(3), Nested(3), MemoryLogger()
    batches = vector_batches(3, 1)
    gradnorm = GradNorm(list(model.tasks), heads=model.heads() if heads else None, norm_of="activation")
    fit(quiet_trainer, model, gradnorm, batches, logger=logger)

    forward = twin.forward_for_textbook(batches[0])
    for task, loss in forward.losses.items():
        at_z = torch.autograd.grad(loss, forward.representation, retain_graph=True)
        expected = float(sum(g.square().sum() for g in at_z)) ** 0.5
        assert logger.scalars[f"gradnorm/grad_norm/{task}"] == [pytest.approx(expected, rel=1e-6)]


@pytest.mark.each_value_once
@pytest.mark.parametrize("module", ["automatic", "coefficients", "own"])
@pytest.mark.parametrize("update_every", [1, 3])
def test_logged_norms_rates_and_objective_agree_with_the_textbook(
    module: str, update_every: int, quiet_trainer: MakeTrainer
) -> None:
    batches, logger = vector_batches(3, STEPS), MemoryLogger()
    twin: Automatic = WithCoefficients(3) if module == "coefficients" else Automatic(3)
    model: Any = multi_task_module(3) if module == "own" else type(twin)(3)
    coefficients = twin.coefficients if isinstance(twin, WithCoefficients) else None
    trajectory = learn_from_textbook(twin, batches, update_every=update_every, coefficients=coefficients)
    gradnorm = GradNorm(None if module == "own" else list(model.tasks), update_every=update_every)
    fed: list[Any] = as_inputs_and_targets(batches) if module == "own" else batches
    fit(quiet_trainer, model, gradnorm, fed, logger=logger)

    updates = range(0, STEPS, update_every)
    assert logger.at("gradnorm/loss", updates) == pytest.approx(trajectory.objective, rel=1e-6)
    for task in twin.tasks:
        norms, rates = ([step[task] for step in x] for x in (trajectory.grad_norms, trajectory.rates))
        weights = [step[task] for step in trajectory.weights]
        assert logger.at(f"gradnorm/grad_norm/{task}", updates) == pytest.approx(norms, rel=1e-6)
        assert logger.at(f"gradnorm/rate/{task}", updates) == pytest.approx(rates, rel=1e-6)
        assert logger.scalars[f"gradnorm/weight/{task}"] == pytest.approx(weights, rel=1e-6)


@pytest.mark.both_packages
def test_the_logged_loss_is_the_users(quiet_trainer: MakeTrainer) -> None:
    logger = MemoryLogger()

    class LogsItsLoss(WithCoefficients):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            out = super().training_step(batch, batch_idx)
            self.log("train/loss", out["loss"])
            return out

    model, twin, batches = LogsItsLoss(3), WithCoefficients(3), vector_batches(3, 1)
    fit(
        quiet_trainer,
        model,
        GradNorm(list(model.tasks), initial_weights={"seg": 4, "depth": 1, "normal": 1}),
        batches,
        logger=logger,
    )

    assert logger.scalars["train/loss"] == [
        pytest.approx(float(twin.training_step(batches[0], 0)["loss"].detach()), rel=1e-6)
    ]


def test_names_match_tasks_when_every_mapping_has_its_own_order(quiet_trainer: MakeTrainer) -> None:
    model, twin, batches = Automatic(3, reverse=True), Automatic(3), vector_batches(3, STEPS)
    weights, priorities, initial = (
        {"seg": a, "depth": b, "normal": c} for a, b, c in [(3, 1, 2), (1, 2, 4), (9, 5, 1)]
    )
    options = {"initial_weights": weights, "priorities": priorities, "initial_losses": initial}
    trajectory = learn_from_textbook(twin, batches, **options)
    shuffled = {key: dict(sorted(value.items())) for key, value in options.items()}
    gradnorm = GradNorm(["normal", "seg", "depth"], heads=dict(sorted(model.heads().items())), **shuffled)

    assert_agrees(fit(quiet_trainer, model, gradnorm, batches), model, trajectory, twin)


@pytest.mark.each_value_once
@pytest.mark.parametrize("T", [2, 3, 6])
def test_absent_tasks_keep_their_weight_and_take_no_part(T: int, quiet_trainer: MakeTrainer) -> None:
    twin = Automatic(T)
    batches = vector_batches(T, STEPS)
    for index, batch in enumerate(batches):
        if index % 3 == 1:
            del batch[TASKS[index % T]]
    trajectory = textbook.train(
        twin,
        lambda batch: textbook.Forward(
            {
                task: torch.nn.functional.mse_loss(getattr(twin, f"{task}_head")(twin.encoder(batch["x"])), batch[task])
                for task in twin.tasks
                if task in batch
            }
        ),
        batches,
        twin.shared_parameters(),
        torch.optim.SGD(twin.parameters(), lr=0.02),
        tasks=list(twin.tasks),
        weight_optimizer=sgd,
    )
    model = multi_task_module(T, optimizer=partial(torch.optim.SGD, lr=0.02))
    recorder = fit(quiet_trainer, model, GradNorm(optimizer=sgd), as_inputs_and_targets(batches))

    for step in range(1, STEPS, 3):
        absent = TASKS[step % T]
        assert recorder.weights[step][absent] == recorder.weights[step - 1][absent]
    assert_agrees(recorder, model, trajectory, twin)


class SometimesInfinite(Automatic):
    """A loss value that is infinite in batches 4 and 9, with the gradient it always has."""

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        return {task: loss + batch[f"{task}_offset"] for task, loss in super().task_losses(batch).items()}


@pytest.mark.each_value_once
@pytest.mark.both_packages
@pytest.mark.parametrize("heads", [False, True], ids=["no-heads", "heads"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_takes_no_weight_step(value: float, heads: bool, quiet_trainer: MakeTrainer) -> None:
    model, twin, logger = SometimesInfinite(3), Automatic(3), MemoryLogger()
    batches = vector_batches(3, STEPS)
    for index, batch in enumerate(batches):
        batch |= {f"{task}_offset": torch.tensor(0.0) for task in model.tasks}
        if index in (4, 9):
            batch["depth_offset"] = torch.tensor(value)
    trajectory = learn_from_textbook(twin, batches, skip_steps=(4, 9))
    gradnorm = GradNorm(list(model.tasks), heads=model.heads() if heads else None)

    with pytest.warns(UserWarning, match="depth") as warned:
        recorder = fit(quiet_trainer, model, gradnorm, batches, logger=logger)

    assert recorder.weights[4] == recorder.weights[3]
    assert len([w for w in warned if "depth" in str(w.message)]) == 1, "it warns once"
    assert logger.scalars["gradnorm/skipped"][-1] == 2
    assert_agrees(recorder, model, trajectory, twin)


@pytest.mark.parametrize("mode", ["automatic", "module"])
def test_weights_are_positive_and_sum_to_the_number_of_tasks_after_every_batch(
    mode: str, quiet_trainer: MakeTrainer
) -> None:
    batches = vector_batches(6, 60)
    model: Any = multi_task_module(6) if mode == "module" else Automatic(6)
    gradnorm = GradNorm(
        None if mode == "module" else list(model.tasks), optimizer=partial(torch.optim.SGD, lr=3.0), alpha=3.0
    )
    recorder = fit(quiet_trainer, model, gradnorm, as_inputs_and_targets(batches) if mode == "module" else batches)

    assert len(recorder.weights) == 60
    for weights in recorder.weights:
        assert sum(weights.values()) == pytest.approx(6.0, abs=1e-9)
        assert min(weights.values()) > 0.0


def test_mean_weights_are_the_time_average_of_the_weights_after_each_step(quiet_trainer: MakeTrainer) -> None:
    model = Automatic(3)
    gradnorm = GradNorm(list(model.tasks))
    recorder = fit(quiet_trainer, model, gradnorm, vector_batches(3, STEPS))

    expected = {task: sum(w[task] for w in recorder.weights) / STEPS for task in model.tasks}
    assert gradnorm.mean_weights == pytest.approx(expected, abs=1e-9)
    assert sum(gradnorm.mean_weights.values()) == pytest.approx(3.0, abs=1e-9)


def test_float32_models_agree_to_float32(quiet_trainer: MakeTrainer) -> None:
    model, twin, batches = Automatic(3).float(), Automatic(3), vector_batches(3, STEPS)
    trajectory = learn_from_textbook(twin, batches)
    single = [{name: value.float() for name, value in batch.items()} for batch in batches]
    recorder = fit(quiet_trainer, model, GradNorm(list(model.tasks), heads=model.heads()), single)

    assert_agrees(recorder, model, trajectory, twin, tolerance=1e-4)
