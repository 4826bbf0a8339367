"""Equations in time and one dimension of space: heat, wave, convection, Burgers, Allen-Cahn. Points are (t, x)."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.experiments.physics.problem import Equation, Function, Physics, Points, net, partials, shape

VISCOSITY = 0.01 / math.pi
SPEED = 30
NODES = 200  # of the quadrature for Burgers' equation
MODES = 2048  # of the solver for Allen-Cahn, whose start has a kink; 512 leave an error of 1e-5


def heat() -> Equation:
    """u_t = u_xx / 4 on [0, 1], zero at both ends."""
    points = Points([0.0, 0.0], [1.0, 1.0])
    x, start, ends, test = (
        points.inside(800).requires_grad_(),
        points.at(150, 0, 0.0),
        points.faces(150, [1]),
        points.inside(2000),
    )

    def exact(x: Tensor) -> Tensor:
        return (-(math.pi**2) / 4 * x[:, :1]).exp() * (math.pi * x[:, 1:]).sin()

    known = exact(start)

    def loss(u: Function) -> Tensor:
        rate, slope = partials(u(x), x)
        residual = rate - partials(slope, x)[1] / 4
        return residual.square().mean() + F.mse_loss(u(start), known) + u(ends).square().mean()

    return Equation("800 points inside, 150 at the start, 150 at the ends", loss, test, exact(test), exact=exact)


def wave() -> Equation:
    """u_tt = 4 u_xx on [0, 1], zero at both ends, at rest at first."""
    points = Points([0.0, 0.0], [1.0, 1.0])
    x, ends, test = points.inside(1500).requires_grad_(), points.faces(200, [1]), points.inside(2000)
    start = points.at(200, 0, 0.0).requires_grad_()

    def exact(x: Tensor) -> Tensor:
        t, x = math.pi * x[:, :1], math.pi * x[:, 1:]
        return x.sin() * (2 * t).cos() + (4 * x).sin() * (8 * t).cos() / 2

    known = exact(start).detach()

    def loss(u: Function) -> Tensor:
        rate, slope = partials(u(x), x)
        residual = partials(rate, x)[0] - 4 * partials(slope, x)[1]
        first = u(start)
        beginning = 100 * F.mse_loss(first, known) + partials(first, start)[0].square().mean()
        return residual.square().mean() + beginning + 100 * u(ends).square().mean()

    return Equation("1,500 points inside, 200 at the start, 200 at the ends", loss, test, exact(test), exact=exact)


def _both_ends(points: Points, n: int) -> tuple[Tensor, Tensor]:
    """The same moments at either end of space."""
    low = points.at(n, 1, points.low[1].item())
    high = low.clone()
    high[:, 1] = points.high[1]
    return low, high


def convection() -> Equation:
    """u_t + 30 u_x = 0 on [0, 2 pi], periodic."""
    points = Points([0.0, 0.0], [1.0, 2 * math.pi])
    x, start, test = points.inside(1500).requires_grad_(), points.at(200, 0, 0.0), points.inside(2000)
    low, high = _both_ends(points, 100)

    def exact(x: Tensor) -> Tensor:
        return (x[:, 1:] - SPEED * x[:, :1]).sin()

    known = exact(start)

    def loss(u: Function) -> Tensor:
        rate, slope = partials(u(x), x)
        residual = rate + SPEED * slope
        return residual.square().mean() + 100 * F.mse_loss(u(start), known) + 100 * F.mse_loss(u(low), u(high))

    return Equation("1,500 points inside, 200 at the start, 100 at either end", loss, test, exact(test), exact=exact)


def cole_hopf(x: Tensor) -> Tensor:
    """The solution of Burgers' equation from -sin(pi x), a quotient of two integrals, by Gauss-Hermite quadrature."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite.hermgauss(NODES))
    y = math.pi * (x[:, 1:] - (4 * VISCOSITY * x[:, :1]).sqrt() * nodes)
    exponent = -y.cos() / (2 * math.pi * VISCOSITY)
    mass = (exponent - exponent.amax(1, keepdim=True)).exp() * weights
    return -(y.sin() * mass).sum(1, keepdim=True) / mass.sum(1, keepdim=True)


@lru_cache(1)
def _burgers_solution() -> tuple[Tensor, Tensor]:
    grid = torch.cartesian_prod(torch.linspace(0, 1, 26, dtype=torch.float64), torch.linspace(-1, 1, 101, dtype=torch.float64))
    return grid, cole_hopf(grid)


def burgers() -> Equation:
    """u_t + u u_x = 0.01 / pi u_xx on [-1, 1], zero at both ends, -sin(pi x) at first."""
    points = Points([0.0, -1.0], [1.0, 1.0])
    x, start, ends = points.inside(2000).requires_grad_(), points.at(150, 0, 0.0), points.faces(100, [1])
    known = -(math.pi * start[:, 1:]).sin()

    def loss(u: Function) -> Tensor:
        value = u(x)
        rate, slope = partials(value, x)
        residual = rate + value * slope - VISCOSITY * partials(slope, x)[1]
        return residual.square().mean() + F.mse_loss(u(start), known) + u(ends).square().mean()

    data = "2,000 points inside, 150 at the start, 100 at the ends"
    return Equation(data, loss, *_burgers_solution(), exact=cole_hopf)


def allen_cahn_states(times: Sequence[float]) -> np.ndarray:
    """The solution of Allen-Cahn's equation at these times, increasing, and at the points -1 + 2 k / MODES.

    Fourier's derivatives, and an eighth-order Runge-Kutta method in time.
    """
    from scipy.integrate import solve_ivp

    x = -1 + 2 * np.arange(MODES) / MODES
    bend = -((math.pi * np.arange(MODES // 2 + 1)) ** 2)

    def rate(_: float, u: np.ndarray) -> np.ndarray:
        return 1e-4 * np.fft.irfft(bend * np.fft.rfft(u), MODES) + 5 * (u - u**3)

    solved = solve_ivp(rate, (0, 1), x**2 * np.cos(math.pi * x), "DOP853", t_eval=times, rtol=1e-10, atol=1e-10, max_step=0.005)
    return solved.y.T


@lru_cache(1)
def _allen_cahn_solution() -> tuple[Tensor, Tensor]:
    times, x = np.linspace(0, 1, 21), -1 + 2 * np.arange(0, MODES, 16) / MODES
    grid = torch.cartesian_prod(torch.from_numpy(times), torch.from_numpy(x))
    return grid, torch.from_numpy(allen_cahn_states(times)[:, ::16].copy()).reshape(-1, 1)


def allen_cahn() -> Equation:
    """u_t = 1e-4 u_xx + 5 (u - u^3) on [-1, 1], periodic, x^2 cos(pi x) at first."""
    points = Points([0.0, -1.0], [1.0, 1.0])
    x, start = points.inside(2000).requires_grad_(), points.at(200, 0, 0.0)
    low, high = _both_ends(points, 100)
    known = start[:, 1:] ** 2 * (math.pi * start[:, 1:]).cos()

    def loss(u: Function) -> Tensor:
        value = u(x)
        rate, slope = partials(value, x)
        residual = rate - 1e-4 * partials(slope, x)[1] - 5 * (value - value**3)
        return residual.square().mean() + 100 * F.mse_loss(u(start), known) + F.mse_loss(u(low), u(high))

    data = "2,000 points inside, 200 at the start, 100 at either end"
    return Equation(data, loss, *_allen_cahn_solution())


def _problem(name: str, description: str, equation: Callable[[], Equation], width: int = 32) -> Physics:
    widths = (2, width, width, width, 1)
    return Physics(name, f"{description}; {shape(*widths)}, tanh", equation, partial(net, *widths))


PROBLEMS = [
    _problem("heat", "u_t = u_xx / 4, one mode, weights 1", heat),
    _problem("wave", "u_tt = 4 u_xx, two modes, weights 1, and 100 for values", wave),
    _problem("convection", "u_t + 30 u_x = 0, periodic, weights 1, and 100 for values", convection, 40),
    _problem("Burgers", "viscosity 0.01 / pi, weights 1, against a quadrature of Cole and Hopf's formula", burgers),
    _problem("Allen-Cahn", "periodic, weights 1, and 100 for the start, against a spectral solver", allen_cahn),
]
