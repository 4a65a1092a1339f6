"""Base class of the data modules: three splits, a resumable loader for each, and argument checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, Generic, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lightning_gradnorm._messages import nearest
from lightning_gradnorm.experiments.loading.loader import EpochSampler, ResumableLoader

Batch = tuple[Tensor, dict[str, Tensor]]
Split = TypeVar("Split")


class SplitsDataModule(L.LightningDataModule, Generic[Split]):
    """Data sets for ``"train"``, ``"val"`` and ``"test"``, created once and served by one `ResumableLoader` each.

    A subclass creates its splits in `make_splits`. A split is a data set that returns whole batches from
    ``__getitems__``. With several ranks, each gets its part of every batch.

    Args:
        batch_size: Samples per batch and rank.
        seed: Seed of all random draws: the data and the order of the training batches.
        num_workers: Worker processes per loader.
        drop_last: Drop the last batch of a training epoch if it has fewer than ``batch_size`` samples (different ones
            each epoch).

    Raises:
        TypeError: An argument is not an integer.
        ValueError: ``batch_size`` is less than one, or ``seed`` or ``num_workers`` negative.
    """

    sampler: type[EpochSampler] = EpochSampler
    """The sampler of the loaders. A subclass may choose another."""

    def __init__(self, batch_size: int, seed: int, num_workers: int, drop_last: bool = False) -> None:
        super().__init__()
        self._check_integer("batch_size", batch_size, at_least=1)
        self._check_integer("seed", seed, at_least=0)
        self._check_integer("num_workers", num_workers, at_least=0)
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.drop_last = drop_last
        self._splits: dict[str, Split] = {}

    def _validate_on_nothing(self) -> None:
        # Lightning skips validation if a module does not override this method.
        self.val_dataloader = MethodType(L.LightningDataModule.val_dataloader, self)  # type: ignore[method-assign]

    def make_splits(self) -> dict[str, Split]:
        """Create the data of ``"train"``, ``"val"`` and ``"test"``."""
        raise NotImplementedError(f"{type(self).__name__}: make_splits should be overridden; it creates the data.")

    def setup(self, stage: str | None = None) -> None:
        """Create all three splits for any ``stage``. Further calls do nothing."""
        if not self._splits:
            self._splits = self.make_splits()

    @property
    def train_data(self) -> Split:
        """The training split."""
        return self._split("train")

    @property
    def val_data(self) -> Split:
        """The validation split."""
        return self._split("val")

    @property
    def test_data(self) -> Split:
        """The test split."""
        return self._split("test")

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the training split, in a new order each epoch.

        Raises:
            ValueError: ``drop_last`` leaves no batches.
        """
        loop: Any = self.trainer and self.trainer.fit_loop.epoch_loop
        trained = None if loop is None else lambda: loop.batch_progress.current.processed
        loader = self._loader(self.train_data, shuffle=True, trained=trained, drop_last=self.drop_last)
        if len(loader) == 0:
            raise ValueError(
                f"{type(self).__name__}: batch_size should be at most {len(loader.sampler)}, the training samples of a rank, "
                f"if incomplete batches are dropped (drop_last); got {self.batch_size}."
            )
        return loader

    def val_dataloader(self) -> ResumableLoader:
        """Batches of the validation split, in order."""
        return self._loader(self.val_data, shuffle=False)

    def test_dataloader(self) -> ResumableLoader:
        """Batches of the test split, in order."""
        return self._loader(self.test_data, shuffle=False)

    def _loader(
        self, data: Split, *, shuffle: bool, trained: Callable[[], int] | None = None, drop_last: bool = False
    ) -> ResumableLoader:
        # Ask the strategy: with tensor parallelism there are fewer shares of the data than ranks.
        share = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        return ResumableLoader(
            data,
            sampler=self.sampler(data, shuffle=shuffle, seed=self.seed, **share),
            trained=trained,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            drop_last=drop_last,
            collate_fn=_already_a_batch,
            # A separate generator, otherwise every pass over the data would advance the global one that dropout uses.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _split(self, name: str) -> Split:
        if not self._splits:
            raise RuntimeError(f"{type(self).__name__}: setup() creates the data; call it first.")
        return self._splits[name]

    def _check_integer(self, parameter: str, value: Any, at_least: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{type(self).__name__}: {parameter} should be an integer; got {value!r}.")
        if value < at_least:
            raise ValueError(f"{type(self).__name__}: {parameter} should be at least {at_least}; got {value}.")

    def _numbers(self, parameter: str, values: Iterable[float]) -> tuple[float, ...]:
        try:
            return tuple(float(value) for value in values)
        except (TypeError, ValueError):
            raise TypeError(
                f"{type(self).__name__}: {parameter} should be a list of numbers; got {values!r}."
            ) from None

    def _check_choice(self, parameter: str, value: str, choices: Iterable[str]) -> None:
        choices = list(choices)
        if value not in choices:
            near = nearest(str(value), choices)
            hint = f" Did you mean {near!r}?" if near else ""
            raise ValueError(
                f"{type(self).__name__}: {parameter} should be one of {', '.join(map(repr, choices))}; got {value!r}.{hint}"
            )

    def _stream(self, name: str, number: int = 0) -> np.random.Generator:
        """Return a separate generator for each random quantity, so no draw depends on the others."""
        return np.random.default_rng([self.seed, int.from_bytes(name.encode(), "little"), number])


def _already_a_batch(batch: Batch) -> Batch:
    return batch
