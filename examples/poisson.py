"""Poisson's equation by a net: u_xx + u_yy = f on the unit square, u = 0 on its edge.

    python examples/poisson.py [--steps 150]

The loss is what one writes for Adam or L-BFGS. Only the optimizer is another one.
"""

import argparse
from math import pi

import torch
from torch import Tensor, nn

from secondorder import LevenbergMarquardt

torch.set_default_dtype(torch.float64)


def solution(x: Tensor) -> Tensor:
    """Returns the u that is to be found."""
    return torch.sin(pi * x[:, :1]) * torch.sin(2 * pi * x[:, 1:])


def gradient(u: Tensor, x: Tensor) -> Tensor:
    """Returns du/dx at every point."""
    return torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]


def main(steps: int) -> None:
    """Trains, and prints how far u is from the solution."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.rand(800, 2, requires_grad=True)
    f = -5 * pi**2 * solution(x).detach()
    edge = torch.rand(200, 2)
    edge[:100, 0] = edge[:100, 0].round()
    edge[100:, 1] = edge[100:, 1].round()

    optimizer = LevenbergMarquardt(net.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        u_x = gradient(net(x), x)
        residual = gradient(u_x[:, :1], x)[:, :1] + gradient(u_x[:, 1:], x)[:, 1:] - f
        loss = (residual**2).mean() + 25 * (net(edge) ** 2).mean()
        loss.backward()
        return loss

    for step in range(1, steps + 1):
        loss = optimizer.step(closure)
        if step % 25 == 0:
            print(f"step {step}: loss {float(loss):.2e}")

    with torch.no_grad():
        points = torch.rand(2000, 2)
        error = (net(points) - solution(points)).norm() / solution(points).norm()
    print(f"relative error of u: {error:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Solves Poisson's equation by a net.")
    parser.add_argument("--steps", type=int, default=150)
    main(parser.parse_args().steps)
