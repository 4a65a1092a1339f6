"""When a step's values will be written anywhere."""

from __future__ import annotations

import lightning as L


def is_logged_step(trainer: L.Trainer) -> bool:
    """Say whether what is logged in this training batch will reach a logger, or be the last of an epoch or of the training.

    Logging a value costs Lightning a tenth of a millisecond, a hundred times what GradNorm needs to compute it, and in most
    steps nobody looks at it: loggers are written every ``log_every_n_steps``, monitors are read at the end of an epoch.
    """
    connector = trainer._logger_connector  # as Lightning's own LearningRateMonitor asks
    is_last = trainer.is_last_batch or 0 <= trainer.max_steps <= trainer.global_step + 1
    written = connector.should_update_logs or trainer.fast_dev_run or is_last  # type: ignore[attr-defined]
    return bool(written) and not trainer.barebones
