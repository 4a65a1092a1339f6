"""Any aggregation of the task gradients as a Lightning callback, inside the one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import lightning as L
from torch import Tensor, nn
from torchjd.aggregation import Aggregator, Weighting
from typing_extensions import override

from lightning_gradnorm._messages import check
from lightning_gradnorm.callbacks.packages import is_one_of
from lightning_gradnorm.callbacks.scalarization import LossWeightingCallback, Made
from lightning_gradnorm.engine.aggregation import AtRepresentation
from lightning_gradnorm.engine.measurement import Heads
from lightning_gradnorm.engine.shared_parameters import AtParameters
from lightning_gradnorm.strategies.aggregation import AggregationRule
from lightning_gradnorm.strategies.exact import solver_of
from lightning_gradnorm.strategies.scalarization import OptimizerFactory
from lightning_gradnorm.strategies.weight_optimizer import adam


class Aggregation(LossWeightingCallback[AggregationRule]):
    """Combine the task gradients at the representation, where they meet in the ordinary backward pass, into one gradient.

    Each task's own gradient trains its head. The trunk gets what the aggregator makes of the T gradients that arrive at the
    encoder's output (the setting of MGDA-UB, Sener & Koltun, NeurIPS 2018, section 3.3). This takes one backward pass for any
    aggregator. Nearly all aggregators weight by the Gramian of the gradients. For these we add up the Gramians of all ranks,
    T² numbers, so every rank has the weights that one process would have on the whole batch.

    Args:
        aggregator: a `torchjd.aggregation.Aggregator`, a `Weighting` of the Gramian, or a function that makes one of these
            from the number of tasks, as ``torchjd.aggregation.NashMTL`` does. Our own solvers answer for TorchJD's `NashMTL`,
            `CAGrad`, `FairGrad` and `MGDA`, exactly and in less time, with the same options; those of TorchJD's iterations
            (``optim_niter``, ``max_iters``, ``epsilon``) apply only where ours find no solution. An entrywise aggregator
            (`GradDrop`, `TrimmedMean`) is applied on each rank to that rank's own rows of the representation; so is a matrix
            aggregator of your own, which must not mix numbers of different rows if several ranks are to agree.
        tasks: as for `GradNorm`.
        losses_from: as for `GradNorm`.
        heads: task → dotted name of its head module, where its gradient is read; ``"auto"`` finds them in the first batch;
            ``None``: read it by one first-order pass through each head.
        representation: dotted name of the module whose output the heads read; called once in a forward pass. Not needed
            with ``at="parameters"``.
        at: ``"representation"``; or ``"parameters"``: aggregate the gradients of all parameters that at least two of the
            losses reach, averaged over micro-batches and ranks. This is the textbook method. It works for any network, called
            any number of times, and for losses with derivatives. It takes one pass per task, and a sum over ranks of T copies
            of the gradient.
        scalarizer: weights the losses before their gradients are aggregated, as `Scalarization` does: IMTL is IMTL-G of
            IMTL-L, DB-MTL is ``DBMTL`` of the losses' logarithms. ``None``: no scalarizer.
        optimizer: of the scalarizer's parameters.

    The aggregator does not see a task that is absent from a batch. If an aggregator knows tasks by their place (`NashMTL`,
    `GradVac`, one with a preference vector), such a step does not call it: the tasks that are present keep their weights
    (without weights, their mean is taken). If the aggregator fails, all tasks get equal weights in that step; we count this
    and warn once. With accumulation, each batch is aggregated by itself (``at="parameters"``: their mean).

    Raises:
        ValueError: at the start of training, the aggregator does not work for T tasks, or the representation is not found;
            in the first batch, the tasks share nothing.

    Logs ``balancing/weight/<task>`` (if the aggregator has weights; the scalarizer's are included),
    ``balancing/grad_norm/<task>``, ``balancing/fallbacks`` and, for an aggregator that we solve ourselves,
    ``balancing/handed_over``: the calls in which our solver found no solution and TorchJD's answered.

    Example:
        >>> import lightning as L
        >>> from lightning_gradnorm import Aggregation
        >>> from lightning_gradnorm.strategies import UPGrad
        >>> heads = {"seg": "seg_head", "depth": "depth_head"}
        >>> trainer = L.Trainer(callbacks=[Aggregation(UPGrad(), tasks=list(heads), heads=heads)], logger=False)
    """

    update_is_weighted_sum = False

    def __init__(
        self,
        aggregator: Made,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        *,
        losses_from: str | Mapping[str, str] | None = None,
        heads: Heads = "auto",
        representation: str = "encoder",
        at: Literal["representation", "parameters"] = "representation",
        scalarizer: Made | None = None,
        optimizer: OptimizerFactory = adam,
    ) -> None:
        super().__init__(
            tasks, scalarizer, optimizer, losses_from=losses_from, heads=heads, representation=representation
        )
        check(self._name, at in ("representation", "parameters"), "at", "'representation' or 'parameters'", at)
        self._check_module("aggregator", aggregator)
        if isinstance(aggregator, nn.Module) and not isinstance(aggregator, Aggregator | Weighting):
            raise TypeError(
                f"{self._name}: aggregator should be a torchjd.aggregation.Aggregator or Weighting; got "
                f"{type(aggregator).__name__}. (A function of the losses is a Scalarization.)"
            )
        if scalarizer is not None:
            self._check_module("scalarizer", scalarizer)
        self._aggregator = aggregator
        self.at = at

    @property
    def aggregator(self) -> nn.Module | None:
        """The aggregator in use."""
        if (rule := self._trained._rule) is not None:
            return rule.aggregator
        return self._aggregator if isinstance(self._aggregator, nn.Module) else None

    @override
    def _refuse_unsupported(self, trainer: L.Trainer) -> None:
        super()._refuse_unsupported(trainer)
        if self.at == "parameters" and is_one_of(trainer.strategy, "ModelParallelStrategy"):
            raise ValueError(
                f"{self._name}: at='parameters' needs whole gradients, but ModelParallelStrategy shards them. Use "
                f"at='representation', or strategy='ddp'."
            )

    @override
    def _build_rule(self, like: Tensor) -> AggregationRule:
        aggregator = self._pristine_copy("aggregator", self._aggregator)
        scalarizer = None if self._scalarizer is None else self._pristine_copy("scalarizer", self._scalarizer)
        of_parameters = self.at == "parameters"
        return AggregationRule(
            self._names, aggregator, scalarizer, of_parameters=of_parameters, **self._rule_options(like)
        )

    @override
    def _step_metrics(self) -> dict[str, Tensor | float]:
        shown = super()._step_metrics()
        if solver_of(self.rule.aggregator) is not None:
            shown["balancing/handed_over"] = float(self.rule.handed_over)
        measurement = None if self._engine is None else self._engine.measurement
        if isinstance(measurement, AtRepresentation | AtParameters) and measurement.gramian is not None:
            norms = measurement.gramian.diagonal().clamp(min=0).sqrt()
            shown |= {f"balancing/grad_norm/{task}": norm for task, norm in zip(self._names, norms, strict=True)}
        return shown
