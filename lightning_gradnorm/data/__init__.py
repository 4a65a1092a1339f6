"""Data sets, one file each, as data modules whose batches are ``(inputs, {task: target})``."""

from lightning_gradnorm.data.loader import EpochSampler, ResumableLoader
from lightning_gradnorm.data.multimnist import MultiMNISTDataModule
from lightning_gradnorm.data.rooms import RoomsDataModule
from lightning_gradnorm.data.sinusoids import SinusoidsDataModule
from lightning_gradnorm.data.tensors import InMemoryDataModule, TaskTensors
from lightning_gradnorm.data.toy import TEN_SIGMAS, ToyDataModule
from lightning_gradnorm.data.turbofan import TurbofanDataModule

__all__ = [
    "TEN_SIGMAS",
    "EpochSampler",
    "InMemoryDataModule",
    "MultiMNISTDataModule",
    "ResumableLoader",
    "RoomsDataModule",
    "SinusoidsDataModule",
    "TaskTensors",
    "ToyDataModule",
    "TurbofanDataModule",
]
