"""Forecasting models of other projects; see `projects`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from textbook import Forward
from third_party.project import QUIET, STEPS, Project, import_lightning, trainer
from torch import Tensor

# ---- pytorch-forecasting ---------------------------------------------------------------------------------------------


def tft(width: int = 16, batch: int = 16) -> Project:
    """A temporal fusion transformer with two targets, whose MultiLoss keeps its metrics in a plain list."""

    def fit(callbacks: Sequence[Any], *, steps: int = STEPS, **options: Any) -> Any:
        L = import_lightning()
        import numpy as np
        import pandas as pd
        from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
        from pytorch_forecasting.metrics import MAE, RMSE, MultiLoss

        noise, length = np.random.default_rng(0), 60
        series = 1 + batch * steps // 40
        rows = [pd.DataFrame({"time": range(length), "series": str(s)}) for s in range(series)]
        frame = pd.concat(rows, ignore_index=True)
        frame["volume"] = np.sin(frame["time"] / 5) + 0.1 * noise.standard_normal(len(frame))
        frame["price"] = 10 * np.cos(frame["time"] / 7) + noise.standard_normal(len(frame))
        data = TimeSeriesDataSet(
            frame,
            time_idx="time",
            target=["volume", "price"],
            group_ids=["series"],
            max_encoder_length=12,
            max_prediction_length=4,
            time_varying_known_reals=["time"],
            time_varying_unknown_reals=["volume", "price"],
        )
        model = TemporalFusionTransformer.from_dataset(
            data,
            hidden_size=width,
            hidden_continuous_size=8,
            output_size=[1, 1],
            loss=MultiLoss([MAE(), RMSE()], weights=[1.0, 0.5]),
            learning_rate=0.01,
            log_interval=0,
        )
        batches = data.to_dataloader(train=True, batch_size=batch)
        trainer(L, callbacks, **{"limit_train_batches": steps, **options}).fit(model, batches)
        return model

    def losses(model: Any, batch: Any) -> Forward:
        x, (targets, _) = batch
        volume, price = (p.squeeze(-1) - target for p, target in zip(model(x)["prediction"], targets, strict=True))
        return Forward({"volume": volume.abs().mean(), "price": price.square().mean().sqrt()})

    return Project(
        ["pytorch_forecasting"],
        {"tasks": ["volume", "price"], "losses_from": {"volume": "loss.metrics.0", "price": "loss.metrics.1"}},
        fit,
        losses,
        coefficients={"volume": 1.0, "price": 0.5},
        found="W = pre_output_gate_norm.glu.fc.weight (32 × 16), heads: price → output_layer.1, volume → output_layer.0, "
        "losses: from loss.metrics.0, loss.metrics.1",
    )


# ---- neuralforecast --------------------------------------------------------------------------------------------------


def neuralforecast(width: int = 32, batch: int = 32) -> Project:
    """An MLP in `pytorch_lightning` with a loss of two terms; the package copies its models and their callbacks."""

    def fit(callbacks: Sequence[Any], *, steps: int = STEPS, **options: Any) -> Any:
        import_lightning("pytorch_lightning")
        import numpy as np
        import pandas as pd
        from neuralforecast import NeuralForecast
        from neuralforecast.losses.pytorch import MAE, BasePointLoss
        from neuralforecast.models import MLP

        class LevelAndChange(BasePointLoss):
            def __init__(self) -> None:
                super().__init__(outputsize_multiplier=1, output_names=[""])

            def terms(self, y: Tensor, y_hat: Tensor) -> dict[str, Tensor]:
                error = y_hat - y
                return {"level": error.square().mean(), "change": 5 * error.diff(dim=1).abs().mean()}

            def __call__(self, y: Tensor, y_hat: Tensor, mask: Any = None, y_insample: Any = None) -> Tensor:
                return sum(self.terms(y, y_hat).values())

        noise, length = np.random.default_rng(0), 80
        days = pd.date_range("2026-01-01", periods=length)
        rows = [
            pd.DataFrame({"unique_id": str(i), "ds": days, "y": noise.standard_normal(length).cumsum()})
            for i in range(4)
        ]
        options = {"accelerator": "cpu", "enable_model_summary": False, **QUIET, **options}
        model = MLP(
            h=4,
            input_size=12,
            hidden_size=width,
            loss=LevelAndChange(),
            valid_loss=MAE(),
            max_steps=steps,
            windows_batch_size=batch,
            callbacks=list(callbacks),
            **options,
        )
        forecast = NeuralForecast([model], freq="D")
        forecast.fit(pd.concat(rows))
        return forecast.models[0]

    def losses(model: Any, batch: Any) -> Forward:
        parts: dict[str, Tensor] = {}
        terms = type(model.loss).terms

        def note(y: Tensor, y_hat: Tensor) -> dict[str, Tensor]:
            parts.update(terms(model.loss, y, y_hat))
            return parts

        model.loss.__dict__["terms"], model.log = note, lambda *_, **__: None
        model.training_step(batch, 0)
        return Forward(dict(parts))

    return Project(
        ["neuralforecast"],
        {"tasks": ["level", "change"], "losses_from": "loss.terms"},
        fit,
        losses,
        found="W = out.weight (4 × 32), heads: none, losses: from loss.terms",
    )
