"""Regression of several targets in your own table."""

from lightning_gradnorm.experiments.problems.tabular.metrics import RMSE, CoefficientOfDetermination, RelativeRMSE
from lightning_gradnorm.experiments.problems.tabular.module import TabularDataModule
from lightning_gradnorm.experiments.problems.tabular.reading import read_table
from lightning_gradnorm.experiments.problems.tabular.tasks import MaskedMSELoss, tabular_tasks

__all__ = [
    "RMSE",
    "CoefficientOfDetermination",
    "MaskedMSELoss",
    "RelativeRMSE",
    "TabularDataModule",
    "read_table",
    "tabular_tasks",
]
