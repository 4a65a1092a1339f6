"""What a strategy does with T losses and T gradient norms. Pure torch: knows neither Lightning nor Hydra.

The scalarizers, aggregators, weightings, projectors and norm formulas of every module in this folder are public here: a new
strategy is a new file. The explicit imports below only give type checkers their types.
"""

import importlib
import pkgutil
from typing import Any

from torchjd.aggregation import Aggregator, Weighting
from torchjd.linalg import DualConeProjector
from torchjd.scalarization import Scalarizer

from lightning_gradnorm.strategies.aggregation import AggregationRule
from lightning_gradnorm.strategies.amnl import AMNL
from lightning_gradnorm.strategies.db_mtl import DBMTL, DBMTLWeighting, LogSum
from lightning_gradnorm.strategies.factory import with_equal_preferences
from lightning_gradnorm.strategies.fixed import FixedRule
from lightning_gradnorm.strategies.gaba import GABA
from lightning_gradnorm.strategies.gradnorm import GradNormRule, gradnorm_terms
from lightning_gradnorm.strategies.inverse_norm import InverseNorm
from lightning_gradnorm.strategies.lr_annealing import LRAnnealing
from lightning_gradnorm.strategies.norm_weighting import NormFormula, NormWeightingRule
from lightning_gradnorm.strategies.ntk_weights import NTKWeights
from lightning_gradnorm.strategies.scalarization import ScalarizationRule
from lightning_gradnorm.strategies.snapshot import load_snapshot, snapshot
from lightning_gradnorm.strategies.uncertainty import Uncertainty
from lightning_gradnorm.strategies.updates import GradNormTerms, WeightUpdate

__all__ = [
    "AMNL",
    "DBMTL",
    "GABA",
    "AggregationRule",
    "DBMTLWeighting",
    "FixedRule",
    "GradNormRule",
    "GradNormTerms",
    "InverseNorm",
    "LRAnnealing",
    "LogSum",
    "NTKWeights",
    "NormFormula",
    "NormWeightingRule",
    "ScalarizationRule",
    "Uncertainty",
    "WeightUpdate",
    "gradnorm_terms",
    "load_snapshot",
    "snapshot",
    "with_equal_preferences",
]


def _discover() -> dict[str, type[Any]]:
    """Return the strategies of all modules in this folder, by name."""
    found: dict[str, type[Any]] = {}
    for info in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        for name, kind in vars(importlib.import_module(info.name)).items():
            is_own = isinstance(kind, type) and kind.__module__ == info.name and not name.startswith("_")
            if is_own and issubclass(kind, Scalarizer | Aggregator | Weighting | NormFormula | DualConeProjector):
                found[name] = kind
    return found


_found = _discover()
globals().update(_found)
__all__ += [name for name in _found if name not in __all__]


def __getattr__(name: str) -> Any:
    """Show type checkers that more names exist than those imported above."""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
