"""Balancing callbacks that cannot be combined, and checkpoints of something else."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from harness import Batches
from models import (
    Automatic,
    vector_batches,
)
from wrong_inputs import ONES, TASKS, MakeTrainer, fails

from lightning_gradnorm import Balancer, FixedWeights, GradNorm
from lightning_gradnorm.strategies import FixedRule


def test_two_gradnorms_are_refused(quiet_trainer: MakeTrainer) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `GradNorm`"):
        quiet_trainer(callbacks=[GradNorm(TASKS), GradNorm(TASKS)])


class MyGradNorm(GradNorm):
    """A subclass of the user's."""


@pytest.mark.parametrize("other", [MyGradNorm(TASKS), FixedWeights(ONES)])
def test_two_balancing_callbacks_are_refused(other: L.Callback, quiet_trainer: MakeTrainer) -> None:
    expected = ["one balancing callback", "GradNorm", type(other).__name__, "Remove one"]
    fails(quiet_trainer, Automatic(3), [GradNorm(TASKS), other], *expected)


@pytest.mark.parametrize("part", [None, "encoder"], ids=["the model", "a part of it"])
def test_a_balancer_and_a_callback_on_one_model_are_refused(part: str | None, quiet_trainer: MakeTrainer) -> None:
    model = Automatic(3)
    of_balancer = model if part is None else model.get_submodule(part)
    with Balancer(of_balancer, FixedRule(ONES)):
        expected = (
            f"GradNorm: {type(of_balancer).__name__} already has a Balancer, with FixedRule",
            "call close()",
        )
        fails(quiet_trainer, model, GradNorm(TASKS), *expected)
    quiet_trainer(callbacks=[GradNorm(TASKS)]).fit(model, Batches(vector_batches(3, 2)))


class MakesOne(Automatic):
    """Creates a Balancer on a part of itself during training."""

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        Balancer(self.encoder, FixedRule(ONES))


def test_a_balancer_beside_a_callback_at_work_is_refused(quiet_trainer: MakeTrainer) -> None:
    expected = "Balancer: MakesOne already has a GradNorm, with GradNormRule", "Leave one of them out."
    fails(quiet_trainer, MakesOne(3), GradNorm(TASKS), *expected)
    Balancer(MakesOne(3), FixedRule(ONES)).close()


def test_before_training_the_tasks_of_a_module_are_not_known() -> None:
    with pytest.raises(RuntimeError, match="GradNorm: the tasks of the MultiTaskModule are known only after training"):
        _ = GradNorm().weights


def checkpoint_of(trainer: MakeTrainer, folder: Path, *callbacks: L.Callback) -> Path:
    one = trainer(callbacks=list(callbacks))
    one.fit(Automatic(3), Batches(vector_batches(3, 4)))
    one.save_checkpoint(folder / "one.ckpt")
    return folder / "one.ckpt"


def resume(trainer: MakeTrainer, path: Path, *callbacks: L.Callback) -> None:
    trainer(callbacks=list(callbacks), max_epochs=2).fit(Automatic(3), Batches(vector_batches(3, 4)), ckpt_path=path)


@pytest.mark.parametrize("saved_by", [(), (FixedWeights(ONES),)], ids=["plain training", "FixedWeights"])
def test_a_checkpoint_without_state_of_gradnorm_is_gone_on_from_with_a_warning(
    saved_by: tuple[L.Callback, ...], quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    path, gradnorm = checkpoint_of(quiet_trainer, tmp_path, *saved_by), GradNorm(TASKS)
    with pytest.warns(UserWarning, match=r"GradNorm: the checkpoint .*one.ckpt has no state of GradNorm.*start over"):
        resume(quiet_trainer, path, gradnorm)
    assert gradnorm.weights != ONES


def test_a_checkpoint_of_gradnorm_gone_on_from_without_it_is_warned_of(
    quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    path = checkpoint_of(quiet_trainer, tmp_path, GradNorm(TASKS))
    with pytest.warns(UserWarning, match=r"callbacks used to create the checkpoint need to be provided.*GradNorm"):
        resume(quiet_trainer, path, FixedWeights(ONES))


def test_resuming_with_other_tasks_lists_both(quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = checkpoint_of(quiet_trainer, tmp_path, GradNorm(TASKS))
    with pytest.raises(ValueError, match=r"GradNorm: .*\['depth', 'normal', 'seg'\].*\['depth', 'seg'\].*same tasks"):
        resume(quiet_trainer, path, GradNorm(["seg", "depth"]))


def test_resuming_from_a_state_of_another_version_is_an_error(quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = checkpoint_of(quiet_trainer, tmp_path, GradNorm(TASKS))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["GradNorm"]["version"] = 99
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"GradNorm: .*version 1; got 99"):
        resume(quiet_trainer, path, GradNorm(TASKS))


def test_resuming_with_another_kind_of_weight_optimizer_is_an_error(quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = checkpoint_of(quiet_trainer, tmp_path, GradNorm(TASKS))
    with pytest.raises(ValueError, match=r"GradNorm: .*moved by Adam, but this run's optimizer is SGD.*'given'"):
        resume(quiet_trainer, path, GradNorm(TASKS, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9)))
