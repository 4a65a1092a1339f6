"""What a strategy does with T losses and T gradient norms. Pure torch: knows neither Lightning nor Hydra."""

from lightning_gradnorm.strategies.amnl import AMNL
from lightning_gradnorm.strategies.db_mtl import DBMTL, DBMTLWeighting, LogSum
from lightning_gradnorm.strategies.fixed import FixedRule
from lightning_gradnorm.strategies.gaba import GABA
from lightning_gradnorm.strategies.gradnorm import GradNormRule, GradNormTerms, WeightUpdate, gradnorm_terms
from lightning_gradnorm.strategies.preference import with_equal_preferences
from lightning_gradnorm.strategies.snapshot import load_snapshot, snapshot
from lightning_gradnorm.strategies.uncertainty import Uncertainty

__all__ = [
    "AMNL",
    "DBMTL",
    "GABA",
    "DBMTLWeighting",
    "FixedRule",
    "GradNormRule",
    "GradNormTerms",
    "LogSum",
    "Uncertainty",
    "WeightUpdate",
    "gradnorm_terms",
    "load_snapshot",
    "snapshot",
    "with_equal_preferences",
]
