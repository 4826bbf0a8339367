"""Functions of coordinates: images by Fourier features and by sines, an equation's solution."""

import math
from itertools import pairwise, repeat

import torch
from torch import Tensor, nn

from bench.experiments.everyday.script import Script, evaluation
from bench.experiments.harness import Task, batches
from bench.shipped import photograph


class FourierFeatures(nn.Module):
    """Sines and cosines of random directions."""

    frequencies: Tensor

    def __init__(self, n: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(2, n))

    def forward(self, x: Tensor) -> Tensor:
        phase = math.pi * x @ self.frequencies
        return torch.cat([phase.sin(), phase.cos()], 1)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


def siren(widths: list[int]) -> nn.Sequential:
    """Layers of sines with the first weights of Sitzmann et al."""
    modules: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        layer = nn.Linear(n_in, n_out)
        bound = 1 / n_in if i == 0 else math.sqrt(6 / n_in) / 30
        nn.init.uniform_(layer.weight, -bound, bound)
        modules += [layer, Sine()]
    return nn.Sequential(*modules[:-1])


def picture(model: nn.Module) -> Task:
    """Squared error on all training pixels at once; the score is the peak signal-to-noise ratio of the others."""
    data, criterion = photograph(96), nn.MSELoss()

    def measure() -> tuple[Tensor, Tensor]:
        noise = criterion(model(data.test_x), data.test_y)
        return criterion(model(data.train_x), data.train_y), 10 * torch.log10(4 / noise)

    return Task(
        data.name,
        model,
        repeat((data.train_x, data.train_y)),
        lambda batch: criterion(model(batch[0]), batch[1]),
        evaluation(model, measure),
        1.0,
        criterion,
    )


def fourier_features(seed: int) -> Task:
    return picture(
        nn.Sequential(FourierFeatures(64, 4.0), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    )


def sines(seed: int) -> Task:
    return picture(siren([2, 64, 64, 64, 1]))


def exact(points: Tensor) -> Tensor:
    """u(t, x) = exp(-t) sin(pi x) + exp(-9 t) sin(3 pi x) / 2, which solves pi^2 u_t = u_xx, zero at x = 0 and 1."""
    t, x = points[:, :1], points[:, 1:]
    return torch.exp(-t) * (math.pi * x).sin() + torch.exp(-9 * t) * (3 * math.pi * x).sin() / 2


def heat_equation(seed: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    inside, known, test = (torch.rand(n, 2, generator=generator, dtype=torch.float64) for n in (2000, 200, 1000))
    known[:100, 0] = 0  # the beginning
    known[100:, 1] = (known[100:, 1] > 0.5).double()  # both ends
    widths = [2, 40, 40, 40, 1]
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    mse = nn.MSELoss()

    def loss(points: Tensor) -> Tensor:
        points = points.clone().requires_grad_()
        u = model(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (bend,) = torch.autograd.grad(slope[:, 1].sum(), points, create_graph=True)
        residual = slope[:, 0] - bend[:, 1] / math.pi**2
        return residual.square().mean() + 10 * mse(model(known), exact(known))

    def measure() -> tuple[Tensor, Tensor]:
        u = exact(test)
        return loss(inside), (model(test) - u).norm() / u.norm()

    return Task(
        "the heat equation, 2,000 points",
        model,
        batches((inside,), 200, seed),
        lambda batch: loss(*batch),
        evaluation(model, measure, grad=True),
        len(inside) / 200,
        mse,
    )


SCRIPTS = [
    Script(
        "Fourier features", "64 frequencies, 128-64-64-1, ReLU, MSELoss, all 4,608 pixels", fourier_features,
        seconds=4, score_name="PSNR of other pixels, dB", higher=True,
    ),
    Script(
        "SIREN", "2-64-64-64-1, sines, MSELoss, all 4,608 pixels", sines,
        seconds=5, score_name="PSNR of other pixels, dB", higher=True,
    ),
    Script(
        "heat equation", "2-40-40-40-1, tanh, derivatives by autograd, float64, batch 200", heat_equation,
        seconds=6, score_name="relative L2 error",
    ),
]  # fmt: skip
