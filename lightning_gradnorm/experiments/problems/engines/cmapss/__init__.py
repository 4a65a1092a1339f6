"""NASA's C-MAPSS: turbofan engines that run to failure.

`columns` says what is in the text files, `files` reads them, `originals` knows NASA's, `normalization` takes the
operating conditions out of the sensors, `windows` hands out the cycles before each moment with what is left of the
engine's life, `module` the data set.
"""

from lightning_gradnorm.experiments.problems.engines.cmapss.columns import SENSORS, SUBSETS
from lightning_gradnorm.experiments.problems.engines.cmapss.files import Engines, read_engines, read_rul
from lightning_gradnorm.experiments.problems.engines.cmapss.module import CMAPSS
from lightning_gradnorm.experiments.problems.engines.cmapss.normalization import Standardization
from lightning_gradnorm.experiments.problems.engines.cmapss.windows import Windows, health_of

__all__ = [
    "CMAPSS",
    "SENSORS",
    "SUBSETS",
    "Engines",
    "Standardization",
    "Windows",
    "health_of",
    "read_engines",
    "read_rul",
]
