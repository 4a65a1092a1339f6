"""GradNorm as a Lightning callback."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradnorm._messages import check, check_positive_by_task, is_integer, is_number
from lightning_gradnorm.callbacks.base import Balancing
from lightning_gradnorm.engine.gathering import gather
from lightning_gradnorm.engine.layers import find_module, find_shared_layer
from lightning_gradnorm.engine.reader_choice import weight_readers
from lightning_gradnorm.engine.step_state import Window
from lightning_gradnorm.gradients import ActivationGradients, GradientReader, RowReader, WeightGradients
from lightning_gradnorm.strategies.gradnorm import GradNormRule
from lightning_gradnorm.strategies.weight_optimizer import WeightOptimizerFactory

_check = partial(check, "GradNorm")


class GradNorm(Balancing[GradNormRule]):
    """Give every task's gradient at the last shared layer the size that its training rate deserves.

    Chen et al., *GradNorm*, ICML 2018 (arXiv 1711.02257), Algorithm 1; the maths is in `balancing.gradnorm`. The model is
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
            none) or a parameter. ``None``: the last module with a weight of two or more dimensions inside ``encoder``.
        heads: task → dotted name of its head module.
        alpha: the asymmetry: how strongly tasks are pulled to a common training rate. 0 asks for equal gradient norms.
        optimizer: makes the optimizer of the weights from a list of parameters.
        initial_losses: ``L_i(0)``: the mean over so many of the first weight updates, or numbers by task.
        initial_weights: by task, positive; scaled to sum T.
        priorities: by task, positive; an intended ratio of the gradient norms: ``target_i = Ḡ · p_i · r_i^alpha``.
        update_every: update the weights in every so many optimizer steps; no gradients are read in the others.
        stop_after: leave the weights as they are after so many optimizer steps.
        norm_of: ``"weight"``: norms of gradients of ``W``, the paper's. ``"activation"``: of gradients at the
            representation, which needs no product with the last layer; another algorithm, and cheaper.
        min_weight: no weight falls below it (before they are scaled to sum T again).
        representation: for ``norm_of="activation"``, the module whose output the heads read.
        on_task_mismatch: what to do with a checkpoint that is of other tasks: ``"error"``; or ``"adapt"``: keep what is known
            of a task by its name, give new ones the mean of the known weights, and scale to sum T.

    Raises:
        ValueError: an argument out of range; and at the start of training, a layer or a task that the model lacks.

    Logs, in the steps that Lightning writes (``log_every_n_steps``) and at the end of each epoch:
    ``gradnorm/weight/<task>``; of the last update ``gradnorm/grad_norm/<task>`` (G_i), ``gradnorm/rate/<task>`` (r_i),
    ``gradnorm/loss_ratio/<task>`` (L_i / L_i(0)) and ``gradnorm/loss`` (L_grad); and ``gradnorm/skipped``, the number of
    updates not made because a number was not finite.

    Example:
        >>> import lightning as L
        >>> from lightning_gradnorm import GradNorm
        >>> gradnorm = GradNorm(tasks=["seg", "depth"], shared_layer="encoder.4", alpha=1.5)
        >>> trainer = L.Trainer(callbacks=[gradnorm], logger=False)
        >>> gradnorm.weights
        {'seg': 1.0, 'depth': 1.0}
    """

    _remembers = "its weights and L_i(0)"

    def __init__(
        self,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        *,
        shared_layer: str | None = None,
        heads: Mapping[str, str] | None = None,
        alpha: float = 1.5,
        optimizer: WeightOptimizerFactory = partial(torch.optim.Adam, lr=0.025),
        initial_losses: int | Mapping[str, float] = 1,
        initial_weights: Mapping[str, float] | None = None,
        priorities: Mapping[str, float] | None = None,
        update_every: int = 1,
        stop_after: int | None = None,
        norm_of: Literal["weight", "activation"] = "weight",
        min_weight: float = 1e-4,
        representation: str = "encoder",
        on_task_mismatch: Literal["error", "adapt"] = "error",
    ) -> None:
        super().__init__(tasks, heads=heads, representation=representation)
        is_name = shared_layer is None or isinstance(shared_layer, str)
        _check(is_name, "shared_layer", "a dotted name such as 'encoder.4', or None", shared_layer)
        _check(isinstance(representation, str), "representation", "a dotted name such as 'encoder'", representation)
        is_finite = is_number(alpha) and math.isfinite(alpha)
        _check(is_finite and alpha >= 0, "alpha", "a finite number, at least 0", alpha)
        _check(callable(optimizer), "optimizer", "a callable such as partial(torch.optim.Adam, lr=0.025)", optimizer)
        _check(is_integer(update_every) and update_every >= 1, "update_every", "an integer, at least 1", update_every)
        stops = stop_after is None or (is_integer(stop_after) and stop_after >= 0)
        _check(stops, "stop_after", "None or an integer, at least 0", stop_after)
        _check(norm_of in ("weight", "activation"), "norm_of", "'weight' or 'activation'", norm_of)
        adapts = on_task_mismatch in ("error", "adapt")
        _check(adapts, "on_task_mismatch", "'error' or 'adapt'", on_task_mismatch)
        _check(is_number(min_weight) and 0 < min_weight < 1, "min_weight", "a number between 0 and 1", min_weight)
        _check(
            isinstance(initial_losses, Mapping) or (is_integer(initial_losses) and initial_losses >= 1),
            "initial_losses",
            "a number of updates, at least 1, or a mapping from task to number",
            initial_losses,
        )
        for parameter, numbers in (("initial_weights", initial_weights), ("priorities", priorities)):
            _check(numbers is None or isinstance(numbers, Mapping), parameter, "a mapping from task to number", numbers)
        self.shared_layer = shared_layer
        self.alpha = float(alpha)
        self.optimizer = optimizer
        self.initial_losses = initial_losses
        self.initial_weights = initial_weights
        self.priorities = priorities
        self.update_every = update_every
        self.stop_after = stop_after
        self.norm_of = norm_of
        self.min_weight = min_weight
        self.on_task_mismatch = on_task_mismatch
        self._warned: set[str] = set()
        if self._names:
            self._check_numbers()

    def _check_numbers(self) -> None:
        for parameter in ("initial_losses", "initial_weights", "priorities"):
            numbers = getattr(self, parameter)
            if isinstance(numbers, Mapping):
                check_positive_by_task(numbers, self._names, asked_by=self._name, parameter=parameter)

    # ---- what the user reads -----------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, float]:
        """The weights now in force, by task; they sum to T."""
        return self._by_task("weights")

    @property
    def mean_weights(self) -> dict[str, float]:
        """The weights' average over the steps so far: what the paper trains "GradNorm static" with."""
        return self._by_task("mean_weights")

    def _by_task(self, which: Literal["weights", "mean_weights"]) -> dict[str, float]:
        if self._rule is not None:
            return dict(zip(self._rule.tasks, getattr(self._rule, which).tolist(), strict=True))
        if self._restored is not None:
            key = "weights" if which == "weights" else "weights_mean"
            return dict(zip(self._restored["tasks"], self._restored[key].tolist(), strict=True))
        if not self._names:
            raise RuntimeError("GradNorm: the tasks of the MultiTaskModule are known once training has started")
        return dict(zip(self._names, self._new_rule(torch.zeros(())).weights.tolist(), strict=True))

    # ---- the strategy's answers --------------------------------------------------------------------------------------

    @override
    def _shared_layer(self, module: L.LightningModule, heads: Mapping[str, str]) -> Mapping[str, nn.Parameter]:
        if self.norm_of == "activation":
            return {}
        W = find_shared_layer(module, self.shared_layer, asked_by=self._name)
        for task, head in heads.items():
            inside = [name for name in W if name.startswith(f"{head}.")]
            if inside:
                raise ValueError(
                    f"GradNorm: the shared layer '{inside[0]}' is in '{head}', which task '{task}' has as its head. Name the "
                    f"last layer that all tasks share, and as heads what reads its output. Leave heads out if there is none."
                )
        return W

    @override
    def _readers(
        self, module: L.LightningModule, W: Mapping[str, nn.Parameter], opened: Collection[nn.Module]
    ) -> list[GradientReader]:
        if self.norm_of == "activation" or self.representation != "encoder":
            encoder = find_module(module, self.representation, asked_by=f"{self._name}: representation")
        if self.norm_of == "activation":
            return [ActivationGradients(encoder, f"'{self.representation}'")]
        return weight_readers(module, W, opened)

    @override
    def _measures(self) -> bool:
        step = self._known.steps
        return step % self.update_every == 0 and (self.stop_after is None or step < self.stop_after)

    @override
    def _weights_in_force(self) -> Tensor:
        return self._known.weights.detach()

    @override
    def _begin_anew(self) -> None:
        self._warned.clear()

    @override
    def _new_rule(self, like: Tensor) -> GradNormRule:
        self._check_numbers()
        return GradNormRule(
            self._names,
            alpha=self.alpha,
            optimizer=self.optimizer,
            initial_losses=self.initial_losses,
            initial_weights=self.initial_weights,
            priorities=self.priorities,
            min_weight=self.min_weight,
            dtype=like.dtype,
            device=like.device,
        )

    @override
    def _load(self, rule: GradNormRule, state: Mapping[str, Any]) -> None:
        self._warn_of_other_tasks(state["tasks"])
        rule.load_state_dict(state, adapt=self.on_task_mismatch == "adapt")

    def _warn_of_other_tasks(self, known: Sequence[str]) -> None:
        if set(known) != set(self._names) and self.on_task_mismatch == "adapt":
            new, gone = sorted(set(self._names) - set(known)), sorted(set(known) - set(self._names))
            rank_zero_warn(
                f"GradNorm: the checkpoint is of tasks {sorted(known)}: {new or 'no task'} is new and begins with their mean "
                f"weight, {gone or 'no task'} is gone; the weights are scaled to sum {len(self._names)}."
            )

    @override
    def _take_in(self, window: Window, trainer: L.Trainer, module: L.LightningModule) -> bool:
        if trainer.world_size == 1 and not window.measured:
            return True  # there is nobody to agree with
        reader = self._reader if window.measured else None
        assert reader is None or isinstance(reader, RowReader)
        if isinstance(reader, WeightGradients) and window.losses and reader.unreached >= set(window.losses):
            self._check_still_there(reader, module)
        step = gather(self._names, window, reader, self._weights_in_force(), trainer)
        counts = bool(window.losses) or (step.present is not None and bool(step.present.any()))
        if step.norms is not None and counts:
            self._known.step(step.norms / self._weights_in_force(), step.losses, step.present)
            if self._known.syncs_every_step:
                self._warn()
        return counts

    def _check_still_there(self, reader: WeightGradients, module: L.LightningModule) -> None:
        """Refuse to balance by a layer that the module has no more; one that it leaves out of a step has norms of 0."""
        own = {id(parameter) for parameter in module.parameters()}
        if not all(id(W) in own for W in reader.sought):
            raise ValueError(
                f"GradNorm: the shared layer that {type(module).__name__} had when the training began has been replaced, so "
                f"that no gradient arrives there. Replace it in configure_model, or train in two runs, the second from the "
                f"checkpoint of the first."
            )

    @override
    def _note_step(self) -> None:
        self._known.count_step()

    def _warn(self) -> None:
        """Say, once for each task, that a step was not taken because of its numbers. A look of the host."""
        for task, loss in self._known.tasks_at_fault.items():
            if task not in self._warned:
                self._warned.add(task)
                reason = f"the loss or the gradient norm of task '{task}' is not finite"
                if loss < 0 and self.alpha > 0:
                    reason = (
                        f"the loss of task '{task}' is negative ({loss:g}), so that it has no training rate (add a constant "
                        f"that keeps it positive, or use alpha=0)"
                    )
                rank_zero_warn(
                    f"GradNorm: {reason}; the weights stay as they are. Further such steps are counted in gradnorm/skipped."
                )

    @override
    def _log(self, module: L.LightningModule) -> None:
        self._warn()
        rule = self._known
        by_task = {"weight": self._weights_in_force().clone()}
        shown: dict[str, Tensor | float] = {"gradnorm/skipped": float(rule.skipped)}
        if rule.last is not None:
            seen = rule.last.terms
            shown["gradnorm/loss"] = seen.loss
            by_task["grad_norm"], by_task["rate"] = seen.grad_norms, seen.rates
            by_task["loss_ratio"] = rule.last.losses / rule.initial_losses
        for what, values in by_task.items():
            shown |= {f"gradnorm/{what}/{task}": value for task, value in zip(self._names, values, strict=True)}
        module.log_dict(shown, on_step=True)
