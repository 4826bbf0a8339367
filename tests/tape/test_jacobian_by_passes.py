"""The Jacobian of residuals where rows are mixed, or parameters need backward passes of their own."""

import pytest
import torch
from helpers.least_squares import float64  # noqa: F401
from helpers.residuals import assert_rows_are_those_of_backward_passes, compared, gradient, mlp, points
from torch import nn
from torch.func import functional_call, hessian, vmap
from torch.nn.functional import mse_loss

from secondorder._tape import jacobian as jacobian_module

FALLBACKS = {}


def fallback(make):
    """A case with parameters that need backward passes of their own."""
    FALLBACKS[make.__name__] = make
    return make


class Mm(torch.autograd.Function):
    """Has the name of a node of torch's own."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w**2

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ (w**2).T, 2 * w * (x.T @ g)


class Mean(torch.autograd.Function):
    """Turns its rows around, which a mean does not."""

    @staticmethod
    def forward(ctx, u):
        return u.flip(0)

    @staticmethod
    def backward(ctx, g):
        return g.flip(0)


@fallback
def functions_with_the_names_of_torchs_own():
    net, x, w = mlp(), points(), nn.Parameter(torch.rand(2, 2))
    return [*net.parameters(), w], lambda: ((Mean.apply(net(Mm.apply(x, w))) - x[:, :1]) ** 2).mean()


class Cube(torch.autograd.Function):
    """A solver of the user's own, whose backward pass is NumPy's."""

    @staticmethod
    def forward(ctx, k):
        ctx.save_for_backward(k)
        return k**3

    @staticmethod
    def backward(ctx, g):
        (k,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * 3 * k.detach().numpy() ** 2)


@fallback
def a_coefficient_whose_second_derivative_is_seen_in_part():
    net, x, k = mlp(), points(), nn.Parameter(torch.tensor([0.7]))
    return [*net.parameters(), k], lambda: ((Cube.apply(k) * net(x) + k.exp()) ** 2).mean()


@fallback
def sparse_matrices():
    nodes, table, last = nn.Parameter(torch.rand(6, 3)), nn.Embedding(6, 3, sparse=True), nn.Linear(3, 1)
    adjacency, rows = (torch.rand(6, 6).round() + torch.eye(6)).to_sparse(), torch.tensor([0, 4, 4, 1, 2, 0])

    def loss():
        return mse_loss(last(torch.tanh(adjacency @ nodes)), torch.ones(6, 1)) + (last(table(rows).tanh()) ** 2).mean()

    return [nodes, *table.parameters(), *last.parameters()], loss


@fallback
def layer_norm():
    first, norm, last, x = nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 1), points()

    def loss():
        return (gradient(last(norm(torch.tanh(first(x)))), x)[:, :1] ** 2).mean()

    return [p for layer in (first, norm, last) for p in layer.parameters()], loss


@fallback
def layer_norm_before_several_outputs():
    net, x = nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)), torch.rand(11, 2)
    return net.parameters(), lambda: mse_loss(net(x), torch.ones(11, 3)) + mse_loss(net(x[:5]), torch.zeros(5, 3))


@fallback
def batch_norm_mixes_instances():
    net, x = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)), points()
    return net.parameters(), lambda: mse_loss(net(x), torch.ones(11, 1))


@fallback
def every_function_at_every_point():
    branch, trunk, f, y = mlp(3, 6), mlp(2, 6), torch.rand(4, 3), points()
    return [*branch.parameters(), *trunk.parameters()], lambda: mse_loss(branch(f) @ trunk(y).T, torch.zeros(4, 11))


@fallback
def functional_derivatives():
    net, x = mlp(), torch.rand(6, 2)
    parameters = dict(net.named_parameters())

    def loss():
        h = vmap(hessian(lambda z: functional_call(net, parameters, (z.unsqueeze(0),)).squeeze()))(x)
        return ((h[:, 0, 0] + h[:, 1, 1] - 1) ** 2).mean()

    return net.parameters(), loss


@fallback
def a_residual_that_is_made_of_parameters():
    w = nn.Parameter(torch.rand(3, 2))
    return [w], lambda: ((w @ w.T - torch.eye(3)) ** 2).sum()


MIXED = {}


def mixed(make):
    """A case whose residuals are functions of products that keep instances apart, each of several instances."""
    MIXED[make.__name__] = make
    return make


@mixed
def finite_differences():
    net, x = mlp(1), torch.linspace(0, 1, 90).view(-1, 1)

    def loss():
        u = net(x)
        return ((u[2:] - 2 * u[1:-1] + u[:-2]) * 100 + u[1:-1] ** 2).square().mean() + u[0].square().sum()

    return net.parameters(), loss


@mixed
def an_integral_equation_with_a_coefficient():
    net, x, k = mlp(1), torch.linspace(0, 1, 70).view(-1, 1).requires_grad_(), nn.Parameter(torch.tensor(0.3))

    def loss():
        u = net(x)
        kernel = torch.exp(-((x - x.T) ** 2)).detach()
        return (gradient(u, x) - k.exp() * (kernel @ u) / 70).square().mean()

    return [*net.parameters(), k], loss


@mixed
def some_of_two_outputs():
    net, x = mlp(n_out=2), points(60)
    known = torch.rand(60, 2) < 0.7
    return net.parameters(), lambda: ((net(x) - 1)[known] ** 2).mean()


@mixed
def outputs_divided_by_their_deviation():
    net, x = mlp(1), torch.rand(70, 1)

    def loss():
        u = net(x)
        return mse_loss((u - u.mean(0)) / u.std(0), torch.sin(x))

    return net.parameters(), loss


@mixed
def a_last_bias_beside_the_products():
    net, x, shift = mlp(1), torch.rand(70, 1), nn.Parameter(torch.rand(1, 70))
    return [*net.parameters(), shift], lambda: ((net(x).cumsum(0) * shift.exp().T) ** 2).mean()


@pytest.mark.parametrize("drawing", [False, True], ids=["all", "drawn"])
@pytest.mark.parametrize("name", [*MIXED, *FALLBACKS])
def test_rows_that_need_passes_are_those_of_one_backward_pass_each(name, drawing):
    assert_rows_are_those_of_backward_passes({**MIXED, **FALLBACKS}[name], drawing)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_rows_come_from_the_jacobian_of_the_products(name):
    plan, *_ = compared(MIXED[name], False)
    first = plan.blocks[0]
    assert first.inner is not None and not any("mm" in node.lower() for node in first.others.values())


def test_outputs_of_one_tensor_share_the_passes_of_their_own(monkeypatch):
    calls, columns = [], jacobian_module.columns_by_passes

    def counted(r, weights, elements, parameters, largest):
        calls.append((len(elements), sorted(p for p, _ in parameters)))
        return columns(r, weights, elements, parameters, largest)

    monkeypatch.setattr(jacobian_module, "columns_by_passes", counted)
    plan, *_ = compared(layer_norm_before_several_outputs, False)
    assert calls == [(33, [2, 3]), (15, [2, 3])]
    assert len(plan.blocks) == 6
