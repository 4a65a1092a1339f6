"""The adapter that plugs a balancing strategy into any LightningModule: capture, hooks, optimizer steps, ranks, state.

How a weight reaches the network: each task's scalar loss ``L_i`` gets a hook that multiplies its gradient by ``w_i`` in
backward. What was ``Σ c_i L_i + rest`` in the user's ``loss`` becomes ``Σ w_i c_i ∇L_i + ∇rest`` in the network, in
automatic and in manual optimization, whatever scaler or accumulation stands between.

How a task's gradient is read: with ``heads``, from the branch of the representation that each head gets
(`lightning_gradnorm.gradients`); without, by one first-order pass from the loss, inside that same hook. What is read is
the task's actual contribution to the step, ``scale · w_i · c_i · ∇L_i / accumulation``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_gradnorm.callbacks import capture
from lightning_gradnorm.callbacks.logging import is_logged_step
from lightning_gradnorm.callbacks.naming import did_you_mean, find_module
from lightning_gradnorm.gradients import ActivationGradients, GradientReader, branch, nodes_between
from lightning_gradnorm.gradients.paths import node_of


@runtime_checkable
class DeclaresTasks(Protocol):
    """A LightningModule that says itself which tasks it has, as `MultiTaskModule` does, and calls `watch`."""

    @property
    def task_heads(self) -> Mapping[str, str]:
        """Task → dotted name of its head."""


@dataclass
class Window:
    """What is gathered from one optimizer step to the next."""

    measured: bool
    """Whether the gradients of this step are read."""
    backwards: int = 0
    """How many backward passes there were: the micro-batches."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Sum of each task's losses that were back-propagated, detached."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many losses each sum is made of: in how many micro-batches the task was present."""


@dataclass
class Pass:
    """What belongs to one training batch: its forward pass and the backward that follows."""

    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    """The losses that were watched, by task; kept alive until they are back-propagated."""
    fired: set[str] = field(default_factory=set)
    """Tasks whose loss has been reached by a backward pass."""
    branches: dict[str, set[Node]] = field(default_factory=dict)
    """The branches that the tasks' heads read."""
    backwards: int = 0
    """How many backward passes there were."""


class Balancing(L.Callback):
    """Base of all balancing callbacks. A strategy says what the weights are and, if it reads gradients, how.

    Args:
        tasks: keys of the mapping that ``training_step`` returns; or a mapping from task to the name under which the
            module logs its loss; or ``None`` for all tasks of a module that declares them (`MultiTaskModule`).
        heads: task → dotted name of its head module.
        representation: dotted name of the module whose output the heads read.
    """

    def __init__(
        self,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        *,
        heads: Mapping[str, str] | None = None,
        representation: str = "encoder",
    ) -> None:
        if heads is not None and not (isinstance(heads, Mapping) and all(isinstance(h, str) for h in heads.values())):
            raise TypeError(f"{self._name}: heads should be a mapping from task to the name of its head; got {heads!r}")
        self.tasks = tasks
        self.heads = None if heads is None else dict(heads)
        self.representation = representation
        self._names: tuple[str, ...] = () if tasks is None else self._checked_names(tasks)
        self._logged_names = dict(tasks) if isinstance(tasks, Mapping) else None
        if self.heads is not None and self._names:
            self._check_by_task("heads", self.heads)
        self._reader: GradientReader | None = None
        self._hooks: ExitStack | None = None
        self._declared = False
        self._at_heads = False
        self._window = Window(measured=False)
        self._pass = Pass()
        self._shown = True
        self._audited: set[str] = set()
        self._seen: set[str] = set()
        self._logged: set[str] = set()
        self._reading = False

    # ---- what a strategy answers -------------------------------------------------------------------------------------

    def _weights_in_force(self) -> Tensor:
        """Return the weights, shape (T,)."""
        raise NotImplementedError

    def _make_reader(self, module: L.LightningModule) -> GradientReader | None:
        """Return what reads the gradients; ``None`` for a strategy that needs none."""
        return None

    def _measures(self) -> bool:
        """Say whether the gradients of the coming optimizer step are to be read."""
        return self._reader is not None

    def _prepare(self, like: Tensor) -> None:
        """Make the state where ``like`` is, in float64 if ``like`` is; called at the start, and when a loss is float64."""
        raise NotImplementedError

    def _update(self, losses: Tensor, norms: Tensor | None, present: Tensor) -> None:
        """Take in what one optimizer step has shown: mean losses, norms ``G_i`` of weighted gradients, each (T,)."""

    def _log(self, module: L.LightningModule) -> None:
        """Log what the strategy has to show of the last optimizer step."""

    # ---- the names ---------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _checked_names(self, tasks: Sequence[str] | Mapping[str, str]) -> tuple[str, ...]:
        is_list = isinstance(tasks, Sequence | Mapping) and not isinstance(tasks, str)
        flat = [*tasks, *tasks.values()] if isinstance(tasks, Mapping) else tasks
        if not is_list or not all(isinstance(one, str) for one in flat):
            raise TypeError(
                f"{self._name}: tasks should be a list of names, such as ['seg', 'depth'], or a mapping from task to the "
                f"name under which its loss is logged; got {tasks!r}"
            )
        if isinstance(tasks, Mapping) and len(set(tasks.values())) != len(tasks):
            raise ValueError(f"{self._name}: tasks should have different losses; got {dict(tasks)}")
        names = tuple(tasks)
        if len(set(names)) != len(names):
            raise ValueError(f"{self._name}: tasks should all be different; got {list(names)}")
        if len(names) < 2:
            raise ValueError(
                f"{self._name}: tasks should be at least two, for there is nothing to balance; got {list(names)}"
            )
        return names

    def _check_by_task(self, parameter: str, numbers: Mapping[str, Any]) -> None:
        """Refuse a mapping that does not name the very tasks there are."""
        unknown = [name for name in numbers if name not in self._names]
        missing = [name for name in self._names if name not in numbers]
        if unknown:
            raise ValueError(
                f"{self._name}: {parameter} names '{unknown[0]}', which is not among the tasks "
                f"{list(self._names)}; {did_you_mean(unknown[0], self._names)}"
            )
        if missing:
            raise ValueError(f"{self._name}: {parameter} should name every task; {missing} are missing")

    def _check_positive_by_task(self, parameter: str, numbers: Mapping[str, Any]) -> None:
        """Refuse a mapping that does not give each of the tasks a positive number."""
        self._check_by_task(parameter, numbers)
        for task, number in numbers.items():
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if not (is_number and math.isfinite(number) and number > 0):
                raise ValueError(f"{self._name}: {parameter}['{task}'] should be positive and finite; got {number!r}")

    def _resolve_tasks(self, module: L.LightningModule) -> Mapping[str, str] | None:
        """Set the names; return the heads."""
        declared = dict(module.task_heads) if isinstance(module, DeclaresTasks) else None
        self._declared = declared is not None
        if self.tasks is None:
            if declared is None:
                raise ValueError(
                    f"{self._name}: tasks=None takes all tasks of a MultiTaskModule; {type(module).__name__} should have its "
                    f"losses named: tasks=['seg', 'depth'] for keys of what training_step returns, or "
                    f"tasks={{'seg': 'train/seg_loss', …}} for what it logs."
                )
            self._names = self._checked_names(list(declared))
            if self.heads is not None:
                self._check_by_task("heads", self.heads)
        if declared is None:
            return self.heads
        unknown = [name for name in self._names if name not in declared]
        if unknown:
            raise ValueError(
                f"{self._name}: task '{unknown[0]}' is not in {type(module).__name__}; {did_you_mean(unknown[0], declared)}"
            )
        return self.heads or {name: declared[name] for name in self._names}

    # ---- hooks, placed for the time of training ----------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        others = [c for c in trainer.callbacks if isinstance(c, Balancing) and c is not self]  # type: ignore[attr-defined]
        if others:
            raise ValueError(
                f"{self._name}: a Trainer should have one balancing callback; got {self._name} and "
                f"{type(others[0]).__name__}. Remove one: both would weight the same losses."
            )
        self._refuse_sharded(trainer)
        heads = self._resolve_tasks(pl_module)
        self._remove_hooks()
        for names in (self._audited, self._seen, self._logged):
            names.clear()
        self._reader = self._make_reader(pl_module)
        # All ranks take part in the sum over ranks, also one that never sees a loss: they agree on the state beforehand.
        parameter = next((p for p in pl_module.parameters() if p.is_floating_point()), torch.zeros(()))
        self._prepare(torch.zeros((), dtype=parameter.dtype, device=pl_module.device))
        self._at_heads = self._reader is not None and heads is not None
        with ExitStack() as hooks:  # if anything fails on the way, what was placed is taken away again
            if self._logged_names is not None:
                hooks.callback(capture.logged_losses(pl_module, self._logged_names, self.watch, self._logged))
            elif pl_module.automatic_optimization:
                hooks.callback(capture.returned_losses(pl_module, self.watch, asked_by=self._name))
            if self._at_heads and heads is not None:
                self._place_branches(pl_module, heads, hooks)
            if isinstance(self._reader, ActivationGradients):
                encoder = find_module(pl_module, self.representation, asked_by=f"{self._name}: representation")
                hooks.callback(encoder.register_forward_hook(self._after_encoder).remove)
            self._hooks = hooks.pop_all()
        self._open_window()

    def _open_window(self) -> None:
        if self._reader is not None:
            self._reader.clear()
        self._window = Window(measured=self._measures())

    def _refuse_sharded(self, trainer: L.Trainer) -> None:
        strategy = type(trainer.strategy).__name__
        if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise ValueError(
                f"{self._name}: {strategy} shards the model's parameters, of which the shared layer is one; this is not "
                f"supported yet. Use strategy='ddp', or a single device."
            )

    def _place_branches(self, module: L.LightningModule, heads: Mapping[str, str], hooks: ExitStack) -> None:
        by_module: dict[nn.Module, str] = {}
        for task in self._names:
            head = find_module(module, heads[task], asked_by=f"{self._name}: heads['{task}']")
            if head in by_module:
                raise ValueError(
                    f"{self._name}: heads should name one module for each task; '{heads[task]}' is named by both "
                    f"'{by_module[head]}' and '{task}'. Leave heads out: then each loss gets a pass of its own."
                )
            by_module[head] = task
            hooks.callback(head.register_forward_pre_hook(partial(self._before_head, task), with_kwargs=True).remove)

    def _remove_hooks(self) -> None:
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None
        self._forget_pass()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remove_hooks()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove_hooks()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._remove_hooks()

    # ---- forward: losses and branches --------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._forget_pass()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._check_seen(pl_module)
        if self._pass.backwards:  # a step that returned None after it had shown its losses is no step
            self._check_back_propagated()
        if not self._shown and is_logged_step(trainer):  # in a batch that Lightning writes, but no optimizer step
            self._show(pl_module)
        self._forget_pass()

    def _forget_pass(self) -> None:
        """Let go of all that belongs to one forward and backward pass."""
        self._pass = Pass()
        if isinstance(self._reader, ActivationGradients):
            self._reader.forget()

    def watch(self, losses: Mapping[str, Tensor | None]) -> None:
        """Balance these losses in the backward pass that follows.

        A module with manual optimization calls it in ``training_step``, before its own ``manual_backward``; for the
        others it is called by the callback.

        Args:
            losses: task → scalar loss, the very tensors of which the back-propagated loss is made. Names that are not
                among the tasks are left alone; ``None`` says that the task is absent from this batch.

        Raises:
            ValueError: a task is not there, or its loss is not a scalar, carries no gradient, or does not depend on the
                shared layer.
        """
        window = self._window
        if self._hooks is None or not torch.is_grad_enabled():
            return
        if self._logged_names is None:
            self._check_known(losses)
        for task in self._names:
            loss = losses.get(task)
            if loss is None:
                continue
            self._check_loss(task, loss)
            if loss.dtype == torch.float64 != self._weights_in_force().dtype:
                self._prepare(self._weights_in_force().double())
            watched = self._pass.losses.setdefault(task, [])
            if any(one is loss for one in watched):
                continue  # logged twice, or both returned and watched: a second hook would apply the weight twice
            self._check_own(task, loss)
            if window.measured:
                self._audit(task, loss)
            self._seen.add(task)
            watched.append(loss)
            # The hook must not hold the tensor that holds the hook: it finds it by its place.
            loss.register_hook(partial(self._on_loss_gradient, task, len(watched) - 1))  # type: ignore[no-untyped-call]

    def _check_own(self, task: str, loss: Tensor) -> None:
        for other, losses in self._pass.losses.items():
            if other != task and any(one is loss for one in losses):
                raise ValueError(f"{self._name}: tasks '{other}' and '{task}' have the same tensor as their loss.")

    def _check_known(self, losses: Mapping[str, Any]) -> None:
        for task in self._names:
            if task not in losses and task not in self._seen and not self._declared:
                raise ValueError(
                    f"{self._name}: task '{task}' is not among the losses of the first batch, which are {sorted(losses)}; "
                    f"{did_you_mean(task, losses)} (A task that is absent from a batch is given as None.)"
                )

    def _check_loss(self, task: str, loss: Any) -> None:
        asked = f"{self._name}: the loss of task '{task}' should be"
        if not isinstance(loss, Tensor):
            raise TypeError(f"{asked} a tensor; got {type(loss).__name__}.")
        if loss.numel() != 1:
            raise ValueError(f"{asked} a scalar; got shape {tuple(loss.shape)}. Reduce it, for example with .mean().")
        if not loss.requires_grad:
            raise ValueError(
                f"{asked} part of the graph, but it carries no gradient. Give the loss itself, not .detach() or .item()."
            )

    def _before_head(self, task: str, head: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._window.measured or not torch.is_grad_enabled():
            return None
        inputs, node = branch((args, kwargs), partial(self._read, task))
        if node is not None:
            self._pass.branches.setdefault(task, set()).add(node)
        return inputs

    def _after_encoder(self, encoder: nn.Module, args: Any, output: Any) -> None:
        if self._window.measured and torch.is_grad_enabled():
            assert isinstance(self._reader, ActivationGradients)
            self._reader.at([t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad])

    def _audit(self, task: str, loss: Tensor) -> None:
        """Look along the graph, the first time a task comes, whether reading where we read gives the task's gradient."""
        if task in self._audited:
            return
        self._audited.add(task)
        sought = self._reader.sought if self._reader is not None else []
        where = "the shared layer" if not isinstance(self._reader, ActivationGradients) else f"'{self.representation}'"
        loss_of = f"{self._name}: the loss of task '{task}'"
        own = self._pass.branches.get(task, set())
        start = own if self._at_heads else {node_of(loss)}
        if not nodes_between([node_of(loss)], sought):
            raise ValueError(
                f"{loss_of} does not depend on {where}. Name a layer that all tasks share. "
                f"(Activation checkpointing hides it, unless it is called with use_reentrant=False.)"
            )
        if self._at_heads:
            leave_out = "Leave heads out: then each loss gets a first-order pass of its own."
            others = {node: other for other, nodes in self._pass.branches.items() if other != task for node in nodes}
            around = nodes_between([node_of(loss)], sought, stop=own)
            reached = sorted({others[node] for node in around if node in others})
            if reached:
                raise ValueError(
                    f"{loss_of} also reads the head of '{reached[0]}', so that their gradients cannot be told apart at "
                    f"the heads. Are the names in heads exchanged? {leave_out}"
                )
            if around:
                raise ValueError(f"{loss_of} reaches {where} by a way that does not pass its head. {leave_out}")
        if any("Compiled" in node.name() for node in nodes_between(start, sought)):
            raise ValueError(
                f"{loss_of} reaches {where} through a module compiled with torch.compile, whose graph cannot be walked "
                f"twice. Leave the last shared layer out of what is compiled, and name the heads with heads=."
            )

    # ---- backward ----------------------------------------------------------------------------------------------------

    def _on_loss_gradient(self, task: str, place: int, seed: Tensor) -> Tensor | None:
        if self._reading:
            return None  # our own pass from this loss, which starts with the weight already in it
        window, loss = self._window, self._pass.losses[task][place]
        self._pass.fired.add(task)
        value = loss.detach().reshape(())
        window.losses[task] = window.losses[task] + value if task in window.losses else value
        window.counts[task] = window.counts.get(task, 0) + 1
        weighted = seed * self._weights_in_force()[self._names.index(task)].to(seed)
        if window.measured and not self._at_heads:
            self._read(task, [loss], [weighted])
        return weighted

    def _read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        if self._reader is not None and not self._reading:
            self._reading = True
            try:
                self._reader.read(task, outputs, gradients)
            finally:
                self._reading = False

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window.backwards += 1
        self._pass.backwards += 1

    # ---- the optimizer step ------------------------------------------------------------------------------------------

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        window = self._window
        if trainer.world_size == 1 and not window.losses:  # another optimizer's step, or no task was present
            window.backwards = 0
            return
        if self._pass.fired:
            self._check_back_propagated()
        if _scaler_skips(trainer, optimizer):
            self._forget_pass()
            self._open_window()
            return
        losses, norms, present = self._gather(window, trainer, pl_module)
        if present.any():
            self._update(losses, norms, present)
            self._shown = False
            if is_logged_step(trainer):
                self._show(pl_module)
        self._open_window()

    def _show(self, module: L.LightningModule) -> None:
        self._log(module)
        self._shown = True

    def _check_seen(self, module: L.LightningModule) -> None:
        if self._logged_names is not None:
            unseen = [logged for task, logged in self._logged_names.items() if task not in self._seen]
            if unseen and self._pass.backwards:
                raise ValueError(
                    f"{self._name}: '{unseen[0]}' was not logged in the first batch, which logged {sorted(self._logged)}; "
                    f"{did_you_mean(unseen[0], sorted(self._logged))} (In training_step, log the loss before its backward.)"
                )
        elif not self._seen and not self._declared and not module.automatic_optimization and self._pass.backwards:
            raise ValueError(
                f"{self._name}: no task loss was seen in the first batch. {type(module).__name__} optimizes manually, so that "
                f"it should call watch({{'{self._names[0]}': loss, …}}) on this callback before manual_backward."
            )

    def _check_back_propagated(self) -> None:
        missed = [task for task in self._pass.losses if task not in self._pass.fired]
        if missed:
            raise ValueError(
                f"{self._name}: what was given as the loss of task '{missed[0]}' took no part in the backward pass. Add "
                f"it to what is back-propagated; give the very tensor, not a copy of it, and give it before backward."
            )

    def _gather(
        self, window: Window, trainer: L.Trainer, module: L.LightningModule
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the step's mean losses, norms ``G_i`` and which tasks were present, each (T,), over all ranks.

        One fused sum over the ranks: T rows of gradient, loss sum and count. It is made after backward, never in it.
        """
        like = self._weights_in_force().detach()
        table = like.new_zeros(len(self._names), 2)
        for row, task in zip(table, self._names, strict=True):
            if task in window.losses:
                row[0], row[1] = window.losses[task].to(like), float(window.counts[task])
        reader = self._reader if window.measured else None
        norms = None
        if trainer.world_size > 1:
            table = table if reader is None else torch.cat([table, reader.rows(self._names, like)], dim=1)
            table = trainer.strategy.reduce(table, reduce_op="sum")
            norms = None if reader is None else reader.norms_of(table[:, 2:])
        elif reader is not None:
            norms = reader.norms(self._names).to(like)
        if norms is not None:
            norms = norms / (self._unit(window, trainer, module) * trainer.world_size)
        sums, counts = table[:, 0], table[:, 1]
        return sums / counts.clamp(min=1), norms, counts > 0

    def _unit(self, window: Window, trainer: L.Trainer, module: L.LightningModule) -> float:
        """Return the factor by which this step's gradients are larger than those of the mean loss over its batches."""
        scaler = _scaler(trainer)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        if module.automatic_optimization:
            return scale * window.backwards / trainer.accumulate_grad_batches
        return scale


def _scaler(trainer: L.Trainer) -> torch.amp.GradScaler | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None


def _scaler_skips(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> bool:
    """Say whether the loss scaler has found an overflow, for which it will skip this optimizer's step."""
    scaler = _scaler(trainer)
    # There is no public question for it; the same is asked by ``GradScaler.step`` a moment later.
    return scaler is not None and any(bool(found) for found in scaler._found_inf_per_device(optimizer).values())
