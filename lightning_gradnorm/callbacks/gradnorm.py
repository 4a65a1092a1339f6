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
    """Give every task's gradient at the last shared layer the size that its training rate deserves.

    Chen et al., *GradNorm*, ICML 2018 (arXiv 1711.02257), Algorithm 1; the math is in `strategies.gradnorm`. The model is
    used as it is; its own ``loss`` stays what is logged. With ``heads`` the task gradients are read out of the one
    ordinary backward pass; without, by one first-order pass through each head.

    Weights, ``L_i(0)``, the weight optimizer and the counters are part of the checkpoint: a resumed run goes on as if it had
    not stopped. A training that begins at step 0 without a checkpoint begins with new weights, also if this object was
    used before.

    Args:
        tasks: keys of the mapping that ``training_step`` returns; or ``{"seg": "train/seg_loss", …}``, names under which
            the module logs its losses; or ``None`` for all tasks of a `MultiTaskModule`. A module with manual optimization
            calls `watch` before ``manual_backward``.
        shared_layer: dotted name of the last shared layer ``W``: a module (its ``weight``; all its parameters if it has
            none; the last trained weight inside it if it contains modules) or a parameter. ``None``: the deepest trained weight
            that all losses of the first batch depend on. As long as it is frozen, the weights wait. A list of names:
            several layers together. ``"all"``: all trained parameters, as for composite losses without heads; the gradients
            are then read at the losses.
        heads: task → dotted name of its head module; ``"auto"`` finds them in the first batch. ``None``: one first-order pass
            from each loss to ``W`` instead. All give the same numbers.
        losses_from: for models that return their total only. Dotted path to what returns the losses, a module, a method or a
            function: ``"module.loss"``. The tasks are looked up in what it returns, by key, attribute or index:
            ``tasks={"recon": "reconstruction_loss", "kl": "extra.kl"}``; ``"T.0"`` is the first column of a matrix.
            Or task → path of what returns its loss.
        alpha: the asymmetry: how strongly tasks are pulled to a common training rate. 0 asks for equal gradient norms; a
            task whose loss vanishes, and with it its gradient, then gets nearly all of the weight.
        optimizer: makes the optimizer of the weights from a list of parameters.
        initial_losses: ``L_i(0)``: the mean over so many of the first weight updates; or numbers by task, for some or all. The
            others' is their first loss. As long as a task's loss is 0 from the start, no update is made.
        initial_weights: by task, positive; scaled to sum T.
        priorities: by task, positive; an intended ratio of the gradient norms: ``target_i = Ḡ · p_i · r_i^alpha``.
        update_every: update the weights in every so many optimizer steps; no gradients are read in the others.
        stop_after: leave the weights as they are after so many optimizer steps.
        norm_of: ``"weight"``: norms of gradients of ``W``, the paper's. ``"activation"``: of gradients at the
            representation, which needs no product with the last layer; another algorithm, and cheaper.
        min_weight: no weight falls below it (before they are scaled to sum T again).
        representation: for ``norm_of="activation"``, the module whose output the heads read.
        absent_tasks: what a task does in updates from which it is absent. ``"leave_out"``: it keeps its weight and takes no
            part in the means. ``"last_seen"``: it takes part with the norm and the loss it last had, as soon as it has had
            some: for training on one task after the other. Those are part of the checkpoint.
        weight_space: ``"linear"``: the weights' optimizer steps on ``w``, as in the paper. ``"log"``: on ``log w``, so that
            weights of 0.001 and of 1 move by the same factor, for losses on very different scales. Ours.
        smoothing: β of bias-corrected moving averages that take the place of the norms and the losses, for noisy training
            rates; 0, the paper's, for none. Ours. They are part of the checkpoint.
        resume_options: which are in force where the options of a checkpoint differ from these: ``"checkpoint"``, or
            ``"given"``. A checkpoint has ``initial_losses``, ``initial_weights`` and the options of ``optimizer``; all others
            are always the given ones. Each difference is warned of.
        on_task_mismatch: what to do with a checkpoint that is of other tasks: ``"error"``; or ``"adapt"``: keep what is known
            of a task by its name, give new ones the mean of the known weights, and scale to sum T.

    Raises:
        ValueError: an argument out of range; and at the start of training, a layer or a task that the model lacks.

    Logs, in the steps that Lightning writes (``log_every_n_steps``) and at the end of each epoch:
    ``gradnorm/weight/<task>``; of the last update ``gradnorm/grad_norm/<task>`` (G_i), ``gradnorm/rate/<task>`` (r_i),
    ``gradnorm/loss_ratio/<task>`` (L_i / L_i(0)) and ``gradnorm/loss`` (L_grad); and ``gradnorm/skipped``, the number of
    updates not made because a number was not finite. Also, as soon as there are some, ``gradnorm/without_gradient``, the
    updates in which a task's gradient was exactly 0, and ``gradnorm/dominated``, those in stretches of 100 in which one task
    held more than 90 % of the weight to no avail; these two are counted from the start of the training or its resumption.

    Example:
        >>> import lightning as L
        >>> from lightning_gradnorm import GradNorm
        >>> gradnorm = GradNorm(tasks=["seg", "depth"], shared_layer="encoder.4", alpha=1.5)
        >>> trainer = L.Trainer(callbacks=[gradnorm], logger=False)
        >>> gradnorm.weights
        {'seg': 1.0, 'depth': 1.0}
    """

    _state_description = "its weights and L_i(0)"

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
                f"GradNorm: the checkpoint is of tasks {sorted(known)}: {sorted(tasks - known) or 'no task'} is new and begins "
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
