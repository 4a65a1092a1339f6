"""Uncertainty weighting: Kendall, Gal, Cipolla, *Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
and Semantics*, CVPR 2018 (arXiv 1705.07115), Equations 7 and 10.

With ``s_i = log σ_i²`` learned along with the network::

    regression (Equation 7)        L_i / (2σ_i²) + log σ_i  =  ½ exp(−s_i) L_i + ½ s_i
    classification (Equation 10)   L_i / σ_i²    + log σ_i  =    exp(−s_i) L_i + ½ s_i

At the optimum ``σ_i² = L_i`` for regression and ``σ_i² = 2 L_i`` for classification. `torchjd.scalarization.UW` uses only
the first line, for every task.
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torchjd import Stateful
from torchjd.scalarization import Scalarizer

from lightning_gradnorm._messages import did_you_mean


class Uncertainty(Scalarizer, Stateful):
    """``Σ_i c_i exp(−s_i) L_i + ½ s_i``, where ``c_i`` is 1 for a classification and ½ for a regression.

    Give the parameter `log_variance` to an optimizer.

    Args:
        classification: the tasks whose loss is a cross entropy.
        initial: every ``s_i`` at the start; 0 in the paper, -0.5 in LibMTL.

    Example:
        >>> uncertainty = Uncertainty(classification=["seg"])
        >>> uncertainty.name_tasks(["seg", "depth"])
        >>> losses = torch.tensor([1.0, 4.0], requires_grad=True)
        >>> total = uncertainty(losses)
        >>> total.backward()
        >>> losses.grad
        tensor([1.0000, 0.5000])
        >>> uncertainty.log_variance.grad  # ½ − c_i exp(−s_i) L_i: both grow
        tensor([-0.5000, -1.5000])
    """

    remembers = "log variances"
    log_variance: nn.Parameter | None
    coefficients: Tensor

    def __init__(self, classification: Collection[str] = (), initial: float = 0.0) -> None:
        super().__init__()
        if isinstance(classification, str):
            raise TypeError(
                f"Uncertainty: classification should be a collection of tasks; got the string '{classification}'. "
                f"Write ['{classification}']."
            )
        self.classification = tuple(classification)
        self.initial = float(initial)
        self.tasks: tuple[str, ...] = ()
        self.register_parameter("log_variance", None)
        self.register_buffer("coefficients", torch.empty(0), persistent=False)

    def name_tasks(self, tasks: Sequence[str]) -> None:
        """Create `log_variance`, one number per task; if it already exists for these tasks, keep it.

        Raises:
            ValueError: ``classification`` names an unknown task, or there were other tasks before.
        """
        if self.tasks and tuple(tasks) != self.tasks:
            raise ValueError(
                f"Uncertainty: the tasks are {list(self.tasks)}; got {list(tasks)}. Make a new one for them."
            )
        for task in self.classification:
            if task not in tasks:
                raise ValueError(
                    f"Uncertainty: classification names '{task}', which is not a task; {did_you_mean(task, tasks)}"
                )
        if not self.tasks:
            self.tasks = tuple(tasks)
            self.log_variance = nn.Parameter(torch.full((len(tasks),), self.initial))
            self.coefficients = torch.tensor([1.0 if task in self.classification else 0.5 for task in tasks])

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the total loss of the tasks' losses, shape (T,)."""
        s = self.log_variance
        if s is None:
            raise RuntimeError("Uncertainty: it has no tasks yet. Call name_tasks(['seg', 'depth', …]) first.")
        if values.shape != s.shape:
            raise ValueError(f"Uncertainty: it has {len(s)} tasks; got losses of shape {tuple(values.shape)}.")
        return (self.coefficients * torch.exp(-s) * values + 0.5 * s).sum()

    def reset(self) -> None:
        """Reset every ``s_i`` to its initial value."""
        if self.log_variance is not None:
            with torch.no_grad():
                self.log_variance.fill_(self.initial)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(classification={self.classification}, initial={self.initial})"
