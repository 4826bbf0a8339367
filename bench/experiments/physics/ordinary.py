"""Ordinary differential equations from an initial value, each unknown an output of the net."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.experiments.physics.problem import Equation, Function, Physics, net, partials, shape

Values = Sequence[Tensor]  # of the unknowns, or floats
GRAVITY = 9.81


class Scaled(nn.Module):
    """A net whose inputs reach from 0 to 1, and whose outputs are about 1."""

    def __init__(self, inner: nn.Module, end: float, size: float) -> None:
        super().__init__()
        self.inner, self.end, self.size = inner, end, size

    def forward(self, t: Tensor) -> Tensor:
        return self.size * self.inner(t / self.end)


@lru_cache
def solve(rates: Callable[[Values], list], start: tuple[float, ...], end: float) -> tuple[Tensor, Tensor]:
    """501 times [n, 1] and the solution there [n, k], by an eighth-order Runge-Kutta method."""
    from scipy.integrate import solve_ivp

    times = np.linspace(0, end, 501)
    solved = solve_ivp(lambda _, y: rates(y), (0, end), start, "DOP853", t_eval=times, rtol=1e-12, atol=1e-12)
    return torch.from_numpy(times).unsqueeze(1), torch.from_numpy(solved.y.T.copy())


def _system(rates: Callable[[Values], list], start: tuple[float, ...], end: float, n: int) -> Equation:
    """y' = rates(y) at n times and, ten times as heavy, y(0) = start."""
    t = torch.linspace(0, end, n, dtype=torch.float64).unsqueeze(1).requires_grad_()
    first, known = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([start], dtype=torch.float64)

    def loss(y: Function) -> Tensor:
        unknowns = y(t).split(1, dim=1)
        total = 10 * F.mse_loss(y(first), known)
        for unknown, rate in zip(unknowns, rates(unknowns)):
            total = total + F.mse_loss(partials(unknown, t)[0], rate)
        return total

    return Equation(f"{n} times", loss, *solve(rates, start, end))


def _lorenz(y: Values) -> list:
    return [10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]]


def lorenz() -> Equation:
    return _system(_lorenz, (1.0, 1.0, 1.0), 0.4, 150)


def _van_der_pol(y: Values) -> list:
    return [y[1], (1 - y[0] ** 2) * y[1] - y[0]]


def van_der_pol() -> Equation:
    return _system(_van_der_pol, (1.0, 0.0), 6.0, 200)


def _pendulum(y: Values) -> list:
    return [y[1], -GRAVITY * np.sin(y[0])]


def pendulum() -> Equation:
    """The angle's equation of second order, from 2.5 at rest."""
    end, start = 3.0, (2.5, 0.0)
    t = torch.linspace(0, end, 200, dtype=torch.float64).unsqueeze(1).requires_grad_()
    first = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)

    def loss(angle: Function) -> Tensor:
        value, beginning = angle(t), angle(first)
        (velocity,), (first_velocity,) = partials(value, t), partials(beginning, first)
        residual = partials(velocity, t)[0] + GRAVITY * value.sin()
        return residual.square().mean() + 100 * ((beginning - start[0]).square().mean() + first_velocity.square().mean())

    times, states = solve(_pendulum, start, end)
    return Equation("200 times", loss, times, states[:, :1])


def _problem(
    name: str, description: str, equation: Callable[[], Equation], width: int, n_out: int, end: float, size: float
) -> Physics:
    widths = (1, width, width, n_out)
    model = lambda: Scaled(net(*widths), end, size)
    return Physics(name, f"{description}; {shape(*widths)}, tanh", equation, model, seconds=3)


PROBLEMS = [
    _problem("Lorenz", "three equations, from (1, 1, 1) to 0.4, weights 1 and 10", lorenz, 40, 3, 0.4, 10.0),
    _problem("van der Pol", "mu = 1, two equations, from (1, 0) to 6, weights 1 and 10", van_der_pol, 32, 2, 6.0, 1.0),
    _problem("pendulum", f"u'' = -{GRAVITY} sin(u), from 2.5 at rest to 3, weights 1 and 100", pendulum, 32, 1, 3.0, 1.0),
]
