"""A library copies a callback and trains the copy: the original shows what the copy has learned, unless it learned itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
from harness import Batches
from models import TASKS, Automatic, as_inputs_and_targets, multi_task_module, vector_batches
from packages import assert_identical
from read import all_that_is_read
from torchjd.aggregation import UPGrad
from torchjd.scalarization import UW
from wrong_inputs import MakeTrainer

from lightning_gradnorm import Aggregation, GradientNormMonitor, GradNorm, RandomWeights, Scalarization
from lightning_gradnorm.callbacks import TensorBoardDashboard

T = 3
MAKE: dict[str, Callable[[], Any]] = {
    "GradNorm": lambda: GradNorm(TASKS[:T]),
    "UW": lambda: Scalarization(UW, TASKS[:T]),
    "an UW": lambda: Scalarization(UW(T), TASKS[:T]),
    "UPGrad": lambda: Aggregation(UPGrad(), TASKS[:T]),
    "monitor": lambda: GradientNormMonitor(TASKS[:T], every_n_steps=2),
    "monitor of what it finds": lambda: GradientNormMonitor(every_n_steps=1),
}
COPY: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
    "a copy of a copy": lambda one: copy.deepcopy(copy.deepcopy(one)),  # nobody holds the first one
}


def fit(quiet_trainer: MakeTrainer, callback: Any, seed: int = 11, **options: Any) -> None:
    quiet_trainer(callbacks=[callback], **options).fit(Automatic(T), Batches(vector_batches(T, 4, seed)))


@pytest.mark.parametrize("way", COPY)
@pytest.mark.parametrize("kind", MAKE)
def test_the_original_shows_all_that_the_copy_has_learned(kind: str, way: str, quiet_trainer: MakeTrainer) -> None:
    original, alone = MAKE[kind](), MAKE[kind]()
    before = all_that_is_read(original)
    copied = COPY[way](original)
    fit(quiet_trainer, copied)
    fit(quiet_trainer, alone)
    assert all_that_is_read(alone) != before
    assert_identical(all_that_is_read(original), all_that_is_read(alone))


@pytest.mark.parametrize("kind", MAKE)
def test_an_original_that_has_trained_itself_keeps_its_own(kind: str, quiet_trainer: MakeTrainer) -> None:
    original = MAKE[kind]()
    fit(quiet_trainer, original)
    own = all_that_is_read(original)
    copied = copy.deepcopy(original)
    assert_identical(all_that_is_read(copied), own)
    fit(quiet_trainer, copied, seed=12)
    assert_identical(all_that_is_read(original), own)


@pytest.mark.parametrize("kind", MAKE)
def test_an_original_that_trains_after_its_copy_shows_its_own(kind: str, quiet_trainer: MakeTrainer) -> None:
    original, alone = MAKE[kind](), MAKE[kind]()
    fit(quiet_trainer, copy.deepcopy(original))
    of_copy = all_that_is_read(original)
    for one in (original, alone):
        fit(quiet_trainer, one, seed=12)
    assert_identical(all_that_is_read(original), all_that_is_read(alone))
    assert str(all_that_is_read(original)) != str(of_copy)


@pytest.mark.parametrize("kind", ["GradNorm", "monitor"])
def test_a_state_that_is_loaded_is_shown_in_place_of_the_copys(kind: str, quiet_trainer: MakeTrainer) -> None:
    original, other = MAKE[kind](), MAKE[kind]()
    fit(quiet_trainer, copy.deepcopy(original))
    fit(quiet_trainer, other, seed=12)
    original.load_state_dict(other.state_dict())
    assert_identical(original.state_dict(), other.state_dict())


def test_tasks_that_the_module_declares_are_known_to_the_original(quiet_trainer: MakeTrainer) -> None:
    original, monitor = RandomWeights(seed=3), GradientNormMonitor(every_n_steps=1)
    assert original.weights == {}
    quiet_trainer(callbacks=copy.deepcopy([original, monitor])).fit(
        multi_task_module(T), Batches(as_inputs_and_targets(vector_batches(T, 2)))
    )
    assert original.weights == RandomWeights(seed=3, tasks=TASKS[:T]).weights
    assert "`encoder`" in monitor.summary()
    assert repr(monitor).startswith(f"GradientNormMonitor({', '.join(TASKS[:T])};")


def test_a_copy_of_one_template_for_each_fold_shows_its_own(quiet_trainer: MakeTrainer) -> None:
    template = GradNorm(TASKS[:T])
    first, second = copy.deepcopy(template), copy.deepcopy(template)
    fit(quiet_trainer, first)
    weights = first.weights
    fit(quiet_trainer, second, seed=12)
    assert first.weights == weights != second.weights
    assert template.weights == second.weights


@pytest.mark.parametrize("way", COPY)
def test_a_copy_made_in_mid_training_trains_as_one_made_before(way: str, quiet_trainer: MakeTrainer) -> None:
    """Hooks on a model stay with the callback that trains it."""
    gradnorm, monitor = GradNorm(TASKS[:T]), GradientNormMonitor(TASKS[:T], every_n_steps=1)
    copies: list[Any] = []

    class Copies(L.Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            copies.append([COPY[way](one) for one in (gradnorm, monitor)])

    quiet_trainer(callbacks=[gradnorm, monitor, Copies()]).fit(Automatic(T), Batches(vector_batches(T, 2)))
    own = all_that_is_read(gradnorm)
    fit(quiet_trainer, gradnorm)
    expected = all_that_is_read(gradnorm)
    assert str(expected) != str(own)
    assert len(copies) == 2
    for one, other in copies:
        fit(quiet_trainer, one)
        fit(quiet_trainer, other)
        assert_identical(all_that_is_read(one), expected)
        assert other.last is not None


def test_a_dashboard_has_a_readable_name() -> None:
    assert repr(TensorBoardDashboard()) == "TensorBoardDashboard()"
