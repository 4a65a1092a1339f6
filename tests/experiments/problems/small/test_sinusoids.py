"""The sinusoids follow their formula, and their relatedness is measured."""

from __future__ import annotations

import csv
import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_gradnorm.experiments.problems.small import SinusoidsDataModule


def _made(**options) -> SinusoidsDataModule:
    data = SinusoidsDataModule(**{"train_size": 300, "val_size": 50, "test_size": 80, "input_dim": 8, **options})
    data.setup()
    return data


def test_batches_have_two_columns_of_targets() -> None:
    data = SinusoidsDataModule()
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        inputs, targets = next(iter(loader))
        assert inputs.shape == (100, 100)
        assert inputs.dtype == torch.float32
        assert list(targets) == list(data.tasks) == ["first", "second"]
        assert all(target.shape == (100, 1) and target.dtype == torch.float32 for target in targets.values())
    assert (len(data.train_data), len(data.val_data), len(data.test_data)) == (10_000, 1_000, 1_000)


@pytest.mark.parametrize("p", [-1.0, -0.4, 0.0, 0.8, 1.0])
def test_directions_have_length_c_and_cosine_p(p: float) -> None:
    first, second = SinusoidsDataModule(scale=0.3, correlation=p).directions
    assert math.hypot(*first) == pytest.approx(0.3)
    assert math.hypot(*second) == pytest.approx(0.3)
    assert first @ second / 0.09 == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize("given", [{}, {"alphas": [1.0, 2.0, -0.5], "betas": [0.0, 0.3, 1.0]}], ids=["drawn", "given"])
def test_targets_are_the_formula(given: dict) -> None:
    data = _made(terms=3, noise=0.0, **given)
    if given:
        assert data.alphas.tolist() == given["alphas"]
    for w, target in zip(data.directions, data.val_data.targets.values(), strict=True):
        for x, y in zip(data.val_data.inputs.double().numpy(), target[:, 0].tolist(), strict=True):
            projection = sum(a * b for a, b in zip(w, x, strict=True))
            waves = sum(math.sin(a * projection + b) for a, b in zip(data.alphas, data.betas, strict=True))
            assert y == pytest.approx(projection + waves, rel=1e-5, abs=1e-6)


def test_noise_is_drawn_for_each_sample_and_task() -> None:
    noisy, clean = (_made(noise=noise, train_size=20_000).train_data.targets for noise in (0.2, 0.0))
    residuals = torch.cat([noisy[task] - clean[task] for task in noisy], dim=1).numpy()
    assert residuals.std(axis=0) == pytest.approx([0.2, 0.2], rel=0.03)
    assert residuals.mean(axis=0) == pytest.approx([0, 0], abs=0.005)
    assert np.corrcoef(residuals.T)[0, 1] == pytest.approx(0, abs=0.03)


def test_label_correlation_is_pearsons_of_the_training_labels() -> None:
    data = _made()
    first, second = (data.train_data.targets[task][:, 0].double().numpy() for task in data.tasks)
    centered = (first - first.mean()) * (second - second.mean())
    assert data.label_correlation == pytest.approx(centered.mean() / first.std() / second.std())


def test_without_sines_and_noise_the_labels_correlate_by_p() -> None:
    data = _made(alphas=[0.0], betas=[0.0], terms=1, noise=0.0, correlation=0.6, train_size=50_000)
    assert data.label_correlation == pytest.approx(0.6, abs=0.01)


def test_closer_directions_make_more_correlated_labels() -> None:
    correlations = [_made(correlation=p, train_size=5_000).label_correlation for p in (0.0, 0.5, 0.9, 1.0)]
    assert correlations == sorted(correlations)


def test_the_r2_ceiling_is_the_score_of_the_noiseless_function() -> None:
    noisy, clean = _made(test_size=20_000), _made(test_size=20_000, noise=0.0)
    for task, ceiling in noisy.r2_ceiling.items():
        y, perfect = noisy.test_data.targets[task], clean.test_data.targets[task]
        assert ceiling == pytest.approx(1 - ((y - perfect) ** 2).mean().item() / y.var().item(), abs=0.005)
    assert clean.r2_ceiling == {"first": 1.0, "second": 1.0}


def test_same_seed_same_bytes_other_seed_other_bytes() -> None:
    def tensors(seed: int) -> list[bytes]:
        data = _made(seed=seed)
        splits = data.train_data, data.val_data, data.test_data
        return [t.numpy().tobytes() for split in splits for t in (split.inputs, *split.targets.values())]

    assert tensors(4) == tensors(4)
    assert not set(tensors(4)) & set(tensors(5))


def test_no_sample_is_in_two_splits() -> None:
    data = _made()
    rows = [
        {row.numpy().tobytes() for row in split.inputs} for split in (data.train_data, data.val_data, data.test_data)
    ]
    assert len(set.union(*rows)) == 300 + 50 + 80


class Flat(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return ((self.layer(inputs) - targets["first"]) ** 2).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_fit_logs_the_label_correlation_once(quiet_trainer, tmp_path) -> None:
    data = SinusoidsDataModule(train_size=300, val_size=50, test_size=80, input_dim=8)
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(logger=logger, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    trainer.fit(Flat(), data)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = [row for row in csv.DictReader(file) if row["data/label_correlation"]]
    assert [(row["step"], float(row["data/label_correlation"])) for row in logged] == [("0", data.label_correlation)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"correlation": 1.2}, r"SinusoidsDataModule: correlation should be in \[-1, 1\], a cosine; got 1.2"),
        ({"correlation": math.nan}, "correlation should be in"),
        ({"scale": 0.0}, "scale should be a positive number; got 0.0"),
        ({"scale": math.inf}, "scale should be a positive number; got inf"),
        ({"noise": -0.1}, "noise should be a standard deviation, zero or positive; got -0.1"),
        ({"terms": 0}, "terms should be at least 1; got 0"),
        ({"input_dim": 1}, "input_dim should be at least 2; got 1"),
        ({"alphas": [1.0, 2.0]}, r"alphas should have one number for each of the 5 terms; got 2: \[1.0, 2.0\]"),
        ({"betas": [1.0]}, "betas should have one number for each of the 5 terms; got 1"),
    ],
)
def test_wrong_argument_is_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SinusoidsDataModule(**wrong)


def test_frequencies_should_be_numbers() -> None:
    with pytest.raises(TypeError, match="SinusoidsDataModule: betas should be a list of numbers; got 3"):
        SinusoidsDataModule(betas=3)
