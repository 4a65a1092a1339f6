"""The data module: its splits, its batches, and runs that use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from indoor import SCENES, frames
from nyuv2_writers import write_mtan, write_official
from torch import Tensor, nn

from lightning_gradnorm.experiments.problems.dense.nyuv2 import Augmentations, NYUv2, find_source, prepare
from lightning_gradnorm.experiments.problems.dense.nyuv2.splitting import split_by_scene

SIZE = (12, 16)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nyuv2")
    write_mtan(root / "source", frames(24, size=SIZE), frames(4, first=24, size=SIZE))
    prepare(find_source(root / "source"), root / "prepared", input_size=SIZE, output_size=(6, 8))
    return root / "prepared"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_whole_scenes_are_held_out_and_no_image_is_lost(seed: int, share: float) -> None:
    scenes = [f"scene_{i}" for i in np.random.default_rng(seed).integers(0, 40, size=795)]
    train, val = split_by_scene(795, scenes, share, seed)
    assert sorted([*train, *val]) == list(range(795))
    assert not {scenes[i] for i in train} & {scenes[i] for i in val}
    assert share <= len(val) / 795 < share + 0.05
    again, other = split_by_scene(795, scenes, share, seed)[1], split_by_scene(795, scenes, share, seed + 1)[1]
    assert np.array_equal(val, again)
    assert not np.array_equal(val, other)


def test_where_scenes_are_not_known_ten_in_a_row_are_held_out() -> None:
    train, val = split_by_scene(795, None, 0.1, seed=0)
    assert sorted([*train, *val]) == list(range(795))
    assert not {i // 10 for i in train} & {i // 10 for i in val}
    assert 80 <= len(val) < 90


def test_nothing_is_held_out_at_zero_and_something_always_stays() -> None:
    train, val = split_by_scene(30, None, 0, seed=0)
    assert (len(train), len(val)) == (30, 0)
    with pytest.raises(
        ValueError, match=r"val_share should leave training images, .*0.1 of 8 images in 1 scene leaves none"
    ):
        split_by_scene(8, None, 0.1, seed=0)


def test_the_scenes_of_the_official_form_are_used(tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="needs the extra [nyuv2]")
    pytest.importorskip("scipy", reason="needs the extra [nyuv2]")
    write_official(tmp_path / "source", frames(7, size=SIZE), frames(2, size=SIZE), [*SCENES, "other_1", "other_2"])
    prepare(find_source(tmp_path / "source"), tmp_path / "prepared")
    for root in (tmp_path / "source", tmp_path / "prepared"):
        data = NYUv2(root, val_share=0.2, check=False)
        data.setup()
        held = {SCENES[i] for i in data.val_data.indices}
        assert not held & {SCENES[i] for i in data.train_data.indices}
        assert len(data.val_data) + len(data.train_data) == 7
        assert len(data.val_data) >= 2
        assert len(data.test_data) == 2


class Net(L.LightningModule):
    """Records its training batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)
        self.seen: list[bytes] = []
        self.epoch_of: list[int] = []
        self.validated = self.tested = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        self.seen.append(images.numpy().tobytes())
        self.epoch_of.append(self.current_epoch)
        return self.layer(images).mean() + 0 * targets["depth"].mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += len(batch[0])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.tested += len(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("augmented", [False, True])
def test_a_run_sees_the_same_batches_with_any_number_of_workers(
    augmented: bool, prepared: Path, quiet_trainer: Callable[..., L.Trainer]
) -> None:
    nets = []
    for workers in (0, 2):
        augmentations = Augmentations(flip=0.5, scales=(1.0, 1.2, 1.5)) if augmented else None
        data = NYUv2(prepared, batch_size=4, augmentations=augmentations, num_workers=workers, val_share=0.1)
        trainer, net = quiet_trainer(max_epochs=2), Net()
        trainer.fit(net, datamodule=data)
        trainer.test(net, datamodule=data, verbose=False)
        nets.append(net)
    one, other = nets
    assert one.seen == other.seen
    assert (one.validated, one.tested) == (2 * 4, 4)
    assert one.epoch_of == [0] * 5 + [1] * 5


def test_epochs_differ_in_order_and_in_augmentation(prepared: Path, quiet_trainer: Callable[..., L.Trainer]) -> None:
    """Batches of one image, so an image's bytes identify its augmentation."""
    nets = {}
    for augmentations in (None, Augmentations(scales=(1.5,))):
        data = NYUv2(prepared, batch_size=1, augmentations=augmentations, val_share=0)
        nets[augmentations] = net = Net()
        quiet_trainer(max_epochs=2).fit(net, datamodule=data)
        assert net.validated == 0
        first, second = net.seen[:24], net.seen[24:]
        assert first != second
        assert len(set(first)) == len(set(second)) == 24
        common = set(first) & set(second)
        assert len(common) == (24 if augmentations is None else 0)


def test_an_interrupted_run_continues_with_the_same_augmented_batches(
    prepared: Path, tmp_path: Path, quiet_trainer: Callable[..., L.Trainer]
) -> None:
    def data() -> NYUv2:
        return NYUv2(prepared, batch_size=4, augmentations=Augmentations(scales=(1.2, 1.5)), val_share=0)

    whole, begun, resumed = Net(), Net(), Net()
    quiet_trainer(max_epochs=2).fit(whole, datamodule=data())
    stopped = quiet_trainer(max_steps=8)
    stopped.fit(begun, datamodule=data())
    stopped.save_checkpoint(tmp_path / "begun.ckpt")
    quiet_trainer(max_epochs=2).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "begun.ckpt")
    assert len(whole.seen) == 12
    assert begun.seen + resumed.seen == whole.seen


def test_only_requested_tasks_are_returned(prepared: Path) -> None:
    data = NYUv2(prepared, tasks=("normals", "depth"), batch_size=3, val_share=0)
    data.setup()
    images, targets = next(iter(data.test_dataloader()))
    assert images.shape == (3, 3, *SIZE)
    assert {task: target.shape for task, target in targets.items()} == {"normals": (3, 3, 6, 8), "depth": (3, 1, 6, 8)}
    image, one = data.test_data[2]
    assert torch.equal(image, images[2])
    assert torch.equal(one["depth"], targets["depth"][2])


def test_nothing_of_the_data_is_read_to_open_them(prepared: Path) -> None:
    data = NYUv2(prepared, val_share=0)
    data.setup()
    arrays = data.stored.arrays("train", 0)
    assert all(isinstance(array, np.memmap) for array in arrays.values())
    with pytest.raises(ValueError, match="read-only"):
        arrays["depth"][0, 0] = 1


def test_training_draws_nothing_from_the_global_generator(prepared: Path) -> None:
    data = NYUv2(prepared, augmentations=Augmentations(flip=0.5), val_share=0.2)
    data.setup()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_sizes_other_than_the_prepared_ones_are_an_error(prepared: Path) -> None:
    NYUv2(prepared, input_size=SIZE, output_size=[6, 8], val_share=0).setup()
    with pytest.raises(
        ValueError, match=r"output_size should be \(6, 8\), for which the data in .* were prepared; got \(8, 8\)"
    ):
        NYUv2(prepared, output_size=(8, 8)).setup()


def test_keypoints_that_are_not_there_are_refused(prepared: Path) -> None:
    with pytest.raises(
        ValueError, match=r"tasks should be of segmentation, depth, normals, which the data in .* have; got keyp"
    ):
        NYUv2(prepared, tasks=("depth", "keypoints")).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("depht",)}, "tasks should be of segmentation, .*; got 'depht': did you mean 'depth'"),
        ({"tasks": ()}, r"tasks should be different ones, at least one; got \[\]"),
        ({"tasks": ("depth", "depth")}, "tasks should be different ones"),
        ({"val_share": 1.0}, "val_share should be at least 0 and less than 1; got 1.0"),
        ({"input_size": (320,)}, r"input_size should be height and width, two positive integers; got \(320,\)"),
        ({"output_size": (80, 0)}, r"output_size should be height and width, two positive integers; got \(80, 0\)"),
        ({"output_size": (80.0, 80)}, r"output_size should be height and width"),
        ({"batch_size": 0}, "batch_size should be at least 1; got 0"),
    ],
)
def test_wrong_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"NYUv2: {message}"):
        NYUv2("anywhere", **options)
