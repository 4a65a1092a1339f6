"""Rendered rooms as a data module: NYUv2's tasks without a download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_gradnorm.experiments.loading.splits import Batch
from lightning_gradnorm.experiments.loading.tensors import InMemoryDataModule, TaskTensors
from lightning_gradnorm.experiments.problems.dense.rooms.render import Size, render

TASKS = ("segmentation", "depth", "normals", "keypoints")
SPLITS = ("train", "val", "test")


class RoomViews(TaskTensors):
    """Pictures of rooms, rendered once and kept in memory, or rendered on access.

    In memory, images and classes are bytes.

    Args:
        seed: Seed of the rooms.
        scenes: Room numbers, one picture each, shape ``(samples,)``.
        input_size: Height and width of the images.
        output_size: Height and width of the targets.
        tasks: The targets, from `TASKS`.
        in_memory: Render all pictures now and keep them.

    Example:
        >>> views = RoomViews(0, torch.arange(3), (24, 32), (12, 16), tasks=("depth",))
        >>> image, targets = views[2]
        >>> image.shape, targets["depth"].shape
        (torch.Size([3, 24, 32]), torch.Size([1, 12, 16]))
    """

    def __init__(
        self,
        seed: int,
        scenes: Tensor,
        input_size: Size,
        output_size: Size,
        tasks: Sequence[str] = TASKS,
        in_memory: bool = False,
    ) -> None:
        super().__init__(scenes, {})
        self.seed = seed
        self.input_size = input_size
        self.output_size = output_size
        self.tasks = tuple(tasks)
        self._kept = self._render(scenes) if in_memory else None

    def _render(self, scenes: Tensor) -> TaskTensors:
        columns: dict[str, list[Tensor]] = {name: [] for name in ("image", *self.tasks)}
        for scene in scenes.tolist():
            view = render(self.seed, scene, self.input_size, self.output_size)
            for name, column in columns.items():
                column.append(torch.from_numpy(getattr(view, name)))
        images, *targets = (torch.stack(column) for column in columns.values())
        return TaskTensors(images, dict(zip(self.tasks, targets, strict=True)))

    def _at(self, index: Tensor) -> Batch:
        if self._kept is not None:
            images, targets = self._kept._at(index)
        elif index.ndim == 0:
            images, targets = self._render(self.inputs[index : index + 1])[0]
        else:
            images, targets = self._render(self.inputs[index]).__getitems__(range(len(index)))
        return images, {task: self._unpacked(task, target) for task, target in targets.items()}

    def _unpacked(self, task: str, target: Tensor) -> Tensor:
        return target.long() if task == "segmentation" else target


class RoomsDataModule(InMemoryDataModule):
    """Random furnished rooms with NYUv2's tasks, exact labels and nothing to download.

    Each is a box room with windows, pictures and a door, furnished as a bedroom, a living room, a study or a dining room,
    lit by a lamp and seen through NYUv2's camera from where a person could stand. Every picture shows a different room, and
    no room is in two splits. The size of one split does not change the rooms of another.

    A batch is ``(images, targets)``: images ``float32`` in [0, 1], ``(batch, 3, H, W)``; targets, with size
    ``output_size``, for the chosen ``tasks``:

    - ``segmentation``: NYUv2's classes 0 to 12, ``int64``, ``(batch, h, w)``;
    - ``depth``: meters along the optical axis, ``float32``, ``(batch, 1, h, w)``;
    - ``normals``: unit vectors, x right, y up, z toward the camera, ``float32``, ``(batch, 3, h, w)``;
    - ``keypoints``: the 48 room-layout keypoints, each (x, y, visible) in pixels of the output from its upper left edge,
      ``float32``, ``(batch, 48, 3)``; `KeypointLoss` draws the heat maps.

    Every pixel has a label. Targets are rendered at the output's own pixels, not resized.

    Args:
        input_size: Height and width of the images.
        output_size: Height and width of the targets; by default those of the images.
        tasks: The targets, in their order in a batch.
        train_size: Number of training rooms.
        val_size: Number of validation rooms.
        test_size: Number of test rooms.
        batch_size: Samples per batch and rank.
        seed: Seed of the rooms and of the order of the training batches.
        num_workers: Worker processes per loader. Use some without ``in_memory``, 0 with it.
        in_memory: Render all rooms once, at ``setup``, in one process, and keep them: about 120 per second at 60 x 80 and
            18 at 320 x 320, about ``3 H W + 17 h w`` bytes each. Otherwise, workers render pictures on access and keep
            nothing.
        drop_last: Drop the last batch of a training epoch if it has fewer than ``batch_size`` samples (different ones
            each epoch).

    Raises:
        TypeError: A size is not an integer or not a pair of integers.
        ValueError: A size is out of range, or ``tasks`` is empty or has an unknown or repeated task.

    Example:
        >>> data = RoomsDataModule((12, 16), tasks=["depth"], train_size=2, val_size=1, test_size=1, batch_size=2)
        >>> data.setup()
        >>> images, targets = next(iter(data.train_dataloader()))
        >>> images.shape, targets["depth"].shape
        (torch.Size([2, 3, 12, 16]), torch.Size([2, 1, 12, 16]))
    """

    stands_in_for = ("nyuv2", "Rendered rooms stand in for NYUv2. With its files: data=nyuv2 data.root=FOLDER")
    """Prefix of the experiments whose data it replaces, and the message that such a run prints."""

    def __init__(
        self,
        input_size: Sequence[int] = (60, 80),
        output_size: Sequence[int] | None = None,
        tasks: Sequence[str] = ("segmentation", "depth", "normals"),
        train_size: int = 1_000,
        val_size: int = 200,
        test_size: int = 200,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
        in_memory: bool = True,
        drop_last: bool = False,
    ) -> None:
        super().__init__(train_size, val_size, test_size, batch_size, seed, num_workers, drop_last)
        self.input_size = self._size("input_size", input_size)
        self.output_size = self.input_size if output_size is None else self._size("output_size", output_size)
        self.tasks = tuple(tasks)
        for task in self.tasks:
            self._check_choice("tasks", task, TASKS)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(
                f"RoomsDataModule: tasks should name at least one task, and none twice; got {list(tasks)}."
            )
        self.in_memory = in_memory

    def make_splits(self) -> dict[str, TaskTensors]:
        """Assign the rooms to the splits, and render them if they are kept in memory."""
        counts = (self.train_size, self.val_size, self.test_size)
        if self.in_memory:
            height, width = self.input_size
            rank_zero_info(f"RoomsDataModule: rendering {sum(counts):,} rooms at {height} x {width}, once.")
        return {
            split: RoomViews(
                self.seed,
                # Every third number belongs to this split, so splits of any size share no rooms.
                torch.arange(count) * len(SPLITS) + number,
                self.input_size,
                self.output_size,
                self.tasks,
                self.in_memory,
            )
            for number, (split, count) in enumerate(zip(SPLITS, counts, strict=True))
        }

    def _size(self, parameter: str, size: Any) -> Size:
        if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2:
            raise TypeError(f"RoomsDataModule: {parameter} should be a height and a width; got {size!r}.")
        for number in size:
            self._check_integer(parameter, number, at_least=1)
        height, width = size
        return height, width
