"""`Aggregation` in mixed precision follows single precision, and an overflowing scale is not a failure of the aggregator."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torchjd.aggregation as jd
from aggregations import (
    NAMES,
    WITH_EVERYTHING,
    MakeTrainer,
    Weights,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from models import (
    Automatic,
    vector_batches,
)
from torch.utils.data import DataLoader

from lightning_gradnorm import Aggregation
from lightning_gradnorm.strategies import GABA


class Single(Automatic):
    """The test network in single precision."""

    def __init__(self) -> None:
        super().__init__(3)
        self.float()


SINGLE = [{name: value.float() for name, value in batch.items()} for batch in vector_batches(3, 30)]


def _in_precision(quiet_trainer: MakeTrainer, made: Any, callbacks: tuple[Any, ...] = (), **options: Any) -> Weights:
    torch.manual_seed(0)
    model = Single()
    at, with_heads = options.pop("at"), options.pop("with_heads")
    callback = Aggregation(made(), NAMES, heads=model.heads() if with_heads else None, at=at)
    noted = Steps(callback)
    quiet_trainer(callbacks=[*callbacks, callback, noted], **options).fit(model, DataLoader(SINGLE, batch_size=None))
    return noted


class Steps(Weights):
    """Notes the weights after every batch, also one whose step the scaler skips, and the encoder."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.weights.append(self.callback.weights)
        self.norms.append({"encoder": pl_module.encoder[0].weight.detach().clone()})  # type: ignore[dict-item]


def _scaled(scale: float = 2.0**12) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["16-mixed with a scaler", "bf16-mixed"])
@pytest.mark.parametrize(
    "made",
    [jd.UPGrad, *(pytest.param(m, marks=pytest.mark.slow) for m in (partial(jd.NashMTL, 3), partial(GABA, warmup=2)))],
)
@WITH_EVERYTHING
@pytest.mark.filterwarnings("ignore:You are solving")
def test_mixed_precision_follows_single_precision(
    quiet_trainer: MakeTrainer, made: Any, at: str, with_heads: bool, precision: str
) -> None:
    options = {"plugins": [_scaled()]} if "scaler" in precision else {"precision": "bf16-mixed"}
    single = _in_precision(quiet_trainer, made, at=at, with_heads=with_heads)
    mixed = _in_precision(quiet_trainer, made, at=at, with_heads=with_heads, **options)
    assert mixed.callback.rule.fallbacks == 0
    tolerance = 0.03 if "scaler" in precision else 0.15
    difference = mixed.norms[-1]["encoder"] - single.norms[-1]["encoder"]
    moved = single.norms[-1]["encoder"] - single.norms[0]["encoder"]
    assert difference.norm() <= tolerance * moved.norm()


@WITH_EVERYTHING
@pytest.mark.parametrize("made", [partial(GABA, warmup=0, beta=0.5), pytest.param(jd.GradDrop, marks=pytest.mark.slow)])
def test_a_step_that_the_scaler_skips_leaves_the_network_and_is_no_fallback(
    quiet_trainer: MakeTrainer, made: Any, at: str, with_heads: bool
) -> None:
    skipped = {3, 7, 8}

    class Overflows(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx in skipped:
                pl_module.seg_head.weight.grad[0, 0] = torch.inf

    options = {"at": at, "with_heads": with_heads, "plugins": [_scaled()]}
    noted = _in_precision(quiet_trainer, made, (Overflows(),), **options)
    moved = [not torch.equal(a["encoder"], b["encoder"]) for a, b in zip(noted.norms, noted.norms[1:], strict=False)]
    assert [step + 1 for step, has_moved in enumerate(moved) if not has_moved] == sorted(skipped)
    assert noted.callback.rule.fallbacks == 0
    assert noted.norms[-1]["encoder"].isfinite().all()


@WITH_EVERYTHING
def test_a_scale_that_overflows_by_itself_is_lowered_and_is_no_fallback(
    quiet_trainer: MakeTrainer, at: str, with_heads: bool
) -> None:
    noted = _in_precision(quiet_trainer, jd.UPGrad, at=at, with_heads=with_heads, plugins=[_scaled(2.0**22)])
    moved = [not torch.equal(a["encoder"], b["encoder"]) for a, b in zip(noted.norms, noted.norms[1:], strict=False)]
    assert not moved[0]
    assert all(moved[10:])
    assert noted.callback.rule.fallbacks == 0
    assert noted.norms[-1]["encoder"].isfinite().all()
