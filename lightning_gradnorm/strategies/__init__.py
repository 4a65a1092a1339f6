"""What a strategy does with T losses and T gradient norms. Pure torch: knows neither Lightning nor Hydra."""

from lightning_gradnorm.strategies.amnl import AMNL
from lightning_gradnorm.strategies.db_mtl import DBMTL, DBMTLWeighting, LogSum
from lightning_gradnorm.strategies.gaba import GABA
from lightning_gradnorm.strategies.gradnorm import Balance, GradNormRule, Step, balance
from lightning_gradnorm.strategies.preference import with_equal_preferences
from lightning_gradnorm.strategies.snapshot import restore, state_of
from lightning_gradnorm.strategies.uncertainty import Uncertainty

__all__ = [
    "AMNL",
    "DBMTL",
    "GABA",
    "Balance",
    "DBMTLWeighting",
    "GradNormRule",
    "LogSum",
    "Step",
    "Uncertainty",
    "balance",
    "restore",
    "state_of",
    "with_equal_preferences",
]
