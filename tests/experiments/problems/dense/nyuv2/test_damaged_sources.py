"""Errors in a copy of the data are reported before training: the file, the field, what was expected and found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from indoor import frames
from nyuv2_writers import write_huggingface, write_mtan, write_official
from torch import nn

from lightning_gradnorm.experiments.problems.dense.nyuv2 import NYUv2, find_source
from lightning_gradnorm.experiments.problems.dense.nyuv2.source import find_form

h5py = pytest.importorskip("h5py", reason="needs the extra [nyuv2]")
scipy_io = pytest.importorskip("scipy.io", reason="needs the extra [nyuv2]")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [nyuv2]")
pa = pytest.importorskip("pyarrow", reason="needs the extra [nyuv2]")

TRAIN, TEST = frames(3, size=(12, 16)), frames(2, first=3, size=(12, 16))
DATA = "nyu_depth_v2_labeled.mat"
SHARD = "data/val-00000-of-00001.parquet"
Harm = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    write_official(root / "official", TRAIN, TEST)
    write_mtan(root / "mtan", TRAIN, TEST)
    write_huggingface(root / "huggingface", TRAIN, TEST, rows_per_shard=2)
    return root


class Untrained(L.LightningModule):
    """Fails if it ever sees a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        pytest.fail("training started")

    def configure_optimizers(self) -> None:
        return None


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def npy(change: Callable[[np.ndarray], np.ndarray]) -> Harm:
    return lambda file: np.save(file, change(np.load(file)))


def put(index: Any, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[index] = value
        return values

    return change


def hdf5(field: str, change: Callable[[np.ndarray], np.ndarray] | None) -> Harm:
    def harm(file: Path) -> None:
        with h5py.File(file, "r+") as opened:
            values = opened[field][:]
            del opened[field]
            if change is not None:
                opened[field] = change(values)

    return harm


def matlab(**changes: Any) -> Harm:
    def harm(file: Path) -> None:
        content = {key: value for key, value in scipy_io.loadmat(file).items() if not key.startswith("__")}
        for field, change in changes.items():
            if change is None:
                del content[field]
            else:
                content[field] = change(content[field])
        scipy_io.savemat(file, content)

    return harm


def table(column: str, change: Callable[[list], list] | None = None, kind: Any = None) -> Harm:
    def harm(file: Path) -> None:
        content = parquet.read_table(file)
        position = content.schema.names.index(column)
        if change is None and kind is None:
            content = content.remove_column(position)
        else:
            values = content.column(column).to_pylist()
            content = content.set_column(position, column, pa.array(change(values) if change else values, type=kind))
        parquet.write_table(content, file)

    return harm


def mapping13(**changes: Any) -> Harm:
    def harm(file: Path) -> None:
        struct = scipy_io.loadmat(file)["classMapping13"][0, 0]
        content = {name: struct[name] for name in struct.dtype.names}
        scipy_io.savemat(file, {"classMapping13": {**content, **changes}})

    return harm


def deep(value: float) -> Callable[[list], list]:
    """Put a value into the first place of the last row's array."""

    def change(rows: list) -> list:
        inner = rows[-1]
        while isinstance(inner[0], list):
            inner = inner[0]
        inner[0] = value
        return rows

    return change


def ragged(rows: list) -> list:
    rows[-1][0][0].append(0.5)
    return rows


LIST2, LIST3 = pa.list_(pa.list_(pa.int64())), pa.list_(pa.list_(pa.list_(pa.float32())))
LATER = "while reading"
"""Only reading all values shows it; `setup` alone does not."""

CASES = [
    # The official form.
    ("official", DATA, Path.unlink, "root should contain"),
    ("official", "splits.mat", Path.unlink, r"official train and test images should be in .*splits.mat; no such"),
    ("official", "classMapping40.mat", Path.unlink, r"40 classes .*should be in .*classMapping40.mat; no such file"),
    ("official", "class13Mapping.mat", Path.unlink, r"to 13 .*should be in .*class13Mapping.mat; no such file"),
    ("official", DATA, cut, rf"the file in .*{DATA} should be HDF5 \(MATLAB 7.3\); got .*fetch the file again"),
    ("official", DATA, lambda file: file.write_bytes(b"<html>"), rf"the file in .*{DATA} should be HDF5"),
    ("official", "splits.mat", cut, r"the file in .*splits.mat should be a MATLAB file"),
    ("official", "splits.mat", lambda file: file.write_bytes(b""), r"the file in .*splits.mat should be a MATLAB file"),
    ("official", DATA, hdf5("labels", None), rf"labels in .*{DATA} should be there; got only #refs#, accel"),
    ("official", DATA, hdf5("depths", lambda v: v[:-1]), r"depths in .* should be of shape \(5, 16, 12\), as images are"),
    ("official", DATA, hdf5("labels", lambda v: v[:, 1:]), r"labels in .* should be of shape \(5, 16, 12\)"),
    ("official", DATA, hdf5("images", lambda v: v[:, 0]), r"images in .* should be of shape \(N, 3, width, height\)"),
    ("official", DATA, hdf5("images", lambda v: v / 255), r"images in .* should be uint8; got dtype float64"),
    ("official", DATA, hdf5("depths", lambda v: v.astype("u2")), r"depths in .* should be floating-point meters; got"),
    ("official", DATA, hdf5("labels", lambda v: v * 1.0), r"labels in .* should be integers; got dtype float64"),
    ("official", DATA, hdf5("scenes", lambda v: v[:, 1:]), r"scenes in .* should be 5 names; got 4"),
    ("official", DATA, hdf5("scenes", lambda v: np.zeros((1, 5))), r"scenes in .* should be references to arrays"),
    ("official", "splits.mat", matlab(trainNdxs=None), r"trainNdxs in .*splits.mat should be there; got only testNdxs"),
    ("official", "splits.mat", matlab(trainNdxs=lambda v: v - 1), r"trainNdxs in .* should be indices that count from 1 to 5"),
    ("official", "splits.mat", matlab(testNdxs=lambda v: v + 2), r"testNdxs in .* from 1 to 5, the images in .*; got 4 to 6"),
    ("official", "splits.mat", matlab(testNdxs=lambda v: v[:0]), r"testNdxs in .*; got none"),
    ("official", "splits.mat", matlab(testNdxs=lambda v: v * 0 + 1), r"without an image in common; got 2 repeated"),
    ("official", "classMapping40.mat", matlab(mapClass=None), r"mapClass in .* should be there; got only className"),
    ("official", "classMapping40.mat", matlab(mapClass=lambda v: v + 1), r"mapClass in .* 1 to 40; got 894 from 2 to 41"),
    ("official", "class13Mapping.mat", mapping13(labels13=np.arange(40)), r"labels13 in .*1 to 13; got 40 from 0 to 39"),
    ("official", "class13Mapping.mat", mapping13(labels13=np.ones(13)), r"labels13 in .*should be 40 classes from 1 to 13"),
    ("official", "class13Mapping.mat", mapping13(classNames=["wall", "bed"]), r"classNames in .*should be bed, books, .*; got"),
    ("official", "class13Mapping.mat", matlab(classMapping13=None), r"classMapping13 in .* should be there"),
    ("official", DATA, hdf5("labels", put((4, 3, 3), 895)), LATER + r"labels\[4\] in .* should be 0 to 894, .*; got 895"),
    ("official", DATA, hdf5("depths", put((4, 3, 3), -1)), LATER + r"depth in .* at depths\[4\] .*meters .*; got -1 to"),
    ("official", DATA, hdf5("depths", put((0, 3, 3), np.nan)), LATER + r"depth in .* at depths\[0\] should be meters"),
    # The MTAN folder.
    ("mtan", "val/depth", shutil.rmtree, r"should have the folder .*val/depth; no such folder"),
    ("mtan", "train/label/1.npy", Path.unlink, r"the label of image 1 of 3 should be in .*train/label/1.npy; no such file"),
    ("mtan", "val/normal/1.npy", Path.unlink, r"the normal of image 1 of 2 should be in .*val/normal/1.npy; no such file"),
    ("mtan", "val/image/1.npy", cut, r"image in .*val/image/1.npy should be 2304 bytes of data; got \d+.*fetch the file again"),
    ("mtan", "val/image/1.npy", lambda file: file.write_bytes(b"PK"), r"the header in .*val/image/1.npy should be that of"),
    ("mtan", "val/depth/0.npy", npy(lambda v: v[1:]), r"depth in .*val/depth/0.npy should be of shape \(12, 16, 1\); got"),
    ("mtan", "val/image/0.npy", npy(lambda v: v.transpose(2, 0, 1)), r"image in .* be of shape \(12, 16, 3\); got shape"),
    ("mtan", "train/label/2.npy", npy(lambda v: v.T), r"label in .*train/label/2.npy should be of shape \(12, 16\)"),
    ("mtan", "val/depth/0.npy", npy(lambda v: v.astype("u2")), r"depth in .*be floating-point numbers; got dtype uint16"),
    ("mtan", "val/image/0.npy", npy(lambda v: v.astype("u1")), r"image in .*be floating-point numbers; got dtype uint8"),
    ("mtan", "val/label/0.npy", npy(lambda v: v.astype(str)), r"label in .*should be numbers; got dtype <U"),
    ("mtan", "val/label/1.npy", npy(put((3, 4), 13)), LATER + r"label in .*val/label/1.npy should be one of the classes 0 to"),
    ("mtan", "val/label/1.npy", npy(put((3, 4), 255)), LATER + r"label in .*; got 255.0 \(1 pixels\)"),
    ("mtan", "val/label/1.npy", npy(put((3, 4), 1.5)), LATER + r"label in .*; got 1.5"),
    ("mtan", "val/image/1.npy", npy(lambda v: v * 255), LATER + r"image in .*be within \[0, 1\].*Divide it by 255"),
    ("mtan", "train/image/2.npy", npy(put(0, np.nan)), LATER + r"image in .*image/2.npy should be within \[0, 1\]; got nan"),
    ("mtan", "train/depth/2.npy", npy(lambda v: v * 1000), LATER + r"depth in .*train/depth/2.npy should be meters"),
    ("mtan", "train/depth/2.npy", npy(put(0, np.inf)), LATER + r"depth in .*train/depth/2.npy should be meters"),
    ("mtan", "train/normal/0.npy", npy(lambda v: v * 127), LATER + r"normal in .*be unit vectors.*; got length up to 127"),
    # The parquet shards.
    ("huggingface", "data/train-00001-of-00002.parquet", Path.unlink, r"should have 2 shards of train; train-00001-of-00002"),
    ("huggingface", SHARD, Path.unlink, r"should have parquet shards of test; found none"),
    ("huggingface", SHARD, cut, r"the file in .*val-00000-of-00001.parquet should be a parquet table; got .*fetch the file"),
    ("huggingface", SHARD, lambda file: file.write_bytes(b""), r"the file in .*parquet should be a parquet table"),
    ("huggingface", SHARD, table("depth"), r"depth in .*parquet should be a column; got only image, segmentation, normal"),
    ("huggingface", SHARD, table("segmentation", lambda rows: [row[0] for row in rows]), r"segmentation in .*nested 2 deep"),
    ("huggingface", SHARD, table("image", kind=pa.list_(pa.list_(pa.list_(pa.string()))), change=lambda rows: [[[["a"]]]] * 2),
     r"image in .*should be floating-point numbers; got string"),
    ("huggingface", SHARD, table("segmentation", deep(13), LIST2), LATER + r"label in .*at row 1 of group 0 should be one of"),
    ("huggingface", SHARD, table("depth", deep(-2.0), LIST3), LATER + r"depth in .*at row 1 of group 0 should be meters"),
    ("huggingface", SHARD, table("image", deep(2.0), LIST3), LATER + r"image in .*at row 1 of group 0 should be within \[0"),
    ("huggingface", SHARD, table("normal", ragged, LIST3), LATER + r"normal in .*at row 1 .*should be lists of equal length"),
    ("huggingface", SHARD, table("depth", deep(None), LIST3), LATER + r"depth in .*at row 1 of group 0 .* be without nulls"),
    ("huggingface", SHARD, table("normal", lambda rows: [row[:2] for row in rows], LIST3),
     LATER + r"normal in .*at row 0 of group 0 should be of shape \(3, 12, 16\); got shape \(2, 12, 16\)"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "name", "harm", "message"), CASES)
def test_the_error_before_training_names_what_is_wrong(
    form: str, name: str, harm: Harm, message: str, whole: Path, tmp_path: Path, quiet_trainer: Callable[..., L.Trainer]
) -> None:
    root = tmp_path / form
    shutil.copytree(whole / form, root)
    harm(root / name)
    expected = message.removeprefix(LATER)
    with pytest.raises((ValueError, FileNotFoundError), match=expected) as error:
        quiet_trainer().fit(Untrained(), datamodule=NYUv2(root, val_share=0))
    assert str(error.value).startswith("NYUv2: ")
    assert type(error.value) in (ValueError, FileNotFoundError)  # ours, not one that derives from them
    if message == expected:
        with pytest.raises(type(error.value), match=expected):
            find_source(root, form if name != DATA or harm is not Path.unlink else None)
    else:
        find_source(root)


def test_damage_in_the_middle_of_the_hdf5_file_is_named(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "official"
    shutil.copytree(whole / "official", root)
    with h5py.File(root / DATA) as opened:
        place = opened["depths"].id.get_chunk_info(3)
    content = bytearray((root / DATA).read_bytes())
    # The chunk's address counts from the end of MATLAB's header in some versions of the library, from the start in others.
    for start in (place.byte_offset, place.byte_offset + 512):
        content[start : start + place.size] = bytes(place.size)
    (root / DATA).write_bytes(content)
    with pytest.raises(ValueError, match=r"depths\[3\] in .* should be readable; got .* fetch the file again"):
        NYUv2(root).prepare_data()


def test_the_format_of_a_folder_is_detected_and_reported(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for form, words in (
        ("official", "official .mat"),
        ("mtan", "MTAN folder"),
        ("huggingface", "Hugging Face parquet"),
    ):
        assert find_form(whole / form) == form
        with caplog.at_level("INFO"):
            NYUv2(whole / form, val_share=0).setup()
        assert f"is in the {words} format: 3 train and 2 test images of 12 x 16. Each image is read" in caplog.text


def test_the_error_for_an_unknown_folder_lists_the_expected_files(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root should be a folder; .*no such folder: .*nowhere"):
        find_form(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"root should contain nyu_depth_v2_labeled.mat .*; .* contains none of them.$"
    ):
        find_form(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Its folder huggingface does: root=.*/huggingface$"):
        find_form(whole)


def test_a_folder_with_two_formats_is_an_error(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "mtan", tmp_path, dirs_exist_ok=True)
    shutil.copytree(whole / "official", tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"contains official, mtan. Choose one with form="):
        NYUv2(tmp_path).setup()
    assert find_source(tmp_path, "mtan").form == "MTAN folder"
    with pytest.raises(
        ValueError, match=r"form should be one of official, mtan, huggingface; got 'mtn': did you mean 'mtan'"
    ):
        find_source(tmp_path, "mtn")


@pytest.mark.parametrize(
    ("form", "module"), [("official", "h5py"), ("official", "scipy.io"), ("huggingface", "pyarrow")]
)
def test_a_missing_package_is_named_with_its_extra(
    form: str, module: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    importing = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name.split(".")[0] == module.split(".")[0]:
            raise ModuleNotFoundError(name)
        return importing(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        ModuleNotFoundError,
        match=rf"needs {module.split('.')[0]}, which is not installed\. .*'lightning-gradnorm\[nyuv2\]'",
    ):
        find_source(whole / form)
    find_source(whole / "mtan")
