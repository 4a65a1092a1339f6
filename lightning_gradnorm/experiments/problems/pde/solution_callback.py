"""Draws the solution, the reference and the error in one picture at the end of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from typing_extensions import override

from lightning_gradnorm.callbacks.logging import logger_step
from lightning_gradnorm.callbacks.packages import is_one_of, works_in_both_packages
from lightning_gradnorm.experiments.problems.pde.module import PINN
from lightning_gradnorm.experiments.problems.pde.pictures import solution_picture
from lightning_gradnorm.experiments.report.collect import PICTURE

NAME = "solution"


@works_in_both_packages
class SolutionPicture(L.Callback):
    """Draws a `PINN`'s solution, the reference and the error when training ends.

    The picture goes to each logger that accepts images: TensorBoard, and those with a ``log_image`` (Weights & Biases). With
    a folder, it is also saved there as ``solution.png``, where the report finds it.

    Args:
        folder: The run's folder; ``None`` to write no file.

    Raises:
        TypeError: At the start of training, if the model is not a `PINN`.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[SolutionPicture()], logger=False)
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pinn(pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        pinn = self._pinn(pl_module)
        parameter = next(pinn.parameters())
        with torch.no_grad():
            solution = pinn.network(pinn.equation.grid().to(parameter))
        picture = solution_picture(pinn.equation, solution)
        pixels = picture.permute(1, 2, 0).contiguous().numpy()
        for logger in trainer.loggers:
            self._log(logger, picture, pixels, logger_step(trainer))
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(self.folder / PICTURE, optimize=True)

    def _log(self, logger: Any, picture: torch.Tensor, pixels: Any, step: int) -> None:
        if is_one_of(logger, "TensorBoardLogger"):
            logger.experiment.add_image(NAME, picture, step)
        elif callable(getattr(logger, "log_image", None)):
            logger.log_image(NAME, [pixels], step=step)

    def _pinn(self, module: L.LightningModule) -> PINN:
        if not isinstance(module, PINN):
            raise TypeError(
                f"SolutionPicture: the model should be a PINN, whose exact solution is known; got {type(module).__name__}. "
                "Leave the callback out."
            )
        return module
