"""The toy problem of the GradNorm paper: tasks that differ only in the scale of their loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lightning_gradnorm.experiments.loading.tensors import InMemoryDataModule, TaskTensors

TEN_SIGMAS = (48.0, 3.0, 54.0, 16.0, 9.0, 30.0, 52.0, 26.0, 47.0, 81.0)
"""Scales for ten tasks. The paper draws its ten "from a wide normal distribution" and shows them only in a figure.
These are the ones that public re-implementations use."""

_SPREADS = {"std": (10.0, 3.5), "variance": (math.sqrt(10.0), math.sqrt(3.5))}
_INPUTS = ("uniform", "normal", "unit")

Array = npt.NDArray[np.float64]


class ToyDataModule(InMemoryDataModule):
    r"""Regression onto :math:`f_i(x) = \sigma_i \tanh((B + \epsilon_i) x)`, tanh element-wise; one task per sigma.

    All tasks share the matrix :math:`B`, and each has its own :math:`\epsilon_i`, so a larger :math:`\sigma_i` only means
    a larger loss and larger gradients. The tasks are called ``task_0``, ``task_1``, ... A task's function depends only
    on ``seed`` and its number, not on the number of tasks.

    A batch is ``(inputs, targets)``: inputs ``float32`` of shape ``(batch, input_dim)``, each target ``float32`` of
    shape ``(batch, output_dim)``, in units of sigma_i times [-1, 1].

    Source: Chen et al., GradNorm, ICML 2018 (arXiv 1711.02257), section 4, equation 3. The paper gives the sigmas of
    two tasks, the dimensions, and N(0, 10) and N(0, 3.5) for the entries of B and epsilon. It does not say if those are
    variances (``spread``), and gives neither the distribution of x (``inputs``) nor any number of samples.

    Args:
        sigmas: Scale of each task; at least two, positive.
        input_dim: Length of x.
        output_dim: Length of each target.
        spread: Treat 10 and 3.5 as standard deviations (``"std"``, as in all public code) or as ``"variance"``s.
        inputs: Distribution of x: entries U(0, 1) (``"uniform"``), N(0, 1) (``"normal"``), or entries U(-1, 1) and
            the vector scaled to length 1 (``"unit"``). Except with ``"unit"``, nearly all targets are +-sigma.
        train_size: Number of training samples.
        val_size: Number of validation samples.
        test_size: Number of test samples.
        batch_size: Samples per batch and rank.
        seed: Seed of the functions, of x and of the order of the training batches.
        num_workers: Worker processes per loader. The data are in memory, so 0 is the fastest.

    Raises:
        TypeError: A size is not an integer, or ``sigmas`` are not numbers.
        ValueError: There are fewer than two sigmas, a sigma is not positive, ``spread`` or ``inputs`` is unknown, or a
            size is less than one.

    Example:
        >>> data = ToyDataModule(sigmas=(1.0, 100.0), train_size=200, val_size=100, test_size=100)
        >>> data.setup()
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, targets["task_1"].shape
        (torch.Size([100, 250]), torch.Size([100, 100]))
    """

    def __init__(
        self,
        sigmas: Sequence[float] = (1.0, 100.0),
        input_dim: int = 250,
        output_dim: int = 100,
        spread: str = "std",
        inputs: str = "normal",
        train_size: int = 10_000,
        val_size: int = 1_000,
        test_size: int = 1_000,
        batch_size: int = 100,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(train_size, val_size, test_size, batch_size, seed, num_workers)
        self.sigmas = self._numbers("sigmas", sigmas)
        if len(sigmas) < 2 or not all(0 < sigma < math.inf for sigma in self.sigmas):
            raise ValueError(f"ToyDataModule: sigmas should be at least two positive numbers; got {list(sigmas)}.")
        self._check_integer("input_dim", input_dim, at_least=1)
        self._check_integer("output_dim", output_dim, at_least=1)
        self._check_choice("spread", spread, _SPREADS)
        self._check_choice("inputs", inputs, _INPUTS)
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.spread = spread
        self.inputs = inputs

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in the order of ``sigmas``."""
        return tuple(f"task_{i}" for i in range(len(self.sigmas)))

    @property
    def matrices(self) -> list[Array]:
        """``B + eps_i`` of each task, of shape ``(output_dim, input_dim)``."""
        shared_std, own_std = _SPREADS[self.spread]
        shape = self.output_dim, self.input_dim
        shared = self._stream("shared").normal(scale=shared_std, size=shape)
        return [shared + self._stream("task", i).normal(scale=own_std, size=shape) for i in range(len(self.sigmas))]

    def make_splits(self) -> dict[str, TaskTensors]:
        """Draw x for each split and evaluate the functions, in float64, stored in float32."""
        matrices = self.matrices
        splits = {}
        for split, size in (("train", self.train_size), ("val", self.val_size), ("test", self.test_size)):
            x = self._draw_inputs(self._stream(split), size)
            targets = {
                task: torch.from_numpy(sigma * np.tanh(x @ matrix.T)).float()
                for task, sigma, matrix in zip(self.tasks, self.sigmas, matrices, strict=True)
            }
            splits[split] = TaskTensors(torch.from_numpy(x).float(), targets)
        return splits

    def _draw_inputs(self, stream: np.random.Generator, size: int) -> Array:
        shape = size, self.input_dim
        if self.inputs == "uniform":
            x = stream.uniform(size=shape)
        elif self.inputs == "normal":
            x = stream.normal(size=shape)
        else:
            x = stream.uniform(-1, 1, size=shape)
            x /= np.linalg.norm(x, axis=1, keepdims=True)
        # Compute the targets from the rounded x that the network receives.
        return x.astype(np.float32).astype(np.float64)
