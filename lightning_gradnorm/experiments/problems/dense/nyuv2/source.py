"""Which form of the data a folder is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lightning_gradnorm._messages import did_you_mean
from lightning_gradnorm.experiments.problems.dense.nyuv2 import huggingface, mtan, official
from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import Frame


class Source(Protocol):
    """Images with their annotation, in two splits, ``"train"`` and the official ``"test"``.

    Attributes:
        form: What kind of copy it is, in words.
        root: Where it is.
        size: Height and width of its images.
    """

    form: str
    root: Path
    size: tuple[int, int]

    def count(self, split: str) -> int:
        """Return the number of images of a split."""

    def scenes(self, split: str) -> list[str] | None:
        """Return the scene of each image, or None where the form does not tell."""

    def read(self, split: str, index: int) -> Frame:
        """Read an image, its normals in the source's own convention."""


FORMS: dict[str, Callable[[Path], Source]] = {
    "official": official.Official,
    "mtan": mtan.MTAN,
    "huggingface": huggingface.HuggingFace,
}
"""The forms by the names under which they can be asked for."""

PREPARED = "prepared"
MANIFEST = "nyuv2.json"
PROGRESS = "nyuv2.progress.json"

_LOOKED_FOR = (
    f"{official.DATA} (the official form), train/image and val/image (MTAN's), train-*.parquet (Hugging Face's) "
    f"or {MANIFEST} (prepared by scripts/prepare_nyuv2.py)"
)


def find_form(root: Path) -> str:
    """Say which form of the data a folder is: ``"prepared"`` or one of `FORMS`.

    Raises:
        FileNotFoundError: There is no such folder, or it is none of the forms.
        ValueError: It is several of them, or prepared in part.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"NYUv2: root should be a folder; {root} is none.")
    if (root / MANIFEST).is_file():
        return PREPARED
    if (root / PROGRESS).is_file():
        raise ValueError(
            f"NYUv2: the data in {root} should be prepared to the end; they are not. Run scripts/prepare_nyuv2.py again "
            "as before; it goes on where it stopped."
        )
    forms = _forms_of(root)
    if len(forms) > 1:
        raise ValueError(
            f"NYUv2: root should hold one form of the data; {root} holds {', '.join(forms)}. Say which with form=..."
        )
    if not forms:
        below = [child.name for child in sorted(root.iterdir()) if child.is_dir() and _forms_of(child)]
        hint = f" Its folder {below[0]} does: root={root / below[0]}" if below else ""
        raise FileNotFoundError(f"NYUv2: root should hold {_LOOKED_FOR}; {root} holds none of them.{hint}")
    return forms[0]


def find_source(root: Path, form: str | None = None) -> Source:
    """Open the source in a folder, of whichever form it is.

    Args:
        root: The folder.
        form: One of `FORMS`, if the folder holds several.

    Raises:
        FileNotFoundError: There is no such folder, it is none of the forms, or files are missing.
        ValueError: It is several of them, or prepared, or ``form`` is unknown, or a file is wrong.
    """
    if form is not None and form not in FORMS:
        raise ValueError(f"NYUv2: form should be one of {', '.join(FORMS)}; got {form!r}: {did_you_mean(form, FORMS)}")
    form = find_form(root) if form is None else form
    if form == PREPARED:
        raise ValueError(f"NYUv2: a source should be as it was downloaded; {root} is already prepared.")
    return FORMS[form](root)


def describe(source: Source) -> str:
    """Say in a line what was found."""
    height, width = source.size
    return (
        f"NYUv2: {source.root} is the {source.form} form: {source.count('train')} train and {source.count('test')} test "
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
