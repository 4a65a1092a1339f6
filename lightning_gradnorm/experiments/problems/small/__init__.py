"""Small problems: the paper's toy problem, sinusoids, two digits."""

from lightning_gradnorm.experiments.problems.small.conv import ConvEncoder
from lightning_gradnorm.experiments.problems.small.mlp import MLP
from lightning_gradnorm.experiments.problems.small.multimnist import MultiMNISTDataModule
from lightning_gradnorm.experiments.problems.small.sinusoids import SinusoidsDataModule
from lightning_gradnorm.experiments.problems.small.tasks import regression_tasks
from lightning_gradnorm.experiments.problems.small.toy import TEN_SIGMAS, ToyDataModule

__all__ = [
    "MLP",
    "TEN_SIGMAS",
    "ConvEncoder",
    "MultiMNISTDataModule",
    "SinusoidsDataModule",
    "ToyDataModule",
    "regression_tasks",
]
