"""The picture of a solution, and where it is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gradnorm.experiments.problems.pde import (
    PINN,
    Burgers,
    CollocationDataModule,
    Equation,
    Helmholtz,
    KirchhoffPlate,
    Poisson,
    SolutionPicture,
    TanhMLP,
)
from lightning_gradnorm.experiments.problems.pde.pictures import HEIGHT, MARGIN, WIDTH, solution_picture

Build = Callable[..., Any]


def panels(picture: torch.Tensor) -> list[np.ndarray]:
    """Return the contents of the three frames, ``(height, width, 3)`` each."""
    pixels = picture.permute(1, 2, 0).numpy().astype(int)
    whole = pixels.shape[1] // 3
    return [pixels[MARGIN + 1 : MARGIN + HEIGHT, k * whole + MARGIN + 1 : k * whole + MARGIN + WIDTH] for k in range(3)]


@pytest.mark.parametrize("equation", [Helmholtz(), Burgers(), KirchhoffPlate()], ids=lambda one: type(one).__name__)
def test_the_exact_solution_looks_like_the_reference_and_another_does_not(equation: Equation) -> None:
    exact = equation.reference(equation.grid())
    solution, reference, error = panels(solution_picture(equation, exact))
    assert np.array_equal(solution, reference)
    assert len(np.unique(reference.reshape(-1, 3), axis=0)) > 50
    assert len(np.unique(error.reshape(-1, 3), axis=0)) == 1
    wrong = exact.clone()
    wrong[len(wrong) // 2 :] = 0  # where the first coordinate is large: on the right
    solution, reference, error = panels(solution_picture(equation, wrong))
    half = WIDTH // 2
    assert np.array_equal(solution[:, : half - 8], reference[:, : half - 8])
    assert not np.array_equal(solution[:, half + 8 :], reference[:, half + 8 :])
    assert len(np.unique(error[:, : half - 8].reshape(-1, 3), axis=0)) == 1


def test_the_second_coordinate_points_upwards() -> None:
    grid = Burgers().grid()
    late = torch.where(grid[:, 1:] > 0.5, 1.0, -1.0)
    solution, _, _ = panels(solution_picture(Burgers(), late))
    assert (solution[:90, :, 0] > solution[:90, :, 2]).all()  # red above
    assert (solution[-90:, :, 0] < solution[-90:, :, 2]).all()  # blue below


@pytest.mark.parametrize("equation", [Helmholtz(), KirchhoffPlate()], ids=["two signs", "one sign"])
def test_zero_is_white(equation: Equation) -> None:
    solution, reference, _ = panels(solution_picture(equation, torch.zeros(len(equation.grid()), 1)))
    assert (solution > 240).all()
    assert (reference[0, :2] > 230).all()  # a corner, where it is zero


def test_no_number_is_cut_off() -> None:
    plate = KirchhoffPlate()
    picture = solution_picture(plate, 1.0123 * plate.reference(plate.grid()))
    whole = picture.shape[2] // 3
    for k in (1, 2, 3):
        assert (picture[:, :, k * whole - 3 : k * whole] == 255).all()


def test_one_coordinate_is_a_curve() -> None:
    solution, reference, _ = panels(solution_picture(Poisson(), Poisson().reference(Poisson().grid())))
    assert np.array_equal(solution, reference)
    inked = reference.min(axis=2) < 200
    places = (np.arange(WIDTH - 1) + 1) / WIDTH * 2 - 1
    for column in range(4, WIDTH - 5):
        expected = HEIGHT * (1 - np.sin(np.pi * places[column])) / 2
        rows = np.flatnonzero(inked[:, column])
        if 4 < expected < HEIGHT - 4:  # not where the curve touches the frame
            assert abs(rows.mean() - expected) < 6  # two columns


class TakesImages(Logger):
    """A logger with ``log_image``, as that of Weights & Biases has it."""

    name, version, experiment = "images", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, Any, int]] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.images += [(key, image, step) for image in images]

    def log_metrics(self, *_: Any, **__: Any) -> None: ...

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


def test_the_picture_reaches_the_loggers_and_the_folder_once(quiet_trainer: Build, tmp_path: Path) -> None:
    equation = Helmholtz()
    data = CollocationDataModule(equation, {"pde": 8, "boundary": 8}, steps_per_epoch=2, val_size=4)
    model = PINN(equation, TanhMLP(equation, hidden=[4]), partial(torch.optim.Adam, lr=0.1))
    loggers = [TensorBoardLogger(tmp_path, name="", version=""), TakesImages()]
    trainer = quiet_trainer(max_epochs=3, logger=loggers, callbacks=[SolutionPicture(tmp_path / "run")])
    trainer.fit(model, datamodule=data)
    with torch.no_grad():
        expected = solution_picture(equation, model(equation.grid().float())).permute(1, 2, 0).numpy()
    written = np.array(Image.open(tmp_path / "run" / "solution.png"))
    assert np.array_equal(written, expected)
    ((key, image, step),) = loggers[1].images
    assert (key, step) == ("solution", 6)
    assert np.array_equal(image, expected)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    (shown,) = events.Images("solution")
    assert (shown.step, shown.height, shown.width) == (6, *expected.shape[:2])


def test_without_a_folder_and_loggers_nothing_is_written(quiet_trainer: Build, tmp_path: Path) -> None:
    equation = Poisson()
    data = CollocationDataModule(equation, {"pde": 8, "boundary": 2}, steps_per_epoch=1, val_size=4)
    quiet_trainer(callbacks=[SolutionPicture()]).fit(PINN(equation, TanhMLP(equation, [4])), datamodule=data)
    assert list(tmp_path.rglob("*.png")) == []


def test_another_model_is_refused(quiet_trainer: Build) -> None:
    with pytest.raises(
        TypeError, match="SolutionPicture: the model should be a PINN, whose exact solution is known; got BoringModel"
    ):
        quiet_trainer(callbacks=[SolutionPicture()]).fit(boring())


def boring() -> L.LightningModule:
    from lightning.pytorch.demos.boring_classes import BoringModel

    return BoringModel()
