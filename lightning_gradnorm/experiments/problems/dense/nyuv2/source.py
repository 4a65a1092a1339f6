"""Detects the format of the data in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lightning_gradnorm._messages import did_you_mean
from lightning_gradnorm.experiments.problems.dense.nyuv2 import huggingface, mtan, official
from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import Frame


class Source(Protocol):
    """Images with annotations in two splits, ``"train"`` and the official ``"test"``.

    Attributes:
        form: Name of the format.
        root: The folder.
        size: Height and width of its images.
    """

    form: str
    root: Path
    size: tuple[int, int]

    def count(self, split: str) -> int:
        """Return the number of images of a split."""

    def scenes(self, split: str) -> list[str] | None:
        """Return the scene of each image, or None if the format does not tell."""

    def read(self, split: str, index: int) -> Frame:
        """Read an image, its normals in the source's own convention."""


FORMS: dict[str, Callable[[Path], Source]] = {
    "official": official.Official,
    "mtan": mtan.MTAN,
    "huggingface": huggingface.HuggingFace,
}
"""The formats by the names that ``form`` accepts."""

PREPARED = "prepared"
MANIFEST = "nyuv2.json"
PROGRESS = "nyuv2.progress.json"

_LOOKED_FOR = (
    f"{official.DATA} (the official format), train/image and val/image (MTAN's), train-*.parquet (Hugging Face's) "
    f"or {MANIFEST} (prepared by scripts/prepare_nyuv2.py)"
)


def find_form(root: Path) -> str:
    """Return the format of a folder: ``"prepared"`` or one of `FORMS`.

    Raises:
        FileNotFoundError: The folder does not exist, or has none of the formats.
        ValueError: It has several formats, or is only partly prepared.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"NYUv2: root should be a folder; no such folder: {root}.")
    if (root / MANIFEST).is_file():
        return PREPARED
    if (root / PROGRESS).is_file():
        raise ValueError(
            f"NYUv2: the data in {root} should be prepared completely; they are not. Run scripts/prepare_nyuv2.py again "
            "as before; it continues where it stopped."
        )
    forms = _forms_of(root)
    if len(forms) > 1:
        raise ValueError(
            f"NYUv2: root should contain one format of the data; {root} contains {', '.join(forms)}. Choose one with form=..."
        )
    if not forms:
        below = [child.name for child in sorted(root.iterdir()) if child.is_dir() and _forms_of(child)]
        hint = f" Its folder {below[0]} does: root={root / below[0]}" if below else ""
        raise FileNotFoundError(f"NYUv2: root should contain {_LOOKED_FOR}; {root} contains none of them.{hint}")
    return forms[0]


def find_source(root: Path, form: str | None = None) -> Source:
    """Open the source in a folder, in any format.

    Args:
        root: The folder.
        form: One of `FORMS`, if the folder contains several formats.

    Raises:
        FileNotFoundError: The folder does not exist or has none of the formats, or files are missing.
        ValueError: It has several formats, or is prepared, or ``form`` is unknown, or a file is invalid.
    """
    if form is not None and form not in FORMS:
        raise ValueError(f"NYUv2: form should be one of {', '.join(FORMS)}; got {form!r}: {did_you_mean(form, FORMS)}")
    form = find_form(root) if form is None else form
    if form == PREPARED:
        raise ValueError(f"NYUv2: a source should be as downloaded; {root} is already prepared.")
    return FORMS[form](root)


def describe(source: Source) -> str:
    """Return a line that describes the source."""
    height, width = source.size
    return (
        f"NYUv2: {source.root} is in the {source.form} format: {source.count('train')} train and {source.count('test')} test "
        f"images of {height} x {width}."
    )


def _forms_of(root: Path) -> list[str]:
    found = {
        "official": (root / official.DATA).is_file(),
        "mtan": any((root / folder / "image").is_dir() for folder in mtan.FOLDERS.values()),
        "huggingface": any(_has_shards(root, split) for split in huggingface.PREFIXES),
    }
    return [form for form, is_there in found.items() if is_there]


def _has_shards(root: Path, split: str) -> bool:
    try:
        return bool(huggingface.shards(root, split))
    except FileNotFoundError:
        return True
