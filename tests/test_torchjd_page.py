"""The snippets of docs/torchjd.md run as printed, and train as TorchJD does by hand; its table names what we solve."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchjd.aggregation as jd
from harness import Batches
from loops import Network, parameter_distance
from models import TASKS, Automatic, network_sgd, vector_batches
from torch import Tensor
from torch.nn import functional as F

from lightning_gradnorm.strategies.exact import _SOLVERS

PAGE = (Path(__file__).parents[1] / "docs" / "torchjd.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
BATCHES = vector_batches(2, 16, size=8)


def compute_losses(model: Any, features: Tensor, batch: Any) -> dict[str, Tensor]:
    return {task: F.mse_loss(getattr(model, f"{task}_head")(features), batch[task]) for task in TASKS[:2]}


def run(title: str, **more: Any) -> dict[str, Any]:
    model = Network(2).double()
    names = {
        "L": L,
        "model": model,
        "optimizer": network_sgd(model.parameters()),
        "loader": BATCHES,
        "compute_losses": compute_losses,
        **more,
    }
    exec(compile(RECIPES[title], f"torchjd.md: {title}", "exec"), names)
    return names


def test_there_are_four_recipes_and_each_has_a_test() -> None:
    assert list(RECIPES) == ["In a Lightning Trainer", "In your own loop", "With a Balancer", "Without the extra"]


def test_the_loop_with_torchjd_and_the_one_with_a_balancer_train_the_same_network() -> None:
    by_hand, ours, untrained = run("In your own loop"), run("With a Balancer"), Network(2).double()
    assert parameter_distance(ours["model"], by_hand["model"]) <= 1e-9
    assert parameter_distance(ours["model"], untrained) > 0.01
    assert ours["rule"].fallbacks == 0


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_in_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = Automatic(2)
    names = run("In a Lightning Trainer", lightning_module=module, loader=Batches(BATCHES))
    assert names["trainer"].global_step == len(BATCHES)
    assert parameter_distance(module, Automatic(2)) > 0.01


def test_ours_are_rules_without_the_extra() -> None:
    names = run("Without the extra")
    of_no_options = [names["UPGrad"](), names["DualProj"]()]
    for made in (*of_no_options, names["CAGrad"](c=0.5), names["FairGrad"](alpha=2.0), names["NashMTL"](n_tasks=2)):
        rule = names["AggregationRule"](["seg", "depth"], made)
        assert bool(rule.weigh_gradients(torch.eye(2)).isfinite().all())


def test_the_table_names_what_we_solve() -> None:
    listed = re.findall(r"^\| `(\w+)` \| ", PAGE, flags=re.MULTILINE)
    solved = {kind.__name__ for kind in _SOLVERS if issubclass(kind, jd.Aggregator)}
    assert sorted(listed) == sorted(solved)
