"""Steps of LevenbergMarquardt against dense formulas, from batch to batch, and with residuals held out."""

import copy
import warnings

import numpy as np
import pytest
import torch
from helpers.least_squares import dense_jacobian, flat, float64, noisy, poisson, regression  # noqa: F401
from torch import nn
from torch.nn.functional import huber_loss, mse_loss, smooth_l1_loss

import secondorder as so
from secondorder.stepping import checked_jacobian, gauss_newton_step

# --- steps ---


@pytest.mark.parametrize("rows", [None, 1000])
def test_a_step_is_that_of_the_dense_formula(rows):
    net, x, y = regression()
    before, j = flat(net), dense_jacobian(net, x) / 40**0.5
    r = (net(x) - y).detach().flatten() / 40**0.5
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=rows, race=False, acceleration=False, damping=0.3)
    loss = optimizer.step(lambda: mse_loss(net(x), y))
    mu = 0.3 * (j @ j.T).diagonal().mean()
    expected = -torch.linalg.solve(j.T @ j + mu * torch.eye(len(before)), j.T @ r)
    torch.testing.assert_close(flat(net) - before, expected, rtol=1e-9, atol=1e-12)
    assert float(loss) == pytest.approx(float(r @ r))
    ratio = float((r @ r - mse_loss(net(x), y).detach()) / (r @ r - (r + j @ expected).square().sum()))
    metrics = optimizer.metrics()
    assert metrics["ratio"] == pytest.approx(ratio)
    rule = max(1 / 3, 1 - (2 * ratio - 1) ** 3)
    assert metrics["damping"] == pytest.approx(rule * 0.3 / 40)


def test_few_parameters_are_damped_in_their_own_units():
    a, scales = torch.randn(12, 5), torch.tensor([1.0, 1e3, 1e-3, 1e6, 1e-6])
    theta, y, t = nn.Parameter(torch.zeros(5)), torch.randn(12), 0.1 * scales**2
    with torch.no_grad():
        theta += 0.1 / scales
    before, j = theta.detach().clone(), a * scales
    squares = j.square().sum(0) + t
    mu = 0.3 * (j.square().sum(0) / squares).sum() / 12
    d = -torch.linalg.solve(j.T @ j + torch.diag(t + mu * squares), j.T @ (j @ before - y) + t * before)
    optimizer = so.LevenbergMarquardt([theta], rows=None, race=False, acceleration=False, corrections=0, damping=0.3)
    optimizer.step(lambda: (j @ theta - y).square().sum() + (t * theta**2).sum())
    torch.testing.assert_close((theta.detach() - before) * scales, d * scales, rtol=1e-8, atol=1e-12)


def test_the_acceleration_is_half_the_second_derivative(monkeypatch):
    monkeypatch.setattr(gauss_newton_step, "FEW", 0)
    a, b = torch.randn(12, 5), 0.05 * torch.randn(12, 5, 5)
    theta = nn.Parameter(0.1 * torch.randn(5))
    before = theta.detach().clone()

    def residual(t):
        return a @ t + torch.einsum("kij,i,j->k", b, t, t) - 1

    def closure():
        return (residual(theta) ** 2).sum()

    j, r = torch.autograd.functional.jacobian(residual, before), residual(before)
    mu = 0.5 * j.square().sum() / 12
    matrix = j.T @ j + mu * torch.eye(5)
    d = -torch.linalg.solve(matrix, j.T @ r)
    acceleration = -torch.linalg.solve(matrix, j.T @ (2 * torch.einsum("kij,i,j->k", b, d, d)))
    assert 2 * (acceleration / 2).norm() < 0.75 * d.norm()
    so.LevenbergMarquardt([theta], rows=None, race=False, damping=0.5).step(closure)
    torch.testing.assert_close(theta.detach() - before, d + acceleration / 2, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("twist", "corrections", "made"), [(0.0, 0, 0), (0.3, 3, 1), (0.8, 1, 1), (0.8, 2, 2), (0.8, 3, 3), (0.8, 9, 3)]
)
def test_corrections_are_chords_by_the_same_jacobian(twist, corrections, made, monkeypatch):
    monkeypatch.setattr(gauss_newton_step, "FEW", 0)
    # A narrow valley: along it the residuals hardly fall, and its walls bend by as much.
    mixed = torch.linalg.qr(torch.randn(7, 2))[0]
    theta, penalties, calls = nn.Parameter(torch.zeros(2)), torch.tensor([1e-5, 2e-5]), []

    def residual(t):
        return mixed @ torch.stack([t[0] + 0.03 * t[1] ** 2 + twist * t[0] * t[1], 0.03 * (t[1] - 1)])

    def loss(t):
        return residual(t).square().sum() + (penalties * t**2).sum()

    def closure():
        calls.append(theta.detach().clone())
        return loss(theta)

    before = theta.detach().clone()
    j, r = torch.autograd.functional.jacobian(residual, before), residual(before)
    matrix = j.T @ j + torch.diag(penalties) + 1e-4 * j.square().sum() / 7 * torch.eye(2)
    d = -torch.linalg.solve(matrix, j.T @ r + penalties * before)
    aim, places = r + j @ d, [before + d]
    promised = loss(before) - aim @ aim - penalties @ (before + d) ** 2
    while len(places) <= corrections and loss(before) - loss(places[-1]) <= 0.75 * promised:
        c = torch.linalg.solve(matrix, j.T @ (residual(places[-1]) - aim))
        assert c.norm() < 0.1 * d.norm()
        places.append(places[-1] - c)
        assert loss(places[-1]) < loss(places[-2])
    assert len(places) == 1 + made
    optimizer = so.LevenbergMarquardt([theta], rows=None, race=False, acceleration=False, corrections=corrections, damping=1e-4)
    optimizer.step(closure)
    torch.testing.assert_close(theta.detach(), places[-1], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(calls[-1 - made :], places, rtol=1e-8, atol=1e-12)


def test_corrections_move_no_parameter_further_than_its_lr(monkeypatch):
    monkeypatch.setattr(gauss_newton_step, "FEW", 0)
    mixed = torch.linalg.qr(torch.randn(7, 2))[0]
    theta, slow = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))
    groups = [{"params": [theta]}, {"params": [slow], "lr": 1e-6}]
    optimizer = so.LevenbergMarquardt(groups, rows=None, race=False, acceleration=False, damping=1e-4)
    calls = []

    def closure():
        calls.append(1)
        residual = mixed @ torch.stack([theta[0] + slow + 0.03 * theta[1] ** 2, 0.03 * (theta[1] - 1)])
        return residual.square().sum()

    optimizer.step(closure)
    assert len(calls) == 4  # one of them a correction
    assert theta[0] < -0.01
    assert slow.abs() < 1e-7


def test_a_linear_problem_is_solved_at_once():
    layer, x, y = nn.Linear(4, 1), torch.randn(30, 4), torch.randn(30, 1)
    optimizer = so.LevenbergMarquardt(layer.parameters(), race=False, damping=1e-14)
    optimizer.step(lambda: mse_loss(layer(x), y))
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1)], 1), y).solution.flatten()
    torch.testing.assert_close(flat(layer), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{}, {"rows": 20}, {"rows": None}, {"solver": "parameters"}, {"memory": 0}, {"acceleration": False}]
)
def test_small_nets_are_fitted_to_rounding(options):
    net, x, y = regression(30, 12)
    optimizer = so.LevenbergMarquardt(net.parameters(), **options)
    losses = [float(optimizer.step(lambda: mse_loss(net(x), y))) for _ in range(60)]
    assert losses[-1] < 1e-8 * losses[0]


def test_an_equation_is_solved():
    net, loss = poisson()
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=40)
    first = float(optimizer.step(loss))
    for _ in range(40):
        last = float(optimizer.step(loss))
    assert last < 1e-6 * first


def test_no_step_is_worse_than_the_start_where_all_rows_are_drawn():
    net, loss = poisson()
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=None)
    losses = [float(optimizer.step(loss)) for _ in range(15)]
    assert all(b <= a for a, b in zip(losses, losses[1:]))


def test_a_curve_of_few_parameters_costs_few_calls():
    t, p = torch.linspace(0, 5, 80), nn.Parameter(torch.tensor([1.0, 0.5, 0.0]))
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return mse_loss(p[0] * torch.exp(-p[1] * t) + p[2], 2 * torch.exp(-t) + 0.3)

    so.LevenbergMarquardt([p]).step(closure)
    assert calls < 20
    assert closure() < 1e-12


UNITS = [(1.0, 1.0), (1e9, 1e-9), (1e-7, 1e8)]


@pytest.mark.parametrize("penalty", [0.0, 1e-3])
def test_steps_of_few_parameters_do_not_depend_on_their_units(penalty):
    found = []
    for units in map(torch.tensor, UNITS):
        x = torch.linspace(0.1, 5, 50)
        p = nn.Parameter(torch.tensor([1.0, 1.0]) * units)
        optimizer = so.LevenbergMarquardt([p], race=False)
        for _ in range(6):
            optimizer.step(
                lambda p=p, units=units, x=x: (
                    mse_loss((q := p / units)[0] * x / (q[1] + x), 5 * x / (2 + x))
                    + penalty * ((1 / units).square() * p.square()).sum()
                )
            )
        found.append(p.detach() / units)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-6, atol=0)


def test_a_curve_in_any_units_is_fitted():
    x = torch.linspace(-5, 5, 80) * 1e6 + 1e9  # a resonance: hertz and amperes
    peak = lambda p: p[0] / (1 + ((x - p[1]) / p[2]) ** 2)  # noqa: E731
    found = torch.tensor([1e-6, 1e9, 1e6])
    p = nn.Parameter(torch.tensor([5e-7, 1.0005e9, 2e6]))
    optimizer = so.LevenbergMarquardt([p])
    for _ in range(15):
        optimizer.step(lambda: mse_loss(peak(p), peak(found)))
    torch.testing.assert_close(p.detach(), found, rtol=1e-9, atol=0)


def test_a_parameter_whose_column_vanishes_comes_back():
    w = torch.linspace(1, 10, 60) * 1e5  # a current in a resonant circuit
    current = lambda p: 1 / torch.sqrt(p[0] ** 2 + (w * p[1] - 1 / (w * p[2])) ** 2)  # noqa: E731
    found = torch.tensor([50.0, 1e-4, 1e-9])
    p = nn.Parameter(torch.tensor([100.0, 1e-4, 5e-10]))
    optimizer = so.LevenbergMarquardt([p])
    for _ in range(25):
        optimizer.step(lambda: mse_loss(current(p), current(found)))
    torch.testing.assert_close(p.detach().abs(), found, rtol=1e-6, atol=0)


def test_a_first_call_does_not_undo_earlier_training():
    layer, x, y = nn.Linear(4, 1), torch.randn(300, 4), torch.randn(300, 1)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(300, 1)], 1), y).solution.flatten()
    with torch.no_grad():
        layer.weight.copy_(solution[:4].view(1, 4))
        layer.bias.copy_(solution[4:])
    before = mse_loss(layer(x), y).item()
    optimizer = so.LevenbergMarquardt(layer.parameters(), rows=20)
    optimizer.step(lambda: mse_loss(layer(x), y))
    assert mse_loss(layer(x), y).item() <= before * (1 + 1e-9)


def test_noise_with_fewer_parameters_than_rows_is_averaged():
    layer, x = nn.Linear(60, 1), torch.randn(2000, 60)
    y = x @ torch.randn(60, 1) + torch.randn(2000, 1)
    optimizer = so.LevenbergMarquardt(layer.parameters(), rows=70)
    for _ in range(10):
        optimizer.step(lambda: mse_loss(layer(x), y))
    ones = torch.cat([x, torch.ones(2000, 1)], 1)
    best = mse_loss(ones @ torch.linalg.lstsq(ones, y).solution, y).item()
    assert mse_loss(layer(x), y).item() < 1.5 * best


def test_max_rows_bound_the_rows(monkeypatch):
    net, x, y = regression(200, 12)
    drawn = []
    draw = gauss_newton_step.GaussNewtonStep._draw

    def watched(self, *arguments):
        rows = draw(self, *arguments)
        drawn.append(len(rows.flat))
        return rows

    monkeypatch.setattr(gauss_newton_step.GaussNewtonStep, "_draw", watched)
    optimizer = so.LevenbergMarquardt(net.parameters(), max_rows=50)
    for _ in range(20):
        optimizer.step(lambda: mse_loss(net(x), y))
    assert max(drawn) == 50


def test_rows_grow_where_the_loss_does_not_fall():
    net, x, _ = regression(300, 20)
    y = torch.randn(300, 1)
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=20, holdout=False)
    rows = []
    for _ in range(60):
        optimizer.step(lambda: mse_loss(net(x), y))
        rows.append(optimizer.metrics()["rows"])
    grown = list(dict.fromkeys(rows))
    assert len(grown) > 2 and grown == pytest.approx([20 * 1.5**k for k in range(len(grown))])


def test_a_step_at_most_doubles_the_whole_loss():
    """Ten rows of pure noise, fitted by 81 parameters: each step lowers their loss."""
    torch.manual_seed(1)
    x, y = torch.rand(300, 2) * 2 - 1, torch.randn(300, 1)
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1))
    optimizer = so.LevenbergMarquardt(
        net.parameters(), rows=10, damping=1e-6, holdout=False, race=False, acceleration=False, corrections=0
    )
    losses = [mse_loss(net(x), y).item()]
    for _ in range(20):
        optimizer.step(lambda: mse_loss(net(x), y))
        losses.append(mse_loss(net(x), y).item())
    rises = [after / before for before, after in zip(losses, losses[1:])]
    assert 1.5 < max(rises) < 2.0


def test_no_more_rows_are_drawn_than_there_are():
    layer, x, y = nn.Linear(2, 1), torch.randn(30, 2), torch.randn(30, 1)
    optimizer = so.LevenbergMarquardt(layer.parameters(), rows=10)
    for _ in range(60):
        optimizer.step(lambda: mse_loss(layer(x), y))
    assert optimizer.metrics()["rows"] == 30


def test_a_small_batch_does_not_lower_the_rows():
    net, x, y = regression(400, 20)
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=300, holdout=True, race=False)
    batches = [400, *[110] * 8, 400]  # in the small ones a tenth is held out, and steps soon bring no record
    for m in batches:
        noise = torch.randn(m, 1)
        optimizer.step(lambda m=m, noise=noise: mse_loss(net(x[:m]), y[:m] + noise))
    assert optimizer.metrics()["rows"] >= 300


@pytest.mark.parametrize("changed", ["weight", "points"])
def test_training_goes_on_after_the_loss_has_changed(changed):
    """As it does where a coefficient is raised or points are drawn anew: the record of the loss before is out of reach."""
    net = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1))
    weight, x = 1.0, torch.rand(400, 2)

    def closure():
        return weight * mse_loss(net(x), torch.sin(4 * x[:, :1] * x[:, 1:]))

    optimizer = so.LevenbergMarquardt(net.parameters(), rows=100, holdout=False)
    for _ in range(12):
        optimizer.step(closure)
    if changed == "weight":
        weight = 1e4
    else:
        x = 1.5 * torch.rand(400, 2)
    losses = [float(optimizer.step(closure)) for _ in range(16)]
    assert losses[-1] < 0.5 * losses[1]


def test_where_there_is_nothing_to_gain_nothing_moves():
    net, x, _ = regression()
    y = net(x).detach()
    before = flat(net)
    optimizer = so.LevenbergMarquardt(net.parameters())
    for _ in range(3):
        assert float(optimizer.step(lambda: mse_loss(net(x), y))) == 0
    torch.testing.assert_close(flat(net), before, rtol=0, atol=0)


def test_a_loss_of_zero_costs_one_call_and_is_no_first_step():
    net, x, y = regression()
    start, calls = copy.deepcopy(net), []
    optimizer = so.LevenbergMarquardt(net.parameters(), max_iter=5)

    def exact():
        calls.append(1)
        return 2 + mse_loss(net(x), start(x).detach())

    assert [float(optimizer.step(exact)) for _ in range(3)] == [2, 2, 2]
    assert len(calls) == 3
    other = so.LevenbergMarquardt(start.parameters(), max_iter=5)
    for _ in range(2):
        optimizer.step(lambda: mse_loss(net(x), y))
        other.step(lambda: mse_loss(start(x), y))
    torch.testing.assert_close(flat(net), flat(start), rtol=0, atol=0)
    exactly = net(x).detach()
    calls.clear()
    optimizer.step(lambda: calls.append(1) or mse_loss(net(x), exactly))  # also later
    assert len(calls) == 1
    assert optimizer.metrics()["ratio"] == 0


# --- batches ---


def test_points_drawn_in_the_closure_are_the_same_in_a_step_and_new_in_the_next():
    net, _, _ = regression()
    seen = []

    def closure():
        x = torch.rand(30, 2)
        seen.append(x[0, 0].item())
        return mse_loss(net(x), torch.sin(3 * x[:, :1]))

    torch.manual_seed(3)
    optimizer = so.LevenbergMarquardt(net.parameters(), race=False)
    for step in range(6):
        optimizer.step(closure)
        assert len(set(seen)) == step + 1
    torch.manual_seed(3)
    draws = [torch.rand(30, 2)[0, 0].item() for _ in range(6)]
    assert sorted(set(seen)) == sorted(draws)


def test_other_points_at_every_call_are_refused():
    net, _, _ = regression()
    numbers = np.random.default_rng(0)
    before = flat(net)

    def closure():
        x = torch.from_numpy(numbers.random((30, 2)))
        return mse_loss(net(x), x[:, :1])

    with pytest.raises(RuntimeError, match="the same residuals at every call"):
        so.LevenbergMarquardt(net.parameters()).step(closure)
    torch.testing.assert_close(flat(net), before, rtol=0, atol=0)


def test_points_that_change_by_a_counter_are_refused_once_steps_fail():
    net, x, _ = regression()
    calls = 0

    def closure():
        nonlocal calls, x
        calls += 1
        if calls % 50 == 0:
            x = torch.from_numpy(np.random.default_rng(calls).normal(size=(40, 2)))
        return ((net(x) - torch.sin(x[:, :1])) ** 2).mean()

    optimizer = so.LevenbergMarquardt(net, race=False, holdout=False)
    with pytest.raises(RuntimeError, match="they differ at the same parameters"):
        for _ in range(60):
            before = flat(net)
            optimizer.step(closure)
    assert torch.equal(flat(net), before)


def test_sizes_and_orders_that_change_from_step_to_step():
    net, x, y = regression(60, 12)
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=30)
    for step in range(30):
        chosen = torch.randperm(60, generator=torch.Generator().manual_seed(step))[: 40 + step % 7]
        optimizer.step(lambda chosen=chosen: mse_loss(net(x)[chosen], y[chosen]))
    assert mse_loss(net(x), y).item() < 1e-3


def test_graphs_that_send_rows_elsewhere_are_checked_at_every_step(monkeypatch):
    net, x, y = regression(20, 4)
    checked = []
    wrong = checked_jacobian.CheckedJacobian._wrong
    monkeypatch.setattr(checked_jacobian.CheckedJacobian, "_wrong", lambda self, *a: checked.append(1) or wrong(self, *a))
    optimizer = so.LevenbergMarquardt(net.parameters(), race=False)
    for step in range(4):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(step))
        optimizer.step(lambda order=order: mse_loss(net(x)[order], y))
    assert len(checked) >= 4


def test_graphs_with_the_same_index_are_not_checked_at_every_step(monkeypatch):
    net, x, y = regression(20, 4)
    plans = []
    make_plan = checked_jacobian.make_plan
    monkeypatch.setattr(checked_jacobian, "make_plan", lambda *a: plans.append(1) or make_plan(*a))
    optimizer = so.LevenbergMarquardt(net.parameters(), race=False)
    orders = [torch.arange(20).flip(0), torch.randperm(20)]
    for step in range(6):
        optimizer.step(lambda step=step: mse_loss(net(x)[orders[step % 2]], y))
    assert len(plans) == 2


def test_what_was_zero_when_a_graph_was_first_seen_is_found_later():
    """A last layer of zeros hides which rows of the first one are of which residual."""
    net, x, y = regression()
    torch.nn.init.zeros_(net[-1].weight)
    optimizer = so.LevenbergMarquardt(net.parameters(), race=False, acceleration=False, damping=3.0)
    optimizer.step(lambda: mse_loss(net(x).flip(0), y.flip(0)))
    mu = optimizer.metrics()["damping"]
    before, j, r = flat(net), dense_jacobian(net, x) / 40**0.5, (net(x) - y).detach().flatten() / 40**0.5
    optimizer.step(lambda: mse_loss(net(x).flip(0), y.flip(0)))
    matrix = j.T @ j + mu * j.square().sum() * torch.eye(len(before))
    torch.testing.assert_close(flat(net) - before, -torch.linalg.solve(matrix, j.T @ r), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e6])
def test_a_jacobian_that_is_wrong_beside_large_residuals_is_found(size):
    """In single precision; the same as above, in steps that are short beside the targets."""
    torch.manual_seed(0)
    net, x, y = regression()
    net, x, y = net.float(), x.float(), size * y.float()
    torch.nn.init.zeros_(net[-1].weight)
    optimizer = so.LevenbergMarquardt(net.parameters(), race=False, acceleration=False, corrections=0, damping=1e3 * size)
    optimizer.step(lambda: mse_loss(net(x).flip(0), y.flip(0)))
    mu, twin, before = optimizer.metrics()["damping"], copy.deepcopy(net).double(), flat(net)
    optimizer.step(lambda: mse_loss(net(x).flip(0), y.flip(0)))
    j, r = dense_jacobian(twin, x.double()) / 40**0.5, (twin(x.double()) - y).detach().flatten() / 40**0.5
    expected = -torch.linalg.solve(j.T @ j + mu * j.square().sum() * torch.eye(len(before)), j.T @ r)
    moved = (flat(net) - before).double()
    assert (moved - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(("dtype", "small"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_small_columns_that_are_wrong_are_found(dtype, small, monkeypatch):
    """A coefficient whose columns are far smaller than those of a net beside it."""
    torch.manual_seed(0)
    net, x, y = regression()
    net, x, y = net.to(dtype), x.to(dtype), y.to(dtype)
    own = checked_jacobian.jacobian

    def misread(plan, *arguments):
        found = own(plan, *arguments)
        if all(0 not in block.others for block in plan.blocks):
            del found.parts[0]
        return found

    def stepped():
        coefficient, twin = nn.Parameter(torch.zeros(1, dtype=dtype)), copy.deepcopy(net)
        optimizer = so.LevenbergMarquardt([coefficient, *twin.parameters()], race=False)
        optimizer.step(lambda: mse_loss(twin(x), y) + (small * (coefficient * x[:, 0] - 3)).square().mean())
        return coefficient.item()

    right = stepped()
    monkeypatch.setattr(checked_jacobian, "jacobian", misread)
    assert right != 0
    assert stepped() == pytest.approx(right, rel=1e-3)


ORDERS = {  # two ways to turn 40 rows by one kind of nodes
    "view": lambda t, new: t.view(8, 5).T.reshape(-1, 1) if new else t.view(5, 8).T.reshape(-1, 1),
    "split": lambda t, new: torch.cat(t.split([13, 27] if new else [27, 13])[::-1]),
    "diagonal": lambda t, new: torch.cat([t.view(5, 8).diagonal(k) for k in ((1, 0) if new else (0, 1))]),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_rows_in_another_order_by_the_same_nodes_are_found_at_once(order):
    net, x, y = regression()
    rows = torch.arange(40)
    optimizer = so.LevenbergMarquardt(net.parameters(), race=False, acceleration=False, damping=3.0)
    for _ in range(4):
        optimizer.step(lambda: mse_loss(order(net(x), False), order(y, False)))
    mu, taken = optimizer.metrics()["damping"], order(rows, True).flatten()
    before, scale = flat(net), len(taken) ** -0.5
    j, r = scale * dense_jacobian(net, x)[taken], scale * (net(x) - y).detach().flatten()[taken]
    optimizer.step(lambda: mse_loss(order(net(x), True), order(y, True)))
    matrix = j.T @ j + mu * j.square().sum() * torch.eye(len(before))
    torch.testing.assert_close(flat(net) - before, -torch.linalg.solve(matrix, j.T @ r), rtol=1e-6, atol=1e-9)


def late(make, monkeypatch):
    """How far the Jacobians of ten steps are from backward passes for each residual, where something changes before the sixth.

    Args:
        make: returns a net, its loss, and what changes something.
    """
    errors = []
    own = checked_jacobian.CheckedJacobian._found

    def watched(self, plan, here, rows):
        found = own(self, plan, here, rows)
        if found is not None:
            with torch.enable_grad():
                r = (torch.cat([v.flatten() for v in here.values])[rows.flat] * rows.scale).unbind()
            right = [torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True) for one in r]
            dense = torch.stack([torch.cat([g.flatten() for g in row]) for row in right])
            errors.append(float((found.rmm(torch.eye(len(r))).T - dense).norm() / dense.norm()))
        return found

    monkeypatch.setattr(checked_jacobian.CheckedJacobian, "_found", watched)
    net, loss, change = make()
    parameters = list(net.parameters())
    optimizer = so.LevenbergMarquardt(parameters, race=False)
    for k in range(10):
        if k == 5:
            change()
        optimizer.step(loss)
    return max(errors)


SELECTIONS = {
    "mm": lambda p, u: p @ u,
    "mv": lambda p, u: (p @ u[:, 0]).unsqueeze(1),
    "bmm": lambda p, u: torch.bmm(p.unsqueeze(0), u.unsqueeze(0))[0],
    "from the right": lambda p, u: (u.T @ p.T).T,
    "sparse": lambda p, u: torch.sparse.mm(p.to_sparse(), u),
    "rows": lambda p, u: p.to_sparse_csr() @ u,
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", SELECTIONS)
def test_another_matrix_that_selects_points_is_noticed_at_once(name, monkeypatch):
    def make():
        net, x, y = regression()
        chosen = [torch.eye(40)[torch.randperm(40)[:25]]]

        def change():
            chosen[0] = torch.eye(40)[torch.randperm(40)[:25]]

        return net, lambda: mse_loss(SELECTIONS[name](chosen[0], net(x)), chosen[0] @ y), change

    assert late(make, monkeypatch) < 1e-12


def test_points_that_no_unit_has_seen_are_noticed_at_once(monkeypatch):
    def make():
        net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        x, rows = torch.randn(60, 2), torch.randperm(60)[:45]

        def change():
            with torch.no_grad():
                net[0].weight.neg_()  # other units are dead

        return net, lambda: mse_loss(net(x)[rows], torch.sin(x[rows, :1])), change

    assert late(make, monkeypatch) < 1e-12


@pytest.mark.parametrize("race", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_that_cancel_out_move_nothing(race, dtype):
    """Only rounding is left of the Jacobian, in which no two ways of computing it agree."""
    torch.manual_seed(5)
    net, x = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 3)).to(dtype), torch.randn(15, 3, dtype=dtype)
    optimizer, before = so.LevenbergMarquardt(net.parameters(), race=race), flat(net)
    for _ in range(3):
        optimizer.step(lambda: ((net(x).softmax(1).sum(1) - 0.5) ** 2).mean())
    assert torch.equal(flat(net), before)
    assert optimizer.metrics()["ratio"] == 0


def test_targets_of_any_size_are_fitted():
    """In single precision, where the Jacobian is small beside residuals of 1e8, as a stress in pascals."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).float()
    x = torch.linspace(-1, 1, 100, dtype=torch.float32)[:, None]
    y = 1e8 * torch.sin(3 * x)
    optimizer = so.LevenbergMarquardt(net.parameters())
    losses = [float(optimizer.step(lambda: mse_loss(net(x), y))) for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]


def test_layers_that_mix_instances_are_exact_and_said_to_be_slow():
    net = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
    x, y = torch.randn(20, 2), torch.randn(20, 1)
    optimizer = so.LevenbergMarquardt(net.named_parameters(), race=False)
    with pytest.warns(UserWarning, match=r"residuals' own: '0.weight' \(6, 2\) by AddmmBackward0. The steps are exact"):
        first = float(optimizer.step(lambda: mse_loss(net(x), y)))
    for _ in range(20):
        last = float(optimizer.step(lambda: mse_loss(net(x), y)))
    assert last < 0.5 * first


def test_two_residuals_are_no_many_backward_passes():
    """Rosenbrock's function, of one parameter of two numbers."""
    p = nn.Parameter(torch.tensor([-1.2, 1.0]))
    optimizer = so.LevenbergMarquardt([p])
    for _ in range(30):
        loss = optimizer.step(lambda: 100 * (p[1] - p[0] ** 2) ** 2 + (1 - p[0]) ** 2)
    assert loss < 1e-20


def test_a_complex_residual_is_two():
    """However its square is written: the steps are those for its real and its imaginary part."""
    net, x, _ = regression(outputs=2)
    target = torch.exp(3j * x[:, :1])
    start = copy.deepcopy(net.state_dict())
    ways = {
        "parts": lambda z: z.real.square().mean() + z.imag.square().mean(),
        "absolute": lambda z: (z.abs() ** 2).mean(),
        "norm": lambda z: torch.linalg.norm(z) ** 2 / 40,
        "norms of rows": lambda z: torch.linalg.vector_norm(z, dim=1).square().mean(),
        "norms that keep the dimension": lambda z: torch.linalg.vector_norm(z, dim=0, keepdim=True).square().sum() / 40,
    }
    found = {}
    for name, loss in ways.items():
        net.load_state_dict(start)
        optimizer = so.LevenbergMarquardt(net, rows=None, race=False, holdout=False)
        for _ in range(5):
            optimizer.step(lambda loss=loss: loss(torch.complex(net(x)[:, :1], net(x)[:, 1:]) - target))
        found[name] = flat(net)
    for name in ways:
        torch.testing.assert_close(found[name], found["parts"], rtol=1e-6, atol=1e-8)
    with pytest.raises(RuntimeError, match=r"expected real residuals, got complex ones; give their parts, torch.view_as_real"):
        optimizer.step(lambda: [(torch.complex(net(x)[:, 0], net(x)[:, 1]), 1.0)])


def test_a_model_is_its_parameters():
    net, _, _ = regression()
    optimizer = so.LevenbergMarquardt(net)
    assert optimizer.param_groups[0]["params"] == list(net.parameters())


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
