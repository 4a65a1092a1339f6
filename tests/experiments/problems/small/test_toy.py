"""The toy problem matches the paper, number by number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_gradnorm.experiments.problems.small import TEN_SIGMAS, ToyDataModule

SMALL = {"train_size": 40, "val_size": 20, "test_size": 20, "batch_size": 10}


def _made(**options) -> ToyDataModule:
    data = ToyDataModule(**{**SMALL, **options})
    data.setup()
    return data


def _bytes(data: ToyDataModule) -> list[bytes]:
    splits = data.train_data, data.val_data, data.test_data
    return [t.numpy().tobytes() for split in splits for t in (split.inputs, *split.targets.values())]


def test_batches_have_the_papers_shapes() -> None:
    data = _made()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        inputs, targets = next(iter(loader))
        assert inputs.shape == (10, 250)
        assert inputs.dtype == torch.float32
        assert tuple(targets) == data.tasks == ("task_0", "task_1")
        assert all(target.shape == (10, 100) and target.dtype == torch.float32 for target in targets.values())
    assert (len(data.train_data), len(data.val_data), len(data.test_data)) == (40, 20, 20)


@pytest.mark.parametrize("inputs", ["uniform", "normal", "unit"])
def test_targets_are_equation_3(inputs: str) -> None:
    data = _made(sigmas=(2.0, 50.0, 7.0), input_dim=6, output_dim=3, inputs=inputs)
    for sigma, matrix, target in zip(data.sigmas, data.matrices, data.train_data.targets.values(), strict=True):
        for row, x in enumerate(data.train_data.inputs.double().numpy()):
            for column in range(3):
                by_hand = sigma * math.tanh(sum(matrix[column, k] * x[k] for k in range(6)))
                assert target[row, column] == pytest.approx(by_hand, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("spread", "shared", "own"), [("std", 10.0, 3.5), ("variance", 10**0.5, 3.5**0.5)])
def test_spread_is_read_as_asked(spread: str, shared: float, own: float) -> None:
    matrices = ToyDataModule(sigmas=(1.0, 2.0), spread=spread).matrices
    assert np.std(matrices[0]) == pytest.approx(math.hypot(shared, own), rel=0.02)
    # What is left of the difference is two independent epsilons.
    assert np.std(matrices[0] - matrices[1]) == pytest.approx(own * math.sqrt(2), rel=0.02)
    correlation = np.corrcoef(matrices[0].ravel(), matrices[1].ravel())[0, 1]
    assert correlation == pytest.approx(shared**2 / (shared**2 + own**2), abs=0.01)


def test_inputs_have_the_distribution_asked_for() -> None:
    uniform, normal, unit = (_made(inputs=name).train_data.inputs for name in ("uniform", "normal", "unit"))
    assert uniform.min() >= 0
    assert uniform.max() <= 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (normal.mean().item(), normal.std().item()) == pytest.approx((0, 1), abs=0.03)
    assert torch.allclose(unit.norm(dim=1), torch.ones(40))
    assert unit.min() < 0


def test_tasks_differ_in_scale_by_sigma() -> None:
    targets = _made(sigmas=(1.0, 100.0)).train_data.targets
    assert targets["task_0"].abs().max() <= 1
    assert 99 < targets["task_1"].abs().max() <= 100


def test_function_of_a_task_does_not_depend_on_the_other_tasks() -> None:
    two, ten = _made(sigmas=TEN_SIGMAS[:2]), _made(sigmas=TEN_SIGMAS)
    assert ten.tasks == tuple(f"task_{i}" for i in range(10))
    assert torch.equal(two.train_data.inputs, ten.train_data.inputs)
    for task in two.tasks:
        assert torch.equal(two.test_data.targets[task], ten.test_data.targets[task])


def test_test_split_does_not_depend_on_the_training_size() -> None:
    assert torch.equal(_made(train_size=10).test_data.inputs, _made(train_size=40).test_data.inputs)


def test_same_seed_same_bytes_other_seed_other_bytes() -> None:
    assert _bytes(_made()) == _bytes(_made())
    assert not set(_bytes(_made(seed=0))) & set(_bytes(_made(seed=1)))


def test_no_sample_is_in_two_splits() -> None:
    data = _made()
    rows = [
        {row.numpy().tobytes() for row in split.inputs} for split in (data.train_data, data.val_data, data.test_data)
    ]
    assert [len(r) for r in rows] == [40, 20, 20]
    assert len(set.union(*rows)) == 80


def test_setup_makes_the_data_once() -> None:
    data = _made()
    before = data.train_data
    data.setup("fit")
    data.setup("test")
    assert data.train_data is before


def test_data_before_setup_is_a_clear_error() -> None:
    with pytest.raises(RuntimeError, match=r"ToyDataModule: setup\(\) creates the data"):
        ToyDataModule().train_dataloader()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"sigmas": [1.0]}, ValueError, r"ToyDataModule: sigmas should be at least two positive numbers; got \[1.0\]"),
        ({"sigmas": 5}, TypeError, "ToyDataModule: sigmas should be a list of numbers; got 5"),
        ({"sigmas": [1.0, "a"]}, TypeError, r"sigmas should be a list of numbers; got \[1.0, 'a'\]"),
        ({"sigmas": [1.0, -2.0]}, ValueError, r"sigmas should be at least two positive numbers; got \[1.0, -2.0\]"),
        ({"sigmas": [1.0, math.nan]}, ValueError, "sigmas should be at least two positive numbers"),
        ({"spread": "varaince"}, ValueError, r"one of 'std', 'variance'; got 'varaince'. Did you mean 'variance'\?"),
        ({"inputs": "gauss"}, ValueError, r"inputs should be one of 'uniform', 'normal', 'unit'; got 'gauss'"),
        ({"train_size": 0}, ValueError, "ToyDataModule: train_size should be at least 1; got 0"),
        ({"input_dim": 0}, ValueError, "input_dim should be at least 1; got 0"),
        ({"seed": -1}, ValueError, "seed should be at least 0; got -1"),
        ({"num_workers": -1}, ValueError, "num_workers should be at least 0; got -1"),
        ({"batch_size": 2.5}, TypeError, "batch_size should be an integer; got 2.5"),
        ({"test_size": True}, TypeError, "test_size should be an integer; got True"),
    ],
)
def test_wrong_argument_is_named(wrong: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ToyDataModule(**wrong)
