"""Every format of the data yields the same rooms."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from indoor import SCENES, SIZE, frames, same
from nyuv2_writers import write_huggingface, write_mtan, write_official

from lightning_gradnorm.experiments.problems.dense.nyuv2 import (
    Frame,
    Intrinsics,
    NYUv2,
    find_source,
    normals_from_depth,
    prepare,
)
from lightning_gradnorm.experiments.problems.dense.nyuv2.source import FORMS

h5py = pytest.importorskip("h5py", reason="needs the extra [nyuv2]")
scipy_io = pytest.importorskip("scipy.io", reason="needs the extra [nyuv2]")
pa = pytest.importorskip("pyarrow", reason="needs the extra [nyuv2]")

TRAIN, TEST = frames(4), frames(3, first=4)
INPUT, OUTPUT = (24, 40), (12, 16)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By form, a folder with the same rooms."""
    root = tmp_path_factory.mktemp("nyuv2")
    write_official(root / "official", TRAIN, TEST, SCENES)
    write_mtan(root / "mtan", TRAIN, TEST)
    write_huggingface(root / "huggingface", TRAIN, TEST, rows_per_shard=3, rows_per_group=2)
    return {form: root / form for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_a_source_reads_the_written_samples(form: str, roots: dict[str, Path]) -> None:
    source = find_source(roots[form])
    assert source.size == SIZE
    for split, written in (("train", TRAIN), ("test", TEST)):
        assert source.count(split) == len(written)
        for index, frame in enumerate(written):
            read = source.read(split, index)
            assert np.array_equal(read.image, frame.image)
            assert np.array_equal(read.segmentation, frame.segmentation)
            assert np.array_equal(read.depth, frame.depth)
            assert (read.image.dtype, read.segmentation.dtype, read.depth.dtype) == (np.uint8, np.int8, np.float32)
            if form != "official":
                assert np.abs(read.normals - frame.normals).max() < 1e-7
                assert read.normals.dtype == np.float32


def test_only_the_official_form_knows_scenes(roots: dict[str, Path]) -> None:
    assert find_source(roots["official"]).scenes("train") == SCENES[:4]
    assert find_source(roots["official"]).scenes("test") == SCENES[4:]
    assert find_source(roots["mtan"]).scenes("train") is None
    assert find_source(roots["huggingface"]).scenes("train") is None


def test_the_official_files_are_laid_out_as_matlab_does(roots: dict[str, Path]) -> None:
    """Against the files themselves, not through the reader: reversed shapes, references, indices from one, two mappings."""
    root = roots["official"]
    assert (root / "nyu_depth_v2_labeled.mat").read_bytes()[:10] == b"MATLAB 7.3"
    splits = scipy_io.loadmat(root / "splits.mat")
    assert splits["trainNdxs"].shape == (4, 1)
    assert splits["testNdxs"].shape == (3, 1)
    assert splits["trainNdxs"].ravel().tolist() != [1, 2, 3, 4]
    numbers = [*splits["trainNdxs"].ravel().tolist(), *splits["testNdxs"].ravel().tolist()]
    assert sorted(numbers) == list(range(1, 8))
    to_40 = scipy_io.loadmat(root / "classMapping40.mat")["mapClass"]
    mapping = scipy_io.loadmat(root / "class13Mapping.mat")["classMapping13"][0, 0]
    assert to_40.size == 894
    assert mapping["labels13"].size == 40
    assert [str(name[0]) for name in mapping["classNames"].ravel()][::6] == ["bed", "objects", "window"]
    with h5py.File(root / "nyu_depth_v2_labeled.mat") as file:
        assert file["images"].shape == (7, 3, 64, 48)
        assert file["depths"].shape == file["labels"].shape == (7, 64, 48)
        assert (file["images"].dtype, file["depths"].dtype, file["labels"].dtype) == (np.uint8, np.float32, np.uint16)
        for number, frame, scene in zip(numbers, [*TRAIN, *TEST], SCENES, strict=True):
            i = number - 1
            assert np.array_equal(file["images"][i].transpose(2, 1, 0), frame.image.transpose(1, 2, 0))
            assert "".join(chr(c[0]) for c in file[file["scenes"][0, i]]) == scene
            for row, column in ((0, 0), (20, 13), (47, 63)):
                label = int(file["labels"][i].T[row, column])
                known = mapping["labels13"].ravel()[to_40.ravel()[label - 1] - 1] - 1 if label else -1
                assert known == frame.segmentation[row, column]
        assert len(np.unique(file["labels"])) > 400  # many labels mean the same class


def _batches(root: Path, stage: str = "train", **options: object) -> list[tuple]:
    data = NYUv2(root, batch_size=2, val_share=0, check=False, **options)
    data.setup()
    loader = {"train": data.train_dataloader, "test": data.test_dataloader}[stage]()
    return list(loader)


def _equal(one: list[tuple], other: list[tuple], leave_out: tuple[str, ...] = ()) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        torch.equal(a, b) and all(torch.equal(x[task], y[task]) for task in x if task not in leave_out)
        for (a, x), (b, y) in pairs
    )


@pytest.mark.parametrize("sizes", [(None, None), (INPUT, OUTPUT), ((60, 80), (48, 64))])
@pytest.mark.parametrize("stage", ["train", "test"])
def test_all_forms_give_identical_batches(stage: str, sizes: tuple, roots: dict[str, Path], tmp_path: Path) -> None:
    """Of every form, prepared or not. Normals only where they are stored: the official form's come from the depth."""
    batches = {}
    for form, root in roots.items():
        prepare(find_source(root), tmp_path / form, *sizes)
        direct = _batches(root, stage, input_size=sizes[0], output_size=sizes[1])
        batches[form] = _batches(tmp_path / form, stage)
        assert _equal(direct, batches[form])
    assert _equal(batches["mtan"], batches["huggingface"])
    assert _equal(batches["mtan"], batches["official"], leave_out=("normals",))


def test_batches_equal_the_written_samples(roots: dict[str, Path], tmp_path: Path) -> None:
    """At the source's size: exact but for the documented errors of storing depth (1/2048) and normals (0.002 degrees)."""
    prepare(find_source(roots["mtan"]), tmp_path / "prepared")
    data = NYUv2(tmp_path / "prepared", batch_size=3, val_share=0)
    data.setup()
    images, targets = next(iter(data.test_dataloader()))
    assert (images.dtype, targets["segmentation"].dtype) == (torch.float32, torch.int64)
    assert targets["depth"].shape == (3, 1, *SIZE)
    for position, frame in enumerate(TEST):
        assert torch.equal(images[position], torch.from_numpy(frame.image).float() / 255)
        assert np.array_equal(targets["segmentation"][position], frame.segmentation)
        depth = targets["depth"][position, 0].numpy()
        assert np.array_equal(depth == 0, frame.depth == 0)
        assert (np.abs(depth - frame.depth) <= frame.depth / 2048).all()
        normals, wanted = targets["normals"][position].numpy(), frame.normals
        known = (wanted != 0).any(axis=0)
        assert np.array_equal((normals != 0).any(axis=0), known)
        assert np.abs(np.linalg.norm(normals, axis=0)[known] - 1).max() < 1e-6
        # The angle by the cross product: the cosine cannot tell small angles in float32.
        angle = np.degrees(np.arcsin(np.linalg.norm(np.cross(normals, wanted, axis=0), axis=0)))
        assert angle.max() < 0.002


def test_storing_any_normal_turns_it_by_less_than_two_thousandths_of_a_degree() -> None:
    from lightning_gradnorm.experiments.problems.dense.nyuv2.storage_format import compact, expand

    wanted = np.random.default_rng(0).normal(size=(3, 200, 200))
    wanted = (wanted / np.linalg.norm(wanted, axis=0)).astype(np.float32)
    zeros = np.zeros((200, 200), dtype=np.float32)
    depth = np.random.default_rng(1).uniform(0.3, 12, size=(200, 200)).astype(np.float32)
    frame = Frame(np.zeros((3, 200, 200), np.uint8), zeros.astype(np.int8), depth, wanted)
    sample = expand(compact(frame, (200, 200), (200, 200)))
    angle = np.degrees(np.arcsin(np.linalg.norm(np.cross(sample.normals, wanted, axis=0), axis=0)))
    assert 0.0003 < angle.max() < 0.002
    error = np.abs(sample.depth[0] - depth) / depth
    assert 1 / 3000 < error.max() <= 1 / 2048


def test_the_official_forms_normals_are_derived_from_its_depth(roots: dict[str, Path]) -> None:
    source = find_source(roots["official"])
    frame = source.read("train", 0)
    assert isinstance(frame.normals, Intrinsics)
    # fx=518.86, fy=519.47, cx=325.58, cy=253.74 at 640 x 480, where the toolbox counts pixels from one at their centers.
    tenth = [frame.normals.fx, frame.normals.fy, frame.normals.cx, frame.normals.cy]
    assert tenth == pytest.approx([51.886, 51.947, 32.508, 25.324], abs=1e-3)
    _, targets = _batches(roots["official"], "test")[0]
    for normals, frame in zip(targets["normals"], TEST[:2], strict=True):
        derived = normals_from_depth(frame.depth, source.read("test", 0).normals)
        assert np.abs(normals.numpy() - derived).max() < 1e-4
        both = (derived != 0).any(axis=0) & (frame.normals != 0).any(axis=0)
        angles = np.degrees(np.arccos(np.clip((derived * frame.normals).sum(axis=0)[both], -1, 1)))
        # Away from the edges between two surfaces, and where a hole leaves too few neighbors, they are the room's own.
        assert both.mean() > 0.85
        assert np.median(angles) < 0.05
        assert (angles < 1).mean() > 0.8


@pytest.mark.parametrize("options", [{"dtype": np.float64}, {"dtype": np.float32, "flat_depth": True}])
def test_copies_in_the_mtan_format_differ_in_types_but_not_in_content(options: dict, tmp_path: Path) -> None:
    write_mtan(tmp_path, TRAIN[:1], TEST[:1], **options)
    read = find_source(tmp_path).read("test", 0)
    assert np.array_equal(read.image, TEST[0].image)
    assert np.array_equal(read.segmentation, TEST[0].segmentation)
    assert np.array_equal(read.depth, TEST[0].depth)


def test_all_pixel_values_survive_all_types(tmp_path: Path) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0)
    sample = {
        "image": torch.from_numpy(every).float() / 255,
        "segmentation": torch.zeros(16, 16, dtype=torch.int64),
        "depth": torch.ones(1, 16, 16),
        "normals": torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(3, 16, 16),
    }
    writers: dict[str, Callable[..., None]] = {
        "official": write_official,
        "mtan": write_mtan,
        "huggingface": write_huggingface,
    }
    for form, write in writers.items():
        write(tmp_path / form, [sample], [sample])
        assert np.array_equal(find_source(tmp_path / form).read("train", 0).image, every)


def test_shards_as_the_hub_converts_them_are_found(roots: dict[str, Path], tmp_path: Path) -> None:
    shards = sorted((roots["huggingface"] / "data").iterdir())
    assert [shard.name for shard in shards][:2] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    for shard in shards:
        split, number = shard.name.split("-")[:2]
        target = tmp_path / "default" / split / f"{number[1:]}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(shard.read_bytes())
    one, other = find_source(roots["huggingface"]), find_source(tmp_path)
    assert (one.count("train"), one.count("test")) == (other.count("train"), other.count("test"))
    assert np.array_equal(one.read("train", 3).image, other.read("train", 3).image)


@pytest.mark.parametrize(
    ("form", "context"),
    [*((form, "fork") for form in FORMS), pytest.param("official", "spawn", marks=pytest.mark.slow)],
)
def test_worker_processes_read_the_same_as_one_process(form: str, context: str, roots: dict[str, Path]) -> None:
    """Also when files were open before the workers were started, as they are after the check of a run."""
    batches = {}
    for workers in (0, 2):
        data = NYUv2(roots[form], batch_size=1, val_share=0, num_workers=workers, output_size=OUTPUT, check=False)
        data.setup()
        data.stored.arrays("train", 0)
        loader = data.train_dataloader()
        if workers:
            loader.multiprocessing_context = context
        batches[workers] = list(loader)
        data.stored.arrays("train", 0)  # and the first process continues
    assert len(batches[0]) == 4
    assert _equal(batches[0], batches[2])


@pytest.mark.parametrize("form", FORMS)
def test_a_source_can_be_sent_to_another_process(form: str, roots: dict[str, Path]) -> None:
    source = find_source(roots[form])
    before = source.read("test", 1)
    sent = pickle.loads(pickle.dumps(source))
    assert np.array_equal(sent.read("test", 1).image, before.image)
    assert np.array_equal(source.read("test", 1).image, before.image)


def test_arrays_are_the_same_read_in_any_order(roots: dict[str, Path]) -> None:
    for root in roots.values():
        data = NYUv2(root, val_share=0, check=False)
        there = [data.stored.arrays("train", i) for i in (0, 1, 2, 3)]
        back = [data.stored.arrays("train", i) for i in (3, 2, 1, 0)]
        assert all(same(one, other) for one, other in zip(there, reversed(back), strict=True))
