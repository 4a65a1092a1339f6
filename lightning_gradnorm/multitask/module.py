"""One shared encoder, several heads, manual optimization."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import Self, override

from lightning_gradnorm._messages import check, did_you_mean, is_integer, is_number
from lightning_gradnorm.callbacks.logging import is_logged_step
from lightning_gradnorm.callbacks.packages import explain_other_trainer
from lightning_gradnorm.engine.rule import WatchesLosses
from lightning_gradnorm.multitask import architecture
from lightning_gradnorm.multitask.evaluation import Evaluation
from lightning_gradnorm.multitask.schedule import Schedule, SchedulerFactory
from lightning_gradnorm.multitask.task import Task, adam

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_check = partial(check, "MultiTaskModule")


class MultiTaskModule(L.LightningModule):
    """A network trained on several losses: ``prediction_i = head_i(encoder(inputs))``.

    A batch is ``(inputs, targets)``, with ``targets`` a dict by task. A task that is missing or ``None`` is absent from that
    step. Without a balancing callback all losses count equally; with one (`GradNorm`, `FixedWeights`) each batch still takes
    one backward pass. The module optimizes manually and handles what the Trainer then refuses: accumulation, clipping,
    schedulers.

    Args:
        encoder: module from the inputs to the representation: a tensor or a nested structure of tensors.
        tasks: `Task` by name.
        optimizer: builds the optimizer from the parameters.
        lr_scheduler: builds the scheduler from the optimizer; it steps at the end of each epoch. Or a dict as in Lightning:
            ``{"scheduler": partial(…), "interval": "step" | "epoch", "frequency": 1, "monitor": "val/loss"}``. A
            `ReduceLROnPlateau` steps at the end of the epoch with the monitored metric (default ``val/loss``).
        accumulate_grad_batches: number of batches whose mean gradient makes one optimizer step. The last step of an epoch may
            have fewer (if the loader has no length, their sum is still divided by the full number, as in Lightning).
        gradient_clip_val: largest 2-norm of the whole gradient, after unscaling.
        only: names of the tasks to train, ``None`` for all. The heads and targets of the others are left out.

    Raises:
        TypeError, ValueError: an argument is out of range, or a batch is not ``(inputs, targets)``.

    Logs ``train/loss``, ``train/loss/<task>``, ``val/loss``, ``val/loss/<task>``, ``val/<metric>/<task>`` and the same for
    ``test``; ``loss`` is the plain sum over the tasks.

    Example:
        >>> import torch
        >>> model = MultiTaskModule(
        ...     encoder=nn.Linear(4, 8),
        ...     tasks={"a": Task(nn.Linear(8, 1), nn.MSELoss()), "b": Task(nn.Linear(8, 3), nn.CrossEntropyLoss())},
        ...     optimizer=partial(torch.optim.Adam, lr=1e-3),
        ... )
        >>> {task: tuple(prediction.shape) for task, prediction in model(torch.zeros(2, 4)).items()}
        {'a': (2, 1), 'b': (2, 3)}
    """

    def __init__(
        self,
        encoder: nn.Module,
        tasks: Mapping[str, Task],
        optimizer: OptimizerFactory = adam,
        lr_scheduler: SchedulerFactory | Mapping[str, Any] | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        only: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        explain_other_trainer(MultiTaskModule)
        self.automatic_optimization = False
        self.save_hyperparameters("accumulate_grad_batches", "gradient_clip_val", "only")
        _check(isinstance(encoder, nn.Module), "encoder", "a module", encoder)
        _check(isinstance(tasks, Mapping) and len(tasks) > 0, "tasks", "a mapping from name to Task", tasks)
        for name, task in tasks.items():
            _check(isinstance(task, Task), f"tasks['{name}']", "a Task", task)
            _check(isinstance(name, str), "tasks", "named by strings", name)
            taken = "." in name or not name or hasattr(nn.ModuleDict, name)
            _check(not taken, "tasks", "named without dots, and not like a method of ModuleDict", name)
        _check(callable(optimizer), "optimizer", "a callable such as partial(torch.optim.Adam, lr=1e-3)", optimizer)
        is_count = is_integer(accumulate_grad_batches, least=1)
        _check(is_count, "accumulate_grad_batches", "an integer, at least 1", accumulate_grad_batches)
        clips = gradient_clip_val is None or (is_number(gradient_clip_val) and gradient_clip_val > 0)
        _check(clips, "gradient_clip_val", "None or a positive number", gradient_clip_val)
        every, tasks = tasks, _chosen(tasks, only)
        self.encoder = encoder
        self.tasks = nn.ModuleDict(tasks)
        self._left_out = frozenset(every) - frozenset(tasks)
        self.metric_names = {name: list(task.metrics) for name, task in every.items()}
        """The names of every task's metrics, including tasks that ``only`` leaves out."""
        self.optimizer = optimizer
        self._schedule = Schedule.of(lr_scheduler)
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self._trained_in_epoch = False
        # Packed now, before anyone attaches hooks to the modules.
        self._architecture = architecture.pack(
            {"encoder": encoder, "tasks": dict(every), "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        )
        self.val_evaluation, self.test_evaluation = Evaluation(tasks), Evaluation(tasks)

    @property
    def task_heads(self) -> dict[str, str]:
        """Task → dotted name of its head, for balancing callbacks."""
        return {name: f"tasks.{name}.head" for name in self.tasks}

    # ---- forward -----------------------------------------------------------------------------------------------------

    @override
    def forward(self, inputs: Any) -> dict[str, Any]:
        """Return the prediction of each task."""
        return self._predict(inputs, self.tasks)

    def _predict(self, inputs: Any, names: Iterable[str]) -> dict[str, Any]:
        representation = self.encoder(inputs)
        return {name: self._task(name).head(representation) for name in names}

    def _task(self, name: str) -> Task:
        return cast(Task, self.tasks[name])

    def _step(self, batch: Any) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any], int]:
        """Return predictions, losses and targets by task, for the tasks that are present, and the size of the batch."""
        inputs, targets = self._unpack(batch)
        present = {name: targets[name] for name in self.tasks if targets.get(name) is not None}
        predictions = self._predict(inputs, present)
        losses = {name: self._task(name).loss(predictions[name], target) for name, target in present.items()}
        for name, loss in losses.items():
            if not (isinstance(loss, Tensor) and loss.numel() == 1):
                found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(
                    f"MultiTaskModule: the loss of task '{name}' should return a scalar tensor, for example by .mean(); "
                    f"got {found}"
                )
        return predictions, losses, present, _batch_size(inputs)

    def _unpack(self, batch: Any) -> tuple[Any, Mapping[str, Any]]:
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Mapping)):
            is_list = isinstance(batch, tuple | list)
            found = f"({', '.join(type(one).__name__ for one in batch)})" if is_list else type(batch).__name__
            raise TypeError(
                f"MultiTaskModule: a batch should be (inputs, targets) with targets a dict by task, such as "
                f"{{'{next(iter(self.tasks))}': …}}; got {found}"
            )
        inputs, targets = batch
        for name in targets:
            if name not in self.tasks and name not in self._left_out:
                raise ValueError(
                    f"MultiTaskModule: the batch has targets of '{name}', which is not a task; "
                    f"{did_you_mean(name, self.tasks)}"
                )
        return inputs, targets

    def task_losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of the tasks that the batch has targets for."""
        return self._step(batch)[1]

    # ---- training ----------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        micro_batches, is_last = self._place_in_window(batch_idx)
        evaluations = 0

        def evaluate() -> Tensor:
            # LBFGS and SAM evaluate several times in a step.
            nonlocal evaluations
            evaluations += 1
            if evaluations > 1:
                _check_evaluated_again(optimizer.optimizer, micro_batches)
                optimizer.zero_grad()
            return self._evaluate_and_backpropagate(batch, micro_batches, is_last=is_last, is_first=evaluations == 1)

        if is_last:
            optimizer.step(evaluate)
            optimizer.zero_grad()
            self._step_scheduler("step")
        else:
            evaluate()

    def _evaluate_and_backpropagate(self, batch: Any, micro_batches: int, *, is_last: bool, is_first: bool) -> Tensor:
        _, losses, _, batch_size = self._step(batch)
        loss = torch.zeros((), device=self.device)
        strategy = self.trainer.strategy
        is_parallel = isinstance(strategy, ParallelStrategy)
        if losses:
            self._trained_in_epoch = True
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WatchesLosses):
                    callback.watch(losses)
            loss = _total(losses)
        elif is_parallel:
            # The other ranks may have tasks, and wait for this rank's part of the gradient and of the balancing.
            loss = _total({name: 0 * p.sum() for name, p in self.encoder.named_parameters() if p.requires_grad})
        if losses or is_parallel:
            with strategy.block_backward_sync() if is_parallel and not is_last else nullcontext():  # type: ignore[attr-defined]
                self.manual_backward(loss / micro_batches)
        if losses and is_first and is_logged_step(self.trainer):
            shown = {"train/loss": loss} | {f"train/loss/{name}": one for name, one in losses.items()}
            self.log_dict({name: one.detach() for name, one in shown.items()}, batch_size=batch_size)
        return loss.detach() / micro_batches

    def _place_in_window(self, batch_idx: int) -> tuple[int, bool]:
        """Return the number of batches in this optimizer step, and whether this is the last of them."""
        size, batches = self.accumulate_grad_batches, self.trainer.num_training_batches
        start = batch_idx - batch_idx % size
        end = int(min(start + size, batches))
        return end - start, batch_idx == end - 1 or self.trainer.is_last_batch

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Here, not after manual_backward: by now a loss scaler has unscaled the gradients.
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.gradient_clip_val, gradient_clip_algorithm="norm")

    @override
    def on_train_epoch_end(self) -> None:
        if not self._trained_in_epoch:
            warnings.warn(
                f"MultiTaskModule: no batch of this epoch had targets of any task, so nothing was trained; a batch is "
                f"(inputs, targets), with targets a dict with keys among {list(self.tasks)}.",
                stacklevel=2,
            )
        self._trained_in_epoch = False
        self._step_scheduler("epoch")

    def _step_scheduler(self, interval: str) -> None:
        if self._schedule is not None:
            self._schedule.step(self, interval)

    @override
    def configure_callbacks(self) -> list[L.Callback]:
        # Lightning's last call before it refuses these flags itself, with advice that does not fit this module.
        for flag, off in (("gradient_clip_val", (None, 0)), ("accumulate_grad_batches", (1,))):
            value = getattr(self.trainer, flag)
            if self.trainer.state.fn == TrainerFn.FITTING and value not in off:
                raise ValueError(
                    f"MultiTaskModule: Trainer({flag}={value}) has no effect on a module that optimizes manually. "
                    f"Remove it, and give MultiTaskModule({flag}={value}), which does the same."
                )
        return []

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.parameters())
        _check(isinstance(optimizer, torch.optim.Optimizer), "optimizer", "a torch optimizer factory", optimizer)
        if self._schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._schedule.make(optimizer)}

    # ---- evaluation --------------------------------------------------------------------------------------------------

    @override
    def on_validation_epoch_start(self) -> None:
        self.val_evaluation.reset()

    @override
    def on_test_epoch_start(self) -> None:
        self.test_evaluation.reset()

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_evaluation.update(*self._step(batch))

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.test_evaluation.update(*self._step(batch))

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val", self.val_evaluation)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", self.test_evaluation)

    def _log_evaluation(self, stage: str, evaluation: Evaluation) -> None:
        # The values are already equal on all ranks, but without sync_dist Lightning would warn.
        self.log_dict({f"{stage}/{name}": value for name, value in evaluation.compute().items()}, sync_dist=True)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Return the predictions by task; the batch is ``(inputs, targets)`` or only the inputs."""
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Mapping)
        return cast("dict[str, Any]", self(batch[0] if is_pair else batch))

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[architecture.KEY] = self._architecture

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Return the model of a checkpoint, with its weights.

        The checkpoint holds the architecture beside the weights. You need no other arguments if encoder, heads and losses
        consist of what torch, torchmetrics and this package provide. For modules of your own, pass them again as ``encoder=``
        and ``tasks=``, or vouch for the file with ``weights_only=False``.

        Args:
            checkpoint_path: the file.
            args: as for `lightning.LightningModule.load_from_checkpoint`.
            kwargs: likewise; arguments of the constructor take precedence over the checkpoint's.

        Raises:
            ValueError: the architecture contains classes of other packages; names them.
        """
        if not {"encoder", "tasks"} <= set(kwargs):
            trusted = kwargs.get("weights_only") is False
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=not trusted)
            try:
                parts = architecture.unpack(checkpoint.get(architecture.KEY, "none saved"), trusted=trusted)
            except ValueError as reason:
                raise ValueError(
                    f"MultiTaskModule: the architecture in {checkpoint_path} cannot be rebuilt: {reason}. Give encoder= and "
                    f"tasks= again or, if you trust the file, weights_only=False."
                ) from None
            kwargs = {**parts, **kwargs}
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)


def _chosen(tasks: Mapping[str, Task], only: Sequence[str] | None) -> Mapping[str, Task]:
    """Return the tasks to train, in their original order."""
    if only is None:
        return tasks
    is_list = isinstance(only, Sequence) and not isinstance(only, str) and 0 < len(only) == len(set(only))
    _check(is_list, "only", "None or a list of tasks, each once, such as ['depth']", only)
    for name in only:
        if name not in tasks:
            raise ValueError(f"MultiTaskModule: there is no task '{name}' to train; {did_you_mean(name, tasks)}")
    return {name: task for name, task in tasks.items() if name in only}


def _check_evaluated_again(optimizer: torch.optim.Optimizer, micro_batches: int) -> None:
    if micro_batches > 1:
        raise ValueError(
            f"MultiTaskModule: {type(optimizer).__name__} evaluates the losses several times in a step, which does not work "
            f"with accumulate_grad_batches: the earlier batches are gone. Use accumulate_grad_batches=1."
        )


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([loss.reshape(()) for loss in losses.values()]).sum()


def _batch_size(inputs: Any) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    return tensors[0].shape[0] if tensors else 1
