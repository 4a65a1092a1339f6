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

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradnorm.strategies.weight_optimizer import WeightOptimizer, weight_step

_VERSION = 1
"""Of the layout of `GradNormRule.state_dict`."""
_MOST = 1e6
"""How many times its share of the sum a weight may be before all are scaled."""
_MOST_OPEN = 1000
"""After so many steps the host looks in any case."""


class Balance(NamedTuple):
    """What one step of GradNorm looks at; tensors of shape (T,), NaN in the places of absent tasks."""

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


class Step(NamedTuple):
    """What one step of the weights was given, and what came of it."""

    norms: Tensor
    losses: Tensor
    present: Tensor
    problems: Tensor
    """Not 0 where a loss is not finite, or negative where that matters, shape (T,)."""
    balance: Balance
    """Of no meaning if the step was not taken."""
    taken: Tensor
    """Whether the weights moved: not if there were problems, or a norm or what came of it was not finite; a bool tensor."""

    @property
    def culprits(self) -> Tensor:
        """The tasks because of whose numbers the step was not taken, bool of shape (T,)."""
        bad = self.present & ~((self.problems == 0) & self.norms.isfinite())
        # Where the numbers given are sound, it is what they led to that is not, and all have a part in it.
        return torch.where(bad.any(), bad, self.present) & ~self.taken


def balance(
    weights: Tensor,
    norms: Tensor,
    losses: Tensor,
    initial_losses: Tensor,
    alpha: float,
    priorities: Tensor,
    present: Tensor | None = None,
) -> Balance:
    """Return ``G_i``, ``r_i``, the targets, ``L_grad`` and its gradient for the weights.

    Args:
        weights: ``w_i > 0``, shape (T,).
        norms: ``n_i = ||∇_W L_i||``, of the losses without their weights, shape (T,).
        losses: ``L_i``, shape (T,).
        initial_losses: ``L_i(0)``, shape (T,).
        alpha: the asymmetry; 0 asks for equal gradient norms.
        priorities: ``p_i``, of mean 1; all ones in the paper.
        present: the tasks that take part, bool of shape (T,): all means are over them, and in the places of the others is
            NaN. ``None`` for all.

    Example:
        Two equally large gradients, but the second task has learnt less, so that its weight is to grow:

        >>> one = torch.ones(2)
        >>> balance(one, one, torch.tensor([0.3, 0.9]), one, 1.0, one).gradient
        tensor([ 1., -1.])
    """
    if present is not None:
        norms, losses = (torch.where(present, value, torch.nan) for value in (norms, losses))
        priorities = priorities / _mean(priorities, present)
    grad_norms = weights * norms
    ratios = losses / initial_losses
    rates = ratios / _mean(ratios, present)
    targets = _mean(grad_norms, present) * priorities * rates**alpha
    gaps = grad_norms - targets
    return Balance(grad_norms, rates, targets, gaps.sign() * norms)


def _mean(values: Tensor, present: Tensor | None) -> Tensor:
    return values.mean() if present is None else torch.where(present, values, 0.0).sum() / present.sum()


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
        self._everybody = torch.ones(len(self.tasks), dtype=torch.bool, device=device)
        weights = vector(initial_weights)
        self.weights = (weights * len(self.tasks) / weights.sum()).requires_grad_()
        self._step = weight_step(self.weights, optimizer)
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
        self._skipped = 0
        self._culprits: dict[str, float] = {}
        self._last: Step | None = None
        self._open: list[Step] = []
        """Steps of which the host does not know yet whether they were taken."""

    @property
    def looks_at_once(self) -> bool:
        """Whether the host looks after each step whether it was taken: on a CPU, where there is nothing to wait for."""
        return self.weights.device.type == "cpu"

    @property
    def skipped(self) -> int:
        """How many steps were not taken because of a number that was not finite. A look of the host."""
        self._look()
        return self._skipped

    @property
    def culprits(self) -> dict[str, float]:
        """Tasks because of whose numbers a step was not taken, and their loss in the last such step. A look of the host."""
        self._look()
        return self._culprits

    @property
    def last(self) -> Step | None:
        """The last step that was taken; ``None`` before it. A look of the host."""
        self._look()
        return self._last

    def _look(self) -> None:
        for step in self._open:
            if step.taken:
                self._last = step
                continue
            self._skipped += 1
            losses = dict(zip(self.tasks, step.losses.tolist(), strict=True))
            culprits = zip(self.tasks, step.culprits.tolist(), strict=True)
            self._culprits |= {task: losses[task] for task, is_culprit in culprits if is_culprit}
        self._open.clear()

    @property
    def mean_weights(self) -> Tensor:
        """``E_t[w_i(t)]`` over all steps noted by `note_step`, shape (T,)."""
        return self._weights_mean

    def note_step(self) -> None:
        """Count the weights now in force into their time average."""
        self.steps += 1
        self._weights_mean.lerp_(self.weights.detach(), 1 / self.steps)

    @torch.no_grad()
    def step(self, norms: Tensor, losses: Tensor, present: Tensor | None = None) -> Step:
        """Take one step of the weights (Algorithm 1).

        Once every ``L_i(0)`` is known and with Adam, nothing in it makes the host wait for the device: a step that cannot be
        taken is computed and thrown away.

        Args:
            norms: ``n_i``, shape (T,), of the losses without their weights.
            losses: ``L_i``, shape (T,).
            present: which tasks took part, bool of shape (T,); all by default. An absent task keeps its weight and its
                optimizer state; it takes no part in the means, and the others share what is left of the sum T.

        Returns:
            What was looked at, and whether the step was taken: not if a number was not finite or a loss negative; then
            nothing has changed but `skipped` and `culprits`.

        Raises:
            ValueError: ``L_i(0)`` is not positive, so that there is no training rate (unless ``alpha`` is 0).
        """
        norms, losses = norms.to(self.weights), losses.to(self.weights)
        # 0 for a finite loss; a norm that is not finite shows in the weights it leads to.
        problems = losses - losses
        if self.alpha > 0:
            problems = problems + losses.clamp(max=0)
        if present is not None:
            problems = torch.where(present, problems, 0.0)
            problems = problems.masked_fill_(~present.any(), 1.0)

        initial_losses, updates_seen = self.initial_losses, self._updates_seen
        if not self._initial_known and bool((problems == 0).all()):
            initial_losses, updates_seen = self._initial_losses_with(losses, present)
        weights = self.weights.detach()
        seen = balance(weights, norms, losses, initial_losses, self.alpha, self._priorities, present)
        gradient = seen.gradient if present is None else torch.where(present, seen.gradient, 0.0)
        taken = self._step.move(gradient, problems, present, partial(self._renormalised, present))
        if not self._initial_known and bool(taken):
            self._set_initial_losses(initial_losses, updates_seen)
        step = Step(norms, losses, self._everybody if present is None else present, problems, seen, taken)
        self._open.append(step)
        if self.looks_at_once or len(self._open) == _MOST_OPEN:
            self._look()
        return step

    def _renormalised(self, present: Tensor | None, before: Tensor, weights: Tensor) -> Tensor:
        """``w_i ← max(w_i, min_weight)``, then the present tasks share what the absent ones leave of the sum T."""
        T = len(self.tasks)
        # The upper bound touches nothing in ordinary steps. It holds when one weight has shot up so far that dividing by the
        # sum would push the others to zero, from where no gradient could be measured any more.
        weights = weights.clamp(self.min_weight, _MOST * T)
        if present is None:
            return weights * (T / weights.sum())
        left, had = T - (before * ~present).sum(), (before * present).sum()
        # The two are equal but for rounding, which eats up what is left where the absent tasks have nearly all of it.
        total = torch.where(left > had / 2, left, had)
        return torch.where(present, weights * (total / (weights * present).sum()), before)

    def _initial_losses_with(self, losses: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        present = self._everybody if present is None else present
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
        self.initial_losses, self._updates_seen = initial_losses, updates_seen
        are_all_in = bool((updates_seen >= self._updates_in_initial).all())
        self._initial_known = are_all_in and (self.alpha == 0 or bool((initial_losses > 0).all()))

    def state_dict(self) -> dict[str, Any]:
        """Return all state as plain tensors and numbers, loadable with ``torch.load(weights_only=True)``."""
        return {
            "version": _VERSION,
            "tasks": list(self.tasks),
            "weights": self.weights.detach().clone(),
            "optimizer": self._step.state_dict(),
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
        saved, given = (set(of["param_groups"][0]) for of in (kept, self._step.state_dict()))
        if saved - given and given - saved:  # one of both alone is another version of torch
            raise ValueError(
                f"GradNorm: the checkpoint is of a weight optimizer with the options {sorted(saved - given)}, which this "
                f"run's {type(self._step.optimizer).__name__} does not have. Resume with the same optimizer=…"
            )

        def own(value: Any) -> Any:  # a tensor that the optimizer takes over it would go on to change
            if not isinstance(value, Tensor):
                return value
            return by_task(value) if value.shape == (len(known),) else value.clone()

        moments = {key: {name: own(value) for name, value in of.items()} for key, of in kept["state"].items()}
        self._step.load_state_dict({**kept, "state": moments})
        self.initial_losses = torch.where(
            is_new, self.initial_losses, by_task(state["initial_losses"]).to(self.weights)
        )
        self._updates_seen = by_task(state["updates_seen"]).to(self.weights)
        self._initial_known = False
        self._weights_mean = scaled(state["weights_mean"])
        self.steps = state["steps"]
        self._skipped = state["skipped"]
        self._open.clear()
