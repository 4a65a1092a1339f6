"""Other projects' models train with our one line: they agree with the textbook, with layer and heads found automatically."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from third_party.exactness import Tape, distances
from third_party.project import Project
from third_party.projects import PROJECTS, neuromancer

from lightning_gradnorm import GradNorm

pytestmark = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]

HEADS = [pytest.param("auto", id="heads found"), pytest.param(None, id="no heads")]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some of them write logs


@pytest.fixture(params=PROJECTS)
def project(request: pytest.FixtureRequest) -> Project:
    made = PROJECTS[request.param]()
    for package in made.packages:
        require(package)
    return made


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")


def fit(project: Project, **options: Any) -> tuple[Tape, GradNorm]:
    """Train with GradNorm; return the tape and the callback that the user made."""
    arguments = {name: options.pop(name) for name in ("heads",) if name in options}
    gradnorm, tape = GradNorm(**project.gradnorm, **arguments), Tape()
    project.fit([tape, gradnorm], **options)
    return tape, gradnorm


@pytest.mark.parametrize("heads", HEADS)
def test_weights_and_gradients_agree_with_double_backward(project: Project, heads: Any) -> None:
    tape, _ = fit(project, heads=heads, precision="64-true")
    weights, gradients = distances(project, tape)
    assert len(tape.weights) >= 5
    assert weights <= 1e-9
    assert gradients <= (1e-6 if project.computes_in_float32 else 1e-9)


@pytest.mark.parametrize("heads", HEADS)
def test_single_precision_differs_by_rounding_only(project: Project, heads: Any) -> None:
    weights, gradients = distances(project, fit(project, heads=heads)[0])
    assert weights <= 1e-6
    assert gradients <= 1e-3


def test_the_callback_reports_what_it_found(project: Project) -> None:
    tape, _ = fit(project)
    assert repr(tape.balancing) == f"GradNorm: {project.found}"


def test_a_constraint_that_is_satisfied_at_first_does_not_end_the_training() -> None:
    require("neuromancer")
    tape, gradnorm = fit(neuromancer(limit=0.6), steps=40)
    assert tape.weights[0] == {"cost": 1.0, "limit": 1.0}
    assert gradnorm.weights != {"cost": 1.0, "limit": 1.0}


def test_a_constraint_that_is_never_violated_leaves_the_weights_alone() -> None:
    require("neuromancer")
    tape, gradnorm = fit(neuromancer(limit=10.0), steps=5)
    assert gradnorm.weights == {"cost": 1.0, "limit": 1.0}
    assert all(bool(gradient.abs().sum() > 0) for gradient in tape.gradients[-1].values())


def test_a_package_that_copies_its_callbacks_keeps_the_one_that_trained_and_the_original_shows_it() -> None:
    require("neuralforecast")
    project = PROJECTS["neuralforecast"]()
    gradnorm, tape = GradNorm(**project.gradnorm), Tape()
    model = project.fit([tape, gradnorm])
    trained = model.trainer_kwargs["callbacks"][1]
    assert trained is not gradnorm
    assert trained.weights == tape.weights[-1] == gradnorm.weights != {"level": 1.0, "change": 1.0}


def test_nothing_is_left_on_a_model_after_its_training() -> None:
    require("scvi")
    project = PROJECTS["SCVI"]()
    plain, balanced = project.fit([]), project.fit([GradNorm(**project.gradnorm)])
    for model in (plain, balanced):
        assert not model.module._forward_hooks
        assert "loss" not in vars(model.module)
    same = [torch.equal(a, b) for a, b in zip(plain.module.parameters(), balanced.module.parameters(), strict=True)]
    assert not all(same)
