"""A DataLoader that a run can leave in the middle of an epoch and come back to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, Sampler, SequentialSampler


class EpochSampler(DistributedSampler[Any]):
    """Indices of one epoch on one rank, in an order that follows from ``seed`` and the epoch alone.

    Lightning replaces a sampler by its own in distributed runs unless it is a ``DistributedSampler``, and then shuffles
    even where shuffling is off. This one is left alone, also on one rank. Rank ``r`` of ``n`` gets positions
    ``r, r + n, r + 2n, ...``, so that the ranks' ``k``-th batches together are the ``k``-th batch of one process with
    ``n`` times the batch size. If the data set is not divisible by ``n`` the first samples are repeated at the end.

    Args:
        dataset: The data set, of which only the length matters.
        shuffle: Draw a new permutation each epoch; otherwise the data set's own order.
        seed: Seed of the permutations.
        num_replicas: Number of ranks.
        rank: This process's rank, ``0 <= rank < num_replicas``.

    Raises:
        ValueError: ``rank`` is not one of the ranks.

    Example:
        >>> sampler = EpochSampler(range(6), shuffle=False, num_replicas=2, rank=1)
        >>> list(sampler)
        [1, 3, 5]
    """

    def __init__(
        self, dataset: Any, *, shuffle: bool = True, seed: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self._skip = 0

    def skip_once(self, samples: int) -> None:
        """Leave out the first ``samples`` indices of the next pass; the passes after it are whole again."""
        self._skip = samples

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        indices = list(super().__iter__())
        return iter(indices[skip:])


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` whose place in the epoch is saved in Lightning's checkpoints.

    ``Trainer.fit(ckpt_path=...)`` goes on with the batch after the last one trained on, whichever batch of the epoch
    that was and whatever ``num_workers``; the batches before it are skipped as indices, never loaded.

    Iterators are lazy: Lightning makes them before it tells the sampler which epoch it is, and workers that started
    to prefetch right then would read the order of the wrong epoch.

    Args:
        dataset: A map-style data set with a length.
        sampler: An `EpochSampler`; default: the data set's own order, on one rank.
        trained: Returns how many batches of this epoch have been trained on. Default: those handed out, which is one
            too many when a checkpoint is written while a batch is being trained on (an exception, a signal).
        **options: Every other argument of ``torch.utils.data.DataLoader``.

    Raises:
        TypeError: ``sampler`` is not an `EpochSampler`.

    Example:
        >>> loader = ResumableLoader(range(6), batch_size=2)
        >>> first = next(iter(loader))
        >>> resumed = ResumableLoader(range(6), batch_size=2)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> [batch.tolist() for batch in resumed]
        [[2, 3], [4, 5]]
    """

    sampler: EpochSampler

    def __init__(
        self,
        dataset: Any,
        sampler: Sampler[Any] | None = None,
        trained: Callable[[], int] | None = None,
        **options: Any,
    ) -> None:
        # Trainer(overfit_batches=...) rebuilds the loader with a SequentialSampler to turn shuffling off.
        if sampler is None or isinstance(sampler, SequentialSampler):
            sampler = EpochSampler(dataset, shuffle=False)
        if not isinstance(sampler, EpochSampler):
            raise TypeError(
                f"ResumableLoader: sampler should be an EpochSampler, whose order can be found again; got "
                f"{type(sampler).__name__}. Pass EpochSampler(dataset, shuffle=..., seed=...)."
            )
        super().__init__(dataset, sampler=sampler, **options)
        self.trained = trained
        self._handed_out = 0
        self._resume_epoch: int | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        # A state saved after an epoch's last batch is that of a finished epoch: it says nothing about the next one.
        if self._resume_epoch != self.sampler.epoch:
            self._handed_out = 0
        self._resume_epoch = None
        self.sampler.skip_once(self._handed_out * (self.batch_size or 1))
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def _order(self) -> dict[str, Any]:
        """Collect what decides which samples are in the k-th batch of an epoch."""
        return {
            "samples": len(self.sampler.dataset),  # type: ignore[arg-type]
            "batch_size": self.batch_size,
            "shuffle": self.sampler.shuffle,
            "seed": self.sampler.seed,
            "ranks": self.sampler.num_replicas,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the batches of it already trained on, and what the order of the batches depends on."""
        batches = self._handed_out if self.trained is None else self.trained()
        return {"epoch": self.sampler.epoch, "batches": batches, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches that ``state_dict`` counts.

        Raises:
            ValueError: The state was saved within an epoch whose batches this loader cannot form again.
        """
        order, saved = self._order(), state_dict["order"]
        differing = [key for key in order if saved.get(key) != order[key]]
        if differing and state_dict["batches"] > 0:
            found = ", ".join(f"{key}={order[key]}" for key in differing)
            expected = ", ".join(f"{key}={saved.get(key)}" for key in differing)
            raise ValueError(
                f"ResumableLoader: a run that stopped within an epoch should go on with {expected}; got {found}. "
                "Resume with the same settings, or from a checkpoint saved at the end of an epoch."
            )
        self.sampler.set_epoch(state_dict["epoch"])
        self._resume_epoch = state_dict["epoch"]
        self._handed_out = state_dict["batches"]
