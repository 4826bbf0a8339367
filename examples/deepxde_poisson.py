"""Poisson's equation by DeepXDE, with its PyTorch backend: the optimizer is given to `model.compile`, and that is all.

pip install deepxde
python examples/deepxde_poisson.py [--steps 150]
"""

import argparse
import os

os.environ["DDE_BACKEND"] = "pytorch"

import deepxde as dde
import numpy as np
import torch
from torch import Tensor

from secondorder import LevenbergMarquardt


def equation(x: Tensor, u: Tensor) -> Tensor:
    """Returns u_xx + u_yy - f."""
    f = -5 * np.pi**2 * torch.sin(np.pi * x[:, :1]) * torch.sin(2 * np.pi * x[:, 1:])
    return dde.grad.hessian(u, x, i=0, j=0) + dde.grad.hessian(u, x, i=1, j=1) - f


def solution(x: np.ndarray) -> np.ndarray:
    """Returns the u that is to be found, which is zero on the edge."""
    return np.sin(np.pi * x[:, :1]) * np.sin(2 * np.pi * x[:, 1:])


def main(steps: int) -> None:
    """Trains, and prints how far u is from the solution."""
    dde.config.set_default_float("float64")
    dde.config.set_random_seed(0)

    square = dde.geometry.Rectangle([0, 0], [1, 1])
    edge = dde.icbc.DirichletBC(square, solution, lambda _, on_edge: on_edge)
    data = dde.data.PDE(square, equation, edge, num_domain=600, num_boundary=160, solution=solution, num_test=1000)
    net = dde.nn.FNN([2, 32, 32, 32, 1], "tanh", "Glorot normal")

    model = dde.Model(data, net)
    model.compile(LevenbergMarquardt(net.parameters()), loss_weights=[1, 100])
    model.train(iterations=steps, display_every=25)

    points = square.random_points(2000)
    error = np.linalg.norm(model.predict(points) - solution(points)) / np.linalg.norm(solution(points))
    print(f"relative error of u: {error:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Solves Poisson's equation by DeepXDE.")
    parser.add_argument("--steps", type=int, default=150)
    main(parser.parse_args().steps)
