"""Nets, a batch and a penalty for tests of what a step evaluates again."""

import torch
from torch import nn

import secondorder as so

FAMILY = [so.LayerwiseNewton, so.KFAC, so.KFRA, so.KFLR]


def net(*widths, activation=nn.Tanh):
    layers = []
    for n_in, n_out in zip(widths, widths[1:]):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1]).double()


class Normed(nn.Module):
    """No chain of linear layers."""

    def __init__(self, n_out=3):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, n_out)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


CE = nn.CrossEntropyLoss()
X, Y = torch.randn(24, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(24) % 3


def penalty(model, power):
    return 0.1 * sum(p.abs().pow(power).sum() for p in model.parameters())
