"""Steps of LevenbergMarquardt against dense formulas, and what users of torch's optimizers expect of it."""

import copy
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import secondorder as so
from secondorder.stepping import gauss_newton_step


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def regression(m=40, width=6, outputs=1):
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, outputs))
    x = torch.randn(m, 2)
    y = torch.sin(x[:, :1] * torch.arange(1, outputs + 1)) + x[:, 1:]
    return net, x, y


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def dense_jacobian(net, x):
    parameters = list(net.parameters())
    rows = [torch.autograd.grad(o, parameters, retain_graph=True) for o in net(x).flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def poisson(n=60):
    net = nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1))
    x = torch.rand(n, 2, requires_grad=True)
    edge = torch.rand(20, 2)
    edge[:, 0] = edge[:, 0].round()

    def loss():
        u = net(x)
        g = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        laplacian = sum(torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
        return ((laplacian + 1) ** 2).mean() + 10 * (net(edge) ** 2).mean()

    return net, loss


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


def test_the_acceleration_is_half_the_second_derivative():
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
    for _ in range(60):
        optimizer.step(lambda: mse_loss(net(x), y))
    assert 45 <= optimizer.metrics()["rows"] <= 300


def test_no_more_rows_are_drawn_than_there_are():
    layer, x, y = nn.Linear(2, 1), torch.randn(30, 2), torch.randn(30, 1)
    optimizer = so.LevenbergMarquardt(layer.parameters(), rows=10)
    for _ in range(60):
        optimizer.step(lambda: mse_loss(layer(x), y))
    assert optimizer.metrics()["rows"] == 30


def test_where_there_is_nothing_to_gain_nothing_moves():
    net, x, _ = regression()
    y = net(x).detach()
    before = flat(net)
    optimizer = so.LevenbergMarquardt(net.parameters())
    for _ in range(3):
        assert float(optimizer.step(lambda: mse_loss(net(x), y))) == 0
    torch.testing.assert_close(flat(net), before, rtol=0, atol=0)


# --- losses ---


def trained(net, closure, steps=4, **options):
    model = copy.deepcopy(net)
    optimizer = so.LevenbergMarquardt(model.parameters(), rows=25, **options)
    for _ in range(steps):
        optimizer.step(closure(model, optimizer))
    return flat(model)


def test_closures_in_any_words_give_the_same_steps():
    net, x, y = regression()

    def plain(model, _):
        return lambda: mse_loss(model(x), y) + 3 * (model(x[:5]) ** 2).mean()

    def with_backward(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = plain(model, optimizer)()
            loss.backward()
            return loss

        return closure

    def detached(model, optimizer):
        def closure():
            loss = plain(model, optimizer)()
            (loss / 4).backward()
            (3 * loss / 4).backward()
            return loss.detach()

        return closure

    def listed(model, _):
        return lambda: [(model(x) - y, 1.0), (model(x[:5]), torch.tensor(3.0))]

    def listed_with_weights(model, _):
        return lambda: [(model(x) - y, torch.ones(40, 1)), (model(x[:5]), 3)]

    def with_constants(model, _):
        return lambda: plain(model, _)() + 7

    expected = trained(net, plain)
    for other in (with_backward, detached, listed, listed_with_weights, with_constants):
        torch.testing.assert_close(trained(net, other), expected, rtol=1e-5, atol=1e-6)


def test_a_detached_loss_is_that_of_the_backward_passes_and_of_nothing_else():
    net, x, y = regression()
    before, optimizer = flat(net), so.LevenbergMarquardt(net.parameters())

    def closure(scale=1.0):
        loss = mse_loss(net(x), y)
        (scale * loss).backward()
        return loss.detach()

    with pytest.raises(RuntimeError, match="expected the closure to return the loss that it calls backward on"):
        optimizer.step(lambda: closure(2.0))
    mse_loss(net(x), y).backward()
    with pytest.raises(RuntimeError, match="expected no gradients beside those of the closure's loss"):
        optimizer.step(closure)
    assert torch.equal(flat(net), before)
    assert not optimizer.state
    optimizer.zero_grad()
    optimizer.step(closure)
    assert not torch.equal(flat(net), before)


@pytest.mark.parametrize("loss", [mse_loss, lambda z, y: (z - y).square().mean()], ids=["float32 at last", "bfloat16"])
def test_autocast_is_refused(loss):
    net, x, y = regression()
    net, x, y = net.float(), x.float(), y.float()
    before = flat(net)

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return loss(net(x), y)

    with pytest.raises(RuntimeError, match=r"parameters' dtype, torch.float32, got torch.bfloat16 .* Leave out torch.autocast"):
        so.LevenbergMarquardt(net.parameters()).step(closure)
    assert torch.equal(flat(net), before)


def test_the_gradients_that_the_user_has_are_left_alone():
    net, x, y = regression()
    for p in net.parameters():
        p.grad = torch.full_like(p, 2.0)
    so.LevenbergMarquardt(net.parameters()).step(lambda: mse_loss(net(x), y))
    assert all(bool((p.grad == 2).all()) for p in net.parameters())


def test_backward_works_after_a_step_and_in_other_threads():
    net, x, y = regression()
    inside, seen = threading.Event(), []

    def elsewhere():
        inside.wait()
        w = torch.ones(3, requires_grad=True)
        (w * 2).sum().backward()
        seen.append(w.grad)

    thread = threading.Thread(target=elsewhere)
    thread.start()

    def closure():
        inside.set()
        thread.join()
        loss = mse_loss(net(x), y)
        loss.backward()
        return loss

    so.LevenbergMarquardt(net.parameters(), race=False).step(closure)
    assert torch.equal(seen[0], torch.full((3,), 2.0))
    assert all(p.grad is None for p in net.parameters())
    mse_loss(net(x), y).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_squares_of_parameters_are_residuals_like_any():
    net, x, y = regression()
    before, j = flat(net), dense_jacobian(net, x) / 40**0.5
    r = (net(x) - y).detach().flatten() / 40**0.5
    weights = [p for n, p in net.named_parameters() if "weight" in n]
    optimizer = so.LevenbergMarquardt(net.parameters(), race=False, acceleration=False, damping=0.1)
    optimizer.step(lambda: mse_loss(net(x), y) + sum(0.2 * (p**2).sum() for p in weights) + 0.1 * weights[0].square().sum())
    t = torch.cat([torch.full((p.numel(),), 0.3 if p is weights[0] else 0.2 * (p.ndim > 1)) for p in net.parameters()])
    mu = 0.1 * (j @ j.T).diagonal().mean()
    expected = -torch.linalg.solve(j.T @ j + torch.diag(t + mu), j.T @ r + t * before)
    torch.testing.assert_close(flat(net) - before, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("loss", "numbers"),
    [
        (lambda p: (p**2).sum(), 5),
        (lambda p: [(p, 1.0)], 5),
        (lambda p: p**2, 1),
        (lambda p: torch.trapezoid((p - 0.5) ** 2), 5),
    ],
)
def test_parameters_alone_are_residuals(loss, numbers):
    p = nn.Parameter(torch.rand(() if numbers == 1 else numbers))
    optimizer = so.LevenbergMarquardt([p])
    for _ in range(10):
        value = optimizer.step(lambda: loss(p))
    assert value < 1e-12


def test_two_parameters_alone_make_the_step_of_the_dense_formula():
    x, y = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))
    optimizer = so.LevenbergMarquardt([x, y], race=False, damping=0.1, acceleration=False)
    optimizer.step(lambda: x**2 + 10 * y**2)
    mu = 0.1 * (1 + 10) / 2
    torch.testing.assert_close(x.detach(), torch.tensor(1 - 1 / (1 + mu)))
    torch.testing.assert_close(y.detach(), torch.tensor(2 - 20 / (10 + mu)))


def test_penalties_of_every_solver_and_form_are_the_same():
    net, x, y = regression(80, 8)

    def trained_by(solver, penalty):
        model = copy.deepcopy(net)
        optimizer = so.LevenbergMarquardt(model.parameters(), rows=None, race=False, solver=solver)
        for _ in range(3):
            optimizer.step(lambda: penalty(model))
        return flat(model)

    def scalar(model):
        return mse_loss(model(x), y) + 0.5 * (model[0].weight ** 2).mean()

    def listed(model):
        return [(model(x) - y, 1.0), (model[0].weight, 0.5)]

    expected = trained_by("rows", scalar)
    for solver in ("parameters", "nystrom", "auto"):
        torch.testing.assert_close(trained_by(solver, scalar), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(trained_by("rows", listed), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "criterion", [nn.HuberLoss(delta=0.2), nn.SmoothL1Loss(beta=0.2, reduction="sum"), nn.BCEWithLogitsLoss()]
)
def test_other_criteria_reach_a_minimum(criterion):
    generator = torch.Generator().manual_seed(1)
    layer, x = nn.Linear(3, 1), torch.randn(200, 3, generator=generator)
    y = (x @ torch.tensor([[1.0], [-2.0], [0.5]]) + torch.randn(200, 1, generator=generator)).sigmoid().round()
    optimizer = so.LevenbergMarquardt(layer.parameters(), rows=None)
    for _ in range(25):
        optimizer.step(lambda: criterion(layer(x), y))
    gradients = torch.autograd.grad(criterion(layer(x), y), list(layer.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-6 * (200 if criterion.reduction == "sum" else 1)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_reaches_a_minimum(reduction, shape):
    generator = torch.Generator().manual_seed(1)
    layer, x = nn.Linear(3, 4), torch.randn(90, *shape, 3, generator=generator)
    y = (2 * x[..., 0] + torch.randn(90, *shape, generator=generator)).round().clamp(-1, 2).long() + 1
    y[::7] = -100  # rows that do not count

    def loss():
        logits = layer(x).movedim(-1, 1)
        return nn.functional.cross_entropy(logits, y, weight=torch.tensor([1.0, 2.0, 0.5, 1.0]), reduction=reduction)

    optimizer = so.LevenbergMarquardt(layer.parameters(), rows=None, holdout=False)
    for _ in range(40):
        optimizer.step(loss)
    gradients = torch.autograd.grad(loss(), list(layer.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-4 * (len(y.flatten()) if reduction == "sum" else 1)


def test_what_depends_on_no_parameter_is_a_constant():
    net, x, y = regression()
    plain = trained(net, lambda model, _: lambda: mse_loss(model(x), y), race=False)
    constant = trained(net, lambda model, _: lambda: [(model(x) - y, 1.0), (torch.ones(3), 2.0)], race=False)
    torch.testing.assert_close(constant, plain, rtol=1e-9, atol=1e-12)


def test_two_outputs_of_one_node_are_two_residuals():
    net, x, _ = regression(outputs=2)
    with pytest.raises(RuntimeError, match="a product or quotient of two things"):
        so.LevenbergMarquardt(net.parameters()).step(lambda: torch.mul(*net(x).unbind(1)).mean())


class Off(torch.autograd.Function):
    """The identity, as its gradient says, and one more."""

    @staticmethod
    def forward(ctx, x):
        return x + 1

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("loss", [lambda u: Off.apply((u**2).mean()), lambda u: (u**2).mean() + u.mean()])
def test_what_the_graph_does_not_show_is_refused(loss):
    net, x, _ = regression()
    before = flat(net)
    with pytest.raises(RuntimeError, match="sum of means or sums of squares"):
        so.LevenbergMarquardt(net.parameters()).step(lambda: loss(net(x)))
    torch.testing.assert_close(flat(net), before, rtol=0, atol=0)


def test_a_value_that_is_not_that_of_its_graph_is_refused():
    net, x, y = regression()

    def closure():
        loss = mse_loss(net(x), y)
        loss.data.mul_(1.01)
        return loss

    with pytest.raises(RuntimeError, match="the sum of the squares that its graph shows"):
        so.LevenbergMarquardt(net.parameters()).step(closure)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda u: (u**2).mean().item(), "got float"),
        (lambda u: (u**2).mean().detach(), "depends on a trained parameter"),
        (lambda u: u**2, "a tensor of shape"),
        (lambda u: None, "got NoneType"),
        (lambda u: [], "got list"),
        (lambda u: [(u, -1.0)], "negative coefficient"),
        (lambda u: [(u, torch.ones(40))], r"expands to its residual's shape, \(40, 1\), got one of shape \(40,\)"),
        (lambda u: [(u, torch.ones(3, 40, 1))], r"got one of shape \(3, 40, 1\)"),
        (lambda u: [(u, torch.ones(7, 1))], r"got one of shape \(7, 1\)"),
        (lambda u: [(mse_loss(u, torch.ones_like(u)), 1.0)], "a sum of squares itself"),
        (lambda u: [(u, 1.0), (0.1 * u.square().sum(), 1.0)], "a sum of squares itself"),
        (lambda u: [u], "got list"),
    ],
)
def test_closures_that_return_something_else_are_refused(result, message):
    net, x, _ = regression()
    with pytest.raises(RuntimeError, match=message):
        so.LevenbergMarquardt(net.parameters()).step(lambda: result(net(x)))
    with pytest.raises(RuntimeError, match="expected a closure"):
        so.LevenbergMarquardt(net.parameters()).step()


@pytest.mark.parametrize(
    ("optimizer", "option"),
    [("LevenbergMarquardt", "create_graph=True"), ("LevenbergMarquardt", "inputs"), ("LayerwiseNewton", "create_graph=True")],
)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_derivatives_by_backward_are_refused(optimizer, option):
    net, x, y = regression()
    x.requires_grad_()
    criterion = nn.MSELoss()
    optimizer = so.LayerwiseNewton(net, criterion) if optimizer == "LayerwiseNewton" else so.LevenbergMarquardt(net)

    def closure():
        optimizer.zero_grad()
        x.grad = None
        u = net(x)
        more = {"create_graph": True} if option != "inputs" else {"inputs": [x], "retain_graph": True}
        u.backward(torch.ones_like(u), **more)
        loss = criterion(net(x), y) + (0 if x.grad is None else x.grad.square().mean())
        loss.backward()
        return loss

    before = flat(net)
    with pytest.raises(RuntimeError, match=f"got {option}. Take derivatives .* by torch.autograd.grad"):
        optimizer.step(closure)
    assert torch.equal(flat(net), before)


def test_scalars_made_of_squares_are_residuals_where_there_is_more_to_them():
    p = nn.Parameter(torch.tensor([0.6, 0.3]))
    optimizer = so.LevenbergMarquardt([p])
    for _ in range(10):
        optimizer.step(lambda: [(p.square().sum() - 1, torch.ones(())), (p[0] ** 2 - p[1] ** 2, 1.0)])
    torch.testing.assert_close(p.detach().square(), torch.full((2,), 0.5))


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
    wrong = gauss_newton_step.GaussNewtonStep._wrong
    monkeypatch.setattr(gauss_newton_step.GaussNewtonStep, "_wrong", lambda self, *a: checked.append(1) or wrong(self, *a))
    optimizer = so.LevenbergMarquardt(net.parameters(), race=False)
    for step in range(4):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(step))
        optimizer.step(lambda order=order: mse_loss(net(x)[order], y))
    assert len(checked) >= 4


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


def noisy(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    x, test = torch.rand(300, 2, generator=generator), torch.rand(500, 2, generator=generator)

    def f(points):
        return torch.sin(3 * points[:, :1]) * points[:, 1:]

    y = f(x) + 0.1 * torch.randn(300, 1, generator=generator)
    return net, lambda: mse_loss(net(x), y), lambda: float((net(test) - f(test)).detach().norm() / f(test).norm())


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


def test_nothing_is_held_out_where_residuals_are_many():
    net, x, y = regression(400, 6)
    optimizer = so.LevenbergMarquardt(net.parameters())
    optimizer.step(lambda: mse_loss(net(x), y))
    assert optimizer.metrics()["excess"] == 0


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


def test_a_compiled_model(monkeypatch):
    monkeypatch.setattr("torch._functorch.config.donated_buffer", False)
    net, x, y = regression(20, 4)
    compiled = torch.compile(net, backend="aot_eager")
    expected = trained(net, lambda model, _: lambda: mse_loss(model(x), y), race=False)
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=25, race=False)
    with pytest.warns(UserWarning, match="CompiledFunctionBackward"):
        optimizer.step(lambda: mse_loss(compiled(x), y))
    for _ in range(3):
        optimizer.step(lambda: mse_loss(compiled(x), y))
    torch.testing.assert_close(flat(net), expected, rtol=1e-6, atol=1e-9)


# --- habits ---


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    net, loss = poisson()
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=30)
    for _ in range(3):
        optimizer.step(loss)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    for _ in range(5):
        optimizer.step(loss)
    expected = flat(net)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = so.LevenbergMarquardt(net.parameters(), rows=30)
    net.load_state_dict(saved["net"])
    again.load_state_dict(saved["optimizer"])
    for _ in range(5):
        again.step(loss)
    torch.testing.assert_close(flat(net), expected, rtol=0, atol=0)


def test_a_foreign_state_is_refused():
    net, x, y = regression()
    adam = torch.optim.Adam(net.parameters())
    mse_loss(net(x), y).backward()
    adam.step()
    with pytest.raises(ValueError, match="expected a state with"):
        so.LevenbergMarquardt(net.parameters()).load_state_dict(adam.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_optimizer_train_alike(copied):
    net, x, y = regression()
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=20)
    optimizer.step(lambda: mse_loss(net(x), y))
    other, theirs = copied((net, optimizer))
    for _ in range(3):
        optimizer.step(lambda: mse_loss(net(x), y))
        theirs.step(lambda: mse_loss(other(x), y))
    torch.testing.assert_close(flat(other), flat(net), rtol=0, atol=0)


def test_lr_multiplies_the_step_and_its_square_the_acceleration():
    net, x, y = regression()
    before, moves = flat(net), {}
    for lr in (0.5, 1.0, 1.5):
        model = copy.deepcopy(net)
        so.LevenbergMarquardt(model.parameters(), lr=lr, race=False, damping=10.0).step(lambda model=model: mse_loss(model(x), y))
        moves[lr] = flat(model) - before
    # With lr d + lr^2 b, d and b from two of them give the third.
    b = 2 * moves[1.0] - 4 * moves[0.5]
    d = moves[1.0] - b
    torch.testing.assert_close(moves[1.5], 1.5 * d + 2.25 * b, rtol=1e-6, atol=1e-9)
    assert b.norm() > 1e-3 * d.norm()


def test_lr_multiplies_the_step_of_its_group_and_schedulers_change_it():
    net, x, y = regression()
    before = flat(net)

    def moved(params, lr):
        model = copy.deepcopy(net)
        params = params(model)
        optimizer = so.LevenbergMarquardt(params, lr=lr, race=False, acceleration=False, damping=10.0)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=1)
        optimizer.step(lambda: mse_loss(model(x), y))
        scheduler.step()
        return flat(model) - before

    whole = moved(lambda m: m.parameters(), 1.0)
    torch.testing.assert_close(moved(lambda m: m.parameters(), 0.5), whole / 2)
    halves = moved(lambda m: [{"params": m[0].parameters(), "lr": 1.0}, {"params": m[2].parameters()}], 0.5)
    n = sum(p.numel() for p in net[0].parameters())
    torch.testing.assert_close(halves[:n], whole[:n])
    torch.testing.assert_close(halves[n:], whole[n:] / 2)


def test_frozen_parameters_stay_and_may_be_unfrozen():
    net, x, y = regression(40, 12)
    net[0].requires_grad_(False)
    optimizer = so.LevenbergMarquardt(net.parameters())
    first = net[0].weight.detach().clone()
    for _ in range(3):
        optimizer.step(lambda: mse_loss(net(x), y))
    assert torch.equal(net[0].weight, first)
    frozen = mse_loss(net(x), y).item()
    net[0].requires_grad_(True)
    for _ in range(30):
        optimizer.step(lambda: mse_loss(net(x), y))
    assert mse_loss(net(x), y).item() < 0.1 * frozen
    net.requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires a gradient"):
        optimizer.step(lambda: mse_loss(net(x), y))


def test_what_is_held_out_begins_anew_with_other_parameters():
    net, loss, _ = noisy()
    net[0].requires_grad_(False)
    optimizer = so.LevenbergMarquardt(net.parameters(), holdout=True, race=False)
    for _ in range(3):
        optimizer.step(loss)
    frozen = len(optimizer.state[net[0].weight]["best"])
    net[0].requires_grad_(True)
    optimizer.step(loss)
    assert len(optimizer.state[net[0].weight]["best"]) == frozen + 60


@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_what_is_not_finite_changes_nothing(nonfinite):
    net, x, y = regression()
    optimizer = so.LevenbergMarquardt(net.parameters(), nonfinite=nonfinite)
    optimizer.step(lambda: mse_loss(net(x), y))
    before, state = flat(net), copy.deepcopy(optimizer.state_dict()["state"])
    bad = y.clone()
    bad[3] = float("inf")
    if nonfinite == "error":
        with pytest.raises(so.NonFiniteError, match="the loss is inf"):
            optimizer.step(lambda: mse_loss(net(x), bad))
    else:
        assert float(optimizer.step(lambda: mse_loss(net(x), bad))) == float("inf")
        assert optimizer.skipped_steps == 1
    torch.testing.assert_close(flat(net), before, rtol=0, atol=0)
    assert str(optimizer.state_dict()["state"]) == str(state)
    optimizer.step(lambda: mse_loss(net(x), y))


def test_an_error_in_a_trial_takes_the_step_back():
    net, x, y = regression()
    optimizer = so.LevenbergMarquardt(net.parameters())
    optimizer.step(lambda: mse_loss(net(x), y))
    before, calls = flat(net), []

    def closure():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return mse_loss(net(x), y)

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    torch.testing.assert_close(flat(net), before, rtol=0, atol=0)
    assert torch.autograd.backward.__module__ == "torch.autograd"


def test_float32():
    net, x, y = regression()
    net, x, y = net.float(), x.float(), y.float()
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=20)
    first = float(optimizer.step(lambda: mse_loss(net(x), y)))
    for _ in range(30):
        last = float(optimizer.step(lambda: mse_loss(net(x), y)))
    assert last < 1e-2 * first


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": 0.0}, ValueError), ({"lr": 2.0}, ValueError), ({"lr": "a"}, TypeError), ({"rows": 0}, ValueError),
        ({"rows": 2.5}, ValueError), ({"max_rows": -1}, ValueError), ({"damping": 0.0}, ValueError),
        ({"solver": "cg"}, ValueError), ({"memory": -1}, ValueError), ({"nonfinite": "no"}, ValueError),
        ({"seed": None}, ValueError), ({"holdout": 0.1}, ValueError),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(options, error):
    with pytest.raises(error, match=f"LevenbergMarquardt: expected {next(iter(options))}"):
        so.LevenbergMarquardt(nn.Linear(2, 1).parameters(), **options)


def test_parameters_of_several_dtypes_are_refused():
    with pytest.raises(TypeError, match="of one dtype, float32 or float64"):
        so.LevenbergMarquardt([*nn.Linear(2, 1).parameters(), *nn.Linear(2, 1).float().parameters()])
    with pytest.raises(TypeError, match="of one dtype, float32 or float64"):
        so.LevenbergMarquardt(nn.Linear(2, 1).bfloat16().parameters())


def test_the_warm_up_goes_on_until_the_loss_has_halved(monkeypatch):
    steps = []
    own = so.EigenAdam.step
    monkeypatch.setattr(so.EigenAdam, "step", lambda self, closure=None: steps.append(1) or own(self, closure))
    fast, x, y = regression()
    so.LevenbergMarquardt(fast.parameters()).step(lambda: mse_loss(fast(x), y))
    assert len(steps) == gauss_newton_step.RACE_WARM_UP
    steps.clear()
    slow = nn.Linear(20, 1)
    so.LevenbergMarquardt(slow.parameters()).step(lambda: ((slow(torch.ones(5, 20)) - 1e6) ** 2).mean())
    assert len(steps) == gauss_newton_step.RACE_LONGEST


@pytest.mark.parametrize("write", [lambda p: p.clamp_(-10, 10), lambda p: p.clamp_(0, 1), lambda p: p.data.clamp_(0, 1)])
def test_a_closure_that_writes_to_a_parameter_is_refused(write):
    """As one that keeps an image's pixels in their range; where it changes no number, too, since graphs would not hold."""
    x = torch.linspace(0, 5, 60)
    p = nn.Parameter(torch.tensor([1.0, 1.0]))

    def closure():
        with torch.no_grad():
            write(p)
        return (p[0] * (-p[1] * x).exp() - 2.5 * (-1.3 * x).exp()).square().sum()

    optimizer = so.LevenbergMarquardt([p])
    with pytest.raises(RuntimeError, match=r"writes to the one of shape \(2,\). Clamp or project it after the step"):
        for _ in range(3):
            optimizer.step(closure)
    assert torch.equal(p, torch.ones(2))


# --- what strangers' scripts do with L-BFGS ---


def after_steps(net, loss, steps=5, **options):
    optimizer = so.LevenbergMarquardt(net.parameters(), **options)
    for _ in range(steps):
        optimizer.step(lambda: loss(net))
    return flat(net)


def test_targets_in_float64_train_a_net_in_float32():
    net, x, y = regression()
    net = net.float()
    other = copy.deepcopy(net)
    x = x.float()
    found, expected = (
        after_steps(n, lambda n, t=t: mse_loss(n(x), t), 1, race=False, damping=1.0) for n, t in ((net, y), (other, y.float()))
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    k = nn.Parameter(torch.ones(2, dtype=torch.float32))
    matrix = nn.Parameter(torch.ones(2, 1, dtype=torch.float32))
    optimizer, inputs = so.LevenbergMarquardt([k, matrix]), torch.rand(50, 2)
    right = torch.tensor([3.0, -1.0])
    for _ in range(5):  # parameters that act on float64 themselves
        optimizer.step(
            lambda: mse_loss((k * inputs).sum(1), inputs @ right) + mse_loss(inputs @ matrix.double(), -inputs @ right[:, None])
        )
    torch.testing.assert_close(k.detach().double(), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix.detach().flatten().double(), -right, rtol=1e-5, atol=1e-5)


def test_fewer_digits_than_the_parameters_have_are_refused():
    net, x, y = regression()
    with pytest.raises(RuntimeError, match=r"parameters' dtype, torch.float64, got torch.float32 .* and .float\(\)"):
        so.LevenbergMarquardt(net.parameters()).step(lambda: mse_loss(net(x).float(), y.float()))


def test_a_number_is_that_of_the_backward_passes():
    net, x, y = regression()
    other = copy.deepcopy(net)

    def in_parts(net):
        total = 0.0
        for half in (slice(20), slice(20, 40)):
            loss = mse_loss(net(x[half]), y[half]) / 2
            loss.backward()
            total += loss.item()
        return total

    whole = after_steps(other, lambda net: (mse_loss(net(x[:20]), y[:20]) + mse_loss(net(x[20:]), y[20:])) / 2)
    torch.testing.assert_close(after_steps(net, in_parts), whole)


def test_a_loss_beside_other_backward_passes_is_refused():
    net, x, y = regression()
    before = flat(net)

    def closure():
        u = net(x)
        loss = mse_loss(u, y)
        loss.backward(retain_graph=True)
        (0.1 * u.square().mean()).backward()
        return loss

    with pytest.raises(RuntimeError, match="expected the closure to return the loss that it calls backward on"):
        so.LevenbergMarquardt(net.parameters()).step(closure)
    assert torch.equal(flat(net), before)


def test_messages_say_what_to_do():
    net, x, y = regression()
    k = nn.Parameter(torch.tensor(2.0))
    optimizer = so.LevenbergMarquardt([*net.parameters(), k])
    before = flat(net)

    def reads_gradients():
        loss = mse_loss(k * net(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert k.grad.norm() >= 0
        return loss

    def projects():
        with torch.no_grad():
            k.clamp_(0, 1)
        return mse_loss(k * net(x), y)

    for closure, error, message in [
        (reads_gradients, RuntimeError, "computes no gradients. Take them by torch.autograd.grad"),
        (projects, RuntimeError, r"writes to the one of shape \(\). Clamp or project it after the step"),
        (lambda: (mse_loss(net(x), y), 1.0), RuntimeError, "return the loss alone"),
        (lambda: None, RuntimeError, "end the closure with return loss"),
        (lambda: mse_loss(net(x), y).item(), RuntimeError, "not loss.item"),
        (lambda: (net(x) - y).norm() / y.norm(), RuntimeError, "the squares, as .* have the same minimum"),
        (lambda: mse_loss(net(x), y).log(), RuntimeError, "Leave out the root, norm or logarithm"),
        (lambda: (net(x) - y).abs().mean(), RuntimeError, "take nn.HuberLoss"),
        (lambda: (net(x).square() - net(x)).mean(), RuntimeError, "In an energy .* complete the square"),
        (lambda: (net(x) - y).cosh().log().mean(), RuntimeError, r"in place of log\(cosh\(r\)\) take smooth L1"),
        (lambda: (k * (net(x) - y) ** 2).mean(), RuntimeError, "Give trained weights of the terms to another optimizer"),
        (lambda: (-k).exp() * mse_loss(net(x), y) + k, RuntimeError, "another optimizer|detach weights"),
        (mse_loss(net(x), y), TypeError, "expected a closure, a function"),
    ]:
        k.data.fill_(2.0)
        with pytest.raises(error, match=message):
            optimizer.step(closure)
        assert torch.equal(flat(net), before)
    with pytest.raises(TypeError, match=r"torch.view_as_complex\(p\)"):
        so.LevenbergMarquardt([k, nn.Parameter(torch.ones(2, dtype=torch.complex128))])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_is_given_twice_counts_once():
    net, x, y = regression()
    other = copy.deepcopy(net)
    expected = after_steps(other, lambda net: mse_loss(net(x), y))
    optimizer = so.LevenbergMarquardt(2 * list(net.parameters()))
    for _ in range(5):
        optimizer.step(lambda: mse_loss(net(x), y))
    assert torch.equal(flat(net), expected)


@pytest.mark.filterwarnings("ignore:secondorder. LevenbergMarquardt needs a backward pass")
def test_backward_passes_for_residuals_are_the_same_one_by_one(monkeypatch):
    torch.manual_seed(0)
    net, _, _ = regression()
    start = torch.randn(3, 2)

    def loss(net):
        y, path = start, []
        for _ in range(10):
            y = y + 0.1 * torch.cat([net(y), -net(-y)], 1)
            path.append(y)
        return (torch.stack(path) - 1).square().mean()

    nets = [copy.deepcopy(net) for _ in range(3)]
    found = [after_steps(nets[0], loss, 1)]
    grad = torch.autograd.grad

    def no_vmap(*args, is_grads_batched=False, **kwargs):
        if is_grads_batched:
            raise RuntimeError("no batching rule")
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", no_vmap)
    found.append(after_steps(nets[1], loss, 1))
    monkeypatch.undo()
    monkeypatch.setattr("secondorder._tape.jacobian.BATCH", 1)
    found.append(after_steps(nets[2], loss, 1))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)
