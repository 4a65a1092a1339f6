"""Weights in closed form from gradient norms, as a Lightning callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor
from typing_extensions import override

from lightning_gradnorm.callbacks.norms import NormCallback
from lightning_gradnorm.engine.layers import ALL
from lightning_gradnorm.engine.measurement import Heads
from lightning_gradnorm.strategies.norm_weighting import NormFormula, NormWeightingRule, check_formula


class NormWeighting(NormCallback[NormWeightingRule]):
    """Weight each task by a formula of the gradient norms: for composite losses, with or without heads.

    The norms are those of one process on the whole batch: gradients are averaged over ranks and micro-batches before their
    norms are taken. Losses made of derivatives, as in physics-informed networks, need nothing special.

    Args:
        rule: the formula: `InverseNorm`, `LRAnnealing`, `NTKWeights`, or a `NormFormula` of your own.
        tasks: as for `GradNorm`.
        shared_layer: the parameters of the gradients: dotted name of a module or a parameter; a list of such names; ``"all"``:
            all trained parameters, by one first-order pass from each loss. ``None``: as in the formula's source, ``"all"`` for
            `LRAnnealing` and `NTKWeights`; for others the deepest trained weight that all losses of the first batch depend
            on.
        heads: as for `GradNorm`.
        losses_from: as for `GradNorm`.
        norm_of: ``"weight"``; or ``"activation"``: norms of gradients at the ``representation``, for Euclidean norms only.
        representation: for ``norm_of="activation"``, the module whose output the losses are computed from.

    Raises:
        TypeError: ``rule`` is not a formula.
        ValueError: an argument is out of range; or, at the start of training, the model lacks a layer or a task.

    Logs ``balancing/weight/<task>``; ``balancing/skipped``, the number of updates skipped because a number was not finite;
    and, for formulas of Euclidean norms, ``balancing/grad_norm/<task>``, ``n_i`` of the last update, unweighted.

    Example:
        >>> import lightning as L
        >>> from lightning_gradnorm import InverseNorm, NormWeighting
        >>> balancing = NormWeighting(InverseNorm(ema=0.99), tasks=["reconstruction", "kl"])
        >>> trainer = L.Trainer(callbacks=[balancing], logger=False)
    """

    def __init__(
        self,
        rule: NormFormula,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        *,
        shared_layer: str | Sequence[str] | None = None,
        heads: Heads = "auto",
        losses_from: str | Mapping[str, str] | None = None,
        norm_of: Literal["weight", "activation"] = "weight",
        representation: str = "encoder",
    ) -> None:
        check_formula(rule)
        if shared_layer is None and norm_of == "weight" and rule.of_all_parameters:
            shared_layer = ALL
        super().__init__(
            tasks,
            losses_from=losses_from,
            heads=heads,
            shared_layer=shared_layer,
            norm_of=norm_of,
            representation=representation,
        )
        self._formula = rule
        is_euclidean = tuple(rule.norms) == ("l2",)
        if norm_of == "activation" and not is_euclidean:
            raise ValueError(
                f"NormWeighting: norm_of='activation' supports only Euclidean norms, but {rule} uses another. Use "
                f"norm_of='weight', or LRAnnealing(norm='l2')."
            )
        if self._names:
            rule.check_tasks(self._names)

    @override
    def _build_rule(self, like: Tensor) -> NormWeightingRule:
        return NormWeightingRule(self._names, self._formula, dtype=like.dtype, device=like.device)

    @override
    def _step_metrics(self) -> dict[str, Tensor | float]:
        rule = self.rule
        shown = self._named("balancing/weight", rule.weights.clone()) | {"balancing/skipped": float(rule.skipped)}
        if rule.last is not None and tuple(rule.norms) == ("l2",):
            shown |= self._named("balancing/grad_norm", rule.last.norms)
        return shown
