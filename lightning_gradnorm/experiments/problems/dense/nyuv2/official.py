"""Reads the official files: ``nyu_depth_v2_labeled.mat``, its split, and the mappings of its classes to 40 and 13."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradnorm.experiments.problems.dense.nyuv2.errors import COPY_AGAIN, existing, expect, needed, wrong
from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import CLASSES, IGNORED, Frame, as_depth
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_from_depth import KINECT
from lightning_gradnorm.experiments.problems.dense.nyuv2.per_process import PerProcess

Array = npt.NDArray[Any]

DATA = "nyu_depth_v2_labeled.mat"
SPLITS = "splits.mat"
TO_40 = "classMapping40.mat"
TO_13 = "class13Mapping.mat"

_SPLIT_FIELDS = {"train": "trainNdxs", "test": "testNdxs"}
_META = "It is in the repository ankurhanda/nyuv2-meta-data."


class Official:
    """Reads the official files, one image at a time.

    The data file is MATLAB 7.3, which is HDF5, where h5py reverses every shape: ``images`` (N, 3, W, H)
    ``uint8``, ``depths`` (N, W, H) in-painted meters, ``labels`` (N, W, H) with 0 for no class, and ``scenes`` (1, N),
    references to arrays of characters. The indices of the split count from one. Labels become 13 classes with
    ``labels13[mapClass[label - 1] - 1] - 1``. The files have no normals, so these are derived from the depth.

    Args:
        root: The folder with the four files.

    Raises:
        FileNotFoundError: One of the four is missing.
        ValueError: A file is damaged, or a field is missing or has the wrong shape, type or range.
        ModuleNotFoundError: h5py or scipy is not installed.
    """

    form = "official .mat"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._file = existing(root / DATA, "the images, depths and labels of the official format")
        self._opened = PerProcess(self._open)
        with self._open() as data:
            self._check(data)
            samples = data["images"].shape[0]
            self.size: tuple[int, int] = data["images"].shape[:1:-1]
            names = self._scene_names(data)
        self._indices = self._read_split(samples)
        self._scenes = {split: [names[i] for i in indices] for split, indices in self._indices.items()}
        self._to_13 = self._read_mapping()

    def count(self, split: str) -> int:
        """Return the number of images of ``"train"`` or ``"test"``."""
        return len(self._indices[split])

    def scenes(self, split: str) -> list[str]:
        """Return the name of each image's scene, such as ``"kitchen_0012"``."""
        return self._scenes[split]

    def read(self, split: str, index: int) -> Frame:
        """Read the ``index``-th image of a split.

        Raises:
            ValueError: A value is out of range, or the file is damaged at this place.
        """
        i = self._indices[split][index]
        data = self._opened()
        image, depth, labels = (self._read(data, field, i) for field in ("images", "depths", "labels"))
        highest = int(labels.max())
        known = len(self._to_13) - 1
        expect(highest <= known, self._file, f"labels[{i}]", f"0 to {known}, as many as {TO_40} maps", highest)
        height, width = self.size
        return Frame(
            image=np.ascontiguousarray(image.transpose(0, 2, 1)),
            segmentation=self._to_13[labels.T],
            depth=np.ascontiguousarray(as_depth(depth, f"{self._file} at depths[{i}]").T),
            normals=KINECT.scaled(width / 640, height / 480),
        )

    def _open(self) -> Any:
        try:
            return needed("h5py").File(self._file, "r")
        except OSError as error:
            wrong(self._file, "the file", "HDF5 (MATLAB 7.3)", error, COPY_AGAIN)

    def _read(self, data: Any, field: str, i: int) -> Array:
        try:
            values: Array = data[field][i]
        except OSError as error:
            wrong(self._file, f"{field}[{i}]", "readable", error, COPY_AGAIN)
        return values

    def _check(self, data: Any) -> None:
        for field in ("images", "depths", "labels", "scenes"):
            expect(field in data, self._file, field, "there", f"only {', '.join(sorted(data))}", COPY_AGAIN)
        shape = data["images"].shape
        expect(
            len(shape) == 4 and shape[1] == 3, self._file, "images", "of shape (N, 3, width, height)", f"shape {shape}"
        )
        samples, _, width, height = shape
        for field, kinds, expected in (
            ("images", ("uint8",), "uint8"),
            ("depths", ("float32", "float64"), "floating-point meters"),
            ("labels", ("uint8", "uint16", "uint32", "int32"), "integers"),
        ):
            expect(str(data[field].dtype) in kinds, self._file, field, expected, f"dtype {data[field].dtype}")
            wanted = (samples, 3, width, height) if field == "images" else (samples, width, height)
            found = data[field].shape
            expect(found == wanted, self._file, field, f"of shape {wanted}, as images are", f"shape {found}")
        expect(
            data["scenes"].size == samples,
            self._file,
            "scenes",
            f"{samples} names",
            f"{data['scenes'].size}",
            COPY_AGAIN,
        )

    def _scene_names(self, data: Any) -> list[str]:
        try:
            return ["".join(map(chr, data[reference][:].ravel())) for reference in data["scenes"][:].ravel()]
        except (KeyError, OSError, TypeError, ValueError) as error:
            wrong(self._file, "scenes", "references to arrays of characters", error, COPY_AGAIN)

    def _read_split(self, samples: int) -> dict[str, Array]:
        file = existing(self.root / SPLITS, "the official train and test images")
        content = self._load(file)
        indices: dict[str, Array] = {}
        for split, field in _SPLIT_FIELDS.items():
            expect(field in content, file, field, "there", f"only {_names(content)}")
            values = np.asarray(content[field]).ravel().astype(np.int64)
            fits = len(values) > 0 and values.min() >= 1 and values.max() <= samples
            found = f"{values.min()} to {values.max()}" if len(values) else "none"
            expect(fits, file, field, f"indices that count from 1 to {samples}, the images in {DATA}", found)
            indices[split] = values - 1
        every = np.concatenate(list(indices.values()))
        expect(
            len(np.unique(every)) == len(every), file, "trainNdxs and testNdxs", "without an image in common",
            f"{len(every) - len(np.unique(every))} repeated",
        )  # fmt: skip
        return indices

    def _read_mapping(self) -> Array:
        """Return the class 0 to 12 of each label in the data file, or -1 for label 0, which has no class."""
        file = existing(self.root / TO_40, f"the mapping of the labels to 40 classes ({_META})")
        to_40 = self._mapping(file, self._load(file), "mapClass", 40)
        file = existing(self.root / TO_13, f"the mapping of the 40 classes to 13 ({_META})")
        content = self._load(file)
        expect("classMapping13" in content, file, "classMapping13", "there", f"only {_names(content)}")
        struct = content["classMapping13"]
        expect(
            getattr(struct.dtype, "names", None) is not None,
            file,
            "classMapping13",
            "a struct",
            f"dtype {struct.dtype}",
        )
        fields = {name: struct[name].item() for name in struct.dtype.names}
        to_13 = self._mapping(file, fields, "labels13", len(CLASSES), samples=40)
        if "classNames" in fields:
            names = tuple(str(np.squeeze(name)) for name in np.ravel(fields["classNames"]))
            expect(names == CLASSES, file, "classNames", ", ".join(CLASSES), ", ".join(names))
        return np.concatenate([[IGNORED], to_13[to_40 - 1] - 1]).astype(np.int8)

    def _mapping(self, file: Path, fields: Any, field: str, classes: int, samples: int | None = None) -> Array:
        expect(field in fields, file, field, "there", f"only {_names(fields)}")
        values = np.asarray(fields[field]).ravel()
        expect(values.dtype.kind in "iuf", file, field, "integers", f"dtype {values.dtype}")
        wanted = f"{samples or 'some'} classes from 1 to {classes}"
        fits = len(values) > 0 and bool(np.isin(values, np.arange(1, classes + 1)).all())
        found = f"{len(values)} from {values.min()} to {values.max()}" if len(values) else "none"
        expect(fits and samples in (None, len(values)), file, field, wanted, found)
        return values.astype(np.int64)

    def _load(self, file: Path) -> dict[str, Any]:
        loadmat = needed("scipy.io").loadmat
        try:
            content: dict[str, Any] = loadmat(file, squeeze_me=True)
        # For damaged files, scipy raises any error that its parser runs into.
        except Exception as error:
            wrong(file, "the file", "a MATLAB file", f"{type(error).__name__}: {error}", COPY_AGAIN)
        return content


def _names(content: Any) -> str:
    return ", ".join(sorted(name for name in content if not name.startswith("__"))) or "nothing"
