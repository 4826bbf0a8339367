"""LevenbergMarquardt from batch to batch: points that closures draw, and graphs that change."""

import copy

import numpy as np
import pytest
import torch
from helpers.least_squares import dense_jacobian, flat, float64, regression  # noqa: F401
from torch import nn
from torch.nn.functional import mse_loss

import secondorder as so
from secondorder.stepping import checked_jacobian


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
