"""Any scalarization of the losses as a Lightning callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradnorm.callbacks.of_losses import Made, OfLosses, check_made
from lightning_gradnorm.strategies.scalarization import OptimizerFactory, ScalarizationRule


class Scalarization(OfLosses):
    """Train on any function of the losses: each task's gradient is weighted by the function's derivative at its loss.

    The weights are those of the losses of the very batch, averaged over the ranks. With accumulation each batch is
    scalarized by itself. The loss that the model returns and logs stays its own.

    Args:
        scalarizer: a `torchjd.scalarization` object, or any ``nn.Module`` from the losses, shape (T,), in the order of
            ``tasks``, to a scalar; or what makes one from the number of tasks, as ``torchjd.scalarization.UW`` does. Its
            parameters are learnt. What it does besides is called for: `DWA` hears of each epoch's end, `FAMO` gets the losses
            of the same batch after the step: ``training_step`` is called once more, without gradients and without a trace in
            metrics, logs, statistics or random numbers, as long as it leaves its batch as it is.
        tasks: as for `GradNorm`.
        heads: taken as by every strategy, so that one can be exchanged for another; no gradient is read.
        optimizer: makes the optimizer of the scalarizer's parameters; the default is GradNorm's.

    A task that is absent from a batch enters with its last loss; until each has been seen, all are weighted 1. Where a loss
    or a derivative is not finite, all tasks are weighted alike in that step, which is counted and warned of once. Random
    numbers of the scalarizer (`Random`) are its own, the same on all ranks.

    Raises:
        ValueError: at the start of training, if the scalarizer cannot be called with T losses, returns no scalar, or one that
            is not finite for losses of 1.

    Logs ``balancing/weight/<task>`` and ``balancing/fallbacks``.

    Example:
        >>> import lightning as L
        >>> from torchjd.scalarization import UW
        >>> from lightning_gradnorm import Scalarization
        >>> trainer = L.Trainer(callbacks=[Scalarization(UW, tasks=["seg", "depth"])], logger=False)
    """

    def __init__(
        self,
        scalarizer: Made,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        *,
        heads: Mapping[str, str] | None = None,
        optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=0.025),
    ) -> None:
        super().__init__(tasks, scalarizer, optimizer, heads=heads, representation="encoder")
        check_made(self._name, "scalarizer", scalarizer)

    @override
    def _new_rule(self, like: Tensor) -> ScalarizationRule:
        assert self._scalarizer is not None
        return ScalarizationRule(
            self._names,
            self._fresh("scalarizer", self._scalarizer),
            optimizer=self.optimizer,
            seed=self._seed,
            dtype=like.dtype,
            device=like.device,
        )
