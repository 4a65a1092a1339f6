"""One step of the task weights along a gradient, by any torch optimizer, and by Adam without waiting for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradnorm.strategies.optimizers import expectation, made_optimizer, options_of
from lightning_gradnorm.strategies.resuming import ResumeOptions, say, say_what_is_in_force

WeightOptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Constraint = Callable[[Tensor, Tensor], Tensor]


def adam(parameters: Iterable[Tensor], lr: float = 0.025) -> torch.optim.Optimizer:
    """Return the paper's optimizer of the weights: the default of `GradNorm`, `Scalarization` and `Aggregation`.

    This is a function, not a ``functools.partial``, because LightningCLI writes it to its ``config.yaml`` and reads it back.

    Example:
        >>> adam([torch.ones(2, requires_grad=True)]).param_groups[0]["lr"]
        0.025
    """
    return torch.optim.Adam(parameters, lr=lr)


class WeightOptimizer:
    """Updates the weights with any torch optimizer. The host reads whether the step is usable.

    Args:
        weights: shape (T,), a leaf.
        optimizer: of the weights alone.
        given: the options it was created with; its current ones by default.
    """

    def __init__(
        self, weights: Tensor, optimizer: torch.optim.Optimizer, given: Mapping[str, Any] | None = None
    ) -> None:
        self.weights = weights
        self.optimizer = optimizer
        self.given = dict(options_of(optimizer.param_groups[0]) if given is None else given)
        """The options it was created with: a scheduler may have changed them since."""

    def step(self, gradient: Tensor, problems: Tensor, present: Tensor | None, constrain: Constraint) -> Tensor:
        """Take one step and return whether it was taken, a bool tensor; if not, nothing has changed.

        Args:
            gradient: shape (T,).
            problems: shape (T,). A nonzero entry prevents the step, and so does a result that is not finite.
            present: the tasks to update, bool of shape (T,). The others keep their weight and their optimizer state, and have
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
        """Return a copy of the optimizer's state, with its class and the options it was created with."""
        state = copy.deepcopy(self.optimizer.state_dict())
        return {**state, "class": type(self.optimizer).__name__, "given": dict(self.given)}

    def resumed(self, state: Mapping[str, Any], resume_options: ResumeOptions) -> WeightOptimizer:
        """Return a weight optimizer that continues from a state, with the same optimizer. If this raises, nothing changes.

        Args:
            state: what `state_dict` returned.
            resume_options: ``"checkpoint"``: with the options of the state. ``"given"``: with this run's options where they
                differ; the moments are kept if this optimizer has the same ones.

        Raises:
            ValueError: the state is of another kind of optimizer, and its options are to be kept.
        """
        (group,), own = state["param_groups"], self.optimizer.state_dict()["param_groups"][0]
        name = type(self.optimizer).__name__
        # If only one side has extra options, it is another version of torch.
        is_other = state.get("class", name) != name or bool(group.keys() - own.keys() and own.keys() - group.keys())
        prefers_given = resume_options == "given"
        if is_other:
            self._check_other_class(state.get("class", "another optimizer"), resume_options)
        was = state.get("given", options_of(group))
        differing = [option for option in sorted(was.keys() & self.given) if was[option] != self.given[option]]
        for option in differing:
            say_what_is_in_force(f"{option} of the weights' optimizer", was[option], self.given[option], resume_options)
        moments = state["state"]
        if prefers_given and (is_other or differing):
            options = own if is_other else {option: self.given[option] for option in differing}
            group = {**({} if is_other else group), **options, "params": group["params"]}
            fits = (needed := _moments_of(self.optimizer)) is None and not is_other
            if moments and moments[0].keys() != needed and not fits:
                say(f"the moments of the weights' optimizer start over: {name} has different ones from the checkpoint.")
                moments = {}
        kept = self.optimizer.state, self.optimizer.param_groups
        try:
            self.optimizer.load_state_dict({"state": moments, "param_groups": [group]})
            return wrapped(self.weights, self.optimizer, self.given if prefers_given else was)
        except BaseException:
            self.optimizer.state, self.optimizer.param_groups = kept
            raise

    def _check_other_class(self, saved: str, resume_options: ResumeOptions) -> None:
        name = type(self.optimizer).__name__
        if resume_options == "checkpoint":
            raise ValueError(
                f"GradNorm: the checkpoint's weights were moved by {saved}, but this run's optimizer is {name}. Resume with "
                f"the same optimizer=…, or with resume_options='given', which keeps the moments if {name} has the same."
            )
        say_what_is_in_force("the class of the weights' optimizer", saved, name, resume_options)


def _moments_of(optimizer: torch.optim.Optimizer) -> set[str] | None:
    """Return the names of the state that the optimizer keeps for a parameter, from a copy's step; ``None`` if that fails."""
    try:
        trial = copy.deepcopy(optimizer)
        parameter: Tensor = trial.param_groups[0]["params"][0]
        parameter.grad = torch.zeros_like(parameter)
        trial.step()
    except Exception:
        return None
    return set(trial.state[parameter])


class MaskedAdam(WeightOptimizer):
    """Adam (Kingma and Ba, ICLR 2015, Algorithm 1) that never branches on a number of the device.

    Such numbers decide whether a step is usable. Reading them would make the host wait for the GPU in every training step. So
    the step is always computed, and ``torch.where`` selects the outcome.
    """

    def __init__(
        self, weights: Tensor, optimizer: torch.optim.Optimizer, given: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(weights, optimizer, given)
        found = optimizer.state.pop(weights, {})
        averages = [found.get(name, torch.zeros_like(weights)) for name in ("exp_avg", "exp_avg_sq")]
        self._averages = torch.stack(averages).detach().view(2, *weights.shape)  # of the gradient and of its square
        self._next_step = torch.tensor(1.0 + float(found.get("step", 0.0)))
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
        # 1 − βᵗ as −expm1(t log β): in float32, the difference itself would have only four digits at first.
        m, v = (averages / torch.expm1(self._log_decays * self._next_step).neg_()).unbind()
        moved = torch.addcdiv(weights, m, v.sqrt().add_(group["eps"]), value=-float(group["lr"]))
        if present is not None:
            moved = torch.where(present, moved, weights)
        proposed = moved + v
        taken = (problems == proposed - proposed).all()  # the difference is 0 if the result is finite, else NaN
        torch.where(taken, constrain(weights, moved), weights, out=weights)
        self._averages = torch.where(taken, averages, self._averages)
        self._next_step += taken
        return taken

    @override
    def state_dict(self) -> dict[str, Any]:
        steps, (average, squares) = self._next_step - 1, self._averages.clone()
        state = {0: {"step": steps, "exp_avg": average, "exp_avg_sq": squares}} if float(steps) else {}
        return {**super().state_dict(), "state": state}


def make_weight_optimizer(weights: Tensor, factory: WeightOptimizerFactory) -> WeightOptimizer:
    """Return an object that updates the weights with the optimizer from ``factory``.

    Raises:
        TypeError, ValueError: the factory returns something that cannot update them.
    """
    made = made_optimizer(factory, [weights], caller="GradNorm")
    if len(made.param_groups) != 1 or [id(p) for p in made.param_groups[0]["params"]] != [id(weights)]:
        raise ValueError(
            f"{expectation('GradNorm')}; it returned {type(made).__name__} with other parameters. Use the given ones."
        )
    return wrapped(weights, made)


def wrapped(
    weights: Tensor, optimizer: torch.optim.Optimizer, given: Mapping[str, Any] | None = None
) -> WeightOptimizer:
    """Return an object that updates the weights with this optimizer, continuing from its state."""
    return (MaskedAdam if MaskedAdam.supports(optimizer) else WeightOptimizer)(weights, optimizer, given)


def moved(value: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Return a tensor, or a named tuple of tensors, on another device; floating-point ones also with another dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    return type(value)(*(moved(part, dtype, device) for part in value))
