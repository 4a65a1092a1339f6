"""Simulated turbofan engines that stand in for NASA's C-MAPSS where its files are not.

`engine` says what a sensor shows in each operating condition and how wear moves it, `wear` how engines wear and when
they fail, `simulator` flies them, `files` writes what was recorded as NASA does, `module` is the data set.
"""

from lightning_gradnorm.experiments.problems.engines.turbofan.files import write_turbofan
from lightning_gradnorm.experiments.problems.engines.turbofan.module import TurbofanDataModule
from lightning_gradnorm.experiments.problems.engines.turbofan.simulator import Flights, cut_short, simulate
from lightning_gradnorm.experiments.problems.engines.turbofan.wear import Lives, draw_lives

__all__ = ["Flights", "Lives", "TurbofanDataModule", "cut_short", "draw_lives", "simulate", "write_turbofan"]
