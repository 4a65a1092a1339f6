"""Two regression tasks with adjustable similarity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lightning_gradnorm.experiments.loading.loader import ResumableLoader
from lightning_gradnorm.experiments.loading.tensors import InMemoryDataModule, TaskTensors

Array = npt.NDArray[np.float64]


class SinusoidsDataModule(InMemoryDataModule):
    r"""Two tasks that read nearby directions of the input through the same sum of sines.

    With orthogonal unit vectors :math:`u_1, u_2`, :math:`w_1 = c\,u_1` and :math:`w_2 = c\,(p\,u_1 + \sqrt{1-p^2}\,u_2)`,

    .. math:: y_k = w_k \cdot x + \sum_{i=1}^{m} \sin(\alpha_i\, w_k \cdot x + \beta_i) + \varepsilon_k, \quad x \sim N(0, I).

    The cosine between the directions is :math:`p`. It determines the correlation of the labels, which is measured
    and logged as ``data/label_correlation`` before the first batch of a fit.

    A batch is ``(inputs, targets)``: inputs ``float32`` of shape ``(batch, input_dim)``; targets ``first`` and
    ``second``, ``float32`` of shape ``(batch, 1)``.

    Source: Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts, KDD 2018,
    section 3.2, which gives no values for c, m, alpha and beta. The defaults come from public code.

    Args:
        input_dim: Length of x, at least 2.
        scale: c, the length of both directions. It sets how much of the sines' period x covers.
        correlation: p, the cosine between the directions, in [-1, 1].
        terms: m, the number of sines.
        alphas: Frequencies of the sines, one per term; default: drawn from N(0, 1).
        betas: Phases of the sines in radians, one per term; default: drawn from N(0, 1).
        noise: Standard deviation of epsilon, drawn independently for each sample and task.
        train_size: Number of training samples.
        val_size: Number of validation samples.
        test_size: Number of test samples.
        batch_size: Samples per batch and rank.
        seed: Seed of the directions, the sines, the samples and the order of the training batches.
        num_workers: Worker processes per loader. The data are in memory, so 0 is the fastest.

    Raises:
        TypeError: A size is not an integer, or ``alphas`` or ``betas`` are not numbers.
        ValueError: A number is out of range, or the length of ``alphas`` or ``betas`` is not ``terms``.

    Example:
        >>> data = SinusoidsDataModule(correlation=1.0, noise=0.0)
        >>> data.setup()
        >>> round(data.label_correlation, 3)
        1.0
    """

    tasks = ("first", "second")

    def __init__(
        self,
        input_dim: int = 100,
        scale: float = 0.5,
        correlation: float = 0.8,
        terms: int = 5,
        alphas: Sequence[float] | None = None,
        betas: Sequence[float] | None = None,
        noise: float = 0.1,
        train_size: int = 10_000,
        val_size: int = 1_000,
        test_size: int = 1_000,
        batch_size: int = 100,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(train_size, val_size, test_size, batch_size, seed, num_workers)
        self._check_integer("input_dim", input_dim, at_least=2)
        self._check_integer("terms", terms, at_least=1)
        self._check_number("scale", scale, scale > 0, "a positive number")
        self._check_number("correlation", correlation, -1 <= correlation <= 1, "in [-1, 1], a cosine")
        self._check_number("noise", noise, noise >= 0, "a standard deviation, zero or positive")
        for parameter, values in (("alphas", alphas), ("betas", betas)):
            if values is not None and len(self._numbers(parameter, values)) != terms:
                raise ValueError(
                    f"SinusoidsDataModule: {parameter} should have one number for each of the {terms} terms; "
                    f"got {len(values)}: {list(values)}."
                )
        self.input_dim = input_dim
        self.scale = scale
        self.correlation = correlation
        self.terms = terms
        self.noise = noise
        self.alphas = self._stream("alphas").normal(size=terms) if alphas is None else np.array(alphas, dtype=float)
        self.betas = self._stream("betas").normal(size=terms) if betas is None else np.array(betas, dtype=float)
        self._correlation_logged = False

    @property
    def directions(self) -> Array:
        """``w_1`` and ``w_2``, of shape ``(2, input_dim)``."""
        orthonormal = np.linalg.qr(self._stream("directions").normal(size=(self.input_dim, 2)))[0].T
        p = self.correlation
        directions: Array = self.scale * np.array([[1.0, 0.0], [p, math.sqrt(1 - p * p)]]) @ orthonormal
        return directions

    def make_splits(self) -> dict[str, TaskTensors]:
        """Draw x and the noise for each split and evaluate the functions, in float64, stored in float32."""
        splits = {}
        for split, size in (("train", self.train_size), ("val", self.val_size), ("test", self.test_size)):
            # Compute the targets from the rounded x that the network receives.
            x = self._stream(split).normal(size=(size, self.input_dim)).astype(np.float32)
            projections = x.astype(np.float64) @ self.directions.T
            waves = np.sin(projections[..., None] * self.alphas + self.betas).sum(axis=-1)
            y = projections + waves + self._stream(f"{split} noise").normal(scale=self.noise, size=(size, 2))
            targets = {task: torch.from_numpy(y[:, [k]]).float() for k, task in enumerate(self.tasks)}
            splits[split] = TaskTensors(torch.from_numpy(x), targets)
        return splits

    @property
    def label_correlation(self) -> float:
        """Pearson correlation of the two tasks' labels, measured on the training split."""
        labels = torch.cat([self.train_data.targets[task] for task in self.tasks], dim=1).double()
        return float(torch.corrcoef(labels.T)[0, 1])

    @property
    def r2_ceiling(self) -> dict[str, float]:
        """The R² of a perfect model, limited by the noise: ``1 - noise² / Var(y)``, on the test split."""
        targets = self.test_data.targets
        return {task: 1 - self.noise**2 / float(targets[task].double().var()) for task in self.tasks}

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the training split, in a new order each epoch."""
        trainer = self.trainer
        if trainer is not None and trainer.is_global_zero and not self._correlation_logged:
            for logger in trainer.loggers:
                logger.log_metrics({"data/label_correlation": self.label_correlation}, step=trainer.global_step)
            self._correlation_logged = True
        return super().train_dataloader()

    def _check_number(self, parameter: str, value: float, fits: bool, expected: str) -> None:
        if not (fits and math.isfinite(value)):
            raise ValueError(f"SinusoidsDataModule: {parameter} should be {expected}; got {value}.")
