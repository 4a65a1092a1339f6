"""What weights the losses by a function of them: the callbacks' side of a `ScalarizationRule`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradnorm._messages import check
from lightning_gradnorm.callbacks.base import Balancing
from lightning_gradnorm.callbacks.recompute import SecondLook
from lightning_gradnorm.engine.ranks import common_seed, mean_losses
from lightning_gradnorm.engine.step_state import Window
from lightning_gradnorm.strategies.factory import instantiate
from lightning_gradnorm.strategies.scalarization import OptimizerFactory, ScalarizationRule
from lightning_gradnorm.strategies.snapshot import restore, state_of

Made = nn.Module | Callable[[int], nn.Module]
"""A module, or what makes one from the number of tasks."""


class OfLosses(Balancing[ScalarizationRule]):
    """Base of what weights the losses by a function of them, or not at all: `Scalarization`, and `Aggregation` on top of it.

    Args:
        tasks: as for `GradNorm`.
        scalarizer: what weights the losses, ``None`` for nothing.
        optimizer: makes the optimizer of the scalarizer's parameters.
        heads: task → dotted name of its head module.
        representation: dotted name of the module whose output the heads read.
    """

    _remembers: str | None = "its weights and all it has learnt"

    def __init__(
        self,
        tasks: Sequence[str] | Mapping[str, str] | None,
        scalarizer: Made | None,
        optimizer: OptimizerFactory,
        *,
        heads: Mapping[str, str] | None,
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
        if self._known.needs_losses_after_step:
            self._second_look = SecondLook(pl_module, asked_by=self._name)

    def _fresh(self, parameter: str, given: Made) -> nn.Module:
        """Return the module as it was when it was given, or make it."""
        made = instantiate(self._names, given, caller=f"{self._name}: {parameter}")
        if isinstance(given, nn.Module):
            if parameter in self._initial:
                restore(made, self._initial[parameter])
            else:
                self._initial[parameter] = state_of(made)
        return made

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
        self._to_look = rule.needs_losses_after_step
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
        self._known.discard_step()

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
            self._known.update_after_step(*mean_losses(self._names, here, self._known.loss_weights, trainer))

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
