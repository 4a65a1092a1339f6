"""One ready-made view of a balanced training in TensorBoard's Custom Scalars tab."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

LAYOUT = {
    "Balancing": {
        "task weights w": ["Multiline", [r"^(gradnorm|balancing)/weight/"]],
        "gradient norms G of the tasks": ["Multiline", [r"^(gradnorm|balancing)/grad_norm/"]],
        "relative inverse training rates r": ["Multiline", [r"^gradnorm/rate/"]],
        "loss ratios L / L(0)": ["Multiline", [r"^gradnorm/loss_ratio/"]],
    },
    "Losses": {
        "training, by task": ["Multiline", [r"^train/loss/"]],
        "validation, by task": ["Multiline", [r"^val/loss/"]],
    },
}
"""Titles and charts; the tags are regular expressions, so that no task's name need be known."""


class TensorBoardDashboard(L.Callback):
    """Write the layout of the Custom Scalars tab: weights, gradient norms, training rates, loss ratios, losses.

    TensorBoard reads one layout for each run: do not write another one to the same run. Without a `TensorBoardLogger`
    it does nothing.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[TensorBoardDashboard()], logger=False)
    """

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(LAYOUT)
