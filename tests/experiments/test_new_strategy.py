"""A new strategy is three files: its formula, its yaml and its test. Everything else picks it up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("lightning_gradnorm", "conf", "docs", "scripts", "tests", "pyproject.toml", "mkdocs.yml", "CHANGELOG.md")

FILES = {
    "lightning_gradnorm/strategies/toy_strategy.py": '''
"""A toy: the sum of powers of the losses, divided by their running sum."""

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.scalarization import Scalarizer


class ToyStrategy(Scalarizer, Stateful):
    """``Σ_i L_i^power / s``, where s is the sum of all losses so far.

    Args:
        power: the exponent.
    """

    remembers = "sum of losses"

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power
        self.register_buffer("total", torch.zeros(()))

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the scalarization."""
        self.total = self.total + values.detach().sum()
        return (values**self.power).sum() / self.total

    def reset(self) -> None:
        """Forget the running sum."""
        self.total = torch.zeros_like(self.total)
''',
    "conf/balancing/toy_strategy.yaml": """
# Toy: powers of the losses, divided by the sum of all losses so far
# (Somebody, Else, Third, A Toy, arXiv 2601.00001).
# Formula: Σ L_i^p / s, s the sum of all losses so far
defaults:
  - /schema/Scalarization@_here_
  - /schema/scalarization/ToyStrategy@scalarizer
  - _self_
scalarizer:
  power: 2.0
""",
    "tests/strategies/test_toy_strategy.py": """
import torch

from lightning_gradnorm.strategies import ToyStrategy


def test_its_gradient_is_the_derivative_of_its_formula():
    losses = torch.tensor([1.0, 3.0], requires_grad=True)
    ToyStrategy(power=2.0)(losses).backward()
    assert losses.grad.tolist() == [0.5, 1.5]
""",
}

PRINT_ALL = """
import strategy_tables, site_pages, lightning_gradnorm
from hydra.core.config_store import ConfigStore
from lightning_gradnorm.experiments.cli.config import register
register()
print(lightning_gradnorm.__file__)
print("schema:", ConfigStore.instance().load("schema/scalarization/ToyStrategy.yaml").node)
for name in strategy_tables.PAGES:
    print(strategy_tables.filled((strategy_tables.ROOT / "docs" / name).read_text(encoding="utf-8")))
print(site_pages.pages()["configuration/balancing.md"], site_pages.pages()["strategies/toy_strategy.md"])
"""

TESTS = {  # a file → what the ids of its tests for the strategy have in them
    "tests/strategies/test_toy_strategy.py": "test_its_gradient_is",
    "tests/strategies/test_snapshot.py": "test_a_fresh_object_continues_bit_for_bit",
    "tests/strategies/test_moving.py": "test_a_moved_rule_continues_where_it_was",
    "tests/callbacks/test_scalarization.py": "test_every_scalarizer_trains_as_by_hand",
    "tests/callbacks/test_strategies_resume.py": "test_a_resumed_run_is_bit_identical",
    "tests/experiments/cli/test_grid.py": "test_every_strategy_trains_two_tasks_or_ten_if_it_needs_more[toy_strategy]",
    "tests/experiments/cli/test_strategies.py": "test_the_yaml_and_the_line_of_python_make_the_same[toy_strategy]",
    "tests/experiments/cli/test_schema.py": "all_its_parameters[scalarization/ToyStrategy]",
    "tests/test_site.py": "test_every_key_that_an_option_composes_is_in_the_reference[balancing-toy_strategy]",
}
ON_TWO_RANKS = """
import sys
sys.path[:0] = ["tests", "tests/callbacks"]
import test_strategies_on_ranks as ranks
case = ranks.Case("ToyStrategy of the losses")
assert case.name in ranks.STRATEGIES
ranks.assert_as_alone(case, ranks.outcomes((case,))[str(case)])
print("as alone")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    for name, content in FILES.items():
        assert not (folder / name).exists()
        (folder / name).write_text(content.lstrip(), encoding="utf-8")
    return folder


def python(checkout: Path, *arguments: str) -> str:
    """Run Python in the checkout, which comes before the installed package; return what it prints."""
    path = os.pathsep.join(str(checkout / folder) for folder in (".", "scripts"))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_help_schema_and_pages_have_it(checkout: Path) -> None:
    said = python(checkout, "-m", "lightning_gradnorm.experiments.cli.train", "--help")
    assert re.search(r"from the losses:[^;]*\btoy_strategy\b", said)
    made = python(checkout, "-c", PRINT_ALL)
    assert made.startswith(str(checkout))
    assert "schema: {'_target_': 'lightning_gradnorm.strategies.ToyStrategy', 'power': '???'}" in made
    assert (
        "| [`toy_strategy`](../conf/balancing/toy_strategy.yaml) | `Scalarization(ToyStrategy(power=2.0))` | " in made
    )
    details = {
        "needs": "losses",
        "state in the checkpoint": "sum of losses",
        "cost besides the backward pass": "nothing",
        "weights sum to": "free",
        "several ranks": "exact",
        "tasks": "≥ 2",
        "source": "Somebody et al., A Toy, [2601.00001](https://arxiv.org/abs/2601.00001)",
    }
    for name, value in details.items():
        assert f"| {name} | {value} |" in made
    assert "**Formula:** Σ L<sub>i</sub><sup>p</sup> / s, s the sum of all losses so far" in made
    assert "## `balancing=toy_strategy`" in made
    assert "| `power` | `float` |  | the exponent. |" in made


@pytest.mark.slow
def test_the_tests_that_go_through_all_strategies_have_it_and_pass(checkout: Path) -> None:
    ran = python(checkout, "-m", "pytest", "-v", "-k", "toy_strategy or ToyStrategy", "-m", "not gpu", *TESTS)
    for file, one in TESTS.items():
        assert re.search(rf"^{re.escape(file)}::.*{re.escape(one)}.* PASSED", ran, re.MULTILINE), one


@pytest.mark.slow
def test_two_ranks_train_with_it_as_one_process_does(checkout: Path) -> None:
    """The slow tests on ranks go through `STRATEGIES`; this is one of their cases."""
    assert python(checkout, "-c", ON_TWO_RANKS).endswith("as alone\n")
