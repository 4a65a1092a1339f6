"""The task weights over time as one image, for loggers that plot each scalar separately."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from typing_extensions import override

from lightning_gradnorm._messages import check, is_integer
from lightning_gradnorm.callbacks.logging import is_logged_step, log_image, logger_step, loggers_of_images

COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (185, 131, 0), (47, 155, 214), (90, 90, 90))
"""Distinct for color-blind readers. They repeat from the eighth task on."""

_NAME = re.compile(r"(gradnorm|balancing)/weight/(.+)")
_MOST = 600
"""Most points of a line. Beyond that, every second point is dropped."""

Curves = dict[str, list[tuple[int, float]]]


class WeightsImage(L.Callback):
    """Logs the task weights so far as an image to every logger that accepts images.

    The image is called ``gradnorm/weights`` or ``balancing/weights``. It is drawn every N epochs and at the end of training.

    Args:
        every_n_epochs: number of epochs between two images.

    Raises:
        ValueError: ``every_n_epochs`` is not a positive integer.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[WeightsImage(every_n_epochs=10)], logger=False)
    """

    def __init__(self, every_n_epochs: int = 5) -> None:
        check(
            "WeightsImage", is_integer(every_n_epochs, least=1), "every_n_epochs", "a positive integer", every_n_epochs
        )
        self.every_n_epochs = every_n_epochs
        self.curves: Curves = {}
        self._prefix = "gradnorm"
        self._is_new = False

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not is_logged_step(trainer) or not loggers_of_images(trainer):
            return
        metrics = trainer.callback_metrics
        found: list[tuple[str, str, Tensor]] = [
            (match[1], match[2], metrics[match[0]]) for match in map(_NAME.fullmatch, metrics) if match
        ]
        if not found:
            return
        values = torch.stack(
            [value.detach().double() for *_, value in found]
        ).tolist()  # a single synchronization with the GPU
        self._prefix = found[0][0]
        for one, value in zip(found, values, strict=True):
            curve = self.curves.setdefault(one[1], [])
            curve.append((logger_step(trainer), value))
            if len(curve) > _MOST:
                del curve[1::2]
        self._is_new = True

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._show(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(trainer)

    def _show(self, trainer: L.Trainer) -> None:
        if self._is_new and trainer.is_global_zero:
            log_image(trainer, f"{self._prefix}/weights", drawn(self.curves), logger_step(trainer))
        self._is_new = False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"curves": {task: [list(point) for point in curve] for task, curve in self.curves.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = {task: [(step, value) for step, value in curve] for task, curve in state_dict["curves"].items()}


def drawn(curves: Mapping[str, Sequence[tuple[int, float]]], *, width: int = 720, height: int = 360) -> Tensor:
    """Return the curves as an image with an axis from 0, and the names and last values of the tasks.

    Shape: RGB, uint8 ``(3, height, width)``.

    Example:
        >>> drawn({"seg": [(0, 1.0), (10, 0.5)], "depth": [(0, 1.0), (10, 1.5)]}).shape
        torch.Size([3, 360, 720])
    """
    font = ImageFont.load_default(14)
    picture = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    left, right, top, bottom = 48, width - 200, 16, height - 32
    points = [point for curve in curves.values() for point in curve]
    last, most = (
        max((step for step, _ in points), default=0) or 1,
        max((value for _, value in points), default=0) or 1.0,
    )

    def place(step: int, value: float) -> tuple[float, float]:
        return left + (right - left) * step / last, bottom - (bottom - top) * value / most

    for share in (0.0, 0.5, 1.0):
        (_, y), (x, _) = place(0, share * most), place(int(share * last), 0)
        draw.line([(left, y), (right, y)], fill=(217, 220, 225))
        draw.text((left - 6, y), f"{share * most:.3g}", font=font, fill=(90, 97, 108), anchor="rm")
        draw.text((x, bottom + 6), str(int(share * last)), font=font, fill=(90, 97, 108), anchor="ma")
    for number, (task, curve) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        draw.line([place(*point) for point in curve], fill=color, width=2)
        row = top + 18 * number
        draw.line([(right + 12, row + 8), (right + 32, row + 8)], fill=color, width=3)
        name = task if len(task) <= 14 else f"{task[:13]}~"
        draw.text((right + 40, row), f"{name} {curve[-1][1]:.3g}", font=font, fill=(27, 29, 33))
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(height, width, 3).permute(2, 0, 1)
