"""AMNL, from a book on predictive maintenance (book-ai.org) whose two editions define it differently.

First edition, section 10.2 — the losses are normalized, so each counts by its *relative* change::

    Σ_i λ_i L_i / μ_i        λ_i = 1/T        μ_i = L_i, detached

Its value is always 1, and its gradient is that of ``Σ_i λ_i log L_i``. In section 10.6 ``μ_i`` is the moving average of
``L_i`` with ``beta=0.99``, divided by ``1 − beta^t`` as in Adam.

Second edition, sections 13.4 to 15.1 — the weights are fixed, nothing is normalized, and samples near a failure count more::

    Σ_i λ_i L_i              λ_i = 1/T        L_RUL = mean_b w(y_b) (ŷ_b − y_b)²
    w(y) = 1 + clip(1 − y/125, 0, 1)

a plain mean over the batch (14.1); section 10.3 of the first edition divides by ``Σ_b w(y_b)`` instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.scalarization import Scalarizer

from lightning_gradnorm._messages import check, check_by_task
from lightning_gradnorm.strategies.snapshot import LazyBufferModule


class AMNL(LazyBufferModule, Scalarizer, Stateful):
    """``Σ_i λ_i L_i / μ_i`` (edition 1) or ``Σ_i λ_i L_i`` (edition 2, for use with `FailureBiasedMSE`).

    A loss of exactly zero cannot be divided by and has nothing to improve: in edition 1 its weight is 0 while its ``μ_i`` is 0.
    A loss that is not finite is not hidden: its term is ``λ_i L_i``, and it does not enter the moving average.

    Args:
        edition: of the book.
        weights: ``λ_i`` by task, nonnegative, with sum 1; needs `name_tasks`. Equal by default.
        beta: decay of the moving average that edition 1 divides by, 0.99 in its section 10.6; ``None``: divide by the loss.

    Example:
        However different the losses, equal relative improvements count the same:

        >>> losses = torch.tensor([2000.0, 2.0], requires_grad=True)
        >>> total = AMNL()(losses)
        >>> total.backward()
        >>> total.item(), (losses * losses.grad).tolist()
        (1.0, [0.5, 0.5])
    """

    means: Tensor
    updates: Tensor

    @property
    def remembers(self) -> str:
        """What its state holds."""
        return "" if self.beta is None else "mean losses"

    def __init__(
        self, edition: Literal[1, 2] = 1, weights: Mapping[str, float] | None = None, beta: float | None = None
    ) -> None:
        super().__init__()
        given = [1.0] if weights is None else list(weights.values())
        are_shares = min(given, default=0) >= 0 and math.isclose(sum(given), 1.0, rel_tol=1e-6)
        check("AMNL", edition in (1, 2), "edition", "1 or 2", edition)
        check("AMNL", beta is None or edition == 1, "beta", "None in edition 2, which does not normalize", beta)
        check("AMNL", beta is None or 0.0 <= beta < 1.0, "beta", "at least 0 and less than 1", beta)
        check("AMNL", are_shares, "weights", "numbers that are not negative and sum to 1", weights)
        self.edition = edition
        self.weights = None if weights is None else dict(weights)
        self.beta = beta
        self.tasks: tuple[str, ...] = ()
        self.register_buffer("means", torch.empty(0))  # without the correction for their start at zero
        self.register_buffer("updates", torch.empty(0))

    def name_tasks(self, tasks: Sequence[str]) -> None:
        """Receive the tasks' names in the order of the losses.

        Raises:
            ValueError: ``weights`` are for other tasks.
        """
        if self.weights is not None:
            check_by_task(self.weights, tasks, caller="AMNL", parameter="weights")
        self.tasks = tuple(tasks)

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the total loss of the tasks' losses, shape (T,).

        Raises:
            ValueError: in edition 1, a loss is negative: dividing by it would turn its descent into an ascent.
        """
        weights = self._weights_for(values)
        if self.edition == 2:
            return (weights * values).sum()
        if bool((values < 0).any()):
            raise ValueError(
                f"AMNL: edition 1 divides by the losses, so none may be negative; got {values.tolist()}"
                f"{f' for {list(self.tasks)}' if self.tasks else ''}. Use edition=2, or a loss bounded below by zero."
            )
        normalizers = self._normalizers(values.detach())
        # Terms that are not divided get a divisor of 1: a zero would make the gradient NaN even if masked later.
        usable = (normalizers > 0) & values.detach().isfinite()
        terms = values / torch.where(usable, normalizers, 1.0).to(values)
        return (weights * torch.where(usable | ~values.detach().isfinite(), terms, 0.0)).sum()

    def _weights_for(self, values: Tensor) -> Tensor:
        if self.weights is None:
            return torch.full_like(values, 1 / values.numel())
        if values.shape != (len(self.tasks),):
            raise ValueError(
                f"AMNL: weights are by task and the tasks are {list(self.tasks)}; got losses of shape {tuple(values.shape)}. "
                f"Call name_tasks(['seg', 'depth', …]) with the tasks in their order."
            )
        return values.new_tensor([self.weights[task] for task in self.tasks])

    def _normalizers(self, values: Tensor) -> Tensor:
        if self.beta is None:
            return values
        if self.means.numel() == 0:
            self.means, self.updates = torch.zeros(2, *values.shape, device=values.device)
        if self.means.shape != values.shape:
            raise ValueError(
                f"AMNL: the moving averages are of shape {tuple(self.means.shape)}, the losses of shape "
                f"{tuple(values.shape)}. Call reset() before the tasks change."
            )
        dtype = torch.promote_types(values.dtype, self.means.dtype)  # never in half precision
        means, now = self.means.to(values.device, dtype), values.to(dtype)
        finite = now.isfinite()
        self.means = torch.where(finite, self.beta * means + (1 - self.beta) * now, means)
        self.updates = self.updates.to(values.device) + finite
        corrections = 1 - self.beta ** self.updates.to(dtype)
        return self.means / torch.where(corrections > 0, corrections, 1.0)

    def reset(self) -> None:
        """Forget the moving averages."""
        self.means, self.updates = self.means.new_empty(0), self.updates.new_empty(0)
