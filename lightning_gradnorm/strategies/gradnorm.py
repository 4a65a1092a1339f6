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
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gradnorm._messages import check_task_names
from lightning_gradnorm.strategies.gradnorm_arguments import check_arguments, why_not_updated
from lightning_gradnorm.strategies.snapshot import matched_by_task
from lightning_gradnorm.strategies.weight_optimizer import WeightOptimizerFactory, make_weight_optimizer, moved
from lightning_gradnorm.strategies.zero_gradients import ZeroGradients

_VERSION = 1  # of the layout of `GradNormRule.state_dict`
_MAX_WEIGHT_SHARE = 1e6  # upper bound of a weight before the weights are scaled to sum T, as a multiple of T
_MAX_PENDING = 1000  # updates whose outcome the host has not read; it then does, so that they do not pile up


class GradNormTerms(NamedTuple):
    """The quantities of one weight update; tensors of shape (T,), NaN at absent tasks."""

    grad_norms: Tensor
    """``G_i``"""
    rates: Tensor
    """``r_i``"""
    targets: Tensor
    """``Ḡ · p_i · r_i^alpha``"""
    gradient: Tensor
    """``∂L_grad / ∂w_i``"""

    @property
    def loss(self) -> Tensor:
        """``L_grad``, a scalar."""
        return (self.grad_norms - self.targets).abs().nansum()


class WeightUpdate(NamedTuple):
    """The inputs and the outcome of one weight update."""

    norms: Tensor
    losses: Tensor
    present: Tensor
    problems: Tensor
    """Nonzero where a loss is not finite, or negative although ``alpha > 0``; shape (T,)."""
    terms: GradNormTerms
    """Meaningless if the update was not taken."""
    taken: Tensor
    """Whether the weights changed, a bool tensor; False if an input or the result is not usable."""

    @property
    def tasks_at_fault(self) -> Tensor:
        """The tasks whose numbers prevented the update, bool of shape (T,)."""
        bad = self.present & ~((self.problems == 0) & self.norms.isfinite())
        # If every input is sound, the result overflowed, and all tasks contributed to it.
        return torch.where(bad.any(), bad, self.present) & ~self.taken


def gradnorm_terms(
    weights: Tensor,
    norms: Tensor,
    losses: Tensor,
    initial_losses: Tensor,
    alpha: float,
    priorities: Tensor,
    present: Tensor | None = None,
) -> GradNormTerms:
    """Return ``G_i``, ``r_i``, the targets and the gradient of ``L_grad`` with respect to the weights.

    Args:
        weights: ``w_i > 0``, shape (T,).
        norms: ``n_i = ||∇_W L_i||`` of the unweighted losses, shape (T,).
        losses: ``L_i``, shape (T,).
        initial_losses: ``L_i(0)``, shape (T,).
        alpha: the asymmetry; 0 aims at equal gradient norms.
        priorities: ``p_i`` with mean 1; all ones in the paper.
        present: the tasks that take part, bool of shape (T,). Means are over them; the others get NaN. ``None`` for all.

    Example:
        Two gradients of equal size, but the second task has learned less, so its weight should grow:

        >>> one = torch.ones(2)
        >>> gradnorm_terms(one, one, torch.tensor([0.3, 0.9]), one, 1.0, one).gradient
        tensor([ 1., -1.])
    """
    if present is not None:
        norms, losses = (torch.where(present, value, torch.nan) for value in (norms, losses))
        priorities = priorities / _mean(priorities, present)
    grad_norms = weights * norms
    ratios = losses / initial_losses
    rates = ratios / _mean(ratios, present)
    targets = _mean(grad_norms, present) * priorities * rates**alpha
    return GradNormTerms(grad_norms, rates, targets, (grad_norms - targets).sign() * norms)


def _mean(values: Tensor, present: Tensor | None) -> Tensor:
    return values.mean() if present is None else torch.where(present, values, 0.0).sum() / present.sum()


class GradNormRule:
    """GradNorm's weights and everything they depend on: ``L_i(0)``, the weight optimizer, the counters.

    After every `step`, whatever its inputs, the weights are positive and sum to T.

    Args:
        tasks: the tasks' names, in the order of every tensor of shape (T,).
        alpha: the asymmetry.
        optimizer: makes the optimizer of the weights; the paper's is ``partial(torch.optim.Adam, lr=0.025)``.
        initial_losses: the number of first updates whose mean loss is ``L_i(0)`` (as long as there are fewer, the mean of
            those so far); or the values by task, for example ``{"seg": math.log(13)}``. The others' is their first loss.
        initial_weights, priorities: by task; scaled to sum T, and to mean 1. Equal by default.
        update_every: the network's optimizer steps from one weight update to the next.
        stop_after: the network's optimizer steps after which the weights stay fixed; ``None`` for never.
        min_weight: lower bound of the weights before they are scaled to sum T.
        dtype, device: of the weights.
        caller: begins the error messages.

    Example:
        >>> rule = GradNormRule(["seg", "depth"], alpha=0.0)
        >>> for _ in range(200):
        ...     _ = rule.step(norms=torch.tensor([1.0, 3.0]), losses=torch.ones(2))
        >>> [round(w, 1) for w in rule.weights.tolist()]  # inversely proportional to the norms, summing to 2
        [1.5, 0.5]
    """

    needs: ClassVar[Literal["nothing", "losses", "norms", "gradients"]] = "norms"

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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        caller: str = "GradNormRule",
    ) -> None:
        self.tasks = check_task_names(tasks, caller=caller)
        by_task = {"initial_losses": initial_losses, "initial_weights": initial_weights, "priorities": priorities}
        check_arguments(caller, self.tasks, by_task, alpha, optimizer, min_weight, update_every, stop_after)
        self.alpha, self.min_weight = float(alpha), min_weight
        self.update_every, self.stop_after = update_every, stop_after
        ones, first_losses = dict.fromkeys(self.tasks, 1.0), dict.fromkeys(self.tasks, 0.0)
        counts = dict.fromkeys(self.tasks, initial_losses if isinstance(initial_losses, int) else 1)
        if isinstance(initial_losses, Mapping):
            first_losses |= initial_losses
            counts |= dict.fromkeys(initial_losses, 0)
        self._given = (dict(initial_weights or ones), dict(priorities or ones), first_losses)
        weights, self._priorities, self.initial_losses = self._initial_values(dtype, device)
        self._updates_in_initial = torch.tensor(list(counts.values()), dtype=dtype, device=device)
        self.weights = weights.requires_grad_()
        self._optimizer = make_weight_optimizer(self.weights, optimizer)
        self._all_present = torch.ones(len(self.tasks), dtype=torch.bool, device=device)
        self._updates_seen = torch.zeros_like(weights, requires_grad=False)
        self._initial_known = False  # whether every ``L_i(0)`` is final, and positive unless ``alpha`` is 0
        self.mean_weights = self.weights.detach().clone()
        """``E_t[w_i(t)]`` over the steps counted by `count_step`, shape (T,)."""
        self.steps = 0
        """Number of the network's optimizer steps, with and without a weight update."""
        self._is_fresh = True  # whether the state is still the constructor's
        self._zero_gradients = ZeroGradients(self.tasks)
        self._skipped = 0
        self._tasks_at_fault: dict[str, float] = {}
        self._last: WeightUpdate | None = None
        self._pending: list[WeightUpdate] = []  # updates whose outcome the host has not read yet

    def _initial_values(self, dtype: torch.dtype, device: torch.device | str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights, the priorities and ``L_i(0)`` as they were given."""
        rows = [[numbers[task] for task in self.tasks] for numbers in self._given]
        weights, priorities, initial_losses = torch.tensor(rows, dtype=dtype, device=device).unbind()
        return weights * len(self.tasks) / weights.sum(), priorities / priorities.mean(), initial_losses

    @property
    def loss_weights(self) -> Tensor:
        """The weights in force, shape (T,), detached: the factors of the losses' gradients."""
        return self.weights.detach()

    @property
    def should_measure(self) -> bool:
        """Whether the coming optimizer step of the network is one with a weight update."""
        return self.steps % self.update_every == 0 and (self.stop_after is None or self.steps < self.stop_after)

    def count_step(self) -> None:
        """Add the weights in force to their mean over time. Called after every optimizer step of the network."""
        self.steps += 1
        self.mean_weights.lerp_(self.weights.detach(), 1 / self.steps)

    def discard_step(self) -> None:
        """Do nothing: a step that the loss scaler skips has left no trace here."""

    @torch.no_grad()
    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Move all state in place, including the optimizer's. Values are kept."""
        self._sync_pending()
        dtype, device = dtype or self.weights.dtype, device or self.weights.device
        for name, value in vars(self).items():
            if isinstance(value, Tensor | WeightUpdate) and value is not self.weights:
                setattr(self, name, moved(value, dtype, device))
        self.weights.data = self.weights.data.to(device, dtype)
        self._optimizer.follow_weights()
        # Numbers that were given are converted anew, so that float64 does not get what float32 has rounded.
        weights, self._priorities, initial_losses = self._initial_values(dtype, device)
        if self._is_fresh:
            self.weights.copy_(weights)
            self.mean_weights, self.initial_losses = weights, initial_losses

    @torch.no_grad()
    def step(self, norms: Tensor, losses: Tensor, present: Tensor | None = None) -> WeightUpdate:
        """Update the weights once.

        Once every ``L_i(0)`` is known, and with Adam, the host never waits for the device: an unusable update is computed and
        discarded there.

        Args:
            norms: ``n_i`` of the unweighted losses, shape (T,).
            losses: ``L_i``, shape (T,).
            present: the tasks that take part, bool of shape (T,); all by default. One whose norm is exactly 0 does not. An
                absent task keeps its weight and its optimizer state and is left out of the means; the others share the rest.

        Returns:
            The update. It is not taken if a number is not finite, or (unless ``alpha`` is 0) a loss is negative or has never
            been positive; then only `skipped`, `tasks_at_fault` and ``L_i(0)`` of the other tasks change.
        """
        norms, losses = norms.to(self.weights), losses.to(self.weights)
        shown = self._all_present if present is None else present
        present = self._zero_gradients.present(norms, present, may_look=self.syncs_every_step)
        counted = self._all_present if present is None else present
        problems = losses - losses  # 0 if finite, else NaN; a bad norm shows in the weights that result
        if self.alpha > 0:
            problems = problems + losses.clamp(max=0)
        if present is not None:
            problems = torch.where(present, problems, 0.0).masked_fill_(~present.any(), 1.0)

        initial_losses, updates_seen = self.initial_losses, self._updates_seen
        if not self._initial_known and bool((problems == 0).all()):
            initial_losses, updates_seen = self._initial_losses_with(losses, present)
            no_rate = (initial_losses <= 0) & (losses <= 0) & shown
            if self.alpha > 0 and bool(no_rate.any()):
                problems, counted = no_rate.to(problems), shown
                self.initial_losses, self._updates_seen = initial_losses, updates_seen
        weights = self.weights.detach()
        terms = gradnorm_terms(weights, norms, losses, initial_losses, self.alpha, self._priorities, present)
        gradient = terms.gradient if present is None else torch.where(present, terms.gradient, 0.0)
        taken = self._optimizer.step(gradient, problems, present, partial(self._renormalized, present))
        if not self._initial_known and bool(taken):
            self.initial_losses, self._updates_seen = initial_losses, updates_seen
            are_final = (updates_seen >= self._updates_in_initial) & ((initial_losses > 0) | (self.alpha == 0))
            self._initial_known = bool(are_final.all())
        self._is_fresh = False
        self._pending.append(update := WeightUpdate(norms, losses, counted, problems, terms, taken))
        if self.syncs_every_step or len(self._pending) == _MAX_PENDING:
            self._sync_pending()
        return update

    def _renormalized(self, present: Tensor | None, before: Tensor, weights: Tensor) -> Tensor:
        """Apply ``w_i ← max(w_i, min_weight)``, then scale so that the sum is T and absent tasks keep their weights."""
        T = len(self.tasks)
        # The upper bound is out of reach in ordinary steps. If one weight explodes, dividing by the sum would push the others
        # to zero, where no gradient can be measured any more.
        weights = weights.clamp(self.min_weight, _MAX_WEIGHT_SHARE * T)
        if present is None:
            return weights * (T / weights.sum())
        left, had = T - (before * ~present).sum(), (before * present).sum()
        # Both are equal up to rounding, which swallows `left` when the absent tasks hold nearly the whole sum.
        total = torch.where(left > had / 2, left, had)
        return torch.where(present, weights * (total / (weights * present).sum()), before)

    def _initial_losses_with(self, losses: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        present = self._all_present if present is None else present
        counts = present & (self._updates_seen < self._updates_in_initial)
        if self.alpha > 0:
            counts &= (losses > 0) | (self._updates_seen > 0)
        updates_seen = self._updates_seen + counts
        mean = self.initial_losses + (losses - self.initial_losses) / updates_seen.clamp(min=1)
        return torch.where(counts, mean, self.initial_losses), updates_seen

    @property
    def syncs_every_step(self) -> bool:
        """Whether the host reads each update's outcome at once: on a CPU, where there is nothing to wait for."""
        return self.weights.device.type == "cpu"

    @property
    def skipped(self) -> int:
        """Number of updates that were not taken because of an unusable number. Synchronizes with the device."""
        self._sync_pending()
        return self._skipped

    @property
    def tasks_at_fault(self) -> dict[str, float]:
        """Tasks whose numbers prevented an update → their loss in the last such update. Synchronizes with the device."""
        self._sync_pending()
        return self._tasks_at_fault

    def explain_fault(self, task: str, loss: float) -> str:
        """Return why a task's numbers allowed no update."""
        return why_not_updated(task, loss, self.alpha)

    @property
    def tasks_without_gradient(self) -> list[str]:
        """Tasks whose norm has been exactly 0 in the last 50 updates. Synchronizes with the device."""
        return self._zero_gradients.lasting

    @property
    def last(self) -> WeightUpdate | None:
        """The last update that was taken, ``None`` before the first. Synchronizes with the device."""
        self._sync_pending()
        return self._last

    def _sync_pending(self) -> None:
        for update in self._pending:
            if update.taken:
                self._last = update
                continue
            self._skipped += 1
            per_task = zip(self.tasks, update.losses.tolist(), update.tasks_at_fault.tolist(), strict=True)
            self._tasks_at_fault |= {task: loss for task, loss, is_at_fault in per_task if is_at_fault}
        self._pending.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return all state as plain tensors and numbers, loadable with ``torch.load(weights_only=True)``."""
        return {
            "version": _VERSION,
            "tasks": list(self.tasks),
            "weights": self.weights.detach().clone(),
            "optimizer": self._optimizer.state_dict(),
            "initial_losses": self.initial_losses.clone(),
            "updates_seen": self._updates_seen.clone(),
            "weights_mean": self.mean_weights.clone(),
            "steps": self.steps,
            "skipped": self.skipped,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], *, adapt: bool = False) -> None:
        """Load the state of another rule, matched by the tasks' names.

        Args:
            state: what `state_dict` returned.
            adapt: accept a state of other tasks. Known tasks keep theirs and the weights are scaled to sum T; a new task
                starts with the mean of the known weights and an empty optimizer state, and its ``L_i(0)`` is its first loss.

        Raises:
            ValueError: the state is of other tasks and ``adapt`` is False, or of another optimizer or version.
        """
        if state.get("version") != _VERSION:
            raise ValueError(
                f"GradNorm: the checkpoint's state should be of version {_VERSION}; got {state.get('version')!r}. Resume with "
                f"the version of lightning-gradnorm that wrote it."
            )
        known = set(state["tasks"])
        if known != set(self.tasks) and not adapt:
            raise ValueError(
                f"GradNorm: the checkpoint is of tasks {sorted(known)}, but this run has {sorted(self.tasks)}. Resume with the "
                f"same tasks; or with on_task_mismatch='adapt', which keeps what is known and gives new tasks the mean."
            )
        matched = matched_by_task(state, self.tasks)
        is_new = torch.tensor([task not in known for task in self.tasks], device=self.weights.device)

        def scaled(name: str) -> Tensor:
            weights = torch.where(is_new, state[name].mean().to(self.weights), matched[name].to(self.weights))
            return weights if known == set(self.tasks) else weights * (len(self.tasks) / weights.sum())

        self._optimizer.load_state_dict(matched["optimizer"])
        self.weights.copy_(scaled("weights"))
        self.mean_weights = scaled("weights_mean")
        self.initial_losses = torch.where(is_new, self.initial_losses, matched["initial_losses"].to(self.weights))
        self._updates_seen = matched["updates_seen"].to(self.weights)
        self.steps, self._skipped = state["steps"], state["skipped"]
        self._initial_known = self._is_fresh = False
        self._pending.clear()
