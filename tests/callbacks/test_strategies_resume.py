"""A run with any strategy, interrupted and resumed from its checkpoint, is bit-identical to an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from harness import Batches, Recorder, state_by_part
from lightning.pytorch.callbacks import ModelCheckpoint
from models import TASKS, Automatic, Batch, vector_batches
from strategies import STATEFUL, STRATEGIES, tasks_for
from torch import Tensor
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm import Aggregation, GradNorm, Scalarization
from lightning_gradnorm.strategies import AMNL, DBMTL, GABA, SLAW, ReLoBRaLo, SoftAdapt

pytestmark = [
    # a resumed run that saves nothing is on purpose here
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:You are solving a parameterized problem"),  # cvxpy's, of NashMTL
]

STEPS_PER_EPOCH = 3
MakeTrainer = Callable[..., L.Trainer]


class Validated(Automatic):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", torch.stack(list(self.task_losses(batch).values())).sum())


class Trained(NamedTuple):
    weights: list[dict[str, float]]
    """After each step."""
    network: dict[str, Tensor]
    balancing: Any


def train(
    trainer: MakeTrainer,
    balancing: Any,
    *,
    T: int = 3,
    accumulate: int = 1,
    epochs: int = 3,
    saving: Sequence[ModelCheckpoint] = (),
    resume: Path | None = None,
    **options: Any,
) -> Trained:
    model, recorder = Validated(T), Recorder(balancing, accumulate)
    made = trainer(
        callbacks=[balancing, recorder, *saving],
        max_epochs=epochs,
        enable_checkpointing=bool(saving),
        accumulate_grad_batches=accumulate,
        **options,
    )
    batches = vector_batches(T, STEPS_PER_EPOCH * accumulate)
    made.fit(model, Batches(batches), Batches(vector_batches(T, 1, seed=5)), ckpt_path=resume)
    return Trained(recorder.weights, state_by_part(model), balancing)


def make(name: str, tasks: Sequence[str] | None = None) -> Any:
    tasks = list(TASKS[: tasks_for(name)]) if tasks is None else tasks
    return STRATEGIES[name](tasks=tasks, heads={task: f"{task}_head" for task in tasks})


def each_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def assert_continues(found: Trained, whole: Trained, step: int) -> None:
    assert found.weights == whole.weights[step:], f"resumed after step {step}"
    for name, value in whole.network.items():
        assert torch.equal(found.network[name], value), f"{name}, resumed after step {step}"


ONCE = [
    name
    for name in STATEFUL
    if name.replace("the parameters", "the representation") not in STATEFUL or "representation" in name
]


def _resumed(trainer: MakeTrainer, folder: Path, name: str, steps: Sequence[int], **options: Any) -> None:
    whole = train(trainer, make(name), saving=[each_step(folder)], T=tasks_for(name), **options)
    for step in steps:
        checkpoint = folder / f"step={step}.ckpt"
        torch.load(checkpoint, weights_only=True)
        torch.manual_seed(1000 + step)  # what is drawn comes from the checkpoint
        assert_continues(train(trainer, make(name), resume=checkpoint, T=tasks_for(name), **options), whole, step)


@pytest.mark.parametrize("name", [n if n in ONCE else pytest.param(n, marks=pytest.mark.slow) for n in STATEFUL])
def test_a_resumed_run_is_bit_identical(name: str, quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    """In the midst of an epoch, and at an epoch's end."""
    _resumed(quiet_trainer, tmp_path, name, [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 1])


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_resumed_after_any_step_is_bit_identical(
    name: str, accumulate: int, quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    _resumed(quiet_trainer, tmp_path, name, range(1, 4 * STEPS_PER_EPOCH), accumulate=accumulate, epochs=4)


@pytest.mark.each_value_once
@pytest.mark.parametrize("name", ["DWA of the losses", "FAMO of the losses", "DB-MTL"])
@pytest.mark.parametrize("within", [True, False])
def test_a_checkpoint_written_at_the_end_of_validation_resumes_bit_identically(
    name: str, within: bool, quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Of a validation within the epoch, after its second step, or at its end."""
    saving = ModelCheckpoint(
        dirpath=tmp_path,
        filename="{step}",
        monitor="val_loss",
        save_top_k=-1,
        save_on_train_epoch_end=False,
    )
    options = {"epochs": 4, "val_check_interval": 2 if within else 1.0}
    whole = train(quiet_trainer, make(name), saving=[saving], **options)
    steps = sorted(int(path.stem.removeprefix("step=")) for path in tmp_path.glob("*.ckpt"))
    assert steps == ([2, 5, 8, 11] if within else [3, 6, 9, 12])
    for step in steps[:-1]:
        rest = train(quiet_trainer, make(name), resume=tmp_path / f"step={step}.ckpt", **options)
        assert_continues(rest, whole, step)


def test_the_weights_of_dwa_do_differ_by_the_time_it_is_interrupted(quiet_trainer: MakeTrainer) -> None:
    weights = train(quiet_trainer, make("DWA of the losses")).weights
    assert set(weights[2 * STEPS_PER_EPOCH - 1].values()) == {1.0}
    assert len(set(weights[2 * STEPS_PER_EPOCH].values())) == 3


# ---- the same object again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONCE)
def test_an_object_that_is_trained_with_again_from_step_0_begins_anew(name: str, quiet_trainer: MakeTrainer) -> None:
    balancing, T = make(name), tasks_for(name)
    first = train(quiet_trainer, balancing, T=T)
    again = train(quiet_trainer, balancing, T=T)
    assert_continues(again, first, 0)


@pytest.mark.parametrize(
    "given",
    [
        *(
            S.UW(3),
            S.DWA(),
            S.FAMO(3),
            AMNL(beta=0.9),
            ReLoBRaLo(alpha=0.5, rho=0.5),
            SoftAdapt(order=2),
            SLAW(),
            DBMTL(beta=0.9),
            GABA(beta=0.9, warmup=2),
            A.ExcessMTL(),
            A.GradVac(),
        ),
        *(A.NashMTL(3, max_norm=0.0), A.CRMOGMWeighting(A.UPGradWeighting())),
    ],
    ids=lambda given: type(given).__name__,
)
def test_a_module_that_was_given_begins_anew_as_it_was_given(given: Any, quiet_trainer: MakeTrainer) -> None:
    tasks = list(TASKS[:3])
    heads = {task: f"{task}_head" for task in tasks}
    at: Any = "parameters" if isinstance(given, DBMTL | A.ExcessMTL) else "representation"
    made = Scalarization if isinstance(given, S.Scalarizer) else partial(Aggregation, heads=heads, at=at)
    balancing = made(given, tasks=tasks)
    first = train(quiet_trainer, balancing)
    assert_continues(train(quiet_trainer, balancing), first, 0)


# ---- other tasks, another strategy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONCE)
def test_tasks_in_another_order_are_matched_by_name(name: str, quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    T = tasks_for(name)
    whole = train(quiet_trainer, make(name), saving=[each_step(tmp_path)], T=T)
    other_order = make(name, list(reversed(TASKS[:T])))
    assert_continues(train(quiet_trainer, other_order, resume=tmp_path / "step=4.ckpt", T=T), whole, 4)


def saved(trainer: MakeTrainer, folder: Path, balancing: Any) -> Path:
    train(trainer, balancing, saving=[each_step(folder)], epochs=2)
    return folder / "step=4.ckpt"


def test_other_tasks_are_an_error_that_names_both(quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    checkpoint = saved(quiet_trainer, tmp_path, make("UW of the losses"))
    with pytest.raises(
        ValueError, match=r"has tasks \['seg', 'depth', 'normal'\], but this run has \['seg', 'depth'\]"
    ):
        train(quiet_trainer, Scalarization(S.UW, tasks=["seg", "depth"]), resume=checkpoint)


@pytest.mark.parametrize(
    ("written", "read", "says"),
    [
        ("UW of the losses", "IMTLL of the losses", "should be from IMTLL; it is from UW"),
        (
            "GradVac at the representation",
            "NashMTL at the representation",
            "should be from NashMTL; it is from GradVac",
        ),
        ("IMTL", "UPGrad at the representation", "should be from UPGrad; it is from IMTLG of IMTLL"),
    ],
)
def test_another_strategy_is_an_error_that_names_both(
    written: str, read: str, says: str, quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    checkpoint = saved(quiet_trainer, tmp_path, make(written))
    with pytest.raises(ValueError, match=says):
        train(quiet_trainer, make(read), resume=checkpoint)


@pytest.mark.parametrize("other", [GradNorm(list(TASKS[:3])), make("IMTL")], ids=lambda other: type(other).__name__)
def test_a_checkpoint_without_the_strategys_state_warns(other: Any, quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    checkpoint = saved(quiet_trainer, tmp_path, other)
    with pytest.warns(UserWarning, match="has no state of Scalarization; its weights and all it has learned start"):
        resumed = train(quiet_trainer, make("UW of the losses"), resume=checkpoint, epochs=2)
    assert len(resumed.weights) == 2
    assert resumed.weights[0] == train(quiet_trainer, make("UW of the losses"), epochs=1).weights[0]
