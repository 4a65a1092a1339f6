"""Scalarizations as a Lightning callback, and the base of all callbacks whose rule sees the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradnorm._messages import check
from lightning_gradnorm.callbacks.base import BalancingCallback
from lightning_gradnorm.callbacks.recompute import LossRecomputer
from lightning_gradnorm.engine.measurement import Heads
from lightning_gradnorm.engine.ranks import Ranks
from lightning_gradnorm.strategies.factory import instantiate
from lightning_gradnorm.strategies.scalarization import OptimizerFactory, ScalarizationRule
from lightning_gradnorm.strategies.snapshot import load_snapshot, snapshot
from lightning_gradnorm.strategies.weight_optimizer import adam

Made = nn.Module | Callable[[int], nn.Module]
"""A module, or a function that makes one from the number of tasks."""

AnyLossRule = TypeVar("AnyLossRule", bound=ScalarizationRule)


class LossWeightingCallback(BalancingCallback[AnyLossRule]):
    """Base of the callbacks whose rule may weight the losses by a function of them: `Scalarization` and `Aggregation`."""

    _state_description: str | None = "its weights and all it has learned"

    def __init__(
        self,
        tasks: Sequence[str] | Mapping[str, str] | None,
        scalarizer: Made | None,
        optimizer: OptimizerFactory,
        *,
        losses_from: str | Mapping[str, str] | None,
        heads: Heads,
        representation: str = "encoder",
    ) -> None:
        super().__init__(tasks, losses_from=losses_from, heads=heads, representation=representation)
        is_factory = callable(optimizer)
        check(self._name, is_factory, "optimizer", "a callable such as partial(torch.optim.Adam, lr=0.025)", optimizer)
        self._scalarizer = scalarizer
        self.optimizer = optimizer
        self._pristine: dict[str, dict[str, Any]] = {}
        self._recomputer: LossRecomputer | None = None

    @property
    def weights(self) -> dict[str, float]:
        """The latest weights by task; empty before training, and for a strategy without weights."""
        rule = self._trained._rule
        return (
            dict(zip(rule.tasks, rule.weights.tolist(), strict=True)) if rule is not None and rule.has_weights else {}
        )

    @property
    def scalarizer(self) -> nn.Module | None:
        """The scalarizer in use."""
        if (rule := self._trained._rule) is not None:
            return rule.scalarizer
        return self._scalarizer if isinstance(self._scalarizer, nn.Module) else None

    def _check_module(self, parameter: str, given: Any) -> None:
        if not (isinstance(given, nn.Module) or callable(given)):
            raise TypeError(
                f"{self._name}: {parameter} should be a module, or make one from the number of tasks; got {given!r}"
            )

    def _pristine_copy(self, parameter: str, given: Made) -> nn.Module:
        """Return the module in the state in which you passed it, or make it."""
        made = instantiate(self._names, given, caller=f"{self._name}: {parameter}")
        if isinstance(given, nn.Module):
            if parameter in self._pristine:
                load_snapshot(made, self._pristine[parameter])
            else:
                self._pristine[parameter] = snapshot(made)
        return made

    def _rule_options(self, like: Tensor) -> dict[str, Any]:
        """Return the arguments that all rules take. All ranks draw the same random numbers."""
        seed = Ranks.current().broadcast_object(torch.initial_seed() % 2**62)
        return {"optimizer": self.optimizer, "seed": seed, "dtype": like.dtype, "device": like.device}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.rule.needs_losses_after_step:
            self._recomputer = LossRecomputer(pl_module, caller=self._name, strategy=self.rule.kind)

    @override
    def _step_metrics(self) -> dict[str, Tensor | float]:
        rule = self.rule
        shown: dict[str, Tensor | float] = {"balancing/fallbacks": float(rule.fallbacks)}
        if rule.has_weights:
            weights = rule.weights.clone()
            shown |= {f"balancing/weight/{task}": w for task, w in zip(self._names, weights, strict=True)}
        return shown

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        super().on_train_batch_start(trainer, pl_module)
        if self._engine is not None:
            self.rule.begin_epoch(trainer.current_epoch)
        if self._recomputer is not None:
            self._recomputer.record_random_state()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        engine = self._engine
        took_step = engine is not None and engine.batch.steps > 0 and engine.step_was_taken
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if took_step and self._recomputer is not None and engine is not None:
            self._recomputed = {}
            try:
                found = (
                    self._recomputer.losses(trainer, batch, batch_idx, self._source.logged_names) or self._recomputed
                )
            finally:
                self._recomputed = None
            engine.measurement.update_after_step(found)

    @override
    def _remove_hooks(self) -> None:
        super()._remove_hooks()
        self._recomputer = None


class Scalarization(LossWeightingCallback[ScalarizationRule]):
    """Train on any function of the losses: each task's gradient is weighted by the function's derivative at its loss.

    The weights come from the losses of the same batch, averaged over the ranks. With accumulation, each batch is
    scalarized by itself. The loss that the model returns and logs does not change.

    Args:
        scalarizer: a `torchjd.scalarization` object, or any ``nn.Module`` from the losses, shape (T,), in the order of
            ``tasks``, to a scalar; or a function that makes one from the number of tasks, as ``torchjd.scalarization.UW``
            does. Its parameters are learned. We also call what else it needs: `DWA` is notified of each epoch's end, and `FAMO`
            gets the losses of the same batch after the step. For this, ``training_step`` runs once more, without backward and
            without a trace in metrics, logs, statistics or random numbers, as long as it does not modify its batch.
        tasks: as for `GradNorm`.
        losses_from: as for `GradNorm`.
        heads: accepted by every strategy, so that you can swap one for another; no gradient is read.
        optimizer: builds the optimizer of the scalarizer's parameters; the default is GradNorm's.

    A task that is absent from a batch enters with its last loss; until every task has been seen, all weights are 1. If a loss
    or a derivative is not finite, all tasks get equal weights in that step; we count this and warn once. A scalarizer that
    draws random numbers (`Random`) has its own, the same on all ranks.

    Raises:
        ValueError: at the start of training, the scalarizer cannot be called with T losses, or does not return a scalar that
            is finite for losses of 1.

    Logs ``balancing/weight/<task>`` and ``balancing/fallbacks``.

    Example:
        >>> import lightning as L
        >>> from torchjd.scalarization import UW
        >>> from lightning_gradnorm import Scalarization
        >>> trainer = L.Trainer(callbacks=[Scalarization(UW, tasks=["seg", "depth"])], logger=False)
    """

    def __init__(
        self,
        scalarizer: Made,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        *,
        losses_from: str | Mapping[str, str] | None = None,
        heads: Heads = "auto",
        optimizer: OptimizerFactory = adam,
    ) -> None:
        super().__init__(tasks, scalarizer, optimizer, losses_from=losses_from, heads=heads)
        self._check_module("scalarizer", scalarizer)

    @override
    def _build_rule(self, like: Tensor) -> ScalarizationRule:
        assert self._scalarizer is not None
        scalarizer = self._pristine_copy("scalarizer", self._scalarizer)
        return ScalarizationRule(self._names, scalarizer, **self._rule_options(like))
