"""Weights that do not change: numbers of your own, a GradNorm run's mean weights, or random ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradnorm._messages import check, check_positive_by_task, is_integer
from lightning_gradnorm.callbacks.base import BalancingCallback
from lightning_gradnorm.engine.measurement import Heads
from lightning_gradnorm.engine.rule import DeclaresTasks
from lightning_gradnorm.strategies.fixed import FixedRule


class StaticWeights(BalancingCallback[FixedRule]):
    """Base of the strategies that multiply each task's gradient by a number that does not change.

    Logs ``balancing/weight/<task>``.
    """

    weights: dict[str, float]
    """By task; empty while the tasks are unknown."""

    @override
    def _build_rule(self, like: Tensor) -> FixedRule:
        return FixedRule({task: self.weights[task] for task in self._names}, dtype=like.dtype, device=like.device)

    @override
    def _step_metrics(self) -> dict[str, Tensor | float]:
        return {f"balancing/weight/{task}": weight for task, weight in self.weights.items()}


class FixedWeights(StaticWeights):
    """Multiply each task's gradient by a number that does not change.

    Args:
        weights: task → weight ``w_i > 0``, used as given (they need not sum to T).
        tasks: where to find the losses, as for `GradNorm`; by default the names in ``weights`` (keys of what
            ``training_step`` returns, tasks of a `MultiTaskModule`).
        losses_from: as for `GradNorm`.
        heads: accepted by every strategy, so that you can swap one for another; no gradient is read.

    Raises:
        ValueError: fewer than two tasks, a weight that is not positive and finite, or a task without a weight.

    Logs ``balancing/weight/<task>``.

    Example:
        >>> import lightning as L
        >>> from lightning_gradnorm import FixedWeights
        >>> trainer = L.Trainer(callbacks=[FixedWeights({"seg": 1.0, "depth": 0.2})], logger=False)
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        losses_from: str | Mapping[str, str] | None = None,
        heads: Heads = "auto",
    ) -> None:
        if not (isinstance(weights, Mapping) and all(isinstance(task, str) for task in weights)):
            raise TypeError(f"{self._name}: weights should be a mapping from task name to number; got {weights!r}")
        super().__init__(list(weights) if tasks is None else tasks, losses_from=losses_from, heads=heads)
        check_positive_by_task(weights, self._names, caller=self._name, parameter="weights")
        self.weights = {task: float(weights[task]) for task in self._names}


class GradNormStatic(StaticWeights):
    """Train on the mean weights of a finished `GradNorm` run: "GradNorm static" of Chen et al., 2018, Tables 1 and 2.

    Args:
        run: folder of a ``gradnorm-train`` run, whose ``checkpoints/last.ckpt`` is read; or any checkpoint of a Trainer
            that had `GradNorm` among its callbacks. The weights are the mean over all its steps, by task name.
        tasks: where to find the losses, as for `GradNorm`; by default the names in the checkpoint.
        losses_from: as for `GradNorm`.
        heads: accepted by every strategy, so that you can swap one for another; no gradient is read.
        from_run: the name of ``run`` on the command line.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: it has no `GradNorm` state, or the state of other tasks.

    Logs ``balancing/weight/<task>``.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        *,
        losses_from: str | Mapping[str, str] | None = None,
        heads: Heads = "auto",
        from_run: str | Path | None = None,
    ) -> None:
        check("GradNormStatic", (run is None) != (from_run is None), "run (or from_run)", "one finished run", run)
        weights = _mean_weights(_checkpoint_of(Path(run or from_run or "")))
        if tasks is not None:
            self._check_same(weights, tasks)
        super().__init__(list(weights) if tasks is None else tasks, losses_from=losses_from, heads=heads)
        self.weights = {task: weights[task] for task in self._names}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, DeclaresTasks) and self._source.logged_names is None:
            self._check_same(self.weights, pl_module.task_heads)
        super().on_train_start(trainer, pl_module)

    def _check_same(self, weights: Mapping[str, float], tasks: Collection[str]) -> None:
        if set(tasks) != set(weights):
            raise ValueError(
                f"GradNormStatic: the checkpoint has tasks {sorted(weights)}, but this run has {sorted(tasks)}. Give a run of "
                f"the same tasks, or your own numbers to FixedWeights."
            )


class RandomWeights(StaticWeights):
    """Train on random weights that do not change: one of the networks of Chen et al., 2018, Figure 4.

    ``w_i = T u_i / Σ_j u_j`` with ``u_i`` uniform between 0 and 1. They depend only on the seed and the tasks' names: if you
    reorder the names, each keeps its weight.

    Args:
        seed: at least 0; the same seed gives the same weights everywhere. Torch's own generator is not touched.
        tasks: as for `GradNorm`.
        losses_from: as for `GradNorm`.
        heads: accepted by every strategy, so that you can swap one for another; no gradient is read.

    Raises:
        ValueError: fewer than two tasks, or a seed that is not an integer.

    Logs ``balancing/weight/<task>``.

    Example:
        >>> {task: round(weight, 3) for task, weight in RandomWeights(0, tasks=["seg", "depth"]).weights.items()}
        {'seg': 1.814, 'depth': 0.186}
    """

    def __init__(
        self,
        seed: int = 0,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        *,
        losses_from: str | Mapping[str, str] | None = None,
        heads: Heads = "auto",
    ) -> None:
        super().__init__(tasks, losses_from=losses_from, heads=heads)
        check(self._name, is_integer(seed, least=0), "seed", "an integer, at least 0", seed)
        self.seed = seed

    @property
    def weights(self) -> dict[str, float]:  # type: ignore[override]
        """By task; empty while the tasks are unknown."""
        names = self._trained._names
        T = len(names)
        numbers = 1 - torch.rand(T, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))  # never 0
        by_name = dict(zip(sorted(names), (T * numbers / numbers.sum()).tolist(), strict=True))
        return {task: by_name[task] for task in names}


def _checkpoint_of(path: Path) -> Path:
    """Return the checkpoint itself, or the last one of the run in that folder."""
    last = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if last.is_file():
        return last
    found = ", ".join(sorted(map(str, path.glob("checkpoints/*.ckpt"))))
    raise FileNotFoundError(
        f"GradNormStatic: run should be the folder of a finished run, or a checkpoint; there is no {last}. "
        + (f"Give one of {found}." if found else "Train with GradNorm first.")
    )


def _mean_weights(checkpoint: Path) -> dict[str, float]:
    """Return the mean weights that a GradNorm callback stored in a checkpoint."""
    try:
        callbacks = torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"]
        states = [state for state in callbacks.values() if isinstance(state, Mapping)]
    except Exception as reason:  # whatever the unpickler raises on a foreign file
        raise ValueError(
            f"GradNormStatic: run should be a run or a checkpoint of Lightning; {checkpoint} cannot be read as one "
            f"({type(reason).__name__})."
        ) from reason
    for state in states:
        if {"tasks", "weights_mean"} <= state.keys():
            return dict(zip(state["tasks"], state["weights_mean"].tolist(), strict=True))
    raise ValueError(
        f"GradNormStatic: run should be a run with GradNorm; {checkpoint} has no state of it, only of "
        f"{', '.join(callbacks) or 'no callback'}."
    )
