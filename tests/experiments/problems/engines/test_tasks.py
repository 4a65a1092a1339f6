"""The tasks of C-MAPSS in a `MultiTaskModule`: trained with every strategy of the comparison, evaluated, saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from harness import Batches
from torch import Tensor, nn
from torchjd.scalarization import DWA

from lightning_gradnorm import Aggregation, FixedWeights, GradNorm, MultiTaskModule, Scalarization
from lightning_gradnorm.experiments.problems.engines.losses import FailureBiasedMSE
from lightning_gradnorm.experiments.problems.engines.network import EngineEncoder
from lightning_gradnorm.experiments.problems.engines.tasks import engine_tasks
from lightning_gradnorm.strategies import AMNL, GABA, Uncertainty

Batch = tuple[Tensor, dict[str, Tensor]]
STRATEGIES: dict[str, Callable[[], L.Callback]] = {
    "fixed": lambda: FixedWeights({"rul": 1.0, "health": 1.0}),
    "uncertainty": lambda: Scalarization(Uncertainty(classification=["health"])),
    "dwa": lambda: Scalarization(DWA(temperature=2.0)),
    "gradnorm": lambda: GradNorm(),
    "amnl": lambda: Scalarization(AMNL()),
    "gaba": lambda: Aggregation(GABA(warmup=1), at="parameters"),
}


def module(weighted: bool = False) -> MultiTaskModule:
    torch.manual_seed(0)
    return MultiTaskModule(
        EngineEncoder(channels=(8, 16, 8), hidden=8, funnel=(16, 32)),
        engine_tasks(weighted=weighted),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
    )


def batches(count: int = 3, size: int = 16) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        life = 125 * torch.rand(size, 1, generator=generator)
        health = (life[:, 0] <= 80).long() + (life[:, 0] <= 30).long()
        made.append((torch.randn(size, 30, 14, generator=generator), {"rul": life, "health": health}))
    return made


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_of_the_comparison_trains_the_whole_network(
    strategy: str, quiet_trainer: Callable[..., L.Trainer]
) -> None:
    model, data = module(), batches()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = quiet_trainer(callbacks=[STRATEGIES[strategy]()])
    trainer.fit(model, Batches(data), Batches(data))
    left = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert left == []
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_metrics_match_their_definitions(quiet_trainer: Callable[..., L.Trainer]) -> None:
    model, data = module().eval(), batches()
    with torch.no_grad():
        predictions = model(torch.cat([windows for windows, _ in data]))
    lives = torch.cat([targets["rul"] for _, targets in data]).double()
    errors = (predictions["rul"].double() - lives).flatten().tolist()
    said = predictions["health"].argmax(dim=1).tolist()
    true = torch.cat([targets["health"] for _, targets in data]).tolist()
    pairs = list(zip(said, true, strict=True))
    f1 = []
    for kind in range(3):
        hits, named, there = (
            sum(pair == (kind, kind) for pair in pairs),
            said.count(kind),
            true.count(kind),
        )
        f1.append(2 * hits / (named + there))
    (tested,) = quiet_trainer().test(model, Batches(data), verbose=False)
    expected = {
        "test/rmse/rul": math.sqrt(sum(d * d for d in errors) / len(errors)),
        "test/mae/rul": sum(map(abs, errors)) / len(errors),
        "test/nasa_score/rul": sum(math.exp(-d / 13 if d < 0 else d / 10) - 1 for d in errors),
        "test/accuracy/health": sum(a == b for a, b in pairs) / len(pairs),
        "test/f1/health": sum(f1) / 3,
        "test/loss/rul": sum(d * d for d in errors) / len(errors),
    }
    assert {name: tested[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_weighted_loss_counts_a_failure_twice_and_a_new_engine_once() -> None:
    lives = torch.tensor([[0.0], [62.5], [125.0]])
    plain, weighted = (engine_tasks(weighted=weighted)["rul"].loss for weighted in (False, True))
    assert plain(lives + 3, lives).item() == pytest.approx(9)
    assert weighted(lives + 3, lives).item() == pytest.approx(9 * (2 + 1.5 + 1) / 3)  # not divided by the weights' sum
    scaled = engine_tasks(weighted=True, cap=200)["rul"].loss
    assert isinstance(scaled, FailureBiasedMSE)
    assert scaled(torch.tensor([103.0]), torch.tensor([100.0])).item() == pytest.approx(9 * 1.5)


def test_an_untrained_head_predicts_half_of_the_longest_life() -> None:
    for cap in (125.0, 200.0):
        said = engine_tasks(cap=cap)["rul"].head(torch.zeros(1, 32)).item()
        assert said == pytest.approx(cap / 2, abs=2)


def test_a_checkpoint_holds_the_network(quiet_trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    model, data = module(weighted=True), batches()
    trainer = quiet_trainer(callbacks=[GradNorm()])
    trainer.fit(model, Batches(data))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    (expected,) = trainer.test(model, Batches(data), verbose=False)
    loaded = MultiTaskModule.load_from_checkpoint(tmp_path / "model.ckpt")
    assert quiet_trainer().test(loaded, Batches(data), verbose=False) == [expected]


def test_more_classes_may_be_told_apart() -> None:
    assert engine_tasks(classes=5)["health"].head(torch.zeros(2, 32)).shape == (2, 5)
    assert isinstance(engine_tasks()["health"].loss, nn.CrossEntropyLoss)
