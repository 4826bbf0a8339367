"""Densities: a normalizing flow, denoising diffusion, a mixture of normal distributions."""

import math

import torch
from torch import Tensor, nn

from bench.experiments.everyday.script import Script, task
from bench.experiments.harness import Task
from bench.shipped import moons
from secondorder.criteria import FunctionCriterion


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers = [layer for n_in, n_out in zip(widths, widths[1:]) for layer in (nn.Linear(n_in, n_out), activation())]
    return nn.Sequential(*layers[:-1])


class Flow(nn.Module):
    """RealNVP: the negative log-likelihood of points in the plane."""

    def __init__(self, couplings: int = 6) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(mlp(1, 64, 64, 2) for _ in range(couplings))

    def forward(self, x: Tensor) -> Tensor:
        fixed, moved = x[:, :1], x[:, 1:]
        logarithm = torch.zeros(len(x))
        for coupling in self.couplings:
            scale, shift = coupling(fixed).chunk(2, 1)
            scale = scale.tanh()
            fixed, moved = moved * scale.exp() + shift, fixed
            logarithm = logarithm + scale.squeeze(1)
        normal = 0.5 * (fixed**2 + moved**2).squeeze(1) + math.log(2 * math.pi)
        return (normal - logarithm).mean()


class Denoiser(nn.Module):
    """The noise in a point at one of 50 times."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(50, 32)
        self.points, self.times, self.rest = nn.Linear(2, 128), nn.Linear(32, 128), mlp(128, 128, 2, activation=nn.SiLU)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.rest(nn.functional.silu(self.points(x) + self.times(self.time(time))))


def flow(seed: int) -> Task:
    (train, test), model = moons(), Flow()
    return task("two moons", model, (train,), 128, seed, model, lambda: (model(train), model(test).exp()))


def diffusion(seed: int) -> Task:
    (train, test), model, criterion = moons(), Denoiser(), nn.MSELoss()
    kept = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 50), 0)

    def loss(x: Tensor) -> Tensor:
        time, noise = torch.randint(50, (len(x),)), torch.randn_like(x)
        share = kept[time, None]
        return criterion(model(share.sqrt() * x + (1 - share).sqrt() * noise, time), noise)

    def measure() -> tuple[Tensor, Tensor]:
        return loss(train.repeat(4, 1)), loss(test.repeat(16, 1))

    return task("two moons", model, (train,), 128, seed, loss, measure, criterion)


def mixture(seed: int) -> Task:
    """Bishop's example: a curve turned on its side, which has up to three values."""
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(2000, 1, generator=generator)
    x = y + 0.3 * torch.sin(2 * math.pi * y) + 0.02 * torch.randn(2000, 1, generator=generator)
    model = mlp(1, 64, 64, 15)

    def negative_log_likelihood(output: Tensor, y: Tensor) -> Tensor:
        weights, means, logarithms = output.chunk(3, 1)
        likelihood = weights.log_softmax(1) - logarithms - 0.5 * ((y - means) / logarithms.exp()) ** 2
        return -torch.logsumexp(likelihood, 1).mean()

    criterion = FunctionCriterion(negative_log_likelihood)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return criterion(model(x), y)

    def measure() -> tuple[Tensor, Tensor]:
        return loss(x[:1600], y[:1600]), loss(x[1600:], y[1600:]).exp()

    return task("Bishop's curve", model, (x[:1600], y[:1600]), 128, seed, loss, measure, criterion)


SCRIPTS = [
    Script(
        "normalizing flow", "six couplings of 1-64-64-2, tanh, batch 128", flow,
        seconds=5, score_name="exp of the test loss", signed=True,
    ),
    Script("diffusion", "2-128-128-2, SiLU, 50 times, batch 128", diffusion, seconds=4, score_name="test loss"),
    Script(
        "mixture density", "1-64-64-15, tanh, five normal distributions, batch 128", mixture,
        seconds=4, score_name="exp of the test loss", signed=True,
    ),
]  # fmt: skip
