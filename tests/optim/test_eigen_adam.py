"""EigenAdam's steps: against their specification, and in the corners of what may come."""

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers.eigen import batch, network, train, values
from torch import nn

import secondorder as so


def test_steps_equal_the_specification():
    """A whole run, renewals included, against an optimizer of a few lines on the operators' twins."""
    own, other = network(), network()
    optimizer = so.EigenAdam(own, rank=3, weight_decay=0.1)
    twin = so.EigenAdam(other, rank=3, weight_decay=0.1)
    for seed in range(12):
        train(own, optimizer, [seed])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secondorder.optim._eigen.step.ops", _Twins)
            train(other, twin, [seed])
        for a, b in zip(own.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


class _Twins:
    CONTROL = so.ops.CONTROL
    eigen_sketch_ = staticmethod(so.reference.eigen_sketch_)
    eigen_renew_ = staticmethod(so.reference.eigen_renew_)
    eigen_step_ = staticmethod(so.reference.eigen_step_)


def test_the_first_mean_is_the_inputs_own():
    model = network()
    optimizer = so.EigenAdam(model)
    x, y = batch()
    F.cross_entropy(model(x + 5), y).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model[0].weight]["mean"], x.mean(0) + 5)


def test_it_trains_ahead_of_adam():
    """In a third of the steps."""
    losses = {}
    for name, steps, make in [("own", 80, so.EigenAdam), ("adam", 240, lambda m: torch.optim.Adam(m.parameters(), 3e-3))]:
        model = network(torch.float32)
        seeds = [seed % 10 for seed in range(steps)]
        losses[name] = sum(train(model, make(model), seeds, dtype=torch.float32)[-10:])
    assert losses["own"] < losses["adam"]


@pytest.mark.parametrize("scale", [1e-10, 1e-4, 1e4, 1e10])
def test_the_scale_of_the_loss_changes_nothing(scale):
    plain, scaled = network(), network()
    train(plain, so.EigenAdam(plain), range(30))
    train(scaled, so.EigenAdam(scaled), range(30), loss=lambda z, y: scale * F.cross_entropy(z, y))
    torch.testing.assert_close(values(plain), values(scaled), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "m"),
    [
        (lambda x: 255 * x, 32),
        (lambda x: x + 10, 32),
        (lambda x: 0 * x, 32),
        (lambda x: x, 1),
        (lambda x: x, 4),
        (lambda x: 1e4 + x, 32),
    ],
    ids=["times 255", "plus 10", "zeros", "batch of 1", "batch of 4", "plus 10,000"],
)
@pytest.mark.parametrize("act", [nn.ReLU, nn.Sigmoid])
def test_odd_inputs_do_not_diverge(change, m, act):
    model = network(torch.float32, act)
    optimizer = so.EigenAdam(model)
    with torch.no_grad():
        before = float(F.cross_entropy(model(change(batch(99, dtype=torch.float32)[0])), batch(99)[1]))
    for seed in range(150):
        x, y = batch(seed, m, torch.float32)
        optimizer.zero_grad()
        F.cross_entropy(model(change(x)), y).backward()
        optimizer.step()
    with torch.no_grad():
        after = float(F.cross_entropy(model(change(batch(99, dtype=torch.float32)[0])), batch(99)[1]))
    assert math.isfinite(after)
    assert after < before + 0.5


@pytest.mark.parametrize("depth", [20, 30])
def test_deep_nets_do_not_diverge(depth):
    torch.manual_seed(0)
    act = nn.Tanh if depth == 20 else nn.Sigmoid
    model = nn.Sequential(
        nn.Linear(25, 16), act(), *[m for _ in range(depth) for m in (nn.Linear(16, 16), act())], nn.Linear(16, 3)
    )
    losses = train(model, so.EigenAdam(model), range(80), dtype=torch.float32)
    assert max(losses) < losses[0] + 1


def test_what_has_no_gradient_stays_where_it_is():
    """A dead unit, an input that is always zero, and a parameter that the loss does not contain."""
    model = network(torch.float32, nn.ReLU)
    with torch.no_grad():
        model[0].bias[5] = -1e6
    before = copy.deepcopy(model)
    optimizer = so.EigenAdam(model)
    for seed in range(60):
        x, y = batch(seed, dtype=torch.float32)
        x[:, 7] = 0
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for now, then, index in [
        (model[0].weight, before[0].weight, (5,)), (model[0].weight, before[0].weight, (slice(None), 7)),
        (model[0].bias, before[0].bias, (5,)), (model[2].weight, before[2].weight, (slice(None), 5)),
    ]:  # fmt: skip
        assert torch.equal(now[index], then[index])
    assert not torch.equal(model[0].weight, before[0].weight)


def test_rows_of_an_embedding_wait_until_they_are_looked_up():
    """Each row's moments are of its own gradients alone."""
    table = nn.Embedding(6, 3).double()
    optimizer = so.EigenAdam(table)
    expected, first, second = table.weight.detach().clone(), torch.zeros(6, 3).double(), torch.zeros(6, 3).double()
    generator = torch.Generator().manual_seed(0)
    for t in range(40):
        rows = torch.randint(6, (2,), generator=generator)
        optimizer.zero_grad()
        loss = (table(rows) - rows[:, None]).square().sum()
        loss.backward()
        g, seen = table.weight.grad, torch.unique(rows)
        first[seen] = 0.9 * first[seen] + 0.1 * g[seen]
        second[seen] = 0.95 * second[seen] + 0.05 * g[seen] ** 2
        ahead = 0.9 * first / (1 - 0.9 ** (t + 2)) + 0.1 * g / (1 - 0.9 ** (t + 1))
        step = (ahead * (1 - 0.95 ** (t + 1)) ** 0.5 / second.sqrt()).clamp(-1.2, 1.2)
        expected[seen] -= 2 * 6 / 2 * optimizer.metrics()["length"] * step[seen]  # two of six rows are met
        optimizer.step()
        torch.testing.assert_close(table.weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_weight_decay_shrinks_apart_from_the_gradient():
    """By lr times the step length times its value, also what has no gradient."""
    model = nn.Linear(30, 20).double()
    optimizer = so.EigenAdam(model, weight_decay=0.5)
    before = values(model)
    (0.0 * model(torch.ones(4, 30).double()).sum()).backward()
    length = optimizer.metrics()["length"]
    optimizer.step()
    torch.testing.assert_close(values(model), before * (1 - 0.5 * length))


def test_lr_multiplies_the_step():
    models = [network(), network()]
    before = values(models[0])
    for model, lr in zip(models, (1.0, 0.25), strict=True):
        train(model, so.EigenAdam(model, lr), [0])
    torch.testing.assert_close(0.25 * (values(models[0]) - before), values(models[1]) - before)


@pytest.mark.parametrize("poison", ["gradient", "input"])
def test_what_is_not_finite_raises_or_is_skipped(poison):
    for mode in ("error", "skip"):
        model = network(torch.float32)
        optimizer = so.EigenAdam(model, nonfinite=mode)
        train(model, optimizer, range(5), dtype=torch.float32)
        before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.zero_grad()
        x, y = batch(0, dtype=torch.float32)
        if poison == "input":
            x[3, 4] = math.inf
        F.cross_entropy(model(x), y).backward()
        if poison == "gradient":
            model[2].weight.grad[0, 0] = math.nan
        if mode == "error":
            with pytest.raises(so.NonFiniteError, match="no parameter and no state has changed"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1
        assert torch.equal(values(model), before)
        for i, entries in optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                if key not in ("control", "refused"):  # which count it
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[i][key])), key
        assert train(model, optimizer, [1], dtype=torch.float32)
        assert not torch.equal(values(model), before)


def test_inputs_whose_second_moments_have_no_squares_leave_the_basis():
    torch.manual_seed(0)
    model, x = nn.Linear(40, 30), 2.0**33 * torch.randn(50, 40)
    optimizer = so.EigenAdam(model)
    bases = []
    for _ in range(6):
        optimizer.zero_grad()
        before = values(model)
        (model(x) / 2**33).square().mean().backward()
        optimizer.step()
        bases.append(optimizer.state[model.weight]["basis_in"].clone())
        assert (values(model) - before).abs().max() > 0
    assert all(torch.equal(bases[0], basis) for basis in bases)


def test_a_loss_that_grows_a_thousandfold_is_told_of_once():
    """Where it is known: as the closure's value."""
    torch.manual_seed(0)
    model = nn.Linear(30, 1)
    optimizer = so.EigenAdam(model, lr=1e4)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.randn(16, 30)) ** 4).mean()
        loss.backward()
        return loss

    def twenty():
        for _ in range(20):
            optimizer.step(closure)

    with pytest.warns(UserWarning, match=r"the loss of EigenAdam, .* has grown a thousandfold from") as caught:
        twenty()
    assert len(caught) == 1


def test_a_warning_of_growth_that_is_an_error_comes_before_the_step():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer, factor = so.EigenAdam(model), 1.0

    def closure():
        optimizer.zero_grad()
        loss = factor * (model(torch.ones(4, 3)) - 1).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before, factor = values(model), 1e9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="has grown a thousandfold"):
            optimizer.step(closure)
    assert torch.equal(values(model), before)


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(30 * x)


def siren(width):
    """Three layers of sines with the first weights of Sitzmann et al."""
    layers = []
    for i, (n_in, n_out) in enumerate(pairwise([2, width, width, width, 1])):
        layer = nn.Linear(n_in, n_out)
        bound = 0.5 if i == 0 else math.sqrt(6 / width) / 30
        nn.init.uniform_(layer.weight, -bound, bound)
        layers += [layer, Sine()]
    return nn.Sequential(*layers[:-1])


def test_a_net_whose_loss_is_far_steeper_than_others_trains():
    """Sines of 30 times their input: the length that suits other nets is several times the size of these weights."""
    torch.manual_seed(0)
    net, axis = siren(64), torch.linspace(-1, 1, 24)
    x = torch.cartesian_prod(axis, axis)
    y = torch.exp(-4 * x.square().sum(1, keepdim=True)) + 0.3 * torch.sign(x[:, :1] + x[:, 1:] / 2)
    optimizer = so.EigenAdam(net)
    for _ in range(120):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3 * y.var().item()
