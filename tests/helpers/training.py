"""A small net, its batches, one step on it, and whether two states are the same."""

import copy

import torch
from torch import nn

from secondorder.criteria import BoundedClassificationLoss

WIDTHS = [5, 7, 4, 3]
CRITERIA = [nn.CrossEntropyLoss(), BoundedClassificationLoss()]  # a convex and a non-convex one


def network(bias=True, activation=nn.Sigmoid):
    torch.manual_seed(1)
    layers = []
    for n_in, n_out in zip(WIDTHS, WIDTHS[1:]):
        layers += [nn.Linear(n_in, n_out, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


def batch(m=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, WIDTHS[0], generator=generator).double(), torch.randint(WIDTHS[-1], (m,), generator=generator)


def one_step(model, criterion, optimizer, x, y):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def poison_input(model, x):
    x[2, 3] = float("nan")


def poison_gradient(model, x):
    model[0].weight.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), float("nan")))
