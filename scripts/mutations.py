"""The faults of `mutation_check.py`: what each changes in the core, and the fast tests that should notice."""

from __future__ import annotations

from dataclasses import dataclass

_CORE = "lightning_gradnorm/"


@dataclass(frozen=True)
class Fault:
    """One deliberate fault."""

    name: str
    """A description of the fault."""
    file: str
    """Path from the root of the repository."""
    old: str
    """The original text, which occurs exactly once."""
    new: str
    """The faulty text."""
    tests: tuple[str, ...]
    """The test files that should notice, the cheapest first."""


_GRADNORM = f"{_CORE}strategies/gradnorm.py"
_ADAM = f"{_CORE}strategies/weight_optimizer.py"
_FIRST = f"{_CORE}strategies/initial_losses.py"
_SOLVERS = f"{_CORE}strategies/solvers.py"
_DUAL_CONE = f"{_CORE}strategies/dual_cone.py"
_ENGINE = f"{_CORE}engine/engine.py"
_RANKS = f"{_CORE}engine/ranks.py"

_OF_TERMS = ("tests/strategies/test_gradnorm_terms.py",)
_OF_RULE = (*_OF_TERMS, "tests/strategies/test_gradnorm_rule.py")
_OF_SOLVERS = ("tests/strategies/test_solvers.py",)
_OF_DUAL_CONE = ("tests/strategies/test_dual_cone.py",)
_OF_LAST_SEEN = ("tests/callbacks/test_last_seen.py",)
_OF_NETWORK = ("tests/callbacks/test_network_gradients.py",)
_OF_BALANCER = ("tests/engine/test_balancer.py",)
_OF_PRECISION = ("tests/callbacks/test_precision.py",)
_OF_MEANS = ("tests/engine/test_means_of_a_step.py",)
_OF_ANY_NETWORK = ("tests/engine/test_balancer_aggregation.py",)
_OF_ROWS = ("tests/gradients/test_rows_of_the_gate.py",)
_OF_REPORTS = ("tests/callbacks/test_reported_losses.py",)
_OF_READING = ("tests/gradients/test_one_backward_pass.py",)

_OF_DERIVATIVES = ("tests/callbacks/test_losses_with_derivatives.py",)
_OF_SEARCH = ("tests/engine/test_discovery_fuzzed.py",)

_OF_CLOSURES = ("tests/callbacks/test_repeated_closures.py",)

FAULTS = (
    # ---- the rule ----------------------------------------------------------------------------------------------------
    Fault(
        "the exponent is -alpha",
        _GRADNORM,
        "present) * rates**alpha\n",
        "present) * rates**-alpha\n",
        _OF_RULE,
    ),
    Fault(
        "the target is not detached: the gradient goes through it too",
        _GRADNORM,
        "(grad_norms - targets).sign() * norms, ratios)",
        "norms * ((s := (grad_norms - targets).sign()) - _mean(s * priorities * rates**alpha, present)), ratios)",
        _OF_RULE,
    ),
    Fault(
        "the weights are not scaled to sum T",
        _GRADNORM,
        "return weights * (self._total / weights.sum())",
        "return weights",
        _OF_RULE,
    ),
    Fault(
        "min_weight is ignored, and weights may be negative",
        _GRADNORM,
        "weights.clamp(self.min_weight, _MAX_WEIGHT_SHARE * T)",
        "weights.clamp(max=_MAX_WEIGHT_SHARE * T)",
        _OF_RULE,
    ),
    Fault(
        "priorities are not scaled to mean 1",
        _GRADNORM,
        "targets * (priorities / _mean(priorities, present))",
        "targets * priorities",
        _OF_TERMS,
    ),
    Fault(
        "priorities of the present tasks are not scaled to mean 1",
        _GRADNORM,
        "priorities / _mean(priorities, present)",
        "priorities / _mean(priorities, None)",
        _OF_TERMS,
    ),
    Fault(
        "an absent task counts in the means",
        _GRADNORM,
        "torch.where(present, values, 0.0).sum() / present.sum()",
        "torch.where(present, values, 0.0).sum() / present.numel()",
        _OF_RULE,
    ),
    Fault(
        "the weight of an absent task changes",
        _GRADNORM,
        "return torch.where(present, weights * (total / (weights * present).sum()), before)",
        "return weights * (T / weights.sum())",
        _OF_RULE,
    ),
    Fault(
        "a loss that is not finite updates the weights",
        _GRADNORM,
        "problems = losses - (losses.abs() if self.alpha > 0 else losses)",
        "problems = torch.zeros_like(losses)",
        _OF_RULE,
    ),
    Fault(
        "the last losses take the place of L(0)",
        _GRADNORM,
        "        self._is_fresh = False\n",
        "        self._is_fresh, self._initial.values = False, losses\n",
        _OF_BALANCER,
    ),
    Fault(
        "L(0) is the mean over one update more than asked for",
        _FIRST,
        "counts = self._updates_seen < self._needed\n",
        "counts = self._updates_seen <= self._needed\n",
        _OF_RULE,
    ),
    Fault(
        "L(0) is not restored",
        _FIRST,
        "torch.where(takes_own, self.values, values.masked_fill(counts_anew, 0.0))",
        "self.values",
        (*_OF_RULE, "tests/callbacks/test_resume.py"),
    ),
    Fault(
        "L(0) is taken anew after a resume",
        _FIRST,
        "found._updates_seen = seen.masked_fill(takes_own, 0.0)",
        "found._updates_seen = torch.zeros_like(seen)",
        (*_OF_RULE, "tests/callbacks/test_resume.py"),
    ),
    Fault(
        "update_every is off by one",
        _GRADNORM,
        "self.steps % self.update_every == 0",
        "(self.steps + 1) % self.update_every == 0",
        _OF_RULE,
    ),
    Fault(
        "stop_after is off by one",
        _GRADNORM,
        "self.steps < self.stop_after",
        "self.steps <= self.stop_after",
        _OF_RULE,
    ),
    Fault(
        "the mean weights count one step too many",
        _GRADNORM,
        "1 / self.steps)",
        "1 / (self.steps + 1))",
        _OF_TERMS,
    ),
    Fault(
        "the state keeps its old precision",
        _ADAM,
        "return value.to(device, dtype if value.is_floating_point() else value.dtype)",
        "return value.to(device)",
        _OF_RULE,
    ),
    Fault(
        "only a copy of the weights is scaled, not what the optimizer holds",
        _ADAM,
        "        self.weights.copy_(constrain(before, self.weights.detach()))\n",
        "        constrain(before, self.weights.detach().clone())\n",
        _OF_RULE,
    ),
    Fault(
        "only a copy of the weights is scaled, with Adam",
        _ADAM,
        "torch.where(taken, constrain(weights, moved), weights, out=weights)",
        "torch.where(taken, moved, weights, out=weights)",
        _OF_RULE,
    ),
    Fault(
        "Adam is made anew in each step",
        _ADAM,
        "        self._averages = torch.where(taken, averages, self._averages)\n        self._next_step += taken\n",
        "",
        _OF_RULE,
    ),
    Fault(
        "in log space, the gradient is that of the weights",
        _GRADNORM,
        "self._step.step(weights * gradient, problems",
        "self._step.step(gradient, problems",
        ("tests/callbacks/test_log_space_and_smoothing.py",),
    ),
    Fault(
        "a smoothed first number is not corrected for its bias",
        f"{_CORE}strategies/smoothing.py",
        "return averages + (1 - beta) / (1 - beta**updates) * (numbers - averages)",
        "return averages + (1 - beta) * (numbers - averages)",
        ("tests/callbacks/test_log_space_and_smoothing.py",),
    ),
    # ---- the weights in the network ----------------------------------------------------------------------------------
    Fault(
        "a loss that is shown twice is weighted twice",
        _ENGINE,
        "        if owner == task:\n"
        "            return  # logged twice, or both returned and watched: a second hook would apply the weight twice\n"
        "        if owner is not None:\n",
        "        if owner not in (None, task):\n",
        ("tests/engine/test_watched_twice.py",),
    ),
    Fault(
        "the weight is applied twice",
        _ENGINE,
        "weighted = gradient * applied",
        "weighted = gradient * applied * applied",
        _OF_NETWORK,
    ),
    Fault(
        "the network trains with weights of the step before",
        _ENGINE,
        "            self._step.weights = self._weights_by_task()\n        self._before_pass",
        "            now = {task: weight.clone() for task, weight in self._weights_by_task().items()}\n"
        "            self._step.weights, self._before = getattr(self, '_before', now), now\n        self._before_pass",
        _OF_BALANCER,
    ),
    Fault(
        "the heads train with the new weights instead of the old",
        f"{_CORE}engine/measurement.py",
        "            self.rule.step(norms, means.losses, means.present)\n",
        "            old = weights.clone()\n"
        "            self.rule.step(norms, means.losses, means.present)\n"
        "            for task, ratio in zip(self.setting.tasks, self.rule.loss_weights / old, strict=True):\n"
        "                head = (self.setting.heads or {}).get(task)\n"
        "                for one in [] if head is None else self.setting.model.get_submodule(head).parameters():\n"
        "                    one.grad.mul_(ratio)\n",
        _OF_NETWORK,
    ),
    Fault(
        "a scalarization's weights are those of the batch before",
        _ENGINE,
        "        self.measurement.before_backward(loss, batch, self._step)\n        if not batch.is_repeated:\n"
        "            self._step.weights = self._weights_by_task()\n",
        "        before = {task: weight.clone() for task, weight in self._weights_by_task().items()}\n"
        "        self.measurement.before_backward(loss, batch, self._step)\n        self._step.weights = before\n",
        _OF_BALANCER,
    ),
    # ---- what is read ------------------------------------------------------------------------------------------------
    Fault(
        "the first-order pass reads without the weight",
        _ENGINE,
        "self._read(task, [loss.edge], [weighted])",
        "self._read(task, [loss.edge], [gradient])",
        _OF_BALANCER,
    ),
    Fault(
        "the gradient of another task's head is read",
        _ENGINE,
        "branch_arguments(args, kwargs, partial(self._read_at_head, task))",
        "branch_arguments(args, kwargs, partial(self._read_at_head, self._tasks[self._tasks.index(task) - 1]))",
        _OF_BALANCER,
    ),
    Fault(
        "a task gets the loss of another",
        _RANKS,
        "like.new_zeros(()) for task in tasks])",
        "like.new_zeros(()) for task in reversed(tasks)])",
        _OF_MEANS,
    ),
    Fault(
        "the norms are over all parameters, not over the shared layer",
        f"{_CORE}engine/reader_choice.py",
        "return [WeightGradients(list(W.values())),",
        "return [WeightGradients([p for p in root.parameters() if p.requires_grad]),",
        _OF_BALANCER,
    ),
    Fault(
        "the bias counts as part of the shared layer",
        f"{_CORE}engine/layers.py",
        "return weight or parametrized or older or ({} if is_container else inside)",
        "return inside",
        ("tests/callbacks/test_gradnorm_agrees_with_textbook.py",),
    ),
    Fault(
        "a second reading of a task takes the place of the first",
        f"{_CORE}gradients/readers.py",
        "self._rows[task] = self._rows[task] + row if task in self._rows else row",
        "self._rows[task] = row",
        _OF_READING,
    ),
    Fault(
        "a task's norm is taken before all of its gradient is there",
        f"{_CORE}engine/step_state.py",
        "if at_loss else self.branches.get(task, ())) == 1",
        "if at_loss else self.branches.get(task, ())) >= 1",
        ("tests/engine/test_head_called_twice.py",),
    ),
    Fault(
        "a module that has to run again does not",
        _ENGINE,
        "        if self._step.measured and self.measurement.reader is not None:\n"
        "            self.measurement.reader.on_backward_end()\n",
        "",
        ("tests/engine/test_replay.py",),
    ),
    Fault(
        "running statistics count what is computed again",
        f"{_CORE}gradients/buffers.py",
        "                    buffer.data.copy_(value)\n",
        "",
        ("tests/gradients/test_buffers.py",),
    ),
    Fault(
        "the engine does not put running statistics back",
        f"{_CORE}gradients/reading.py",
        "with self._buffers.preserved(task):\n                gradients",
        "if True:\n                gradients",
        ("tests/gradients/test_buffers.py",),
    ),
    Fault(
        "a loss that took no part in the backward pass goes unnoticed",
        f"{_CORE}engine/balancer.py",
        '            require_backpropagated(self._engine.batch.losses, self._engine.batch.backpropagated, caller="Balancer")\n',
        "",
        ("tests/engine/test_balancer_wrong_inputs.py",),
    ),
    Fault(
        "a loss of half precision is averaged in its own",
        f"{_CORE}engine/step_state.py",
        "values.mean(dtype=None if values.dtype == torch.float64 else torch.float32)",
        "values.mean()",
        _OF_REPORTS,
    ),
    Fault(
        "a constant 0 is taken for a mistake",
        f"{_CORE}engine/constant_losses.py",
        "if has_gradient(loss) or task in self._warned or _is_zero(loss):",
        "if has_gradient(loss) or task in self._warned:",
        _OF_REPORTS,
    ),
    Fault(
        "a gradient that waits for others is forgotten",
        f"{_CORE}gradients/reading.py",
        "register_prehook(lambda _: self._read_waiting(place))",
        "register_prehook(lambda _: place.tasks.clear())",
        ("tests/gradients/test_reading_together.py",),
    ),
    Fault(
        "a product of several tasks is used although it gives other numbers",
        f"{_CORE}gradients/reading.py",
        "if not is_verified:\n                    self._verify",
        "if False:\n                    self._verify",
        ("tests/gradients/test_reading_together.py",),
    ),
    Fault(
        "what gives another gradient the second time is passed twice",
        f"{_CORE}gradients/repeated_passes.py",
        "if not is_same:",
        "if False:",
        ("tests/gradients/test_repeated_passes.py",),
    ),
    Fault(
        "a layer that no gradient reaches goes unnoticed",
        f"{_CORE}gradients/readers.py",
        "if all(part is None for part in found):",
        "if False:",
        ("tests/engine/test_replaced_layer.py",),
    ),
    # ---- ranks, accumulation, the loss scaler ------------------------------------------------------------------------
    Fault(
        "over the ranks, the mean of local norms replaces the norm of the mean gradient",
        _RANKS,
        "reader.norms_of(table[:, 3:]), table[0, 2]",
        "ranks.sum(reader.norms_of(reader.rows(tasks, like))), table[0, 2]",
        _OF_MEANS,
    ),
    Fault(
        "a loss that one rank lacks counts there as 0",
        _RANKS,
        "losses, present = table[:, 0] / table[:, 1].clamp(min=1), table[:, 1] > 0\n        norms",
        "losses, present = table[:, 0] / ranks.size, table[:, 1] > 0\n        norms",
        _OF_MEANS,
    ),
    Fault(
        "the losses of micro-batches are added up, not averaged",
        _RANKS,
        "losses = losses / _to_device(like, [max(count, 1) for count in counts])",
        "pass",
        _OF_MEANS,
    ),
    Fault(
        "gradients of micro-batches are averaged over the wrong number",
        f"{_CORE}callbacks/trainer_loop.py",
        "(passes / batches if",
        "(passes if",
        ("tests/callbacks/test_accumulated_norms.py",),
    ),
    Fault(
        "the scale of a Balancer's last micro-batch stands for all",
        f"{_CORE}engine/plain_loop.py",
        "for scale in self.scales[-passes:]]",
        "for scale in self.scales[-1:]]",
        _OF_BALANCER,
    ),
    Fault(
        "norms are not divided by the loss scale",
        f"{_CORE}callbacks/trainer_loop.py",
        "return self.loss_scale() * (passes",
        "return 1.0 * (passes",
        _OF_PRECISION,
    ),
    Fault(
        "a step that the scaler skips is counted",
        _ENGINE,
        "        if skipped or (is_announced",
        "        if (is_announced",
        _OF_PRECISION,
    ),
    Fault(
        "a weight that the loss's precision rounds spoils the norm",
        _RANKS,
        "            reader.rescale(task, like[tasks.index(task)] / rounded)\n",
        "            pass\n",
        _OF_PRECISION,
    ),
    Fault(
        "each evaluation of the losses in a step is a weight update",
        _ENGINE,
        "        if self._set_aside is not None:\n            self._end_repetition()\n            return False\n",
        "        if False:\n            self._end_repetition()\n            return False\n",
        _OF_CLOSURES,
    ),
    Fault(
        "gradients that are dropped count in the next step",
        f"{_CORE}engine/step_state.py",
        "return not any(bool(gradient.any()) for gradient in left)",
        "return False",
        ("tests/callbacks/test_reported_loops.py",),
    ),
    Fault(
        "a discriminator's step counts as one of the tasks",
        f"{_CORE}engine/parameter_watch.py",
        "if len(among) < 2:",
        "if among:",
        ("tests/callbacks/test_reported_loops.py",),
    ),
    Fault(
        "the first value that a line search sees is that of the plain loss",
        f"{_CORE}engine/step_state.py",
        "        self.finished |= self.backpropagated\n",
        "        self.finished |= self.backpropagated\n        self.change_of_loss = 0.0\n",
        ("tests/callbacks/test_reported_loops.py",),
    ),
    Fault(
        "the weights move between the evaluations of a step",
        f"{_CORE}engine/passes.py",
        "weights = self.rule.loss_weights.clone()  #",
        "weights = self.rule.loss_weights  #",
        _OF_CLOSURES,
    ),
    # ---- aggregation -------------------------------------------------------------------------------------------------
    Fault(
        "the sum of the tasks' gradients passes the gate beside the combination",
        f"{_CORE}gradients/gate.py",
        "return [None] * len(arrived)  #",
        "return list(arrived)  #",
        _OF_BALANCER,
    ),
    Fault(
        "an aggregation's weights go to the rows in reverse",
        f"{_CORE}engine/aggregation.py",
        "return self._agree(gramian, here.tolist()).to(J) @ J",
        "return self._agree(gramian, here.tolist()).flip(0).to(J) @ J",
        _OF_BALANCER,
    ),
    Fault(
        "the tasks' gradients reach the shared parameters beside what is made of them",
        f"{_CORE}gradients/shared.py",
        "return torch.zeros_like(gradient) if of_tasks is None else gradient - of_tasks",
        "return gradient",
        _OF_ANY_NETWORK,
    ),
    Fault(
        "a regularizer does not reach the shared parameters",
        f"{_CORE}gradients/shared.py",
        "if node_of(parameter) not in self._others:",
        "if True:",
        _OF_ANY_NETWORK,
    ),
    Fault(
        "what one task reaches alone is aggregated as well",
        f"{_CORE}engine/shared_parameters.py",
        "shared = _of_several(self._reached, 2, trained)",
        "shared = _of_several(self._reached, 1, trained)",
        _OF_ANY_NETWORK,
    ),
    Fault(
        "what only the graph joins, as behind DDP's outputs, is aggregated as well",
        f"{_CORE}engine/shared_parameters.py",
        "shared = _of_several(self._moved,",
        "shared = _of_several(self._reached,",
        ("tests/engine/test_balancer_ranks.py",),
    ),
    Fault(
        "a second micro-batch is aggregated on top of the first",
        f"{_CORE}gradients/shared.py",
        "before.add_(new - self._placed[parameter] if parameter in self._placed else new)",
        "before.add_(new)",
        _OF_ANY_NETWORK,
    ),
    Fault(
        "rows of J are those of other tasks",
        f"{_CORE}gradients/gate.py",
        "{task: row for row, task in enumerate(tasks)}",
        "{task: row for row, task in enumerate(reversed(tasks))}",
        _OF_ROWS,
    ),
    Fault(
        "the weight of a row goes to another task's where one is absent",
        f"{_CORE}strategies/aggregation.py",
        "torch.zeros(T, dtype=weights.dtype).index_copy(0, some, weights.cpu())",
        "torch.cat([weights.cpu(), torch.zeros(T - len(some), dtype=weights.dtype)])",
        _OF_ROWS,
    ),
    # ---- the callbacks, Balancer, the monitor ------------------------------------------------------------------------
    Fault(
        "Balancer.step counts without a backward pass",
        f"{_CORE}engine/balancer.py",
        "if not self._engine.pending_backwards:",
        "if False:",
        ("tests/engine/test_balancer_wrong_inputs.py",),
    ),
    Fault(
        "a closed Balancer stays on the model",
        f"{_CORE}engine/balancer.py",
        "        self._closed = True\n        self._engine.close()\n",
        "        self._closed = True\n",
        ("tests/engine/test_balancer_state.py",),
    ),
    Fault(
        "a callback keeps its rule's state out of the checkpoint",
        f"{_CORE}callbacks/base.py",
        "return one._rule.state_dict() if one._rule is not None and one._restored is None else one._restored or {}",
        "return one._restored or {}",
        ("tests/callbacks/test_resume.py",),
    ),
    Fault(
        "what a callback has learned in a child process stays there",
        f"{_CORE}callbacks/copies.py",
        '            callback._take_over(torch.load(file, map_location="cpu", weights_only=True))\n',
        "",
        ("tests/callbacks/test_child_processes.py",),
    ),
    Fault(
        "spawned processes write to one scalarizer",
        f"{_CORE}callbacks/copies.py",
        "                value.data = value.data.clone()\n",
        "                pass\n",
        ("tests/callbacks/test_child_processes.py",),
    ),
    Fault(
        "a MultiTaskModule clips each micro-batch, not the whole gradient",
        f"{_CORE}multitask/module.py",
        "    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:\n",
        "    def on_after_backward(self) -> None:\n        optimizer = self.optimizers()\n",
        ("tests/multitask/test_clipping.py",),
    ),
    Fault(
        "the monitor shows norms without the weight",
        f"{_CORE}gradients/loss_terms.py",
        "row = reading.row * torch.where(of_plain == 0, 1, of_weighted / of_plain).to(reading.row)",
        "row = reading.row",
        ("tests/monitor/test_weight_in_norm.py",),
    ),
    Fault(
        "the monitor suggests weights for norms that have weights in them",
        f"{_CORE}monitor/summary.py",
        "plain = found[name] / weights[name] if weights[name] else 0.0",
        "plain = found[name]",
        ("tests/monitor/test_weight_in_norm.py",),
    ),
    Fault(
        "the second look of FAMO draws other random numbers",
        f"{_CORE}callbacks/recompute.py",
        "            torch.set_rng_state(cpu)\n",
        "",
        ("tests/callbacks/test_famo_and_dwa.py",),
    ),
    Fault(
        "uncertainty weighting has no 1/2 for a regression",
        f"{_CORE}strategies/uncertainty.py",
        "1.0 if task in self.classification else 0.5 for",
        "1.0 for",
        ("tests/strategies/test_uncertainty.py",),
    ),
    Fault(
        "ReLoBRaLo looks back to the last losses, not to the first",
        f"{_CORE}strategies/relobralo.py",
        "= first, losses, weights",
        "= losses, losses, weights",
        ("tests/strategies/test_relobralo.py",),
    ),
    Fault(
        "ReLoBRaLo looks back as often as it should not",
        f"{_CORE}strategies/relobralo.py",
        "torch.rand(()) >= self.rho",
        "torch.rand(()) < self.rho",
        ("tests/strategies/test_relobralo.py",),
    ),
    Fault(
        "SoftAdapt divides slopes by their sum, whose sign may be any",
        f"{_CORE}strategies/softadapt.py",
        "slopes.abs().sum()",
        "slopes.sum()",
        ("tests/strategies/test_softadapt.py",),
    ),
    Fault(
        "SLAW's averages begin at zero",
        f"{_CORE}strategies/slaw.py",
        "max(1 / int(self.steps), 1 - self.beta)",
        "1 - self.beta",
        ("tests/strategies/test_slaw.py",),
    ),
    Fault(
        "UW-SO multiplies by the temperature",
        f"{_CORE}strategies/uwso.py",
        "(1 / (self.tau * losses.abs()))",
        "(self.tau / losses.abs())",
        ("tests/strategies/test_uwso.py",),
    ),
    Fault(
        "what a rule of losses remembers changes with the caller's tensor",
        f"{_CORE}strategies/loss_weights.py",
        ".to(inside, copy=True)",
        ".to(inside)",
        ("tests/strategies/test_loss_rules.py",),
    ),
    Fault(
        "the hook on a loss keeps the loss alive",
        _ENGINE,
        "loss.register_hook(hook)",
        "loss.register_hook(lambda gradient, kept=loss: self._on_loss_gradient(task, index, gradient))",
        ("tests/engine/test_losses_are_released.py",),
    ),
    Fault(
        "a loss counts as it is in the backward pass, not as it was when it was shown",
        _ENGINE,
        "step.add(task, loss.value, is_first",
        "step.add(task, loss.tensor.detach().mean(), is_first",
        ("tests/callbacks/test_losses_changed_in_place.py",),
    ),
    Fault(
        "a gradient of zero raises the weight of its task",
        _GRADNORM,
        "with_gradient = tasks_with_gradient(norms, present, may_look=self.syncs_every_step)",
        "with_gradient = present",
        ("tests/strategies/test_zero_gradients.py",),
    ),
    Fault(
        "an absent task takes part with a norm of zero",
        f"{_CORE}strategies/last_seen.py",
        "stays = present | ~self._is_known",
        "stays = present | True",
        _OF_LAST_SEEN,
    ),
    Fault(
        "last numbers count in L(0)",
        _GRADNORM,
        "self._initial.propose(losses, with_gradient)",
        "self._initial.propose(losses, present)",
        _OF_LAST_SEEN,
    ),
    Fault(
        "last numbers are not in the checkpoint",
        _GRADNORM,
        'self._last_seen.resumed(matched.get("last_seen"))',
        "self._last_seen.resumed(None)",
        _OF_LAST_SEEN,
    ),
    Fault(
        "a loss that stays is taken to fall",
        f"{_CORE}strategies/domination.py",
        "if fmean(last) >= fmean(first) - noise:",
        "if fmean(last) > fmean(first) + noise:",
        ("tests/strategies/test_domination.py",),
    ),
    Fault(
        "the checkpoint's options are in force though the given ones should be",
        _ADAM,
        'prefers_given = resume_options == "given"',
        "prefers_given = False",
        ("tests/strategies/test_resuming.py",),
    ),
    Fault(
        "an optimizer of another class is accepted silently",
        _ADAM,
        "        if is_other:\n",
        "        if False:\n",
        ("tests/strategies/test_resuming.py",),
    ),
    # ---- the solvers -------------------------------------------------------------------------------------------------
    Fault(
        "Newton steps are not damped",
        _SOLVERS,
        "step = -math.expm1(-math.log1p(q * rho) / q) / rho if rho > 0 else 1.0",
        "step = 1.0",
        _OF_SOLVERS,
    ),
    Fault(
        "no further task joins the first corner of the simplex",
        _SOLVERS,
        "is_least = y >= -1e-14 * max(v)",
        "is_least = True",
        _OF_SOLVERS,
    ),
    Fault(
        "a table with rounding errors of almost dependent gradients is kept",
        _SOLVERS,
        "is_fresh = length <= 0",
        "is_fresh = True",
        _OF_SOLVERS,
    ),
    Fault(
        "exchanges of all wrong entries at once never become exchanges of one",
        _DUAL_CONE,
        "if step >= _BLOCKS:",
        "if False:",
        _OF_DUAL_CONE,
    ),
    Fault(
        "a weight may fall below that of the vector it projects",
        _DUAL_CONE,
        "v >= u - error.amax(dim=1, keepdim=True)",
        "v == v",
        _OF_DUAL_CONE,
    ),
    Fault(
        "short gradients are projected, although norm_eps excludes them",
        _DUAL_CONE,
        "if trace > 0 and trace >= self.norm_eps else",
        "if trace > 0 else",
        _OF_DUAL_CONE,
    ),
    Fault(
        "calls that TorchJD's own solver answers are not counted",
        f"{_CORE}strategies/aggregation.py",
        "self.handed_over += 1",
        "pass",
        ("tests/strategies/test_exact.py",),
    ),
    # ---- what is found -----------------------------------------------------------------------------------------------
    Fault(
        "the last layer in the forward pass is taken, not the deepest",
        f"{_CORE}gradients/loss_graph.py",
        "depth[node] = so_far + bool(met) if so_far else len(met)",
        "depth[node] = 1",
        _OF_SEARCH,
    ),
    Fault(
        "the first layer is taken in physics losses, for a derivative by the inputs ends with it",
        f"{_CORE}gradients/loss_graph.py",
        "use = node in within, (",
        "use = True, (",
        _OF_DERIVATIVES,
    ),
    Fault(
        "a call inside vmap goes unnoticed",
        _ENGINE,
        "self.batch.transformed.add(reader)",
        "pass",
        _OF_DERIVATIVES,
    ),
    Fault(
        "a derivative that goes around the gate from some batch on goes unnoticed",
        f"{_CORE}engine/graph_checks.py",
        "reader.why_unreadable(loss.node) if is_known else",
        "None if is_known else",
        _OF_DERIVATIVES,
    ),
    Fault(
        "a layer that is frozen after it was measured goes unnoticed",
        f"{_CORE}engine/inspection.py",
        "if self.checks.is_selected and isinstance(reader, RowReader):",
        "if False:",
        ("tests/callbacks/test_frozen_encoders.py",),
    ),
    Fault(
        "an output layer with a row for each task is taken",
        f"{_CORE}engine/discovery.py",
        "if bool(entries[does_move].all(dim=0).any()):",
        "if True:",
        _OF_SEARCH,
    ),
    Fault(
        "a head is taken though some of the gradient goes around it",
        f"{_CORE}gradients/loss_graph.py",
        "            if node in targets:\n                return False",
        "            if node in targets:\n                continue",
        ("tests/callbacks/test_found_layers.py", "tests/callbacks/test_found_in_training.py"),
    ),
    Fault(
        "a forward pass that takes another course is read at the heads all the same",
        f"{_CORE}engine/inspection.py",
        "batch.read_at_losses |= off",
        "batch.read_at_losses |= set()",
        _OF_SEARCH,
    ),
    Fault(
        "a task that has not appeared keeps the others from being balanced",
        f"{_CORE}engine/discovery.py",
        "if len(self._seen.tasks) < 2:",
        "if not self.has_seen_all:",
        ("tests/engine/test_late_tasks.py",),
    ),
    Fault(
        "norms at two layers are mixed in the step in which the shared layer changes",
        f"{_CORE}engine/inspection.py",
        "step.measured &= not step.losses",
        "step.measured &= True",
        ("tests/engine/test_late_tasks.py",),
    ),
    Fault(
        "a weight that is used without a module is as deep as the next one",
        f"{_CORE}gradients/loss_graph.py",
        "(here if is_chain else depth[node], node)",
        "(depth[node], node)",
        ("tests/gradients/test_loss_graph.py",),
    ),
)
