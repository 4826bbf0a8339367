"""A net, its batches and its steps for what is done with every optimizer; which optimizers a test goes over."""

import copy
import io

import pytest
import torch
from torch import nn

from helpers.optimizers import ALL, FIXED, parameters

one_call = pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("KBFGS")])
fixed = pytest.mark.parametrize("name", FIXED)
every = pytest.mark.parametrize("name", ALL)


def network(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batch(seed=0, m=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, 5, generator=generator).to(dtype), torch.randint(3, (m,), generator=generator)


def step(model, optimizer, x, y, between=lambda: None):
    """One step; `between` comes after the backward pass that gives the gradients."""

    def closure():
        optimizer.zero_grad()
        loss = optimizer.criterion(model(x), y)
        loss.backward()
        if model[0].weight.grad is not None:  # not so in the second call of K-BFGS
            between()
        return loss

    return float(optimizer.step(closure).detach())


def train(model, optimizer, seeds, **kwargs):
    torch.manual_seed(3)
    return [step(model, optimizer, *batch(seed, **kwargs)) for seed in seeds]


def everything(model, optimizer):
    """All numbers but the count of skipped steps."""
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("skipped_steps")
    return [parameters(model), state]


def reloaded(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)
