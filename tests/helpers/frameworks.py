"""What the tests of frameworks share: their import, a net, its data, and a plain loop to compare with."""

import contextlib
import functools
import importlib.util
import os
import socket
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


def in_two_processes(work, folder):
    """What `work`, a function of a module, returns on each of two ranks, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(_rank, args=(work, port, str(folder)), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


def _rank(rank, work, port, folder):
    torch.set_num_threads(1)
    own = {name: str(rank) for name in ("RANK", "LOCAL_RANK")} | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    os.environ |= {**own, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.save(work(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def assert_one_process(ranks):
    """Checks that parameters by optimizer's name are the same on all ranks, and those of a plain loop with all batches."""
    for name, found in ranks[0].items():
        assert torch.equal(found, ranks[1][name]), name
        expected = values(plain_loop(name, dtype=torch.float64))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}")


def of_few_directions(name, net, criterion):
    """The optimizer, and EigenAdam as one process has it by default for batches as small: several take 16 directions."""
    return so.EigenAdam(net, rank=8) if name == "EigenAdam" else STEPPED[name](net, criterion)
