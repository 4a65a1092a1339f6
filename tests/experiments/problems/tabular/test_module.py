"""A table's batches: each row in one split, statistics of the training rows only, no task if its target is missing."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor

from lightning_gradnorm import GradNorm, MultiTaskModule
from lightning_gradnorm.experiments.loading import TaskTensors
from lightning_gradnorm.experiments.problems.small import MLP
from lightning_gradnorm.experiments.problems.tabular import TabularDataModule, tabular_tasks

pd = pytest.importorskip("pandas")

ROWS = 200
SPLITS = ("train", "val", "test")


def frame(rows: int = ROWS, seed: int = 0) -> Any:
    """Inputs x, y, z of different scales, a row number, targets a and b far from zero."""
    x = np.random.default_rng(seed).normal(size=(rows, 3)) * [1, 50, 0.01] + [0, 900, 5]
    return pd.DataFrame(
        {"x": x[:, 0], "y": x[:, 1], "z": x[:, 2], "row": np.arange(rows), "a": x[:, 0] + 7, "b": 3 * x[:, 1]}
    )


def write(folder: Path, table: Any) -> Path:
    table.to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def module(folder: Path, table: Any, **options: Any) -> TabularDataModule:
    data = TabularDataModule(write(folder, table), **{"targets": ["a", "b"], **options})
    data.setup()
    return data


def split(data: TabularDataModule, name: str) -> TaskTensors:
    found: TaskTensors = getattr(data, f"{name}_data")
    return found


def everything(data: TabularDataModule, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    return split(data, name).inputs, split(data, name).targets


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("val", "test"), [(0.15, 0.15), (0.0, 0.3), (0.6, 0.2)])
def test_every_row_is_in_one_split_and_the_splits_have_their_shares(
    val: float, test: float, seed: int, tmp_path: Path
) -> None:
    data = module(tmp_path, frame(), val_fraction=val, test_fraction=test, seed=seed)
    assert sorted(np.concatenate([data.rows[one] for one in SPLITS])) == list(range(ROWS))
    assert {one: len(data.rows[one]) for one in SPLITS} == {
        "train": round(ROWS * (1 - val - test)),
        "val": round(ROWS * val),
        "test": round(ROWS * test),
    }
    for one in SPLITS:
        assert split(data, one).targets["a"].flatten().tolist() == pytest.approx(frame()["a"][data.rows[one]].tolist())


def test_another_seed_draws_other_splits_and_the_same_seed_the_same(tmp_path: Path) -> None:
    drawn = [tuple(module(tmp_path, frame(), seed=seed).rows["test"]) for seed in (0, 1, 2, 0)]
    assert len(set(drawn)) == 3
    assert drawn[0] == drawn[3]


@pytest.mark.parametrize("kind", ["numbers", "texts"])
@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_in_two_splits(seed: int, kind: str, tmp_path: Path) -> None:
    table = frame()
    subject = np.random.default_rng(seed).integers(0, 17, ROWS)
    table["subject"] = subject if kind == "numbers" else [f"patient {one}" for one in subject]
    data = module(tmp_path, table, group="subject", seed=seed)
    assert "subject" not in data.input_names
    seen = {one: set(subject[data.rows[one]]) for one in SPLITS}
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == len(set(subject))
    for one in ("val", "test"):
        assert abs(len(data.rows[one]) - 0.15 * ROWS) <= np.bincount(subject).max() / 2


@pytest.mark.parametrize("seed", range(5))
def test_rows_with_the_same_inputs_are_in_one_split(seed: int, tmp_path: Path) -> None:
    table = frame()
    table.loc[100:, ["x", "y", "z"]] = table.loc[:99, ["x", "y", "z"]].to_numpy()  # the targets stay different
    data = module(tmp_path, table, inputs=["x", "y", "z"], seed=seed)
    for one in SPLITS:
        assert set(data.rows[one]) == {(row + 100) % 200 for row in data.rows[one]}


@pytest.mark.parametrize("standardize", [False, True])
def test_statistics_come_from_the_training_rows(standardize: bool, tmp_path: Path) -> None:
    table = frame()
    data = module(tmp_path, table, standardize_targets=standardize)
    assert data.input_names == ("x", "y", "z", "row")
    train = table.iloc[data.rows["train"]]
    for one in SPLITS:
        own = table.iloc[data.rows[one]]
        inputs, targets = everything(data, one)
        assert inputs.dtype == targets["a"].dtype == torch.float32
        expected = (own - train.mean()) / train.std(ddof=0)
        assert np.abs(inputs.numpy() - expected[list(data.input_names)]).to_numpy().max() < 1e-5
        for task in ("a", "b"):
            wanted = (expected if standardize else own)[task]
            assert np.abs(targets[task][:, 0].numpy() - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())
    for task in ("a", "b"):
        found = (train[task].mean(), 1.0) if not standardize else (0.0, train[task].std(ddof=0))
        assert data.scales[task] == pytest.approx(found)


@pytest.mark.parametrize("missing", ["error", "mean"])
@pytest.mark.parametrize("changed", SPLITS)
def test_training_data_only_depends_on_training_rows(changed: str, missing: str, tmp_path: Path) -> None:
    table = frame()
    if missing == "mean":
        table.loc[::7, "y"] = np.nan
    before = module(tmp_path, table, standardize_targets=True, missing=missing)
    inputs, targets = everything(before, "train")
    rows = before.rows[changed]
    other = table.copy()
    for column in ("x", "y", "z", "a", "b"):
        other[column] = other[column].astype(float)
        other.loc[rows, column] = other.loc[rows, column] * 1.5 + 7
    after = module(tmp_path, other, standardize_targets=True, missing=missing)
    assert all((before.rows[one] == after.rows[one]).all() for one in SPLITS)
    assert (after.scales == before.scales) == (changed != "train")
    same = all(torch.equal(everything(after, "train")[1][task], targets[task]) for task in targets)
    if (
        changed == "train"
    ):  # an affine change of all training rows is standardized away; of the others' inputs it is seen
        assert not torch.equal(everything(after, "val")[0], everything(before, "val")[0])
    else:
        assert same
        assert torch.equal(everything(after, "train")[0], inputs)
        assert not torch.equal(everything(after, changed)[0], everything(before, changed)[0])


def test_missing_inputs_are_an_error_are_dropped_or_get_the_training_mean(tmp_path: Path) -> None:
    table = frame()
    table.loc[[3, 5], "x"] = np.nan
    table.loc[[5, 8, 9], "z"] = np.nan
    with pytest.raises(
        ValueError, match=r"no missing values; got 3 in 'z', 2 in 'x', the first in row 4\. Use missing=d"
    ):
        module(tmp_path, table)
    dropped = module(tmp_path, table, missing="drop")
    assert sorted(np.concatenate(list(dropped.rows.values()))) == [i for i in range(ROWS) if i not in (3, 5, 8, 9)]
    filled = module(tmp_path, table, missing="mean")
    assert sorted(np.concatenate(list(filled.rows.values()))) == list(range(ROWS))
    train = table.iloc[filled.rows["train"]]
    for one in SPLITS:
        expected = (table.iloc[filled.rows[one]] - train.mean()) / train.std(ddof=0)
        inputs = split(filled, one).inputs.numpy()
        assert np.abs(inputs - expected[list(filled.input_names)].fillna(0).to_numpy()).max() < 1e-5


def test_a_missing_target_is_an_absent_task(tmp_path: Path) -> None:
    table = frame()
    table.loc[table.index % 4 != 0, "b"] = np.nan
    table.loc[[0, 1], ["a", "b"]] = np.nan
    data = module(tmp_path, table, batch_size=3)
    assert sorted(np.concatenate(list(data.rows.values()))) == list(range(2, ROWS))  # without any target: of no use
    data.train_dataloader().sampler.set_epoch(0)
    kinds = set()
    for _, targets in data.train_dataloader():
        assert {"a"} <= set(targets) <= {"a", "b"}
        if "b" in targets:
            assert not targets["b"].isnan().all()
        kinds.add("b" in targets)
    assert kinds == {True, False}
    known = table.loc[data.rows["train"], "b"]
    assert data.scales["b"][0] == pytest.approx(known.mean())


def test_on_several_ranks_every_batch_has_all_tasks(tmp_path: Path) -> None:
    """A rank that lacked a task's gradient or metric would make the others wait for it forever."""
    table = frame()
    table.loc[table.index % 4 != 0, "b"] = np.nan
    data = module(tmp_path, table, batch_size=3)
    alone = [set(targets) for _, targets in data.val_dataloader()]
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 1})  # type: ignore[assignment]
    shared = [targets for _, targets in data.val_dataloader()]
    assert {"a"} in alone
    assert all(set(targets) == {"a", "b"} for targets in shared)
    assert any(targets["b"].isnan().all() for targets in shared)
    data.trainer = None
    assert [set(targets) for _, targets in data.val_dataloader()] == alone


def test_other_columns_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = frame()
    table["city"] = "Rome"
    table["when"] = pd.date_range("2020-01-01", periods=ROWS)
    table["same"] = 4.0
    table["empty"] = np.nan
    table["sure"] = table["x"] > 0
    table.insert(0, "", np.arange(ROWS))
    with caplog.at_level(logging.INFO):
        data = module(tmp_path, table, ignore=["row"], missing="mean")
    assert data.input_names == ("x", "y", "z", "sure")
    told = caplog.text
    assert "table.csv: 140 training, 30 validation, 30 test rows; 4 inputs, 2 targets" in told
    assert "columns left out because they are not numeric: 'city', 'when'" in told
    assert "columns left out because they are constant in the training rows: 'same', 'empty'" in told
    assert "columns left out because they have no name: 1" in told
    assert "filled missing inputs in 200 rows with the training rows' mean: 200 in 'empty'" in told


def test_columns_without_names_are_chosen_by_number(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(f"{i} {i * i % 13} {7 * i % 11} {-i}" for i in range(40)))
    data = TabularDataModule(tmp_path / "t.txt", targets=[3, 1])
    data.setup()
    assert (data.tasks, data.input_names) == (("3", "1"), ("0", "2"))
    assert data.train_data.targets["3"].flatten().tolist() == [-row for row in data.rows["train"]]


def test_tasks_are_called_like_their_columns_as_far_as_torch_allows(tmp_path: Path) -> None:
    table = frame().rename(columns={"a": "PM2.5", "b": "type"}).assign(**{"km/h": 2.0 * np.arange(ROWS)})
    data = module(tmp_path, table, targets=["PM2.5", "type", "km/h"])
    assert data.tasks == ("PM2_5", "type_", "km_h")
    network = MultiTaskModule(MLP(data.input_dim, [4]), tabular_tasks(4, data.scales))
    assert list(network(torch.zeros(2, data.input_dim))) == list(data.tasks)
    with pytest.raises(ValueError, match=r"target 'a.b' should have a unique task name; got 'a_b' twice"):
        TabularDataModule("t.csv", targets=["a.b", "a_b"])


def test_a_table_that_changes_is_read_again(tmp_path: Path) -> None:
    first = module(tmp_path, frame())
    second = module(tmp_path, frame(seed=1))
    assert first.scales != second.scales
    assert TabularDataModule(tmp_path / "table.csv", ["a", "b"]).scales == second.scales
    assert first.scales == first.scales


@pytest.mark.parametrize("step", [4, 7, 10])
def test_a_run_resumed_within_an_epoch_is_bit_identical(quiet_trainer: Any, tmp_path: Path, step: int) -> None:
    table = frame()
    table.loc[::2, "b"] = np.nan
    file = write(tmp_path, table)

    def run(**options: Any) -> dict[str, Tensor]:
        save = LambdaCallback(
            on_train_batch_end=lambda trainer, *_: trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
        )
        data = TabularDataModule(file, ["a", "b"], batch_size=20)  # seven batches
        torch.manual_seed(0)
        network = MultiTaskModule(MLP(data.input_dim, [8]), tabular_tasks(8, data.scales, hidden=[4]))
        quiet_trainer(max_epochs=2, callbacks=[GradNorm(), save]).fit(network, data, **options)
        return network.state_dict()

    whole = run()
    resumed = run(ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
