"""Ways to train a network, by their names in the tables: equal weights first, then the ways to compare with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from torch import Tensor
from torchjd.aggregation import IMTLG, MGDA, Aggregator, AlignedMTL, CAGrad, FairGrad, NashMTL, PCGrad, UPGrad
from typing_extensions import override

from benchmarking import peers
from benchmarking.models import Model, Module, Physics
from benchmarking.networks import NETWORKS
from lightning_gradnorm import Aggregation, GradNorm, strategies


class SolverClock:
    """Adds up the time of an aggregator's own computation, by whichever solver."""

    def __init__(self) -> None:
        self.total, self.calls = 0.0, 0

    def timed(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*arguments: Any) -> Tensor:
            began = time.perf_counter()
            answer = call(*arguments)
            self.total += time.perf_counter() - began
            self.calls += 1
            return answer

        return timed

    def mean(self) -> float:
        return self.total / self.calls if self.calls else 0.0


class TimedAggregation(Aggregation):
    """`Aggregation` with a clock in its rule."""

    def __init__(self, *arguments: Any, clock: SolverClock, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._clock = clock

    @override
    def _build_rule(self, like: Tensor) -> Any:
        rule = super()._build_rule(like)
        rule._call_aggregator = self._clock.timed(rule._call_aggregator)  # type: ignore[method-assign]
        return rule


@dataclass
class Run:
    """The parts of one training."""

    model: L.LightningModule
    callbacks: list[L.Callback] = field(default_factory=list)
    solver: SolverClock | None = None


@dataclass(frozen=True)
class Way:
    """One way to train.

    Args:
        start: creates a run from the network's name, the number of tasks, and ``compiled``.
        package: imports the packages needed besides our own dependencies.
        is_ours: a failure of ours is an error, a failure of another way is a result.
        compiles: True if it works with a compiled trunk and heads. Ours reports it if it does not.
        is_usual: False if it only runs when it is named, or with the measure that needs it.
    """

    start: Callable[[str, int, bool], Run]
    package: Callable[[], Any] | None = None
    is_ours: bool = True
    compiles: bool = True
    is_usual: bool = True

    def what_is_missing(self) -> str | None:
        """Return the missing package, if any. Imports what the way needs."""
        try:
            if self.package is not None:
                self.package()
        except ImportError as error:
            return f"{error}; it is in the extra `bench`"
        return None


def plain(kind: str, tasks: int, compiled: bool) -> Run:
    return Run(Model(kind, tasks, compiled))


def gradnorm(*, with_heads: bool = True, **options: Any) -> Way:
    def start(kind: str, tasks: int, compiled: bool) -> Run:
        model = Model(kind, tasks, compiled)
        heads = model.head_names if with_heads else None
        return Run(model, [GradNorm(list(model.heads), shared_layer=model.shared_layer, heads=heads, **options)])

    # Without heads=, the backward pass visits each head twice, which a compiled graph does not allow.
    return Way(start, compiles=with_heads)


def all_found() -> Way:
    def start(kind: str, tasks: int, compiled: bool) -> Run:
        model = Model(kind, tasks, compiled)
        return Run(model, [GradNorm(list(model.heads))])

    return Way(start, compiles=False, is_usual=False)


def of_our_module(kind: str, tasks: int, compiled: bool) -> Run:
    return Run(Module(kind, tasks, compiled), [GradNorm(shared_layer=NETWORKS[kind].shared_layer)])


def another(model: type[Model], package: Callable[[], Any] | None = None) -> Way:
    return Way(lambda kind, tasks, compiled: Run(model(kind, tasks, compiled)), package, is_ours=False)


def aggregation(make: Callable[[int], Aggregator], compiles: bool = True, **options: Any) -> Way:
    def start(kind: str, tasks: int, compiled: bool) -> Run:
        model, clock = Model(kind, tasks, compiled), SolverClock()
        callback = TimedAggregation(make(tasks), list(model.heads), heads=model.head_names, clock=clock, **options)
        return Run(model, [callback], clock)

    return Way(start, compiles=compiles)


def by_hand(make: Callable[[int], Aggregator]) -> Way:
    return Way(lambda kind, tasks, compiled: Run(peers.TorchJD(kind, tasks, compiled, make(tasks))), is_ours=False)


def physics(**options: Any) -> Way:
    return Way(lambda kind, tasks, compiled: Run(Physics(kind), [GradNorm(**options)]), compiles=False)


EQUAL = "equal weights"
OF_GRADNORM = {
    EQUAL: Way(plain),
    "with heads": gradnorm(),
    "without heads": gradnorm(with_heads=False),
    "nothing named": all_found(),
    "MultiTaskModule": Way(of_our_module),
    "every 8th step": gradnorm(update_every=8),
    "activation": gradnorm(norm_of="activation"),
    "textbook": another(peers.Textbook),
    "gradnorm-pytorch": another(peers.GradNormPytorch, peers.gradnorm_pytorch),
    "LibMTL GradNorm": another(peers.LibMTLGradNorm, peers.libmtl_gradnorm),
    "UPGrad": aggregation(lambda tasks: UPGrad()),
    "UPGrad by hand": another(peers.TorchJD),
}
OF_AGGREGATION = {
    EQUAL: Way(plain),
    "UPGrad": OF_GRADNORM["UPGrad"],
    "PCGrad": aggregation(lambda tasks: PCGrad()),
    "MGDA": aggregation(lambda tasks: MGDA()),
    "IMTL-G": aggregation(lambda tasks: IMTLG()),
    "Aligned-MTL": aggregation(lambda tasks: AlignedMTL()),
    "CAGrad": aggregation(lambda tasks: strategies.CAGrad(c=0.5)),  # TorchJD's gives weights of 0 here: norm_eps
    "Nash-MTL": aggregation(lambda tasks: NashMTL(n_tasks=tasks)),
    "FairGrad": aggregation(lambda tasks: FairGrad(alpha=2.0)),
    "UPGrad at parameters": aggregation(lambda tasks: UPGrad(), compiles=False, at="parameters"),
    "UPGrad by hand": OF_GRADNORM["UPGrad by hand"],
    "MGDA by hand": by_hand(lambda tasks: MGDA()),
    "CAGrad by hand": by_hand(lambda tasks: CAGrad(c=0.5)),
    "Nash-MTL by hand": by_hand(lambda tasks: NashMTL(n_tasks=tasks)),
    "FairGrad by hand": by_hand(lambda tasks: FairGrad(alpha=2.0)),
}
OF_PINN = {
    EQUAL: Way(lambda kind, tasks, compiled: Run(Physics(kind)), compiles=False),
    "every step": physics(),
    "every 10th step": physics(update_every=10),
}
WAYS: Mapping[str, Mapping[str, Way]] = {"gradnorm": OF_GRADNORM, "aggregation": OF_AGGREGATION, "pinn": OF_PINN}
PINN_CASE = ("burgers", 3)
"""The only case with losses of derivatives, used by the ways of ``pinn``."""
