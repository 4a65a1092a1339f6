"""The data module returns what the renderer renders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_gradnorm import MultiTaskModule, Task
from lightning_gradnorm.experiments.problems.dense.losses import KeypointLoss
from lightning_gradnorm.experiments.problems.dense.rooms import RoomsDataModule, RoomViews, render

TASKS = ("segmentation", "depth", "normals", "keypoints")
SMALL = {"train_size": 6, "val_size": 3, "test_size": 2, "batch_size": 3}


def rooms(**options: Any) -> RoomsDataModule:
    made = RoomsDataModule(**{"input_size": (24, 32), "output_size": (12, 16), "tasks": TASKS, **SMALL, **options})
    made.setup()
    return made


@pytest.fixture(scope="module")
def data() -> RoomsDataModule:
    return rooms()


def equal(one: Any, other: Any) -> bool:
    (images, targets), (other_images, other_targets) = one, other
    same = all(torch.equal(targets[task], other_targets[task]) for task in targets)
    return torch.equal(images, other_images) and list(targets) == list(other_targets) and same


def test_batches_have_the_shapes_promised(data: RoomsDataModule) -> None:
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [len(loader.dataset) for loader in loaders] == [6, 3, 2]
    for loader, size in zip(loaders, (3, 3, 2), strict=True):
        images, targets = next(iter(loader))
        assert images.shape == (size, 3, 24, 32)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < 0.5 < images.max() <= 1
        assert [(task, target.dtype, *target.shape) for task, target in targets.items()] == [
            ("segmentation", torch.int64, size, 12, 16),
            ("depth", torch.float32, size, 1, 12, 16),
            ("normals", torch.float32, size, 3, 12, 16),
            ("keypoints", torch.float32, size, 48, 3),
        ]


def test_samples_are_the_rooms_with_their_numbers(data: RoomsDataModule) -> None:
    for first, views in enumerate((data.train_data, data.val_data, data.test_data)):
        for sample in range(len(views)):
            view = render(0, 3 * sample + first, (24, 32), (12, 16))
            image, targets = views[sample]
            assert np.array_equal((image * 255).round().byte().numpy(), view.image)
            assert np.array_equal(targets["segmentation"].numpy(), view.segmentation)
            assert np.array_equal(targets["depth"].numpy(), view.depth)
            assert np.array_equal(targets["normals"].numpy(), view.normals)
            assert np.array_equal(targets["keypoints"].numpy(), view.keypoints)


def test_rooms_rendered_on_demand_equal_the_stored_ones(data: RoomsDataModule) -> None:
    late = rooms(in_memory=False)
    for kept, rendered in ((data.train_data, late.train_data), (data.test_data, late.test_data)):
        assert equal(kept[1], rendered[1])
        assert equal(kept.__getitems__([1, 0]), rendered.__getitems__([1, 0]))


def test_batch_size_and_workers_change_no_byte(data: RoomsDataModule) -> None:
    kept = data.val_data.__getitems__(range(3))
    for options in ({"batch_size": 1}, {"batch_size": 2, "num_workers": 2}):
        batches = list(rooms(in_memory=False, **options).val_dataloader())
        images = torch.cat([images for images, _ in batches])
        targets = {task: torch.cat([targets[task] for _, targets in batches]) for task in TASKS}
        assert equal(kept, (images, targets))


def test_no_room_is_in_two_splits_and_sizes_do_not_move_them(data: RoomsDataModule) -> None:
    more = rooms(train_size=9, test_size=1, in_memory=False)
    numbers = [set(views.inputs.tolist()) for views in (more.train_data, more.val_data, more.test_data)]
    assert [len(each) for each in numbers] == [9, 3, 1]
    assert len(set.union(*numbers)) == 13
    assert equal(data.val_data[2], more.val_data[2])
    assert equal(data.train_data[5], more.train_data[5])


def test_another_seed_gives_other_rooms(data: RoomsDataModule) -> None:
    assert not equal(data.val_data[0], rooms(seed=1, in_memory=False).val_data[0])


def test_only_the_tasks_asked_for_are_there() -> None:
    made = rooms(tasks=["keypoints", "depth"], output_size=None)
    assert made.tasks == ("keypoints", "depth")
    _, targets = made.val_data[0]
    assert list(targets) == ["keypoints", "depth"]
    assert targets["depth"].shape == (1, 24, 32)
    assert np.array_equal(targets["keypoints"].numpy(), render(0, 1, (24, 32)).keypoints)


def test_global_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(rooms(in_memory=False).train_dataloader())
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_a_trainer_trains_on_rooms(quiet_trainer: Any) -> None:
    def squares(prediction: Tensor, target: Tensor) -> Tensor:
        return ((prediction - target) ** 2).mean()

    module = MultiTaskModule(
        encoder=nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU()),
        tasks={
            "segmentation": Task(nn.Conv2d(4, 13, 1), nn.CrossEntropyLoss()),
            "depth": Task(nn.Conv2d(4, 1, 1), squares),
            "normals": Task(nn.Conv2d(4, 3, 1), squares),
            "keypoints": Task(nn.Conv2d(4, 48, 1), KeypointLoss()),
        },
    )
    trainer = quiet_trainer()
    trainer.fit(module, RoomsDataModule((24, 32), (12, 16), TASKS, **SMALL))
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["depht"]}, "tasks should be one of .* got 'depht'. Did you mean 'depth'?"),
        ({"tasks": []}, "tasks should name at least one task, and none twice; got \\[\\]"),
        ({"tasks": ["depth", "depth"]}, "tasks should name at least one task, and none twice"),
        ({"input_size": (0, 80)}, "input_size should be at least 1; got 0"),
        ({"train_size": 0}, "train_size should be at least 1; got 0"),
    ],
)
def test_a_wrong_value_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"RoomsDataModule: {message}"):
        RoomsDataModule(**options)


@pytest.mark.parametrize("size", [80, "80x60", (60, 80, 3)])
def test_a_size_that_is_no_pair_is_named(size: Any) -> None:
    with pytest.raises(TypeError, match="RoomsDataModule: output_size should be a height and a width"):
        RoomsDataModule(output_size=size)


def test_views_are_rendered_anew_unless_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = []

    def counted(seed: int, scene: int, *sizes: Any) -> Any:
        rendered.append(scene)
        return render(seed, scene, *sizes)

    monkeypatch.setattr("lightning_gradnorm.experiments.problems.dense.rooms.module.render", counted)
    for in_memory, expected in ((True, [0, 3, 6]), (False, [3, 3, 6])):
        rendered.clear()
        views = RoomViews(0, torch.tensor([0, 3, 6]), (8, 8), (8, 8), in_memory=in_memory)
        views[1], views.__getitems__([1, 2])
        assert rendered == expected
