"""What a network predicts of images, in the loggers that take images, beside the truth."""

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
    """What the network made of the images in one validation, on the CPU."""

    epoch: int
    step: int
    images: Tensor
    by_task: dict[str, tuple[Tensor, Tensor]]
    """Prediction and target."""


@works_in_both_packages
class DensePredictions(L.Callback):
    """Shows image, prediction and truth of dense tasks side by side, as ``val/prediction/<task>``, in loggers that take images.

    The images are the first of the validation loader's first batch, which does not change unless the loader shuffles, so
    that pictures of different epochs can be compared. They are shown at the first validation (of a resumed run, too), as
    soon as ``every_n_epochs`` more epochs are validated, and at the last validation before the training ends. The network
    sees them once more, in the mode in which it is validated; its training is the same to the last bit. Without
    such a logger nothing is done, nor without validation.

    For a model that maps images to a dict of predictions by task, such as a `MultiTaskModule`, and batches ``(images,
    targets)``: images in [0, 1] ``(batch, 3, H, W)``, targets as `dense.pictures.strip` takes them. A task without a target
    in the batch is left out.

    Args:
        every_n_epochs: pictures of one epoch in so many; the epochs are counted from 1.
        images: how many images, one below the other; fewer if the batch has fewer.
        tasks: which of the model's tasks; ``None`` for all that are called segmentation, depth, normals or keypoints. If
            they have other names, a mapping to these: ``{"seg": "segmentation"}``.

    Raises:
        TypeError: the model or the batches are of another kind.
        ValueError: a number that is not positive, or a task of which there is no picture. Both are found in the sanity
            check before training, unless it is switched off.

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
        # On every rank: where the network is sharded, each has a part of it.
        predicted = self._predict(trainer, pl_module, batch)
        if trainer.sanity_checking:
            return
        # That a validation was the last is known afterwards.
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
            step=trainer.fit_loop.epoch_loop._batches_that_stepped,  # what the validation's metrics are logged at
            images=images.cpu(),
            by_task={
                task: (predictions[task].detach().cpu(), targets[task][: self.images].cpu())
                for task in kinds
                if targets.get(task) is not None
            },
        )

    def _kinds_among(self, predictions: Mapping[str, Any]) -> dict[str, str]:
        """Return the kind of each task to be shown."""
        kinds = {task: task for task in TASKS if task in predictions} if self.kinds is None else self.kinds
        if not kinds:
            raise ValueError(
                f"DensePredictions: there are pictures of {', '.join(TASKS)}; the model has none of these tasks, but "
                f"{', '.join(predictions)}. Say of which kind they are, for example tasks={{'{next(iter(predictions))}': "
                "'depth'}, or leave the callback out."
            )
        for task in kinds:
            if task not in predictions:
                raise ValueError(
                    f"DensePredictions: the model predicts no task '{task}'; {did_you_mean(task, predictions)}"
                )
        return kinds

    def _show_latest(self, trainer: L.Trainer) -> None:
        """Write the pictures of the latest validation, unless they are written already."""
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
