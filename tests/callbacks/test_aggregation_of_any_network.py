"""`Aggregation(at="parameters")` without a trunk, or with one that is called several times, agrees with brute force."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torchjd.aggregation as jd
from any_network import (
    NETWORKS,
    AnyNetwork,
    Autoencoder,
    Batch,
    HeatEquation,
    ThreeViews,
    WithDecay,
    difference,
    train_by_brute_force,
)
from harness import Batches, assert_clean, state_by_part, traces
from minima import exactly
from ranks import Run, assert_identical, train_each
from torch import Tensor, nn

from lightning_gradnorm import Aggregation, GradientNormMonitor

MakeTrainer = Callable[..., L.Trainer]
STEPS, TOLERANCE = 6, 1e-9
AGGREGATORS: dict[str, Callable[[], Any]] = {
    "UPGrad": jd.UPGrad,
    "MGDA": jd.MGDA,
    "ConFIG": jd.ConFIG,
    "TrimmedMean, which has no weights": partial(jd.TrimmedMean, trim_number=0),
}


def aggregation(network: type[AnyNetwork], made: Any = jd.UPGrad, **options: Any) -> Aggregation:
    return Aggregation(made(), tasks=list(network.tasks), at="parameters", **options)


def train(
    trainer: MakeTrainer, network: type[AnyNetwork], callback: Aggregation, batches: list[Batch], **options: Any
) -> AnyNetwork:
    model = network()
    before = traces(model)
    trainer(callbacks=[callback], **options).fit(model, Batches(batches))
    assert_clean(model, before)
    return model


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", None], ids=["found heads", "no heads"])
@pytest.mark.parametrize("made", AGGREGATORS.values(), ids=AGGREGATORS)
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_it_trains_as_by_brute_force(
    network: type[AnyNetwork], made: Any, heads: Any, quiet_trainer: MakeTrainer
) -> None:
    batches, twin = network.batches(STEPS), network()
    norms = train_by_brute_force(twin, batches, exactly(made()))
    model = train(quiet_trainer, network, callback := aggregation(network, made, heads=heads), batches)
    assert difference(model, twin) <= TOLERANCE
    shown = [float(model.trainer.callback_metrics[f"balancing/grad_norm/{task}"]) for task in network.tasks]
    assert shown == pytest.approx(norms[-1].tolist(), rel=1e-5)
    assert callback.rule.fallbacks == 0


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("missing", [None, "first", "later"])
@pytest.mark.parametrize("network", [WithDecay, ThreeViews, Autoencoder])
def test_it_does_so_with_accumulation_and_absent_tasks(
    network: type[AnyNetwork], missing: str | None, accumulate: int, quiet_trainer: MakeTrainer
) -> None:
    absent = {"first": range(2), "later": (2, 3, 6), None: ()}[missing]
    batches = network.batches(8, lacks=lambda i: network.tasks[1] if i in absent else None)
    twin = network()
    train_by_brute_force(twin, batches, jd.UPGrad(), accumulate)
    model = train(quiet_trainer, network, aggregation(network), batches, accumulate_grad_batches=accumulate)
    assert difference(model, twin) <= TOLERANCE


class ByHand(WithDecay):
    """With manual optimization: the gradients are complete after each backward pass, so that they can be clipped."""

    accumulate, clip = 1, 0.05

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.shown: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        losses, total = self(batch)
        self.trainer.callbacks[0].watch(losses)  # type: ignore[attr-defined]
        self.manual_backward(total / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            self.shown.append(nn.utils.clip_grad_norm_(self.parameters(), self.clip))
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize(
    "made", [jd.UPGrad, jd.NashMTL, jd.ConFIG], ids=["UPGrad", "NashMTL, which remembers", "ConFIG"]
)
def test_it_does_so_in_manual_optimization_and_with_clipping(
    made: Any, accumulate: int, quiet_trainer: MakeTrainer
) -> None:
    aggregator = partial(made, n_tasks=3) if made is jd.NashMTL else made
    batches, twin = WithDecay.batches(6), WithDecay()
    train_by_brute_force(twin, batches, exactly(aggregator()), accumulate, clip=ByHand.clip)
    model = ByHand()
    model.accumulate = accumulate
    quiet_trainer(callbacks=[aggregation(WithDecay, aggregator)]).fit(model, Batches(batches))
    assert min(map(float, model.shown)) > ByHand.clip
    assert difference(model, twin) <= TOLERANCE


class OneByOne(HeatEquation):
    """Manual optimization with a backward pass for each loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        losses, _ = self(batch)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for task, loss in losses.items():
            self.trainer.callbacks[0].watch({task: loss})  # type: ignore[attr-defined]
            self.manual_backward(loss)
        optimizer.step()


def test_losses_may_be_back_propagated_one_by_one(quiet_trainer: MakeTrainer) -> None:
    batches, twin = HeatEquation.batches(STEPS), HeatEquation()
    train_by_brute_force(twin, batches, jd.UPGrad())
    model = train(quiet_trainer, OneByOne, aggregation(OneByOne), batches)
    assert difference(model, twin) <= TOLERANCE


def _halve(gradient: Tensor) -> Tensor:
    return gradient / 2


def _mask(gradient: Tensor) -> Tensor:
    return torch.cat([0 * gradient[:1], gradient[1:]])


@pytest.mark.parametrize("network", [WithDecay, ThreeViews])
def test_parameter_hooks_change_the_rest_and_the_tasks_equally(
    network: type[AnyNetwork], quiet_trainer: MakeTrainer
) -> None:
    class Hooked(network):  # type: ignore[valid-type,misc]
        def build(self) -> None:
            super().build()
            layers = next(iter(self.children()))
            layers[0].weight.register_hook(_halve)
            layers[2].weight.register_hook(_mask)

    batches, twin, model = network.batches(STEPS), Hooked(), Hooked()
    train_by_brute_force(twin, batches, jd.UPGrad())  # torch.autograd.grad calls the hooks as well
    quiet_trainer(callbacks=[aggregation(Hooked)]).fit(model, Batches(batches))
    assert difference(model, twin) <= TOLERANCE


def test_beside_it_the_monitor_sees_the_tasks_own_gradients(quiet_trainer: MakeTrainer) -> None:
    batches, twin, model = WithDecay.batches(STEPS), WithDecay(), WithDecay()
    norms = train_by_brute_force(twin, batches, jd.UPGrad())
    monitor = GradientNormMonitor(list(WithDecay.tasks), every_n_steps=1)
    quiet_trainer(callbacks=[aggregation(WithDecay), monitor]).fit(model, Batches(batches))
    assert monitor.last is not None
    assert [monitor.last[task] for task in WithDecay.tasks] == pytest.approx(norms[-1].tolist(), rel=1e-9)
    assert difference(model, twin) <= TOLERANCE


# ---- on two ranks ----------------------------------------------------------------------------------------------------

ON_RANKS = {
    "UPGrad": (WithDecay, jd.UPGrad, 1),
    "UPGrad of three views": (ThreeViews, jd.UPGrad, 1),
    "UPGrad, accumulated": (WithDecay, jd.UPGrad, 2),
    "ConFIG": (HeatEquation, jd.ConFIG, 1),
    "TrimmedMean": (Autoencoder, partial(jd.TrimmedMean, trim_number=0), 2),
}


def test_two_ranks_match_one_process_on_the_joint_batches() -> None:
    runs, expected = {}, {}
    for name, (network, made, accumulate) in ON_RANKS.items():
        whole = network.batches(4, size=8)
        steps = [
            [
                [
                    {key: value.chunk(2 * accumulate)[2 * m + rank] for key, value in batch.items()}
                    for m in range(accumulate)
                ]
                for rank in range(2)
            ]
            for batch in whole
        ]
        runs[name] = Run(network(), aggregation(network, made), steps)
        train_by_brute_force(twin := network(), whole, made())
        expected[name] = twin
    for name, told in train_each(runs).items():
        assert not isinstance(told, str), f"{name}: {told}"
        assert_identical(told)
        state = state_by_part(expected[name])
        assert max(float((told[0].network[key] - value).abs().max()) for key, value in state.items()) <= TOLERANCE, name


# ---- what is refused -------------------------------------------------------------------------------------------------


class Apart(HeatEquation):
    """A network for each set of points."""

    def build(self) -> None:
        for task in self.tasks:
            setattr(self, task, nn.Linear(2, 1))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {task: self.get_submodule(task)(batch[task]).square().mean() for task in self.tasks}


class OneApart(HeatEquation):
    def build(self) -> None:
        super().build()
        self.own = nn.Linear(2, 1)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {**super().losses(batch), "initial": self.own(batch["initial"]).square().mean()}


class CheckpointedTwice(HeatEquation):
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        inputs = batch["boundary"].clone().requires_grad_()
        again = torch.utils.checkpoint.checkpoint(self.net, inputs, use_reentrant=True)
        return {**super().losses(batch), "boundary": again.square().mean()}


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Apart, ["the tasks ['interior', 'boundary', 'initial'] share no trained parameter", "in Apart", "Scalarization"]),
        (OneApart, ["task 'initial' shares no trained parameter with the others, ['interior', 'boundary']", "Leave it out"]),
        (CheckpointedTwice, ["task 'boundary' comes to an activation checkpoint", "use_reentrant=False", "'representation'"]),
    ],
)  # fmt: skip
def test_the_error_names_what_cannot_be_aggregated(
    network: type[AnyNetwork], says: list[str], quiet_trainer: MakeTrainer
) -> None:
    callback = aggregation(network)
    with pytest.raises(ValueError, match="Aggregation: at='parameters'") as caught:
        quiet_trainer(callbacks=[callback]).fit(network(), Batches(network.batches(2)))
    for words in says:
        assert words in str(caught.value)
