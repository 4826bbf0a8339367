"""What the tests of LevenbergMarquardt share: double precision, a net to fit, an equation, and the Jacobian by brute force."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def regression(m=40, width=6, outputs=1):
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, outputs))
    x = torch.randn(m, 2)
    y = torch.sin(x[:, :1] * torch.arange(1, outputs + 1)) + x[:, 1:]
    return net, x, y


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def dense_jacobian(net, x):
    parameters = list(net.parameters())
    rows = [torch.autograd.grad(o, parameters, retain_graph=True) for o in net(x).flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def poisson(n=60):
    net = nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1))
    x = torch.rand(n, 2, requires_grad=True)
    edge = torch.rand(20, 2)
    edge[:, 0] = edge[:, 0].round()

    def loss():
        u = net(x)
        g = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        laplacian = sum(torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
        return ((laplacian + 1) ** 2).mean() + 10 * (net(edge) ** 2).mean()

    return net, loss


def noisy(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    x, test = torch.rand(300, 2, generator=generator), torch.rand(500, 2, generator=generator)

    def f(points):
        return torch.sin(3 * points[:, :1]) * points[:, 1:]

    y = f(x) + 0.1 * torch.randn(300, 1, generator=generator)
    return net, lambda: mse_loss(net(x), y), lambda: float((net(test) - f(test)).detach().norm() / f(test).norm())
