"""Multi-task data held in memory, and the data module that serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_gradnorm.experiments.loading.splits import Batch, SplitsDataModule


class TaskTensors(Dataset[Batch]):
    """Samples of a multi-task data set held in memory: ``(inputs, {task: target})``.

    A batch is one indexing operation per tensor, not one per sample, so you need no worker processes.

    Args:
        inputs: Shape ``(samples, ...)``. ``uint8`` means pixels, which are returned as ``float32`` in [0, 1].
        targets: By task name, each of shape ``(samples, ...)``.

    Raises:
        ValueError: A target has a different number of samples than the inputs.

    Example:
        >>> data = TaskTensors(torch.zeros(5, 3), {"depth": torch.ones(5, 1)})
        >>> inputs, targets = data[2]
        >>> inputs.shape, targets["depth"]
        (torch.Size([3]), tensor([1.]))
    """

    def __init__(self, inputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        for task, target in targets.items():
            if len(target) != len(inputs):
                raise ValueError(
                    f"TaskTensors: targets[{task!r}] should have as many samples as the inputs, {len(inputs)}; "
                    f"got {len(target)}."
                )
        self.inputs = inputs
        self.targets = dict(targets)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Batch:
        return self._at(torch.tensor(index))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a whole batch. The loader's fetcher prefers this method if it exists."""
        return self._at(torch.tensor(indices))

    def _at(self, index: Tensor) -> Batch:
        inputs = self.inputs[index]
        if inputs.dtype == torch.uint8:
            inputs = inputs.float().div_(255)
        return inputs, {task: target[index] for task, target in self.targets.items()}


class InMemoryDataModule(SplitsDataModule[TaskTensors]):
    """Three splits of `TaskTensors`, created once and served by one `ResumableLoader` each.

    A subclass creates its splits in `make_splits`. With several ranks, each gets its part of every batch.

    Args:
        train_size: Number of training samples.
        val_size: Number of validation samples.
        test_size: Number of test samples.
        batch_size: Samples per batch and rank.
        seed: Seed of all random draws: the data and the order of the training batches.
        num_workers: Worker processes per loader. The data are in memory, so 0 is the fastest.
        drop_last: Drop the last batch of a training epoch if it has fewer than ``batch_size`` samples (different ones
            each epoch).

    Raises:
        TypeError: A size or the seed is not an integer.
        ValueError: A size is less than one, or ``seed`` or ``num_workers`` negative.
    """

    def __init__(
        self,
        train_size: int,
        val_size: int,
        test_size: int,
        batch_size: int,
        seed: int,
        num_workers: int,
        drop_last: bool = False,
    ) -> None:
        sizes = {"train_size": train_size, "val_size": val_size, "test_size": test_size}
        for parameter, size in sizes.items():
            self._check_integer(parameter, size, at_least=1)
        super().__init__(batch_size, seed, num_workers, drop_last)
        self.train_size = train_size
        self.val_size = val_size
        self.test_size = test_size
