"""Any scalarization of the losses as a Lightning callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradnorm.arguments import check
from lightning_gradnorm.balancing.making import made_for
from lightning_gradnorm.balancing.scalarization import OptimizerFactory, ScalarizationRule
from lightning_gradnorm.balancing.state import restore, state_of
from lightning_gradnorm.callbacks.agreement import common_seed, mean_losses
from lightning_gradnorm.callbacks.balancing import Balancing
from lightning_gradnorm.callbacks.second_look import SecondLook
from lightning_gradnorm.callbacks.step import Window

Made = nn.Module | Callable[[int], nn.Module]
"""A module, or what makes one from the number of tasks."""


class Scalarization(Balancing[ScalarizationRule]):
    """Train on any function of the losses: each task's gradient is weighted by the function's derivative at its loss.

    The weights are those of the losses of the very batch, averaged over the ranks. With accumulation each batch is
    scalarized by itself. The loss that the model returns and logs stays its own.

    Args:
        scalarizer: a `torchjd.scalarization` object, or any ``nn.Module`` from the losses, shape (T,), in the order of
            ``tasks``, to a scalar; or what makes one from the number of tasks, as ``torchjd.scalarization.UW`` does. Its
            parameters are learnt. What it does besides is called for: `DWA` hears of each epoch's end, `FAMO` gets the losses
            of the same batch after the step: ``training_step`` is called once more, without gradients and without a trace in
            metrics, logs, statistics or random numbers, as long as it leaves its batch as it is.
        tasks: as for `GradNorm`.
        heads: taken as by every strategy, so that one can be exchanged for another; no gradient is read.
        optimizer: makes the optimizer of the scalarizer's parameters; the default is GradNorm's.

    A task that is absent from a batch enters with its last loss; until each has been seen, all are weighted 1. Where a loss
    or a derivative is not finite, all tasks are weighted alike in that step, which is counted and warned of once. Random
    numbers of the scalarizer (`Random`) are its own, the same on all ranks.

    Raises:
        ValueError: at the start of training, if the scalarizer cannot be called with T losses, returns no scalar, or one that
            is not finite for losses of 1.

    Logs ``balancing/weight/<task>`` and ``balancing/fallbacks``.

    Example:
        >>> import lightning as L
        >>> from torchjd.scalarization import UW
        >>> from lightning_gradnorm import Scalarization
        >>> trainer = L.Trainer(callbacks=[Scalarization(UW, tasks=["seg", "depth"])], logger=False)
    """

    _remembers: str | None = "its weights and all it has learnt"

    def __init__(
        self,
        scalarizer: Made,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        *,
        heads: Mapping[str, str] | None = None,
        optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=0.025),
    ) -> None:
        self._set_up(scalarizer, tasks, heads=heads, optimizer=optimizer, representation="encoder")
        check_made(self._name, "scalarizer", scalarizer)

    def _set_up(
        self,
        scalarizer: Made | None,
        tasks: Sequence[str] | Mapping[str, str] | None,
        *,
        heads: Mapping[str, str] | None,
        optimizer: OptimizerFactory,
        representation: str,
    ) -> None:
        super().__init__(tasks, heads=heads, representation=representation)
        made = callable(optimizer)
        check(self._name, made, "optimizer", "a callable such as partial(torch.optim.Adam, lr=0.025)", optimizer)
        self._scalarizer = scalarizer
        self.optimizer = optimizer
        self._initial: dict[str, dict[str, Any]] = {}
        self._seed = 0
        self._second_look: SecondLook | None = None
        self._to_look = False
        self._fallbacks_before = 0
        self._has_warned = False

    # ---- what the user reads -----------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, float]:
        """The weights that were last in force, by task; none before training, and none of a strategy that has none."""
        if self._rule is None or not self._rule.has_weights:
            return {}
        return dict(zip(self._rule.tasks, self._rule.weights.tolist(), strict=True))

    @property
    def scalarizer(self) -> nn.Module | None:
        """The scalarizer at work."""
        if self._rule is not None:
            return self._rule.scalarizer
        return self._scalarizer if isinstance(self._scalarizer, nn.Module) else None

    # ---- the rule ----------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seed = common_seed(trainer)
        super().on_train_start(trainer, pl_module)
        if self._known.looks_again:
            self._second_look = SecondLook(pl_module, asked_by=self._name)

    def _fresh(self, parameter: str, given: Made) -> nn.Module:
        """Return the module as it was when it was given, or make it."""
        made = made_for(self._names, given, asked_by=f"{self._name}: {parameter}")
        if isinstance(given, nn.Module):
            if parameter in self._initial:
                restore(made, self._initial[parameter])
            else:
                self._initial[parameter] = state_of(made)
        return made

    @override
    def _new_rule(self, like: Tensor) -> ScalarizationRule:
        assert self._scalarizer is not None
        return ScalarizationRule(
            self._names,
            self._fresh("scalarizer", self._scalarizer),
            optimizer=self.optimizer,
            seed=self._seed,
            dtype=torch.float64 if like.dtype == torch.float64 else torch.float32,
            device=like.device,
        )

    @override
    def _prepare(self, like: Tensor) -> None:
        known = self._restored["tasks"] if self._restored else () if self._rule is None else self._rule.tasks
        if set(known) == set(self._names):
            self._names = tuple(known)  # what goes by place is of the order in which it was learnt
        super()._prepare(like)

    @override
    def _load(self, rule: ScalarizationRule, state: Mapping[str, Any]) -> None:
        rule.load_state_dict(state)
        self._fallbacks_before = rule.fallbacks

    @override
    def _begin_anew(self) -> None:
        self._fallbacks_before, self._has_warned = 0, False

    # ---- the strategy's answers --------------------------------------------------------------------------------------

    @override
    def _weights_in_force(self) -> Tensor:
        return self._known.loss_weights

    @override
    def _weigh(self, trainer: L.Trainer, module: L.LightningModule, back_propagated: Tensor) -> None:
        rule = self._known
        if rule.scalarizer is None:
            return
        rule.begin_epoch(trainer.current_epoch)
        of_this = {task: losses for task, losses in self._pass.losses.items() if task not in self._pass.fired}
        if not of_this and trainer.world_size == 1:
            return
        losses, present = mean_losses(self._names, of_this, rule.loss_weights, trainer)
        if bool(present.any()):
            rule.weigh(losses, present)

    @override
    def _take_in(self, window: Window, trainer: L.Trainer, module: L.LightningModule) -> bool:
        rule = self._known
        self._to_look = rule.looks_again
        rule.step()
        if rule.fallbacks > self._fallbacks_before and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{self._name}: {self._what()} gave no usable weights ({rule.reason}); all tasks are weighted alike in this "
                f"step. Further such steps are counted in balancing/fallbacks."
            )
        self._fallbacks_before = rule.fallbacks
        return bool(window.losses)

    def _what(self) -> str:
        return type(self._known.scalarizer).__name__

    @override
    def _drop_step(self) -> None:
        self._known.drop()

    @override
    def _log(self, module: L.LightningModule) -> None:
        rule = self._known
        shown: dict[str, Tensor | float] = {"balancing/fallbacks": float(rule.fallbacks)}
        if rule.has_weights:
            weights = rule.weights.clone()
            shown |= {f"balancing/weight/{task}": w for task, w in zip(self._names, weights, strict=True)}
        module.log_dict(shown, on_step=True)

    # ---- the losses after the step -----------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._second_look is not None:
            self._second_look.begin_batch()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._to_look and self._second_look is not None:
            self._to_look = False
            found = self._second_look.losses(trainer, batch, batch_idx, self._logged_names)
            here = {task: [found[task]] for task in self._names if isinstance(found.get(task), Tensor)}
            self._known.look_again(*mean_losses(self._names, here, self._known.loss_weights, trainer))

    @override
    def _remove_hooks(self) -> None:
        super()._remove_hooks()
        self._second_look, self._to_look = None, False


def check_made(name: str, parameter: str, given: Any) -> None:
    """Refuse what is neither a module nor can make one."""
    if not (isinstance(given, nn.Module) or callable(given)):
        raise TypeError(
            f"{name}: {parameter} should be a module, or what makes one from the number of tasks; got {given!r}"
        )
