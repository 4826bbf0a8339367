"""Residuals that LevenbergMarquardt holds out, so that noise is not fitted."""

import copy
import warnings

import pytest
import torch
from helpers.least_squares import flat, float64, noisy, regression  # noqa: F401
from torch import nn
from torch.nn.functional import huber_loss, mse_loss, smooth_l1_loss

import secondorder as so
from secondorder.stepping import gauss_newton_step


def test_noise_is_not_fitted_for_ever():
    net, loss, error = noisy()
    start = copy.deepcopy(net.state_dict())

    def trained(holdout):
        net.load_state_dict(start)
        optimizer = so.LevenbergMarquardt(net.parameters(), holdout=holdout)
        for _ in range(60):
            optimizer.step(loss)
        return error(), optimizer.metrics()["excess"]

    fitted, none = trained(False)
    assert none == 0
    with pytest.warns(UserWarning, match="being interpolated, or noise is fitted"):
        held_out, excess = trained(None)
    assert held_out < 0.5 * fitted
    assert excess > 0


def test_it_goes_back_to_where_the_residuals_held_out_were_least():
    net, loss, _ = noisy()
    optimizer = so.LevenbergMarquardt(net.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(100):
            optimizer.step(loss)
            if caught:
                break
    assert "noise is fitted" in str(caught[0].message)
    assert torch.equal(flat(net), optimizer.state[net[0].weight]["best"])


def test_an_equation_that_is_held_out_does_not_outweigh_data_that_are_not():
    """The equation alone is met best where nothing happens."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    rate = nn.Parameter(torch.tensor(0.5))
    t, measured = torch.linspace(0, 10, 150).view(-1, 1).requires_grad_(), torch.linspace(0, 10, 20).view(-1, 1)

    def solution(t):
        return 1000 / (1 + 99 * torch.exp(-t))

    def loss():
        u = net(t)
        change = torch.autograd.grad(u.sum(), t, create_graph=True)[0]
        return ((change - rate * u * (1 - u / 1000)) ** 2).mean() + mse_loss(net(measured), solution(measured))

    optimizer = so.LevenbergMarquardt([*net.parameters(), rate])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            optimizer.step(loss)
    assert float(((net(t) - solution(t)).norm() / solution(t).norm()).detach()) < 1e-2
    assert abs(rate.item() - 1) < 1e-2


@pytest.mark.parametrize("criterion", [huber_loss, lambda z, y, delta: smooth_l1_loss(z, y, beta=delta)], ids=["huber", "smooth"])
def test_outliers_of_which_few_are_held_out_are_not_fitted(criterion):
    """The loss of the residuals held out is below that of the others all the time."""

    def f(x):
        return torch.sin(3 * x) + 0.5 * x**2

    generator = torch.Generator().manual_seed(100)
    x = 2 * torch.rand(150, 1, generator=generator) - 1
    y = f(x) + 0.05 * torch.randn(150, 1, generator=generator)
    outlier = torch.rand(150, 1, generator=generator) < 0.1
    y = torch.where(outlier, y + 3 * torch.randn(150, 1, generator=generator), y)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    optimizer = so.LevenbergMarquardt(net.parameters())

    def train():
        for _ in range(70):
            optimizer.step(lambda: criterion(net(x), y, delta=0.1))

    with pytest.warns(UserWarning, match="being interpolated, or noise is fitted"):
        train()
    test = torch.linspace(-1, 1, 300).view(-1, 1)
    assert float(((net(test) - f(test)).norm() / f(test).norm()).detach()) < 0.1


def test_nothing_is_held_out_where_residuals_are_many():
    net, x, y = regression(400, 6)
    optimizer = so.LevenbergMarquardt(net.parameters())
    optimizer.step(lambda: mse_loss(net(x), y))
    assert optimizer.metrics()["excess"] == 0


def test_residuals_of_ensembles_are_held_out():
    first, bias, last = (nn.Parameter(torch.randn(3, *shape)) for shape in ((2, 20), (1, 20), (20, 1)))
    x = torch.rand(3, 200, 2)
    y = x.sum(2, keepdim=True).sin() + 0.1 * torch.randn(3, 200, 1)
    optimizer = so.LevenbergMarquardt([first, bias, last], race=False, holdout=True)
    optimizer.step(lambda: mse_loss(torch.bmm(torch.tanh(torch.bmm(x, first) + bias), last), y))
    assert optimizer.metrics()["excess"] > 0


def fields():
    """Parameters that stand for themselves: name, loss of [n] values and its least value's linear system A u = b."""
    y, d = torch.sin(torch.linspace(0, 6, 120)) + 0.2 * torch.randn(120), torch.eye(120).diff(n=2, dim=0)
    system = torch.cat([torch.eye(120), 10**0.5 * d]), torch.cat([y, torch.zeros(118)])
    yield "slices", lambda u: ((u - y) ** 2).sum() + 10 * ((u[2:] - 2 * u[1:-1] + u[:-2]) ** 2).sum(), *system
    yield "sparse rows", lambda u: ((u - y) ** 2).sum() + 10 * ((d @ u.view(-1, 1)) ** 2).sum(), *system


def test_parameters_that_stand_for_themselves_are_not_held_out():
    for name, loss, a, b in fields():
        u = nn.Parameter(torch.zeros(120))
        optimizer = so.LevenbergMarquardt([u])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*a backward pass for each residual")
            for _ in range(8):
                optimizer.step(lambda loss=loss, u=u: loss(u))
        solution = torch.linalg.lstsq(a, b.unsqueeze(1)).solution.flatten()
        torch.testing.assert_close(u.detach(), solution, rtol=1e-6, atol=1e-6, msg=name)
        assert optimizer.metrics()["excess"] == 0


def test_a_linear_problem_ends_at_its_minimum():
    """That of the residuals which are not held out lies elsewhere."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(150, 40, generator=generator)
        b = a @ torch.randn(40, 1, generator=generator) + torch.randn(150, 1, generator=generator)
        least = mse_loss(a @ torch.linalg.lstsq(a, b).solution, b)
        layer = nn.Linear(40, 1, bias=False)
        optimizer = so.LevenbergMarquardt(layer.parameters())
        for _ in range(15):
            loss = optimizer.step(lambda a=a, b=b, layer=layer: mse_loss(layer(a), b))
        assert loss < (1 + 1e-9) * least


@pytest.mark.parametrize("holdout", [None, True])
def test_data_without_noise_are_all_drawn_in_the_end(holdout):
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    x = torch.rand(300, 2)
    y = torch.sin(3 * x[:, :1]) * x[:, 1:]
    optimizer = so.LevenbergMarquardt(net.parameters(), holdout=holdout)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if holdout is None else "ignore")
        for _ in range(60):
            loss = optimizer.step(lambda: mse_loss(net(x), y))
    assert loss < 1e-7
    assert (optimizer.metrics()["excess"] == 0) == (holdout is None)


@pytest.mark.filterwarnings("ignore:secondorder. LevenbergMarquardt. the residuals held out")
def test_what_is_held_out_is_never_drawn():
    net, loss, _ = noisy()
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=100, race=False)
    seen, held = set(), set()
    draw = gauss_newton_step.GaussNewtonStep._draw

    def watched(self, *arguments):
        rows = draw(self, *arguments)
        seen.update(rows.flat.tolist())
        for out, inside, _ in rows.held:
            held.update(out.tolist())
            assert len(out) + len(inside) == 300
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gauss_newton_step.GaussNewtonStep, "_draw", watched)
        for _ in range(30):
            optimizer.step(loss)
    assert len(held) == 30
    assert seen | held == set(range(300))
    assert not seen & held
