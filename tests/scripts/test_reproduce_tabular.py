"""The study of small regressions: its numbers against ones computed here, on synthetic tables with the real names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from real_data import real_data
from torch import nn

SCRIPT = "reproduce_tabular"
Call = Callable[..., str]
TARGETS = {"jura": 3, "enb": 2}


def made_up(folder: Path) -> Path:
    """Tables of jura's and energy's form: the last target of each is noise."""
    draw = np.random.default_rng(0)
    (folder / "mulan").mkdir(parents=True)
    for name, targets in TARGETS.items():
        x = draw.normal(size=(200, 5))
        y = [10.0**k * (x[:, k] + x[:, 4] if k < targets - 1 else draw.normal(size=200)) for k in range(targets)]
        names = [*(f"x{i}" for i in range(5)), *(f"y{i}" for i in range(targets))]
        rows = [",".join(f"{value:.6g}" for value in row) for row in np.column_stack([x, *y])]
        text = ["@relation made_up", *(f"@attribute {one} numeric" for one in names), "@data", *rows]
        (folder / "mulan" / f"{name}.arff").write_text("\n".join(text) + "\n")
    return folder


@pytest.mark.slow
def test_the_quick_study_is_trained_kept_and_written(call: Call, script: ModuleType, tmp_path: Path) -> None:
    folder = made_up(tmp_path / "tables")
    call(str(folder), "--quick")
    page = (tmp_path / "outputs" / "tabular.md").read_text()
    assert "`python scripts/reproduce_tabular.py FOLDER --quick`" in page
    kept = {file.name: json.loads(file.read_text()) for file in (tmp_path / "outputs" / "tabular").glob("*.json")}
    assert len(kept) == 2 * 2 * len(script.ARMS)
    for name in ("tabular.png", "tabular_weights.png"):
        assert (tmp_path / "outputs" / name).stat().st_size > 10_000
    dwa = [np.mean(list(found["errors"].values())) for name, found in kept.items() if name.startswith("jura_DWA_")]
    (row,) = [line for line in page.splitlines() if line.startswith("| DWA")]
    assert f"{np.mean(dwa):.3f} ± {np.std(dwa, ddof=1):.3f}" in row
    static = [found for name, found in kept.items() if name.startswith("energy_GradNorm_α_1.5_")]
    assert all(sum(found["mean_weights"].values()) == pytest.approx(2, abs=1e-3) for found in static)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "outputs" / "tabular").glob("*.json")}
    call(str(folder), "--quick")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "outputs" / "tabular").glob("*.json")}


def test_errors_are_relative_to_the_training_rows_mean_and_missing_targets_do_not_count(script: ModuleType) -> None:
    model = nn.ModuleDict({"encoder": nn.Identity(), "heads": nn.ModuleDict({"a": nn.Identity()})})
    x = torch.tensor([[1.0], [2.0], [3.0], [9.0]])
    y = torch.tensor([[1.5], [2.0], [5.0], [float("nan")]])
    errors, r2 = script.score(model, x, {"a": y}, {"a": (1.0, 1.0)})
    squares = 0.5**2 + 0 + 2**2
    assert errors["a"] == pytest.approx((squares / (0.5**2 + 1 + 4**2)) ** 0.5, rel=1e-12)
    middle = (1.5 + 2 + 5) / 3
    assert r2["a"] == pytest.approx(1 - squares / sum((one - middle) ** 2 for one in (1.5, 2, 5)), rel=1e-12)
    assert float(script.masked_mse(x, y)) == pytest.approx(squares / 3)


@pytest.mark.slow
def test_all_eight_tables_are_read_with_their_targets(script: ModuleType) -> None:
    sizes = {"SARCOS": (21, 7), "jura": (15, 3), "energy": (8, 2), "river flow": (64, 8), "atp1d": (411, 6),
             "oes97": (263, 16), "water quality": (16, 14), "Parkinson's": (19, 2)}  # fmt: skip
    for name, table in script.TABLES.items():
        folder = real_data("tabular", table.file).parents[1]
        data = script.TabularDataModule(folder / table.file, targets=script.targets_of(folder, table), **table.options)
        inputs, targets = sizes[name]
        assert len(data.tasks) == targets
        assert data.input_dim <= inputs  # less those that are constant in the training rows
