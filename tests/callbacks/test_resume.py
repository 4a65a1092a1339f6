"""A run interrupted after any optimizer step and resumed from its checkpoint is bit-identical to an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, MemoryLogger, Recorder, state_by_part
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Automatic, Manual, as_inputs_and_targets, multi_task_module, vector_batches

from lightning_gradnorm import GradNorm

pytestmark = [
    # a checkpoint in every step of a module with manual optimization is on purpose here
    pytest.mark.filterwarnings("ignore:.*pre-optimization state.*", "ignore:.*manual optimization.*"),
    # so is a resumed run that saves nothing
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create the checkpoint"),
]

STEPS_PER_EPOCH = 4
NAMES = ["seg", "depth", "normal"]
MakeTrainer = Callable[..., L.Trainer]

OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd-momentum": {"optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9)},
    "slow-start": {
        "initial_losses": 3,
        "update_every": 2,
        "stop_after": 6,
        "priorities": {"seg": 2, "depth": 1, "normal": 1},
    },
    "activation": {"norm_of": "activation"},
}


def make(mode: str, accumulate: int, options: dict[str, Any]) -> tuple[L.LightningModule, GradNorm, list[Any]]:
    batches = vector_batches(3, STEPS_PER_EPOCH * accumulate)
    if mode == "own":
        return (
            multi_task_module(3, accumulate_grad_batches=accumulate),
            GradNorm(**options),
            as_inputs_and_targets(batches),
        )
    model = Automatic(3) if mode.startswith("automatic") else Manual(3, accumulate=accumulate)
    gradnorm = GradNorm(list(model.tasks), heads=model.heads() if mode.endswith("+heads") else None, **options)
    if isinstance(model, Manual):
        model.gradnorm = [gradnorm]
    return model, gradnorm, batches


def run(
    trainer: MakeTrainer, mode: str, accumulate: int, options: dict[str, Any], resume: Path | None, save: Path | None
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], GradNorm]:
    model, gradnorm, batches = make(mode, accumulate, options)
    recorder = Recorder(gradnorm, accumulate)
    callbacks: list[L.Callback] = [gradnorm, recorder]
    if save is not None:
        callbacks.append(ModelCheckpoint(dirpath=save, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    extra = {"accumulate_grad_batches": accumulate} if model.automatic_optimization else {}
    trainer(callbacks=callbacks, max_epochs=2, enable_checkpointing=save is not None, **extra).fit(
        model, Batches(batches), ckpt_path=resume
    )
    return recorder.weights, state_by_part(model), gradnorm


@pytest.mark.each_value_once
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", ["automatic", "automatic+heads", "manual", "own"])
def test_a_run_resumed_after_any_step_is_bit_identical(
    mode: str, accumulate: int, options: str, quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    choice = OPTIONS[options]
    weights, network, whole = run(quiet_trainer, mode, accumulate, choice, None, tmp_path / "saved")
    assert len(weights) == 2 * STEPS_PER_EPOCH
    assert weights[0] != weights[-1]

    for step in range(1, 2 * STEPS_PER_EPOCH):
        checkpoint = tmp_path / "saved" / f"step={step}.ckpt"
        torch.load(checkpoint, weights_only=True)
        rest, resumed_network, resumed = run(quiet_trainer, mode, accumulate, choice, checkpoint, None)

        assert rest == weights[step:], f"resumed after step {step}"
        assert resumed.mean_weights == whole.mean_weights, f"resumed after step {step}"
        for name, value in network.items():
            assert torch.equal(resumed_network[name], value), f"{name}, resumed after step {step}"


def saved(trainer: MakeTrainer, folder: Path) -> Path:
    run(trainer, "automatic", 1, {}, None, folder)
    return folder / "step=3.ckpt"


def test_the_callbacks_state_is_plain_enough_for_a_safe_load(quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    checkpoint = torch.load(saved(quiet_trainer, tmp_path), weights_only=True)
    states = [state for key, state in checkpoint["callbacks"].items() if "GradNorm" in key]
    assert len(states) == 1
    assert states[0]


def test_a_reordered_list_of_tasks_is_matched_by_name(quiet_trainer: MakeTrainer, tmp_path: Path) -> None:
    weights, network, _ = run(quiet_trainer, "automatic", 1, {}, None, tmp_path)
    model = Automatic(3)
    gradnorm = GradNorm(["normal", "seg", "depth"])
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder], max_epochs=2).fit(
        model, Batches(vector_batches(3, STEPS_PER_EPOCH)), ckpt_path=tmp_path / "step=3.ckpt"
    )

    assert len(recorder.weights) == 5
    for found, expected in zip(recorder.weights, weights[3:], strict=True):
        assert found == pytest.approx(expected, abs=1e-12)  # sums over tasks run in another order
    for name, value in state_by_part(model).items():
        torch.testing.assert_close(value, network[name], rtol=0, atol=1e-12)


def test_a_second_fit_of_the_same_trainer_continues_from_the_weights_of_the_first(quiet_trainer: MakeTrainer) -> None:
    _, _, whole = run(quiet_trainer, "automatic", 1, {}, None, None)
    model, gradnorm, batches = make("automatic", 1, {})
    trainer = quiet_trainer(callbacks=[gradnorm])
    trainer.fit(model, Batches(batches))
    optimizer = trainer.optimizers[0].state_dict()

    def restored() -> torch.optim.Optimizer:  # Lightning makes a new network optimizer in each fit
        again = Automatic.configure_optimizers(model)  # type: ignore[arg-type]
        again.load_state_dict(optimizer)
        return again

    model.configure_optimizers = restored  # type: ignore[assignment]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, Batches(batches))

    assert gradnorm.weights == whole.weights


# other tasks ----------------------------------------------------------------------------------------------------------


def _after_two_tasks(quiet_trainer: Any, tmp_path: Path) -> tuple[GradNorm, Path]:
    first = GradNorm(["seg", "depth"], on_task_mismatch="adapt")
    trainer = quiet_trainer(callbacks=[first])
    trainer.fit(Automatic(3), Batches(vector_batches(3, 6)))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    return first, tmp_path / "two.ckpt"


def test_with_adapt_known_tasks_keep_their_ratio_and_new_ones_begin_with_the_mean(quiet_trainer, tmp_path) -> None:
    first, checkpoint = _after_two_tasks(quiet_trainer, tmp_path)
    adapted = GradNorm(["normal", "depth", "seg"], on_task_mismatch="adapt", stop_after=0)  # only looked at
    with pytest.warns(UserWarning, match=r"GradNorm.*checkpoint has tasks \['depth', 'seg'\]: \['normal'\] is new"):
        quiet_trainer(callbacks=[adapted], max_epochs=2).fit(
            Automatic(3), Batches(vector_batches(3, 6)), ckpt_path=checkpoint
        )
    mean = sum(first.weights.values()) / 2
    expected = {"normal": mean, **first.weights}
    assert adapted.weights == pytest.approx({task: weight * 3 / (3 * mean) for task, weight in expected.items()})


def test_with_adapt_a_new_tasks_moments_are_zero_and_its_initial_loss_its_first(quiet_trainer, tmp_path) -> None:
    _, checkpoint = _after_two_tasks(quiet_trainer, tmp_path)
    state = torch.load(checkpoint)["callbacks"]["GradNorm"]
    adapted = GradNorm(["normal", "depth", "seg"], on_task_mismatch="adapt")
    logger = MemoryLogger()
    model = Automatic(3)
    adapted.load_state_dict(state)
    with pytest.warns(UserWarning, match="is new"):
        quiet_trainer(callbacks=[adapted], logger=logger, max_steps=1).fit(model, Batches(vector_batches(3, 6)))
    after = adapted.state_dict()
    place = {task: after["tasks"].index(task) for task in after["tasks"]}
    moments, before = after["optimizer"]["state"][0], state["optimizer"]["state"][0]
    assert moments["step"] == before["step"] + 1
    norm = logger.scalars["gradnorm/grad_norm/normal"][0] / 1.0  # G_i at the mean weight, which is 1
    assert abs(float(moments["exp_avg"][place["normal"]])) == pytest.approx(0.1 * norm, rel=1e-9)
    for task in ("seg", "depth"):
        assert after["initial_losses"][place[task]] == state["initial_losses"][state["tasks"].index(task)]
    (first_loss,) = (Automatic(3).task_losses(batch)["normal"].item() for batch in vector_batches(3, 1))
    assert after["initial_losses"][place["normal"]].item() == pytest.approx(first_loss, rel=1e-12)


def test_with_adapt_a_task_that_is_gone_leaves_its_share_to_the_others(quiet_trainer, tmp_path) -> None:
    first = GradNorm(NAMES)
    trainer = quiet_trainer(callbacks=[first])
    trainer.fit(Automatic(3), Batches(vector_batches(3, 6)))
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    adapted = GradNorm(["seg", "normal"], on_task_mismatch="adapt", stop_after=0)
    with pytest.warns(UserWarning, match=r"\['depth'\] is gone; the weights are scaled to sum 2"):
        quiet_trainer(callbacks=[adapted], max_epochs=2).fit(
            Automatic(3), Batches(vector_batches(3, 6)), ckpt_path=tmp_path / "three.ckpt"
        )
    kept = {task: first.weights[task] for task in ("seg", "normal")}
    assert adapted.weights == pytest.approx({task: 2 * weight / sum(kept.values()) for task, weight in kept.items()})
