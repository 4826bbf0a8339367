"""An unknown coefficient: u_t = k u_xx, and both u and k are found from measurements of u.

    python examples/inverse_problem.py [--steps 150]

The coefficient is one more parameter of the optimizer.
"""

import argparse
from math import pi

import torch
from torch import Tensor, nn

from secondorder import LevenbergMarquardt

torch.set_default_dtype(torch.float64)
TRUTH = 0.3


def solution(points: Tensor) -> Tensor:
    """Returns u(t, x) with the true coefficient."""
    t, x = points[:, :1], points[:, 1:]
    return torch.exp(-TRUTH * pi**2 * t) * torch.sin(pi * x) + torch.exp(-4 * TRUTH * pi**2 * t) * torch.sin(2 * pi * x)


def gradient(u: Tensor, x: Tensor) -> Tensor:
    """Returns du/dx at every point."""
    return torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]


def main(steps: int) -> None:
    """Trains, and prints how far the coefficient and u are from the truth."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    coefficient = nn.Parameter(torch.tensor([1.0]))
    points = torch.rand(500, 2, requires_grad=True)
    measured = torch.rand(100, 2)
    values = solution(measured)

    optimizer = LevenbergMarquardt([*net.parameters(), coefficient])

    def closure() -> Tensor:
        optimizer.zero_grad()
        u_t, u_x = gradient(net(points), points).split(1, dim=1)
        u_xx = gradient(u_x, points)[:, 1:]
        residual = u_t - coefficient * u_xx
        loss = (residual**2).mean() + 10 * nn.functional.mse_loss(net(measured), values)
        loss.backward()
        return loss

    for step in range(1, steps + 1):
        loss = optimizer.step(closure)
        if step % 25 == 0:
            print(f"step {step}: loss {float(loss):.2e}, coefficient {coefficient.item():.6f}")

    with torch.no_grad():
        test = torch.rand(2000, 2)
        error = (net(test) - solution(test)).norm() / solution(test).norm()
    print(f"relative error of the coefficient: {abs(coefficient.item() / TRUTH - 1):.1e}")
    print(f"relative error of u: {error:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Finds the coefficient of the heat equation.")
    parser.add_argument("--steps", type=int, default=150)
    main(parser.parse_args().steps)
