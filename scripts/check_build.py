"""Checks that a wheel and an sdist contain the right files and nothing else.

Example:
    python scripts/check_build.py dist
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_SDIST = ("conf/", "docs/", "lightning_gradnorm/", "notebooks/", "scripts/", "tests/", "CHANGELOG.md", "CITATION.cff")
IN_SDIST += (
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints",
    "mkdocs.yml",
    "pyproject.toml",
    ".gitignore",
)


def tracked() -> set[str]:
    """Return the files that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name}


def main() -> None:
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    files = tracked()
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {name for name in files if name.startswith("lightning_gradnorm/")}
    compare(wheel, inside, package | {f"lightning_gradnorm/{name}" for name in files if name.startswith("conf/")})
    with tarfile.open(sdist) as source:
        inside = {member.name.partition("/")[2] for member in source.getmembers() if member.isfile()}
    compare(sdist, inside - {"PKG-INFO"}, {name for name in files if name.startswith(IN_SDIST)})


def compare(built: Path, inside: Iterable[str], expected: Iterable[str]) -> None:
    """Print the contents of the file by folder.

    Raises:
        SystemExit: a file is missing or does not belong there.
    """
    missing, foreign = sorted(set(expected) - set(inside)), sorted(set(inside) - set(expected))
    if missing or foreign:
        sys.exit(f"{built.name}: missing {missing or 'nothing'}; does not belong there: {foreign or 'nothing'}")
    counts = Counter(name.rpartition("/")[0] or "." for name in inside)
    print(f"{built.name}: {built.stat().st_size / 1024:.0f} KiB, {sum(counts.values())} files")
    for place, count in sorted(counts.items()):
        print(f"  {count:4} {place}")


if __name__ == "__main__":
    main()
