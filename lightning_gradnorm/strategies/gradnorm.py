"""GradNorm: Chen, Badrinarayanan, Lee, Rabinovich, *GradNorm: Gradient Normalization for Adaptive Loss Balancing in
Deep Multitask Networks*, ICML 2018 (arXiv 1711.02257), section 3 and Algorithm 1.

With ``n_i = ||∇_W L_i||₂`` over the last shared layer ``W``, in the paper's symbols (names in this file on the right)::

    G_i      = w_i n_i                                    grad_norms   norm of the weighted gradient
    Ḡ        = mean_i G_i
    r_i      = (L_i / L_i(0)) / mean_j (L_j / L_j(0))     rates        relative inverse training rate: large means slow
    target_i = Ḡ · r_i^alpha                              targets      Equation 1, treated as a constant
    L_grad   = Σ_i |G_i − target_i|                       loss         Equation 2, a function of w alone

Because ``w_i > 0``, the derivative has a closed form and needs no second backward pass::

    ∂L_grad / ∂w_i = sign(G_i − target_i) · n_i           gradient

An optimizer takes one step along it, then ``w ← T · w / Σ w``. `gradnorm_terms` computes the table above; `GradNormRule.step`
does the rest.
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_gradnorm._messages import check_task_names
from lightning_gradnorm.strategies.gradnorm_arguments import check_arguments, why_not_updated
from lightning_gradnorm.strategies.initial_losses import InitialLosses
from lightning_gradnorm.strategies.last_seen import LastSeen
from lightning_gradnorm.strategies.resuming import ResumeOptions, check_state, say_what_is_in_force
from lightning_gradnorm.strategies.smoothing import Smoothing
from lightning_gradnorm.strategies.snapshot import matched_by_task
from lightning_gradnorm.strategies.updates import GradNormTerms, Outcomes, ReadsOutcomes, WeightUpdate
from lightning_gradnorm.strategies.weight_optimizer import WeightOptimizerFactory, make_weight_optimizer, moved
from lightning_gradnorm.strategies.zero_gradients import tasks_with_gradient

_KIND = "GradNorm"
_VERSION = 1  # of the layout of `GradNormRule.state_dict`
_MAX_WEIGHT_SHARE = 1e6  # upper bound of a weight before the weights are scaled to sum T, as a multiple of T


def gradnorm_terms(
    weights: Tensor,
    norms: Tensor,
    losses: Tensor,
    initial_losses: Tensor,
    alpha: float,
    priorities: Tensor | None,
    present: Tensor | None = None,
) -> GradNormTerms:
    """Return ``G_i``, ``r_i``, the targets and the gradient of ``L_grad`` with respect to the weights.

    Args:
        weights: ``w_i > 0``, shape (T,).
        norms: ``n_i = ||∇_W L_i||`` of the unweighted losses, shape (T,).
        losses: ``L_i``, shape (T,).
        initial_losses: ``L_i(0)``, shape (T,).
        alpha: the asymmetry; 0 aims at equal gradient norms.
        priorities: ``p_i > 0``, scaled to mean 1 over the tasks that count. ``None``: all 1, as in the paper.
        present: the tasks that count, bool of shape (T,). Means are over them; the others get NaN. ``None`` for all.

    Example:
        Two gradients of equal size, but the second task has learned less, so its weight should grow:

        >>> one = torch.ones(2)
        >>> gradnorm_terms(one, one, torch.tensor([0.3, 0.9]), one, 1.0, None).gradient
        tensor([ 1., -1.])
    """
    if present is not None:
        norms, losses = (torch.where(present, value, torch.nan) for value in (norms, losses))
    grad_norms = weights * norms
    ratios = losses / initial_losses
    rates = ratios / _mean(ratios, present)
    targets = _mean(grad_norms, present) * rates**alpha
    if priorities is not None:
        targets = targets * (priorities / _mean(priorities, present))
    return GradNormTerms(grad_norms, rates, targets, (grad_norms - targets).sign() * norms, ratios)


def _mean(values: Tensor, present: Tensor | None) -> Tensor:
    return values.mean() if present is None else torch.where(present, values, 0.0).sum() / present.sum()


class GradNormRule(ReadsOutcomes):
    """GradNorm's weights and everything they depend on: ``L_i(0)``, the weight optimizer, the counters.

    After every `step`, whatever its inputs, the weights are positive and sum to T.

    Args:
        tasks: the tasks' names, in the order of every tensor of shape (T,).
        alpha: the asymmetry. With 0, a task whose loss vanishes gets nearly all of the weight.
        optimizer: builds the optimizer of the weights; the paper's is ``partial(torch.optim.Adam, lr=0.025)``.
        initial_losses: the number of first updates whose mean loss is ``L_i(0)`` (until then, the mean so far); or the values
            by task, for example ``{"seg": math.log(13)}``. Tasks without a value use their first loss.
        initial_weights: by task; scaled to sum T. Equal by default.
        priorities: by task; scaled to mean 1. Equal by default.
        update_every: the network's optimizer steps from one weight update to the next.
        stop_after: the network's optimizer steps after which the weights stay fixed; ``None`` for never.
        min_weight: lower bound of the weights before they are scaled to sum T.
        absent_tasks: ``"leave_out"``: a task that is absent from an update keeps its weight and does not count in the means.
            ``"last_seen"``: it counts with its last norm and loss; before its first, it is left out. In both cases, a task
            whose gradient is exactly 0 is absent.
        weight_space: ``"linear"``: the optimizer steps on ``w``, as in the paper. ``"log"``: it steps on ``log w``, with the
            gradient ``sign(G_i − target_i) · G_i``, so weights of 0.001 and of 1 move by the same factor. Not in the paper.
        smoothing: β of bias-corrected moving averages that replace ``n_i`` and ``L_i``, also in ``L_i(0)``. 0, as in the
            paper, turns them off. Not in the paper.
        resume_options: which options apply after `load_state_dict` if the checkpoint's differ: the weight optimizer's,
            ``initial_losses`` and ``initial_weights``. Either way, a difference gives a warning. Other options are not part of
            a checkpoint.
        dtype: of the weights.
        device: of the weights.
        caller: begins the error messages.

    Example:
        >>> rule = GradNormRule(["seg", "depth"], alpha=0.0)
        >>> for _ in range(200):
        ...     _ = rule.step(norms=torch.tensor([1.0, 3.0]), losses=torch.ones(2))
        >>> [round(w, 1) for w in rule.weights.tolist()]  # inversely proportional to the norms, summing to 2
        [1.5, 0.5]
    """

    needs: ClassVar[Literal["nothing", "losses", "norms", "gradients"]] = "norms"
    norms: ClassVar[tuple[Literal["l2"]]] = ("l2",)

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        alpha: float = 1.5,
        optimizer: WeightOptimizerFactory = partial(torch.optim.Adam, lr=0.025),
        initial_losses: int | Mapping[str, float] = 1,
        initial_weights: Mapping[str, float] | None = None,
        priorities: Mapping[str, float] | None = None,
        update_every: int = 1,
        stop_after: int | None = None,
        min_weight: float = 1e-4,
        absent_tasks: Literal["leave_out", "last_seen"] = "leave_out",
        weight_space: Literal["linear", "log"] = "linear",
        smoothing: float = 0.0,
        resume_options: ResumeOptions = "checkpoint",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        caller: str = "GradNormRule",
    ) -> None:
        self.tasks = check_task_names(tasks, caller=caller)
        by_task = {"initial_losses": initial_losses, "initial_weights": initial_weights, "priorities": priorities}
        numbers = {"alpha": alpha, "min_weight": min_weight, "update_every": update_every, "stop_after": stop_after}
        choices = {"absent_tasks": absent_tasks, "weight_space": weight_space, "resume_options": resume_options}
        given = {**by_task, **numbers, **choices, "smoothing": smoothing, "optimizer": optimizer}
        check_arguments(caller, self.tasks, given)
        self.alpha, self.min_weight = float(alpha), min_weight
        self.update_every, self.stop_after = update_every, stop_after
        self.resume_options = resume_options
        self._given_weights, self._given_priorities = initial_weights, priorities
        weights, self._priorities = self._initial_values(torch.zeros((), dtype=dtype, device=device))
        self.weights = weights.requires_grad_()
        self._initial_weights = weights.detach().clone()
        self._logs = weights.detach().log().requires_grad_() if weight_space == "log" else None
        self._step = make_weight_optimizer(self.weights if self._logs is None else self._logs, optimizer)
        # A tensor: number ÷ tensor rounds twice, and the weights would depend on whether all tasks are known to be present.
        self._total = torch.tensor(float(len(self.tasks)), dtype=dtype, device=device)
        self._all_present = torch.ones(len(self.tasks), dtype=torch.bool, device=device)
        self._initial = InitialLosses(self.tasks, initial_losses, self.alpha, weights.detach())
        self._smoothing = Smoothing(smoothing, weights.detach()) if smoothing else None
        self._last_seen = LastSeen(weights.detach()) if absent_tasks == "last_seen" else None
        self.mean_weights = self.weights.detach().clone()
        """``E_t[w_i(t)]`` over the steps counted by `count_step`, shape (T,)."""
        self.steps = 0
        """Number of the network's optimizer steps, with and without a weight update."""
        self._is_fresh = True  # whether the state is still the constructor's
        explain = partial(why_not_updated, alpha=self.alpha)
        self.outcomes = Outcomes(self.tasks, explain, "gradnorm/skipped", absent_tasks)
        """What happened to the updates. Read `skipped`, `remarks` and so on: these first read what is new."""

    def _initial_values(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weights and the priorities from the constructor's arguments."""
        w, p = self._given_weights or dict.fromkeys(self.tasks, 1.0), self._given_priorities
        weights = like.new_tensor([w[task] for task in self.tasks])
        priorities = None if p is None else like.new_tensor([p[task] for task in self.tasks])
        return weights * len(self.tasks) / weights.sum(), priorities

    @property
    def initial_losses(self) -> Tensor:
        """``L_i(0)`` as far as it is known, shape (T,); 0 for a task that has not been seen."""
        return self._initial.values

    @property
    def loss_weights(self) -> Tensor:
        """The current weights, shape (T,), detached: the factors of the losses' gradients."""
        return self.weights.detach()

    @property
    def should_measure(self) -> bool:
        """Whether the network's next optimizer step includes a weight update."""
        return self.steps % self.update_every == 0 and (self.stop_after is None or self.steps < self.stop_after)

    def count_step(self) -> None:
        """Add the current weights to their mean over time. Called after every optimizer step of the network."""
        self.steps += 1
        self.mean_weights.lerp_(self.weights.detach(), 1 / self.steps)

    def discard_step(self) -> None:
        """Do nothing: a step that the loss scaler skips leaves no trace here."""

    @torch.no_grad()
    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Move all state in place, including the optimizer's. Values are kept."""
        self.outcomes.read()
        dtype, device = dtype or self.weights.dtype, device or self.weights.device
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and not value.requires_grad:
                setattr(self, name, moved(value, dtype, device))
        self.weights.data = self.weights.data.to(device, dtype)
        if self._logs is not None:
            self._logs.data = self._logs.data.to(device, dtype)
        self._step.follow_weights()
        for part in (self._initial, self._smoothing, self._last_seen):
            if part is not None:
                part.to(self.mean_weights)
        if self.outcomes.last is not None:
            self.outcomes.last = moved(self.outcomes.last, dtype, device)
        # Convert the given numbers again, so float64 does not get numbers rounded to float32.
        weights, self._priorities = self._initial_values(self.mean_weights)
        if self._is_fresh:
            self._set_weights(weights)
            self.mean_weights, self._initial_weights = weights, weights.clone()

    def _set_weights(self, weights: Tensor, logs: Tensor | None = None) -> None:
        """Set the weights and, unless these are already their exponentials, the logarithms."""
        self.weights.copy_(weights)
        if self._logs is not None:
            logs = weights.log() if logs is None else logs.to(weights)
            self._logs.copy_(torch.where(logs.exp() == weights, logs, weights.log()))

    @torch.no_grad()
    def step(self, norms: Tensor, losses: Tensor, present: Tensor | None = None) -> WeightUpdate:
        """Update the weights once.

        Once every ``L_i(0)`` is known, and with Adam, the host never waits for the device: an unusable update is computed and
        discarded there.

        Args:
            norms: ``n_i`` of the unweighted losses, shape (T,).
            losses: ``L_i``, shape (T,).
            present: the tasks that have a loss, bool of shape (T,); all by default. A task whose norm is exactly 0 counts as
                absent. An absent task keeps its weight and its optimizer state and is left out of the means; the others share
                the rest. With ``absent_tasks="last_seen"`` it counts with its last numbers instead.

        Returns:
            The update. It is not taken if a number is not finite, or (unless ``alpha`` is 0) a loss is negative or has never
            been positive; then only `skipped`, `tasks_at_fault` and ``L_i(0)`` of the other tasks change.
        """
        norms, losses = norms.to(self.weights), losses.to(self.weights)
        shown = self._all_present if present is None else present
        present = with_gradient = tasks_with_gradient(norms, present, may_look=self.syncs_every_step)
        had_one = self._all_present if with_gradient is None else with_gradient
        if self._smoothing is not None:
            can_be_averaged = norms.isfinite() & losses.isfinite() & ((losses >= 0) | (self.alpha == 0))
            norms, losses = self._smoothing.average(norms, losses, had_one & can_be_averaged)
        if self._last_seen is not None:
            norms, losses, present = self._last_seen.fill(norms, losses, with_gradient)
        counted = self._all_present if present is None else present
        # 0 if the loss is usable: finite and, for a rate, not negative. A bad norm shows up in the resulting weights.
        problems = losses - (losses.abs() if self.alpha > 0 else losses)
        if present is not None:
            problems = torch.where(present, problems, 0.0).masked_fill_(~present.any(), 1.0)

        initial_losses = self.initial_losses
        begins = not self._initial.are_final and bool((problems == 0).all())
        if begins:
            initial_losses = self._initial.propose(losses, with_gradient)
            no_rate = (initial_losses <= 0) & (losses <= 0) & shown
            if self.alpha > 0 and bool(no_rate.any()):
                problems, counted = no_rate.to(problems), shown
                self._initial.accept()
        weights = self.weights.detach()
        terms = gradnorm_terms(weights, norms, losses, initial_losses, self.alpha, self._priorities, present)
        gradient = terms.gradient if present is None else torch.where(present, terms.gradient, 0.0)
        if self._logs is None:
            taken = self._step.step(gradient, problems, present, partial(self._renormalized, present))
        else:  # ∂L_grad / ∂log w_i = w_i ∂L_grad / ∂w_i
            taken = self._step.step(weights * gradient, problems, present, partial(self._renormalized_logs, present))
            weights.copy_(self._logs.exp())
        if begins and bool(taken):
            self._initial.accept()
        self._is_fresh = False
        if self._last_seen is not None:
            self._last_seen.note(norms, losses, had_one & self._is_usable(norms, losses))
        update = WeightUpdate(norms, losses, counted, shown, had_one, problems, terms, taken)
        self.outcomes.add(update, read=self.syncs_every_step)
        return update

    def _is_usable(self, norms: Tensor, losses: Tensor) -> Tensor:
        """Return the tasks whose numbers an update can use, bool of shape (T,)."""
        has_rate = ((losses >= 0) & (self.initial_losses > 0)) | (self.alpha == 0)
        return norms.isfinite() & losses.isfinite() & has_rate

    def _renormalized(self, present: Tensor | None, before: Tensor, weights: Tensor) -> Tensor:
        """Apply ``w_i ← max(w_i, min_weight)``, then scale so that the sum is T and absent tasks keep their weights."""
        T = len(self.tasks)
        # The upper bound is out of reach in ordinary steps. If one weight explodes, dividing by the sum would push the others
        # to zero, where their gradients can no longer be measured.
        weights = weights.clamp(self.min_weight, _MAX_WEIGHT_SHARE * T)
        if present is None:
            return weights * (self._total / weights.sum())
        left, had = T - (before * ~present).sum(), (before * present).sum()
        # Both are equal up to rounding, which swallows `left` when the absent tasks hold nearly the whole sum.
        total = torch.where(left > had / 2, left, had)
        return torch.where(present, weights * (total / (weights * present).sum()), before)

    def _renormalized_logs(self, present: Tensor | None, before: Tensor, logs: Tensor) -> Tensor:
        """Do the same for logarithms; those of absent tasks stay bit-identical."""
        found = self._renormalized(present, before.exp(), logs.exp()).log()
        return found if present is None else torch.where(present, found, before)

    @property
    def syncs_every_step(self) -> bool:
        """Whether the host reads each update's outcome at once: on a CPU, where there is nothing to wait for."""
        return self.weights.device.type == "cpu"

    def state_dict(self) -> dict[str, Any]:
        """Return all state as plain tensors and numbers, loadable with ``torch.load(weights_only=True)``."""
        state = {
            "kind": _KIND,
            "version": _VERSION,
            "tasks": list(self.tasks),
            "weights": self.weights.detach().clone(),
            "initial_weights": self._initial_weights.clone(),
            "optimizer": self._step.state_dict(),
            **self._initial.state_dict(),
            "weights_mean": self.mean_weights.clone(),
            "steps": self.steps,
            "skipped": self.skipped,
        }
        parts = {"last_seen": self._last_seen, "smoothing": self._smoothing}
        state |= {name: part.state_dict() for name, part in parts.items() if part is not None}
        return state if self._logs is None else {**state, "log_weights": self._logs.detach().clone()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], *, adapt: bool = False) -> None:
        """Load the state of another rule, matched by the tasks' names.

        Args:
            state: what `state_dict` returned.
            adapt: accept a state of other tasks. Known tasks keep their state and the weights are scaled to sum T. A new task
                starts with the mean of the known weights and an empty optimizer state; its ``L_i(0)`` is its first loss.

        Raises:
            ValueError: the state is of other tasks and ``adapt`` is False, of another strategy, optimizer or version, or
                damaged. The rule is then unchanged.

        Warns:
            UserWarning: once for each option that differs from the checkpoint's; ``resume_options`` decides which applies.
        """
        check_state(state, self.tasks, _KIND, _VERSION, adapt=adapt)
        known = set(state["tasks"])
        matched = matched_by_task(state, self.tasks)
        is_new = torch.tensor([task not in known for task in self.tasks], device=self.weights.device)

        def scaled(name: str) -> Tensor:
            weights = torch.where(is_new, state[name].mean().to(self.weights), matched[name].to(self.weights))
            return weights if known == set(self.tasks) else weights * (len(self.tasks) / weights.sum())

        # Everything that can fail comes before the first change.
        weights, mean_weights = scaled("weights"), scaled("weights_mean")
        steps, skipped = int(state["steps"]), int(state["skipped"])
        initial = self._initial.resumed(matched, is_new, self.resume_options)
        last_seen = None if self._last_seen is None else self._last_seen.resumed(matched.get("last_seen"))
        smoothing = None if self._smoothing is None else self._smoothing.resumed(matched.get("smoothing"))
        began_with = scaled("initial_weights") if "initial_weights" in state else self._initial_weights
        own, _ = self._initial_values(self.mean_weights)
        if self._given_weights is not None and not is_new.any() and not torch.allclose(began_with, own):
            there, here = (
                dict(zip(self.tasks, one.double().round(decimals=4).tolist(), strict=True)) for one in (began_with, own)
            )
            say_what_is_in_force("initial_weights", there, here, self.resume_options)
            if self.resume_options == "given":
                weights, began_with = own, own.clone()
        self._step = self._step.resumed(matched["optimizer"], self.resume_options)
        self._set_weights(weights, None if is_new.any() else matched.get("log_weights"))
        self.mean_weights, self._initial_weights, self._initial = mean_weights, began_with, initial
        self.steps, self._last_seen, self._smoothing, self._is_fresh = steps, last_seen, smoothing, False
        self.outcomes.resume(skipped)
