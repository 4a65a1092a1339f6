"""Samples come out as they went in."""

from __future__ import annotations

import pytest
import torch

from lightning_gradnorm.experiments.loading import InMemoryDataModule, TaskTensors


def test_a_batch_is_its_samples() -> None:
    data = TaskTensors(torch.randn(6, 3), {"a": torch.randn(6, 2), "b": torch.arange(6)})
    inputs, targets = data.__getitems__([4, 0, 5])
    for position, sample in enumerate([4, 0, 5]):
        one, its_targets = data[sample]
        assert torch.equal(inputs[position], one)
        assert all(torch.equal(targets[task][position], its_targets[task]) for task in ("a", "b"))


def test_pixels_come_out_in_zero_to_one() -> None:
    images = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    assert TaskTensors(images, {})[0][0].tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert images.tolist() == [[0, 51, 255]]


def test_targets_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"targets\['a'\] should have as many samples as the inputs, 6; got 5"):
        TaskTensors(torch.zeros(6, 3), {"a": torch.zeros(5)})


def test_a_data_module_that_makes_no_splits_cannot_be_set_up() -> None:
    with pytest.raises(NotImplementedError, match="make_splits should be overridden"):
        InMemoryDataModule(1, 1, 1, 1, 0, 0).setup()
