"""What a strategy does with T losses and T gradient norms. Pure torch: knows neither Lightning nor Hydra."""

from lightning_gradnorm.balancing.amnl import AMNL, FailureBiasedMSE
from lightning_gradnorm.balancing.db_mtl import DBMTL, DBMTLWeighting, LogSum
from lightning_gradnorm.balancing.gaba import GABA
from lightning_gradnorm.balancing.gradnorm import Balance, GradNormRule, Step, balance
from lightning_gradnorm.balancing.preference import with_equal_preferences
from lightning_gradnorm.balancing.state import restore, state_of
from lightning_gradnorm.balancing.uncertainty import Uncertainty

__all__ = [
    "AMNL",
    "DBMTL",
    "GABA",
    "Balance",
    "DBMTLWeighting",
    "FailureBiasedMSE",
    "GradNormRule",
    "LogSum",
    "Step",
    "Uncertainty",
    "balance",
    "restore",
    "state_of",
    "with_equal_preferences",
]
