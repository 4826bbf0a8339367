"""Every optimizer of the package by its name, each trained by its own kind of closure."""

import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secondorder as so

NAMES = so.optim.__all__
QUASI_NEWTON = ("KBFGS", "KBFGSL")


def made(name, widths=(5, 7, 4, 3), m=8, **options):
    """A net, its optimizer, and a function that takes one step."""
    torch.manual_seed(0)
    layers = [module for n, k in zip(widths, widths[1:]) for module in (nn.Linear(n, k), nn.Tanh())]
    model = nn.Sequential(*layers[:-1]).double()
    x = torch.randn(m, widths[0]).double()
    if name == "LevenbergMarquardt":
        target, criterion = torch.randn(m, widths[-1]).double(), nn.MSELoss()
    else:
        target, criterion = torch.randint(widths[-1], (m,)), nn.CrossEntropyLoss()
    if name in ("EACG", *QUASI_NEWTON):
        options = {"lr": 0.1, **options}
    first = (model.parameters(),) if name == "LevenbergMarquardt" else (model,)
    optimizer = getattr(so, name)(*first, *(() if name in ("EigenAdam", "LevenbergMarquardt") else (criterion,)), **options)

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x), target)
        loss.backward()
        return loss

    def step():
        if name in ("LevenbergMarquardt", *QUASI_NEWTON):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    return model, optimizer, step


def trained(name, steps=4, **options):
    """The parameters after some steps, in one vector."""
    model, _, step = made(name, **options)
    for _ in range(steps):
        step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained_to_compare(name):
    """Where rounding is not magnified: the batch is larger than the layers, and the damping is not that of a race, near 0."""
    return trained(name, m=40, **({"race": False, "damping": 10.0} if name == "LevenbergMarquardt" else {}))


if __name__ == "__main__":
    found = {name: [trained_to_compare(name)] for name in NAMES}
    with FlopCounterMode(display=False):  # a TorchDispatchMode, under which autograd cannot be asked for derivatives
        for name, runs in found.items():
            runs.append(trained_to_compare(name))
    torch.save(found, sys.argv[1])
    print(so.build_info()["extension"], "secondorder._C" in sys.modules)
