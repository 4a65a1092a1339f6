"""Loaders that resume in mid-epoch, splits, and data sets that fit in memory."""

from lightning_gradnorm.experiments.loading.loader import EpochSampler, ResumableLoader
from lightning_gradnorm.experiments.loading.tensors import InMemoryDataModule, TaskTensors

__all__ = ["EpochSampler", "InMemoryDataModule", "ResumableLoader", "TaskTensors"]
