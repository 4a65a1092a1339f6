"""Real tables, if available: sizes and splits as published, and a network that learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from real_data import real_data

from lightning_gradnorm import GradNorm, MultiTaskModule
from lightning_gradnorm.experiments.problems.small import MLP
from lightning_gradnorm.experiments.problems.tabular import TabularDataModule, read_table, tabular_tasks

pytest.importorskip("pandas")

MULAN = {
    "andro": (49, 30, 6),
    "atp1d": (337, 411, 6),
    "atp7d": (296, 411, 6),
    "edm": (154, 16, 2),
    "enb": (768, 8, 2),
    "jura": (359, 15, 3),
    "oes10": (403, 298, 16),
    "oes97": (334, 263, 16),
    "sf1": (323, 10, 3),
    "sf2": (1066, 10, 3),
    "slump": (103, 7, 3),
    "wq": (1060, 16, 14),
}
"""Rows, inputs and targets, the last columns, as mulan's README has them; of sf1 and sf2, three inputs are letters."""

LETTERS = ("mod_zurich_class", "largest_spot_size", "spot_distribution")


@pytest.mark.parametrize("name", MULAN)
def test_mulans_tables_have_the_published_sizes(name: str) -> None:
    file = real_data("tabular", "mulan", f"{name}.arff")
    rows, inputs, targets = MULAN[name]
    table = read_table(file)
    assert table.shape == (rows, inputs + targets)
    data = TabularDataModule(file, list(table.columns[-targets:]), batch_size=32, seed=1)
    data.setup()
    assert sum(map(len, data.rows.values())) == rows
    kept = set(data.input_names)
    train = table.iloc[data.rows["train"]]
    for column in table.columns[:-targets]:
        assert (column in kept) != (column in LETTERS or train[column].nunique() == 1)
    assert all(torch.isfinite(one.inputs).all() for one in (data.train_data, data.val_data, data.test_data))


def test_sarcos_has_seven_torques() -> None:
    data = TabularDataModule(real_data("tabular", "sarcos", "sarcos_inv_test.mat"), list(range(21, 28)))
    data.setup()
    assert (data.input_dim, len(data.tasks)) == (21, 7)
    assert {name: len(rows) for name, rows in data.rows.items()} == {"train": 3115, "val": 667, "test": 667}
    spread = [float(target.std()) for target in data.train_data.targets.values()]
    assert max(spread) == pytest.approx(20.4, rel=0.05)
    assert min(spread) == pytest.approx(0.97, rel=0.05)


@pytest.mark.parametrize("name", ["parkinsons_updrs_uci_form.data", "parkinsons_updrs.data"])
def test_no_patient_is_in_two_splits(name: str) -> None:
    file = real_data("tabular", "parkinsons", name)
    data = TabularDataModule(file, ["motor_UPDRS", "total_UPDRS"], group="subject#")
    data.setup()
    subject = read_table(file)["subject#"].to_numpy()
    seen = [set(subject[rows]) for rows in data.rows.values()]
    assert data.input_dim == 19
    assert sum(map(len, seen)) == len(set.union(*seen)) == 42
    assert sum(map(len, data.rows.values())) == 5875


@pytest.mark.parametrize(("missing", "rows"), [("drop", 9005), ("mean", 9125)])
def test_the_rivers_missing_values_are_handled(missing: str, rows: int) -> None:
    file = real_data("tabular", "rf1", "rf1.arff")
    targets = [f"{site}_48H__0" for site in ("CHSI2", "NASI2", "EADM7", "SCLM7", "CLKM7", "VALI2", "NAPM7", "DLDI4")]
    data = TabularDataModule(file, targets, missing=missing)
    data.setup()
    assert (data.input_dim, sum(map(len, data.rows.values()))) == (64, rows)
    assert torch.isfinite(data.train_data.inputs).all()


def test_the_energy_table_is_the_same_as_arff_and_as_text() -> None:
    arff = read_table(real_data("tabular", "mulan", "enb.arff")).to_numpy(dtype=float)
    text = read_table(real_data("tabular", "enb", "energy_yaringal.txt")).to_numpy(dtype=float)
    assert np.abs(arff[:, :9] - text).max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("standardize", [False, True])
def test_a_small_network_predicts_the_energy_a_house_needs(standardize: bool, quiet_trainer: Any) -> None:
    file = real_data("tabular", "mulan", "enb.arff")
    data = TabularDataModule(file, ["Y1", "Y2"], standardize_targets=standardize, batch_size=32)
    torch.manual_seed(0)
    network = MultiTaskModule(MLP(data.input_dim, [100, 100]), tabular_tasks(100, data.scales))
    trainer = quiet_trainer(max_epochs=60, callbacks=[GradNorm()])
    trainer.fit(network, datamodule=data)
    trainer.test(network, datamodule=data, verbose=False)
    for task in data.tasks:
        assert trainer.callback_metrics[f"test/relative_rmse/{task}"] < 0.35
        assert trainer.callback_metrics[f"test/rmse/{task}"] < 3.5
