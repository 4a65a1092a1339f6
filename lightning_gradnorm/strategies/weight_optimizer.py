"""One step of the task weights along a gradient, by any torch optimizer, and by Adam without waiting for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

WeightOptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Constraint = Callable[[Tensor, Tensor], Tensor]


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
        if all(bool(value.isfinite().all()) for value in (self.weights.detach(), *self._state_tensors().values())):
            return taken
        self.weights.copy_(before)
        if not state_before:
            self.optimizer.state.clear()
        for name, value in state_before.items():
            self._state_tensors()[name].copy_(value)
        return ~taken

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

    Whether a step is usable depends on such numbers, and reading them would make the host wait for the GPU in every training
    step. So the step is computed in any case, and ``torch.where`` selects the outcome.
    """

    def __init__(self, weights: Tensor, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(weights, optimizer)
        self._averages = torch.zeros(2, *weights.shape)  # of the gradient and of its square
        self._next_step = torch.ones(())
        self.follow_weights()

    @override
    def follow_weights(self) -> None:
        self._averages, self._next_step = self._averages.to(self.weights), self._next_step.to(self.weights)
        self._read_betas()

    def _read_betas(self) -> None:
        self._betas = self.optimizer.param_groups[0]["betas"]
        decays = torch.tensor(self._betas, dtype=torch.float64)[:, None]
        self._update_rates, self._log_decays = (1 - decays).to(self._averages), decays.log().to(self._averages)

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
        averages = torch.lerp(self._averages, torch.stack((gradient, gradient * gradient)), self._update_rates)
        if present is not None:
            averages = torch.where(present, averages, self._averages)
        # 1 − βᵗ as −expm1(t log β): in float32, the difference itself would have four digits at first.
        m, v = (averages / torch.expm1(self._log_decays * self._next_step).neg_()).unbind()
        moved = torch.sub(weights, m / v.sqrt().add_(group["eps"]), alpha=float(group["lr"]))
        if present is not None:
            moved = torch.where(present, moved, weights)
        problems = problems + (moved - moved) + (v - v)  # 0 if finite, else NaN
        taken = (problems == 0).all()
        weights.copy_(torch.where(taken, constrain(weights, moved), weights))
        self._averages = torch.where(taken, averages, self._averages)
        self._next_step += taken
        return taken

    @override
    def state_dict(self) -> dict[str, Any]:
        steps, (average, squares) = self._next_step - 1, self._averages.clone()
        state = {0: {"step": steps, "exp_avg": average, "exp_avg_sq": squares}} if float(steps) else {}
        return {**super().state_dict(), "state": state}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._read_betas()
        loaded = self.optimizer.state.pop(self.weights, {})
        self._next_step.fill_(1.0 + float(loaded.get("step", 0.0)))
        self._averages.zero_()
        if loaded:
            self._averages.copy_(torch.stack([loaded["exp_avg"], loaded["exp_avg_sq"]]))


def make_weight_optimizer(weights: Tensor, factory: WeightOptimizerFactory) -> WeightOptimizer:
    """Return what updates the weights with the optimizer that ``factory`` makes.

    Raises:
        TypeError, ValueError: the factory makes something that cannot update them.
    """
    expected = (
        "GradNorm: optimizer should make a torch optimizer of the parameters it is given, as torch.optim.Adam does"
    )
    try:
        made = factory([weights])
    except TypeError as reason:
        raise TypeError(f"{expected}; calling it failed: {reason}") from reason
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"{expected}; it returned {type(made).__name__}")
    if len(made.param_groups) != 1 or [id(p) for p in made.param_groups[0]["params"]] != [id(weights)]:
        raise ValueError(
            f"{expected}; it returned {type(made).__name__} with other parameters. Pass on the given ones."
        )
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError(f"{expected}; LBFGS does not step by their gradient alone but evaluates the loss repeatedly.")
    return (MaskedAdam if MaskedAdam.supports(made) else WeightOptimizer)(weights, made)


def moved(value: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Return a tensor, or a named tuple of them, on another device and with another dtype if it is a floating one."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    return type(value)(*(moved(part, dtype, device) for part in value))
