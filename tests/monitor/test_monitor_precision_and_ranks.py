"""In half precision and on several ranks the monitor shows the gradients of the whole batch, unscaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Batches, MemoryLogger, Overflows, state_by_part
from lightning.pytorch.plugins.precision import MixedPrecision
from models import (
    Automatic,
    WithCoefficients,
    multi_task_module,
    vector_batches,
)
from monitored import (
    FIXED,
    TASKS,
    MakeTrainer,
    Watcher,
    by_hand,
    expected,
)
from ranks import MayLack, Step, in_form_of, shares, train
from torch import Tensor
from torch.nn import functional as F

from lightning_gradnorm import FixedWeights, GradientNormMonitor, gradient_norms


class Single(Automatic):
    """The test network in single precision."""

    def __init__(self, T: int = 3) -> None:
        super().__init__(T)
        self.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_numbers_match_the_unscaled_gradients(quiet_trainer: MakeTrainer, dtype: torch.dtype) -> None:
    scale = 2.0**12
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", scale))]
    options: dict[str, Any] = {"precision": "bf16-mixed"} if dtype == torch.bfloat16 else {"plugins": plugins}
    model, watcher, batches = Single(), Watcher(), [{n: v.float() for n, v in b.items()} for b in vector_batches(3, 4)]
    callbacks = [GradientNormMonitor(TASKS, "encoder", every_n_steps=1), watcher]
    quiet_trainer(callbacks=callbacks, accumulate_grad_batches=2, **options).fit(model, Batches(batches))
    twin = Single()
    seed = torch.tensor((scale if dtype == torch.float16 else 1.0) / 2)
    history: dict[str, list[bool]] = {}
    for step in range(2):
        for name, value in state_by_part(twin).items():
            value.data.copy_(watcher.notes[2 * step][0][name])
        parameters = list(twin.encoder.parameters())
        sums: dict[str, list[Tensor]] = {task: [torch.zeros_like(p) for p in parameters] for task in TASKS}
        for batch in batches[2 * step : 2 * step + 2]:
            with torch.autocast("cpu", dtype):
                losses = twin.task_losses(batch)
            for task, loss in losses.items():
                found = torch.autograd.grad(loss, parameters, seed, retain_graph=True)
                sums[task] = [s + g / (2 * seed) for s, g in zip(sums[task], found, strict=True)]
        whole = [torch.stack(of_all).sum(dim=0) for of_all in zip(*sums.values(), strict=True)]
        wanted = by_hand(sums, whole, history)
        for name, value in watcher.notes[2 * step + 1][2].items():
            assert value == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), name


class PartlySingle(Single):
    """Leaves autocast in a layer of the encoder, as numerically delicate code does."""

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", enabled=False):
            z = self.encoder(batch["x"])
        return {task: F.mse_loss(getattr(self, f"{task}_head")(z), batch[task]) for task in TASKS}


def test_where_the_model_leaves_autocast_gradients_are_in_full_precision(quiet_trainer: MakeTrainer) -> None:
    (batch,) = [{name: value.float() for name, value in one.items()} for one in vector_batches(3, 1)]
    monitor, twin = GradientNormMonitor(TASKS, "encoder"), PartlySingle()
    quiet_trainer(callbacks=[monitor], precision="bf16-mixed").fit(PartlySingle(), Batches([batch]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = twin.task_losses(batch)
    assert monitor.last is not None
    for task, norm in gradient_norms(losses, twin.encoder.parameters()).items():
        assert monitor.last[task] == pytest.approx(norm, rel=1e-6)


def test_a_step_that_the_scaler_skips_is_not_shown_but_the_next(quiet_trainer: MakeTrainer) -> None:
    log, batches = MemoryLogger(), [{n: v.float() for n, v in b.items()} for b in vector_batches(3, 6)]
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**6))]
    callbacks = [Overflows({0, 1}), GradientNormMonitor(TASKS, every_n_steps=3)]
    quiet_trainer(callbacks=callbacks, plugins=plugins, logger=log).fit(Single(), Batches(batches))
    assert log.steps["monitor/imbalance"] == [2, 5]


def _on_ranks(model: Any, steps: list[Step], monitor: GradientNormMonitor, watcher: Watcher) -> list[Any]:
    names = None if not isinstance(model, Automatic) else TASKS
    balancing = FixedWeights(FIXED, tasks=names)
    watcher.weights = lambda: FIXED
    return train(model, balancing, steps, callbacks=[monitor, watcher])


@pytest.mark.parametrize("kind", ["MultiTaskModule", "automatic"])
def test_two_ranks_show_the_gradients_of_the_whole_batch(kind: str) -> None:
    whole = vector_batches(3, 3, size=8)
    steps = in_form_of(kind, [shares(batch, 2, 2) for batch in whole])
    model = multi_task_module(3, accumulate_grad_batches=2) if kind == "MultiTaskModule" else WithCoefficients(3)
    monitor = GradientNormMonitor(None, "encoder", every_n_steps=2)
    ranks = _on_ranks(model, steps, monitor, Watcher())
    twin = Automatic(3) if kind == "MultiTaskModule" else WithCoefficients(3)
    for rank in ranks:
        history: dict[str, list[bool]] = {}
        for step in (0, 2):
            state, weights, _ = rank.notes[2 * step]
            micro = [batch for of_rank in shares(whole[step], 2, 2) for batch in of_rank]
            wanted = expected(twin, state, micro, weights, "encoder", history)
            shown = rank.notes[2 * step + 1][2]
            assert shown.keys() == wanted.keys()
            for name, value in wanted.items():
                assert shown[name] == pytest.approx(value, abs=1e-8), f"{name} in step {step}"


def test_losses_that_only_one_rank_has_are_shown_on_all() -> None:
    """None for losses: both ranks together must find out which losses exist and which parameters are shared."""
    (batch,) = vector_batches(3, 1, size=8)
    (step,) = [shares(batch, 2, 1)]
    for rank, lacks in enumerate(("depth", "seg")):
        del step[rank][0][lacks]
    ranks = _on_ranks(MayLack(3), [step], GradientNormMonitor(every_n_steps=1), Watcher())
    twin = MayLack(3)
    state = ranks[0].notes[0][0]
    wanted = expected(twin, state, [step[0][0], step[1][0]], FIXED, "encoder")
    for rank in ranks:
        shown = rank.notes[0][2]
        assert shown.keys() == wanted.keys()
        for name, value in wanted.items():
            assert shown[name] == pytest.approx(value, abs=1e-8), name
