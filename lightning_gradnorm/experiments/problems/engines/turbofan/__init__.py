"""Simulated turbofan engines, a stand-in for NASA's C-MAPSS if you do not have its files.

`engine` defines the sensor readings in each operating condition and how wear shifts them, `wear` how engines wear and
fail. `simulator` flies them, `files` writes the records in NASA's format, `module` is the data set.
"""

from lightning_gradnorm.experiments.problems.engines.turbofan.files import write_turbofan
from lightning_gradnorm.experiments.problems.engines.turbofan.module import TurbofanDataModule
from lightning_gradnorm.experiments.problems.engines.turbofan.simulator import Flights, cut_short, simulate
from lightning_gradnorm.experiments.problems.engines.turbofan.wear import Lives, draw_lives

__all__ = ["Flights", "Lives", "TurbofanDataModule", "cut_short", "draw_lives", "simulate", "write_turbofan"]
