"""The Lightning side: callbacks that plug balancing strategies into a LightningModule and show what they do."""

from typing import Any

from lightning_gradnorm._moved import find_moved
from lightning_gradnorm.callbacks.aggregation import Aggregation
from lightning_gradnorm.callbacks.base import BalancingCallback
from lightning_gradnorm.callbacks.dashboard import TensorBoardDashboard
from lightning_gradnorm.callbacks.fixed_weights import FixedWeights, GradNormStatic, RandomWeights
from lightning_gradnorm.callbacks.gradnorm import GradNorm
from lightning_gradnorm.callbacks.norm_weighting import NormWeighting
from lightning_gradnorm.callbacks.scalarization import Scalarization
from lightning_gradnorm.engine.rule import DeclaresTasks

__all__ = [
    "Aggregation",
    "BalancingCallback",
    "DeclaresTasks",
    "FixedWeights",
    "GradNorm",
    "GradNormStatic",
    "NormWeighting",
    "RandomWeights",
    "Scalarization",
    "TensorBoardDashboard",
]


def __getattr__(name: str) -> Any:
    homes = {"DensePredictions": "callbacks.pictures", "GradientNormMonitor": "callbacks.monitor"}
    if name in homes:
        return find_moved(homes[name], name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
