"""Any aggregation of the task gradients as a Lightning callback, inside the one backward pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torchjd.aggregation import Aggregator, Weighting
from typing_extensions import override

from lightning_gradnorm._messages import check
from lightning_gradnorm.callbacks.of_losses import Made, OfLosses, check_made
from lightning_gradnorm.engine.layers import find_module
from lightning_gradnorm.engine.loss_scale import have_scaler_skip, unit
from lightning_gradnorm.engine.ranks import SideChannel, of_first_rank
from lightning_gradnorm.engine.shared_parameters import SharedParameters
from lightning_gradnorm.engine.step_state import Window
from lightning_gradnorm.gradients import GradientReader, JointGradients
from lightning_gradnorm.gradients.graph import node_of
from lightning_gradnorm.strategies.aggregation import AggregationRule
from lightning_gradnorm.strategies.scalarization import OptimizerFactory


class Aggregation(OfLosses):
    """Make one gradient of the tasks' gradients at the representation, where they meet in the ordinary backward pass.

    Each head is trained by its own task's gradient; the trunk by what the aggregator makes of the T gradients that arrive at
    the encoder's output (the setting of MGDA-UB, Sener & Koltun, NeurIPS 2018, section 3.3). One backward pass, whatever the
    aggregator. Where it weights by the Gramian of the gradients, which is nearly always, the Gramians of all ranks are added
    up, T² numbers, and every rank has the weights that one process would have on the whole batch.

    Args:
        aggregator: a `torchjd.aggregation.Aggregator`, a `Weighting` of the Gramian, or what makes one of these from the
            number of tasks, as ``torchjd.aggregation.NashMTL`` does. One that works number by number (`GradDrop`,
            `TrimmedMean`) is applied on each rank to the rank's own rows of the representation; so is a matrix aggregator of
            your own, which then must not mix numbers of different rows if several ranks are to agree.
        tasks: as for `GradNorm`.
        heads: task → dotted name of its head module. With it each gradient is caught on its way out of the head; without
            it, by one first-order pass through each head.
        representation: dotted name of the module whose output the heads read; called once in a forward pass.
        at: ``"representation"``; or ``"parameters"``: aggregate the gradients of all shared parameters, those behind the
            representation, averaged over micro-batches and ranks. That is the textbook's: T passes through the trunk, and a
            sum over ranks of T copies of its gradient.
        scalarizer: weights the losses before their gradients are aggregated, as `Scalarization` does: IMTL is IMTL-G of
            IMTL-L, DB-MTL is ``DBMTL`` of the losses' logarithms. ``None``: not at all.
        optimizer: of the scalarizer's parameters.

    A task that is absent from a batch is left out of what the aggregator sees; an aggregator that remembers tasks by their
    place (`NashMTL`, `GradVac`, one with a preference vector) is not asked in such a step, and the tasks that are there keep
    the weights they had (without weights, their mean is taken). Where the aggregator fails, all tasks are weighted alike in
    that step, which is counted and warned of once. With accumulation each batch is aggregated by itself
    (``at="parameters"``: their mean). With manual optimization and ``at="parameters"`` the gradients are complete when the
    optimizer steps: clip them in ``on_before_optimizer_step``, not before.

    Raises:
        ValueError: at the start of training, if the aggregator cannot be used for T tasks, or the representation cannot be
            found.

    Logs ``balancing/weight/<task>`` (of aggregators that have weights; those of the scalarizer included),
    ``balancing/grad_norm/<task>`` and ``balancing/fallbacks``.

    Example:
        >>> import lightning as L
        >>> from torchjd.aggregation import UPGrad
        >>> from lightning_gradnorm import Aggregation
        >>> heads = {"seg": "seg_head", "depth": "depth_head"}
        >>> trainer = L.Trainer(callbacks=[Aggregation(UPGrad(), tasks=list(heads), heads=heads)], logger=False)
    """

    _rule: AggregationRule | None

    def __init__(
        self,
        aggregator: Made,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        *,
        heads: Mapping[str, str] | None = None,
        representation: str = "encoder",
        at: Literal["representation", "parameters"] = "representation",
        scalarizer: Made | None = None,
        optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=0.025),
    ) -> None:
        super().__init__(tasks, scalarizer, optimizer, heads=heads, representation=representation)
        is_name = isinstance(representation, str)
        check(self._name, is_name, "representation", "a dotted name such as 'encoder'", representation)
        check(self._name, at in ("representation", "parameters"), "at", "'representation' or 'parameters'", at)
        check_made(self._name, "aggregator", aggregator)
        if isinstance(aggregator, nn.Module) and not isinstance(aggregator, Aggregator | Weighting):
            raise TypeError(
                f"{self._name}: aggregator should be a torchjd.aggregation.Aggregator or Weighting; got "
                f"{type(aggregator).__name__}. (A function of the losses is a Scalarization.)"
            )
        if scalarizer is not None:
            check_made(self._name, "scalarizer", scalarizer)
        self._aggregator = aggregator
        self.at = at
        self._side: SideChannel | None = None
        self._shared: SharedParameters | None = None
        self._gramian: Tensor | None = None

    @property
    def aggregator(self) -> nn.Module | None:
        """The aggregator at work."""
        if self._rule is not None:
            return self._rule.aggregator
        return self._aggregator if isinstance(self._aggregator, nn.Module) else None

    @property
    def _aggregates(self) -> AggregationRule:
        assert self._rule is not None
        return self._rule

    @property
    def _joint(self) -> JointGradients:
        assert isinstance(self._reader, JointGradients)
        return self._reader

    # ---- the rule ----------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.at == "parameters" and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"{self._name}: at='parameters' takes whole gradients, of which ModelParallelStrategy keeps pieces. Use "
                f"at='representation', or strategy='ddp'."
            )
        super().on_train_start(trainer, pl_module)
        assert self._hooks is not None
        self._side = SideChannel(trainer)
        self._hooks.callback(self._side.close)
        if self.at == "parameters":
            self._shared = SharedParameters(self._name, self._joint, self._side)

    @override
    def _new_rule(self, like: Tensor) -> AggregationRule:
        return AggregationRule(
            self._names,
            self._fresh("aggregator", self._aggregator),
            None if self._scalarizer is None else self._fresh("scalarizer", self._scalarizer),
            of_parameters=self.at == "parameters",
            optimizer=self.optimizer,
            seed=self._seed,
            dtype=like.dtype,
            device=like.device,
        )

    @override
    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._gramian = None

    @override
    def _remove_hooks(self) -> None:
        super()._remove_hooks()
        self._side = self._shared = None

    # ---- the strategy's answers --------------------------------------------------------------------------------------

    @override
    def _readers(
        self, module: L.LightningModule, W: Mapping[str, nn.Parameter], opened: Collection[nn.Module]
    ) -> list[GradientReader]:
        encoder = find_module(module, self.representation, asked_by=f"{self._name}: representation")
        return [JointGradients(encoder, f"'{self.representation}'", self._names, self._combine)]

    @override
    def _weigh(self, trainer: L.Trainer, module: L.LightningModule, back_propagated: Tensor) -> None:
        super()._weigh(trainer, module, back_propagated)
        joint, current = self._joint, self._pass
        losses = {node_of(loss) for losses in current.losses.values() for loss in losses}
        branches = {node for nodes in current.branches.values() for node in nodes}
        joint.begin(back_propagated, stop=branches if self._at_heads else losses)
        if self._at_heads and losses & set(joint.around):
            raise ValueError(
                f"{self._name}: part of a task's gradient has begun to reach '{self.representation}' by a way that does not "
                f"pass the task's head. Leave heads out: then each loss gets a first-order pass of its own."
            )
        waiting = [task for task in current.losses if task not in current.fired]
        if self._shared is None and joint.was_passed and waiting and joint.is_behind(back_propagated):
            raise ValueError(
                f"{self._name}: the loss of task '{waiting[0]}' has a backward pass of its own, but the gradients of all tasks "
                f"have to come to the representation in one. Call manual_backward with the sum of the losses, or use "
                f"at='parameters'."
            )
        if self._shared is not None:
            self._shared.seek(module)
        elif trainer.world_size > 1 and self._aggregates.input != "matrix" and not joint.is_behind(back_propagated):
            # The others wait at their gates for what this rank, which has no task in this batch, has to add: nothing.
            T = len(self._names)
            self._agree(torch.zeros(T, T, dtype=self._known.loss_weights.dtype), [False] * T)

    def _agree(self, gramian: Tensor, present: Sequence[bool]) -> Tensor:
        """Return the weights λ, from what all ranks together have."""
        assert self._side is not None
        assert self._trainer is not None
        table = torch.cat([gramian, torch.tensor(present, dtype=gramian.dtype)[:, None]], dim=1)
        table = self._side.sum(table)
        self._gramian = table[:, :-1] / self._trainer.world_size**2
        return self._weights_of_all(self._gramian, table[:, -1] > 0)

    def _weights_of_all(self, gramian: Tensor, present: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Return the weights λ that hold for all ranks: rank 0's."""
        assert self._side is not None
        rule = self._aggregates
        rule.weigh_gradients(gramian, present, matrix)
        rule.gradient_weights = self._side.of_first_rank(rule.gradient_weights.cpu()).to(rule.gradient_weights)
        return rule.gradient_weights * present.to(rule.gradient_weights)

    @torch.no_grad()
    def _combine(self, J: Tensor) -> Tensor | None:
        """Return what goes on through the trunk in place of the rows of ``J``. Called within backward."""
        assert self._trainer is not None
        rule, joint = self._aggregates, self._joint
        present = [task in joint.read_tasks for task in self._names]
        if self._shared is not None:
            with self._buffers.through_reading("at parameters"):
                self._shared.read()
            return None
        scale = unit(1, self._trainer)
        if rule.input != "matrix":
            weights = self._agree((J @ J.T / scale**2).cpu(), present)
            return weights.to(J) @ J
        here = torch.tensor(present)
        self._gramian = (J @ J.T / scale**2).cpu()
        if rule.has_weights:
            return rule.weigh_gradients(self._gramian, here, J / scale).to(J) @ J
        return rule.aggregate(J / scale, here, self._trainer.global_rank) * scale

    @override
    def _take_in(self, window: Window, trainer: L.Trainer, module: L.LightningModule) -> bool:
        if self._shared is not None and not self._aggregate_parameters(self._shared, window, trainer):
            self._drop_step()
            return False
        return super()._take_in(window, trainer, module)

    @override
    def _drop_step(self) -> None:
        super()._drop_step()
        if self._shared is not None:
            self._shared.clear()

    @torch.no_grad()
    def _aggregate_parameters(self, shared: SharedParameters, window: Window, trainer: L.Trainer) -> bool:
        """Hand in what the aggregator makes of the shared parameters' gradients.

        Returns:
            Whether it is finite, or there is no loss scaler to skip the step if it is not.
        """
        rule = self._aggregates
        J, present = shared.matrix(self._names, window, rule.loss_weights, trainer)
        shared.clear()
        self._gramian = (J @ J.T).cpu()
        if rule.has_weights:
            stat = None if rule.input != "matrix" else J
            combined = self._weights_of_all(self._gramian, present, stat).to(J) @ J
        else:
            combined = rule.aggregate(J, present)
        combined = of_first_rank(combined, trainer)  # each rank adds it to its own copy of the parameters' gradients
        if not bool(combined.isfinite().all()) and have_scaler_skip(trainer):
            return False
        shared.hand_in(combined)
        return True

    @override
    def _what(self) -> str:
        return type(self._aggregates.aggregator).__name__

    @override
    def _log(self, module: L.LightningModule) -> None:
        super()._log(module)
        if self._gramian is not None:
            norms = self._gramian.diagonal().clamp(min=0).sqrt()
            module.log_dict(
                {f"balancing/grad_norm/{t}": n for t, n in zip(self._names, norms, strict=True)}, on_step=True
            )
