"""Equations without time: Poisson in 2, 5 and 10 dimensions, Helmholtz, a flow."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.experiments.physics.problem import Equation, Function, Physics, Points, gradient, laplacian, net, partials, shape

REYNOLDS = 40


def _poisson(
    exact: Function, source: Function, d: int, inside: int, edge: int, weights: tuple[float, float], tested: int = 2000
) -> Equation:
    """The Laplacian of u is the source on the unit cube, u is known on its faces; two weights."""
    points = Points([0.0] * d, [1.0] * d)
    x, faces, test = points.inside(inside).requires_grad_(), points.faces(edge), points.inside(tested)
    f, known = source(x).detach(), exact(faces)

    def loss(u: Function) -> Tensor:
        residual = laplacian(u(x), x) - f
        return weights[0] * residual.square().mean() + weights[1] * F.mse_loss(u(faces), known)

    return Equation(f"{inside:,} points inside, {edge} on the faces", loss, test, exact(test), exact=exact)


def poisson_2() -> Equation:
    """u = sin(pi x) sin(2 pi y)."""

    def exact(x: Tensor) -> Tensor:
        return (math.pi * x[:, :1]).sin() * (2 * math.pi * x[:, 1:]).sin()

    return _poisson(exact, lambda x: -5 * math.pi**2 * exact(x), 2, 800, 200, (0.8, 20))


def poisson_5() -> Equation:
    """u = sum of cos(pi x_i)."""

    def exact(x: Tensor) -> Tensor:
        return (math.pi * x).cos().sum(1, keepdim=True)

    return _poisson(exact, lambda x: -(math.pi**2) * exact(x), 5, 1200, 300, (1, 1))


def poisson_10() -> Equation:
    """u = x_1 x_2 + x_3 x_4 + ... + sin(sum of x_i / 3)."""

    def exact(x: Tensor) -> Tensor:
        return (x[:, ::2] * x[:, 1::2]).sum(1, keepdim=True) + (x.sum(1, keepdim=True) / 3).sin()

    return _poisson(exact, lambda x: -10 / 9 * (x.sum(1, keepdim=True) / 3).sin(), 10, 600, 400, (1, 100))


def helmholtz() -> Equation:
    """u_xx + u_yy + u = f on [-1, 1]^2, solution sin(pi x) sin(4 pi y), zero on the edge."""
    points = Points([-1.0, -1.0], [1.0, 1.0])
    x, edge, test = points.inside(1500).requires_grad_(), points.faces(400), points.inside(2000)

    def exact(x: Tensor) -> Tensor:
        return (math.pi * x[:, :1]).sin() * (4 * math.pi * x[:, 1:]).sin()

    f = (1 - 17 * math.pi**2) * exact(x).detach()

    def loss(u: Function) -> Tensor:
        value = u(x)
        residual = laplacian(value, x) + value - f
        return residual.square().mean() + 100 * u(edge).square().mean()

    return Equation("1,500 points inside, 400 on the edge", loss, test, exact(test), exact=exact)


def kovasznay() -> Equation:
    """The Navier-Stokes equations of a flow behind a grid, velocities and pressure known on the edge."""
    rate = REYNOLDS / 2 - math.sqrt(REYNOLDS**2 / 4 + 4 * math.pi**2)
    points = Points([-0.5, -0.5], [1.0, 1.5])
    x, edge, test = points.inside(700).requires_grad_(), points.faces(160), points.inside(2000)

    def exact(x: Tensor) -> Tensor:
        decay, phase = (rate * x[:, :1]).exp(), 2 * math.pi * x[:, 1:]
        across = rate / (2 * math.pi) * decay * phase.sin()
        return torch.cat([1 - decay * phase.cos(), across, (1 - decay**2) / 2], 1)

    known = exact(edge)

    def loss(flow: Function) -> Tensor:
        u, v, pressure = flow(x).split(1, dim=1)
        residuals = []
        for velocity, push in zip((u, v), partials(pressure, x)):
            slope = gradient(velocity, x)
            carried = u * slope[:, :1] + v * slope[:, 1:]
            residuals.append(carried + push - laplacian(velocity, x) / REYNOLDS)
        residuals.append(partials(u, x)[0] + partials(v, x)[1])
        return sum(r.square().mean() for r in residuals) + 10 * F.mse_loss(flow(edge), known)

    return Equation("700 points inside, 160 on the edge", loss, test, exact(test), exact=exact)


def _problem(name: str, description: str, equation: Callable[[], Equation], *widths: int) -> Physics:
    return Physics(name, f"{description}; {shape(*widths)}, tanh", equation, partial(net, *widths))


PROBLEMS = [
    _problem("Poisson 2-D", "solution sin(pi x) sin(2 pi y), weights 0.8 and 20", poisson_2, 2, 32, 32, 32, 1),
    _problem("Poisson 5-D", "solution sum of cos(pi x_i), weights 1 and 1", poisson_5, 5, 48, 48, 48, 1),
    _problem("Poisson 10-D", "solution x_1 x_2 + ... + sin(sum of x_i / 3), weights 1 and 100", poisson_10, 10, 48, 48, 1),
    _problem("Helmholtz", "solution sin(pi x) sin(4 pi y), weights 1 and 100", helmholtz, 2, 32, 32, 32, 1),
    _problem("Kovasznay flow", "three equations, Reynolds number 40, weights 1 and 10", kovasznay, 2, 40, 40, 3),
]
