"""One thread, one seed, and a Trainer that prints nothing and writes nothing unless asked.

With `-n`, the process that hands out the tests loads this file before it starts the workers. It needs no torch and no
Lightning, so they are imported inside the functions.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import fast_set
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: others run beside them


def pytest_addoption(parser: pytest.Parser) -> None:
    fast_set.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    fast_set.configure(config)
    only_hands_out = bool(config.getoption("tx", None)) and not hasattr(config, "workerinput")
    if only_hands_out:
        return
    # Each Trainer asks for callbacks that other packages install, which reads a thousand files: 12 of the 13 ms that it
    # takes to make one. Lightning, which is not imported yet, takes the function from there.
    metadata.entry_points = functools.cache(metadata.entry_points)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; tests press Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    advice = "lightning.fabric.utilities.warnings.PossibleUserWarning"  # more workers, a val loader: no defects
    config.addinivalue_line("filterwarnings", f"ignore::{advice}")
    gc.disable()  # until all tests are collected: their modules stay, and looking for garbage took a tenth of the time


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    fast_set.report_what_was_not_reached(terminalreporter)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.enable()
    gc.freeze()  # or each full collection would look at all imported modules


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    fast_set.skip_if_late(item)
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() is False here")


@pytest.fixture(autouse=True)
def _same_seed_for_every_test(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # seed_everything leaves them to all processes that start later
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats the stack, 0.9 ms a test
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def lightnings_log() -> Iterator[None]:
    """Let Lightning report again afterwards what a script or a notebook has silenced."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    import packages

    packages.parametrize(metafunc)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import packages

    packages.select(items)
    fast_set.thin_out(items)
    fast_set.keep_together(items)


@pytest.fixture
def package(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The package that models and Trainer are of: `lightning`, and for tests marked `both_packages` the other too."""
    import packages

    with packages.using(getattr(request, "param", "lightning")) as namespace:
        yield namespace


@pytest.fixture
def quiet_trainer(tmp_path: Path, package: ModuleType) -> Callable[..., Any]:
    """`quiet_trainer(**options)` is a one-epoch CPU Trainer without bars, summaries, loggers or checkpoints."""

    import packages

    def build(**options: Any) -> Any:
        quiet: dict[str, Any] = {
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
        }
        packages.adopt(options.get("callbacks", ()))
        return package.Trainer(**{**quiet, **options})

    return build
