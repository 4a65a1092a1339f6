"""Running means over the measured steps of a training, and a summary of them in plain language."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from lightning_gradnorm.gradients import REST, GradientNorms

_CLEAR = -0.05
"""A mean cosine above this is not reported as a conflict."""


class RunningSummary:
    """Sums over the measured steps. A loss that was absent from some steps is averaged over the others.

    Args:
        names: the losses; empty to use those that are found.
        parameters: the name of the parameters they move; ``"shared"``: those they share.

    Example:
        >>> import torch
        >>> summary = RunningSummary(["rul", "hs"], "encoder.fc")
        >>> summary.add(GradientNorms(["rul", "hs"], torch.tensor([[16.0, 0.0], [0.0, 1.0]])), {"rul": 1.0, "hs": 1.0})
        >>> print(summary.sentences("Monitor"))  # doctest: +ELLIPSIS
        Monitor, 1 measured step: `rul` carries 94 % of the update on `encoder.fc`, `hs` 6 %.
        Mean norms: `rul` 4, `hs` 1; the largest is 4 times the smallest.
        Suggested static weights, which make the mean norms equal: FixedWeights({'rul': 0.4, 'hs': 1.6}). A regularizer ...
    """

    def __init__(self, names: Sequence[str] = (), parameters: str = "shared") -> None:
        self.names, self.parameters = tuple(names), parameters
        self.is_of_sum = True
        """Whether the update is a weighted sum of the gradients."""
        self.last: GradientNorms | None = None
        """From the last measured step."""
        self._steps = 0
        self._squared = 0.0
        self._along: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._norms: dict[str, float] = {}
        self._plain_norms: dict[str, float] = {}
        self._cosines: dict[str, dict[str, list[float]]] = {}
        self._not_finite: dict[str, int] = {}

    def add(self, found: GradientNorms, weights: Mapping[str, float]) -> None:
        """Add a measured step: its norms, and the weight that each loss had beyond the model's own coefficient."""
        self.last = found
        wrong = [name for name, norm in found.items() if not math.isfinite(norm)]
        for name in wrong:
            self._not_finite[name] = self._not_finite.get(name, 0) + 1
        if wrong:
            return
        self._steps += 1
        self._squared += float(found.products.sum())
        for name, along in zip(found, found.products.sum(dim=1).tolist(), strict=True):
            plain = found[name] / weights[name] if weights[name] else 0.0
            added = (self._along, along), (self._counts, 1), (self._norms, found[name]), (self._plain_norms, plain)
            for sums, value in added:
                sums[name] = sums.get(name, 0) + value
        for one, other in combinations([name for name in found if name != REST], 2):
            cosine = found.cosine(one, other)
            if math.isfinite(cosine):
                total, count, against = self._cosines.setdefault(one, {}).get(other, (0.0, 0, 0))
                self._cosines[one][other] = [total + cosine, count + 1, against + (cosine < 0)]

    @property
    def conflicts(self) -> dict[tuple[str, str], float]:
        """By pair, the share of the steps so far in which two losses conflict: their cosine is negative."""
        return {
            (one, other): against / count
            for one, row in self._cosines.items()
            for other, (_, count, against) in row.items()
        }

    @property
    def suggested_weights(self) -> dict[str, float]:
        """Static weights, summing to T, that would have made the mean norms of the losses equal."""
        means = {
            name: norm / self._counts[name] for name, norm in self._plain_norms.items() if name != REST and norm > 0
        }
        inverse = sum(1 / mean for mean in means.values())
        return {name: len(means) / (mean * inverse) for name, mean in means.items()}

    def sentences(self, who: str) -> str:
        """Return the summary in plain language. The first sentence begins with ``who``."""
        what = "the update" if self.is_of_sum else "the sum of the gradients, before they are aggregated,"
        where = "the shared parameters" if self.parameters == "shared" else f"`{self.parameters}`"
        if self._steps:
            steps = f"{self._steps} measured step{'s' if self._steps > 1 else ''}"
            lines = [f"{who}, {steps}: {self._update_shares(what, where)}.", self._mean_norms(), *self._conflicts()]
            weights = {name: float(f"{weight:.3g}") for name, weight in self.suggested_weights.items()}
            if len(weights) > 1:
                lines.append(
                    f"Suggested static weights, which make the mean norms equal: FixedWeights({weights}). A regularizer "
                    f"should not become as large as a task: if one is among them, name only the others in losses."
                )
        else:
            lines = [f"{who}: no step was measured: none of the losses has reached {where}, or all of it is frozen."]
        lines += [
            f"In {count} of the measured steps the gradient of `{name}` was not finite; these steps are left out."
            for name, count in self._not_finite.items()
        ]
        return "\n".join(lines)

    def _update_shares(self, what: str, where: str) -> str:
        """Return each loss's share of the update, steps weighted by the squared length of their update."""
        if self._squared <= 0:
            return f"nothing moves {where}, all gradients are zero"
        along = sorted(self._along.items(), key=lambda item: -item[1])
        (first, most), *others = [(_quoted(name), _percent(one / self._squared)) for name, one in along]
        return ", ".join([f"{first} carries {most} of {what} on {where}", *(f"{one} {share}" for one, share in others)])

    def _mean_norms(self) -> str:
        norms = {name: norm / self._counts[name] for name, norm in self._norms.items()}
        shown = ", ".join(f"{_quoted(name)} {norm:.3g}" for name, norm in norms.items())
        losses = [norm for name, norm in norms.items() if name != REST and norm > 0]
        ratio = f"; the largest is {max(losses) / min(losses):.3g} times the smallest" if len(losses) > 1 else ""
        return f"Mean norms: {shown}{ratio}."

    def _conflicts(self) -> list[str]:
        pairs = [
            (total / count, int(against), int(count), one, other)
            for one, row in self._cosines.items()
            for other, (total, count, against) in row.items()
        ]
        return [
            f"`{one}` and `{other}` pull against each other in {against} of {count} step{'s' * (count > 1)} (mean cosine "
            f"{mean:.2f})."
            for mean, against, count, one, other in sorted(pairs)[:3]
            if against and mean < _CLEAR
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, as plain numbers and tensors. The attributes' names are the checkpoint's keys."""
        return {**vars(self), "last": None if self.last is None else (list(self.last), self.last.products)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from these sums."""
        vars(self).update(state)
        self.last = None if state.get("last") is None else GradientNorms(*state["last"])


def _quoted(name: str) -> str:
    return "the rest of the loss" if name == REST else f"`{name}`"


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if abs(percent) >= 1 or percent == 0 else f"{percent:.1g} %"
