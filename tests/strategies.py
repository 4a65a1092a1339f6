"""Every strategy that a callback accepts, by name, for tests over all of them.

The classes come from the package's registry, with their required arguments from ``conf/balancing``. Only other
options are listed by hand (`INSTEAD`, `MORE`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torchjd import Stateful
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm import Aggregation, Scalarization
from lightning_gradnorm.experiments import registry
from lightning_gradnorm.experiments.cli.config import conf_dir
from lightning_gradnorm.strategies import (
    AMNL,
    DBMTL,
    GABA,
    DBMTLWeighting,
    FairGrad,
    NashMTL,
    NashMTLWeighting,
    ReLoBRaLo,
    SoftAdapt,
    Uncertainty,
    UPGrad,
    UPGradWeighting,
    with_equal_preferences,
)
from lightning_gradnorm.strategies.facts import any_part, facts_of

Make = Callable[[int], nn.Module]
"""Makes a strategy from the number of tasks."""


def _preferences(T: int) -> torch.Tensor:
    return torch.arange(1, T + 1, dtype=torch.float64) / T


def _vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _at_least_half(P: torch.Tensor) -> torch.Tensor:
    """Makes GradDrop keep the sign of the larger part in every draw."""
    return (P > 0.5).to(P)


INSTEAD: dict[Any, dict[str, Make]] = {
    AMNL: {"AMNL": lambda T: AMNL(), "AMNL, moving average": lambda T: AMNL(beta=0.9)},
    S.COSMOS: {"COSMOS": lambda T: S.COSMOS(0.5, _preferences(T))},
    S.PBI: {"PBI": lambda T: S.PBI(0.5, _preferences(T))},
    S.STCH: {"STCH": lambda T: S.STCH(0.5)},
    Uncertainty: {"Uncertainty": lambda T: Uncertainty(["seg"])},
    A.CRMOGMWeighting: {"CR-MOGM": lambda T: A.CRMOGMWeighting(UPGradWeighting(), alpha=0.7)},
    A.ExcessMTL: {"ExcessMTL": lambda T: A.ExcessMTL(0.5, n_warmup_steps=2)},
    A.GradDrop: {
        "GradDrop": lambda T: A.GradDrop(),
        "GradDrop of the larger part": lambda T: A.GradDrop(f=_at_least_half),
    },
    A.Krum: {"Krum": lambda T: A.Krum(1, 2)},
    A.SDMGradWeighting: {"SDMGradWeighting": lambda T: A.SDMGradWeighting(lr=0.1, n_iter=2)},
    DBMTL: {"DBMTL": lambda T: DBMTL(beta=0.9), "DBMTL without average": lambda T: DBMTLWeighting()},
    FairGrad: {"FairGrad": lambda T: FairGrad(alpha=1.0)},
    GABA: {"GABA": lambda T: GABA(beta=0.9, warmup=2)},
    NashMTL: {"NashMTL": partial(NashMTL, max_norm=0.0, update_weights_every=3)},
    NashMTLWeighting: {"NashMTLWeighting": partial(NashMTLWeighting, update_weights_every=3)},
    ReLoBRaLo: {"ReLoBRaLo": lambda T: ReLoBRaLo(alpha=0.5, rho=0.5)},
}
"""A class → what it is tried as in every training, in place of its own name and the options of its yaml."""

MORE: dict[str, Make] = {
    "AMNL, edition 2": lambda T: AMNL(edition=2, weights={"seg": 0.5, "normal": 0.2, "depth": 0.3}),
    "COSMOS with preferences": lambda T: S.COSMOS(lambda_=1.0, weights=_vector(0.5, 0.3, 0.2)),
    "Constant of another sum": lambda T: S.Constant(_vector(0.5, 3.0, 0.2)),
    "FAMO with minima": lambda T: S.FAMO(T, min_losses=torch.full((T,), 0.01), lr=0.1),
    "PBI with preferences": lambda T: S.PBI(theta=5.0, weights=_vector(0.5, 0.3, 0.2)),
    "STCH with preferences": lambda T: S.STCH(0.1, _vector(0.5, 0.3, 0.2), _vector(0.1, 0.0, 0.2)),
    "SoftAdapt, loss-weighted": lambda T: SoftAdapt(variant="loss-weighted", order=2),
    "SoftAdapt, normalized": lambda T: SoftAdapt(2.0, "normalized", update_every=2),
    "Uncertainty of another task": lambda T: Uncertainty(classification=["depth"]),
    "equal preferences": partial(with_equal_preferences, scalarizer=S.COSMOS, lambda_=0.5),
    "AlignedMTL, least": lambda T: A.AlignedMTL(scale_mode="median"),
    "CRMOGM of GradVac": lambda T: A.CRMOGMWeighting(A.GradVacWeighting()),
    "CRMOGM of MGDA": lambda T: A.CRMOGMWeighting(A.MGDAWeighting(), alpha=0.7),
    "ConFIG with preferences": lambda T: A.ConFIG(_vector(0.5, 0.2, 0.3)),
    "Constant of any sign": lambda T: A.Constant(_vector(0.5, 3.0, -0.2)),
    "DBMTL, decaying": lambda T: DBMTL(sigma=0.5),
    "DBMTL, no memory": lambda T: DBMTL(beta=0.0),
    "ExcessMTL with a warm-up": lambda T: A.ExcessMTL(n_warmup_steps=4),
    "ExcessMTL, no warm-up": lambda T: A.ExcessMTL(),
    "GABA, sooner": lambda T: GABA(warmup=3, beta=0.5),
    "GradDrop with leak": lambda T: A.GradDrop(leak=_vector(0.1, 0.5, 0.0)),
    "Krum, no outliers": lambda T: A.Krum(n_byzantine=0, n_selected=2),  # the nearest two tie: either alone is right
    "NashMTL, short": partial(NashMTL, max_norm=0.1, update_weights_every=3),
    "TorchJD's CAGrad": lambda T: A.CAGrad(c=0.4),
    "TorchJD's FairGrad": lambda T: A.FairGrad(alpha=2.0),
    "TorchJD's NashMTL": A.NashMTL,
    "TorchJD's NashMTL, seldom": partial(A.NashMTL, max_norm=0.0, update_weights_every=3),
    "PCD, quick": lambda T: A.PCD(beta=0.5),
    "TorchJD's DualProj": lambda T: A.DualProj(),
    "TorchJD's UPGrad": lambda T: A.UPGrad(),
    "UPGrad with preferences": lambda T: UPGrad(_vector(0.5, 0.2, 0.3)),
    "UPGradWeighting": lambda T: UPGradWeighting(),
}
"""More variants, of three tasks, for the tests of single objects and those against a calculation by hand."""


@cache
def _options_of_a_yaml() -> dict[Any, Mapping[str, Any]]:
    return {
        part.constructor: part.options
        for strategy in registry.read_strategies(conf_dir()).values()
        if strategy.callback is not None
        for part in strategy.callback.options.values()
        if isinstance(part, registry.Part)
    }


def _made(kind: Any, T: int) -> nn.Module:
    """The class with its required arguments: its tasks, or the options of the first YAML file with this class."""
    for_tasks = {"shape": T, "n_tasks": T, "weights": _preferences(T)}
    arguments = {name: for_tasks[name] for name in registry.made_for_tasks(kind)}
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            value = _options_of_a_yaml()[kind][name]
            arguments[name] = value.make() if isinstance(value, registry.Part) else value
    made: nn.Module = kind(**arguments)
    return made


def _cases(kinds: Iterable[Any]) -> Iterator[tuple[str, Make]]:
    for kind in kinds:
        yield from INSTEAD.get(kind, {kind.__name__: partial(_made, kind)}).items()


def tasks_for(name: str) -> int:
    """How many tasks it takes to try the strategy."""
    return 6 if name.startswith("Krum") and "," not in name else 3


def _is_twin(kind: Any) -> bool:
    """It is the weighting of an aggregator that is there too."""
    names = {one.__name__ for one in registry.AGGREGATORS}
    return kind.__name__.endswith("Weighting") and kind.__name__.removesuffix("Weighting") in names


def draws(module: nn.Module) -> bool:
    """Its result depends on random numbers."""
    drawing = any("random draws" in facts_of(part).remembers for part in module.modules())
    return drawing and getattr(module, "f", None) is not _at_least_half


def has_memory(module: nn.Module) -> bool:
    """Its result depends on earlier inputs."""
    return any(facts_of(part).remembers.replace("random draws", "") for part in module.modules())


def _only_of_parameters(module: nn.Module) -> bool:
    """It averages gradients over steps; or draws for each number, which at the representation are each rank's."""
    return any_part(module, "averages_over_steps") or (draws(module) and not has_weights(module))


def has_weights(module: nn.Module) -> bool:
    """An aggregation is a weighted sum of the rows."""
    return isinstance(module, A.Weighting | A.WeightedAggregator | A.ConFIG)


SCALARIZERS: dict[str, Make] = dict(_cases(kind for kind in registry.SCALARIZERS if isinstance(kind, type)))
_OF_GRADIENTS = {
    name: make
    for name, make in _cases(kind for kind in registry.AGGREGATORS if not _is_twin(kind))
    if not any_part(make(tasks_for(name)), "needs_two_batches")
}
ONLY_OF_PARAMETERS = {name: make for name, make in _OF_GRADIENTS.items() if _only_of_parameters(make(tasks_for(name)))}
AGGREGATORS = {name: make for name, make in _OF_GRADIENTS.items() if name not in ONLY_OF_PARAMETERS}

_MORE_SCALARIZERS = {name: make for name, make in MORE.items() if isinstance(make(3), S.Scalarizer)}
_MORE_AGGREGATORS = {name: make for name, make in MORE.items() if name not in _MORE_SCALARIZERS}

BY_HAND_OF_LOSSES = {**SCALARIZERS, **_MORE_SCALARIZERS}
"""Three tasks, against a calculation by hand."""
BY_HAND_OF_GRADIENTS = {
    name: make
    for name, make in {**_OF_GRADIENTS, **_MORE_AGGREGATORS}.items()
    if tasks_for(name) == 3 and not any_part(make(3), "needs_two_batches")
}

_STATEFUL_TWINS = [kind for kind in registry.AGGREGATORS if issubclass(kind, Stateful)]
MODULES: dict[str, Make] = {
    **BY_HAND_OF_LOSSES,
    **{
        name if name not in SCALARIZERS else f"{name} of gradients": make for name, make in BY_HAND_OF_GRADIENTS.items()
    },
    **dict(_cases(_STATEFUL_TWINS)),
}
"""Single objects of three tasks, with every stateful class among them."""


def _of(
    make: Callable[..., Any], names: Mapping[str, Make], suffix: str = "", **options: Any
) -> dict[str, Callable[..., Any]]:
    return {name + suffix: partial(make, factory, **options) for name, factory in names.items()}


STRATEGIES: dict[str, Callable[..., Any]] = {
    **_of(Scalarization, SCALARIZERS, " of the losses"),
    **_of(Aggregation, AGGREGATORS, " at the representation", at="representation"),
    **_of(Aggregation, {**AGGREGATORS, **ONLY_OF_PARAMETERS}, " at the parameters", at="parameters"),
    "IMTL": partial(Aggregation, lambda T: A.IMTLG(), scalarizer=S.IMTLL),
    "DB-MTL": partial(Aggregation, _OF_GRADIENTS["DBMTL"], at="parameters", scalarizer=SCALARIZERS["LogSum"]),
}
"""Name → what makes the callback, given its other arguments."""


def _is_stateful(name: str) -> bool:
    made: Any = STRATEGIES[name]
    parts = [make(tasks_for(name)) for make in (*made.args, made.keywords.get("scalarizer")) if make is not None]
    return any(draws(part) or has_memory(part) for part in parts)


STATEFUL = [name for name in STRATEGIES if _is_stateful(name)]
"""Those that would continue differently without their state; random draws count."""
