"""The monitor's shares of the update agree with autograd by hand, and training does not change."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from harness import Batches, MemoryLogger, assert_clean, state_by_part, traces
from lightning.pytorch.plugins.precision import MixedPrecision
from models import (
    FEATURES,
    HIDDEN,
    INPUTS,
    Automatic,
    Convolutional,
    WithDropout,
    as_inputs_and_targets,
    image_batches,
    multi_task_module,
    vector_batches,
)
from monitored import (
    BESIDE,
    MODELS,
    STEPS,
    TASKS,
    MakeTrainer,
    Watcher,
    WithOwnLayers,
    expected,
    model_of,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm import GradientNormMonitor, GradNorm


@pytest.mark.each_value_once
@pytest.mark.both_packages
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("kind", MODELS)
def test_numbers_agree_with_autograd_by_hand(
    quiet_trainer: MakeTrainer, kind: str, beside: str, accumulate: int, first: bool
) -> None:
    model, twin, options = model_of(kind)
    monitor = GradientNormMonitor(**options, parameters="encoder", every_n_steps=2)
    strategy = BESIDE[beside](options.get("losses", None if kind == "MultiTaskModule" else TASKS))
    watcher = Watcher(
        (lambda: strategy.weights) if beside in ("FixedWeights", "GradNorm") else lambda: dict.fromkeys(TASKS, 1.0)
    )
    batches = vector_batches(3, STEPS * accumulate)
    given: list[Any] = as_inputs_and_targets(batches) if kind == "MultiTaskModule" else batches
    trainer_options: dict[str, Any] = {"accumulate_grad_batches": accumulate} if model.automatic_optimization else {}
    if not model.automatic_optimization:
        setattr(model, "accumulate" if kind == "manual" else "accumulate_grad_batches", accumulate)
    callbacks = [one for one in (monitor, strategy) if one is not None]
    if kind == "manual":
        model.gradnorm = callbacks
    before = traces(model)
    ordered = callbacks if first else callbacks[::-1]
    quiet_trainer(callbacks=[*ordered, watcher], **trainer_options).fit(model, Batches(given))
    history: dict[str, list[bool]] = {}
    for step in range(STEPS):
        state, weights, _ = watcher.notes[step * accumulate]
        shown = watcher.notes[(step + 1) * accumulate - 1][2]
        if step % 2:
            assert shown == watcher.notes[step * accumulate - 1][2]  # not measured: the last one's
            continue
        micro = batches[step * accumulate : (step + 1) * accumulate]
        wanted = expected(twin, state, micro, weights, "encoder", history)
        assert shown.keys() == wanted.keys()
        for name, value in wanted.items():
            assert shown[name] == pytest.approx(value, abs=1e-8), f"{name} in step {step}"
    assert {f"conflict/{one}/{other}": share for (one, other), share in monitor.conflicts.items()} == {
        pair: sum(of_steps) / len(of_steps) for pair, of_steps in history.items()
    }
    assert_clean(model, before)


def test_gradients_match_those_that_gradnorm_reads_at_the_heads(quiet_trainer: MakeTrainer) -> None:
    model, log = Automatic(3), MemoryLogger()
    gradnorm = GradNorm(TASKS, shared_layer="encoder.2", heads=model.heads())
    monitor = GradientNormMonitor(TASKS, "encoder.2.weight", every_n_steps=1)
    quiet_trainer(callbacks=[gradnorm, monitor], logger=log).fit(model, Batches(vector_batches(3, STEPS)))
    for task in TASKS:
        assert log.scalars[f"monitor/norm/{task}"] == pytest.approx(
            log.scalars[f"gradnorm/grad_norm/{task}"], abs=1e-12
        )


def test_shared_parameters_are_those_that_two_losses_reach(quiet_trainer: MakeTrainer) -> None:
    model, watcher = WithOwnLayers(3), Watcher()
    (batch,) = vector_batches(3, 1)
    quiet_trainer(callbacks=[GradientNormMonitor(), watcher]).fit(model, Batches([batch]))
    ((_, _, shown),) = watcher.notes
    twin = WithOwnLayers(3)
    losses, parameters = twin.training_step(batch, 0), list(twin.encoder.parameters())
    for task in ("seg", "depth"):
        gradients = torch.autograd.grad(losses[task], parameters, retain_graph=True)
        norm = float(torch.cat([g.reshape(-1) for g in gradients]).norm())
        assert shown[f"monitor/norm/{task}"] == pytest.approx(norm, abs=1e-10)
    assert shown["monitor/norm/normal"] == 0.0
    assert not any(name.startswith("monitor/cosine") and "normal" in name for name in shown)


class Apart(WithOwnLayers):
    """Two losses that share nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = super().training_step(batch, batch_idx)
        return {"loss": losses["seg"] + losses["normal"], "seg": losses["seg"], "normal": losses["normal"]}


@pytest.mark.parametrize(("kind", "parameters"), [(WithOwnLayers, "all"), (Apart, "all"), (Apart, "shared")])
def test_all_parameters_are_measured_if_asked_for_or_if_no_two_losses_share_any(
    quiet_trainer: MakeTrainer, kind: type[Automatic], parameters: str
) -> None:
    model, watcher = kind(3), Watcher()
    (batch,) = vector_batches(3, 1)
    quiet_trainer(callbacks=[GradientNormMonitor(parameters=parameters), watcher]).fit(model, Batches([batch]))
    ((_, _, shown),) = watcher.notes
    twin = kind(3)
    losses = twin.training_step(batch, 0)
    del losses["loss"]
    for task, loss in losses.items():
        gradients = torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True, allow_unused=True)
        norm = float(torch.cat([g.reshape(-1) for g in gradients if g is not None]).norm())
        assert shown[f"monitor/norm/{task}"] == pytest.approx(norm, abs=1e-10)


def test_other_steps_cost_no_pass(quiet_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    steps = []

    class Counts(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            steps.append(batch_idx)

    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (passes.append(steps[-1]), real(*a, **k))[1])
    callbacks = [Counts(), GradientNormMonitor(TASKS, every_n_steps=3)]
    quiet_trainer(callbacks=callbacks).fit(Automatic(3), Batches(vector_batches(3, 7)))
    assert passes == [0] * 4 + [3] * 4 + [6] * 4  # where the losses stand in the total, and one for each


# ---- the training stays as it is ---------------------------------------------------------------------------------------


class Checkpointed(Automatic):
    """Computes a BatchNorm and a dropout again whenever a gradient passes, with fresh random numbers."""

    def build(self) -> None:
        super().build()
        self.encoder = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Dropout(0.3))
        self.encoder.append(nn.Linear(HIDDEN, FEATURES))

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        def run(x: Tensor) -> Tensor:
            random.random(), np.random.rand()
            return self.encoder(x)

        z = checkpoint(run, batch["x"], use_reentrant=False, preserve_rng_state=False)
        return {task: F.mse_loss(getattr(self, f"{task}_head")(z), batch[task]) for task in TASKS}


def _ends(model: Any, trainer: L.Trainer, strategy: Any) -> dict[str, Any]:
    optimizer = trainer.optimizers[0].state_dict()["state"]
    return {
        "network": list(state_by_part(model).values()),
        "optimizer": [v for state in optimizer.values() for v in state.values() if isinstance(v, Tensor)],
        "random": [torch.get_rng_state(), torch.tensor(np.random.rand(3)), torch.tensor(random.random())],
        "weights": [] if strategy is None else list(strategy.weights.values()),
    }


@pytest.mark.each_value_once
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("kind", ["images", "dropout", "checkpointed", "MultiTaskModule", "scaler"])
def test_training_is_the_same_to_the_bit(quiet_trainer: MakeTrainer, kind: str, beside: str) -> None:
    ends = []
    for watched in (False, True):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        makes = {"images": Convolutional, "dropout": WithDropout, "checkpointed": Checkpointed, "scaler": Automatic}
        model = multi_task_module(3) if kind == "MultiTaskModule" else makes[kind](3)
        batches: list[Any] = image_batches(3, STEPS) if kind == "images" else vector_batches(3, STEPS)
        batches = as_inputs_and_targets(batches) if kind == "MultiTaskModule" else batches
        layer = {"images": "encoder.3", "checkpointed": "encoder.3", "dropout": "encoder.2"}.get(kind, "encoder.2")
        names = None if kind == "MultiTaskModule" else TASKS
        strategy = GradNorm(names, shared_layer=layer) if beside == "GradNorm" else BESIDE[beside](names)
        callbacks: list[Any] = [] if strategy is None else [strategy]
        callbacks += [GradientNormMonitor(every_n_steps=2)] if watched else []
        plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**4))] if kind == "scaler" else []
        trainer = quiet_trainer(callbacks=callbacks, plugins=plugins)
        trainer.fit(model, Batches(batches))
        ends.append(_ends(model, trainer, strategy if beside != "Aggregation" else None))
    plain, watched_end = ends
    assert plain["weights"] == watched_end["weights"]
    for what in ("network", "optimizer", "random"):
        for one, other in zip(plain[what], watched_end[what], strict=True):
            assert torch.equal(one, other), what


class Failing(Automatic):
    """A step that fails in the second batch."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        if batch_idx == 1:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("first", [True, False])
def test_nothing_is_left_on_a_model_that_fails_beside_gradnorm(quiet_trainer: MakeTrainer, first: bool) -> None:
    """Both shadow `training_step`: whoever takes his shadow away first may not bring the other's back."""
    model = Failing(3)
    before = traces(model)
    callbacks = [GradientNormMonitor(every_n_steps=1), GradNorm(TASKS, shared_layer="encoder.2")]
    with pytest.raises(RuntimeError, match="out of memory"):
        quiet_trainer(callbacks=callbacks if first else callbacks[::-1]).fit(model, Batches(vector_batches(3, 2)))
    assert_clean(model, before)
