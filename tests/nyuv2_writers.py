"""Write images with their annotations in each of the three formats of NYUv2, down to the layout.

    write_official(folder, train=samples, test=others, scenes=["kitchen_0001", ...])
    write_mtan(folder, train=samples, test=others)
    write_huggingface(folder, train=samples, test=others)

A sample is a mapping (or an object with attributes) of numpy arrays or tensors: ``image`` (3, H, W) in [0, 1] or
``uint8``, ``segmentation`` (H, W), ``depth`` (1, H, W) or (H, W) in meters, ``normals`` (3, H, W); all of one size, as
these formats require. Image and normals may have their channels last, as the views of `problems.dense.rooms` do.
These formats have no keypoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradnorm.experiments.problems.dense.nyuv2.errors import needed
from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import (
    CLASSES,
    IGNORED,
    Frame,
    as_depth,
    as_image,
    as_normals,
    as_segmentation,
    expect_shape,
)
from lightning_gradnorm.experiments.problems.dense.nyuv2.mtan import FOLDERS
from lightning_gradnorm.experiments.problems.dense.nyuv2.official import DATA, SPLITS, TO_13, TO_40

Array = npt.NDArray[Any]

LABELS = 894
"""The labels of the official data file, apart from 0."""
MATLAB_HEADER = 512


def as_frame(sample: Any) -> Frame:
    """Check a sample and turn it into a `Frame` of one size.

    Raises:
        ValueError: It has a value out of range or arrays of different sizes.
    """
    arrays = {
        kind: np.asarray(sample[kind] if hasattr(sample, "keys") else getattr(sample, kind))
        for kind in ("image", "segmentation", "depth", "normals")
    }
    for kind in ("image", "normals"):
        if arrays[kind].shape[0] != 3 and arrays[kind].shape[-1] == 3:
            arrays[kind] = np.moveaxis(arrays[kind], -1, 0)
    size = arrays["segmentation"].shape
    depth = arrays["depth"]
    frame = Frame(
        image=arrays["image"] if arrays["image"].dtype == np.uint8 else as_image(arrays["image"], "the sample"),
        segmentation=as_segmentation(arrays["segmentation"], "the sample"),
        depth=as_depth(depth[0] if depth.ndim == 3 else depth, "the sample"),
        normals=as_normals(arrays["normals"], "the sample"),
    )
    for kind, shape in (("image", (3, *size)), ("depth", size), ("normals", (3, *size))):
        expect_shape(getattr(frame, kind), shape, "the sample", kind)
    return frame


def write_official(root: Path, train: Sequence[Any], test: Sequence[Any], scenes: Sequence[str] | None = None) -> None:
    """Write the four official files.

    Train and test images alternate in the data file as long as there are both, so that the split is needed to tell them
    apart. The mappings of the classes are invented (the real ones are not ours to hand on), but of the real shape, and
    many labels mean the same class. Normals are not written: this form has none.

    Args:
        root: The folder; made if need be.
        train: The training images.
        test: The test images.
        scenes: The scene of each image, those of ``train`` first; by default each is one of its own.
    """
    h5py, savemat = needed("h5py"), needed("scipy.io").savemat
    root.mkdir(parents=True, exist_ok=True)
    frames = [as_frame(sample) for sample in (*train, *test)]
    scenes = [f"scene_{i:04}" for i in range(len(frames))] if scenes is None else scenes
    # Position i of the file holds frames[order[i]].
    order = sorted(range(len(frames)), key=lambda i: (i if i < len(train) else i - len(train), i))
    to_40 = np.arange(LABELS) % 40 + 1
    to_13 = np.arange(40) % len(CLASSES) + 1
    class_of = np.concatenate([[IGNORED], to_13[to_40 - 1] - 1])
    draw = np.random.default_rng(0)
    columns = {
        "images": np.stack([frames[i].image.transpose(0, 2, 1) for i in order]),
        "depths": np.stack([frames[i].depth.T for i in order]),
        "rawDepths": np.stack([frames[i].depth.T for i in order]),
        "labels": np.stack([_labels(frames[i].segmentation, class_of, draw).T for i in order]),
        "accelData": np.zeros((4, len(frames)), dtype=np.float32),
    }
    with h5py.File(root / DATA, "w", userblock_size=MATLAB_HEADER) as file:
        for field, values in columns.items():
            chunks = (1, *values.shape[1:]) if values.ndim > 2 else None
            made = file.create_dataset(field, data=values, chunks=chunks, compression="gzip" if chunks else None)
            kind = {"float32": "single"}.get(str(values.dtype), str(values.dtype))
            made.attrs["MATLAB_class"] = np.bytes_(kind)
        for field, names in (
            ("names", [f"label {i}" for i in range(1, LABELS + 1)]),
            ("scenes", [scenes[i] for i in order]),
            ("sceneTypes", [scenes[i].rpartition("_")[0] for i in order]),
            ("rawRgbFilenames", [f"{scenes[i]}/r-{i}.ppm" for i in order]),
        ):
            _write_cell(h5py, file, field, names)
    with (root / DATA).open("r+b") as raw:
        text = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created by lightning-gradnorm HDF5 schema 1.00 ."
        raw.write(text.ljust(116) + bytes(8) + b"\x00\x02IM")
    numbers = {i: position + 1 for position, i in enumerate(order)}
    first = len(train)
    savemat(
        root / SPLITS,
        {
            "trainNdxs": np.array([[numbers[i]] for i in range(first)], dtype=np.uint16),
            "testNdxs": np.array([[numbers[i]] for i in range(first, len(frames))], dtype=np.uint16),
        },
    )
    savemat(root / TO_40, {"mapClass": to_40[None].astype(np.uint8), "className": _cell([f"c{i}" for i in range(40)])})
    mapping = {"labels13": to_13[None].astype(np.uint8), "classNames": _cell(CLASSES)}
    savemat(root / TO_13, {"classMapping13": mapping})


def write_mtan(
    root: Path, train: Sequence[Any], test: Sequence[Any], dtype: npt.DTypeLike = np.float32, flat_depth: bool = False
) -> None:
    """Write ``root/{train,val}/{image,label,depth,normal}/{0..N-1}.npy``.

    Args:
        root: The folder; made if need be.
        train: The training images.
        test: The test images; their folder is ``val``.
        dtype: Type of the floats, and of the labels, which copies differ in.
        flat_depth: Leave out the last dimension of the depth, of length 1.
    """
    for split, samples in (("train", train), ("test", test)):
        folder = root / FOLDERS[split]
        for index, sample in enumerate(samples):
            frame = as_frame(sample)
            assert isinstance(frame.normals, np.ndarray)
            arrays = {
                "image": (frame.image.astype(np.float64) / 255).transpose(1, 2, 0),
                "label": frame.segmentation,
                "depth": frame.depth if flat_depth else frame.depth[..., None],
                "normal": frame.normals.transpose(1, 2, 0),
            }
            for kind, values in arrays.items():
                (folder / kind).mkdir(parents=True, exist_ok=True)
                np.save(folder / kind / f"{index}.npy", np.ascontiguousarray(values, dtype=dtype))


def write_huggingface(
    root: Path, train: Sequence[Any], test: Sequence[Any], rows_per_shard: int = 100, rows_per_group: int = 100
) -> None:
    """Write ``root/data/{train,val}-00000-of-00008.parquet`` and so on, with the columns of ``tanganke/nyuv2``.

    Args:
        root: The folder; made if need be.
        train: The training images.
        test: The test images; their shards are called ``val``.
        rows_per_shard: Images per file.
        rows_per_group: Images per group of rows within a file.
    """
    pa, parquet = needed("pyarrow"), needed("pyarrow.parquet")
    folder = root / "data"
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Callable[[Frame], Any]] = {
        "image": lambda frame: frame.image.astype(np.float32) / np.float32(255),
        "segmentation": lambda frame: frame.segmentation.astype(np.int64),
        "depth": lambda frame: frame.depth[None],
        "normal": lambda frame: frame.normals,
        "noise": lambda frame: np.zeros((1, *frame.segmentation.shape), dtype=np.float32),
    }
    for prefix, samples in (("train", train), ("val", test)):
        shards = max(1, -(-len(samples) // rows_per_shard))
        for shard in range(shards):
            frames = [as_frame(sample) for sample in samples[shard * rows_per_shard : (shard + 1) * rows_per_shard]]
            table = pa.table({name: _nested(pa, [column(f) for f in frames]) for name, column in columns.items()})
            file = folder / f"{prefix}-{shard:05}-of-{shards:05}.parquet"
            parquet.write_table(table, file, row_group_size=rows_per_group)


def _labels(segmentation: Array, class_of: Array, draw: np.random.Generator) -> Array:
    """Choose for each pixel one of the labels that mean its class."""
    labels = np.zeros(segmentation.shape, dtype=np.uint16)
    for number in np.unique(segmentation[segmentation != IGNORED]):
        where = segmentation == number
        labels[where] = draw.choice(np.flatnonzero(class_of == number), size=int(where.sum()))
    return labels


def _write_cell(h5py: Any, file: Any, field: str, texts: Sequence[str]) -> None:
    """Write a MATLAB cell array of strings: references to columns of characters as ``uint16``."""
    references = np.empty((1, len(texts)), dtype=h5py.ref_dtype)
    group = file.require_group("#refs#")
    for i, text in enumerate(texts):
        characters = np.array([[ord(character)] for character in text], dtype=np.uint16)
        made = group.create_dataset(f"{field}_{i}", data=characters)
        made.attrs["MATLAB_class"] = np.bytes_("char")
        references[0, i] = made.ref
    made = file.create_dataset(field, data=references, dtype=h5py.ref_dtype)
    made.attrs["MATLAB_class"] = np.bytes_("cell")


def _cell(texts: Sequence[str]) -> Array:
    cell = np.empty((1, len(texts)), dtype=object)
    cell[0] = texts
    return cell


def _nested(pa: Any, arrays: Sequence[Array]) -> Any:
    """Make a column of nested lists out of arrays of one shape."""
    stacked = np.stack(arrays)
    values = pa.array(stacked.ravel())
    for axis in range(stacked.ndim - 1, 0, -1):
        count = int(np.prod(stacked.shape[:axis]))
        values = pa.ListArray.from_arrays(pa.array(np.arange(count + 1) * stacked.shape[axis], pa.int32()), values)
    return values
