"""Collocation points, where an equation and its conditions are evaluated, drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_gradnorm._messages import did_you_mean
from lightning_gradnorm.experiments.loading.loader import EpochSampler
from lightning_gradnorm.experiments.loading.splits import SplitsDataModule
from lightning_gradnorm.experiments.problems.pde.equation import Equation

Place = tuple[int, int, int]
"""Number of a step since the start of training, a rank, and the number of ranks."""


class StepSampler(EpochSampler):
    """All steps of an epoch in order, on each rank. The ranks split the points of a step, not the steps.

    Example:
        >>> sampler = StepSampler(range(2), num_replicas=2, rank=1)
        >>> sampler.set_epoch(3)
        >>> list(sampler)
        [(6, 1, 2), (7, 1, 2)]
    """

    @override
    def __iter__(self) -> Iterator[Place]:
        skip, self._skip = self._skip, 0
        steps = len(self.dataset)  # type: ignore[arg-type]
        return iter([(self.epoch * steps + i, self.rank, self.num_replicas) for i in range(skip, steps)])

    @override
    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


class CollocationPoints(Dataset[Any]):
    """The points of N steps: the same in all steps, or different ones in each.

    A batch is a dict of points ``(n, d)`` by task. With reference points, ``"reference"`` holds these points and the exact
    solution there, ``(n, d)`` and ``(n, 1)``.

    Args:
        equation: The equation, which defines the tasks and draws their points.
        counts: Number of points by task.
        seed: Seed of the points, combined with the step if they differ between steps.
        steps: Number of steps.
        resample: Draw different points in each step.
        reference: Points for the exact solution, float64.
    """

    def __init__(
        self,
        equation: Equation,
        counts: Mapping[str, int],
        seed: Sequence[int],
        steps: int = 1,
        resample: bool = False,
        reference: Tensor | None = None,
    ) -> None:
        self.equation, self.counts, self.seed = equation, dict(counts), list(seed)
        self.steps, self.resample = steps, resample
        self.points = self.draw(0)
        self.reference = None
        if reference is not None:
            self.reference = reference.float(), equation.reference(reference).float()

    def draw(self, step: int) -> dict[str, Tensor]:
        """Return the points of a step, float32."""
        found = {}
        for number, task in enumerate(self.equation.tasks):
            stream = np.random.default_rng([*self.seed, number, step])
            found[task] = torch.from_numpy(self.equation.draw(task, self.counts[task], stream)).float()
        return found

    def __len__(self) -> int:
        return self.steps

    def __getitems__(self, places: Sequence[Place]) -> dict[str, Any]:
        """Return a rank's share of a step's points."""
        ((step, rank, ranks),) = places
        points: dict[str, Any] = self.draw(step) if self.resample else self.points
        share: dict[str, Any] = {task: one[rank::ranks] for task, one in points.items()}
        if self.reference is not None:
            share["reference"] = tuple(one[rank::ranks] for one in self.reference)
        return share


class CollocationDataModule(SplitsDataModule[CollocationPoints]):
    """Collocation points of a differential equation. Each step trains on all of them.

    A batch is a dict of points by task, ``float32`` ``(n, d)``. Validation and test also have ``"reference"``, a pair of
    points and the exact solution there. For validation, these points are drawn inside the domain; for the test, they are
    the equation's regular grid. With several ranks, each gets its share of each task's points.

    Args:
        equation: The equation.
        points: Number of points by task, ``{"pde": 256, "boundary": 64}``; at least 2 each.
        resample: Draw different points in each step, so the solution cannot bend between them. False always uses the same
            points, as LBFGS needs.
        steps_per_epoch: Optimizer steps between two validations.
        val_size: Number of points of each task in validation and test, and number of reference points in validation.
        seed: Seed of the points.

    Raises:
        TypeError: A number is not an integer, or ``equation`` is not an `Equation`.
        ValueError: A number is out of range, or ``points`` does not have the tasks of the equation.

    Example:
        >>> from lightning_gradnorm.experiments.problems.pde import Helmholtz
        >>> data = CollocationDataModule(Helmholtz(), {"pde": 256, "boundary": 64})
        >>> data.setup()
        >>> {task: tuple(points.shape) for task, points in next(iter(data.train_dataloader())).items()}
        {'pde': (256, 2), 'boundary': (64, 2)}
    """

    sampler = StepSampler

    def __init__(
        self,
        equation: Equation,
        points: Mapping[str, int],
        resample: bool = True,
        steps_per_epoch: int = 250,
        val_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=1, seed=seed, num_workers=0)
        if not isinstance(equation, Equation):
            raise TypeError(f"CollocationDataModule: equation should be an Equation; got {type(equation).__name__}.")
        for task in points:
            if task not in equation.tasks:
                raise ValueError(
                    f"CollocationDataModule: points names '{task}', which is not a task of {type(equation).__name__}; "
                    f"{did_you_mean(task, equation.tasks)}"
                )
        for task in equation.tasks:
            if task not in points:
                raise ValueError(
                    f"CollocationDataModule: points should give a number for '{task}', a task of "
                    f"{type(equation).__name__}; got {dict(points)}."
                )
            self._check_integer(f"points['{task}']", points[task], at_least=2)
        self._check_integer("steps_per_epoch", steps_per_epoch, at_least=1)
        self._check_integer("val_size", val_size, at_least=2)
        self.equation = equation
        self.points = dict(points)
        self.resample = resample
        self.steps_per_epoch = steps_per_epoch
        self.val_size = val_size

    @property
    def tasks(self) -> tuple[str, ...]:
        """The equation's tasks."""
        return self.equation.tasks

    @override
    def make_splits(self) -> dict[str, CollocationPoints]:
        """Draw the points."""
        train, val, test = ([self.seed, number] for number in range(3))
        counts = dict.fromkeys(self.tasks, self.val_size)
        known = torch.from_numpy(self.equation.inside(self.val_size, np.random.default_rng([*val, len(self.tasks)])))
        return {
            "train": CollocationPoints(self.equation, self.points, train, self.steps_per_epoch, self.resample),
            "val": CollocationPoints(self.equation, counts, val, reference=known),
            "test": CollocationPoints(self.equation, counts, test, reference=self.equation.grid()),
        }
