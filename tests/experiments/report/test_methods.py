"""Which runs count as one method, and the method's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reporting import measured, write_run

from lightning_gradnorm.experiments.report.collect import collect
from lightning_gradnorm.experiments.report.methods import Method, group

DONE = measured(1.0, 0.5)


def grouped(folder: Path, *runs: dict[str, Any]) -> dict[str, int]:
    """Write the runs; return the methods' names and how many runs each has."""
    for number, options in enumerate(runs):
        write_run(folder / str(number), **({"metrics": DONE} | options))
    return {method.name: len(method.runs) for method in methods_of(folder)}


def methods_of(folder: Path) -> list[Method]:
    return group(collect([folder]))[0]


def test_seeds_are_within_a_method_whether_or_not_the_data_follow(tmp_path: Path) -> None:
    runs = [{"seed": seed} for seed in range(3)] + [{"seed": seed, "data__seed": 7} for seed in range(3)]
    assert grouped(tmp_path, *runs) == {"equal": 6}


def test_an_option_that_differs_is_in_the_name_and_one_that_does_not_is_not(tmp_path: Path) -> None:
    alphas = [
        {"balancing": "gradnorm", "balancing__alpha": alpha, "seed": seed} for alpha in (0.5, 1.5) for seed in (0, 1)
    ]
    assert grouped(tmp_path, {}, *alphas) == {"equal": 1, "gradnorm α=0.5": 2, "gradnorm α=1.5": 2}


def test_options_of_the_training_are_in_every_name(tmp_path: Path) -> None:
    rates = [{"balancing": name, "model__optimizer__lr": lr} for name in ("equal", "gradnorm") for lr in (0.1, 0.01)]
    assert grouped(tmp_path, *rates) == {f"{name} lr={lr}": 1 for name in ("equal", "gradnorm") for lr in (0.1, 0.01)}


def test_an_option_in_which_only_an_unfinished_run_differs_is_in_its_name_alone(tmp_path: Path) -> None:
    runs = ({}, {"balancing": "gradnorm"}, {"model__optimizer__lr": 9.0, "metrics": None})
    assert grouped(tmp_path, *runs) == {"equal": 1, "gradnorm": 1, "equal lr=9": 1}


@pytest.mark.parametrize(
    "option",
    [
        {"paths__root": "there"},
        {"trainer__enable_progress_bar": False},
        {"alpha": 0.3},
        {"name": "mine"},
        {"data__num_workers": 4},
        {"callbacks__dashboard": {"_target_": "x.Y"}},
        {"model__newly_there": None},  # as if written by an older version of the library
    ],
)
def test_options_that_do_not_change_the_training_do_not_define_a_method(tmp_path: Path, option: dict[str, Any]) -> None:
    assert grouped(tmp_path, {"seed": 0}, {"seed": 1, **option}) == {"equal": 2}


def test_values_from_each_seeds_data_do_not_define_a_method(tmp_path: Path) -> None:
    def fitted(seed: int) -> dict[str, Any]:
        tasks = {"_target_": "somewhere.make_tasks", "scales": {"depth": [seed + 0.5, 1.0], "seg": [0.1, 1.0]}}
        return {"seed": seed, "model__tasks": tasks, "model__encoder": {"in_features": 20 + seed}}

    assert grouped(tmp_path, fitted(0), fitted(1)) == {"equal": 2}


def test_draws_of_random_weights_are_one_method(tmp_path: Path) -> None:
    draws = [{"balancing": "random_static", "balancing__seed": draw} for draw in range(4)]
    assert grouped(tmp_path, *draws) == {"random_static": 4}


def test_static_weights_of_each_seeds_own_run_are_one_method_but_of_two_runs_two(tmp_path: Path) -> None:
    def static(seed: int, run: str) -> dict[str, Any]:
        return {"balancing": "gradnorm_static", "balancing__from_run": f"a/b/{run}", "seed": seed}

    assert grouped(tmp_path / "one", static(0, "0"), static(1, "1")) == {"gradnorm_static": 2}
    both = grouped(tmp_path / "two", static(0, "x"), static(0, "y"))
    assert both == {"gradnorm_static from_run=x": 1, "gradnorm_static from_run=y": 1}


def test_runs_of_one_task_stand_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "both", metrics=DONE)
    for task in ("depth", "seg"):
        write_run(tmp_path / task, metrics={f"test/loss/{task}": 1.0}, tasks=[task])
    methods, single = group(collect([tmp_path]))
    assert ([method.name for method in methods], [len(one.runs) for one in single]) == (["equal"], [2])


def test_runs_of_one_and_the_same_task_are_compared_with_each_other(tmp_path: Path) -> None:
    runs = [{"tasks": ["seg"], "model__optimizer__lr": lr, "metrics": {"test/loss/seg": lr}} for lr in (0.1, 0.2)]
    assert grouped(tmp_path, *runs) == {"equal lr=0.1": 1, "equal lr=0.2": 1}


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"data__train_size": 500}, r"different data cannot be compared: data.train_size is 100 in 0 and 500 in 1"),
        ({"data___target_": "x.Other"}, r"different data cannot be compared: data._target_ is somewhere.Data in 0"),
        (
            {"tasks": ["seg", "depth", "normals"]},
            r"tasks cannot be compared: 0 has depth, seg, 1 has depth, normals, seg",
        ),
        ({"tasks": ["hue"]}, r"different tasks cannot be compared: 1 has only hue, which is not a task of the others"),
    ],
)
def test_different_tasks_or_data_are_refused(tmp_path: Path, second: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        grouped(tmp_path, {}, second)


def test_runs_of_one_task_each_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found only single-task runs \(depth, seg\) and no multi-task runs"):
        grouped(tmp_path, {"tasks": ["depth"]}, {"tasks": ["seg"]})


def test_a_run_with_unknown_tasks_does_not_disturb_the_others(tmp_path: Path) -> None:
    made = {"_target_": "somewhere.make_tasks"}
    assert grouped(tmp_path, {}, {"balancing": "gradnorm", "metrics": None, "model__tasks": made}) == {
        "equal": 1,
        "gradnorm": 1,
    }


@pytest.mark.parametrize("names", [{"names": ["depth", "seg"]}, {}])
def test_tasks_that_a_function_makes_are_known_by_its_names_or_by_the_metrics(
    tmp_path: Path, names: dict[str, Any]
) -> None:
    made = {"_target_": "somewhere.make_tasks", "in_features": 3, **names}
    assert grouped(tmp_path, {"model__tasks": made}, {"model__tasks": made, "seed": 1}) == {"equal": 2}
    assert methods_of(tmp_path)[0].runs[0].tasks == ("depth", "seg")
