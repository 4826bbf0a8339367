"""Functions known at points: an equation with an unknown coefficient, and plain regression with and without noise."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.experiments.physics.problem import Equation, Function, Physics, Points, net, partials, shape

DIFFUSIVITY = 0.1


class WithCoefficient(nn.Module):
    """A function, and a coefficient of its equation, which is trained with it."""

    def __init__(self, u: Function, start: float) -> None:
        super().__init__()
        self.u = u
        self.coefficient = nn.Parameter(torch.tensor([start], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.u(x)


def diffusivity() -> Equation:
    """u_t + u_x = D u_xx with D unknown, and u measured at 100 points inside; nothing is known of start and ends."""
    points = Points([0.0, 0.0], [1.0, 1.0])
    x, measured, test = points.inside(500).requires_grad_(), points.inside(100), points.inside(2000)

    def exact(x: Tensor) -> Tensor:
        t, x = x[:, :1], x[:, 1:]
        return (-(math.pi**2) * DIFFUSIVITY * t).exp() * (math.pi * (x - t)).sin()

    values = exact(measured)

    def loss(u: WithCoefficient) -> Tensor:
        rate, slope = partials(u(x), x)
        residual = rate + slope - u.coefficient * partials(slope, x)[1]
        return residual.square().mean() + 10 * F.mse_loss(u(measured), values)

    return Equation(
        "500 points, 100 measurements without noise", loss, test, exact(test),
        exact=WithCoefficient(exact, DIFFUSIVITY), coefficient=DIFFUSIVITY,
    )  # fmt: skip


def _regression(exact: Function, d: int, n: int, noise: float) -> Equation:
    points = Points([0.0] * d, [1.0] * d)
    x, test = points.inside(n), points.inside(2000)
    y = exact(x) + noise * torch.randn(n, 1, generator=points.generator, dtype=torch.float64)
    data = f"{n} examples, noise of {noise:g}" if noise else f"{n} examples"
    return Equation(data, lambda u: F.mse_loss(u(x), y), test, exact(test), exact=exact, examples=(x, y))


def regression() -> Equation:
    """A smooth function of two variables."""
    return _regression(
        lambda x: (4 * x[:, :1]).sin() * (3 * x[:, 1:]).cos() + (-x.square().sum(1, keepdim=True)).exp(), 2, 500, 0
    )


def noisy_regression() -> Equation:
    """A smooth function of three variables; the error is that to the function itself."""
    return _regression(lambda x: (3 * x[:, :1]).sin() * x[:, 1:2] + (-2 * x[:, 2:]).exp(), 3, 800, 0.1)


def _problem(
    name: str, description: str, equation: Callable[[], Equation], model: Callable[[], nn.Module], seconds: float, *widths: int
) -> Physics:
    return Physics(name, f"{description}; {shape(*widths)}, tanh", equation, model, seconds=seconds)


PROBLEMS = [
    _problem(
        "unknown diffusivity", "u_t + u_x = D u_xx, D from 0.5 to 0.1, weights 1 and 10", diffusivity,
        lambda: WithCoefficient(net(2, 32, 32, 1), 0.5), 6, 2, 32, 32, 1,
    ),
    _problem("regression", "a smooth function of 2 variables, MSE", regression, partial(net, 2, 32, 32, 1), 3, 2, 32, 32, 1),
    _problem(
        "noisy regression", "a smooth function of 3 variables, MSE, error to the function without noise", noisy_regression,
        partial(net, 3, 24, 24, 1), 3, 3, 24, 24, 1,
    ),
]  # fmt: skip
