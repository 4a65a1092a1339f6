"""Residuals vanish for the exact solutions, are right for other functions, and the references agree with other methods."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gradnorm.experiments.problems.pde import Burgers, Equation, Helmholtz, KirchhoffPlate, Poisson
from lightning_gradnorm.experiments.problems.pde.derivatives import (
    directional_derivatives,
    gradient,
    second_derivatives,
)

NU = 0.01 / math.pi
EQUATIONS: dict[str, Equation] = {
    "poisson": Poisson(),
    "poisson, three half waves": Poisson(k=3),
    "helmholtz": Helmholtz(),
    "helmholtz, other waves": Helmholtz(k=2.5, waves=(3, 2)),
    "burgers": Burgers(),
    "burgers, thick": Burgers(viscosity=0.05),
    "plate": KirchhoffPlate(),
    "plate, another": KirchhoffPlate(side=2.0, rigidity=3.0, load=1.5, poisson_ratio=0.3),
}


def drawn(equation: Equation, task: str, count: int = 120) -> Tensor:
    return torch.from_numpy(equation.draw(task, count, np.random.default_rng(3)))


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_exact_solution_satisfies_the_equation_and_its_conditions(name: str) -> None:
    equation = EQUATIONS[name]
    for task in equation.tasks:
        residual = equation.residual(task, equation.reference, drawn(equation, task))
        assert residual.shape == (120,)
        assert residual.abs().max().item() < 1e-10


@pytest.mark.parametrize("name", EQUATIONS)
def test_no_other_function_does(name: str) -> None:
    equation = EQUATIONS[name]

    def other(points: Tensor) -> Tensor:
        return equation.reference(points) + 0.1 * (points**4).sum(-1, keepdim=True) * points[..., :1].cos()

    for task in equation.tasks:
        points = drawn(equation, task)
        losses = equation.losses(other, {one: drawn(equation, one) for one in equation.tasks})
        squares = equation.residual(task, other, points) ** 2
        assert losses[task].item() == pytest.approx(squares.mean().item(), rel=1e-12)
        assert losses[task].item() > 1e-6


X, Y = slice(0, 1), slice(1, 2)
CASES: dict[str, tuple[Equation, str, Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "poisson": (Poisson(), "pde", lambda p: p**3, lambda x: 6 * x + math.pi**2 * torch.sin(math.pi * x)),
    "helmholtz": (
        Helmholtz(k=2.0, waves=(1, 4)),
        "pde",
        lambda p: p[..., X] ** 3 * p[..., Y] ** 2,
        lambda x, y: (
            6 * x * y**2
            + 2 * x**3
            + 4 * x**3 * y**2
            - (4 - 17 * math.pi**2) * torch.sin(math.pi * x) * torch.sin(4 * math.pi * y)
        ),
    ),
    "burgers": (
        Burgers(),
        "pde",
        lambda p: p[..., X] ** 2 * p[..., Y],
        lambda x, t: x**2 + 2 * x**3 * t**2 - 2 * NU * t,
    ),
    "burgers at first": (
        Burgers(),
        "initial",
        lambda p: p[..., X] ** 2 + p[..., Y],
        lambda x, t: x**2 + torch.sin(math.pi * x),
    ),
    "burgers at the walls": (Burgers(), "boundary", lambda p: p[..., X] * p[..., Y], lambda x, t: x * t),
    "plate": (
        KirchhoffPlate(side=2.0, rigidity=3.0, load=1.5),
        "pde",
        lambda p: p[..., X] ** 4 * p[..., Y] ** 2 + p[..., Y] ** 4 * p[..., X],
        lambda x, y: (
            3 * (24 * y**2 + 48 * x**2 + 24 * x) - 1.5 * torch.sin(math.pi * x / 2) * torch.sin(math.pi * y / 2)
        ),
    ),
    "plate's edges": (KirchhoffPlate(), "boundary", lambda p: p[..., X] + p[..., Y] ** 2, lambda x, y: x + y**2),
    "plate's moments": (
        KirchhoffPlate(side=2.0, rigidity=3.0, poisson_ratio=0.3),
        "moment",
        lambda p: p[..., X] ** 2 + 5 * p[..., Y] ** 2,
        # Across the edge once, along it with Poisson's ratio.
        lambda x, y: 3 * (10 + 0.3 * 2 + (2 + 0.3 * 10 - 10 - 0.3 * 2) * ((x == 0) | (x == 2)).double()),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_residual_of_a_polynomial_is_the_one_by_hand(case: str) -> None:
    equation, task, function, by_hand = CASES[case]
    points = drawn(equation, task)
    expected = by_hand(*points.T)
    torch.testing.assert_close(equation.residual(task, function, points), expected, rtol=1e-10, atol=1e-9)
    assert expected.std() > 0


def trapezoid(x: float, t: float, nu: float, nodes: int = 40_001) -> float:
    """The Cole–Hopf integral on a fine uniform grid, in plain NumPy."""
    eta = np.linspace(-40, 40, nodes) * math.sqrt(2 * nu * t)
    exponent = -np.cos(math.pi * (x - eta)) / (2 * math.pi * nu) - eta**2 / (4 * nu * t)
    weights = np.exp(exponent - exponent.max())
    return float(-(np.sin(math.pi * (x - eta)) * weights).sum() / weights.sum())


@pytest.mark.parametrize("nu", [NU, 0.002, 0.1])
def test_the_cole_hopf_integral_is_that_of_another_quadrature(nu: float) -> None:
    places = [(x, t) for x in (-0.9, -0.3, -0.01, 1e-3, 0.02, 0.5) for t in (0.01, 0.3, 0.7, 1.0)]
    found = Burgers(viscosity=nu).reference(torch.tensor(places, dtype=torch.float64)).flatten().tolist()
    assert found == pytest.approx([trapezoid(x, t, nu) for x, t in places], abs=1e-10)


def test_the_cole_hopf_integral_agrees_with_finite_differences() -> None:
    nu, cells = 0.02, 800
    x = np.linspace(-1, 1, cells + 1)
    u, h = -np.sin(math.pi * x), 2 / cells
    step = 0.4 * h * h / nu
    steps = math.ceil(0.5 / step)
    for _ in range(steps):
        flux = np.zeros_like(u)
        flux[1:-1] = -(u[2:] ** 2 - u[:-2] ** 2) / (4 * h) + nu * (u[2:] - 2 * u[1:-1] + u[:-2]) / h**2
        u = u + (0.5 / steps) * flux
    points = torch.tensor(np.stack([x, np.full_like(x, 0.5)], axis=1))
    assert np.abs(Burgers(viscosity=nu).reference(points).numpy()[:, 0] - u).max() < 2e-3


def test_the_shock_has_its_published_slope() -> None:
    # Basdevant et al., 1986: the largest slope is 152.00516 at t = 0.5105.
    points = torch.tensor([[0.0, 1.6037 / math.pi]], dtype=torch.float64, requires_grad=True)
    slope = gradient(Burgers().reference(points), points)[0, 0]
    assert slope.item() == pytest.approx(-152.00516, abs=1e-3)


def test_the_plates_deflection_is_naviers() -> None:
    found = KirchhoffPlate().reference(torch.tensor([[5.0, 5.0], [2.5, 5.0], [0.0, 3.0]], dtype=torch.float64))
    middle = 0.015 / (math.pi**4 * 20.8333333333 * (1 / 100 + 1 / 100) ** 2)
    assert found.flatten().tolist() == pytest.approx([middle, middle * math.sqrt(0.5), 0.0], rel=1e-9, abs=1e-15)


def test_derivatives_match_those_by_hand_and_can_be_back_propagated() -> None:
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.5, 1.0], [2.0, -1.0], [1.0, 3.0]], dtype=torch.float64, requires_grad=True)

    def function(points: Tensor) -> Tensor:
        return a * points[..., :1] ** 4 * points[..., 1:] ** 2

    slopes = gradient(function(x), x)
    torch.testing.assert_close(
        slopes, torch.stack([8 * x[:, 0] ** 3 * x[:, 1] ** 2, 4 * x[:, 0] ** 4 * x[:, 1]], dim=1)
    )
    along_x, along_y = second_derivatives(slopes, x)
    torch.testing.assert_close(along_x, 24 * x[:, 0] ** 2 * x[:, 1] ** 2)
    torch.testing.assert_close(along_y, 4 * x[:, 0] ** 4)
    (by_a,) = torch.autograd.grad(along_y.sum(), a)
    assert by_a.item() == pytest.approx((2 * x[:, 0] ** 4).sum().item())
    directions = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    second = directional_derivatives(function, x.detach(), directions, order=2)
    mixed = 16 * x[:, 0] ** 3 * x[:, 1]
    torch.testing.assert_close(second, torch.stack([along_x, 4 * along_y, along_x + 2 * mixed + along_y]))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Poisson(k=0), "Poisson: k should be a positive number; got 0"),
        (lambda: Poisson(k=1.5), "Poisson: k should be an integer, so that the solution is zero at the ends; got 1.5"),
        (lambda: Helmholtz(waves=(1, 2.5)), r"waves should be two positive integers; got \(1, 2.5\)"),
        (lambda: Helmholtz(waves=[1]), r"waves should be two positive integers; got \[1\]"),
        (lambda: Helmholtz(waves=3), "waves should be two positive integers; got 3"),  # type: ignore[arg-type]
        (lambda: Burgers(viscosity=-1.0), "Burgers: viscosity should be a positive number; got -1.0"),
        (lambda: KirchhoffPlate(load="much"), "KirchhoffPlate: load should be a positive number; got 'much'"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make: Callable[[], Equation], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()
