"""The monitor shows each loss's part of the update as autograd by hand gives it, and leaves the training as it is."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from harness import Batches, MemoryLogger, Overflows, assert_clean, assert_says, case, state_by_part, traces
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from models import (
    FEATURES,
    HIDDEN,
    INPUTS,
    Automatic,
    Convolutional,
    Manual,
    OnlyLogs,
    WithCoefficients,
    WithDropout,
    as_inputs_and_targets,
    image_batches,
    multi_task_module,
    vector_batches,
)
from ranks import MayLack, Notes, Step, in_form_of, shares, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchjd.aggregation import MGDA

from lightning_gradnorm import Aggregation, FixedWeights, GradientNormMonitor, GradNorm, gradient_norms
from lightning_gradnorm.engine.layers import find_parameters

MakeTrainer = Callable[..., L.Trainer]
TASKS = ["seg", "depth", "normal"]
STEPS = 5
FIXED = {"seg": 2.0, "depth": 0.25, "normal": 0.75}

Numbers = dict[str, float]


def by_hand(contributions: Mapping[str, Sequence[Tensor]], whole: Sequence[Tensor]) -> Numbers:
    """All that the monitor logs of a step, of the parts' gradients and of that of the whole loss."""
    flat = {name: torch.cat([g.reshape(-1) for g in gradients]) for name, gradients in contributions.items()}
    update = torch.cat([g.reshape(-1) for g in whole])
    rest = update - torch.stack(list(flat.values())).sum(dim=0)
    found = {f"norm/{name}": float(g.norm()) for name, g in flat.items()}
    found["imbalance"] = max(found.values()) / min(found.values())
    for one, g in flat.items():
        found[f"share/{one}"] = float(g @ update / (update @ update))
        for other, h in flat.items():
            if list(flat).index(one) < list(flat).index(other):
                found[f"cosine/{one}/{other}"] = float(F.cosine_similarity(g, h, dim=0))
    if rest.norm() > 1e-12:
        found["norm/rest_of_loss"] = float(rest.norm())
        found["share/rest_of_loss"] = float(rest @ update / (update @ update))
    return {f"monitor/{name}": value for name, value in found.items()}


def expected(
    twin: Automatic, state: dict[str, Tensor], batches: Sequence[Any], weights: Mapping[str, float], what: str
) -> Numbers:
    """What autograd says of one optimizer step's batches, of all ranks, with the network as it was then."""
    with torch.no_grad():
        for name, value in state_by_part(twin).items():
            value.copy_(state[name])
    coefficients = twin.coefficients if isinstance(twin, WithCoefficients) else dict.fromkeys(TASKS, 1.0)
    parts = dict.fromkeys(twin.tasks, torch.zeros((), dtype=torch.float64))
    rest = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        forward = twin.forward_for_textbook(batch)
        for name, loss in forward.losses.items():
            parts[name] = parts[name] + weights[name] * coefficients[name] * loss / len(batches)
        rest = rest if forward.rest is None else rest + forward.rest / len(batches)
    parameters = list(twin.get_submodule(what).parameters())
    gradients = {n: torch.autograd.grad(p, parameters, retain_graph=True) for n, p in parts.items() if p.requires_grad}
    whole = torch.autograd.grad(torch.stack([rest, *parts.values()]).sum(), parameters)
    return by_hand(gradients, whole)


class Watcher(Notes):
    """Notes, of each batch, the network and the weights before it, and what is logged of the monitor after it."""

    def __init__(self, weights: Callable[[], Mapping[str, float]] = lambda: dict.fromkeys(TASKS, 1.0)) -> None:
        super().__init__()
        self.weights = weights

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        state = {name: value.clone() for name, value in state_by_part(pl_module).items()}
        self.before = state, dict(self.weights())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        shown = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("monitor/")}
        self.notes.append((*self.before, shown))


def model_of(kind: str) -> tuple[Any, Automatic, dict[str, Any]]:
    """A model, its twin for the hand, and how the monitor is told of its losses."""
    return {
        "a mapping": lambda: (Automatic(3), Automatic(3), {"losses": TASKS}),
        "all that is returned": lambda: (Automatic(3), Automatic(3), {}),
        "coefficients and a rest": lambda: (WithCoefficients(3), WithCoefficients(3), {}),
        "logged names": lambda: (OnlyLogs(3), Automatic(3), {"losses": OnlyLogs(3).logged_names()}),
        "manual": lambda: (Manual(3), Automatic(3), {"losses": TASKS}),
        "MultiTaskModule": lambda: (multi_task_module(3), Automatic(3), {}),
    }[kind]()


MODELS = ["a mapping", "all that is returned", "coefficients and a rest", "logged names", "manual", "MultiTaskModule"]
BESIDE: dict[str, Callable[[list[str] | None], Any]] = {
    "alone": lambda losses: None,
    "FixedWeights": lambda losses: FixedWeights(FIXED, tasks=losses),
    "GradNorm": lambda losses: GradNorm(losses, shared_layer="encoder.2"),
    "Aggregation": lambda losses: Aggregation(MGDA(), losses),
}


def _combinations() -> list[Any]:
    """All of them; the default suite has each kind and each strategy with accumulation, on both sides of GradNorm."""
    found = []
    for kind in MODELS:
        for beside in BESIDE:
            for accumulate in (1, 2):
                for first in (True, False):
                    is_short = accumulate == 2 and (first or beside == "GradNorm")
                    marks = [] if is_short else [pytest.mark.slow]
                    found.append(pytest.param(kind, beside, accumulate, first, marks=marks))
    return found


@pytest.mark.both_packages
@pytest.mark.parametrize(("kind", "beside", "accumulate", "first"), _combinations())
def test_numbers_are_those_of_autograd_by_hand(
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
    for step in range(STEPS):
        state, weights, _ = watcher.notes[step * accumulate]
        shown = watcher.notes[(step + 1) * accumulate - 1][2]
        if step % 2:
            assert shown == watcher.notes[step * accumulate - 1][2]  # not measured: the last one's
            continue
        micro = batches[step * accumulate : (step + 1) * accumulate]
        wanted = expected(twin, state, micro, weights, "encoder")
        assert shown.keys() == wanted.keys()
        for name, value in wanted.items():
            assert shown[name] == pytest.approx(value, abs=1e-8), f"{name} in step {step}"
    assert_clean(model, before)


def test_gradients_are_those_of_gradnorm_that_reads_them_at_the_heads(quiet_trainer: MakeTrainer) -> None:
    model, log = Automatic(3), MemoryLogger()
    gradnorm = GradNorm(TASKS, shared_layer="encoder.2", heads=model.heads())
    monitor = GradientNormMonitor(TASKS, "encoder.2.weight", every_n_steps=1)
    quiet_trainer(callbacks=[gradnorm, monitor], logger=log).fit(model, Batches(vector_batches(3, STEPS)))
    for task in TASKS:
        assert log.scalars[f"monitor/norm/{task}"] == pytest.approx(
            log.scalars[f"gradnorm/grad_norm/{task}"], abs=1e-12
        )


class WithOwnLayers(Automatic):
    """`normal` has a trunk of its own beside the one that the others share."""

    def build(self) -> None:
        super().build()
        self.extra = nn.Linear(INPUTS, FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        z, own = self.encoder(batch["x"]), self.extra(batch["x"])
        read = {"seg": z, "depth": z, "normal": own}
        losses = {task: F.mse_loss(getattr(self, f"{task}_head")(read[task]), batch[task]) for task in TASKS}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}


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
    """Computes a BatchNorm and a dropout once more whenever a gradient passes, with whatever random numbers come."""

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


# ---- mixed precision, ranks --------------------------------------------------------------------------------------------


class Single(Automatic):
    """The test network in single precision."""

    def __init__(self, T: int = 3) -> None:
        super().__init__(T)
        self.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_numbers_are_those_of_the_unscaled_gradients(
    quiet_trainer: MakeTrainer, dtype: torch.dtype
) -> None:
    scale = 2.0**12
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", scale))]
    options: dict[str, Any] = {"precision": "bf16-mixed"} if dtype == torch.bfloat16 else {"plugins": plugins}
    model, watcher, batches = Single(), Watcher(), [{n: v.float() for n, v in b.items()} for b in vector_batches(3, 4)]
    callbacks = [GradientNormMonitor(TASKS, "encoder", every_n_steps=1), watcher]
    quiet_trainer(callbacks=callbacks, accumulate_grad_batches=2, **options).fit(model, Batches(batches))
    twin = Single()
    seed = torch.tensor((scale if dtype == torch.float16 else 1.0) / 2)
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
        wanted = by_hand(sums, whole)
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
        for step in (0, 2):
            state, weights, _ = rank.notes[2 * step]
            micro = [batch for of_rank in shares(whole[step], 2, 2) for batch in of_rank]
            wanted = expected(twin, state, micro, weights, "encoder")
            shown = rank.notes[2 * step + 1][2]
            assert shown.keys() == wanted.keys()
            for name, value in wanted.items():
                assert shown[name] == pytest.approx(value, abs=1e-8), f"{name} in step {step}"


def test_losses_that_only_one_rank_has_are_shown_on_all() -> None:
    """None for losses: what there is, and which parameters are shared, has to be found out by both ranks together."""
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


# ---- what it says, writes and keeps ------------------------------------------------------------------------------------


def test_the_suggested_weights_make_the_mean_norms_equal(
    quiet_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where other weights are in force: suggested are those for the losses as the model adds them up."""
    suggested = []
    for strategy in (None, FixedWeights(FIXED, tasks=TASKS)):
        monitor = GradientNormMonitor(TASKS, "encoder", every_n_steps=1)
        callbacks = [monitor] if strategy is None else [strategy, monitor]
        with caplog.at_level(logging.INFO):
            quiet_trainer(callbacks=callbacks).fit(Automatic(3), Batches(vector_batches(3, 1)))
        suggested.append(monitor.suggested_weights)
    assert suggested[0] == pytest.approx(suggested[1], abs=1e-12)
    assert sum(suggested[0].values()) == pytest.approx(3)
    weighted = GradientNormMonitor(TASKS, "encoder", every_n_steps=1)
    callbacks = [FixedWeights(suggested[0], tasks=TASKS), weighted]
    quiet_trainer(callbacks=callbacks).fit(Automatic(3), Batches(vector_batches(3, 1)))
    assert weighted.last is not None
    assert weighted.last.imbalance == pytest.approx(1, abs=1e-12)
    said = [record.message for record in caplog.records if "GradientNormMonitor" in record.message]
    shown = {name: float(f"{weight:.3g}") for name, weight in suggested[0].items()}
    assert f"FixedWeights({shown})" in said[0]
    assert "1 measured step: `" in said[0]
    assert "of the update on `encoder`" in said[0]


def test_the_summary_names_who_carries_the_update_and_who_conflicts() -> None:
    class Opposed(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 1.0]))

        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
            big, small, penalty = 10 * self.w[0], -self.w[0], 3 * self.w[1]
            return {"loss": big + small + penalty + 0 * batch.sum(), "big": big, "small": small}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monitor = GradientNormMonitor(every_n_steps=1)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=[monitor], **options)
    trainer.fit(Opposed(), Batches([torch.zeros(1)] * 4))
    assert monitor.last is not None
    assert dict(monitor.last) == {"big": 10.0, "small": 1.0, "rest_of_loss": 3.0}
    assert monitor.last.shares == {
        "big": 1.0,
        "small": -0.1,
        "rest_of_loss": pytest.approx(0.1),
    }  # of the update (9, 3)
    assert monitor.summary().splitlines() == [
        "GradientNormMonitor, 4 measured steps: `big` carries 100 % of the update on the shared parameters, "
        "the rest of the loss 10 %, `small` -10 %.",
        "Mean norms: `big` 10, `small` 1, the rest of the loss 3; the largest is 10 times the smallest.",
        "`big` and `small` pull against each other in 4 of 4 steps (mean cosine -1.00).",
        "Suggested static weights, which make the mean norms equal: FixedWeights({'big': 0.182, 'small': 1.82}). "
        "A regularizer is not to be made as large as a task: if there is one among them, name the others in losses.",
    ]


def test_a_part_that_is_not_finite_is_named(quiet_trainer: MakeTrainer) -> None:
    monitor, log = GradientNormMonitor(TASKS, "encoder", every_n_steps=1), MemoryLogger()
    batches = vector_batches(3, 3)
    batches[2]["depth"].fill_(torch.inf)
    quiet_trainer(callbacks=[monitor], logger=log).fit(Automatic(3), Batches(batches))
    assert "2 measured steps" in monitor.summary()
    assert "In 1 of the measured steps the gradient of `depth` was not finite" in monitor.summary()
    assert not torch.tensor(log.scalars["monitor/norm/depth"]).isfinite()[2]
    assert torch.tensor(log.scalars["monitor/norm/seg"]).isfinite().all()


def test_a_resumed_run_measures_and_says_what_an_uninterrupted_one_does(quiet_trainer: MakeTrainer, tmp_path) -> None:
    batches = vector_batches(3, 4)
    whole, first, second = (GradientNormMonitor(TASKS, every_n_steps=3) for _ in range(3))
    quiet_trainer(callbacks=[whole], max_epochs=2).fit(Automatic(3), Batches(batches))
    trainer = quiet_trainer(callbacks=[first])
    trainer.fit(Automatic(3), Batches(batches))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = quiet_trainer(callbacks=[second], max_epochs=2)
    trainer.fit(Automatic(3), Batches(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert first.summary() != second.summary() == whole.summary()
    again = quiet_trainer(callbacks=[second], max_epochs=1)
    again.fit(Automatic(3), Batches(batches))  # another training: the old one is no part of it
    assert second.summary() == first.summary()


def test_a_checkpoint_of_the_first_edition_is_continued() -> None:
    tally = {
        "_steps": 1,
        "_squared": 17.0,
        "_along": {"rul": 16.0, "hs": 1.0},
        "_counts": {"rul": 1, "hs": 1},
        "_norms": {"rul": 4.0, "hs": 1.0},
        "_plain_norms": {"rul": 4.0, "hs": 1.0},
        "_cosines": {"rul": {"hs": [0.0, 1, 0]}},
        "_not_finite": {},
    }
    monitor = GradientNormMonitor()
    monitor.load_state_dict({"steps": 1, "tally": tally})
    assert monitor.state_dict() == {"steps": 1, "tally": tally}
    assert monitor.suggested_weights == pytest.approx({"rul": 0.4, "hs": 1.6})


def draw_nothing_but_the_size(names: Sequence[str], cosines: Tensor) -> np.ndarray:
    assert names == TASKS
    assert cosines.shape == (3, 3)
    return np.zeros((3, 4, 7), dtype=np.uint8)


@pytest.mark.parametrize("draw", [None, draw_nothing_but_the_size])
def test_tensorboard_gets_scalars_and_the_image_that_the_given_function_draws(
    quiet_trainer: MakeTrainer, tmp_path, draw: Callable[..., np.ndarray] | None
) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = quiet_trainer(callbacks=[GradientNormMonitor(every_n_steps=2, cosine_image=draw)], logger=logger)
    batches = as_inputs_and_targets(vector_batches(3, 3))
    trainer.fit(multi_task_module(3), DataLoader(batches, batch_size=None))
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    expected_tags = {f"monitor/{what}/{task}" for what in ("norm", "share") for task in TASKS}
    expected_tags |= {"monitor/imbalance", "monitor/cosine/seg/depth", "monitor/cosine/depth/normal"}
    assert expected_tags <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("monitor/share/seg")] == [0, 2]
    images = events.Images("monitor/cosine") if events.Tags()["images"] else []
    assert [(event.step, event.height, event.width) for event in images] == ([(0, 4, 7), (2, 4, 7)] if draw else [])


# ---- gradient_norms ----------------------------------------------------------------------------------------------------


def test_the_plain_function_says_what_autograd_says_and_changes_nothing() -> None:
    network, (batch,) = Automatic(3), vector_batches(3, 1)
    losses = network.task_losses(batch)
    found = gradient_norms(losses, network.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())
    torch.stack(list(losses.values())).sum().backward()  # the graph is still there
    parameters = list(network.parameters())
    again = network.task_losses(batch)
    flat = {}
    for name, loss in again.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        flat[name] = filled
    wanted = by_hand(flat, [parameter.grad for parameter in parameters])  # type: ignore[misc]
    for task in TASKS:
        assert found[task] == pytest.approx(wanted[f"monitor/norm/{task}"], abs=1e-12)
        assert found.shares[task] == pytest.approx(wanted[f"monitor/share/{task}"], abs=1e-12)
    assert found.imbalance == pytest.approx(wanted["monitor/imbalance"], abs=1e-12)
    assert found.cosine("seg", "normal") == pytest.approx(wanted["monitor/cosine/seg/normal"], abs=1e-12)
    assert sum(found.shares.values()) == pytest.approx(1)


W = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("losses", "parameters", "error", "says"),
    [
        case("no loss", {}, [W], TypeError, ["losses should be a mapping from name to loss"]),
        case("a list of losses", [W.sum()], [W], TypeError, ["losses should be a mapping"]),
        case("a number", {"a": 1.0}, [W], TypeError, ["the loss 'a' should be a tensor; got float"]),
        case("a vector", {"a": W * 1}, [W], ValueError, ["the loss 'a'", "scalar; got shape (2,)"]),
        case("detached", {"a": W.sum().detach()}, [W], ValueError, ["the loss 'a'", "carries no gradient"]),
        case("no parameter", {"a": W.sum()}, [], ValueError, ["parameters should have one that is trained"]),
        case("names", {"a": W.sum()}, ["encoder"], TypeError, ["parameters should be tensors", "got str"]),
    ],
)
def test_wrong_input_of_the_plain_function(losses: Any, parameters: Any, error: type[Exception], says: Any) -> None:
    with pytest.raises(error) as raised:
        gradient_norms(losses, parameters)
    assert_says(raised.value, "gradient_norms", *says)


# ---- wrong use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        case("a single name", {"losses": "seg"}, TypeError, ["losses should be a list of names", "'seg'"]),
        case("no name", {"losses": []}, TypeError, ["losses should be a list of names"]),
        case("twice", {"losses": ["seg", "seg"]}, ValueError, ["losses should all be different"]),
        case("the sum", {"losses": ["seg", "loss"]}, ValueError, ["losses names 'loss'", "the sum of all"]),
        case("the rest", {"losses": ["rest_of_loss"]}, ValueError, ["'rest_of_loss'", "another name"]),
        case(
            "no layer", {"parameters": None}, ValueError, ["parameters should be 'shared' or a dotted name; got None"]
        ),
        case("never", {"every_n_steps": 0}, ValueError, ["every_n_steps should be an integer, at least 1; got 0"]),
        case("no drawing", {"cosine_image": True}, ValueError, ["cosine_image should be a function", "got True"]),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], says: Any) -> None:
    with pytest.raises(error) as raised:
        GradientNormMonitor(**options)
    assert_says(raised.value, "GradientNormMonitor", *says)


class Nesting(Automatic):
    """Returns a loss that contains another one."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = self.task_losses(batch)
        return {"loss": losses["seg"] + losses["depth"], "both": losses["seg"] + losses["depth"], **losses}

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        losses = super().task_losses(batch)
        losses["seg"] = losses["seg"] + losses["depth"]
        return losses


class Copying(Automatic):
    """Returns copies of its losses."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        return {name: value if name == "loss" else 1 * value for name, value in output.items()}


class Detaching(Automatic):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        return {**output, "depth": output["depth"].detach()}


class Apart(WithOwnLayers):
    """Two losses that share nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = super().training_step(batch, batch_idx)
        return {"loss": losses["seg"] + losses["normal"], "seg": losses["seg"], "normal": losses["normal"]}


class WithoutParameters(Automatic):
    def build(self) -> None:
        super().build()
        self.flat = nn.Flatten()


@pytest.mark.parametrize(
    ("make", "options", "error", "says"),
    [
        case("no such loss", Automatic, {"losses": ["seg", "dept"]}, ValueError, ["loss 'dept'", "mean 'depth'?"]),
        case("nothing like it", Automatic, {"losses": ["l2"]}, ValueError, ["loss 'l2'", "['depth', 'normal', 'seg']"]),
        case(
            "no such logged name",
            OnlyLogs,
            {"losses": {"seg": "train/seg_los"}},
            ValueError,
            ["'train/seg_los' was not logged", "did you mean 'train/seg_loss'?"],
        ),
        case(
            "no mapping is returned", OnlyLogs, {"losses": ["seg"]}, TypeError, ["OnlyLogs.training_step", "got Tensor"]
        ),
        case("no such task", multi_task_module, {"losses": ["sag"]}, ValueError, ["loss 'sag'", "did you mean 'seg'?"]),
        case(
            "logged names of a MultiTaskModule",
            multi_task_module,
            {"losses": {"seg": "train/loss/seg"}},
            ValueError,
            ["MultiTaskModule shows them itself", "losses=None"],
        ),
        case(
            "no such layer",
            Automatic,
            {"parameters": "encoder.22"},
            ValueError,
            ["parameters 'encoder.22' is not in Automatic", "did you mean 'encoder.2'?"],
        ),
        case("no parameters", WithoutParameters, {"parameters": "flat"}, ValueError, ["'flat'", "has no parameters"]),
        case("one in another", Nesting, {}, ValueError, ["the loss 'seg' contains the loss 'depth'"]),
        case("copies", Copying, {"losses": TASKS}, ValueError, ["the loss 'seg' took no part in the backward pass"]),
        case("detached", Detaching, {"losses": TASKS}, ValueError, ["the loss 'depth'", "carries no gradient"]),
        case("nothing shared", Apart, {}, ValueError, ["parameters='shared'", "['seg', 'normal']", "there is none"]),
    ],
)
def test_wrong_use_is_an_error_that_names_the_culprit(
    quiet_trainer: MakeTrainer, make: Any, options: dict[str, Any], error: type[Exception], says: list[str]
) -> None:
    model = make(3)
    before = traces(model)
    batches: list[Any] = vector_batches(3, 2)
    batches = batches if isinstance(model, Automatic) else as_inputs_and_targets(batches)
    with pytest.raises(error) as raised:
        quiet_trainer(callbacks=[GradientNormMonitor(**options)]).fit(model, Batches(batches))
    assert_says(raised.value, "GradientNormMonitor", *says)
    assert_clean(model, before)


class SilentManual(Manual):
    """Optimizes manually and shows no losses."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(torch.stack(list(self.task_losses(batch).values())).sum())
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "losses", "says"),
    [
        case(
            "not logged",
            OnlyLogs,
            {"seg": "train/seg_loss", "l2": "weights"},
            "'weights' was not logged in the measured",
        ),
        case("not watched", SilentManual, None, r"no loss was seen in the measured steps.*watch\(\{'data': loss"),
    ],
)
def test_a_loss_that_no_measured_step_of_the_first_epoch_has_shown_is_a_warning(
    quiet_trainer: MakeTrainer, make: Any, losses: Any, says: str
) -> None:
    """Not an error: measured steps are few, and the loss may come later."""
    with pytest.warns(UserWarning, match=f"GradientNormMonitor: {says}"):
        quiet_trainer(callbacks=[GradientNormMonitor(losses)]).fit(make(3), Batches(vector_batches(3, 2)))


def test_a_tied_layer_is_found_under_each_of_its_names() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    model["second"].weight = model["first"].weight
    found = {
        name: find_parameters(model, name, caller="GradientNormMonitor: parameters")
        for name in ("second", "second.weight")
    }
    assert found["second"].keys() == {"first.weight", "second.bias"}
    assert found["second.weight"] == {"second.weight": model["first"].weight}


def test_a_compiled_layer_is_refused_for_its_graph_cannot_be_walked_twice(quiet_trainer: MakeTrainer) -> None:
    model = Automatic(3)
    model.encoder = torch.compile(model.encoder, backend="aot_eager")  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match=r"GradientNormMonitor: the loss reaches the parameters through a module compiled"
    ):
        quiet_trainer(callbacks=[GradientNormMonitor()]).fit(model, Batches(vector_batches(3, 2)))


def test_an_encoder_that_is_frozen_is_said_to_be_in_the_end(quiet_trainer: MakeTrainer) -> None:
    model, monitor = multi_task_module(3), GradientNormMonitor(every_n_steps=1)
    model.encoder.requires_grad_(False)
    quiet_trainer(callbacks=[monitor]).fit(model, Batches(as_inputs_and_targets(vector_batches(3, 2))))
    assert monitor.summary() == (
        "GradientNormMonitor: no step was measured: none of the losses has reached `encoder`, or all of it is frozen."
    )


def test_two_layers_are_monitored_side_by_side(quiet_trainer: MakeTrainer) -> None:
    deep = GradientNormMonitor(None, "encoder.0", every_n_steps=1)
    last = GradientNormMonitor(None, "encoder", every_n_steps=1, prefix="whole")
    trainer = quiet_trainer(callbacks=[deep, last], max_steps=2)
    trainer.fit(multi_task_module(), DataLoader(as_inputs_and_targets(vector_batches(T=3, count=2)), batch_size=None))
    assert deep.last is not None
    assert last.last is not None
    for name in deep.last:
        assert trainer.callback_metrics[f"monitor/norm/{name}"] == pytest.approx(deep.last[name])
        assert trainer.callback_metrics[f"whole/norm/{name}"] == pytest.approx(last.last[name])
        assert last.last[name] > deep.last[name]
