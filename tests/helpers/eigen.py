"""What the tests of EigenAdam share: a net, its batches, training, and values before and after a file."""

import io

import torch
import torch.nn.functional as F
from torch import nn


def network(dtype=torch.float64, act=nn.Tanh, width=40):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(25, width), act(), nn.Linear(width, 20), act(), nn.Linear(20, 3)).to(dtype)


def batch(seed=0, m=32, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, 25, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x[:, :3] + x[:, 3:6] * x[:, 6:9]).argmax(1)


def train(model, optimizer, seeds, loss=F.cross_entropy, **kwargs):
    losses = []
    for seed in seeds:
        x, y = batch(seed, **kwargs)
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def reloaded(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)
