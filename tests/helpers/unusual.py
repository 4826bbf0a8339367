"""A net, its batch, and steps on it by closures, for nets and criteria that the papers' optimizers do not cover as a whole."""

import pytest
import torch
from torch import nn

from helpers.optimizers import ALL, FIXED

every = pytest.mark.parametrize("name", ALL)
fixed = pytest.mark.parametrize("name", FIXED)
X, LABELS = torch.linspace(-1, 1, 60).view(12, 5), torch.arange(12) % 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch():
    torch.manual_seed(1)
    return torch.randn(10, 4).double(), torch.randint(3, (10,))


def run(model, optimizer, loss=None, steps=1):
    x, y = batch()
    losses = []
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            value = optimizer.criterion(model(x), y) if loss is None else loss()
            value.backward()
            return value

        losses.append(float(optimizer.step(closure).detach()))
    return losses
