"""Base of the balancing callbacks: maps the hooks of Lightning's Trainer to calls of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Generic, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import Self, override

from lightning_gradnorm.callbacks.copies import Copies
from lightning_gradnorm.callbacks.logging import is_logged_step, log_step_metrics
from lightning_gradnorm.callbacks.losses import LossSource, explain_errors
from lightning_gradnorm.callbacks.optimizer_steps import OptimizerSteps
from lightning_gradnorm.callbacks.packages import works_in_both_packages
from lightning_gradnorm.callbacks.trainer_loop import TrainerLoop
from lightning_gradnorm.callbacks.usage_checks import (
    UsageChecks,
    explain_lost_state,
    refuse_company,
    refuse_strategy,
)
from lightning_gradnorm.engine.argument_checks import check_heads, check_places
from lightning_gradnorm.engine.balanced import claim
from lightning_gradnorm.engine.engine import Engine
from lightning_gradnorm.engine.layers import ALL
from lightning_gradnorm.engine.measurement import AnyRule, Heads, Setting


@works_in_both_packages
class BalancingCallback(L.Callback, Generic[AnyRule]):
    """Plugs a balancing rule into any unchanged LightningModule.

    A strategy overrides `_build_rule` and, where it differs, `_load_rule`, `_step_metrics` and `_refuse_unsupported`. Lightning
    may restore a checkpoint before or after ``on_fit_start``, and also for validation: we keep its state until training starts.

    Args:
        tasks: keys of the mapping that ``training_step`` returns; or task → name under which the module logs its loss; or
            ``None`` for all tasks of a module that declares them (`MultiTaskModule`).
        losses_from: for models that return only their total loss. Dotted path to the module, method or function that returns
            the losses; ``tasks`` are keys, attributes or indices of its return value. Or task → path of what returns its loss.
        heads: task → dotted name of its head module; ``"auto"`` finds them in the first batch; ``None``: no heads.
        representation: dotted name of the module whose output the heads read.
        shared_layer: dotted name of the last shared layer, or of several layers; ``"all"``: all trained parameters.
        norm_of: where norms are taken, for rules that need them.
    """

    update_is_weighted_sum: ClassVar[bool] = True
    """Whether the network's gradient is a weighted sum of the task gradients."""
    _state_description: str | None = None
    """A description of what is lost if a checkpoint lacks it; ``None`` if nothing is."""

    def __init__(
        self,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        *,
        losses_from: str | Mapping[str, str] | None = None,
        heads: Heads = "auto",
        representation: str = "encoder",
        shared_layer: str | Sequence[str] | None = None,
        norm_of: Literal["weight", "activation"] = "weight",
    ) -> None:
        self.tasks = tasks
        self.losses_from = losses_from
        self.heads = dict(heads) if isinstance(heads, Mapping) else heads
        self.representation = representation
        self.shared_layer = shared_layer
        self.norm_of = norm_of
        self._source = LossSource(self._name, tasks, losses_from=losses_from)
        self._names = self._source.names
        check_heads(self.heads, self._names, caller=self._name)
        check_places(shared_layer, representation, norm_of, caller=self._name)
        self._usage = UsageChecks(self._source)
        self._rule: AnyRule | None = None
        self._engine: Engine[AnyRule] | None = None
        self._loop: TrainerLoop | None = None
        self._optimizers: OptimizerSteps | None = None
        self._hooks = ExitStack()
        self._recomputed: dict[str, list[Any]] | None = None
        """Collects the losses of a recomputation, which are not trained on."""
        self._with_gradients: list[bool] = []
        """For each call of `watch` in this batch, whether gradients were on. In a recomputation they never are."""
        self._shown = True
        self._described: str | None = None
        self._copies = Copies(self)
        self._restored: dict[str, Any] | None = None
        self._restored_by: str | None = None
        self._stage: str | None = None

    # ---- what a strategy overrides -----------------------------------------------------------------------------------

    def _build_rule(self, like: Tensor) -> AnyRule:
        """Return a new rule for ``self._names``, with the dtype and device of ``like``. Called when training starts."""
        raise NotImplementedError

    def _load_rule(self, rule: AnyRule, state: Mapping[str, Any]) -> None:
        """Load a checkpoint's state into a new rule."""
        rule.load_state_dict(state)

    def _step_metrics(self) -> Mapping[str, Tensor | float]:
        """Return what to log for the last optimizer step. Called in the steps that Lightning writes."""
        return {}

    def _refuse_unsupported(self, trainer: L.Trainer) -> None:
        """Raise ValueError if we cannot balance with this Trainer's settings. Called when training starts."""
        refuse_company(self, [one for one in trainer.callbacks if isinstance(one, BalancingCallback)])  # type: ignore[attr-defined]
        refuse_strategy(trainer.strategy, caller=self._name)

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def rule(self) -> AnyRule:
        """The rule in use.

        Raises:
            RuntimeError: no training has started.
        """
        if (rule := self._trained._rule) is None:
            raise RuntimeError(f"{self._name}: the rule exists only after training has started")
        return rule

    @property
    def _trained(self) -> Self:
        """The copy that was trained in place of this callback, or this callback."""
        return self._copies.trained or self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_engine": None, "_loop": None, "_optimizers": None, "_hooks": ExitStack()}

    def _results(self) -> dict[str, Any]:
        state, dtype = self.rule.state_dict(), self.rule.weights.dtype
        return {"names": self._names, "described": self._described, "state": state, "dtype": dtype}

    def _take_over(self, results: dict[str, Any]) -> None:
        self._names, self._described, self._restored = results["names"], results["described"], results["state"]
        self._start_rule(torch.zeros((), dtype=results["dtype"]))

    # ---- the start and the end ---------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._refuse_unsupported(trainer)
        self._remove_hooks()
        self._described = None
        self._copies.announce_training(trainer)
        self._loop = loop = TrainerLoop(trainer, self)
        declared = self._source.resolve(pl_module)
        self._names = self._source.names
        check_heads(self.heads, self._names, caller=self._name)
        self._usage = UsageChecks(self._source, loop.ranks)
        self._choose_state(loop)
        # Every rank joins in the sums over ranks, even one that never sees a loss, so all must agree on the dtype first.
        parameter = next((p for p in pl_module.parameters() if p.is_floating_point()), torch.zeros(()))
        self._start_rule(torch.zeros((), dtype=parameter.dtype, device=pl_module.device))
        heads = self.heads
        is_at_heads = heads == "auto" and self.shared_layer != ALL
        if is_at_heads and declared and len(set(map(pl_module.get_submodule, declared.values()))) == len(declared):
            heads = declared
        options = {"timeout": getattr(trainer.strategy, "_timeout", None)}  # yours, if you gave DDPStrategy one
        names, W, z = self._names, self.shared_layer, self.representation
        setting = Setting(self._name, pl_module, loop, names, W, heads, z, self.norm_of, options)
        with ExitStack() as hooks:  # if anything fails, everything placed so far is removed
            hooks.callback(claim(pl_module, caller=self._name, rule=type(self.rule).__name__))
            engine = Engine(self.rule, setting)
            hooks.callback(engine.close)
            hooks.callback(self._source.capture(pl_module, self._watch))
            optimizers = OptimizerSteps(loop, engine, self._usage, self._show_step)
            hooks.callback(optimizers.close)
            if engine.inspection.reads_gradients:
                hooks.callback(explain_errors(pl_module, engine.explain_inplace_error))
            self._engine, self._optimizers, self._hooks = engine, optimizers, hooks.pop_all()

    def _choose_state(self, loop: TrainerLoop) -> None:
        """Decide whether this training starts from the state of a checkpoint, of an earlier training, or from scratch."""
        trainer = loop.trainer
        if self._restored_by in ("validate", "test", "predict"):
            self._restored = None  # a checkpoint that was evaluated is not one to resume from
        if self._restored is None and (trainer.global_step == 0 or trainer.ckpt_path is not None):
            self._rule = None
            if trainer.global_step > 0 and self._state_description:
                loop.ranks.warn(explain_lost_state(self._name, self._state_description, trainer.ckpt_path))

    def _start_rule(self, like: Tensor) -> None:
        """Build the rule if none exists for these tasks, and move it to the device of ``like``."""
        state = self._restored
        known = state.get("tasks", ()) if state else () if self._rule is None else self._rule.tasks
        if set(known) == set(self._names):
            self._names = tuple(known)  # strategies may know tasks by position: keep the order they learned
        if self._rule is None or state is not None or self._rule.tasks != self._names:
            values = [like, *(state or {}).values()]
            is_double = any(isinstance(one, Tensor) and one.dtype == torch.float64 for one in values)
            rule = self._build_rule(like.double() if is_double else like.float())
            if state is not None:
                self._load_rule(rule, state)
            self._rule, self._restored = rule, None
        self._rule.to(dtype=torch.float64 if like.dtype == torch.float64 else None, device=like.device)

    def _remove_hooks(self) -> None:
        self._hooks.close()
        self._engine = self._loop = self._optimizers = None

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._usage.check_stepped(pl_module, is_over=True)
        self._remove_hooks()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove_hooks()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stage = stage

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stage = None
        self._remove_hooks()

    # ---- the losses --------------------------------------------------------------------------------------------------

    def watch(self, losses: Mapping[str, Tensor | None]) -> None:
        """Balance these losses in the backward pass that follows.

        Call it anywhere in the forward pass, with all losses or a few at a time, if ``training_step`` neither returns nor
        logs them. With manual optimization, call it before ``manual_backward``.

        Args:
            losses: task → loss of any shape. Pass the very tensors that make up the back-propagated loss. Several losses of one
                task are summed. Names that are not tasks are ignored; ``None``: the task is absent from this batch.

        Raises:
            TypeError, ValueError: a loss is not a tensor, or carries no gradient. A missing task raises an error in the
                backward pass or at the end of the batch.
        """
        if not isinstance(losses, Mapping):
            raise TypeError(f"{self._name}: watch takes a mapping from task to loss; got {type(losses).__name__}.")
        self._source.were_watched = True
        self._watch(losses)

    def _watch(self, losses: Mapping[str, Any]) -> None:
        if self._recomputed is not None:
            is_trained = self._with_gradients and self._with_gradients.pop(0)
            for task, loss in losses.items() if is_trained else ():
                self._recomputed.setdefault(task, []).append(loss)
        elif self._engine is None or self._loop is None:
            self._usage.on_idle_losses(losses)
        elif self._loop.is_training() and not self._engine.is_in_backward():
            self._with_gradients.append(torch.is_grad_enabled())
            self._engine.watch(self._usage.on_losses(losses))
            self._usage.seen |= set(self._engine.batch.losses)

    # ---- one batch ---------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._with_gradients.clear()
        if self._engine is not None and self._optimizers is not None:
            self._optimizers.update()
            self._usage.check_stepped(pl_module)
            self._engine.start_batch()

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self._engine is not None and self._loop is not None:
            self._usage.on_before_backward(pl_module, self._engine.batch)
            self._engine.before_backward(loss, is_whole_step=self._loop.steps_after_each_backward())

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._optimizers is not None:
            self._optimizers.after_backward()

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._optimizers is not None:
            self._optimizers.finish_step(optimizer, is_counted=True)

    def _show_step(self, trainer: L.Trainer) -> None:
        self._shown = False
        self._show_if_logged(trainer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if self._engine is None or self._optimizers is None:
            return
        self._optimizers.finish_if_moved()
        self._usage.on_batch_end(pl_module, self._engine.batch)
        has_stepped = bool(self._engine.batch.steps)  # then it has been shown, if Lightning writes this batch
        if not has_stepped and not (pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1):
            self._show_if_logged(trainer)
        self._engine.start_batch()
        if self._usage.seen and (plan := self._engine.inspection.news()) is not None:
            parts = filter(None, [plan, f"losses: {self._source}"])
            self._described = f"{self._name}: {', '.join(parts)}"
            rank_zero_info(self._described)

    def __repr__(self) -> str:
        return self._trained._described or f"{self._name}({', '.join(self._names) or 'all tasks of the module'})"

    def _show_if_logged(self, trainer: L.Trainer) -> None:
        if not self._shown and is_logged_step(trainer):
            log_step_metrics(trainer, self._step_metrics())
            self._shown = True

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._usage.on_epoch_end(pl_module, self._engine)

    # ---- state -------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        one = self._trained
        return one._rule.state_dict() if one._rule is not None and one._restored is None else one._restored or {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored, self._restored_by, self._copies.trained = dict(state_dict) or None, self._stage, None
        if self._engine is not None and self._rule is not None and self._restored is not None:
            # During training: a LearningRateFinder undoes its trial steps.
            self._load_rule(self._rule, self._restored)
            self._restored = None
            self._engine.start_step()
