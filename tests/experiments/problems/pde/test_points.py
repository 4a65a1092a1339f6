"""Collocation points are where they should be, follow from the seed, and are shared by the ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gradnorm.experiments.problems.pde import (
    Burgers,
    CollocationDataModule,
    Equation,
    Helmholtz,
    KirchhoffPlate,
    Poisson,
)
from lightning_gradnorm.experiments.problems.pde.points import StepSampler

EQUATIONS = {"poisson": Poisson, "helmholtz": Helmholtz, "burgers": Burgers, "plate": KirchhoffPlate}


def made(equation: Equation, **options) -> CollocationDataModule:
    points = {task: 24 + 8 * number for number, task in enumerate(equation.tasks)}
    data = CollocationDataModule(equation, **{"points": points, "steps_per_epoch": 3, "val_size": 20, **options})
    data.setup()
    return data


def steps(data: CollocationDataModule, epoch: int = 0) -> list[dict[str, Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[task], other[task]) for task in one)


@pytest.mark.parametrize("name", EQUATIONS)
def test_points_lie_inside_and_on_the_edges(name: str) -> None:
    equation = EQUATIONS[name]()
    data = made(equation)
    lower, upper = torch.tensor(equation.lower), torch.tensor(equation.upper)
    for batch in (*steps(data), *data.val_dataloader(), *data.test_dataloader()):
        inside = batch["pde"]
        assert ((inside > lower) & (inside < upper)).all()
        for task in equation.tasks[1:]:
            points = batch[task]
            assert ((points >= lower) & (points <= upper)).all()
            at_edge = (points == lower) | (points == upper)
            if task == "initial":
                at_edge = points[:, 1:] == 0
            elif name == "burgers":
                at_edge = at_edge[:, :1]
            assert at_edge.any(1).all()
    assert batch["reference"][0].shape == (np.prod(equation.grid_shape), len(equation.lower))


@pytest.mark.parametrize("name", ["helmholtz", "plate"])
def test_each_edge_has_as_many_points(name: str) -> None:
    equation = EQUATIONS[name]()
    (points,) = [batch["boundary"] for batch in made(equation, resample=False, steps_per_epoch=1).train_dataloader()]
    for k in range(2):
        for end in (equation.lower[k], equation.upper[k]):
            assert (points[:, k] == end).sum() == len(points) // 4


def test_the_points_inside_are_a_latin_hypercube() -> None:
    points = Helmholtz().inside(50, np.random.default_rng(0))
    slices = np.floor((points + 1) / 2 * 50).astype(int)
    assert np.array_equal(np.sort(slices, axis=0), np.stack([np.arange(50)] * 2, axis=1))


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("name", EQUATIONS)
def test_the_same_seed_draws_the_same_points_and_another_seed_others(name: str, resample: bool) -> None:
    first, again, other = (made(EQUATIONS[name](), seed=seed, resample=resample) for seed in (4, 4, 5))
    for one, two, three in zip(steps(first), steps(again), steps(other), strict=True):
        assert same(one, two)
        assert not any(torch.equal(one[task], three[task]) for task in one if (name, task) != ("poisson", "boundary"))
    val, val_again, val_other = (next(iter(data.val_dataloader()))["reference"][0] for data in (first, again, other))
    assert torch.equal(val, val_again)
    assert not torch.equal(val, val_other)


def test_training_and_validation_and_test_have_different_points() -> None:
    data = made(Helmholtz(), points={"pde": 20, "boundary": 20})
    batches = [*[*data.train_dataloader()][:1], *data.val_dataloader(), *data.test_dataloader()]
    for task in data.tasks:
        found = torch.cat([batch[task] for batch in batches])
        assert len(torch.unique(found, dim=0)) == 60


def test_points_are_others_in_each_step_of_each_epoch_or_always_the_same() -> None:
    fresh, fixed = made(Burgers()), made(Burgers(), resample=False)
    found = torch.cat([batch["pde"] for epoch in range(3) for batch in steps(fresh, epoch)])
    assert len(torch.unique(found, dim=0)) == 3 * 3 * 24
    (first, *others) = [batch for epoch in range(3) for batch in steps(fixed, epoch)]
    assert len(others) == 8
    assert all(same(first, one) for one in others)
    assert same(first, steps(fresh)[0])  # the first step's


def test_the_exact_solution_is_computed_in_double_precision() -> None:
    data = made(Burgers())
    for batch in (*data.val_dataloader(), *data.test_dataloader()):
        points, values = batch["reference"]
        assert points.dtype == values.dtype == torch.float32
        near = Burgers().reference(points.double())
        # The points are rounded, and the solution is as steep as 152.
        assert (values - near).abs().max().item() < 152 * 2**-24 + 1e-6


def test_ranks_share_the_points_of_each_step() -> None:
    data = made(KirchhoffPlate(), points={"pde": 24, "boundary": 9, "moment": 8})
    whole = steps(data, epoch=2)
    parts = []
    for rank in range(2):
        sampler = StepSampler(data.train_data, num_replicas=2, rank=rank)
        sampler.set_epoch(2)
        assert len(sampler) == 3
        parts.append([data.train_data.__getitems__([place]) for place in sampler])
    for batch, one, two in zip(whole, *parts, strict=True):
        for task in data.tasks:
            assert abs(len(one[task]) - len(two[task])) <= 1
            together = torch.cat([one[task], two[task]])
            assert torch.equal(torch.unique(together, dim=0), torch.unique(batch[task], dim=0))


def test_a_loader_continues_with_the_step_after_the_last() -> None:
    data = made(Helmholtz())
    whole = steps(data, epoch=1)
    loader = data.train_dataloader()
    loader.load_state_dict({**loader.state_dict(), "epoch": 1, "batches": 2})
    (last,) = list(loader)
    assert same(last, whole[2])
    assert not same(last, whole[0])


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"points": {"pde": 8}}, ValueError, "points should give a number for 'boundary', a task of Helmholtz"),
        ({"points": {"pde": 8, "boundry": 8}}, ValueError, "names 'boundry', .* did you mean 'boundary'"),
        ({"points": {"pde": 8, "boundary": 1}}, ValueError, r"points\['boundary'\] should be at least 2; got 1"),
        ({"points": {"pde": 8.0, "boundary": 4}}, TypeError, r"points\['pde'\] should be an integer; got 8.0"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch should be at least 1; got 0"),
        ({"val_size": 1}, ValueError, "val_size should be at least 2; got 1"),
        ({"seed": -1}, ValueError, "seed should be at least 0; got -1"),
        ({"equation": "helmholtz"}, TypeError, "equation should be an Equation; got str"),
    ],
)
def test_wrong_options_are_named(options: dict, error: type[Exception], told: str) -> None:
    given = {"equation": Helmholtz(), "points": {"pde": 8, "boundary": 4}, **options}
    with pytest.raises(error, match=f"CollocationDataModule: .*{told}"):
        CollocationDataModule(**given)
