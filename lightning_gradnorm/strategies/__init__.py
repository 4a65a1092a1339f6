"""What a strategy does with T losses and T gradient norms. Pure torch: knows neither Lightning nor Hydra.

The scalarizers, aggregators and weightings of every module in this folder are public here: a new strategy is a new file. They
are imported by name below only where that gives type checkers their types.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from torchjd.aggregation import Aggregator, Weighting
from torchjd.scalarization import Scalarizer

from lightning_gradnorm.strategies.aggregation import AggregationRule
from lightning_gradnorm.strategies.amnl import AMNL
from lightning_gradnorm.strategies.db_mtl import DBMTL, DBMTLWeighting, LogSum
from lightning_gradnorm.strategies.fixed import FixedRule
from lightning_gradnorm.strategies.gaba import GABA
from lightning_gradnorm.strategies.gradnorm import GradNormRule, GradNormTerms, WeightUpdate, gradnorm_terms
from lightning_gradnorm.strategies.preference import with_equal_preferences
from lightning_gradnorm.strategies.scalarization import ScalarizationRule
from lightning_gradnorm.strategies.snapshot import load_snapshot, snapshot
from lightning_gradnorm.strategies.uncertainty import Uncertainty

__all__ = [
    "AMNL",
    "DBMTL",
    "GABA",
    "AggregationRule",
    "DBMTLWeighting",
    "FixedRule",
    "GradNormRule",
    "GradNormTerms",
    "LogSum",
    "ScalarizationRule",
    "Uncertainty",
    "WeightUpdate",
    "gradnorm_terms",
    "load_snapshot",
    "snapshot",
    "with_equal_preferences",
]


def _strategies_in(module: ModuleType) -> dict[str, type[Any]]:
    return {
        name: kind
        for name, kind in vars(module).items()
        if isinstance(kind, type)
        and issubclass(kind, Scalarizer | Aggregator | Weighting)
        and kind.__module__ == module.__name__
        and not name.startswith("_")
    }


def _discover() -> dict[str, type[Any]]:
    """Return the strategies of all modules in this folder by name."""
    found: dict[str, type[Any]] = {}
    for module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        found |= _strategies_in(importlib.import_module(module.name))
    return found


for _name, _kind in _discover().items():
    globals()[_name] = _kind
    if _name not in __all__:
        __all__ += [_name]


def __getattr__(name: str) -> Any:
    """Tell type checkers that there are more names than those imported above."""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
