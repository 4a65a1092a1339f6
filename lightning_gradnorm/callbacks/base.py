"""The adapter that plugs a balancing strategy into any LightningModule: capture, hooks, optimizer steps, ranks, state.

How a weight reaches the network: each task's scalar loss ``L_i`` gets a hook that multiplies its gradient by ``w_i`` in
backward. What was ``Σ c_i L_i + rest`` in the user's ``loss`` becomes ``Σ w_i c_i ∇L_i + ∇rest`` in the network, in
automatic and in manual optimization, whatever scaler or accumulation stands between.

How a task's gradient is read: with ``heads``, from the branch of the representation that each head gets
(`lightning_gradnorm.gradients`); without, by one first-order pass from the loss, inside that same hook. What is read is
the task's actual contribution to the step, ``scale · w_i · c_i · ∇L_i / accumulation``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradnorm._messages import check_by_task, checked_names, did_you_mean
from lightning_gradnorm.callbacks import losses
from lightning_gradnorm.callbacks.checkpoint import AnyRule, Restoring
from lightning_gradnorm.callbacks.logging import is_logged_step
from lightning_gradnorm.engine.compiled import OpenedCode
from lightning_gradnorm.engine.graph_checks import Audit, check_apart, check_heads_apart
from lightning_gradnorm.engine.layers import find_module
from lightning_gradnorm.engine.loss_scale import scaler_skips
from lightning_gradnorm.engine.module_hooks import Undo, around_call, takes_hooks
from lightning_gradnorm.engine.step_state import Pass, Window
from lightning_gradnorm.engine.task_names import DeclaresTasks
from lightning_gradnorm.engine.usage_checks import Omissions
from lightning_gradnorm.gradients import GradientReader, KeptBuffers, WeightGradients, branch, check_loss


class Balancing(Restoring[AnyRule]):
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
        super().__init__()
        if heads is not None and not (isinstance(heads, Mapping) and all(isinstance(h, str) for h in heads.values())):
            raise TypeError(f"{self._name}: heads should be a mapping from task to the name of its head; got {heads!r}")
        self.tasks = tasks
        self.heads = None if heads is None else dict(heads)
        self.representation = representation
        self._names = () if tasks is None else checked_names(tasks, asked_by=self._name)
        self._logged_names = dict(tasks) if isinstance(tasks, Mapping) else None
        if self.heads is not None and self._names:
            self._check_heads()
        self._audit = Audit(self._name, [], at_heads=False)
        self._buffers = KeptBuffers([])
        self._reader: GradientReader | None = None
        self._hooks: ExitStack | None = None
        self._opened: OpenedCode | None = None
        self._spare_hooks: dict[GradientReader, Undo] = {}
        self._trainer: L.Trainer | None = None
        self._was_started = self._warned_of_idling = False
        self._declared = False
        self._at_heads = False
        self._window = Window(measured=False, weights={})
        self._pass = Pass()
        self._shown = True
        self._omissions = Omissions(self._name)
        self._compared: set[str] = set()
        self._told_apart: set[str] = set()
        self._reading = False

    # ---- what a strategy answers, besides what `Restoring` asks ------------------------------------------------------

    def _weights_in_force(self) -> Tensor:
        """Return the weights of the losses, shape (T,)."""
        return self._known.weights

    def _shared_layer(self, module: L.LightningModule, heads: Mapping[str, str]) -> Mapping[str, nn.Parameter]:
        """Return the parameters whose gradients are read, by name; none if it is not those of parameters."""
        return {}

    def _readers(
        self, module: L.LightningModule, W: Mapping[str, nn.Parameter], opened: Collection[nn.Module]
    ) -> list[GradientReader]:
        """Return what can read the gradients, in order of preference; none for a strategy that needs none."""
        return []

    def _measures(self) -> bool:
        """Say whether the gradients of the coming optimizer step are to be read."""
        return self._reader is not None

    def _weigh(self, trainer: L.Trainer, module: L.LightningModule, back_propagated: Tensor) -> None:
        """Settle the weights of the backward pass that is about to begin, if they depend on its losses."""

    def _take_in(self, window: Window, trainer: L.Trainer, module: L.LightningModule) -> bool:
        """Take in what one optimizer step has shown; say whether any task took part in it."""
        return bool(window.losses)

    def _note_step(self) -> None:
        """Take note that the network's optimizer makes a step, measured or not."""

    def _drop_step(self) -> None:
        """Take note that the loss scaler skips the network's step."""

    def _log(self, module: L.LightningModule) -> None:
        """Log what the strategy has to show of the last optimizer step."""

    # ---- the names ---------------------------------------------------------------------------------------------------

    def _check_heads(self) -> None:
        if self.heads is not None:
            check_by_task(self.heads, self._names, asked_by=self._name, parameter="heads")

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
            self._names = checked_names(list(declared), asked_by=self._name)
            self._check_heads()
        if declared is None:
            return self.heads
        if self._logged_names is not None:
            raise ValueError(
                f"{self._name}: tasks names the losses as they are logged, {sorted(self._logged_names.values())}, but "
                f"{type(module).__name__} shows them itself. Use tasks=None for all of its tasks, or a list of their names."
            )
        unknown = [name for name in self._names if name not in declared]
        if unknown:
            raise ValueError(
                f"{self._name}: task '{unknown[0]}' is not in {type(module).__name__}; {did_you_mean(unknown[0], declared)}"
            )
        heads = {name: declared[name] for name in self._names}
        own = {module.get_submodule(name) for name in heads.values()}
        return self.heads or (heads if len(own) == len(heads) else None)  # without heads where two tasks share one

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
        self._refuse_line_search(trainer)
        self._begin(trainer)
        heads = self._resolve_tasks(pl_module)
        self._remove_hooks()
        self._trainer, self._was_started = trainer, True
        self._omissions = Omissions(self._name, self._names, self._logged_names, declared=self._declared)
        self._compared, self._told_apart = set(), set()
        # All ranks take part in the sum over ranks, also one that never sees a loss: they agree on the state beforehand.
        parameter = next((p for p in pl_module.parameters() if p.is_floating_point()), torch.zeros(()))
        self._prepare(torch.zeros((), dtype=parameter.dtype, device=pl_module.device))
        with ExitStack() as hooks:  # if anything fails on the way, what was placed is taken away again
            self._place_hooks(pl_module, heads, hooks)
            self._hooks = hooks.pop_all()
        self._open_window()

    def _place_hooks(self, module: L.LightningModule, heads: Mapping[str, str] | None, hooks: ExitStack) -> None:
        by_module = {} if heads is None else self._find_heads(module, heads)
        W = self._shared_layer(module, heads or {})
        self._opened = OpenedCode(module, (heads or {}).values(), W)
        hooks.callback(self._opened.close)
        readers = self._readers(module, W, self._opened.modules)
        self._reader = readers[0] if readers else None
        self._at_heads = bool(readers) and heads is not None
        self._audit = Audit(self._name, readers, at_heads=self._at_heads)
        self._buffers = KeptBuffers(module.buffers() if readers else [])
        if self._logged_names is not None:
            hooks.callback(losses.logged_losses(module, self._logged_names, self.watch, self._omissions.logged))
        elif module.automatic_optimization:
            hooks.callback(losses.returned_losses(module, self.watch, asked_by=self._name))
        if self._at_heads or any(reader.module is not None for reader in readers):
            hooks.callback(losses.explained(module, self._explain))
        if self._at_heads:
            for head, task in by_module.items():
                hooks.callback(around_call(head, before=partial(self._before_head, task), first=True))
        for reader in readers:
            if reader.module is not None:
                before, after = partial(self._before_call, reader), partial(self._after_call, reader)
                self._spare_hooks[reader] = around_call(reader.module, before=before, after=after)
                hooks.callback(self._spare_hooks[reader])

    def _open_window(self) -> None:
        if self._reader is not None:
            self._reader.clear()
        self._window = Window(self._measures(), self._weights_by_task())

    def _weights_by_task(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self._weights_in_force().unbind(), strict=True))

    def _refuse_sharded(self, trainer: L.Trainer) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"{self._name}: {type(strategy).__name__} keeps only a piece of the shared layer on each rank, in a form that "
                f"cannot be put together for one layer alone. Use strategy='ddp', or ModelParallelStrategy with fully_shard."
            )
        if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"{self._name}: tensor parallelism cuts the representation into pieces, which is not supported. Use "
                f"ModelParallelStrategy(tensor_parallel_size=1), or strategy='ddp'."
            )

    def _refuse_line_search(self, trainer: L.Trainer) -> None:
        if self._remembers and any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            raise ValueError(
                f"{self._name}: torch.optim.LBFGS evaluates the losses several times within one step, between which their "
                f"weights should not change. Use another optimizer for the network, or FixedWeights."
            )

    def _find_heads(self, module: L.LightningModule, heads: Mapping[str, str]) -> dict[nn.Module, str]:
        by_module: dict[nn.Module, str] = {}
        for task in self._names:
            head = find_module(module, heads[task], asked_by=f"{self._name}: heads['{task}']")
            if head in by_module:
                raise ValueError(
                    f"{self._name}: heads should name one module for each task; '{heads[task]}' is named by both "
                    f"'{by_module[head]}' and '{task}'. Leave heads out: then each loss gets a pass of its own."
                )
            if not takes_hooks(head):
                raise ValueError(
                    f"{self._name}: heads['{task}'] '{heads[task]}' was made by torch.jit.script, which allows no hooks. Leave "
                    f"heads out: then each loss gets a first-order pass of its own."
                )
            by_module[head] = task
        return by_module

    def _remove_hooks(self) -> None:
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = self._trainer = self._opened = None
            self._spare_hooks.clear()
        self._forget_pass()
        self._audit, self._reader = Audit(self._name, [], at_heads=False), None

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remove_hooks()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove_hooks()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._remove_hooks()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self._hooks is not None and self._restored is not None:
            # In mid-training: a LearningRateFinder takes back its trial steps.
            self._prepare(self._weights_in_force())
            self._open_window()

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
        self._omissions.end_batch(pl_module, self._pass)
        if not self._shown and is_logged_step(trainer):  # in a batch that Lightning writes, but no optimizer step
            self._show(pl_module)
        self._forget_pass()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._omissions.end_epoch(pl_module)

    def _forget_pass(self) -> None:
        """Let go of all that belongs to one forward and backward pass."""
        self._pass = Pass()
        if self._opened is not None:
            self._opened.begin_pass()
        for reader in self._audit.readers:
            reader.forget()

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
        if not isinstance(losses, Mapping):
            raise TypeError(f"{self._name}: watch takes a mapping from task to loss; got {type(losses).__name__}.")
        if not torch.is_grad_enabled():
            return
        if self._hooks is None:
            self._warn_if_idle(losses)
            return
        if self._pass.in_backward or not self._is_at_work():
            return
        assert self._trainer is not None
        self._omissions.show(losses, self._trainer.lightning_module)
        known = set(self._pass.losses)
        for task in self._names:
            loss = losses.get(task)
            if loss is None:
                self._pass.absent |= {task} & set(losses)
            else:
                asked = f"{self._name}: the loss of task '{task}'"
                check_loss(loss, asked=asked, otherwise="; or None, if the task is absent")
                self._watch_one(task, loss)
        if not self._compared >= set(self._pass.losses) and set(self._pass.losses) > known:
            check_apart(self._pass, asked_by=self._name)
            self._compared |= set(self._pass.losses)

    def _watch_one(self, task: str, loss: Tensor) -> None:
        if loss.dtype == torch.float64 != self._weights_in_force().dtype:
            self._prepare(self._weights_in_force().double())
            self._window.weights = self._weights_by_task()
        owner = self._pass.task_of(loss)
        if owner == task:
            return  # logged twice, or both returned and watched: a second hook would apply the weight twice
        if owner is not None:
            raise ValueError(f"{self._name}: tasks '{owner}' and '{task}' have the same tensor as their loss.")
        if self._window.measured:
            self._choose(self._audit.examine(task, loss, self._pass))
            self._check_trained()
        self._omissions.seen.add(task)
        place = self._pass.add(task, loss)
        # The hook must not hold the tensor that holds the hook: it finds it by its place.
        loss.register_hook(partial(self._on_loss_gradient, task, place))  # type: ignore[no-untyped-call]

    def _check_trained(self) -> None:
        if isinstance(self._reader, WeightGradients) and not all(W.requires_grad for W in self._reader.sought):
            raise ValueError(
                f"{self._name}: the shared layer has been frozen (requires_grad=False) in the course of the training. Name the "
                f"last shared layer that is trained to the end, or use stop_after."
            )

    def _choose(self, reader: GradientReader | None) -> None:
        """Read with this one from now on, and take away what was placed for the others."""
        self._reader = reader
        for other in [other for other in self._spare_hooks if other is not reader]:
            self._spare_hooks.pop(other)()

    def _warn_if_idle(self, losses: Mapping[str, Any]) -> None:
        """Say so, once, if nobody has ever plugged this callback into the Trainer that is training."""
        trains = any(isinstance(loss, Tensor) and loss.requires_grad for loss in losses.values())
        if trains and not self._was_started and not self._warned_of_idling:
            self._warned_of_idling = True
            rank_zero_warn(
                f"{self._name}: watch was called, but this callback is not at work: no Trainer has started it. Give it to "
                f"the Trainer that trains the module, L.Trainer(callbacks=[gradnorm]). The losses are not balanced."
            )

    def _is_at_work(self) -> bool:
        """Say whether the steps that are made now are the training's, not trial steps such as the LearningRateFinder's."""
        trainer = self._trainer
        return trainer is not None and trainer.training and any(one is self for one in trainer.callbacks)  # type: ignore[attr-defined]

    def _notes_calls(self) -> bool:
        """Say whether what is called now belongs to a forward pass whose gradients will be read."""
        return self._window.measured and not self._pass.in_backward and self._is_at_work()

    def _before_head(self, task: str, args: Any, kwargs: Any) -> Any:
        if not self._notes_calls() or not torch.is_grad_enabled():
            return None
        self._pass.in_head = task
        receive = partial(self._read_at_head, task)
        if not kwargs and len(args) == 1:
            view, node = branch(args[0], receive)
            inputs: Any = (view,), kwargs
        else:
            inputs, node = branch((args, kwargs), receive)
        if node is not None:
            self._pass.branches.setdefault(task, set()).add(node)
        return inputs

    # A reentrant checkpoint calls its modules without gradients and makes their output part of the graph afterwards.

    def _before_call(self, reader: GradientReader, args: Any, kwargs: Any) -> None:
        if self._notes_calls():
            reader.before(args, kwargs)

    def _after_call(self, reader: GradientReader, output: Any) -> Any:
        return reader.after(output) if self._notes_calls() else None

    def _explain(self, error: RuntimeError) -> str | None:
        if ("of _Branch" in str(error) or "of _Gate" in str(error)) and "inplace" in str(error):
            if self._pass.in_head is None:
                first = "before the heads read it" if self._at_heads else "by what reads it"
                return (
                    f"{self._name}: the representation is changed in place, as relu_(z) and ReLU(inplace=True) do, {first}. "
                    f"Use relu(z)."
                )
            return (
                f"{self._name}: the head of task '{self._pass.in_head}' changes the representation in place, as "
                f"ReLU(inplace=True) does, and with it what the other heads read. Make its first operation "
                f"inplace=False, or leave heads out: then each loss gets a first-order pass of its own."
            )
        return None

    # ---- backward ----------------------------------------------------------------------------------------------------

    def _on_loss_gradient(self, task: str, place: int, seed: Tensor) -> Tensor | None:
        if self._reading or not self._pass.in_backward:
            return None  # our own pass from this loss, with the weight already in it; or one that the user makes for himself
        window, loss = self._window, self._pass.losses[task][place]
        self._pass.fired.add(task)
        window.add(task, loss)
        weight = window.weights[task]
        applied = weight
        if seed.dtype != weight.dtype or seed.device != weight.device:
            applied = weight.to(seed)
            if torch.finfo(applied.dtype).bits < torch.finfo(weight.dtype).bits:
                window.applied[task] = applied.to(weight)
        weighted = seed * applied
        if window.measured and not self._at_heads:
            self._read(task, [loss], [weighted])
        return weighted

    def _read_at_head(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> object:
        if self._pass.in_backward:  # and not a gradient that the user takes for himself
            return self._read(task, outputs, gradients)
        return None

    def _read(self, task: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> object:
        if self._reader is None or self._reading:
            return None
        self._reading = True
        try:
            with self._buffers.through_reading(task):
                answer = self._reader.read(task, outputs, gradients)
            if self._pass.is_whole_step and self._pass.is_read_once(task, at_heads=self._at_heads):
                self._reader.close(task)
            return answer
        finally:
            self._reading = False

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._pass.in_backward = True
        self._pass.is_whole_step = (
            pl_module.automatic_optimization
            and not is_overridden("backward", pl_module)  # which may pass a loss as often as it likes
            and trainer.accumulate_grad_batches == 1
            and trainer.world_size == 1
        )
        if self._window.measured and not self._told_apart >= set(self._pass.branches):
            check_heads_apart(loss, self._pass, asked_by=self._name)
            self._told_apart |= set(self._pass.branches)
        self._weigh(trainer, pl_module, loss)
        self._window.weights = self._weights_by_task()

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window.backwards += 1
        self._pass.backwards += 1
        self._pass.in_backward = False
        if self._window.measured and self._reader is not None:
            self._reader.finish()

    # ---- the optimizer step ------------------------------------------------------------------------------------------

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        window = self._window
        self._pass.steps += 1
        self._omissions.stepped = True
        if trainer.world_size == 1 and not window.losses:  # another optimizer's step, or no task was present
            window.backwards = 0
            return
        if self._pass.fired:
            self._omissions.check_back_propagated(self._pass)
        if scaler_skips(trainer, optimizer):
            self._drop_step()
            self._forget_pass()
            self._open_window()
            return
        if self._take_in(window, trainer, pl_module):
            self._note_step()
            self._shown = False
            if is_logged_step(trainer):
                self._show(pl_module)
        self._open_window()

    def _show(self, module: L.LightningModule) -> None:
        by_the_model = set(self._omissions.logged)
        self._log(module)
        self._omissions.logged &= by_the_model
        self._shown = True
