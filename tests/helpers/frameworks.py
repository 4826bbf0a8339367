"""What the tests of frameworks share: their import, a net, its data, and a plain loop to compare with."""

import contextlib
import functools
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import secondorder as so

# Frameworks warn of themselves; what this package warns of stays an error.
quiet = pytest.mark.filterwarnings("ignore", "error:secondorder")

STEPPED = {
    "EigenAdam": lambda net, criterion: so.EigenAdam(net),
    "EigenAdam-pch": lambda net, criterion: so.EigenAdam(net, curvature="pch-abs", criterion=criterion),
    "EACG": lambda net, criterion: so.EACG(net, criterion),
    "LayerwiseNewton": lambda net, criterion: so.LayerwiseNewton(net, criterion),
}
# Those of a closure that is called more than once.
CLOSED = {
    "KBFGS": lambda net, criterion: so.KBFGS(net, criterion),
    "LevenbergMarquardt": lambda net, criterion: so.LevenbergMarquardt(net.parameters(), race=False),
}


class SquaredError(nn.Module):
    """The mean of the squares of what differs from one-hot targets, for logits of any dtype."""

    def forward(self, output, target):
        return (output - nn.functional.one_hot(target, output.shape[1])).square().mean()


def imported(name):
    """A framework's module; skips where it is not installed."""
    _complete_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@functools.cache
def _complete_torchvision():
    """Lets frameworks import torchvision where its library is of another build than torch's, and so cannot be loaded.

    Its Python part then names two operators that are not there.
    """
    spec = importlib.util.find_spec("torchvision")
    library = Path(spec.origin).with_name("_C.so") if spec else None
    if library is None or not library.exists():
        return
    try:
        torch.ops.load_library(library)
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")


def criterion_for(name):
    return SquaredError() if name == "LevenbergMarquardt" else nn.CrossEntropyLoss()


def network(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3)).to(dtype)


def dataset(dtype=torch.float32, n=96):
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x.to(dtype), x[:, :3].argmax(1))


def loader(size=32, dtype=torch.float32):
    return torch.utils.data.DataLoader(dataset(dtype), batch_size=size)


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain_loop(name, epochs=2, size=32, dtype=torch.float32, autocast=False, between=lambda net: None, scheduled=None):
    """The net after a loop as one writes it by hand; `between` comes after the backward pass."""
    net, criterion = network(dtype), criterion_for(name)
    optimizer = {**STEPPED, **CLOSED}[name](net, criterion)
    scheduler = scheduled(optimizer) if scheduled else None
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    for _ in range(epochs):
        for x, y in loader(size, dtype):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                with context:
                    loss = criterion(net(x), y)
                loss.backward()
                between(net)
                return loss

            optimizer.step(closure)
            if scheduler is not None:
                scheduler.step()
    return net
