"""Steps of LevenbergMarquardt against dense formulas, in any units, and the rows that they draw."""

import copy

import pytest
import torch
from helpers.least_squares import dense_jacobian, flat, float64, poisson, regression  # noqa: F401
from torch import nn
from torch.nn.functional import mse_loss

import secondorder as so
from secondorder.stepping import gauss_newton_step


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
