"""The convention of a source's normals is detected from its depth and converted to ours."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from indoor import frame, frames, room
from nyuv2_writers import write_huggingface, write_mtan, write_official

from lightning_gradnorm.experiments.problems.dense.nyuv2 import Frame, NYUv2, Prepared, find_source, prepare
from lightning_gradnorm.experiments.problems.dense.nyuv2.frame import as_normals
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_convention import Convention, compare_with_depth
from lightning_gradnorm.experiments.problems.dense.rooms.render import render

SIZE = (48, 64)
WORDS = (("right", "left"), ("up", "down"), ("towards", "away"))
EVERY = list(itertools.product(itertools.permutations(range(3)), itertools.product((0, 1), repeat=3)))
"""All 48: which axis of ours each channel is, and whether it points the other way."""
PUBLISHED = ((0, 2, 1), (0, 1, 0))
Made = tuple[tuple[int, ...], tuple[int, ...]]


def name(made: Made) -> str:
    return " ".join(WORDS[axis][reverse] for axis, reverse in zip(*made, strict=True))


def turned(one: Frame, made: Made) -> Frame:
    normals = np.stack([one.normals[axis] * (1 - 2 * reverse) for axis, reverse in zip(*made, strict=True)])
    return Frame(one.image, one.segmentation, one.depth, normals)


def rendered(scene: int) -> Frame:
    view = render(seed=0, scene=scene, image_size=(120, 160))
    return Frame(view.image, view.segmentation.astype(np.int8), view.depth[0], view.normals)


def wall(seed: int = 0, size: tuple[int, int] = SIZE) -> Frame:
    """A wall that faces the camera."""
    made = frame(seed, size)
    facing = np.broadcast_to(np.array([0, 0, 1], dtype=np.float32)[:, None, None], (3, *size))
    return Frame(made.image, made.segmentation, np.full(size, 2.0, dtype=np.float32), facing)


def first_batch(root: Path, **options: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    data = NYUv2(root, batch_size=4, val_share=0, check=False, **options)
    data.setup()
    return next(iter(data.test_dataloader()))


@pytest.fixture(scope="module")
def views() -> list[Frame]:
    return [rendered(scene) for scene in range(8)]


@pytest.mark.parametrize("made", EVERY, ids=name)
def test_the_convention_of_rendered_rooms_is_found(made: Made, views: list[Frame]) -> None:
    found = compare_with_depth(turned(view, made) for view in views)
    assert str(found.convention) == name(made)
    assert found.ranking[0][1] < 10
    assert found.ranking[1][1] > 25
    assert len({convention for convention, _ in found.ranking}) == 48


@pytest.mark.slow
def test_any_single_room_gives_the_right_convention_or_none() -> None:
    found = [str(compare_with_depth([turned(rendered(scene), PUBLISHED)]).convention) for scene in range(60)]
    assert set(found) <= {"right away up", "None"}
    assert found.count("right away up") > 40


@pytest.mark.parametrize("scale", [0.001, 0.2, 80])
def test_the_scale_of_the_depth_does_not_matter(scale: float, views: list[Frame]) -> None:
    made = [turned(view, PUBLISHED) for view in views]
    plain = compare_with_depth(made)
    scaled = compare_with_depth(Frame(m.image, m.segmentation, m.depth * np.float32(scale), m.normals) for m in made)
    assert scaled.images == plain.images
    assert [str(one) for one, _ in scaled.ranking[:2]] == [str(one) for one, _ in plain.ranking[:2]]
    assert scaled.ranking[0][1] == pytest.approx(plain.ranking[0][1], abs=0.05)


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_a_part_of_the_image_serves_as_well(share: float, views: list[Frame]) -> None:
    """A crop whose focal length and center differ from the assumed ones."""

    def crop(array: np.ndarray) -> np.ndarray:
        return array[..., : int(120 * share), : int(160 * share)]

    parts = [Frame(*map(crop, (v.image, v.segmentation, v.depth, turned(v, PUBLISHED).normals))) for v in views]
    assert str(compare_with_depth(parts).convention) == "right away up"


def test_the_images_after_one_that_tells_nothing_decide() -> None:
    made = [turned(one, PUBLISHED) for one in (wall(0), wall(1), *frames(6, size=SIZE))]
    found = compare_with_depth(made)
    assert found.images > 2
    assert str(found.convention) == "right away up"


@pytest.mark.parametrize("kind", ["wall", "noise", "few", "nothing"])
def test_an_undetectable_convention_is_unknown(kind: str) -> None:
    draw = np.random.default_rng(0)
    made = []
    for one in frames(4, size=SIZE):
        noise = draw.normal(size=(3, *SIZE))
        unclear = {
            "wall": wall().normals,
            "noise": noise / np.linalg.norm(noise, axis=0),
            "nothing": np.zeros((3, *SIZE)),
        }
        few = one.normals.copy()
        few.reshape(3, -1)[:, np.arange(SIZE[0] * SIZE[1]) % 300 > 0] = 0
        unclear["few"] = few
        made.append(Frame(one.image, one.segmentation, wall().depth if kind == "wall" else one.depth, unclear[kind]))
    found = compare_with_depth(made)
    assert found.convention is None
    assert found.images == 4
    assert ("no pixel of 4 images has both" in str(found)) == (kind == "nothing")


@pytest.mark.parametrize("write", [write_mtan, write_huggingface])
def test_the_channels_are_turned_to_ours_whether_prepared_or_not(
    write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if write is write_huggingface:
        pytest.importorskip("pyarrow", reason="needs the extra [nyuv2]")
    train, test = frames(6), frames(2, first=6)
    write(tmp_path / "ours", train, test)
    write(tmp_path / "theirs", [turned(one, PUBLISHED) for one in train], [turned(one, PUBLISHED) for one in test])
    images, wanted = first_batch(tmp_path / "ours")
    assert wanted["normals"].abs().sum() > 0
    caplog.clear()
    with caplog.at_level("INFO"):
        batches = [
            first_batch(tmp_path / "theirs"),
            first_batch(tmp_path / "theirs", normals_convention="right away up"),
        ]
    said = [line for line in caplog.messages if "channels of the normals" in line]
    assert len(said) == 1
    assert re.search(
        r"normals in .*theirs point right, away, up and are turned to right, up, towards the camera: 'right away up' is \d "
        r"degrees from the normals of the depth on average, the next best, '\w+ \w+ \w+', \d\d, in \d+ pixels of",
        said[0],
    )
    for option in ("auto", "right away up"):
        prepared = prepare(find_source(tmp_path / "theirs"), tmp_path / option, normals_convention=option)
        assert prepared.source["normals"] == "right away up"
        assert json.loads((tmp_path / option / "nyuv2.json").read_text())["source"]["normals"] == "right away up"
        batches += [first_batch(tmp_path / option), first_batch(tmp_path / option, normals_convention="right away up")]
    for one, targets in batches:
        assert torch.equal(one, images)
        assert all(torch.equal(targets[task], wanted[task]) for task in wanted)


def test_an_unknown_convention_causes_a_warning_and_the_normals_do_not_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_mtan(tmp_path / "walls", [turned(wall(i), PUBLISHED) for i in range(3)], [turned(wall(4), PUBLISHED)])
    message = (
        r"channels in .*walls should show in the depth; they do not: '.*' is 0 degrees .* 0, in \d+ pixels of 3 "
        r"images\. The normals stay unchanged\. Set normals_convention, one direction for each channel: right or left"
    )
    with pytest.warns(UserWarning, match=message):
        _, targets = first_batch(tmp_path / "walls")
    assert targets["normals"][0, :, 0, 0].tolist() == [0, -1, 0]
    with pytest.warns(UserWarning, match=message):
        prepared = prepare(find_source(tmp_path / "walls"), tmp_path / "prepared")
    assert prepared.source["normals"] == "unknown"
    caplog.clear()
    with caplog.at_level("INFO"):
        _, targets = first_batch(tmp_path / "prepared")
    assert "The convention of the source's normals: unknown." in caplog.text
    assert targets["normals"][0, :, 0, 0].tolist() == [0, -1, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, targets = first_batch(tmp_path / "walls", normals_convention="right away up")
        assert targets["normals"][0, :, 0, 0].tolist() == [0, 0, 1]
        first_batch(tmp_path / "walls", tasks=("depth",))  # nobody asks for them


def test_a_continued_preparation_turns_the_rest_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_gradnorm.experiments.problems.dense.nyuv2 import mtan, prepared

    write_mtan(tmp_path / "theirs", [turned(one, PUBLISHED) for one in frames(40)], [turned(frame(41), PUBLISHED)])
    prepare(find_source(tmp_path / "theirs"), tmp_path / "undisturbed", output_size=(6, 8))
    read = mtan.MTAN.read

    def stops(self: mtan.MTAN, split: str, index: int) -> Frame:
        if index == 36:
            raise KeyboardInterrupt
        return read(self, split, index)

    monkeypatch.setattr(mtan.MTAN, "read", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare(find_source(tmp_path / "theirs"), tmp_path / "stopped", output_size=(6, 8))
    monkeypatch.setattr(mtan.MTAN, "read", read)
    monkeypatch.setattr(prepared, "compare_with_depth", lambda frames: pytest.fail("compared again"))
    with pytest.raises(ValueError, match=r"source in .*progress.json should be .*left away up.*; got .*right away up"):
        prepare(find_source(tmp_path / "theirs"), tmp_path / "stopped", None, (6, 8), normals_convention="left away up")
    prepare(find_source(tmp_path / "theirs"), tmp_path / "stopped", output_size=(6, 8))
    for file in ("train_normals.npy", "test_normals.npy", "nyuv2.json"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()
    Prepared(tmp_path / "stopped").verify()


@pytest.mark.parametrize(
    "given",
    [
        "",
        "x y z",
        "right up",
        "right up towards away",
        "right left up",
        "right up right",
        "Right Up Away",
        "rihgt up away",
        3,
    ],
)
def test_another_way_to_write_a_convention_is_refused(given: object) -> None:
    expected = (
        "'auto' or one direction for each channel: right or left, up or down, towards .* or away, as 'right away up'"
    )
    with pytest.raises(ValueError, match=f"NYUv2: normals_convention should be {expected}; got {given!r}$"):
        NYUv2("anywhere", normals_convention=given)


@pytest.mark.parametrize("made", EVERY, ids=name)
def test_every_convention_can_be_written_and_is_applied(made: Made) -> None:
    ours = frame(0)
    assert np.array_equal(Convention.parse(name(made)).to_ours(turned(ours, made).normals), ours.normals)


def test_a_convention_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    for package in ("h5py", "scipy"):
        pytest.importorskip(package, reason="needs the extra [nyuv2]")
    write_official(tmp_path / "official", frames(2), frames(2))
    with pytest.raises(
        ValueError, match=r"should be 'auto' for the official .mat format, .* derived from its depth; got 'rig"
    ):
        NYUv2(tmp_path / "official", normals_convention="right away up").setup()
    prepared = prepare(find_source(tmp_path / "official"), tmp_path / "prepared")
    assert prepared.source["normals"] == "derived from the depth"
    prepare(find_source(tmp_path / "official"), tmp_path / "prepared")
    with pytest.raises(
        ValueError,
        match=r"should be 'auto' for prepared data, which record .* were 'derived from the depth'; got 'right away up'. Prep",
    ):
        NYUv2(tmp_path / "prepared", normals_convention="right away up").setup()


LENGTHS = [
    (0.0, False),
    (0.0068, False),
    (0.3, False),
    (0.49, False),
    (0.51, True),
    (0.7071, True),
    (0.98, True),
    (1.02, True),
]


@pytest.mark.parametrize(("length", "known"), LENGTHS)
def test_a_vector_far_too_short_is_unknown(length: float, known: bool) -> None:
    direction = np.array([0.6, -0.64, 0.48])
    read = as_normals((direction * length)[:, None, None], "a file")[:, 0, 0]
    assert read == pytest.approx(direction if known else np.zeros(3), abs=1e-6)


def test_nan_is_unknown_and_spoils_no_other_pixel() -> None:
    _, normals, _ = room(SIZE, 2.0, 1.4, 1.2, 4.0)
    holes = np.random.default_rng(0).uniform(size=SIZE) < 0.3
    for channels in ([0], [0, 1, 2]):
        given = normals.copy()
        for channel in channels:
            given[channel, holes] = np.nan
        assert np.array_equal(as_normals(given, "a file"), np.where(holes, 0, normals))


@pytest.mark.parametrize("center", [127, 128])
def test_8_bit_images_keep_the_known_pixels(center: int) -> None:
    """Unit vectors in all directions, as (n + 1) / 2 in 8 bits, unknown ones in the middle: 127 or 128."""
    draw = np.random.default_rng(1)
    normals = draw.normal(size=(3, 200, 200))
    normals /= np.linalg.norm(normals, axis=0)
    unknown = draw.uniform(size=(200, 200)) < 0.22
    picture = np.where(unknown, center, np.round((normals + 1) / 2 * 255)).astype(np.uint8)
    read = as_normals(picture / 127.5 - 1, "a file")
    assert np.array_equal((read == 0).all(axis=0), unknown)
    assert np.linalg.norm(read - normals, axis=0)[~unknown].max() < 0.01


def test_resizing_between_pixels_leaves_edges_of_walls_known_and_those_of_holes_to_the_larger_part() -> None:
    left, right = np.array([1.0, 0, 0]), np.array([0, 0, 1.0])
    corner = as_normals(np.stack([left, (left + right) / 2, right], axis=1)[:, None], "a file")
    assert (np.abs(corner).sum(axis=0) > 0).all()
    assert corner[:, 0, 1] == pytest.approx(np.array([1, 0, 1]) / np.sqrt(2))
    hole = as_normals(np.stack([left * share for share in (0.25, 0.4, 0.6, 0.75)], axis=1)[:, None], "a file")
    assert hole[0, 0].tolist() == [0, 0, 1, 1]
