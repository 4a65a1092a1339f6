"""One step of the task weights along a gradient, by any torch optimizer, and by Adam without waiting for the device.

Whether a step is usable depends on numbers that lie on the device. Branching on them would make the host wait for the GPU in
every training step. `MaskedAdam`, for the paper's optimizer, therefore computes the step in any case and selects the outcome
with ``torch.where``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

WeightOptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Constraint = Callable[[Tensor, Tensor], Tensor]

_CORRECTIONS = ("ones_avg", "ones_avg_sq")
"""State entries of `MaskedAdam` for 1 − βᵗ of both averages, with the rounding they have accumulated."""


def adam(parameters: Iterable[Tensor], lr: float = 0.025) -> torch.optim.Optimizer:
    """Return the paper's optimizer of the weights: the default of `GradNorm`, `Scalarization` and `Aggregation`.

    A function, not a ``functools.partial``, because LightningCLI writes it to its ``config.yaml`` and reads it back.

    Example:
        >>> adam([torch.ones(2, requires_grad=True)]).param_groups[0]["lr"]
        0.025
    """
    return torch.optim.Adam(parameters, lr=lr)


class WeightOptimizer:
    """Updates the weights with any torch optimizer. The host reads whether there is a usable step.

    Args:
        weights: shape (T,), a leaf.
        optimizer: of the weights alone.
    """

    def __init__(self, weights: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.weights = weights
        self.optimizer = optimizer

    def step(self, gradient: Tensor, problems: Tensor, present: Tensor | None, constrain: Constraint) -> Tensor:
        """Take one step and return whether it was taken, a bool tensor; if not, nothing has changed.

        Args:
            gradient: shape (T,).
            problems: shape (T,); a nonzero entry prevents the step, and so does a result that is not finite.
            present: the tasks to update, bool of shape (T,); the others keep their weight and their optimizer state, and have
                0 in ``gradient`` and ``problems``. ``None`` for all.
            constrain: (weights before, weights proposed by the optimizer) → the new weights.
        """
        taken = ((problems == 0) & gradient.isfinite()).all()
        if not taken:
            return taken
        before = self.weights.detach().clone()
        state_before = {name: value.clone() for name, value in self._state_tensors().items()}
        self.weights.grad = gradient.clone()  # its own copy, since an optimizer may modify it
        self.optimizer.step()
        if present is not None:
            self.weights.copy_(torch.where(present, self.weights, before))
            for name, value in self._state_tensors().items():
                if value.shape == self.weights.shape:
                    value.copy_(torch.where(present, value, state_before.get(name, torch.zeros_like(value))))
        self.weights.copy_(constrain(before, self.weights.detach()))
        if not all(bool(value.isfinite().all()) for value in (self.weights.detach(), *self._state_tensors().values())):
            self.weights.copy_(before)
            if not state_before:
                self.optimizer.state.clear()
            for name, value in state_before.items():
                self._state_tensors()[name].copy_(value)
            taken = ~taken
        return taken

    def _state_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state tensors. Entries of shape (T,) are treated as per-task."""
        state = self.optimizer.state.get(self.weights, {})
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def follow_weights(self) -> None:
        """Move the state to the weights' device and precision."""
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # torch casts what it loads

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the optimizer's state."""
        return copy.deepcopy(self.optimizer.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; its tensors become the optimizer's own.

        Raises:
            ValueError: the state is of another kind of optimizer.
        """
        saved, present = (set(one["param_groups"][0]) for one in (state, self.optimizer.state_dict()))
        if saved - present and present - saved:  # only one of the two is another version of torch
            raise ValueError(
                f"GradNorm: the checkpoint is of a weight optimizer with the options {sorted(saved - present)}, which this "
                f"run's {type(self.optimizer).__name__} does not have. Resume with the same optimizer=…"
            )
        self.optimizer.load_state_dict(dict(state))


class MaskedAdam(WeightOptimizer):
    """Adam (Kingma and Ba, ICLR 2015, Algorithm 1) that never branches on a number of the device.

    It averages the gradient and its square. The bias correction 1 − βᵗ is the same average of ones, so all four are rows of
    one matrix and updated together.
    """

    def __init__(self, weights: Tensor, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(weights, optimizer)
        self._averages = torch.zeros(4, *weights.shape)
        """Of the gradient, of its square, and of ones with the decay of both."""
        self._steps = torch.zeros(())
        self.follow_weights()

    @override
    def follow_weights(self) -> None:
        self._averages, self._steps = self._averages.to(self.weights), self._steps.to(self.weights)
        self._ones = torch.ones_like(self.weights, requires_grad=False)
        self._read_betas()

    def _read_betas(self) -> None:
        self._betas = self.optimizer.param_groups[0]["betas"]
        decays = self._ones.new_tensor([*self._betas, *self._betas], dtype=torch.float64)[:, None]
        self._update_rates = (1 - decays).to(self._ones)

    @staticmethod
    def supports(optimizer: torch.optim.Optimizer) -> bool:
        """Return True if this is plain Adam without hooks."""
        if type(optimizer) is not torch.optim.Adam:
            return False
        (group,) = optimizer.param_groups
        extras = ("weight_decay", "amsgrad", "maximize", "capturable", "differentiable", "fused")
        has_numbers = all(isinstance(one, float | int) for one in (group["lr"], *group["betas"]))
        has_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        return has_numbers and not has_hooks and not any(group[name] for name in extras)

    @override
    def step(self, gradient: Tensor, problems: Tensor, present: Tensor | None, constrain: Constraint) -> Tensor:
        weights, (group,) = self.weights.detach(), self.optimizer.param_groups
        if group["betas"] != self._betas:  # a scheduler changed them
            self._read_betas()
            self._averages[2:] = (
                1 - (1 - self._update_rates[2:]) ** self._steps
            )  # as torch, which has no average of ones
        new = torch.stack((gradient, gradient * gradient, self._ones, self._ones))
        averages = torch.lerp(self._averages, new, self._update_rates)
        if present is not None:
            averages[:2] = torch.where(present, averages[:2], self._averages[:2])
        m, v, m_correction, v_correction = averages.unbind()
        direction = (m / m_correction).div_((v / v_correction).sqrt_().add_(group["eps"]))
        moved = torch.sub(weights, direction, alpha=float(group["lr"]))
        if present is not None:
            moved = torch.where(present, moved, weights)
        problems = problems + (moved - moved) + (v - v)  # 0 if finite, else NaN
        taken = (problems == 0).all()
        weights.copy_(torch.where(taken, constrain(weights, moved), weights))
        self._averages = torch.where(taken, averages, self._averages)
        self._steps += taken
        return taken

    @override
    def state_dict(self) -> dict[str, Any]:
        rows = dict(zip(("exp_avg", "exp_avg_sq", *_CORRECTIONS), self._averages.clone(), strict=True))
        # The corrections are the same for all tasks: one number each.
        state = {"step": self._steps.clone(), **rows, **{name: rows[name][0] for name in _CORRECTIONS}}
        return {**super().state_dict(), "state": {0: state} if float(self._steps) else {}}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._read_betas()
        loaded = self.optimizer.state.pop(self.weights, {})
        self._averages.zero_()
        self._steps.zero_()
        if loaded:
            self._steps += float(loaded["step"])
            exact = [1 - beta ** float(loaded["step"]) for beta in self._betas]  # torch's Adam does not save them
            corrections = [float(loaded.get(name, one)) for name, one in zip(_CORRECTIONS, exact, strict=True)]
            rows = (loaded["exp_avg"], loaded["exp_avg_sq"], *(one * self._ones for one in corrections))
            self._averages.copy_(torch.stack([row.to(self._ones) for row in rows]))


def make_weight_optimizer(weights: Tensor, factory: WeightOptimizerFactory) -> WeightOptimizer:
    """Return what updates the weights with the optimizer that ``factory`` makes.

    Raises:
        TypeError, ValueError: the factory makes something that cannot update them.
    """
    expected = "GradNorm: optimizer should make a torch optimizer of the parameters it is given"
    example = "as partial(torch.optim.Adam, lr=0.025) does"
    try:
        made = factory([weights])
    except TypeError as reason:
        raise TypeError(f"{expected}, {example}; calling it failed: {reason}") from reason
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"{expected}, {example}; it returned {type(made).__name__}")
    if not (len(made.param_groups) == 1 and [id(p) for p in made.param_groups[0]["params"]] == [id(weights)]):
        raise ValueError(
            f"{expected}; it returned {type(made).__name__} with other parameters. Pass on those it is given."
        )
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError(f"{expected} and steps by their gradient alone; LBFGS evaluates the loss again and again.")
    return (MaskedAdam if MaskedAdam.supports(made) else WeightOptimizer)(weights, made)
