"""A graph is freed when its loss is, without the garbage collector: hooks and records make no cycles with its nodes."""

import gc
import sys
import weakref

import pytest
import torch
from helpers.optimizers import ALL
from torch import nn

import secondorder as so

MAKE = {
    **ALL,
    "EigenAdam": lambda m, c: so.EigenAdam(m),
    "EigenAdam-pch": lambda m, c: so.EigenAdam(m, curvature="pch-abs", criterion=c),
}


class Mark:
    """What a graph's nodes hold."""


@pytest.fixture(autouse=True)
def _no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("with_backward", [True, False])
@pytest.mark.parametrize("name", MAKE)
def test_a_graph_is_freed_with_its_loss(name, with_backward):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    criterion = nn.CrossEntropyLoss()
    optimizer = MAKE[name](model, criterion)
    x, target = torch.randn(8, 4), torch.arange(8) % 3
    marks = weakref.WeakSet()

    def marked():
        loss = criterion(model(x), target)
        parameter = next(model.parameters())
        for node in (loss.grad_fn, parameter.view_as(parameter).grad_fn.next_functions[0][0]):  # and that of the parameter
            mark = Mark()
            node.metadata["mark"] = mark
            marks.add(mark)
        return loss

    def closure():
        optimizer.zero_grad()
        loss = marked()
        loss.backward()
        return loss.detach()

    for _ in range(3):
        optimizer.step(closure)
    if not with_backward:
        optimizer.zero_grad()
        marked()
        model.eval()
        model(x)
        model.train()
        optimizer.step(closure)
    optimizer.zero_grad()
    assert not len(marks)


@pytest.mark.parametrize("name", MAKE)
def test_inputs_that_are_multiplied_with_are_freed(name):
    """They are no parameters whose products with other tensors are to be told of."""
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), nn.CrossEntropyLoss()
    optimizer, target, seen = MAKE[name](model, criterion), torch.arange(8) % 3, []

    def closure():
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
        seen.append(weakref.ref(x))
        optimizer.zero_grad()
        loss = criterion(model((x @ x.mT).softmax(-1) @ x), target)
        loss.backward()
        return loss.detach()

    for _ in range(3):
        optimizer.step(closure)
    optimizer.zero_grad()
    assert [x() for x in seen[:-2]] == [None] * len(seen[:-2])


def test_forward_passes_give_up_no_reference_to_none():
    """Before Python 3.12 a process ends with "deallocating None" when the last is gone; later ones do not count them."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = so.EACG(model, nn.CrossEntropyLoss(), lr=0.1)
    x, target = torch.randn(8, 4), torch.arange(8) % 3
    optimizer.criterion(model(x), target)
    gc.collect()
    before = sys.getrefcount(None)
    for _ in range(100):
        optimizer.criterion(model(x), target)
    gc.collect()
    assert abs(sys.getrefcount(None) - before) < 50
