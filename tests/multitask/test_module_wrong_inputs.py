"""Wrong use of a `MultiTaskModule` and its `Task`s: the error names the culprit, what was expected and what was found."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, assert_clean, assert_says, case, traces
from models import as_inputs_and_targets, multi_task_module, network_sgd, vector_batches
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.regression import MeanSquaredError

from lightning_gradnorm import FixedWeights, GradNorm, MultiTaskModule, Task

MakeTrainer = Callable[..., L.Trainer]
StepLR = partial(torch.optim.lr_scheduler.StepLR, step_size=1)


def task(loss: Any = F.mse_loss) -> Task:
    return Task(nn.Linear(6, 3).double(), loss)


def module(**arguments: Any) -> MultiTaskModule:
    tasks = {"seg": task(), "depth": task(), "normal": task()}
    return MultiTaskModule(**{"encoder": nn.Linear(5, 6).double(), "tasks": tasks, **arguments})


def batches_of_three() -> list[Any]:
    return as_inputs_and_targets(vector_batches(3, 3))


def fails(
    trainer: MakeTrainer,
    model: MultiTaskModule,
    callback: L.Callback,
    *expected: str,
    batches: list[Any] | None = None,
    **options: Any,
) -> None:
    before = traces(model)
    with pytest.raises((ValueError, TypeError)) as raised:
        trainer(callbacks=[callback], **options).fit(model, Batches(batches or batches_of_three()))
    assert_says(raised.value, *expected)
    assert_clean(model, before)


# arguments -----------------------------------------------------------------------------------------------------------

ARGUMENTS = [
    case("the encoder is a name", {"encoder": "resnet"}, ["encoder", "a module", "'resnet'"]),
    case("there is no task", {"tasks": {}}, ["tasks", "mapping from name to Task"]),
    case("the tasks are a list", {"tasks": [task()]}, ["tasks", "mapping from name to Task", "list"]),
    case("a task is a head alone", {"tasks": {"seg": nn.Linear(1, 1)}}, ["tasks['seg']", "a Task", "Linear"]),
    case("a task is numbered", {"tasks": {0: task()}}, ["tasks", "strings", "0"]),
    case("a task has a dot in its name", {"tasks": {"seg.fine": task()}}, ["without dots", "'seg.fine'"]),
    case("a task has the name of a method", {"tasks": {"keys": task()}}, ["not like a method", "'keys'"]),
    case("accumulation over no batch", {"accumulate_grad_batches": 0}, ["accumulate_grad_batches", "at least 1", "0"]),
    case("accumulation is a string", {"accumulate_grad_batches": "2"}, ["accumulate_grad_batches", "integer", "'2'"]),
    case("accumulation is a fraction", {"accumulate_grad_batches": 1.5}, ["accumulate_grad_batches", "integer", "1.5"]),
    case(
        "accumulation is a schedule, as Lightning's callback has it",
        {"accumulate_grad_batches": {0: 2}},
        ["accumulate_grad_batches", "integer", "{0: 2}"],
    ),
    case("clipping at a negative norm", {"gradient_clip_val": -1.0}, ["gradient_clip_val", "positive", "-1.0"]),
    case("clipping at zero", {"gradient_clip_val": 0.0}, ["gradient_clip_val", "positive", "0.0"]),
    case("clipping at NaN", {"gradient_clip_val": math.nan}, ["gradient_clip_val", "positive", "nan"]),
    case("clipping at a string", {"gradient_clip_val": "1"}, ["gradient_clip_val", "number", "'1'"]),
    case("the optimizer is a name", {"optimizer": "adam"}, ["optimizer", "partial(torch.optim.Adam", "'adam'"]),
    case(
        "the optimizer is made already",
        {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])},
        ["optimizer", "partial(torch.optim.Adam", "SGD"],
    ),
    case("the schedule is a name", {"lr_scheduler": "cosine"}, ["lr_scheduler", "callable", "'cosine'"]),
    case("the schedule lacks its scheduler", {"lr_scheduler": {"interval": "step"}}, ["lr_scheduler", "'scheduler'"]),
    case(
        "the schedule has a misspelt key",
        {"lr_scheduler": {"scheduler": StepLR, "freq": 2}},
        ["lr_scheduler", "'frequency'", "'freq'"],
    ),
    case(
        "the schedule is by batch",
        {"lr_scheduler": {"scheduler": StepLR, "interval": "batch"}},
        ["lr_scheduler interval", "'step' or 'epoch'", "'batch'"],
    ),
    case(
        "the schedule has a string as frequency",
        {"lr_scheduler": {"scheduler": StepLR, "frequency": "2"}},
        ["lr_scheduler frequency", "integer", "'2'"],
    ),
    case(
        "the schedule has a frequency of zero",
        {"lr_scheduler": {"scheduler": StepLR, "frequency": 0}},
        ["lr_scheduler frequency", "at least 1", "0"],
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS)
def test_a_wrong_argument_is_named_with_its_value(arguments: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ValueError, match="MultiTaskModule") as raised:
        module(**arguments)
    assert_says(raised.value, *expected)


OF_A_TASK = [
    case("the head is missing", {"head": None}, ["head", "a module", "NoneType"]),
    case("the loss is a number", {"loss": 1.0}, ["loss", "function of (prediction, target)", "float"]),
    case("the loss is a name", {"loss": "mse"}, ["loss", "function of (prediction, target)", "str"]),
    case("the loss is a class", {"loss": nn.MSELoss}, ["loss", "the class MSELoss", "MSELoss()"]),
    case("a metric is a function", {"metrics": {"mae": F.l1_loss}}, ["metrics['mae']", "torchmetrics", "function"]),
    case(
        "a metric is a class", {"metrics": {"mse": MeanSquaredError}}, ["metrics['mse']", "the class MeanSquaredError"]
    ),
    case("the metric is a class", {"metrics": MeanSquaredError}, ["metrics", "mapping", "the class MeanSquaredError"]),
    case("the metrics are a list", {"metrics": [MeanSquaredError()]}, ["metrics", "mapping from name", "list"]),
]


@pytest.mark.parametrize(("arguments", "expected"), OF_A_TASK)
def test_a_wrong_argument_of_a_task_is_named(arguments: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(TypeError, match="Task") as raised:
        Task(**{"head": nn.Linear(3, 4), "loss": nn.MSELoss(), **arguments})
    assert_says(raised.value, *expected)


# what shows when training starts -------------------------------------------------------------------------------------


def nothing(of: Any) -> None:
    return None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        case("the optimizer", {"optimizer": nothing}, ["optimizer", "torch optimizer", "None"]),
        case("the scheduler", {"lr_scheduler": nothing}, ["lr_scheduler", "torch scheduler", "None"]),
    ],
)
def test_a_factory_that_returns_nothing_is_an_error(
    arguments: dict[str, Any], expected: list[str], quiet_trainer: MakeTrainer
) -> None:
    fails(quiet_trainer, module(**arguments), GradNorm(), "MultiTaskModule", *expected)


@pytest.mark.parametrize("flag", ["gradient_clip_val", "accumulate_grad_batches"])
def test_a_flag_of_the_trainer_that_does_nothing_here_names_the_modules_own(
    flag: str, quiet_trainer: MakeTrainer
) -> None:
    expected = [f"Trainer({flag}=2)", "Remove it", f"MultiTaskModule({flag}=2)"]
    fails(quiet_trainer, module(), GradNorm(), "MultiTaskModule", *expected, **{flag: 2})


@pytest.mark.parametrize("flags", [{"gradient_clip_val": 0.0}, {"accumulate_grad_batches": 1}])
def test_a_flag_of_the_trainer_that_is_switched_off_is_let_pass(
    flags: dict[str, Any], quiet_trainer: MakeTrainer
) -> None:
    trainer = quiet_trainer(**flags)
    trainer.fit(module(), Batches(batches_of_three()))
    assert trainer.global_step == 3


def test_the_flags_of_training_are_no_matter_in_evaluation(quiet_trainer: MakeTrainer) -> None:
    trainer = quiet_trainer(gradient_clip_val=1.0)
    (tested,) = trainer.test(module(), Batches(batches_of_three()), verbose=False)
    assert math.isfinite(tested["test/loss"])


# losses --------------------------------------------------------------------------------------------------------------


def a_float(prediction: Tensor, target: Tensor) -> float:
    return F.mse_loss(prediction, target).item()


def a_pair(prediction: Tensor, target: Tensor) -> Any:
    return F.mse_loss(prediction, target), {}


def a_detached_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction, target).detach()


LOSSES = [
    case("a vector, not reduced", nn.MSELoss(reduction="none"), ["'seg'", "scalar", ".mean()", "(4, 3)"]),
    case("a float", a_float, ["'seg'", "scalar", "float"]),
    case("a pair", a_pair, ["'seg'", "scalar", "tuple"]),
]


@pytest.mark.parametrize("callback", [GradNorm, L.Callback])
@pytest.mark.parametrize(("loss", "expected"), LOSSES)
def test_a_loss_function_that_returns_no_scalar_is_named_with_its_task(
    loss: Any, expected: list[str], callback: Any, quiet_trainer: MakeTrainer
) -> None:
    model = module(tasks={"seg": task(loss), "depth": task(), "normal": task()})
    fails(quiet_trainer, model, callback(), "MultiTaskModule", *expected)


def test_a_detached_loss_is_named_with_its_task(quiet_trainer: MakeTrainer) -> None:
    model = module(tasks={"seg": task(a_detached_loss), "depth": task(), "normal": task()})
    fails(quiet_trainer, model, GradNorm(), "GradNorm", "'seg'", "no gradient")


# batches -------------------------------------------------------------------------------------------------------------


def inputs_alone(batch: Any) -> Any:
    return batch["x"]


def one_dict(batch: Any) -> Any:
    return batch


def three_things(batch: Any) -> Any:
    return batch["x"], {"seg": batch["seg"]}, {"depth": batch["depth"]}


def targets_in_a_list(batch: Any) -> Any:
    return batch["x"], [batch["seg"], batch["depth"], batch["normal"]]


def one_target(batch: Any) -> Any:
    return batch["x"], batch["seg"]


@pytest.mark.parametrize("callback", [GradNorm, L.Callback])
@pytest.mark.parametrize("spoil", [inputs_alone, one_dict, three_things, targets_in_a_list, one_target])
def test_a_batch_is_inputs_and_a_dict_of_targets(spoil: Any, callback: Any, quiet_trainer: MakeTrainer) -> None:
    batches = [spoil(batch) for batch in vector_batches(3, 2)]
    fails(quiet_trainer, module(), callback(), "MultiTaskModule", "(inputs, targets)", "got", batches=batches)


def test_a_target_of_no_task_is_named(quiet_trainer: MakeTrainer) -> None:
    batches = batches_of_three()
    for _, targets in batches:
        targets["dept"] = targets.pop("depth")
    fails(quiet_trainer, module(), GradNorm(), "MultiTaskModule", "'dept'", "did you mean 'depth'", batches=batches)


@pytest.mark.parametrize("targets", [{}, {"seg": None, "depth": None}], ids=["none is given", "all are None"])
@pytest.mark.parametrize("callback", [GradNorm, L.Callback])
def test_an_epoch_without_any_target_trains_nothing_and_is_warned_of(
    callback: Any, targets: dict[str, Any], quiet_trainer: MakeTrainer
) -> None:
    batches = [(inputs, dict(targets)) for inputs, _ in batches_of_three()]
    with pytest.warns(UserWarning, match=r"MultiTaskModule: no batch of this epoch had targets .*\['seg', 'depth'"):
        quiet_trainer(callbacks=[callback()]).fit(module(), Batches(batches))


def test_one_batch_without_any_target_is_no_mistake(quiet_trainer: MakeTrainer) -> None:
    batches = batches_of_three()
    batches[1] = (batches[1][0], {})
    quiet_trainer(callbacks=[GradNorm()]).fit(module(), Batches(batches))


# the callbacks' names ------------------------------------------------------------------------------------------------

HEADS = {name: f"tasks.{name}.head" for name in ("seg", "depth", "normal")}
ONES = dict.fromkeys(HEADS, 1.0)
CALLBACKS = [
    case("GradNorm with a misspelt task", partial(GradNorm, ["seg", "dept"]), ["'dept'", "did you mean 'depth'"]),
    case("FixedWeights with a misspelt task", partial(FixedWeights, {"seg": 1, "dept": 1}), ["'dept'", "'depth'"]),
    case(
        "initial weights of a misspelt task",
        partial(GradNorm, initial_weights={"seg": 1, "dept": 1, "normal": 1}),
        ["initial_weights", "'dept'", "did you mean 'depth'"],
    ),
    case("priorities that lack a task", partial(GradNorm, priorities={"seg": 1, "depth": 1}), ["priorities", "normal"]),
    case(
        "heads as they are called in your own module",
        partial(GradNorm, heads={**HEADS, "seg": "seg_head"}),
        ["heads['seg']", "did you mean 'tasks.seg.head'"],
    ),
    case("heads that lack a task", partial(GradNorm, heads={"seg": "tasks.seg.head"}), ["heads", "'depth', 'normal'"]),
    case(
        "heads exchanged",
        partial(GradNorm, heads={**HEADS, "seg": HEADS["depth"], "depth": HEADS["seg"]}),
        ["'seg'", "'depth'", "swapped?"],
    ),
    case(
        "losses by the names under which the module logs them",
        partial(GradNorm, {name: f"train/loss/{name}" for name in HEADS}),
        ["train/loss/seg", "tasks=None"],
    ),
]


@pytest.mark.parametrize(("make", "expected"), CALLBACKS)
def test_the_error_for_a_callback_that_does_not_fit_the_module_gives_the_name(
    make: Any, expected: list[str], quiet_trainer: MakeTrainer
) -> None:
    callback = make()
    fails(quiet_trainer, multi_task_module(3), callback, type(callback).__name__, *expected)


def test_initial_losses_are_checked_before_the_tasks_are_known() -> None:
    with pytest.raises(ValueError, match=r"GradNorm: initial_losses\['seg'\] should be positive and finite; got -1\.0"):
        GradNorm(initial_losses={**ONES, "seg": -1.0})


def test_one_task_cannot_be_balanced(quiet_trainer: MakeTrainer) -> None:
    batches = [(inputs, {"seg": targets["seg"]}) for inputs, targets in batches_of_three()]
    fails(quiet_trainer, module(tasks={"seg": task()}), GradNorm(), "GradNorm", "two", "['seg']", batches=batches)


def test_two_tasks_of_one_head_are_balanced_by_a_pass_for_each_loss(quiet_trainer: MakeTrainer) -> None:
    head = nn.Linear(6, 3).double()
    tasks = {name: Task(head, F.mse_loss) for name in ("seg", "depth", "normal")}
    gradnorm = GradNorm()
    model = module(tasks=tasks, optimizer=network_sgd)
    quiet_trainer(callbacks=[gradnorm]).fit(model, Batches(batches_of_three()))
    assert gradnorm.weights != ONES
