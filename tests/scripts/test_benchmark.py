"""The benchmark: each measure measures what it claims, and each method trains. No test depends on time."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib import image

SCRIPT = "benchmark"
OUTPUT = Path("results")
SHORT = ["--threads", "1", "--rounds", "1", "--output", str(OUTPUT)]
OURS = ["with heads", "without heads", "nothing named", "MultiTaskModule", "every 8th step", "activation", "UPGrad"]
OTHERS = ["textbook", "gradnorm-pytorch", "LibMTL GradNorm", "UPGrad by hand"]
Call = Callable[..., str]
Cells = list[dict[str, str]]


@pytest.fixture
def ways(script: ModuleType) -> Any:
    from benchmarking import ways

    return ways


@pytest.fixture
def plan(script: ModuleType) -> Any:
    """What a command asks for that trains the toy network of two tasks with our callback, for eleven steps."""
    from benchmarking.plan import Plan
    from benchmarking.running import Setting

    setting = Setting(threads=1, steps=11)
    return Plan("gradnorm", ["with heads"], [("toy", 2)], 1, setting, OUTPUT, "made_up", {})


def tables(page: str) -> list[Cells]:
    """The tables of a page, each row by its columns' names."""
    blocks = [block.splitlines() for block in (OUTPUT / f"{page}.md").read_text().split("\n\n") if block[0] == "|"]
    rows = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block] for block in blocks]
    return [[dict(zip(head, row, strict=True)) for row in body] for head, _, *body in rows]


def number(cell: str) -> float:
    return float(cell.split(" ")[0])


@pytest.mark.parametrize(
    "asked", [["textbook", "with heads"], pytest.param([], marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_every_way_has_a_column_of_ratios_and_one_of_milliseconds(asked: list[str], call: Call, ways: Any) -> None:
    told = call("--cases", "toy:2,3", "--steps", "11", *(["--ways", *asked] if asked else []), *SHORT)
    ratios, floors, milliseconds = tables("step_time")
    assert [(row["model"], row["T"]) for row in ratios] == [("toy", "2"), ("toy", "3")]
    usual = {name: way for name, way in ways.OF_GRADNORM.items() if way.is_usual}
    there = [name for name, way in usual.items() if way.what_is_missing() is None]
    left_out = set() if asked else set(usual) - set(there)
    there = ["equal weights", *asked] if asked else there
    assert list(milliseconds[0]) == ["model", "T", *there]
    assert list(floors[0]) == ["model", "T", "weight-gradient, ms", *there]
    for of_ratio, of_time in zip(ratios, milliseconds, strict=True):
        assert all(number(of_ratio[name]) > 0 and number(of_time[name]) > 0 for name in there[1:])
    assert image.imread(OUTPUT / "step_time.png").std() > 0.05
    assert told.count("Left out:") == len(left_out)
    assert all(f"{name} (" in (OUTPUT / "step_time.md").read_text() for name in left_out)


@pytest.mark.slow
def test_a_network_with_losses_of_derivatives_is_timed_in_every_step_and_every_tenth(call: Call) -> None:
    call("--of", "pinn", "--steps", "62", *SHORT)
    (ratios, milliseconds) = tables("step_time_pinn")
    assert [(row["model"], row["T"]) for row in ratios + milliseconds] == 2 * [("burgers", "3")]
    assert all(number(ratios[0][name]) > 0 for name in ("every step", "every 10th step"))


def test_the_network_of_derivatives_has_no_heads_and_the_experiments_points(script: ModuleType) -> None:
    from benchmarking import models
    from configurations import compose_run

    model = models.Physics("burgers")
    config = compose_run(Path("none"), "experiment=pinn_burgers")
    assert {task: len(points) for task, points in model.points.items()} == dict(config.data.points)
    assert [layer.out_features for layer in model.network.layers[:-1:2]] == list(config.model.network.hidden)
    losses = model.training_step(torch.zeros(1), 0)
    again = model.training_step(torch.ones(1), 1)
    assert {task: loss.item() for task, loss in losses.items()} == {task: loss.item() for task, loss in again.items()}


@pytest.mark.parametrize("asked", [["--cases", "burgers:3"], ["--of", "pinn", "--cases", "toy:2"]])
def test_the_network_of_derivatives_only_runs_with_its_own_methods(
    asked: list[str], call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call(*asked)
    assert "burgers:3 goes with --of pinn, and nothing else does" in capsys.readouterr().err


def test_a_ratio_is_to_the_run_of_equal_weights_right_before(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run takes twice as long as the previous one, so every ratio is 2 in any order."""
    from benchmarking import times
    from benchmarking.plan import Failures

    lasts = (2.0**run for run in itertools.count())
    monkeypatch.setattr(times, "step_time", lambda *_: (next(lasts), 0.0))
    three = replace(plan, names=["with heads", "textbook", "activation"], rounds=2)
    found = times.times_of(three, ("toy", 2), Failures())
    cells = [times.ratio_cell(found, name, with_solver=False) for name in three.names]
    assert cells == 3 * ["2.00 (2.00 to 2.00)"]
    assert sorted(found["equal weights"].step) == [4.0**pair for pair in range(6)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*OURS, *OTHERS])
def test_every_way_changes_the_whole_network(name: str, precision: str, ways: Any, plan: Any) -> None:
    from benchmarking.running import train

    missing = ways.OF_GRADNORM[name].what_is_missing()
    if missing is not None:
        pytest.skip(missing)
    run = ways.OF_GRADNORM[name].start("toy", 3, False)
    network = [module for module in run.model.modules() if isinstance(module, torch.nn.Linear)]
    before = [module.weight.detach().clone() for module in network]
    assert len(network) == 4 + 3
    train(run, "toy", replace(plan.setting, precision=precision))
    moved = [(module.weight - initial).abs().max().item() for module, initial in zip(network, before, strict=True)]
    assert all(5e-4 < distance < 20e-4 for distance in moved), moved  # eleven steps of Adam, of 1e-4 or so


@pytest.mark.parametrize("name", ["with heads", "without heads", "MultiTaskModule"])
def test_the_timed_textbook_has_the_same_weights_as_ours(name: str, ways: Any, plan: Any) -> None:
    from benchmarking.running import train

    runs = {way: ways.OF_GRADNORM[way].start("mlp", 3, False) for way in (name, "textbook")}
    for run in runs.values():
        torch.manual_seed(1)
        train(run, "mlp", replace(plan.setting, batch_size=8))
    ours, textbook = runs[name].callbacks[0].weights.values(), runs["textbook"].model.weights.tolist()
    assert max(abs(weight - 1) for weight in textbook) > 0.05, "it would prove nothing"
    assert list(ours) == pytest.approx(textbook, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "package", "weights_name"),
    [("gradnorm-pytorch", "weighter", "loss_weights"), ("LibMTL GradNorm", "weighting", "loss_scale")],
)
def test_a_package_balances_in_the_steps_that_are_timed(
    name: str, package: str, weights_name: str, ways: Any, plan: Any
) -> None:
    from benchmarking.running import train

    missing = ways.OF_GRADNORM[name].what_is_missing()
    if missing is not None:
        pytest.skip(missing)
    run = ways.OF_GRADNORM[name].start("mlp", 3, False)
    balancer = getattr(run.model, package)
    balancer.learning_rate = 1.0  # gradnorm-pytorch's 1e-4 would hide in the rounding
    train(run, "mlp", replace(plan.setting, batch_size=8))
    weights = balancer.state_dict()[weights_name]
    assert weights.shape == (3,)
    assert (weights - 1).abs().max() > 1e-4


def test_failures_of_others_are_reported_and_failures_of_ours_are_raised(
    call: Call, ways: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no double backward\nand more")

    monkeypatch.setitem(ways.OF_GRADNORM, "textbook", ways.Way(fails, is_ours=False))
    call("--cases", "toy:2", "--steps", "11", "--ways", "textbook", "with heads", *SHORT)
    ratios, floors, _ = tables("step_time")
    assert ratios[0]["textbook"] == floors[0]["textbook"] == "fails"
    assert number(ratios[0]["with heads"]) > 0
    assert "textbook on toy, T = 2: RuntimeError: no double backward\n" in (OUTPUT / "step_time.md").read_text()
    monkeypatch.setitem(ways.OF_GRADNORM, "with heads", ways.Way(fails))
    with pytest.raises(RuntimeError, match="no double backward"):
        call("--cases", "toy:2", "--steps", "11", "--ways", "with heads", *SHORT)


def test_the_solvers_share_is_shown_next_to_the_ratio_of_aggregations(call: Call) -> None:
    call("--of", "aggregation", "--cases", "toy:2", "--steps", "11", "--ways", "PCGrad", *SHORT)
    ratios, _, _ = tables("step_time_aggregation")
    ratio, _, share = ratios[0]["PCGrad"].strip(")").partition("; ")
    assert 0 <= float(share) < number(ratio)


@pytest.mark.slow
def test_compiled_trunk_and_heads_train_in_all_our_ways(call: Call) -> None:
    told = call("--compile", "--cases", "toy:2", "--steps", "11", *SHORT)
    ratios, _, _ = tables("step_time_compiled")
    assert "Left out: without heads (not with a compiled model)" in told
    assert all(number(ratios[0][name]) > 0 for name in OURS if name not in ("without heads", "nothing named"))
    assert ratios[0]["textbook"] == "fails"  # torch.compile has no double backward


def test_peaks_become_a_median_and_a_ratio_to_equal_weights(
    call: Call, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarking import memory

    peaks = {"equal weights": iter([4.0, 10.0, 5.0]), "with heads": iter([9.0, 2.0, 7.5])}
    monkeypatch.setattr(memory, "peak_in_a_fresh_process", lambda group, name, *_: next(peaks[name]))
    call("--measure", "memory", "--cases", "mlp:2", "--ways", "with heads", *SHORT, "--rounds", "3")
    ((row,),) = tables("peak_memory")
    assert (row["equal weights, MiB"], row["with heads"]) == ("5", "1.500")


@pytest.mark.slow
def test_the_peak_of_a_run_counts_what_it_allocates(plan: Any) -> None:
    from benchmarking.memory import peak_in_a_fresh_process

    least = 128 * 512 + 3 * 512 * 512  # the first moments alone that Adam has of the trunk, in numbers of four bytes
    assert peak_in_a_fresh_process("gradnorm", "with heads", ("mlp", 2), plan.setting) > 4 * least / 2**20


@pytest.mark.slow
def test_the_peaks_of_fresh_processes_make_a_table(call: Call) -> None:
    call("--measure", "memory", "--cases", "mlp:2", "--steps", "11", "--ways", "with heads", *SHORT)
    ((row,),) = tables("peak_memory")
    assert number(row["equal weights, MiB"]) > 3
    assert 0.5 < number(row["with heads"]) < 3


@pytest.mark.slow
def test_the_first_step_is_measured_with_everything_named_and_with_nothing_named(call: Call) -> None:
    call("--measure", "first_step", "--cases", "toy:2,3", *SHORT)
    (rows,) = tables("first_step")
    names = ["equal weights", "with heads", "without heads", "nothing named"]
    assert [(row["T"], row["way"]) for row in rows] == [(T, name) for T in ("2", "3") for name in names]
    assert all(number(row["first step, ms"]) > 0 and number(row["a later step, ms"]) > 0 for row in rows)


def test_one_weight_gradient_is_one_product_of_the_shared_layer(plan: Any) -> None:
    from benchmarking.floor import REPETITIONS, weight_gradient_times

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        times = weight_gradient_times("toy", plan.setting)
    assert len(times) == REPETITIONS
    backward = [event for event in profiler.events() if event.name == "AddmmBackward0"]
    assert len(backward) == REPETITIONS + 1


def test_an_overhead_is_in_units_of_one_weight_gradient_for_each_task(script: ModuleType) -> None:
    from benchmarking.summaries import floors

    assert floors(step=[16.0, 22.0], equal=[10.0, 10.0], tasks=3, weight_gradients=[1.0, 2.0, 9.0]) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("times", "cell"),
    [
        ([2.0, 2.0, 2.0, 2.0], "1.00 (1.00 to 1.00)"),
        ([2.0, 2.08, 2.0, 2.08], "1.04 (0.96 to 1.04)"),
        ([2.0, 3.0, 2.0, 3.0], "1.50 (0.67 to 1.50) noisy"),
    ],
)
def test_runs_with_equal_weights_that_differ_by_over_5_percent_are_marked(
    times: list[float], cell: str, script: ModuleType
) -> None:
    from benchmarking.summaries import noise_cell

    assert noise_cell(times) == cell


def test_the_bare_loop_is_shown_next_to_lightnings_and_ours(call: Call) -> None:
    call("--measure", "loop", "--cases", "toy:2", "--steps", "11", *SHORT)
    (rows,) = tables("loop")
    assert [row["loop"] for row in rows] == ["bare loop", "equal weights", "with heads"]
    bare, _, ours = (number(row["ms a step"]) for row in rows)
    assert number(rows[2]["ms more than bare"]) == pytest.approx(ours - bare, abs=0.002)


@pytest.mark.parametrize("name", ["equal weights", "with heads", "MultiTaskModule"])
def test_all_loops_write_their_losses_every_50_steps(name: str, plan: Any, tmp_path: Path) -> None:
    from benchmarking.loop import bare_step_time, lightning_step_time

    plan = replace(plan, setting=replace(plan.setting, steps=110))
    bare_step_time("toy", 2, plan.setting, tmp_path)
    assert len((tmp_path / "losses.csv").read_text().splitlines()) == 2
    lightning_step_time(plan, name, "toy", 2, tmp_path)
    header, *written = (tmp_path / "lightning" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"train/loss/task_0", "train/loss/task_1"} <= set(header.split(","))
    assert ("gradnorm/weight/task_0" in header) == (name != "equal weights")
    # The callback writes its values itself: a step has a row of its own for them.
    steps = [line.split(",")[header.split(",").index("step")] for line in written]
    assert list(dict.fromkeys(steps)) == ["49", "99"]


def test_events_are_counted_by_step(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarking import synchronizations

    monkeypatch.setattr(synchronizations, "KINDS", {"aten::linear": "linear layers"})
    synchronizations.measure(plan)
    (rows,) = tables("made_up")
    assert [row["linear layers"] for row in rows] == ["6.00", "6.00"]  # four of the trunk, two heads


def test_calls_that_make_the_host_wait_are_reported_by_name(script: ModuleType) -> None:
    from benchmarking.synchronizations import counted

    names = ["cudaLaunchKernel", "cudaStreamSynchronize", "Memcpy DtoH (Device -> Pinned)", "Memcpy HtoD", "aten::item"]
    assert counted([*names, "cudaStreamSynchronize"]) == {
        "stream": 2,
        "event": 0,
        "device": 0,
        "copies to the host": 1,
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--cases con:3", "there is no model 'con'; did you mean 'conv'"),
        ("--cases conv:three", "T should be an integer, at least 2, as in conv:3,10; got 'conv:three'"),
        ("--cases conv:1", "T should be an integer, at least 2"),
        ("--ways textbok", "there is no 'textbok'; did you mean 'textbook'"),
        ("--compile --ways with\\ heads without\\ heads", "without heads cannot be tried: not with a compiled model"),
        ("--cases segnet:3 --steps 3", "--steps should be at least 4 for segnet; got 3"),
        ("--rounds 0", "--rounds should be at least 1; got 0"),
        ("--batch-size 0", "--batch-size should be at least 1; got 0"),
        ("--measure first_step --steps 9", "--steps has no effect on --measure first_step"),
        ("--measure synchronizations", "give --device cuda, on one"),
        ("--clock processor", "give --threads 1 --device cpu with it"),
    ],
)
def test_a_wrong_option_is_named(
    arguments: str, complaint: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        call(*shlex.split(arguments))
    assert left.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_method_with_a_missing_package_explains_how_to_get_it(
    call: Call, ways: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> None:
        raise ModuleNotFoundError("No module named 'LibMTL'")

    way = replace(ways.OF_GRADNORM["LibMTL GradNorm"], package=absent)
    monkeypatch.setitem(ways.OF_GRADNORM, "LibMTL GradNorm", way)
    with pytest.raises(SystemExit):
        call("--ways", "LibMTL GradNorm")
    assert "No module named 'LibMTL'; it is in the extra `bench`" in capsys.readouterr().err
