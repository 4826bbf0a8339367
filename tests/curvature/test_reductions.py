"""The empirical Fisher blocks of criteria that do not say whether they are a mean or a sum."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from helpers.curvatures import assert_blocks, blocks, instance_gradients, network
from torch import nn
from torch.nn import functional as F

import secondorder as so
from secondorder.criteria import FunctionCriterion
from secondorder.curvature import CURVATURES


def weighted(z, y):
    """A mean by weights that add up to 1."""
    weights = torch.ones_like(y[:, 0]) / len(y)
    return (weights * (z - y).square().sum(1)).sum()


def contrastive(z, y):
    return F.cross_entropy(z @ y.T, torch.arange(len(z)))


def whole_batches(z, y):
    assert len(z) == M
    return (z - y).square().mean()


def per_row(reduce):
    """A criterion whose weights are in a table by the rows' positions."""
    table = torch.linspace(1, 2, M, dtype=torch.float64)
    return lambda z, y: reduce(table[torch.arange(len(z))] * (z - y).square().sum(1))


M = 8
REDUCTIONS = {  # and what it divides the sum over the instances by; None: the block of a mean
    "mean": (lambda z, y: (z - y).square().mean(), M),
    "sum": (lambda z, y: (z - y).square().sum(), 1),
    "F": (lambda z, y: F.mse_loss(z, y, reduction="sum"), 1),
    "partial": (functools.partial(F.huber_loss, reduction="sum"), 1),
    "means of rows": (lambda z, y: (z - y).square().mean(1).sum(), 1),
    "mean over rows": (lambda z, y: (z - y).square().mean(0).sum(), M),
    "by length": (lambda z, y: (z - y).square().sum() / len(z), M),
    "by a constant": (lambda z, y: (z - y).square().sum() / M, M),
    "by a tensor": (lambda z, y: torch.tensor(1 / M) * (z - y).square().sum(), M),
    "by a constant inside": (lambda z, y: ((z - y).square() / M).sum(), M),
    "half the sum": (lambda z, y: 0.5 * (z - y).square().sum(), 1),
    "of halves": (lambda z, y: ((z - y).square() / torch.tensor(2)).sum(), 1),
    "weighted": (weighted, M),
    "whole batches alone": (whole_batches, M),
    "compares": (contrastive, M),
    "soft labels": (lambda z, y: F.cross_entropy(z, y.softmax(1)), M),  # torch divides there by a number that is no tensor
    "soft labels, sum": (lambda z, y: F.cross_entropy(z, y.softmax(1), reduction="sum"), 1),
    "mean with a table": (per_row(torch.mean), M),
    "sum with a table": (per_row(torch.sum), 1),
}


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_reduction_of_a_function_is_found_out(name, module):
    torch.manual_seed(0)
    function, divisor = REDUCTIONS[name]
    model, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(M, 4).double(), torch.randn(M, 3).double()
    criterion = FunctionCriterion(function)
    if module:
        criterion = nn.Module()
        criterion.forward = function
    seen = {}
    handles = [model[k].register_forward_hook(lambda *call, k=k: seen.update({str(k): call[2]})) for k in (0, 2)]
    gradients = torch.autograd.grad(function(model(x), y), list(seen.values()))
    for handle in handles:
        handle.remove()
    expected = {k: divisor * g.T @ g for k, g in zip(seen, gradients, strict=True)}
    assert_blocks(blocks(model, criterion, CURVATURES["fisher-empirical"], (x, y)), expected)
    model.zero_grad()
    halves = blocks(model, criterion, CURVATURES["fisher-empirical"], (x, y), (x, y), scale=0.5)
    assert_blocks(halves, expected)


def half_the_sum(z, y):
    return 0.5 * (z - y).square().sum()


def tenth_of_the_sum(z, y):
    return (z - y).square().sum() / 10


@pytest.mark.parametrize(("function", "sizes"), [(half_the_sum, [2]), (half_the_sum, [1]), (tenth_of_the_sum, [12, 7])])
def test_a_constant_is_part_of_every_rows_loss_in_small_batches_too(function, sizes):
    torch.manual_seed(0)
    model, optimizer = network([4, 6, 3], nn.Tanh()), None
    for m in sizes:
        x, y = torch.randn(m, 4).double(), torch.randn(m, 3).double()
        expected = instance_gradients(model, function, x, y)
        optimizer = optimizer or so.EACG(model, function, lr=0.0, curvature="fisher-empirical", factor_decay=0.0)
        optimizer.zero_grad()
        optimizer.criterion(model(x), y).backward()
        optimizer.step()
        for name, g in expected.items():
            found = optimizer.state[model[int(name)].weight]["factors"]["bias_hessian"]
            torch.testing.assert_close(found, g.T @ g)


OPTIMIZERS = {
    "EACG": lambda m, c: so.EACG(m, c, lr=0.1, curvature="fisher-empirical"),
    "LayerwiseNewton": lambda m, c: so.LayerwiseNewton(m, c, curvature="fisher-empirical", curvature_every=1),
    "EigenAdam": lambda m, c: so.EigenAdam(m, curvature="fisher-empirical", criterion=c, renew_every=1),
}


def tenth(z, y):
    """With batches of more than 10 rows a constant of every row's loss, which batches of 8 alone do not tell."""
    return (z - y).square().sum() / 10


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_a_constant_counts_as_goes_on_in_resumed_runs_and_copies(name):
    def steps(model, optimizer, sizes):
        for m in sizes:
            generator = torch.Generator().manual_seed(m)
            x, y = torch.randn(m, 4, generator=generator).double(), torch.randn(m, 3, generator=generator).double()
            optimizer.zero_grad()
            optimizer.criterion(model(x), y).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def made():
        torch.manual_seed(0)
        model = network([4, 6, 3], nn.Tanh())
        return model, OPTIMIZERS[name](model, tenth)

    model, optimizer = made()
    steps(model, optimizer, (32,))
    resumed, theirs = made()
    resumed.load_state_dict(model.state_dict())
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy((model, optimizer))
    back = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = steps(model, optimizer, (8, 7))
    assert torch.equal(steps(resumed, theirs, (8, 7)), expected)
    assert torch.equal(steps(*copied, (8, 7)), expected)
    steps(model, optimizer, (64,))
    model.load_state_dict(back[0])
    optimizer.load_state_dict(back[1])
    assert torch.equal(steps(model, optimizer, (8, 7)), expected)


def test_a_summing_function_has_the_blocks_of_the_summing_module():
    torch.manual_seed(0)
    model, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(M, 4).double(), torch.randint(3, (M,))
    expected = {n: g.T @ g for n, g in instance_gradients(model, nn.CrossEntropyLoss(), x, y).items()}
    for criterion in (
        nn.CrossEntropyLoss(reduction="sum"),
        FunctionCriterion(lambda z, y: F.cross_entropy(z, y, reduction="sum")),
    ):
        assert_blocks(blocks(model, criterion, CURVATURES["fisher-empirical"], (x, y)), expected)


class Focal(nn.CrossEntropyLoss):
    """Reduces by itself what torch's loss gives it for every row."""

    def __init__(self, reduce):
        super().__init__(reduction="none")
        self.reduce = reduce

    def forward(self, z, y):
        losses = super().forward(z, y)
        return self.reduce((1 - torch.exp(-losses)) * losses)


@pytest.mark.parametrize(("reduce", "divisor"), [(torch.sum, 1), (torch.mean, M)])
def test_a_module_that_reduces_by_itself_says_nothing_by_its_reduction(reduce, divisor):
    torch.manual_seed(0)
    model, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(M, 4).double(), torch.randint(3, (M,))
    expected = {n: g.T @ g / divisor for n, g in instance_gradients(model, Focal(torch.sum), x, y).items()}
    assert_blocks(blocks(model, Focal(reduce), CURVATURES["fisher-empirical"], (x, y)), expected)


class Counting(nn.Module):
    """A sum that draws numbers, has a buffer, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.steps = 0
        self.register_buffer("seen", torch.zeros(()))
        self.times = []

    def forward(self, z, y):
        self.times.append(len(z))
        self.steps += 1
        self.seen += 1
        return (z - y + 1e-3 * torch.randn_like(y)).square().sum()


@pytest.mark.parametrize("curvature", ["fisher-empirical", "pch-abs"])
def test_a_criterion_is_called_twice_more_once_and_keeps_its_state(curvature):
    torch.manual_seed(0)
    model, criterion = network([4, 6, 3], nn.Tanh()), Counting()
    optimizer = so.EACG(model, criterion, curvature=curvature)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(torch.randn(M, 4).double()), torch.randn(M, 3).double()).backward()
        state = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
    assert (criterion.steps, float(criterion.seen)) == (3, 3)
    assert criterion.times == ([M, M, 2 * M, M, M] if curvature == "fisher-empirical" else [M, M, M])


def test_gradients_that_are_zero_tell_nothing():
    torch.manual_seed(0)
    model, criterion = network([4, 3], nn.Tanh()), FunctionCriterion(lambda z, y: (z - y).square().sum())
    x = torch.randn(M, 4).double()
    expected = blocks(model, nn.MSELoss(reduction="sum"), CURVATURES["fisher-empirical"], (x, torch.zeros(M, 3).double()))
    model.zero_grad()
    batches = (x, model(x).detach()), (x, torch.zeros(M, 3).double())
    assert_blocks(blocks(model, criterion, CURVATURES["fisher-empirical"], *batches), expected)


class Target:
    def __init__(self):
        self.y = torch.randn(M, 3).double()


def test_the_arguments_of_the_last_loss_alone_are_kept():
    torch.manual_seed(0)
    model = network([4, 3], nn.Tanh())
    optimizer, kept = so.EACG(model, lambda z, target: (z - target.y).square().sum(), curvature="pch-abs"), []
    for _ in range(3):
        target = Target()
        kept.append(weakref.ref(target))
        optimizer.criterion(model(torch.randn(M, 4).double()), target).backward()
        del target
    gc.collect()
    assert [each() is None for each in kept] == [True, True, False]
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert kept[2]() is None
