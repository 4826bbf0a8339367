"""A net for K-BFGS, and its closures."""

import torch
from torch import nn


def closure_of(optimizer, model, criterion, x, y):
    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    return closure


def autoencoder(bias=True, activation=nn.ReLU, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 9, bias=bias), activation(), nn.Linear(9, 4, bias=bias), nn.Linear(4, 6, bias=bias), activation(),
        nn.Linear(6, 7, bias=bias),
    ).to(dtype)  # fmt: skip
