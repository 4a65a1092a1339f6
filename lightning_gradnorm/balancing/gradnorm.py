"""GradNorm: Chen, Badrinarayanan, Lee, Rabinovich, *GradNorm: Gradient Normalization for Adaptive Loss Balancing in
Deep Multitask Networks*, ICML 2018 (arXiv 1711.02257), section 3 and Algorithm 1.

With ``n_i = ||∇_W L_i||₂`` over the last shared layer ``W``, in the paper's symbols::

    G_i      = w_i n_i                                    norm of the weighted gradient
    Ḡ        = mean_i G_i
    r_i      = (L_i / L_i(0)) / mean_j (L_j / L_j(0))     relative inverse training rate: large means slow
    target_i = Ḡ · r_i^alpha                              Equation 1, a constant
    L_grad   = Σ_i |G_i − target_i|                       Equation 2, a function of w alone

Since ``w_i > 0`` the derivative is in closed form, and no second backward pass is needed::

    ∂L_grad / ∂w_i = sign(G_i − target_i) · n_i

One step of an optimizer along it, then ``w ← T · w / Σ w``.
"""  # noqa: D205

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

WeightOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

_VERSION = 1
"""Of the layout of `GradNormRule.state_dict`."""


class Balance(NamedTuple):
    """What one step of GradNorm looks at; tensors of shape (T,), ``loss`` a scalar."""

    grad_norms: Tensor
    """``G_i``"""
    rates: Tensor
    """``r_i``"""
    targets: Tensor
    """``Ḡ · p_i · r_i^alpha``"""
    loss: Tensor
    """``L_grad``"""
    gradient: Tensor
    """``∂L_grad / ∂w_i``"""


class Skipped(NamedTuple):
    """A step that was not taken, because of these tasks' numbers."""

    tasks: tuple[str, ...]


def balance(
    weights: Tensor, norms: Tensor, losses: Tensor, initial_losses: Tensor, alpha: float, priorities: Tensor
) -> Balance:
    """Return ``G_i``, ``r_i``, the targets, ``L_grad`` and its gradient for the weights.

    Args:
        weights: ``w_i > 0``, shape (T,).
        norms: ``n_i = ||∇_W L_i||``, of the losses without their weights, shape (T,).
        losses: ``L_i``, shape (T,).
        initial_losses: ``L_i(0)``, shape (T,).
        alpha: the asymmetry; 0 asks for equal gradient norms.
        priorities: ``p_i``, of mean 1; all ones in the paper.

    Example:
        Two equally large gradients, but the second task has learnt less, so that its weight is to grow:

        >>> one = torch.ones(2)
        >>> balance(one, one, torch.tensor([0.3, 0.9]), one, 1.0, one).gradient
        tensor([ 1., -1.])
    """
    grad_norms = weights * norms
    ratios = losses / initial_losses
    rates = ratios / ratios.mean()
    targets = grad_norms.mean() * priorities * rates**alpha
    gaps = grad_norms - targets
    return Balance(grad_norms, rates, targets, gaps.abs().sum(), gaps.sign() * norms)


def _optimizer_of(weights: Tensor, factory: WeightOptimizer) -> torch.optim.Optimizer:
    """Return the optimizer of the weights, and refuse what would leave them as they are."""
    asked = "GradNorm: optimizer should make a torch optimizer of the parameters it is given"
    try:
        made = factory([weights])
    except TypeError as reason:
        raise TypeError(
            f"{asked}, as partial(torch.optim.Adam, lr=0.025) does; calling it failed: {reason}"
        ) from reason
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"{asked}, as partial(torch.optim.Adam, lr=0.025) does; it returned {type(made).__name__}")
    if not (len(made.param_groups) == 1 and [id(p) for p in made.param_groups[0]["params"]] == [id(weights)]):
        raise ValueError(
            f"{asked}; it returned {type(made).__name__} with other parameters. Hand on those it is given."
        )
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError(f"{asked} and steps by their gradient alone; LBFGS evaluates the loss again and again.")
    return made


class GradNormRule:
    """GradNorm's weights and all that they depend on: `balance`, the weight optimizer, ``L_i(0)``.

    After every `step`, whatever it was given, the weights are positive and sum to T.

    Args:
        tasks: the tasks' names; their order is that of every tensor of shape (T,).
        alpha: the asymmetry.
        optimizer: makes the optimizer of the weights, ``partial(torch.optim.Adam, lr=0.025)`` in the paper.
        initial_losses: how many of a task's first updates ``L_i(0)`` is the mean of (while there are fewer, the mean of
            those so far); or the numbers themselves by task, for example ``{"seg": math.log(13)}``.
        initial_weights: by task; scaled to sum T. Equal by default.
        priorities: by task; scaled to mean 1. Equal by default.
        min_weight: no weight falls below it (before the weights are scaled to sum T again).
        dtype: of the weights.
        device: of the weights.

    Example:
        >>> rule = GradNormRule(["seg", "depth"], alpha=0.0)
        >>> for _ in range(200):
        ...     _ = rule.step(norms=torch.tensor([1.0, 3.0]), losses=torch.ones(2))
        >>> [round(w, 1) for w in rule.weights.tolist()]  # inversely proportional to the norms, summing to 2
        [1.5, 0.5]
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        alpha: float = 1.5,
        optimizer: WeightOptimizer = partial(torch.optim.Adam, lr=0.025),
        initial_losses: int | Mapping[str, float] = 1,
        initial_weights: Mapping[str, float] | None = None,
        priorities: Mapping[str, float] | None = None,
        min_weight: float = 1e-4,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        def vector(numbers: Mapping[str, float] | None) -> Tensor:
            return torch.tensor([1.0 if numbers is None else numbers[t] for t in tasks], dtype=dtype, device=device)

        self.tasks = tuple(tasks)
        self.alpha = alpha
        self.min_weight = min_weight
        self._priorities = vector(priorities)
        self._priorities /= self._priorities.mean()
        weights = vector(initial_weights)
        self.weights = (weights * len(self.tasks) / weights.sum()).requires_grad_()
        self._optimizer = _optimizer_of(self.weights, optimizer)
        if isinstance(initial_losses, int):
            self._updates_in_initial = initial_losses
            self.initial_losses = torch.zeros_like(weights)
        else:
            self._updates_in_initial = 0
            self.initial_losses = vector(initial_losses)
        self._updates_seen = torch.zeros_like(weights)
        self._initial_known = False
        """Whether no later update has a part in ``L_i(0)``, and all of them are positive where that matters."""
        self._weights_mean = self.weights.detach().clone()
        self.steps = 0
        """How many optimizer steps of the network were noted, with and without a step of the weights."""
        self.skipped = 0
        """How many steps were not taken because of a number that was not finite."""

    @property
    def mean_weights(self) -> Tensor:
        """``E_t[w_i(t)]`` over all steps noted by `note_step`, shape (T,)."""
        return self._weights_mean

    def note_step(self) -> None:
        """Count the weights now in force into their time average."""
        self.steps += 1
        self._weights_mean += (self.weights.detach() - self._weights_mean) / self.steps

    @torch.no_grad()
    def step(self, norms: Tensor, losses: Tensor, present: Tensor | None = None) -> Balance | Skipped:
        """Take one step of the weights (Algorithm 1).

        Args:
            norms: ``n_i``, shape (T,), of the losses without their weights.
            losses: ``L_i``, shape (T,).
            present: which tasks took part, bool of shape (T,); all by default. An absent task keeps its weight and its
                optimizer state; it takes no part in the means, and the others share what is left of the sum T.

        Returns:
            What was looked at, NaN in the places of absent tasks; or `Skipped`, if a number was not finite or a loss
            negative: then nothing has changed but the counter ``skipped``.

        Raises:
            ValueError: ``L_i(0)`` is not positive, so that there is no training rate (unless ``alpha`` is 0).
        """
        norms, losses = norms.to(self.weights), losses.to(self.weights)
        # A number that is not finite leaves its mark on the sum, which is one look instead of many.
        if not math.isfinite(float(norms.sum() + losses.sum())) or (self.alpha > 0 and float(losses.min()) < 0):
            usable = norms.isfinite() & losses.isfinite() & ((losses >= 0) | (self.alpha == 0))
            culprits = ~usable if present is None else present & ~usable
            if bool(culprits.any()):
                return self._skip(culprits)
        if present is not None and bool(present.all()):
            present = None
        if present is not None and not bool(present.any()):
            return self._skip(~present)

        initial_losses, updates_seen = self._initial_losses_with(losses, present)
        before = self._snapshot()
        if present is None:
            seen = balance(self.weights, norms, losses, initial_losses, self.alpha, self._priorities)
        else:
            seen = self._balance_of_some(present, norms, losses, initial_losses)
        # A tensor of its own, which the optimizer may do with as it likes; an absent task has no gradient.
        self.weights.grad = seen.gradient.clone() if present is None else torch.where(present, seen.gradient, 0.0)
        self._optimizer.step()
        if present is not None:
            self._keep_absent(before, present)
        self._renormalise(before[0], present)
        if not self._all_finite():
            self._restore(before)
            return self._skip(torch.ones_like(self.weights, dtype=torch.bool) if present is None else present)
        self._set_initial_losses(initial_losses, updates_seen)
        return seen

    def _balance_of_some(self, present: Tensor, norms: Tensor, losses: Tensor, initial_losses: Tensor) -> Balance:
        """Return `balance` among the tasks that are present, NaN in the places of the others."""
        priorities = self._priorities[present]
        seen = balance(
            self.weights[present],
            norms[present],
            losses[present],
            initial_losses[present],
            self.alpha,
            priorities / priorities.mean(),
        )

        def spread(part: Tensor) -> Tensor:
            return torch.full_like(self.weights, torch.nan).masked_scatter_(present, part)

        return Balance(
            spread(seen.grad_norms), spread(seen.rates), spread(seen.targets), seen.loss, spread(seen.gradient)
        )

    def _renormalise(self, before: Tensor, present: Tensor | None) -> None:
        """``w_i ← max(w_i, min_weight)``, then the present tasks share what the absent ones leave of the sum T."""
        T = len(self.tasks)
        total: float | Tensor = T
        if present is not None:
            left, had = T - (before * ~present).sum(), (before * present).sum()
            # The two are equal but for rounding, which eats up what is left where the absent tasks have nearly all of it.
            total = torch.where(left > had / 2, left, had)
        # The second, lower bound touches nothing in ordinary steps. It holds when one weight has shot up so far that
        # dividing by the sum would push the others to zero, from where no gradient could be measured any more.
        for least in (self.min_weight, self.min_weight / T):
            shared = self.weights.clamp(min=least)
            if present is not None:
                shared *= present
            shared *= total / shared.sum()
            self.weights.copy_(shared if present is None else torch.where(present, shared, self.weights))

    def _initial_losses_with(self, losses: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._initial_known:
            return self.initial_losses, self._updates_seen
        present = torch.ones_like(losses, dtype=torch.bool) if present is None else present
        counts = present & (self._updates_seen < self._updates_in_initial)
        updates_seen = self._updates_seen + counts
        mean = self.initial_losses + (losses - self.initial_losses) / updates_seen.clamp(min=1)
        initial_losses = torch.where(counts, mean, self.initial_losses)
        if self.alpha > 0 and bool((present & (initial_losses <= 0)).any()):
            index = int((present & (initial_losses <= 0)).nonzero()[0])
            raise ValueError(
                f"GradNorm: the initial loss of task '{self.tasks[index]}' should be positive, since training rates "
                f"divide by it; got {initial_losses[index].item()}. Give a number that fits the loss, for example "
                f"initial_losses={{'{self.tasks[index]}': 1.0, …}}, or use alpha=0, which needs no rates."
            )
        return initial_losses, updates_seen

    def _set_initial_losses(self, initial_losses: Tensor, updates_seen: Tensor) -> None:
        if self._initial_known:
            return
        self.initial_losses, self._updates_seen = initial_losses, updates_seen
        are_all_in = bool((updates_seen >= self._updates_in_initial).all())
        self._initial_known = are_all_in and (self.alpha == 0 or bool((initial_losses > 0).all()))

    def _skip(self, culprits: Tensor) -> Skipped:
        self.skipped += 1
        return Skipped(
            tuple(task for task, is_culprit in zip(self.tasks, culprits.tolist(), strict=True) if is_culprit)
        )

    # The optimizer is the user's choice, so that what it keeps for each weight is known only by its shape.
    def _optimizer_tensors(self) -> dict[str, Tensor]:
        kept = self._optimizer.state.get(self.weights, {})
        return {name: value for name, value in kept.items() if isinstance(value, Tensor)}

    def _snapshot(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self.weights.detach().clone(), {name: value.clone() for name, value in self._optimizer_tensors().items()}

    def _restore(self, snapshot: tuple[Tensor, dict[str, Tensor]]) -> None:
        weights, kept = snapshot
        self.weights.copy_(weights)
        if not kept:
            self._optimizer.state.clear()
        for name, value in kept.items():
            self._optimizer_tensors()[name].copy_(value)

    def _keep_absent(self, before: tuple[Tensor, dict[str, Tensor]], present: Tensor) -> None:
        if bool(present.all()):
            return
        weights, kept = before
        self.weights.copy_(torch.where(present, self.weights, weights))
        for name, value in self._optimizer_tensors().items():
            if value.shape == self.weights.shape:
                value.copy_(torch.where(present, value, kept.get(name, torch.zeros_like(value))))

    def _all_finite(self) -> bool:
        values = (self.weights.detach(), *self._optimizer_tensors().values())
        return all(math.isfinite(float(value.sum())) or bool(value.isfinite().all()) for value in values)

    def state_dict(self) -> dict[str, Any]:
        """Return all state as plain tensors and numbers, loadable with ``torch.load(weights_only=True)``."""
        return {
            "version": _VERSION,
            "tasks": list(self.tasks),
            "weights": self.weights.detach().clone(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),  # not the tensors that go on changing
            "initial_losses": self.initial_losses.clone(),
            "updates_seen": self._updates_seen.clone(),
            "weights_mean": self._weights_mean.clone(),
            "steps": self.steps,
            "skipped": self.skipped,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], *, adapt: bool = False) -> None:
        """Take over the state of another rule, matched by the tasks' names.

        Args:
            state: what `state_dict` has returned.
            adapt: take it over also if it is of other tasks. What is known of a task stays, and the weights are scaled to
                sum T again; a new task begins with the mean of the known weights, with an optimizer state of zero, and
                ``L_i(0)`` is what it shows first.

        Raises:
            ValueError: the state is that of other tasks, and ``adapt`` is false; or of another optimizer or version.
        """
        if state.get("version") != _VERSION:
            raise ValueError(
                f"GradNorm: the checkpoint's state should be of version {_VERSION}; got {state.get('version')!r}. "
                f"Resume with the version of lightning-gradnorm that wrote it."
            )
        known = list(state["tasks"])
        if set(known) != set(self.tasks) and not adapt:
            raise ValueError(
                f"GradNorm: the checkpoint is of tasks {sorted(known)}, but this run has {sorted(self.tasks)}. Resume with the "
                f"same tasks; or with on_task_mismatch='adapt', which keeps what is known and gives new tasks the mean."
            )
        # A task that is not known takes what stands behind the last of the known.
        order = [known.index(task) if task in known else len(known) for task in self.tasks]
        is_new = torch.tensor([task not in known for task in self.tasks], device=self.weights.device)

        def by_task(value: Tensor, of_new: float | Tensor = 0.0) -> Tensor:
            return torch.cat([value, value.new_zeros(1) + of_new])[order].to(self.weights.device)

        def scaled(weights: Tensor) -> Tensor:
            adapted = by_task(weights, weights.mean()).to(self.weights)
            return adapted if set(known) == set(self.tasks) else adapted * (len(self.tasks) / adapted.sum())

        self.weights.copy_(scaled(state["weights"]))
        kept = state["optimizer"]
        saved, given = (set(of["param_groups"][0]) for of in (kept, self._optimizer.state_dict()))
        if saved - given and given - saved:  # one of both alone is another version of torch
            raise ValueError(
                f"GradNorm: the checkpoint is of a weight optimizer with the options {sorted(saved - given)}, which this "
                f"run's {type(self._optimizer).__name__} does not have. Resume with the same optimizer=…"
            )

        def own(value: Any) -> Any:  # a tensor that the optimizer takes over it would go on to change
            if not isinstance(value, Tensor):
                return value
            return by_task(value) if value.shape == (len(known),) else value.clone()

        moments = {key: {name: own(value) for name, value in of.items()} for key, of in kept["state"].items()}
        self._optimizer.load_state_dict({**kept, "state": moments})
        self.initial_losses = torch.where(
            is_new, self.initial_losses, by_task(state["initial_losses"]).to(self.weights)
        )
        self._updates_seen = by_task(state["updates_seen"]).to(self.weights)
        self._initial_known = False
        self._weights_mean = scaled(state["weights_mean"])
        self.steps = state["steps"]
        self.skipped = state["skipped"]
