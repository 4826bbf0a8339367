"""`max_iter` of LevenbergMarquardt: a call of `step` makes as many steps as so many calls, with fewer calls of the closure."""

import math
import weakref
from contextlib import nullcontext

import pytest
import torch
from helpers.least_squares import flat, float64, noisy, poisson, regression  # noqa: F401
from torch.nn.functional import mse_loss

import secondorder as so
from secondorder.stepping import gauss_newton_step


def counted(closure):
    """The closure, and a list that grows by its calls."""
    calls = []

    def called():
        calls.append(None)
        return closure()

    return called, calls


@pytest.mark.parametrize("race", [True, False])
def test_one_call_makes_the_steps_of_several(race):
    torch.manual_seed(0)
    net, loss = poisson()
    start = {key: value.clone() for key, value in net.state_dict().items()}
    single, calls = counted(loss)
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=30, race=race)
    for _ in range(6):
        optimizer.step(single)
    expected = flat(net)

    net.load_state_dict(start)
    several, fewer = counted(loss)
    other = so.LevenbergMarquardt(net.parameters(), rows=30, race=race, max_iter=6)
    before = loss().item()
    assert other.step(several).item() == before
    torch.testing.assert_close(flat(net), expected, rtol=0, atol=0)
    assert len(fewer) == len(calls) - (4 if race else 5)  # after the race the closure is called anew
    assert torch.equal(other.state_dict()["state"][0]["generator"], optimizer.state_dict()["state"][0]["generator"])
    assert other.state_dict()["state"][0]["step"] == 6


def test_coefficients_are_those_of_every_steps_own_call():
    """Weights that the closure computes from its residuals follow them from step to step."""
    torch.manual_seed(0)
    net, x, y = regression()
    start = {key: value.clone() for key, value in net.state_dict().items()}

    def loss():
        r = net(x) - y
        return (r.detach().abs() * r**2).mean()

    ends = []
    for calls, steps in ((5, 1), (1, 5)):
        net.load_state_dict(start)
        optimizer = so.LevenbergMarquardt(net.parameters(), race=False, max_iter=steps)
        for _ in range(calls):
            optimizer.step(loss)
        ends.append(flat(net))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


def test_a_call_ends_where_nothing_lowers_the_loss():
    torch.manual_seed(0)
    net, x, y = regression(m=12)
    optimizer = so.LevenbergMarquardt(net.parameters(), max_iter=10_000)
    closure, calls = counted(lambda: mse_loss(net(x), y))
    optimizer.step(closure)
    assert optimizer.state_dict()["state"][0]["step"] < 1000
    assert mse_loss(net(x), y) < 1e-25
    ended = len(calls)
    optimizer.step(closure)
    assert len(calls) < 2 * ended  # how soon it is over depends on the last bits


def test_an_error_takes_back_the_step_that_failed_alone():
    torch.manual_seed(0)
    net, x, y = regression()
    optimizer = so.LevenbergMarquardt(net.parameters(), race=False, max_iter=4)
    twin_net = regression()[0]
    twin_net.load_state_dict(net.state_dict())
    twin = so.LevenbergMarquardt(twin_net.parameters(), race=False, max_iter=2)
    closure, calls = counted(lambda: mse_loss(twin_net(x), y))
    twin.step(closure)
    two_steps, calls = len(calls), []

    def failing():
        calls.append(None)
        if len(calls) > two_steps:
            raise ArithmeticError("the data ended")
        return mse_loss(net(x), y)

    with pytest.raises(ArithmeticError, match="the data ended"):
        optimizer.step(failing)
    torch.testing.assert_close(flat(net), flat(twin_net), rtol=0, atol=0)
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_interpolation_is_told_of_though_a_later_step_fails():
    """By the step that goes back, not at the end of the call."""
    calls_in_all = []
    for last in (math.inf, None):
        torch.manual_seed(0)
        net, loss, _ = noisy()
        closure, calls = counted(loss)
        limit = last or calls_in_all[0] - 1

        def failing(closure=closure, calls=calls, limit=limit):
            if len(calls) == limit:
                raise ArithmeticError("the data ended")
            return closure()

        optimizer = so.LevenbergMarquardt(net.parameters(), race=False, max_iter=60)
        ended = nullcontext() if last else pytest.raises(ArithmeticError, match="the data ended")
        with ended, pytest.warns(UserWarning, match="the points are being interpolated"):
            optimizer.step(failing)
        calls_in_all.append(len(calls))


@pytest.mark.parametrize("max_iter", [0, 2.0, True, None])
def test_other_numbers_are_refused(max_iter):
    with pytest.raises(ValueError, match="expected max_iter to be an int >= 1"):
        so.LevenbergMarquardt([torch.nn.Parameter(torch.zeros(3))], max_iter=max_iter)


class Mark:
    """What a graph's node holds."""


@pytest.mark.parametrize("max_iter", [1, 5])
def test_the_graphs_of_earlier_calls_are_freed(max_iter):
    """The first call of `step` calls the closure dozens of times."""
    torch.manual_seed(0)
    net, loss = poisson()
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=30, max_iter=max_iter)
    marks, alive = weakref.WeakSet(), []

    def closure():
        alive.append(len(marks))
        optimizer.zero_grad()
        value, mark = loss(), Mark()
        value.grad_fn.metadata["mark"] = mark
        marks.add(mark)
        value.backward()
        return value

    optimizer.step(closure)
    assert len(alive) > 30
    assert max(alive) <= 2  # where the step began, and at the damping tried before


def test_graphs_of_corrections_are_freed(monkeypatch):
    monkeypatch.setattr(gauss_newton_step, "FEW", 0)  # in units of the columns no step needs a correction
    torch.manual_seed(0)
    mixed, t = torch.linalg.qr(torch.randn(7, 2))[0], torch.nn.Parameter(torch.zeros(2))
    marks, alive = weakref.WeakSet(), []

    def closure():
        alive.append(len(marks))
        residual = mixed @ torch.stack([t[0] + 0.03 * t[1] ** 2 + 0.8 * t[0] * t[1], 0.03 * (t[1] - 1)])
        mark = residual.grad_fn.metadata["mark"] = Mark()
        marks.add(mark)
        return residual.square().sum()

    so.LevenbergMarquardt([t], rows=None, race=False, acceleration=False, damping=1e-4).step(closure)
    assert len(alive) > 5  # some of them corrections
    assert max(alive) == 1  # where the step began


def test_a_closure_that_fails_leaves_no_graph():
    torch.manual_seed(0)
    net, loss = poisson()
    marks = weakref.WeakSet()

    def closure():
        value, mark = loss(), Mark()
        value.grad_fn.metadata["mark"] = mark
        marks.add(mark)
        value.backward()
        raise ArithmeticError("the data ended")

    with pytest.raises(ArithmeticError, match="the data ended"):
        so.LevenbergMarquardt(net.parameters()).step(closure)
    assert not marks
