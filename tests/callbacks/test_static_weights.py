"""`GradNormStatic` and `RandomWeights`: weights that come from another run or a seed, and then stay constant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, Recorder
from torch import nn

from lightning_gradnorm import FixedWeights, GradNorm, GradNormStatic, MultiTaskModule, RandomWeights, Task

TASKS = ["seg", "depth", "normal"]

Trainer = Callable[..., L.Trainer]


def model(tasks: Sequence[str] = TASKS) -> MultiTaskModule:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
    heads = {name: nn.Linear(8, 2) for name in TASKS}
    return MultiTaskModule(encoder, {name: Task(heads[name], nn.MSELoss()) for name in tasks}).double()


def batches(tasks: Sequence[str] = TASKS, steps: int = 6) -> Any:
    draw = torch.Generator().manual_seed(1)
    made = []
    for _ in range(steps):
        targets = {
            name: scale * torch.randn(5, 2, generator=draw, dtype=torch.float64)
            for name, scale in zip(TASKS, (1, 5, 0.2), strict=True)
        }
        made.append((torch.randn(5, 4, generator=draw, dtype=torch.float64), {name: targets[name] for name in tasks}))
    return Batches(made)


def trained(trainer: Trainer, *callbacks: L.Callback, tasks: Sequence[str] = TASKS) -> dict[str, torch.Tensor]:
    one = model(tasks)
    trainer(callbacks=list(callbacks)).fit(one, batches(tasks))
    return one.state_dict()


@pytest.fixture
def run(quiet_trainer: Trainer, tmp_path: Path) -> tuple[Path, dict[str, float]]:
    """The folder of a GradNorm run, and the mean of the weights it had."""
    gradnorm = GradNorm()
    recorder = Recorder(gradnorm)
    trainer = quiet_trainer(callbacks=[gradnorm, recorder])
    trainer.fit(model(), batches())
    trainer.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    means = {task: sum(weights[task] for weights in recorder.weights) / len(recorder.weights) for task in TASKS}
    assert max(means.values()) - min(means.values()) > 0.05
    return tmp_path / "run", means


@pytest.mark.parametrize("what", ["folder", "checkpoint", "string"])
def test_the_mean_weights_of_a_run_are_found_and_trained_on(
    what: str, run: tuple[Path, dict[str, float]], quiet_trainer: Trainer
) -> None:
    folder, means = run
    path = {"folder": folder, "checkpoint": folder / "checkpoints/last.ckpt", "string": str(folder)}[what]
    static = GradNormStatic(path)
    assert static.weights == GradNormStatic(run=path).weights == GradNormStatic(from_run=path).weights
    assert static.weights == pytest.approx(means, rel=1e-12)
    assert sum(static.weights.values()) == pytest.approx(3, rel=1e-12)
    found, expected = trained(quiet_trainer, static), trained(quiet_trainer, FixedWeights(means))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


def test_the_tasks_may_be_in_another_order(run: tuple[Path, dict[str, float]], quiet_trainer: Trainer) -> None:
    folder, means = run
    turned = TASKS[::-1]
    static = GradNormStatic(folder, tasks=turned)
    assert list(static.weights) == turned
    found = trained(quiet_trainer, static, tasks=turned)
    expected = trained(quiet_trainer, FixedWeights(means))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


def test_the_error_for_a_missing_run_lists_what_exists(run: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    folder, _ = run
    with pytest.raises(FileNotFoundError, match=r"a finished run, or a checkpoint; there is no nowhere\. Train"):
        GradNormStatic("nowhere")
    (folder / "other").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"there is no .*run/other/checkpoints/last\.ckpt\. Train with GradNorm"
    ):
        GradNormStatic(folder / "other")
    (folder / "checkpoints/last.ckpt").rename(folder / "checkpoints/best.ckpt")
    with pytest.raises(
        FileNotFoundError, match=r"there is no .*last\.ckpt\. Give one of .*run/checkpoints/best\.ckpt\."
    ):
        GradNormStatic(folder)
    (tmp_path / "notes.ckpt").write_text("weights")
    with pytest.raises(ValueError, match=r"notes\.ckpt cannot be read as one \(\w+\)"):
        GradNormStatic(tmp_path / "notes.ckpt")


@pytest.mark.parametrize("given", [{}, {"run": "here", "from_run": "there"}])
def test_the_run_is_given_once(given: dict[str, str]) -> None:
    with pytest.raises(
        ValueError,
        match=r"GradNormStatic: run \(or from_run\) should be one finished run; got",
    ):
        GradNormStatic(**given)


def test_the_error_for_a_run_without_gradnorm_names_its_callbacks(quiet_trainer: Trainer, tmp_path: Path) -> None:
    for name, callbacks, had in (("plain", [], "no callback"), ("fixed", [L.pytorch.callbacks.Timer()], "Timer")):
        trainer = quiet_trainer(callbacks=callbacks)
        trainer.fit(model(), batches())
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        with pytest.raises(ValueError, match=rf"{name}\.ckpt has no state of it, only of {had}\."):
            GradNormStatic(tmp_path / f"{name}.ckpt")


def test_the_error_for_a_run_with_other_tasks_lists_both(
    run: tuple[Path, dict[str, float]], quiet_trainer: Trainer
) -> None:
    both = r"has tasks \['depth', 'normal', 'seg'\], but this run has \['depth', 'seg'\]"
    with pytest.raises(ValueError, match=both):
        GradNormStatic(run[0], tasks=["seg", "depth"])
    with pytest.raises(ValueError, match=both):
        trained(quiet_trainer, GradNormStatic(run[0]), tasks=["seg", "depth"])


def test_random_weights_depend_on_the_seed_and_the_names_alone() -> None:
    first = RandomWeights(3, tasks=TASKS).weights
    torch.rand(7)
    assert RandomWeights(3, tasks=TASKS[::-1]).weights == first
    assert RandomWeights(4, tasks=TASKS).weights != first
    assert list(RandomWeights(3, tasks=TASKS[::-1]).weights) == TASKS[::-1]
    assert list(RandomWeights(3, tasks={"seg": "train/seg", "depth": "train/depth"}).weights) == ["seg", "depth"]


def test_random_weights_are_uniform_numbers_scaled_to_sum_t() -> None:
    drawn = torch.tensor([list(RandomWeights(seed, tasks=TASKS).weights.values()) for seed in range(2000)])
    assert (drawn > 0).all()
    torch.testing.assert_close(drawn.sum(dim=1), torch.full((2000,), 3.0))
    # u_1 < x (u_2 + u_3) / (3 - x) for uniform u: the share of one task, compared with another sample of it.
    u = torch.rand(20000, 3, generator=torch.Generator().manual_seed(9))
    expected = 3 * u / u.sum(dim=1, keepdim=True)
    at = torch.linspace(0.1, 0.9, 9)
    for task in range(3):
        assert (drawn[:, task].quantile(at) - expected[:, 0].quantile(at)).abs().max() < 0.12


def test_random_weights_are_trained_on_and_leave_torchs_generator_alone(quiet_trainer: Trainer) -> None:
    random = RandomWeights(3)
    assert random.weights == {}
    before = torch.random.get_rng_state()
    RandomWeights(5, tasks=TASKS)
    assert torch.equal(torch.random.get_rng_state(), before)
    found = trained(quiet_trainer, random)
    assert random.weights == RandomWeights(3, tasks=TASKS).weights
    expected = trained(quiet_trainer, FixedWeights(RandomWeights(3, tasks=TASKS).weights))
    for name, value in expected.items():
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True, None])
def test_a_seed_is_a_number(seed: Any) -> None:
    with pytest.raises(ValueError, match="RandomWeights: seed should be an integer, at least 0"):
        RandomWeights(seed)
