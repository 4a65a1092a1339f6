"""Every strategy that a callback can be made of, by name, for tests that go through all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm import Aggregation, Scalarization
from lightning_gradnorm.strategies import AMNL, DBMTL, GABA, DBMTLWeighting, LogSum, Uncertainty

Make = Callable[[int], nn.Module]
"""Makes a strategy from the number of tasks."""


def _preferences(T: int) -> torch.Tensor:
    return torch.arange(1, T + 1, dtype=torch.float64) / T


def _at_least_half(P: torch.Tensor) -> torch.Tensor:
    """Makes GradDrop keep the sign of the larger part, whatever it draws."""
    return (P > 0.5).to(P)


SCALARIZERS: dict[str, Make] = {
    "Constant": lambda T: S.Constant(_preferences(T)),
    "COSMOS": lambda T: S.COSMOS(0.5, _preferences(T)),
    "DWA": lambda T: S.DWA(),
    "FAMO": S.FAMO,
    "GeometricMean": lambda T: S.GeometricMean(),
    "IMTLL": S.IMTLL,
    "Mean": lambda T: S.Mean(),
    "PBI": lambda T: S.PBI(0.5, _preferences(T)),
    "Random": lambda T: S.Random(),
    "STCH": lambda T: S.STCH(0.5),
    "Sum": lambda T: S.Sum(),
    "UW": S.UW,
    "AMNL": lambda T: AMNL(),
    "LogSum": lambda T: LogSum(),
    "Uncertainty": lambda T: Uncertainty(["seg"]),
}

AGGREGATORS: dict[str, Make] = {
    "AlignedMTL": lambda T: A.AlignedMTL(),
    "CAGrad": lambda T: A.CAGrad(0.5),
    "ConFIG": lambda T: A.ConFIG(),
    "Constant": lambda T: A.Constant(_preferences(T)),
    "CR-MOGM": lambda T: A.CRMOGMWeighting(A.UPGradWeighting(), alpha=0.7),
    "DBMTL without average": lambda T: DBMTLWeighting(),
    "DualProj": lambda T: A.DualProj(),
    "FairGrad": lambda T: A.FairGrad(alpha=1.0),
    "GABA": lambda T: GABA(beta=0.9, warmup=2),
    "GradDrop of the larger part": lambda T: A.GradDrop(f=_at_least_half),
    "GradVac": lambda T: A.GradVac(),
    "IMTLG": lambda T: A.IMTLG(),
    "Krum": lambda T: A.Krum(1, 2),
    "Mean": lambda T: A.Mean(),
    "MGDA": lambda T: A.MGDA(),
    "NashMTL": partial(A.NashMTL, max_norm=0.0, optim_niter=5),
    "PCD": lambda T: A.PCD(),
    "PCGrad": lambda T: A.PCGrad(),
    "Random": lambda T: A.Random(),
    "Sum": lambda T: A.Sum(),
    "TrimmedMean": lambda T: A.TrimmedMean(1),
    "UPGrad": lambda T: A.UPGrad(),
}
ONLY_OF_PARAMETERS: dict[str, Make] = {
    "DBMTL": lambda T: DBMTL(beta=0.9),
    "ExcessMTL": lambda T: A.ExcessMTL(0.5, n_warmup_steps=2),
    "GradDrop": lambda T: A.GradDrop(),
}
"""Those that average gradients over steps; and one that draws for each number, which at the representation are each rank's."""


def tasks_for(name: str) -> int:
    """How many tasks it takes to try the strategy."""
    return 6 if "Krum" in name else 3


def _of(
    make: Callable[..., Any], names: dict[str, Make], suffix: str = "", **options: Any
) -> dict[str, Callable[..., Any]]:
    return {name + suffix: partial(make, factory, **options) for name, factory in names.items()}


STRATEGIES: dict[str, Callable[..., Any]] = {
    **_of(Scalarization, SCALARIZERS, " of the losses"),
    **_of(Aggregation, AGGREGATORS, " at the representation", at="representation"),
    **_of(Aggregation, {**AGGREGATORS, **ONLY_OF_PARAMETERS}, " at the parameters", at="parameters"),
    "IMTL": partial(Aggregation, lambda T: A.IMTLG(), scalarizer=S.IMTLL),
    "DB-MTL": partial(Aggregation, ONLY_OF_PARAMETERS["DBMTL"], at="parameters", scalarizer=SCALARIZERS["LogSum"]),
}
"""Name → what makes the callback, given its other arguments."""
