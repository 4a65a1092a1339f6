"""The torch data set: images of one split in batches of ``(images, {task: target})``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_gradnorm.experiments.loading.loader import EpochSampler
from lightning_gradnorm.experiments.loading.splits import Batch
from lightning_gradnorm.experiments.problems.dense.nyuv2.augmentations import Augmentations
from lightning_gradnorm.experiments.problems.dense.nyuv2.prepared import Stored
from lightning_gradnorm.experiments.problems.dense.nyuv2.storage_format import Sample, expand

Array = npt.NDArray[Any]
Number = int | tuple[int, int]
"""Index of an image: its position in the split, or epoch and position if images change from epoch to epoch."""

TASKS = ("segmentation", "depth", "normals", "keypoints")


class WithEpoch(EpochSampler):
    """Yields ``(epoch, index)``, so a worker knows the epoch, however long ago it started.

    Example:
        >>> sampler = WithEpoch(range(3), shuffle=False)
        >>> sampler.set_epoch(5)
        >>> list(sampler)
        [(5, 0), (5, 1), (5, 2)]
    """

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        return ((epoch, index) for index in super().__iter__())


class Images(Dataset[Batch]):
    """Some images of one split.

    Args:
        stored: Source of the images.
        split: ``"train"`` or ``"test"``.
        indices: Indices of the images in the split.
        tasks: Targets to return.
        augmentations: Augmentations of the images, if any.
        seed: Seed of the augmentations.
    """

    def __init__(
        self,
        stored: Stored,
        split: str,
        indices: Sequence[int] | Array,
        tasks: Sequence[str] = TASKS[:3],
        augmentations: Augmentations | None = None,
        seed: int = 0,
    ) -> None:
        self.stored = stored
        self.split = split
        self.indices = np.asarray(indices, dtype=np.int64)
        self.tasks = tuple(tasks)
        self.augmentations = augmentations
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, number: Number) -> Sample:
        """Return one augmented image with all targets."""
        epoch, place = number if isinstance(number, tuple) else (0, number)
        index = int(self.indices[place])
        sample = expand(self.stored.arrays(self.split, index))
        if self.augmentations is None:
            return sample
        return self.augmentations(sample, seed=self.seed, epoch=epoch, index=index)

    def __getitem__(self, number: Number) -> Batch:
        images, targets = self.__getitems__([number])
        return images[0], {task: target[0] for task, target in targets.items()}

    def __getitems__(self, numbers: Sequence[Number]) -> Batch:
        """Return a whole batch. The loader's fetcher prefers this method if it exists."""
        samples = [self.sample(number) for number in numbers]
        targets = {task: _stacked([getattr(sample, task) for sample in samples]) for task in self.tasks}
        return _stacked([sample.image for sample in samples]), targets


def _stacked(arrays: Sequence[Array]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
