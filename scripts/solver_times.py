"""Times the solvers of aggregators on random Gramians, ours and TorchJD's interleaved, in one thread: milliseconds of CPU time.

Example:
    python scripts/solver_times.py --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchjd import aggregation as jd

from lightning_gradnorm import strategies
from lightning_gradnorm.strategies.aggregation import _weights_of
from lightning_gradnorm.strategies.exact import solver_of

AGGREGATORS: dict[str, Callable[[int], jd.Aggregator]] = {
    "NashMTL": jd.NashMTL,
    "CAGrad": lambda tasks: jd.CAGrad(c=0.5),
    "FairGrad": lambda tasks: jd.FairGrad(alpha=2.0),
    "MGDA": lambda tasks: jd.MGDA(),
    "UPGrad": lambda tasks: jd.UPGrad(),
    "DualProj": lambda tasks: jd.DualProj(),
}
CALLS = 10
"""Gramians of each round."""


def milliseconds(solve: Callable[[Tensor], object], given: Sequence[Tensor]) -> float:
    """Return the CPU time of one call."""
    began = time.process_time()
    for one in given:
        solve(one)
    return 1000 * (time.process_time() - began) / len(given)


def times(name: str, tasks: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return TorchJD's times and ours: of its own object, or of our class if we leave TorchJD's to itself."""
    theirs: list[float] = []
    ours: list[float] = []
    torchjd, draw = AGGREGATORS[name](tasks), torch.Generator().manual_seed(0)
    weights = _weights_of(torchjd)
    solve = solver_of(AGGREGATORS[name](tasks)) or _weights_of(getattr(strategies, name)())
    assert weights is not None
    assert solve is not None
    for _ in range(rounds + 1):
        matrices = list(torch.randn(CALLS, tasks, 1000, generator=draw) + torch.randn(1000, generator=draw) / 2)
        gramians = [J @ J.T for J in matrices]
        roots = [torch.linalg.cholesky(G) for G in gramians]
        theirs.append(milliseconds(weights, roots if name == "NashMTL" else gramians))
        ours.append(milliseconds(solve, gramians))
    return theirs[1:], ours[1:]  # without the first calls


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tasks", type=int, nargs="+", default=[3, 10, 40])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # cvxpy's
    print("| solver | T | TorchJD, ms | ours, ms |\n|---|---:|---:|---:|")
    for name in AGGREGATORS:
        for tasks in options.tasks:
            cells = [_cell(taken) for taken in times(name, tasks, options.rounds)]
            print(f"| {name} | {tasks} | {' | '.join(cells)} |", flush=True)


def _cell(taken: Sequence[float]) -> str:
    return f"{statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f})"


if __name__ == "__main__":
    main()
