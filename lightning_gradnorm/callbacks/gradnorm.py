"""GradNorm as a Lightning callback."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from lightning_gradnorm._messages import check
from lightning_gradnorm.callbacks.norms import NormCallback
from lightning_gradnorm.engine.measurement import Heads
from lightning_gradnorm.engine.ranks import Ranks
from lightning_gradnorm.strategies.gradnorm import GradNormRule
from lightning_gradnorm.strategies.gradnorm_arguments import check_arguments
from lightning_gradnorm.strategies.resuming import ResumeOptions
from lightning_gradnorm.strategies.weight_optimizer import WeightOptimizerFactory, adam

_check = partial(check, "GradNorm")
_RULE_OPTIONS = tuple(
    name for name in inspect.signature(GradNormRule).parameters if name not in ("tasks", "dtype", "device", "caller")
)


class GradNorm(NormCallback[GradNormRule]):
    """Scale every task's gradient at the last shared layer so that all tasks train at similar rates.

    Chen et al., *GradNorm*, ICML 2018 (arXiv 1711.02257), Algorithm 1; the math is in `strategies.gradnorm`. Your model stays
    unchanged, and its own ``loss`` is still the one that is logged. With ``heads``, the task gradients are read during the one
    ordinary backward pass. Without heads, each task takes one first-order pass through its head.

    The checkpoint holds the weights, ``L_i(0)``, the state of the weight optimizer and the counters: a resumed run continues
    as if it had never stopped. A training that starts at step 0 without a checkpoint starts with new weights, even if you
    reuse this object.

    Args:
        tasks: keys of the mapping that ``training_step`` returns; or ``{"seg": "train/seg_loss", …}``, names under which
            the module logs its losses; or ``None`` for all tasks of a `MultiTaskModule`. A module with manual optimization
            calls `watch` before ``manual_backward``.
        shared_layer: dotted name of the last shared layer ``W``: a parameter, or a module (its ``weight``; all its parameters
            if it has none; the last trained weight inside it if it contains modules). ``None``: the deepest trained weight
            that all losses of the first batch depend on. The weights do not move while this layer is frozen. A list of names:
            several layers together. ``"all"``: all trained parameters, as for composite losses without heads; the gradients
            are then read at the losses.
        heads: task → dotted name of its head module; ``"auto"`` finds them in the first batch. ``None``: one first-order pass
            from each loss to ``W`` instead. All give the same numbers.
        losses_from: for models that return only their total loss. Dotted path to the module, method or function that returns
            the losses, such as ``"module.loss"``. The tasks are looked up in its return value, by key, attribute or index:
            ``tasks={"recon": "reconstruction_loss", "kl": "extra.kl"}``; ``"T.0"`` is the first column of a matrix.
            Or task → path of what returns its loss.
        alpha: the asymmetry: how strongly tasks are pulled to a common training rate. 0 means equal gradient norms; a task
            whose loss and gradient vanish then gets nearly all of the weight.
        optimizer: builds the optimizer of the weights from a list of parameters.
        initial_losses: ``L_i(0)``: an integer N for the mean over the first N weight updates; or numbers by task, for some or
            all. The other tasks use their first loss. No update is made while a task's loss is 0 from the start.
        initial_weights: by task, positive; scaled to sum T.
        priorities: by task, positive; an intended ratio of the gradient norms: ``target_i = Ḡ · p_i · r_i^alpha``.
        update_every: update the weights every N optimizer steps; no gradients are read in the other steps.
        stop_after: freeze the weights after N optimizer steps.
        norm_of: ``"weight"``: norms of gradients of ``W``, as in the paper. ``"activation"``: of gradients at the
            representation. This skips the product with the last layer: a different, cheaper algorithm.
        min_weight: lower bound of each weight (before they are scaled to sum T again).
        representation: for ``norm_of="activation"``, the module whose output the heads read.
        absent_tasks: how to treat a task in updates from which it is absent. ``"leave_out"``: it keeps its weight and does not
            count in the means. ``"last_seen"``: it counts with its last norm and loss, once it has some; use this to train
            one task after the other. The last values are part of the checkpoint.
        weight_space: ``"linear"``: the weight optimizer steps on ``w``, as in the paper. ``"log"``: it steps on ``log w``, so
            weights of 0.001 and of 1 move by the same factor; for losses on very different scales. Not in the paper.
        smoothing: β of bias-corrected moving averages that replace the norms and the losses, for noisy training rates. 0, as
            in the paper, turns them off. Not in the paper; the averages are part of the checkpoint.
        resume_options: which options apply if a checkpoint's differ from these: ``"checkpoint"`` or ``"given"``. A checkpoint
            holds ``initial_losses``, ``initial_weights`` and the options of ``optimizer``; all others always come from here.
            Each difference gives a warning.
        on_task_mismatch: what to do with a checkpoint of other tasks: ``"error"``; or ``"adapt"``: keep the state of each task
            with a known name, give new tasks the mean of the known weights, and scale to sum T.

    Raises:
        ValueError: an argument is out of range; or, at the start of training, the model lacks a layer or a task.

    Logs, in the steps that Lightning writes (``log_every_n_steps``) and at the end of each epoch:
    ``gradnorm/weight/<task>``; from the last update ``gradnorm/grad_norm/<task>`` (G_i), ``gradnorm/rate/<task>`` (r_i),
    ``gradnorm/loss_ratio/<task>`` (L_i / L_i(0)) and ``gradnorm/loss`` (L_grad); and ``gradnorm/skipped``, the number of
    updates skipped because a number was not finite. Two more counts appear once they are not 0: ``gradnorm/without_gradient``,
    updates in which a task's gradient was exactly 0, and ``gradnorm/dominated``, updates in stretches of 100 in which one task
    held more than 90 % of the weight without success. These two restart with the training or its resumption.

    Example:
        >>> import lightning as L
        >>> from lightning_gradnorm import GradNorm
        >>> gradnorm = GradNorm(tasks=["seg", "depth"], shared_layer="encoder.4", alpha=1.5)
        >>> trainer = L.Trainer(callbacks=[gradnorm], logger=False)
        >>> gradnorm.weights
        {'seg': 1.0, 'depth': 1.0}
    """

    _state_description = "its weights and initial losses"

    def __init__(
        self,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        *,
        shared_layer: str | Sequence[str] | None = None,
        heads: Heads = "auto",
        losses_from: str | Mapping[str, str] | None = None,
        alpha: float = 1.5,
        optimizer: WeightOptimizerFactory = adam,
        initial_losses: int | Mapping[str, float] = 1,
        initial_weights: Mapping[str, float] | None = None,
        priorities: Mapping[str, float] | None = None,
        update_every: int = 1,
        stop_after: int | None = None,
        norm_of: Literal["weight", "activation"] = "weight",
        min_weight: float = 1e-4,
        representation: str = "encoder",
        absent_tasks: Literal["leave_out", "last_seen"] = "leave_out",
        weight_space: Literal["linear", "log"] = "linear",
        smoothing: float = 0.0,
        on_task_mismatch: Literal["error", "adapt"] = "error",
        resume_options: ResumeOptions = "checkpoint",
    ) -> None:
        super().__init__(
            tasks,
            losses_from=losses_from,
            heads=heads,
            representation=representation,
            shared_layer=shared_layer,
            norm_of=norm_of,
        )
        adapts = on_task_mismatch in ("error", "adapt")
        _check(adapts, "on_task_mismatch", "'error' or 'adapt'", on_task_mismatch)
        self.alpha = alpha
        self.optimizer = optimizer
        self.initial_losses = initial_losses
        self.initial_weights = initial_weights
        self.priorities = priorities
        self.update_every = update_every
        self.stop_after = stop_after
        self.min_weight = min_weight
        self.absent_tasks = absent_tasks
        self.weight_space = weight_space
        self.smoothing = smoothing
        self.resume_options = resume_options
        self.on_task_mismatch = on_task_mismatch
        check_arguments(self._name, self._names or None, self._rule_options())

    def _rule_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _RULE_OPTIONS}

    @override
    def _build_rule(self, like: Tensor) -> GradNormRule:
        return GradNormRule(
            self._names, caller=self._name, dtype=like.dtype, device=like.device, **self._rule_options()
        )

    @override
    def _load_rule(self, rule: GradNormRule, state: Mapping[str, Any]) -> None:
        adapts, known, tasks = self.on_task_mismatch == "adapt", set(state["tasks"]), set(self._names)
        if adapts and known != tasks:
            Ranks.current().warn(
                f"GradNorm: the checkpoint has tasks {sorted(known)}: {sorted(tasks - known) or 'no task'} is new and starts "
                f"with their mean weight, {sorted(known - tasks) or 'no task'} is gone; the weights are scaled to sum "
                f"{len(tasks)}."
            )
        rule.load_state_dict(state, adapt=adapts)

    @override
    def _step_metrics(self) -> dict[str, Tensor | float]:
        rule = self.rule
        if self._engine is not None:
            self._engine.measurement.warn()
        by_task = {"weight": rule.loss_weights.clone()}
        shown: dict[str, Tensor | float] = {"gradnorm/skipped": float(rule.skipped)}
        rare = {
            "without_gradient": rule.outcomes.zero_gradients.updates,
            "dominated": rule.outcomes.domination.updates,
        }
        shown |= {f"gradnorm/{what}": float(count) for what, count in rare.items() if count}
        if rule.last is not None and (terms := rule.last.terms):
            shown["gradnorm/loss"] = terms.loss
            by_task["grad_norm"], by_task["rate"] = terms.grad_norms, terms.rates
            by_task["loss_ratio"] = terms.ratios
        for what, values in by_task.items():
            shown |= self._named(f"gradnorm/{what}", values)
        return shown
