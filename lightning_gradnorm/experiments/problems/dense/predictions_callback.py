"""Logs images with a network's predictions next to the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightning_gradnorm._messages import check, did_you_mean, is_integer
from lightning_gradnorm.callbacks.logging import log_image, loggers_of_images
from lightning_gradnorm.callbacks.packages import works_in_both_packages
from lightning_gradnorm.experiments.problems.dense.pictures import TASKS, stack, strip


@dataclass
class _Predicted:
    """The network's predictions in one validation, on the CPU."""

    epoch: int
    step: int
    images: Tensor
    by_task: dict[str, tuple[Tensor, Tensor]]
    """Prediction and target."""


@works_in_both_packages
class DensePredictions(L.Callback):
    """Logs image, prediction and truth of dense tasks side by side, as ``val/prediction/<task>``, to loggers for images.

    The images are the first ones in the validation loader's first batch. They stay the same unless the loader shuffles, so
    you can compare epochs. They are logged at the first validation (also after a resume), every ``every_n_epochs`` epochs,
    and at the last validation before training ends. The network evaluates them a second time in validation mode, and
    training stays bit-identical. Without validation or a logger for images, the callback does nothing.

    The model must map images to a dict of predictions by task, like a `MultiTaskModule`, with batches ``(images,
    targets)``: images in [0, 1] ``(batch, 3, H, W)``, targets as for `dense.pictures.strip`. Tasks without a target in the
    batch are skipped.

    Args:
        every_n_epochs: number of epochs between two pictures, counted from epoch 1.
        images: number of images, one below the other; fewer if the batch has fewer.
        tasks: the tasks to show; ``None`` for all called segmentation, depth, normals or keypoints. If your tasks have
            other names, map them to these: ``{"seg": "segmentation"}``.

    Raises:
        TypeError: the model or the batches have the wrong type.
        ValueError: a number is not positive, or a task cannot be drawn. The sanity check before training finds both,
            unless you switch it off.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[DensePredictions(every_n_epochs=10)], logger=False)
    """

    def __init__(
        self, every_n_epochs: int = 5, images: int = 4, tasks: Sequence[str] | Mapping[str, str] | None = None
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("images", images)):
            check("DensePredictions", is_integer(value) and value > 0, name, "a positive integer", value)
        is_chosen = tasks is None or (len(tasks) > 0 and not isinstance(tasks, str))
        check("DensePredictions", is_chosen, "tasks", "None, a list of tasks, or a mapping from tasks to kinds", tasks)
        self.every_n_epochs = every_n_epochs
        self.images = images
        named = tasks if tasks is None or isinstance(tasks, Mapping) else {task: task for task in tasks}
        self.kinds = None if named is None else dict(named)
        for kind in (self.kinds or {}).values():
            if kind not in TASKS:
                raise ValueError(f"DensePredictions: there is no picture of {kind!r}; {did_you_mean(str(kind), TASKS)}")
        self._shown_epoch: int | None = None
        self._latest: _Predicted | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shown_epoch = self._latest = None

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        is_first = batch_idx == dataloader_idx == 0
        if not is_first or trainer.state.fn != TrainerFn.FITTING or not loggers_of_images(trainer):
            return
        # Run on every rank, because each has a part of a sharded network.
        predicted = self._predict(trainer, pl_module, batch)
        if trainer.sanity_checking:
            return
        # Only later is it known if this validation was the last.
        self._latest = predicted
        shown = None if self._shown_epoch is None else self._shown_epoch // self.every_n_epochs
        if shown is None or predicted.epoch // self.every_n_epochs > shown:
            self._show_latest(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show_latest(trainer)

    def _predict(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> _Predicted:
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Mapping)
        if not (is_pair and isinstance(batch[0], Tensor)):
            raise TypeError(
                "DensePredictions: a validation batch should be (images, targets), images a tensor and targets a dict by "
                f"task; got {type(batch).__name__}. Leave the callback out for such data."
            )
        images, targets = batch[0][: self.images], batch[1]
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"), trainer.precision_plugin.val_step_context():
            predictions = pl_module(images)
        if not isinstance(predictions, Mapping):
            raise TypeError(
                "DensePredictions: the model should return a dict of predictions by task when it is called with images; "
                f"{type(pl_module).__name__} returned {type(predictions).__name__}."
            )
        kinds = self._kinds_among(predictions)
        return _Predicted(
            epoch=trainer.current_epoch + 1,
            step=trainer.fit_loop.epoch_loop._batches_that_stepped,  # same step as the validation metrics
            images=images.cpu(),
            by_task={
                task: (predictions[task].detach().cpu(), targets[task][: self.images].cpu())
                for task in kinds
                if targets.get(task) is not None
            },
        )

    def _kinds_among(self, predictions: Mapping[str, Any]) -> dict[str, str]:
        """Return the kind of each task to show."""
        kinds = {task: task for task in TASKS if task in predictions} if self.kinds is None else self.kinds
        if not kinds:
            raise ValueError(
                f"DensePredictions: there are pictures of {', '.join(TASKS)}; the model has none of these tasks, but "
                f"{', '.join(predictions)}. Set their kinds, for example tasks={{'{next(iter(predictions))}': "
                "'depth'}, or leave the callback out."
            )
        for task in kinds:
            if task not in predictions:
                raise ValueError(
                    f"DensePredictions: the model predicts no task '{task}'; {did_you_mean(task, predictions)}"
                )
        return kinds

    def _show_latest(self, trainer: L.Trainer) -> None:
        """Log the pictures of the latest validation, unless they are already logged."""
        predicted, self._latest = self._latest, None
        if predicted is None:
            return
        self._shown_epoch = predicted.epoch
        if not trainer.is_global_zero:
            return
        for task, (predictions, targets) in predicted.by_task.items():
            kind = task if self.kinds is None else self.kinds[task]
            samples = zip(predicted.images, predictions, targets, strict=True)
            picture = stack([strip(kind, *sample) for sample in samples])
            log_image(trainer, f"val/prediction/{task}", picture, predicted.step)
