"""Times imports in fresh interpreters, interleaved: the CPU time that our package adds to `import lightning`.

Example:
    python scripts/import_time.py --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence

STATEMENTS = (
    "import lightning",
    "import lightning_gradnorm",
    "import lightning_gradnorm.engine",
    "from lightning_gradnorm import GradNorm",
)


def seconds(statement: str) -> float:
    """Return the CPU time of a statement in a separate interpreter, without its startup."""
    code = f"import time\nbegan = time.process_time()\n{statement}\nprint(time.process_time() - began)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args(arguments).rounds
    for statement in STATEMENTS:  # loads the files from disk
        seconds(statement)
    taken = [[seconds(statement) for statement in STATEMENTS] for _ in range(rounds)]
    print(f"{'processor seconds':40} min  median  max, of {rounds}")
    for statement, times in zip(STATEMENTS, zip(*taken, strict=True), strict=True):
        print(f"{statement:40} {min(times):.2f}  {statistics.median(times):.2f}  {max(times):.2f}")


if __name__ == "__main__":
    main()
