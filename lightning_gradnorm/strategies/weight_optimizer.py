"""One step of the task weights along a gradient: by any optimizer of torch, and by Adam without a look of the host.

Whether a step can be taken at all is said by numbers that lie on the device. Whoever branches on them makes the host wait for
the GPU, once in every step of the training. Adam, the paper's optimizer, therefore computes the step in any case and chooses
afterwards, by ``torch.where``; and it is spared what a general optimizer looks after in each step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

WeightOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Constrain = Callable[[Tensor, Tensor], Tensor]

_OF_ONES = ("ones_avg", "ones_avg_sq")
"""Names, in the state of `AdamStep`, of 1 − βᵗ of both averages as it has come about, to the bit."""


class WeightStep:
    """Moves the weights by an optimizer, whatever it is: the host asks whether there is a step to take.

    Args:
        weights: shape (T,), a leaf.
        optimizer: of the weights alone.
    """

    def __init__(self, weights: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.weights = weights
        self.optimizer = optimizer

    def move(self, gradient: Tensor, problems: Tensor, present: Tensor | None, constrain: Constrain) -> Tensor:
        """Take a step, and say whether it was taken, a bool tensor; if not, nothing has changed.

        Args:
            gradient: shape (T,).
            problems: shape (T,); the step is not taken if one is not 0, nor if it leads to a number that is not finite.
            present: the tasks to move, bool of shape (T,); the others keep their weight and what the optimizer knows of
                them, and ``gradient`` and ``problems`` are 0 there. ``None`` for all.
            constrain: returns, of the weights before and those that the optimizer arrives at, those to be in force.
        """
        taken = ((problems == 0) & gradient.isfinite()).all()
        if not taken:
            return taken
        before, kept = self.weights.detach().clone(), {name: value.clone() for name, value in self._kept().items()}
        self.weights.grad = gradient.clone()  # a tensor of its own, which the optimizer may do with as it likes
        self.optimizer.step()
        if present is not None:
            self.weights.copy_(torch.where(present, self.weights, before))
            for name, value in self._kept().items():
                if value.shape == self.weights.shape:
                    value.copy_(torch.where(present, value, kept.get(name, torch.zeros_like(value))))
        self.weights.copy_(constrain(before, self.weights.detach()))
        if not all(bool(value.isfinite().all()) for value in (self.weights.detach(), *self._kept().values())):
            self.weights.copy_(before)
            if not kept:
                self.optimizer.state.clear()
            for name, value in kept.items():
                self._kept()[name].copy_(value)
            taken = ~taken
        return taken

    def _kept(self) -> dict[str, Tensor]:
        """Return what the optimizer keeps; since it may be any, what of it is of a task is known only by its shape."""
        state = self.optimizer.state.get(self.weights, {})
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's, in tensors of its own."""
        return copy.deepcopy(self.optimizer.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it to the optimizer."""
        self.optimizer.load_state_dict(dict(state))


class AdamStep(WeightStep):
    """Adam (Kingma and Ba, ICLR 2015, Algorithm 1) on tensors alone.

    Its two averages are of the gradient and of its square; what it divides them by, 1 − βᵗ, is the same average of ones. So
    four rows of one matrix take their step at once.
    """

    def __init__(self, weights: Tensor, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(weights, optimizer)
        self._averages = torch.zeros(4, *weights.shape, dtype=weights.dtype, device=weights.device)
        """Of the gradient, its square, and of ones with the factors of both."""
        self._steps = torch.zeros((), dtype=weights.dtype, device=weights.device)
        self._ones = torch.ones_like(weights, requires_grad=False)
        self._read_betas()

    def _read_betas(self) -> None:
        self._betas = self.optimizer.param_groups[0]["betas"]
        self._share_of_the_new = 1 - self._ones.new_tensor([*self._betas, *self._betas], dtype=torch.float64)[:, None]
        self._share_of_the_new = self._share_of_the_new.to(self._ones)

    @staticmethod
    def can_do(optimizer: torch.optim.Optimizer) -> bool:
        """Say whether this is plain Adam."""
        if type(optimizer) is not torch.optim.Adam:
            return False
        (group,) = optimizer.param_groups
        others = ("weight_decay", "amsgrad", "maximize", "capturable", "differentiable", "fused")
        is_plain = not any(group[name] for name in others)
        has_numbers = all(isinstance(one, float | int) for one in (group["lr"], *group["betas"]))
        is_watched = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        return is_plain and has_numbers and not is_watched

    @override
    def move(self, gradient: Tensor, problems: Tensor, present: Tensor | None, constrain: Constrain) -> Tensor:
        weights, (group,) = self.weights.detach(), self.optimizer.param_groups
        if group["betas"] != self._betas:  # by a scheduler, which may change lr, too
            self._read_betas()  # and torch takes βᵗ of the new ones
            self._averages[2:] = 1 - (1 - self._share_of_the_new[2:]) ** self._steps
        new = torch.stack((gradient, gradient * gradient, self._ones, self._ones))
        averages = torch.lerp(self._averages, new, self._share_of_the_new)
        if present is not None:
            averages[:2] = torch.where(present, averages[:2], self._averages[:2])
        m, v, of_ones, of_ones_slow = averages.unbind()
        direction = (m / of_ones).div_((v / of_ones_slow).sqrt_().add_(group["eps"]))
        moved = torch.sub(weights, direction, alpha=float(group["lr"]))
        if present is not None:
            moved = torch.where(present, moved, weights)
        # What is not finite has a difference from itself that is not 0.
        problems = problems + (moved - moved) + (v - v)
        taken = (problems == 0).all()
        weights.copy_(torch.where(taken, constrain(weights, moved), weights))
        self._averages = torch.where(taken, averages, self._averages)
        self._steps += taken
        return taken

    @override
    def state_dict(self) -> dict[str, Any]:
        names = ("exp_avg", "exp_avg_sq", *_OF_ONES)
        # What is averaged over ones is the same for all tasks.
        rows = dict(zip(names, self._averages.clone(), strict=True))
        state = {"step": self._steps.clone(), **rows, **{name: rows[name][0] for name in _OF_ONES}}
        return {**super().state_dict(), "state": {0: state} if float(self._steps) else {}}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._read_betas()
        kept = self.optimizer.state.pop(self.weights, {})
        self._averages.zero_()
        self._steps.zero_()
        if kept:
            self._steps += float(kept["step"])
            known = [1 - beta ** float(kept["step"]) for beta in self._betas]  # of a state that another Adam has left
            of_ones = [float(kept.get(name, one)) for name, one in zip(_OF_ONES, known, strict=True)]
            rows = (kept["exp_avg"], kept["exp_avg_sq"], *(one * self._ones for one in of_ones))
            self._averages.copy_(torch.stack([row.to(self._ones) for row in rows]))


def weight_step(weights: Tensor, factory: WeightOptimizer) -> WeightStep:
    """Return what moves the weights by the optimizer that ``factory`` makes.

    Raises:
        TypeError, ValueError: it makes something that would leave them as they are.
    """
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
    return (AdamStep if AdamStep.can_do(made) else WeightStep)(weights, made)
