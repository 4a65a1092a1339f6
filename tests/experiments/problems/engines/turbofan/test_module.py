"""The simulated engines as a data module: written once and atomically, and useful for learning."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradnorm import MultiTaskModule, Task
from lightning_gradnorm.experiments.problems.engines.cmapss import CMAPSS, Windows
from lightning_gradnorm.experiments.problems.engines.turbofan import TurbofanDataModule, files, module, write_turbofan


def engines(folder: Path, **options: Any) -> TurbofanDataModule:
    made = TurbofanDataModule(**{"engines": 5, "test_engines": 4, "folder": folder, **options})
    made.setup()
    return made


def everything(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = windows.__getitems__(range(len(windows)))
    return inputs.numpy().reshape(len(inputs), -1).astype(np.float64), targets["rul"][:, 0].numpy()


@pytest.mark.filterwarnings("ignore:CMAPSS. .* should be NASA's")
@pytest.mark.parametrize("subset", ["FD001", "FD002"])
def test_it_returns_what_cmapss_reads_from_its_files(subset: str, tmp_path: Path) -> None:
    made = engines(tmp_path, subset=subset)
    read = CMAPSS(made.root, subset=subset)
    read.setup()
    for one, other in (
        (made.train_data, read.train_data),
        (made.val_data, read.val_data),
        (made.test_data, read.test_data),
    ):
        inputs, targets = one.__getitems__(range(len(one)))
        expected, expected_targets = other.__getitems__(range(len(other)))
        assert torch.equal(inputs, expected)
        assert all(torch.equal(targets[task], expected_targets[task]) for task in ("rul", "health"))
    assert (made.input_dim, made.window, len(made.test_data)) == ({"FD001": 14, "FD002": 20}[subset], 30, 4)


def test_by_default_there_are_as_many_engines_as_nasa_has() -> None:
    made = [TurbofanDataModule(subset) for subset in ("FD001", "FD002", "FD003", "FD004")]
    assert [(data.engines, data.test_engines) for data in made] == [(100, 100), (260, 259), (100, 100), (249, 248)]


def test_files_are_written_once_for_each_subset_number_and_seed(tmp_path: Path) -> None:
    first = engines(tmp_path)
    marked = first.root / "train_FD001.txt"
    before = marked.stat().st_mtime_ns
    assert engines(tmp_path).root == first.root
    assert marked.stat().st_mtime_ns == before
    others = [
        engines(tmp_path, **change).root
        for change in ({"seed": 1}, {"engines": 6}, {"test_engines": 5}, {"subset": "FD003"})
    ]
    assert len({first.root, *others}) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(root.name for root in (first.root, *others))


def test_without_a_folder_they_are_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engines(None).root.parent == tmp_path / "lightning_gradnorm" / "turbofan"  # type: ignore[arg-type]


def test_files_are_never_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_gradnorm.experiments.problems.engines.turbofan.files as files

    write, written = files._write, []

    def full(file: Path, *rest: Any) -> None:
        write(file, *rest)
        written.append(file)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        engines(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(files, "_write", write)
    assert len(engines(tmp_path).test_data) == 4


def test_several_that_write_at_once_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, write_file = threading.Barrier(4), files._write

    def write_together(*args: Any) -> None:
        at_once.wait()  # who looked when another is done would find the folder there
        write_file(*args)

    with monkeypatch.context() as patched, ThreadPoolExecutor(4) as pool:
        patched.setattr(files, "_write", write_together)
        made = list(pool.map(lambda _: write_turbofan(tmp_path / "made", "FD001", 3, 3), range(4)))
    alone = write_turbofan(tmp_path / "alone", "FD001", 3, 3)
    assert set(made) == {tmp_path / "made"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "made"]
    for file in alone.iterdir():
        assert (tmp_path / "made" / file.name).read_bytes() == file.read_bytes()


def test_files_that_another_process_finishes_just_before_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(folder: Path, *args: Any) -> Path:
        write_turbofan(folder, *args)  # the other one's
        return write_turbofan(folder, *args)

    monkeypatch.setattr(module, "write_turbofan", too_late)
    assert len(engines(tmp_path).test_data) == 4


def test_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "nasa").mkdir()
    (tmp_path / "nasa" / "train_FD001.txt").write_text("real")
    with pytest.raises(FileExistsError, match=r"folder should not exist yet, or be empty; .*/nasa is neither"):
        write_turbofan(tmp_path / "nasa", "FD001", 2, 2)
    assert (tmp_path / "nasa" / "train_FD001.txt").read_text() == "real"
    (tmp_path / "empty").mkdir()
    assert len(list(write_turbofan(tmp_path / "empty", "FD001", 2, 2).iterdir())) == 3


def test_global_random_numbers_are_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(engines(tmp_path).train_dataloader())
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_a_trainer_trains_on_it(tmp_path: Path, quiet_trainer: Callable[..., L.Trainer]) -> None:
    net = MultiTaskModule(
        encoder=nn.Sequential(nn.Flatten(), nn.Linear(30 * 14, 16), nn.ReLU()),
        tasks={"rul": Task(nn.Linear(16, 1), nn.MSELoss()), "health": Task(nn.Linear(16, 3), nn.CrossEntropyLoss())},
    )
    trainer = quiet_trainer()
    trainer.fit(net, TurbofanDataModule(engines=4, test_engines=2, folder=tmp_path))
    assert trainer.global_step >= 2


def ridge(data: TurbofanDataModule, penalty: float = 30.0) -> float:
    """Root mean square error of ridge regression on the test engines, in cycles."""
    x, y = everything(data.train_data)
    middle, mean = x.mean(axis=0), y.mean()
    x = x - middle
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (y - mean))
    test, left = everything(data.test_data)
    predicted = np.clip((test - middle) @ weights + mean, 0, 125)
    return float(np.sqrt(((predicted - left) ** 2).mean()))


@pytest.mark.parametrize("subset", ["FD001", "FD002", "FD003", "FD004"])
def test_remaining_life_can_be_learned_but_not_exactly(subset: str, tmp_path: Path) -> None:
    data = engines(tmp_path, subset=subset, engines=60, test_engines=60)
    _, left = everything(data.test_data)
    assert left.std() > 30
    assert 12 < ridge(data) < 20
    health = data.train_data.targets["health"]
    shares = torch.bincount(health) / len(health)
    assert ((shares > 0.12) & (shares < 0.65)).all()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"engines": 0}, ValueError, "engines should be at least 1; got 0"),
        ({"test_engines": 2.5}, TypeError, "test_engines should be an integer; got 2.5"),
        ({"subset": "FD1"}, ValueError, "subset should be one of 'FD001'"),
        ({"cap": -1}, ValueError, "cap should be a positive number"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"TurbofanDataModule: {message}"):
        TurbofanDataModule(**options)


def test_a_window_longer_than_the_shortest_record_names_the_unit(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unit \d+ in .*/test_FD001.txt should have at least as many cycles as a window, 120"
    ):
        engines(tmp_path, window=120, test_engines=20)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(PermissionError, match=r"folder should be writable; .* is not. Choose another"):
        engines(tmp_path)
