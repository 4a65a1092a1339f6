"""A DataLoader that can resume in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, Sampler, SequentialSampler


class EpochSampler(DistributedSampler[Any]):
    """Indices of one epoch on one rank. Their order depends only on ``seed`` and the epoch.

    In distributed runs, Lightning replaces any sampler that is not a ``DistributedSampler`` with its own, which shuffles
    even if shuffling is off. It leaves this one alone, also on one rank. Rank ``r`` of ``n`` gets positions
    ``r, r + n, r + 2n, ...``, so the ``k``-th batches of all ranks together are the ``k``-th batch of one process with
    ``n`` times the batch size. If the data set is not divisible by ``n``, the first samples are repeated at the end.

    Args:
        dataset: The data set. Only its length matters.
        shuffle: Draw a new permutation each epoch instead of using the data set's own order.
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
        """Skip the first ``samples`` indices of the next pass. Later passes are complete again."""
        self._skip = samples

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        indices = list(super().__iter__())
        return iter(indices[skip:])


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` that saves its position in the epoch in Lightning's checkpoints.

    ``Trainer.fit(ckpt_path=...)`` continues with the batch after the last trained one, anywhere in the epoch and with any
    ``num_workers``. Earlier batches are skipped as indices, never loaded.

    Iterators are lazy. Lightning creates them before it sets the sampler's epoch, so workers that start prefetching
    immediately would use the order of the wrong epoch.

    Args:
        dataset: A map-style data set with a length.
        sampler: An `EpochSampler`; by default the data set's own order, on one rank.
        trained: Returns the number of batches of this epoch trained so far. By default the number of batches returned,
            which is one too many if a checkpoint is written during a batch (an exception, a signal).
        **options: All other arguments of ``torch.utils.data.DataLoader``.

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
                f"ResumableLoader: sampler should be an EpochSampler, whose order is reproducible; got "
                f"{type(sampler).__name__}. Pass EpochSampler(dataset, shuffle=..., seed=...)."
            )
        super().__init__(dataset, sampler=sampler, **options)
        self.trained = trained
        self._handed_out = 0
        self._resume_epoch: int | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        # A state saved after the last batch belongs to a finished epoch and does not apply to the next one.
        if self._resume_epoch != self.sampler.epoch:
            self._handed_out = 0
        self._resume_epoch = None
        self.sampler.skip_once(self._handed_out * (self.batch_size or 1))
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def _order(self) -> dict[str, Any]:
        """Return everything that determines which samples are in the k-th batch of an epoch."""
        return {
            "samples": len(self.sampler.dataset),  # type: ignore[arg-type]
            "batch_size": self.batch_size,
            "shuffle": self.sampler.shuffle,
            "seed": self.sampler.seed,
            "ranks": self.sampler.num_replicas,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, its number of trained batches, and everything that determines the order of the batches."""
        batches = self._handed_out if self.trained is None else self.trained()
        return {"epoch": self.sampler.epoch, "batches": batches, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches counted in ``state_dict``.

        Raises:
            ValueError: The state was saved within an epoch whose batches this loader cannot reproduce.
        """
        order, saved = self._order(), state_dict["order"]
        differing = [key for key in order if saved.get(key) != order[key]]
        if differing and state_dict["batches"] > 0:
            found = ", ".join(f"{key}={order[key]}" for key in differing)
            expected = ", ".join(f"{key}={saved.get(key)}" for key in differing)
            raise ValueError(
                f"ResumableLoader: a run that stopped within an epoch should continue with {expected}; got {found}. "
                "Resume with the same settings, or from a checkpoint saved at the end of an epoch."
            )
        self.sampler.set_epoch(state_dict["epoch"])
        self._resume_epoch = state_dict["epoch"]
        self._handed_out = state_dict["batches"]
