"""`Balancer`: any balancing rule in a training loop of your own, in Fabric, Accelerate or Hugging Face's Trainer."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_gradnorm.engine.argument_checks import (
    check_arguments,
    check_heads,
    check_losses,
    check_losses_after_step,
    check_names,
    require_agreement,
)
from lightning_gradnorm.engine.balanced import claim, require_unbalanced
from lightning_gradnorm.engine.engine import Engine
from lightning_gradnorm.engine.graph_checks import require_backpropagated
from lightning_gradnorm.engine.measurement import Heads, Setting
from lightning_gradnorm.engine.plain_loop import PlainLoop, call_after_backward, scaler_has_skipped, unwrap_model
from lightning_gradnorm.engine.rule import Rule
from lightning_gradnorm.engine.step_state import WatchedLoss


class Balancer:
    """Balances the losses of a model in any training loop.

    Multiplies the gradient of each task loss by the task's weight on its way into the network; the rule learns from these
    gradients. Distributed training gives the result of one process on the concatenated batch. Ranks come from
    ``torch.distributed``: initialize it first.

    Args:
        model: the network; one wrapped by DDP or Fabric is unwrapped. Move it to its device first.
        rule: how to balance, for example `GradNormRule(["seg", "depth"])`, `NormWeightingRule`, `AggregationRule`.
        shared_layer: dotted name of the last shared layer ``W``, for rules that need gradient norms: a module (its
            ``weight``; the last trained weight inside it if it contains modules) or a parameter; a list of them; or ``"all"``
            trained parameters, read at the losses. ``None``: the deepest trained weight that all losses of the first batch
            depend on. The weights do not move while this layer is frozen.
        heads: task → dotted name of its head, where its gradient is read during the ordinary backward pass. ``"auto"``
            finds the heads in the first batch. A task without a head gets a first-order pass from its loss: the same numbers.
        representation: dotted name of the module whose output the heads read, for aggregations.
        norm_of: ``"weight"`` for norms of ``∇_W L_i``, as in the paper; ``"activation"`` for norms at the representation.

    Raises:
        TypeError: ``rule`` is not a rule.
        ValueError: the model lacks a layer or already has a Balancer, or the ranks disagree.

    Example:
        >>> from lightning_gradnorm import Balancer
        >>> from lightning_gradnorm.strategies import GradNormRule
        >>> encoder, heads = nn.Linear(3, 4), nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
        >>> model = nn.ModuleDict({"encoder": encoder, "heads": heads})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Balancer(model, GradNormRule(["a", "b"]), shared_layer="encoder") as balancer:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         z = encoder(torch.ones(2, 3))
        ...         balancer.backward({task: head(z).square().mean() for task, head in heads.items()})
        ...         optimizer.step()
        ...         balancer.step()
        >>> round(sum(balancer.weights.values()), 5)
        2.0
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        *,
        shared_layer: str | Sequence[str] | None = None,
        heads: Heads = "auto",
        representation: str = "encoder",
        norm_of: Literal["weight", "activation"] = "weight",
    ) -> None:
        check_arguments(model, rule, shared_layer, heads, norm_of)
        self.rule = rule
        self._model = unwrap_model(model)
        named = dict(sorted(heads.items())) if isinstance(heads, Mapping) else heads
        self._loop = PlainLoop(self._model)
        setting = Setting("Balancer", self._model, self._loop, rule.tasks, shared_layer, named, representation, norm_of)
        # Before anything that may fail on one rank alone and leave the others waiting.
        require_agreement(setting, rule)
        key = getattr(self._model, "_orig_mod", self._model)  # what torch.compile has wrapped
        require_unbalanced(key, caller="Balancer")
        check_heads(named, rule.tasks, caller="Balancer")
        parameter = next((p for p in self._model.parameters() if p.is_floating_point()), torch.zeros(()))
        rule.to(dtype=torch.float64 if parameter.dtype == torch.float64 else None, device=parameter.device)
        self._engine: Engine[Rule] = Engine(rule, setting)
        self._closed, self._epoch = False, 0
        self._recovery = _Recovery(self._forget_step)
        self._release_claim = claim(key, caller="Balancer", rule=type(rule).__name__)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def watch(self, losses: Mapping[str, Tensor | None]) -> None:
        """Balance these losses in the next backward pass. Use it where you create losses away from that pass.

        Args:
            losses: task → loss of any shape, for some or all tasks. Pass the very tensors that make up the back-propagated
                loss. ``None``, or no entry by the time of the backward pass: the task is absent from this batch.

        Raises:
            ValueError: a name is not a task, or a loss carries no gradient.
        """
        self._require_open()
        if not torch.is_grad_enabled():
            return  # an evaluation
        if self._engine.inspection.reads_gradients and not self._model.training:
            raise RuntimeError(
                "Balancer: the model is in evaluation mode, in which its calls are not recorded. Call model.train() before the "
                "forward pass; single layers, such as a frozen batch norm, may stay in evaluation mode."
            )
        with self._recovery:
            check_losses(losses, self.rule.tasks, self._engine.batch.losses)
            self._engine.watch(losses)

    def backward(
        self,
        losses: Mapping[str, Tensor | None] | None = None,
        *,
        loss: Tensor | None = None,
        backward: Callable[[Tensor], Any] | None = None,
    ) -> None:
        """Back-propagate the losses. Several calls before one `step` accumulate.

        Args:
            losses: as for `watch`; leave it out if you called `watch`.
            loss: what to back-propagate if it is more than the sum of the losses, with coefficients or regularizers.
            backward: what back-propagates it: ``fabric.backward``, ``accelerator.backward``, or
                ``lambda loss: scaler.scale(loss).backward()``. To average over micro-batches, divide here, not in the losses.

        Raises:
            ValueError: there are no losses, or the backward pass did not reach one of them.
            RuntimeError: gradients are off.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("Balancer: backward was called under torch.no_grad(), without a graph. Call it outside.")
        total = self.prepare_loss(losses, loss=loss)
        self._loop.is_inside_call = True
        try:
            with self._recovery:
                (Tensor.backward if backward is None else backward)(total)
        finally:
            self._loop.is_inside_call = False
        self._finish_backward()

    def prepare_loss(self, losses: Mapping[str, Tensor | None] | None = None, *, loss: Tensor | None = None) -> Tensor:
        """Return the loss for someone else to back-propagate, such as Hugging Face's Trainer. Arguments as for `backward`.

        Back-propagate it once before the next call of the model. Without gradients it is the plain sum, or ``loss``.
        """
        self._require_open()
        if not torch.is_grad_enabled() and (losses or loss is not None):
            return _sum(losses or {}) if loss is None else loss
        with self._recovery:
            return self._prepare_loss(losses, loss)

    def _prepare_loss(self, losses: Mapping[str, Tensor | None] | None, loss: Tensor | None) -> Tensor:
        _require_finished_pass(self._engine)
        if losses is not None:
            self.watch(losses)
        watched = self._engine.batch.losses
        if not watched and (loss is None or self._loop.ranks.size == 1):
            raise ValueError(
                f"Balancer: backward needs the losses, a mapping from task to loss for {list(self.rule.tasks)}; got none. Give "
                f"them to backward, or to watch before it."
            )
        total = _sum_of_watched(watched) if loss is None else loss
        if not total.requires_grad:
            raise ValueError("Balancer: loss should be part of the graph, but it carries no gradient.")
        # A separate node, whose gradient is the factor that a scaler or a division applies to the whole loss. On the tensor
        # itself, which may be a task's loss, the hook would see the weighted gradient.
        total = total.view_as(total)
        self._begin_epoch()
        total.register_hook(self._on_backward_start)  # type: ignore[no-untyped-call]
        self._engine.before_backward(total)
        return total

    def _on_backward_start(self, scale: Tensor) -> None:
        if not self._engine.batch.in_backward:
            raise RuntimeError(
                "Balancer: a loss from prepare_loss is back-propagated for the second time. Prepare it again."
            )
        self._loop.scales.append(scale.detach())
        if not self._loop.is_inside_call:
            # Whoever back-propagates does not tell us when they are done. DDP uses the same hook for this.
            call_after_backward(self._finish_backward)

    def _finish_backward(self) -> None:
        with self._recovery:
            self._engine.after_backward()
            _require_one_pass(self._loop.finish_pass(is_repeated=self._engine.batch.is_repeated))
            self._loop.note_losses(self._engine.batch.losses)
            require_backpropagated(self._engine.batch.losses, self._engine.batch.backpropagated, caller="Balancer")
        self._engine.start_batch()
        if self._engine.inspection.news() is not None and self._loop.ranks.index == 0:
            logging.getLogger("lightning_gradnorm").info("%r", self)

    def _forget_step(self) -> None:
        self._engine.start_batch()
        self._engine.start_step()
        self._loop.forget_passes()

    def step(
        self,
        *,
        scaler: torch.amp.GradScaler | None = None,
        skipped: bool = False,
        losses_after_step: Callable[[], Mapping[str, Tensor | None]] | None = None,
    ) -> None:
        """Update the weights. Call it after each ``optimizer.step()``, on all ranks.

        Args:
            scaler: the GradScaler, if you use one; call this before ``scaler.update()``. A step that it skips is not
                counted.
            skipped: True if another scaler has skipped the step: ``optimizer.step_was_skipped`` in Accelerate.
            losses_after_step: returns the losses of the same batch, recomputed after the optimizer's step; for rules that
                need them, such as FAMO.

        Raises:
            ValueError: the rule needs ``losses_after_step``.
            RuntimeError: no backward pass since the last step, or the scaler is already updated.
        """
        self._require_open()
        if not self._engine.pending_backwards:
            raise RuntimeError(
                "Balancer: step was called without a backward pass since the last step. Call balancer.backward(losses) first."
            )
        skipped = skipped or (scaler is not None and scaler_has_skipped(scaler, caller="Balancer"))
        check_losses_after_step(self.rule, losses_after_step)
        self._engine.finish_step(skipped=skipped)
        self._loop.finish_step(self.rule.tasks, self._engine.measurement)
        needs_them = getattr(self.rule, "needs_losses_after_step", False)
        if needs_them and losses_after_step is not None and self._engine.step_was_taken:
            with torch.no_grad():
                found = losses_after_step()
            check_names(found, self.rule.tasks, "losses_after_step")
            self._engine.measurement.update_after_step({task: [loss] for task, loss in found.items()})

    def end_epoch(self) -> None:
        """Tell rules that work by epochs, such as DWA, that an epoch is over. Call it before saving the state."""
        self._epoch += 1
        self._begin_epoch()
        self._engine.measurement.end_epoch()

    def _begin_epoch(self) -> None:
        if hasattr(self.rule, "begin_epoch"):
            self.rule.begin_epoch(self._epoch)

    # ---- what you read -----------------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, float]:
        """The current weights by task; empty for an aggregation that is not a weighted sum."""
        self._engine.measurement.warn()
        return self._by_task(self.rule.weights) if getattr(self.rule, "has_weights", True) else {}

    @property
    def mean_weights(self) -> dict[str, float]:
        """Mean weights over the steps so far, for rules that keep them: the paper trains "GradNorm static" with these."""
        if not hasattr(self.rule, "mean_weights"):
            raise AttributeError(f"Balancer: {type(self.rule).__name__} keeps no mean_weights, only weights.")
        return self._by_task(self.rule.mean_weights)

    def _by_task(self, weights: Tensor) -> dict[str, float]:
        return dict(zip(self.rule.tasks, weights.detach().tolist(), strict=True))

    def __repr__(self) -> str:
        balanced = f"{type(self.rule).__name__}{list(self.rule.tasks)}"
        inspection = self._engine.inspection
        if not inspection.reads_gradients:
            return f"Balancer({balanced})"
        return (
            f"Balancer({balanced}, {str(inspection.plan) or 'where to read the gradients is found in the first batch'})"
        )

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all state as plain tensors and numbers, the same as a callback of this strategy."""
        return self.rule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state belongs to other tasks or to another strategy.
            RuntimeError: called between a backward pass and its step.
        """
        self._require_open()
        _require_no_pending_step(self._engine, "load_state_dict")
        _load_state(self.rule, state)
        self._epoch = state.get("epoch") or 0
        self._forget_step()

    def close(self) -> None:
        """Remove everything from the model and leave it as it was. You can still read the weights.

        Raises:
            RuntimeError: called between a backward pass and its step, which would lose its measurement.
        """
        if not self._closed:
            _require_no_pending_step(self._engine, "close")
            self._release()

    def _release(self) -> None:
        self._closed = True
        self._engine.close()
        self._release_claim()

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("Balancer: it is closed. Make a new one.")

    def __enter__(self) -> Balancer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            self._release()  # whatever was pending is lost with the error


class _Recovery:
    """After an error in the block, forgets this batch and step: whoever catches it continues with new gradients.

    One object serves every block of every step; a generator would serve only one.
    """

    def __init__(self, forget: Callable[[], None]) -> None:
        self._forget = forget

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        if kind is not None:
            self._forget()


def _sum(losses: Mapping[str, Tensor | list[Tensor] | None]) -> Tensor:
    """Return the sum of the losses that are present, several for a task if need be; a loss with several values is averaged."""
    each = [one for of_task in losses.values() for one in (of_task if isinstance(of_task, list) else [of_task])]
    kept = [one for one in each if one is not None and not (isinstance(one, Tensor) and one.numel() == 0)]
    return functools.reduce(operator.add, map(_mean, kept)) if kept else torch.zeros(())


def _mean(loss: Tensor | float) -> Tensor:
    if not isinstance(loss, Tensor):
        return torch.tensor(float(loss))
    return loss.mean() if loss.ndim else loss  # a mean of one number would be another node to pass


def _sum_of_watched(watched: Mapping[str, list[WatchedLoss]]) -> Tensor:
    changed = [task for task, of_task in watched.items() if any(one.has_changed for one in of_task)]
    if changed:
        raise ValueError(
            f"Balancer: the loss of task '{changed[0]}' has been changed in place since it was shown (as by loss += …). "
            f"Give the sum that you want as loss=…, or write loss = loss + …"
        )
    return _sum({task: [one.tensor for one in of_task] for task, of_task in watched.items()})


def _load_state(rule: Rule, state: Mapping[str, Any]) -> None:
    try:
        rule.load_state_dict(state)
    except KeyError as error:
        kind = type(rule).__name__
        raise ValueError(f"Balancer: state should be from a {kind}; got one without {error}.") from error


def _require_finished_pass(engine: Engine[Rule]) -> None:
    if engine.batch.in_backward:
        raise RuntimeError(
            "Balancer: the loss that prepare_loss returned last has not been back-propagated to its end. Back-propagate it "
            "before the next call of the model."
        )


def _require_one_pass(times: int) -> None:
    if times != 1:
        raise ValueError(f"Balancer: backward should back-propagate its loss exactly once; it did {times} times.")


def _require_no_pending_step(engine: Engine[Rule], method: str) -> None:
    if engine.pending_backwards:
        raise RuntimeError(
            f"Balancer: {method} was called between backward and step, which would lose the measurement. Call step() first."
        )
