"""``absent_tasks="last_seen"`` in a Trainer: an absent task counts with its last norm and loss.

Compared with a textbook that keeps the last norm and loss of each task. One task per batch is the hardest case.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Batches, Recorder, assert_agrees
from lightning.pytorch.callbacks import ModelCheckpoint
from models import TASKS, Batch, learn_from_textbook, vector_batches
from ranks import MayLack, MayLackManual, Presence, assert_identical, lacking, train, when

from lightning_gradnorm import GradNorm

NAMES = list(TASKS[:3])
STEPS = 24
adam = partial(torch.optim.Adam, lr=0.025)
sgd = partial(torch.optim.SGD, lr=0.05)


def in_turn(count: int, every: int = 1) -> list[Batch]:
    """Batches with one task each; all tasks in every so many-th, none left out if 1."""
    batches = vector_batches(3, count)
    alone = [{"x": batch["x"], NAMES[i % 3]: batch[NAMES[i % 3]]} for i, batch in enumerate(batches)]
    return [
        whole if every > 1 and i % every == 0 else one
        for i, (one, whole) in enumerate(zip(alone, batches, strict=True))
    ]


def fit(
    trainer: Any,
    batches: list[Batch],
    *,
    manual: bool = False,
    accumulate: int = 1,
    resume: Path | None = None,
    **options: Any,
) -> tuple[MayLack, GradNorm, Recorder]:
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2", **{"absent_tasks": "last_seen", **options})
    model = MayLackManual(3, accumulate=accumulate) if manual else MayLack(3)
    if isinstance(model, MayLackManual):
        model.gradnorm = [gradnorm]
    recorder = Recorder(gradnorm, accumulate)
    of_trainer = {} if manual else {"accumulate_grad_batches": accumulate}
    trainer(callbacks=[gradnorm, recorder], **of_trainer).fit(model, Batches(batches), ckpt_path=resume)
    return model, gradnorm, recorder


@pytest.mark.parametrize("optimizer", [adam, sgd], ids=["Adam", "SGD"])
@pytest.mark.parametrize("every", [1, 4], ids=["one task a batch", "all tasks in every fourth"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_tasks_in_turn_are_balanced_as_in_the_textbook(
    manual: bool, every: int, optimizer: Any, quiet_trainer: Any
) -> None:
    batches, twin = in_turn(STEPS, every), MayLack(3)
    trajectory = learn_from_textbook(
        twin, batches, tasks=NAMES, absent_tasks="last_seen", weight_optimizer=optimizer, initial_losses=2
    )
    assert max(abs(w - 1) for w in trajectory.weights[-1].values()) > 0.05
    model, _, recorder = fit(quiet_trainer, batches, manual=manual, optimizer=optimizer, initial_losses=2)
    assert_agrees(recorder, model, trajectory, twin)


@pytest.mark.parametrize("heads", ["auto", None])
def test_a_step_of_two_micro_batches_has_two_tasks_of_three(heads: Any, quiet_trainer: Any) -> None:
    batches, twin = in_turn(2 * STEPS), MayLack(3)
    trajectory = learn_from_textbook(twin, batches, tasks=NAMES, absent_tasks="last_seen", accumulate=2)
    model, _, recorder = fit(quiet_trainer, batches, accumulate=2, heads=heads)
    assert_agrees(recorder, model, trajectory, twin)


def test_before_its_first_loss_a_task_is_left_out(quiet_trainer: Any) -> None:
    batches = [{name: one for name, one in batch.items() if name != "seg"} for batch in in_turn(12, every=2)]
    batches = [batch for batch in batches if len(batch) > 1] + in_turn(6)
    _, _, recorder = fit(quiet_trainer, batches)
    first = next(i for i, batch in enumerate(batches) if "seg" in batch)
    assert first > 4
    assert all(weights["seg"] == 1.0 for weights in recorder.weights[:first])
    assert recorder.weights[first - 1]["depth"] != 1.0
    seg = [weights["seg"] for weights in recorder.weights[first:]]
    assert len(set(seg)) == len(seg), "from then on its weight moves in each step"


def saved_after(step: int, batches: list[Batch], trainer: Any, folder: Path, absent_tasks: Any) -> Path:
    """Train for that many steps and return the checkpoint."""
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2", absent_tasks=absent_tasks)
    saves = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="GradNorm: in none of the last")
        trainer(callbacks=[gradnorm, saves], max_steps=step, enable_checkpointing=True).fit(
            MayLack(3), Batches(batches)
        )
    return folder / f"step={step}.ckpt"


@pytest.mark.parametrize("step", [1, 2, 5, 11])
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create the checkpoint")
def test_a_resumed_run_is_bit_identical(step: int, quiet_trainer: Any, tmp_path: Path) -> None:
    batches = in_turn(12)
    _, _, whole = fit(quiet_trainer, batches)
    checkpoint = saved_after(step, batches, quiet_trainer, tmp_path, "last_seen")
    torch.load(checkpoint, weights_only=True)
    _, _, rest = fit(quiet_trainer, batches, resume=checkpoint)
    assert rest.weights == whole.weights[step:]


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create the checkpoint")
def test_a_checkpoint_that_knows_no_last_numbers_begins_without(quiet_trainer: Any, tmp_path: Path) -> None:
    batches = in_turn(6)
    checkpoint = saved_after(3, batches, quiet_trainer, tmp_path, "leave_out")
    _, _, recorder = fit(quiet_trainer, batches, resume=checkpoint)
    first, second, third = recorder.weights
    assert first == dict.fromkeys(NAMES, 1.0)  # seg is alone
    assert second["normal"] == 1.0 != second["seg"]
    assert third["normal"] != 1.0


def test_two_ranks_match_one_process() -> None:
    """Rank 0 and rank 1 have different tasks, and some steps have one task in all."""
    lacks = Presence(
        lambda s, r, m: when(s % 3 != r, "depth") | when((s + r) % 2 == 0, "seg") | when(s % 2 == 1, "normal")
    )
    steps = lacking(vector_batches(3, STEPS, size=8), lacks)
    assert any("depth" not in batch for step in steps for of_rank in step for batch in of_rank)
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2", absent_tasks="last_seen")
    told = train(MayLack(3), gradnorm, steps, ddp={"find_unused_parameters": True})
    assert_identical(told)
    twin = MayLack(3)
    micro_batches = [batch for step in steps for of_rank in step for batch in of_rank]
    kept = [len(b) for b in micro_batches]
    assert min(kept) >= 1
    trajectory = learn_from_textbook(twin, micro_batches, tasks=NAMES, absent_tasks="last_seen", accumulate=2)
    for found, expected in zip(told[0].weights, trajectory.weights, strict=True):
        assert found == pytest.approx(expected, abs=1e-9)


# ---- nobody to balance ---------------------------------------------------------------------------------------------------


def warned_of(trainer: Any, batches: list[Batch], epochs: int = 1, **options: Any) -> list[str]:
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callbacks=[gradnorm], max_epochs=epochs).fit(MayLack(3), Batches(batches))
    return [str(one.message) for one in caught if "GradNorm" in str(one.message)]


def test_an_epoch_without_two_tasks_in_a_step_warns_once_and_suggests_a_fix(quiet_trainer: Any) -> None:
    (told,) = warned_of(quiet_trainer, in_turn(9), epochs=3)
    assert told.startswith("GradNorm: in none of the last 9 weight updates were two tasks present")
    for remedy in ("max_size_cycle", "accumulate_grad_batches", "absent_tasks='last_seen'"):
        assert remedy in told


@pytest.mark.parametrize(
    "options", [{"absent_tasks": "last_seen"}, {}], ids=["last_seen", "one batch of nine has all tasks"]
)
def test_an_epoch_in_which_something_is_balanced_causes_no_warning(options: Any, quiet_trainer: Any) -> None:
    assert warned_of(quiet_trainer, in_turn(9, every=1 if options else 8), epochs=2, **options) == []


@pytest.mark.parametrize("absent_tasks", ["leave_out", "last_seen"])
def test_tasks_that_are_never_measured_are_reported(absent_tasks: str, quiet_trainer: Any) -> None:
    """Of three tasks in turn, every third step always has the same."""
    (told,) = warned_of(quiet_trainer, in_turn(9), epochs=2, absent_tasks=absent_tasks, update_every=3)
    assert told.startswith("GradNorm: in none of the last 3 weight updates")
    assert ("update_every=1" in told) == (absent_tasks == "last_seen")
    if absent_tasks == "last_seen":
        assert warned_of(quiet_trainer, in_turn(6), absent_tasks=absent_tasks, update_every=2) == []


def test_a_wrong_value_is_refused_with_the_right_ones() -> None:
    with pytest.raises(ValueError, match="GradNorm: absent_tasks should be 'leave_out' or 'last_seen'; got 'drop'"):
        GradNorm(NAMES, absent_tasks="drop")  # type: ignore[arg-type]
