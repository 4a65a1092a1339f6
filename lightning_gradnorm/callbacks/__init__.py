"""The Lightning side: what plugs balancing strategies into a LightningModule, and shows what they do."""

from lightning_gradnorm.callbacks.aggregation import Aggregation
from lightning_gradnorm.callbacks.balancing import Balancing
from lightning_gradnorm.callbacks.fixed_weights import FixedWeights, GradNormStatic, RandomWeights
from lightning_gradnorm.callbacks.gradnorm import GradNorm
from lightning_gradnorm.callbacks.pictures import DensePredictions
from lightning_gradnorm.callbacks.scalarization import Scalarization
from lightning_gradnorm.callbacks.task_names import DeclaresTasks
from lightning_gradnorm.callbacks.tensorboard import TensorBoardDashboard

__all__ = [
    "Aggregation",
    "Balancing",
    "DeclaresTasks",
    "DensePredictions",
    "FixedWeights",
    "GradNorm",
    "GradNormStatic",
    "RandomWeights",
    "Scalarization",
    "TensorBoardDashboard",
]
