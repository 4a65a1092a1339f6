"""Differential equations for physics-informed networks: collocation points, residuals and exact solutions."""

from lightning_gradnorm.experiments.problems.pde.burgers import Burgers
from lightning_gradnorm.experiments.problems.pde.equation import Equation
from lightning_gradnorm.experiments.problems.pde.helmholtz import Helmholtz
from lightning_gradnorm.experiments.problems.pde.metrics import RelativeL2
from lightning_gradnorm.experiments.problems.pde.module import PINN
from lightning_gradnorm.experiments.problems.pde.network import TanhMLP
from lightning_gradnorm.experiments.problems.pde.plate import KirchhoffPlate
from lightning_gradnorm.experiments.problems.pde.points import CollocationDataModule
from lightning_gradnorm.experiments.problems.pde.poisson import Poisson
from lightning_gradnorm.experiments.problems.pde.solution_callback import SolutionPicture

__all__ = [
    "PINN",
    "Burgers",
    "CollocationDataModule",
    "Equation",
    "Helmholtz",
    "KirchhoffPlate",
    "Poisson",
    "RelativeL2",
    "SolutionPicture",
    "TanhMLP",
]
