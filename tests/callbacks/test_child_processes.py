"""`ddp_spawn`, `ddp_fork`, `ddp_notebook`: the callbacks in the process that called `fit` show what rank 0 has learned."""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, Shares, state_by_part
from lightning.pytorch.callbacks import ModelCheckpoint
from models import TASKS, Automatic, as_inputs_and_targets, multi_task_module, vector_batches
from packages import assert_identical
from read import all_that_is_read
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torchjd.aggregation import UPGrad
from torchjd.scalarization import UW
from wrong_inputs import MakeTrainer

from lightning_gradnorm import Aggregation, FixedWeights, GradientNormMonitor, GradNorm, RandomWeights, Scalarization
from lightning_gradnorm.callbacks.copies import _Letter
from lightning_gradnorm.strategies import GABA

T = 3
NAMES = TASKS[:T]
MAKE: dict[str, Callable[[], Any]] = {
    "GradNorm": lambda: GradNorm(NAMES),
    "GradNorm of a layer": lambda: GradNorm(NAMES, shared_layer="encoder.2", heads=None, optimizer=sgd),
    "UW": lambda: Scalarization(UW, NAMES),
    "an UW": lambda: Scalarization(
        UW(T).double(), NAMES
    ),  # of the precision in which it is trained: nothing makes it anew
    "UPGrad": lambda: Aggregation(UPGrad(), NAMES),
    "GABA": lambda: Aggregation(GABA(beta=0.9, warmup=2), NAMES, scalarizer=UW(T)),
    "fixed": lambda: FixedWeights(dict(zip(NAMES, (0.5, 1.0, 2.0), strict=True))),
}
sgd = partial(torch.optim.SGD, lr=0.01)


class Parts(L.Callback):
    """Waits for the others before the processes part: one that leaves early aborts those that still speak to it."""

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.strategy.barrier()


class Notes(L.Callback):
    """Makes rank 0 record the callback's values at the end of its training."""

    def __init__(self, callbacks: Sequence[L.Callback], file: Path) -> None:
        self.callbacks, self.file = callbacks, file

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank == 0:
            torch.save([all_that_is_read(one) for one in self.callbacks], self.file)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """For temporary files, of the child processes too; what we put there is gone afterwards."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    assert not list(folder.glob("lightning_gradnorm_*"))


def monitor() -> GradientNormMonitor:
    return GradientNormMonitor(NAMES, every_n_steps=2)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("GradNorm", "ddp_fork"),
        ("an UW", "ddp_spawn"),
        *(
            pytest.param(kind, strategy, marks=pytest.mark.slow)
            for strategy in ("ddp_fork", "ddp_spawn", "ddp_notebook")
            for kind in MAKE
            if (kind, strategy) not in {("GradNorm", "ddp_fork"), ("an UW", "ddp_spawn")}
        ),
    ],
)
def test_the_caller_sees_the_results_of_one_process(
    kind: str, strategy: str, quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Both ranks see the same batches, whose means over the ranks are exact: nothing differs by a bit."""
    found, expected = [MAKE[kind](), monitor()], [MAKE[kind](), monitor()]
    models = [Automatic(T), Automatic(T)]
    quiet_trainer(callbacks=expected).fit(models[0], Batches(vector_batches(T, 4)))
    trainer = quiet_trainer(
        callbacks=[*found, Notes(found, tmp_path / "told.pt"), Parts()], devices=2, strategy=strategy
    )
    trainer.fit(models[1], Batches(vector_batches(T, 4)))
    told = torch.load(tmp_path / "told.pt", weights_only=False)
    for one, other, of_rank0 in zip(found, expected, told, strict=True):
        assert_identical(all_that_is_read(one), of_rank0)
        assert_identical(all_that_is_read(one), all_that_is_read(other))
    assert_identical(state_by_part(models[1]), state_by_part(models[0]))
    assert kind == "fixed" or not all(value == 1.0 for value in found[0].weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GradNorm", "UW", "UPGrad"])
def test_ranks_with_different_batches_match_one_process(kind: str, quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    found, expected = [MAKE[kind](), monitor()], [MAKE[kind](), monitor()]
    for callbacks, options in ((expected, {}), (found, {"devices": 2, "strategy": "ddp_spawn"})):
        quiet_trainer(callbacks=[*callbacks, Notes(callbacks, tmp_path / "told.pt")], **options).fit(
            Automatic(T), datamodule=Shares(vector_batches(T, 4))
        )
    for one, of_rank0 in zip(found, torch.load(tmp_path / "told.pt", weights_only=False), strict=True):
        assert_identical(all_that_is_read(one), of_rank0)
    assert found[0].weights == pytest.approx(expected[0].weights, abs=1e-9)
    assert dict(found[1].last) == pytest.approx(dict(expected[1].last), abs=1e-9)


@pytest.mark.both_packages
@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_notebook", marks=pytest.mark.slow)])
def test_one_child_process_of_both_packages(strategy: str, quiet_trainer: MakeTrainer) -> None:
    """An optimizer that cannot be pickled stays where it is."""
    found, expected = (GradNorm(NAMES, optimizer=lambda weights: sgd(weights)) for _ in range(2))
    quiet_trainer(callbacks=[expected]).fit(Automatic(T), Batches(vector_batches(T, 2)))
    trainer = quiet_trainer(callbacks=[found], strategy=strategy)
    trainer.fit(Automatic(T), Batches(vector_batches(T, 2)))
    assert_identical(all_that_is_read(found), all_that_is_read(expected))
    assert {name: float(value) for name, value in trainer.callback_metrics.items() if "/weight/" in name} == {
        f"gradnorm/weight/{task}": weight for task, weight in found.weights.items()
    }


@pytest.fixture
def fork(quiet_trainer: MakeTrainer) -> Callable[..., L.Trainer]:
    """`fork(callbacks, model)` has a forked process train the model."""

    def fit(callbacks: list[Any], model: L.LightningModule | None = None, seed: int = 11, **options: Any) -> L.Trainer:
        trainer = quiet_trainer(callbacks=callbacks, strategy="ddp_fork", **options)
        trainer.fit(Automatic(T) if model is None else model, Batches(vector_batches(T, 2, seed)))
        return trainer

    return fit


def test_tasks_that_the_module_declares_are_known_to_the_caller(quiet_trainer: MakeTrainer) -> None:
    random, looks = RandomWeights(seed=3), GradientNormMonitor(every_n_steps=1)
    batches = Batches(as_inputs_and_targets(vector_batches(T, 2)))
    quiet_trainer(callbacks=[random, looks], strategy="ddp_fork").fit(multi_task_module(T), batches)
    assert random.weights == RandomWeights(seed=3, tasks=NAMES).weights
    assert random.rule.weights.dtype == torch.float64
    assert "2 measured steps" in looks.summary()
    assert "`encoder`" in looks.summary()


def test_the_original_of_a_copy_that_a_child_process_trains(fork: Callable[..., L.Trainer]) -> None:
    gradnorm, looks = GradNorm(NAMES), monitor()
    copies = copy.deepcopy([gradnorm, looks])
    fork(copies)
    assert gradnorm.weights == copies[0].weights != dict.fromkeys(NAMES, 1.0)
    assert looks.summary() == copies[1].summary()
    assert "1 measured step:" in looks.summary()


def test_a_callback_from_a_file_whose_original_is_gone(fork: Callable[..., L.Trainer]) -> None:
    gradnorm = pickle.loads(pickle.dumps(GradNorm(NAMES)))
    fork([gradnorm])
    assert gradnorm.weights != dict.fromkeys(NAMES, 1.0)


def test_an_intermediate_process_forwards_a_letter(tmp_path: Path) -> None:
    """As with a queue's manager, which unpickles the objects it forwards."""
    gradnorm, file = GradNorm(NAMES), tmp_path / "letter.pt"
    file.touch()
    letter = _Letter(os.getpid() + 1, "GradNorm", gradnorm._copies.lineage, str(file), "")
    again = pickle.loads(pickle.dumps(letter))
    assert again.content == letter.content
    assert file.exists()


def test_callbacks_that_the_model_brings_along(fork: Callable[..., L.Trainer]) -> None:
    class Brings(Automatic):
        def configure_callbacks(self) -> list[L.Callback]:
            return [self.gradnorm]

    model = Brings(T)
    model.gradnorm = GradNorm(NAMES)  # type: ignore[assignment]
    fork([], model)
    assert model.gradnorm.weights != dict.fromkeys(NAMES, 1.0)


@pytest.mark.parametrize("kind", ["GradNorm", "an UW", "GABA"])
def test_a_checkpoint_that_the_caller_saves_has_the_state_of_rank_0(
    kind: str, fork: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """Lightning's own part of it is incomplete: the optimizers of a child process end with it."""
    callback = MAKE[kind]()
    trainer = fork([callback, ModelCheckpoint(tmp_path / "of_rank_0", "one")], enable_checkpointing=True)
    trainer.strategy.connect(trainer.lightning_module)
    trainer.save_checkpoint(tmp_path / "of_caller.ckpt")
    files = tmp_path / "of_rank_0" / "one.ckpt", tmp_path / "of_caller.ckpt"
    (state, network), (found, found_network) = (
        (content["callbacks"][callback.state_key], content["state_dict"])
        for content in (torch.load(file, weights_only=True) for file in files)
    )
    assert_identical(found, state)
    assert_identical(dict(found_network), dict(network))


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create the checkpoint")
@pytest.mark.parametrize("kind", ["GradNorm", "an UW", "GABA"])
def test_a_fit_that_follows_begins_anew_or_resumes(
    kind: str, fork: Callable[..., L.Trainer], quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callback, fresh, alone = MAKE[kind](), MAKE[kind](), MAKE[kind]()
    fork([callback, ModelCheckpoint(tmp_path / "saved", "one")], enable_checkpointing=True)
    for one in (callback, fresh):
        quiet_trainer(callbacks=[one]).fit(Automatic(T), Batches(vector_batches(T, 2, seed=12)))
    assert_identical(all_that_is_read(callback), all_that_is_read(fresh))
    quiet_trainer(callbacks=[alone], max_epochs=2).fit(Automatic(T), Batches(vector_batches(T, 2)))
    trainer = quiet_trainer(callbacks=[callback], max_epochs=2, strategy="ddp_fork")
    trainer.fit(Automatic(T), Batches(vector_batches(T, 2)), ckpt_path=tmp_path / "saved" / "one.ckpt")
    assert_identical(all_that_is_read(callback), all_that_is_read(alone))


def test_validating_and_testing_change_nothing(fork: Callable[..., L.Trainer]) -> None:
    class Tested(Automatic):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", torch.stack(list(self.task_losses(batch).values())).sum())

        test_step = validation_step

    gradnorm, model = GradNorm(NAMES), Tested(T)
    trainer = fork([gradnorm], model)
    learned = all_that_is_read(gradnorm)
    (validated,) = trainer.validate(model, Batches(vector_batches(T, 1)), verbose=False)
    (tested,) = trainer.test(model, Batches(vector_batches(T, 1)), verbose=False)
    assert validated == tested
    assert_identical(all_that_is_read(gradnorm), learned)


class Explodes(L.Callback):
    def on_train_end(self, *args: Any) -> None:
        raise ZeroDivisionError("a user's bug")


def test_a_training_that_fails_leaves_the_callers_as_they_were(fork: Callable[..., L.Trainer]) -> None:
    gradnorm, looks = GradNorm(NAMES), monitor()
    before = [all_that_is_read(one) for one in (gradnorm, looks)]
    for learned in (False, True):
        with pytest.raises(ProcessRaisedException, match="a user's bug"):
            fork([gradnorm, looks, Explodes()], seed=12)
        assert_identical([all_that_is_read(one) for one in (gradnorm, looks)], before)
        if not learned:
            fork([gradnorm, looks])
            before = [all_that_is_read(one) for one in (gradnorm, looks)]
    assert "1 measured step:" in looks.summary()


class Secretive(nn.Module):
    """A sum of the losses that comes to have something which cannot be saved."""

    def forward(self, losses: torch.Tensor) -> torch.Tensor:
        self.secret = object()
        return 2 * losses.sum()


class MadeOnce:
    """Makes a scalarizer, and then no other."""

    def __init__(self) -> None:
        self.file = Path(tempfile.mkdtemp()) / "made"

    def __call__(self, T: int) -> nn.Module:
        if self.file.exists():
            raise RuntimeError("there is only one")
        self.file.touch()
        return UW(T)


@pytest.mark.parametrize(("make", "why"), [(MadeOnce, "there is only one"), (Secretive, "cannot be saved")])
def test_results_that_cannot_be_transferred_are_reported_and_the_network_kept(
    make: Any, why: str, fork: Callable[..., L.Trainer]
) -> None:
    looks, model = monitor(), Automatic(T)
    with pytest.warns(UserWarning, match=f"Scalarization: the network is trained, but .*{why}.*from a checkpoint"):
        fork([Scalarization(make(), NAMES), looks], model)
    assert not torch.equal(model.encoder[0].weight, Automatic(T).encoder[0].weight)
    assert "1 measured step:" in looks.summary()
