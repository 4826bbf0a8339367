"""The Jacobian of residuals found in a scalar loss's graph, against one backward pass for each residual."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, vmap
from torch.nn.functional import (
    avg_pool1d,
    avg_pool2d,
    binary_cross_entropy_with_logits,
    huber_loss,
    mse_loss,
    pad,
    pairwise_distance,
    smooth_l1_loss,
    soft_margin_loss,
)

from secondorder._tape.jacobian import Buffer, jacobian, make_plan
from secondorder._tape.residuals import Reach, coefficients, find_terms
from secondorder._tape.uses import find_uses


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradient(u, x):
    return torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]


def mlp(n_in=2, n_out=1, activation=nn.Tanh):
    return nn.Sequential(nn.Linear(n_in, 8), activation(), nn.Linear(8, 7), activation(), nn.Linear(7, n_out))


def points(m=11, n=2):
    return torch.rand(m, n).requires_grad_()


CASES = {}


def case(make):
    """A function that returns parameters and the closure of a loss."""
    CASES[make.__name__] = make
    return make


@case
def poisson():
    net, x, edge = mlp(), points(), torch.rand(5, 2)

    def loss():
        g = gradient(net(x), x)
        laplacian = gradient(g[:, :1], x)[:, :1] + gradient(g[:, 1:], x)[:, 1:]
        return ((laplacian - 1) ** 2).mean() + 100 * mse_loss(net(edge), torch.zeros(5, 1))

    return net.parameters(), loss


@case
def flat_residuals_of_one_dimension():
    net, x = mlp(), points()

    def loss():
        g = gradient(net(x), x)
        return torch.mean((gradient(g[:, 0], x)[:, 0] + gradient(g[:, 1], x)[:, 1]) ** 2)

    return net.parameters(), loss


@case
def inputs_joined_in_the_loss():
    net, t, s = mlp(), points(11, 1), points(11, 1)

    def loss():
        u = net(torch.cat([t, s], 1))
        return ((gradient(u, t) - 0.1 * gradient(gradient(u, s), s)) ** 2).mean()

    return net.parameters(), loss


@case
def sums_with_weights_stacked():
    net, x = mlp(), points()
    weights = torch.rand(11, 1)

    def loss():
        terms = torch.stack(
            [(weights * (net(x) - 1) ** 2).sum(), torch.square(net(x[:4])).mean(), (net(x[:3]) * 2).pow(2).mean()]
        )
        return (terms * torch.tensor([0.5, 3.0, 0.1])).sum() / 7

    return net.parameters(), loss


@case
def squares_in_other_words():
    net, x = mlp(), points()

    def loss():
        r = net(x)[:, 0] - 1
        return torch.linalg.norm(net(x) - 2) ** 2 + torch.dot(r, r) + r @ r + (r * r).sum()

    return net.parameters(), loss


@case
def squares_of_absolute_values_and_norms():
    net, x = mlp(2, 3), points()

    def loss():
        u = net(x)
        norms = torch.linalg.norm(u, dim=1) ** 2 * torch.arange(1.0, 12.0)
        kept = torch.linalg.vector_norm(net(2 * x), dim=-1, keepdim=True).square()
        return norms.mean() + kept.sum() + (net(x + 1).abs() ** 2).mean()

    return net.parameters(), loss


@case
def a_coefficient_of_the_equation():
    net, x, factor, offset = mlp(), points(), nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor([0.2]))

    def loss():
        u = net(x)
        g = gradient(u, x)
        return ((g[:, :1] + factor * u * g[:, 1:] - offset) ** 2).mean() + mse_loss(net(x[:5]), torch.ones(5, 1))

    return [*net.parameters(), factor, offset], loss


@case
def the_exponential_of_a_coefficient():
    net, x, factor = mlp(), points(), nn.Parameter(torch.tensor(0.7))

    def loss():
        g = gradient(net(x), x)
        return ((g[:, 0] + factor.exp() * g[:, 1] + factor) ** 2).mean()

    return [*net.parameters(), factor], loss


@case
def a_system_of_two_outputs():
    net, x = mlp(2, 2), points()

    def loss():
        u, v = net(x).split(1, 1)
        gu, gv = gradient(u, x), gradient(v, x)
        return ((gu[:, :1] + gv[:, 1:]) ** 2).mean() + ((u * gu[:, :1] + gv[:, :1]) ** 2).mean()

    return net.parameters(), loss


@case
def a_vector_of_outputs():
    net, x, y = mlp(2, 3), points(), torch.rand(11, 3)
    return net.parameters(), lambda: mse_loss(net(x), y)


@case
def one_call_that_is_sliced():
    net, x, edge = mlp(), points(), torch.rand(5, 2)

    def loss():
        u = net(torch.cat([x, edge]))
        return (gradient(u, x)[:, :1] ** 2).mean() + (u[11:] ** 2).mean()

    return net.parameters(), loss


@case
def rows_by_an_index():
    net, x, order = mlp(), points(), torch.randperm(11)
    return net.parameters(), lambda: (net(x)[order][:6] ** 2).mean()


@case
def a_dead_layer():
    net, x = mlp(activation=nn.ReLU), points()
    with torch.no_grad():
        net[0].bias.fill_(-9)
    return net.parameters(), lambda: mse_loss(net(torch.cat([x, x]))[11:], torch.ones(11, 1))


@case
def three_dimensional_inputs():
    net, x = mlp(), points(12).view(3, 4, 2)
    return net.parameters(), lambda: mse_loss(net(x), torch.zeros(3, 4, 1))


@case
def a_sum_over_points():
    net, x = mlp(), points(12).view(3, 4, 2)
    return net.parameters(), lambda: mse_loss(net(x).sum(1), torch.zeros(3, 1))


@case
def fourier_features():
    net, x, frequencies = mlp(12), points(), torch.randn(2, 6)

    def loss():
        z = x @ frequencies
        g = gradient(net(torch.cat([z.sin(), z.cos()], 1)), x)
        return (gradient(g[:, 0], x)[:, 0] ** 2).mean()

    return net.parameters(), loss


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(30 * x)


@case
def siren():
    net, x = mlp(activation=Sine), points()
    return net.parameters(), lambda: (gradient(gradient(net(x), x)[:, 0], x) ** 2)[:, :1].mean()


@case
def adaptive_activations():
    net, x, a, b = mlp(), points(), nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.rand(7))

    def loss():
        u = net[4](torch.tanh(b * net[2](torch.tanh(a * net[0](x)))))
        return (gradient(gradient(u, x)[:, :1], x)[:, :1] ** 2).mean()

    return [*net.parameters(), a, b], loss


@case
def modified_mlp():
    u, v, first, second, last = (nn.Linear(i, o) for i, o in ((2, 8), (2, 8), (2, 8), (8, 8), (8, 1)))
    x = points()

    def loss():
        left, right, h = torch.tanh(u(x)), torch.tanh(v(x)), torch.tanh(first(x))
        for layer in (second,):
            h = torch.tanh(layer(h * left + (1 - h) * right))
        return (gradient(gradient(last(h), x)[:, :1], x)[:, :1] ** 2).mean()

    return [p for layer in (u, v, first, second, last) for p in layer.parameters()], loss


@case
def weight_norm():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 8)), nn.Tanh(), nn.Linear(8, 1))
    x = points()
    return net.parameters(), lambda: (gradient(net(x), x)[:, :1] ** 2).mean()


@case
def deeponet():
    branch, trunk, f, y = mlp(3, 6), mlp(2, 6), torch.rand(11, 3), points()

    def loss():
        u = (branch(f) * trunk(y)).sum(1, keepdim=True)
        return mse_loss(gradient(u, y)[:, :1], u)

    return [*branch.parameters(), *trunk.parameters()], loss


@case
def a_layer_twice():
    first, again, last, x = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 1), points()

    def loss():
        h = torch.tanh(first(x))
        for _ in range(2):
            h = h + torch.tanh(again(h))
        return (gradient(last(h), x)[:, :1] ** 2).mean()

    return [p for layer in (first, again, last) for p in layer.parameters()], loss


@case
def einsum():
    w, v, x = nn.Parameter(torch.rand(2, 8)), nn.Parameter(torch.rand(8, 1)), points()

    def loss():
        u = torch.einsum("bo,op->bp", torch.tanh(torch.einsum("oi,bi->bo", w.t(), x)), v)
        return (gradient(u, x)[:, :1] ** 2).mean()

    return [w, v], loss


@case
def products_from_the_left():
    w, v, x = nn.Parameter(torch.rand(8, 2)), nn.Parameter(torch.rand(1, 8)), torch.rand(2, 11)
    return [w, v], lambda: ((v @ torch.tanh(w @ x)) ** 2).mean()


@case
def one_flat_vector_of_parameters():
    flat, x = nn.Parameter(torch.rand(24)), points()

    def loss():
        u = torch.tanh(x @ flat[:16].view(2, 8)) @ flat[16:].view(8, 1)
        return (gradient(u, x)[:, :1] ** 2).mean()

    return [flat], loss


@case
def a_scaled_weight_and_a_scaled_input():
    w, v, x, scale = nn.Parameter(torch.rand(2, 8)), nn.Parameter(torch.rand(8, 1)), points(), nn.Parameter(torch.rand(1, 2))
    return [w, v, scale], lambda: ((torch.tanh((x * scale) @ (-w * 0.3 / 2)) @ v) ** 2).mean()


@case
def bilinear():
    first, last, x = nn.Bilinear(2, 2, 5), nn.Linear(5, 1), points()

    def loss():
        u = last(torch.tanh(first(x, x)))
        return mse_loss(gradient(u, x)[:, :1], torch.zeros(11, 1))

    return [*first.parameters(), *last.parameters()], loss


@case
def convolutions():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(3, 2, 2, dilation=2), nn.Flatten(), nn.Linear(2, 1)
    )
    x = torch.rand(5, 1, 6, 6)
    return net.parameters(), lambda: mse_loss(net(x), torch.zeros(5, 1))


@case
def a_convolution_of_one_dimension():
    net, x = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 1)), torch.rand(5, 2, 6)
    return net.parameters(), lambda: mse_loss(net(x), torch.zeros(5, 1))


@case
def a_gru_cell_twice():
    cell, last, x = nn.GRUCell(2, 4), nn.Linear(4, 1), points()
    return [*cell.parameters(), *last.parameters()], lambda: mse_loss(last(cell(x, cell(x))), torch.zeros(11, 1))


@case
def weights_that_adapt_by_themselves():
    net, x, weights = mlp(), points(), torch.rand(11, 1, requires_grad=True)
    return net.parameters(), lambda: (weights * (net(x) - 1) ** 2).mean()


@case
def two_equations_joined():
    net, x = mlp(n_out=2), points()

    def loss():
        u, v = net(x).split(1, 1)
        return torch.cat([gradient(u, x)[:, :1] - v, gradient(v, x)[:, 1:] + u]).square().mean()

    return net.parameters(), loss


@case
def two_equations_stacked_with_their_points():
    net, x = mlp(n_out=2), torch.rand(5, 3, 2).requires_grad_()

    def loss():
        u, v = net(x).unbind(-1)
        return torch.stack([gradient(u, x)[..., 0] - v, gradient(v, x)[..., 1] + u]).square().mean()

    return net.parameters(), loss


@case
def equations_of_different_lengths_joined():
    net, x = mlp(n_out=2), points()

    def loss():
        u = net(x)
        return torch.cat([u[:, 0], (u[:7, 0] + 1) * u[:7, 1], u[2:, 1]]).square().mean()

    return net.parameters(), loss


@case
def coefficients_of_basis_functions():
    c, basis = nn.Parameter(torch.rand(4)), torch.rand(11, 4)
    return [c], lambda: (((basis @ c).exp() - 1) ** 2).mean()


FALLBACKS = {}


def fallback(make):
    """A case with parameters that need backward passes of their own."""
    FALLBACKS[make.__name__] = make
    return make


@fallback
def layer_norm():
    first, norm, last, x = nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 1), points()

    def loss():
        return (gradient(last(norm(torch.tanh(first(x)))), x)[:, :1] ** 2).mean()

    return [p for layer in (first, norm, last) for p in layer.parameters()], loss


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
def an_ensemble_of_weights():
    w, x = nn.Parameter(torch.rand(3, 2, 4)), torch.rand(5, 2)
    return [w], lambda: (torch.bmm(x.expand(3, 5, 2), w) ** 2).mean()


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


def of_loss(parameters, loss):
    """Residuals, their coefficients, and the uses of each."""
    terms = find_terms(loss, Reach(parameters), "test").squares
    index = {id(p): i for i, p in enumerate(parameters)}
    values = [t.residual for t in terms]
    return values, coefficients(loss, terms, "test"), [find_uses(v, index) for v in values]


def brute_force(plan, values, scales, drawn, parameters):
    """One backward pass for each residual."""
    rows = []
    for block, scale, d in zip(plan.blocks, scales, drawn, strict=True):
        flat = values[block.term].flatten()
        for k, e in enumerate(block.chosen(d, flat.device)):
            gradients = torch.autograd.grad(flat[e], parameters, retain_graph=True, allow_unused=True)
            columns = [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, gradients, strict=True)]
            rows.append(scale[k] * torch.cat(columns))
    return torch.stack(rows)


def compared(make, drawing):
    """The plan, and the Jacobian with the one of brute force."""
    parameters, closure = make()
    parameters = list(parameters)
    loss = closure()
    values, weights, uses = of_loss(parameters, loss)
    total = sum((c * v.detach() ** 2).sum() for c, v in zip(weights, values, strict=True))
    torch.testing.assert_close(total, loss.detach(), rtol=1e-12, atol=0)
    plan = make_plan(values, uses, parameters)
    drawn = [torch.randperm(b.size)[: 1 + b.size // 2].sort()[0] if drawing else None for b in plan.blocks]
    scales = [weights[b.term].flatten()[b.chosen(d, loss.device)].sqrt() for b, d in zip(plan.blocks, drawn, strict=True)]
    ours = jacobian(plan, values, uses, parameters, scales, drawn, Buffer())
    return plan, ours, brute_force(plan, values, scales, drawn, parameters)


def close(actual, expected):
    assert float((actual - expected).norm()) <= 1e-12 * float(expected.norm())


@pytest.mark.parametrize("drawing", [False, True], ids=["all", "drawn"])
@pytest.mark.parametrize("name", [*CASES, *MIXED, *FALLBACKS])
def test_rows_are_those_of_one_backward_pass_each(name, drawing):
    _, ours, expected = compared({**CASES, **MIXED, **FALLBACKS}[name], drawing)
    u, v = torch.randn(len(expected), 2), torch.randn(expected.shape[1], 2)
    products = [(ours.mm(v), expected @ v), (ours.rmm(u), expected.T @ u), (ours.gram().tril(), (expected @ expected.T).tril())]
    for actual, right in products:  # from the factors
        close(actual, right)
    close(ours.squared_norm(), expected.square().sum())
    close(ours.dense(), expected)
    close(ours.gram().tril(), (expected @ expected.T).tril())
    close(ours.mv(v[:, 0]), expected @ v[:, 0])
    close(ours.rmv(u[:, 0]), expected.T @ u[:, 0])


@pytest.mark.parametrize("name", CASES)
def test_uses_are_known(name):
    plan, *_ = compared(CASES[name], False)
    allowed = {"ExpBackward"} if name == "the_exponential_of_a_coefficient" else set()
    assert {node for block in plan.blocks for node in block.others.values()} <= allowed


@pytest.mark.parametrize("name", MIXED)
def test_mixed_rows_come_from_the_jacobian_of_the_products(name):
    plan, *_ = compared(MIXED[name], False)
    first = plan.blocks[0]
    assert first.inner is not None and not any("mm" in node.lower() for node in first.others.values())


def test_a_wide_layer_is_cheaper_by_its_factors():
    net, x = nn.Sequential(nn.Linear(2, 60), nn.Tanh(), nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 1)), torch.rand(9, 2)
    _, ours, expected = compared(lambda: (net.parameters(), lambda: mse_loss(net(x), torch.ones(9, 1))), False)
    assert not ours.prefers_dense()
    close(ours.gram().tril(), (expected @ expected.T).tril())


def times_itself(n):
    return n * n


NORMS = {  # of a residual [5, 2] and a target of its shape
    "a product": lambda r, y: times_itself(r.norm()),
    "a square": lambda r, y: r.norm() ** 2,
    "relative": lambda r, y: (r.norm() / y.norm()) ** 2,
    "relative, both squared": lambda r, y: r.norm() ** 2 / y.norm() ** 2,
    "relative rows": lambda r, y: (3 * r.norm(dim=1) / y.norm(dim=1)).pow(2).mean(),
    "rows with their dimension": lambda r, y: (y[:, :1] * r.norm(dim=1, keepdim=True)).square().mean(),
    "a product of rows": lambda r, y: times_itself(torch.norm(r, dim=1)).mean(),
    "a dot product of rows": lambda r, y: torch.dot(n := r.norm(dim=1), n),
    "columns": lambda r, y: (2 * (r.norm(dim=0) / y.norm(dim=0))).square().sum(),
    "a matrix norm": lambda r, y: torch.linalg.matrix_norm(r).square(),
    "pairwise distances": lambda r, y: (pairwise_distance(r, y) ** 2).mean(),
    "a distance": lambda r, y: torch.dist(r, y) ** 2,
    "an absolute value with weights": lambda r, y: (r.abs() * y).square().sum(),
    "complex": lambda r, y: (torch.view_as_complex(r).abs() * y[:, 0]).square().sum(),
    "constants with gradients of their own": lambda r, y: (r.norm() * (y.norm() + torch.ones((), requires_grad=True))) ** 2,
    "by trapezoids": lambda r, y: torch.trapezoid(r**2, dx=0.1).sum() + torch.trapezoid(r**2)[0],
}


@pytest.mark.parametrize("name", NORMS)
def test_a_squared_norm_has_a_residual_for_each_number(name):
    net, x, y = mlp(2, 2), torch.rand(5, 2), 1 + torch.rand(5, 2)

    def loss():
        return NORMS[name](net(x), y)

    value = loss()
    terms = find_terms(value, Reach(net.parameters()), "test").squares
    assert all(t.residual.numel() == 10 for t in terms)
    _, ours, expected = compared(lambda: (net.parameters(), loss), False)
    close(ours.dense(), expected)
    squares = sum((c * t.residual.square()).sum() for c, t in zip(coefficients(value, terms, "test"), terms, strict=True))
    right, found = (torch.autograd.grad(v, list(net.parameters()), retain_graph=True) for v in (value, squares))
    torch.testing.assert_close(found, right)


ROWS = torch.tensor([0, 2, 1, 2, 0])
LINEAR = {  # of squares [5, 2]
    "sizes": lambda s: sum(w * part.sum() for w, part in zip((2.0, 5.0), s.split([2, 3]), strict=True)),
    "scatter_add": lambda s: (torch.ones(3).scatter_add(0, ROWS, s[:, 0]) * torch.tensor([1.0, 2.0, 3.0])).sum() + s[:, 1].sum(),
    "scatter_add of both": lambda s: (s[:, 1].scatter_add(0, ROWS, s[:, 0]) * torch.arange(1.0, 6)).sum(),
    "index_add": lambda s: (s.index_add(0, ROWS, s, alpha=2) * torch.arange(1.0, 6).view(5, 1)).sum(),
    "index_copy": lambda s: (torch.ones(7, 2).index_copy(0, torch.arange(5), s) * torch.arange(1.0, 8).view(7, 1)).sum(),
    "index_put": lambda s: (torch.zeros(3, 2).index_put((ROWS,), s, True) * torch.arange(1.0, 4).view(3, 1)).sum(),
    "scatter_reduce, mean": lambda s: (torch.zeros(3).scatter_reduce(0, ROWS, s[:, 0], "mean")).sum() + s[:, 1].sum(),
    "scatter_reduce, sum": lambda s: (s[:, 1].scatter_reduce(0, ROWS, s[:, 0], "sum") * torch.arange(1.0, 6)).sum(),
    "diagonal": lambda s: (s.T @ torch.ones(5, 2)).diagonal().sum(),
    "trace": lambda s: (s.T @ torch.ones(5, 2)).trace(),
    "flip and roll": lambda s: ((s.flip(0) + s.roll(1, 0)) * torch.arange(1.0, 6).view(5, 1)).sum(),
    "repeat": lambda s: (s.repeat(2, 3) * torch.arange(1.0, 11).view(10, 1)).sum(),
    "avg_pool1d": lambda s: (avg_pool1d(s.T, 2, 1) * torch.arange(1.0, 5)).sum(),
    "avg_pool2d": lambda s: avg_pool2d(s.view(1, 1, 5, 2), 2, 1, padding=1).sum(),
    "lerp by a number": lambda s: torch.lerp(s[:, 0], s[:, 1], 0.3).sum(),
    "lerp by a tensor": lambda s: torch.lerp(s[:, 0], s[:, 1], torch.linspace(0.1, 0.9, 5)).sum(),
    "lerp from a constant": lambda s: torch.lerp(torch.ones(5, 2), s, torch.full((5, 2), 0.4)).sum(),
    "lerp's weight": lambda s: torch.lerp(torch.ones(5, 2), torch.full((5, 2), 3.0), s).sum(),
    "pad, unfold and tril": lambda s: pad(s, (1, 1), value=2.0).unfold(0, 2, 1).sum() + s.tril(1).sum(),
    "rot90 and take": lambda s: (s.rot90() * torch.arange(1.0, 6)).sum() + s.take(ROWS).sum(),
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_linear_in_squares_gives_each_its_coefficient(name):
    u = torch.rand(5, 2, requires_grad=True)
    loss = LINEAR[name](u**2)
    terms = find_terms(loss, Reach([u]), "test")
    (c,) = coefficients(loss, terms.squares, "test")
    s = torch.rand(5, 2)
    difference = LINEAR[name](s) - LINEAR[name](torch.zeros(5, 2))
    torch.testing.assert_close((c * s).sum(), difference)  # at other values, too
    constant = loss.detach() - (c * u.detach() ** 2).sum()
    assert terms.constant or abs(constant) < 1e-12


def test_what_is_not_linear_is_refused_by_name():
    u = torch.rand(5, 2, requires_grad=True)
    for loss, name in (
        (lambda s: torch.zeros(3).scatter_reduce(0, ROWS, s[:, 0], "amax").sum(), "ScatterReduceBackward0 is neither"),
        (lambda s: torch.lerp(s[:, 0], torch.ones(5), s[:, 1]).sum(), "LerpBackward1 is a product"),
    ):
        with pytest.raises(RuntimeError, match=name):
            find_terms(loss(u**2), Reach([u]), "test")


@pytest.mark.parametrize(
    ("loss", "numbers"),
    [
        (lambda r: ((z := torch.view_as_complex(r)).conj() * z).real.sum(), 10),
        (lambda r: ((z := torch.view_as_complex(r)) * z.conj()).real.sum(), 10),
        (lambda r: ((z := torch.view_as_complex(r)).conj() @ z).real, 10),
        (lambda r: ((z := torch.view_as_complex(r)) @ z.conj()).real, 10),
        (lambda r: torch.vdot(z := torch.view_as_complex(r), z).real, 10),
        (lambda r: torch.vdot(z := r.flatten(), z), 10),
        (lambda r: torch.linalg.vecdot(r, r).sum(), 10),
        (lambda r: (r**4).mean() + 0.1 * (r**6).sum(), 20),
    ],
)
def test_even_powers_and_conjugates_are_squares(loss, numbers):
    net, x = mlp(2, 2), torch.rand(5, 2)
    u = net(x)
    value = loss(u)
    terms = find_terms(value, Reach([*net.parameters()]), "test").squares
    assert sum(t.residual.numel() for t in terms) == numbers
    squares = sum((c * t.residual.square()).sum() for c, t in zip(coefficients(value, terms, "test"), terms, strict=True))
    torch.testing.assert_close(squares, value)
    torch.testing.assert_close(*(torch.autograd.grad(v, u, retain_graph=True)[0] for v in (squares, value)))


def test_a_norm_that_constants_widen_is_a_residual():
    net, x = mlp(2, 2), torch.rand(5, 2)
    compared(lambda: (net.parameters(), lambda: (net(x).norm() * torch.ones(3)).square().sum()), False)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda u: (u[:, 0] * u[:, 1]).mean(), "MulBackward0"),
        (lambda u: torch.mul(*u.unbind(1)).mean(), "MulBackward0"),
        (lambda u: u.abs().mean(), "AbsBackward0"),
        (lambda u: (u**3).mean(), "PowBackward0"),
        (lambda u: (u ** (u.sum() * 0 + 2)).mean(), "PowBackward1"),
        (lambda u: (2 ** (u.sum() * 0 + 2)).mean(), "PowBackward"),
        (lambda u: (u**2).mean().sqrt(), "SqrtBackward0"),
        (lambda u: (u**2).mean() / (u**2).mean(), "DivBackward0"),
        (lambda u: (u**2).mean() - 2 * (u[:, 0] ** 2).mean(), "negative coefficient"),
        (lambda u: -(u**2).mean(), "negative coefficient"),
        (lambda u: torch.vdot(u[:, 0], u[:, 1]), "VdotBackward0"),
        (lambda u: torch.vdot((z := torch.view_as_complex(u)).conj(), z).real, "VdotBackward0"),
        (lambda u: 1 + ((z := torch.view_as_complex(u)) * z).real.mean(), "a power of complex numbers"),
        (lambda u: 1 + ((z := torch.view_as_complex(u)) @ z).real, "a power of complex numbers"),
        (lambda u: 1 + (torch.view_as_complex(u) ** 2).real.mean(), "a power of complex numbers"),
    ],
)
def test_what_is_no_sum_of_squares_is_refused(loss, message):
    net = mlp(2, 2)
    with pytest.raises(RuntimeError, match=message):
        of_loss(list(net.parameters()), loss(net(torch.rand(5, 2))))


def test_what_is_linear_in_a_parameter_is_refused():
    net = mlp()
    with pytest.raises(RuntimeError, match="AccumulateGrad is neither a square nor linear"):
        of_loss(list(net.parameters()), (net(torch.rand(5, 2)) ** 2).mean() + net[0].bias.sum())


# --- criteria as squares ---


def elementwise(criterion, u, t):
    """The loss, and the squares found in its graph with their coefficients and values."""
    loss = criterion(u, t)
    terms = find_terms(loss, Reach([u]), "test").squares
    return loss, coefficients(loss, terms, "test"), terms


CRITERIA = {
    "huber": lambda u, t: huber_loss(u, t, delta=0.5),
    "huber, sum": lambda u, t: huber_loss(u, t, delta=2.0, reduction="sum"),
    "smooth L1": lambda u, t: smooth_l1_loss(u, t, beta=0.3),
    "soft margin": lambda u, t: soft_margin_loss(u, torch.sign(t - 0.5)),
    "bce": lambda u, t: binary_cross_entropy_with_logits(u, t),
    "bce, weighted": lambda u, t: binary_cross_entropy_with_logits(u, t, weight=1 + t, reduction="sum"),
    "positives": lambda u, t: binary_cross_entropy_with_logits(u, t, pos_weight=torch.tensor(3.0).to(t)),
    "positives, weighted": lambda u, t: binary_cross_entropy_with_logits(u, t, 1 + t, pos_weight=torch.tensor(0.2).to(t)),
}


def arguments(dtype=torch.float64):
    """Outputs near, at and far from the minimum of every criterion, with hard and soft targets."""
    t = torch.cat([torch.rand(30), torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0, 0.3, 0.3])]).to(dtype)
    u = torch.logit(t, eps=1e-3)
    u[:10] += torch.logspace(-9, 0, 10, dtype=dtype)
    u[10:20] -= torch.logspace(-9, 0, 10, dtype=dtype)
    u[20:25], u[25:30] = t[20:25], -25 * torch.rand(5, dtype=dtype)
    u[33:35] = torch.tensor([-30.0, 30.0], dtype=dtype)
    return u.detach().clone().requires_grad_(), t


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_is_the_square_of_its_root(name):
    u, t = arguments()
    loss, weights, terms = elementwise(CRITERIA[name], u, t)
    squares = sum((c * term.residual.square()).sum() for c, term in zip(weights, terms, strict=True))
    entropy = 0.0
    if name.startswith("bce"):
        weight = 1 + t if "weighted" in name else torch.full_like(t, 1 / len(t))
        entropy = float((weight * torch.distributions.Bernoulli(t).entropy()).sum())
    if name.startswith("positives"):
        p, weight = (0.2, 1 + t) if "weighted" in name else (3.0, torch.ones_like(t))
        scale = p * t + (1 - t)
        entropy = float((weight * scale * torch.distributions.Bernoulli(p * t / scale).entropy()).mean())
    torch.testing.assert_close(squares + entropy, loss, rtol=1e-10, atol=0)
    (ours,), (right,) = (torch.autograd.grad(value, u, retain_graph=True) for value in (squares, loss))
    torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_roots_curvature_is_that_of_the_criterion_at_its_minimum(name):
    if name == "soft margin":
        pytest.skip("it has no minimum")
    _, t = arguments()
    t = t[:30]
    p = 1.0 if not name.startswith("positives") else 0.2 if "weighted" in name else 3.0
    u = (t if name.startswith(("huber", "smooth")) else torch.logit(p * t / (p * t + (1 - t)))).clone().requires_grad_()
    loss, weights, terms = elementwise(CRITERIA[name], u, t)
    (slope,) = torch.autograd.grad(loss, u, create_graph=True)
    (right,) = torch.autograd.grad(slope.sum(), u)
    (root,) = torch.autograd.grad(terms[0].residual.sum(), u)
    torch.testing.assert_close(2 * weights[0] * root.square(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CRITERIA)
def test_roots_in_float32_are_finite(name):
    u, t = arguments(torch.float32)
    loss, weights, terms = elementwise(CRITERIA[name], u, t)
    (root,) = torch.autograd.grad(terms[0].residual.sum(), u, retain_graph=True)
    assert torch.isfinite(root).all()
    (right,) = torch.autograd.grad(loss, u, retain_graph=True)
    torch.testing.assert_close(2 * weights[0] * terms[0].residual * root, right, rtol=2e-2, atol=1e-4)


def test_a_criterion_without_a_root_is_refused():
    with pytest.raises(RuntimeError, match="neither a square nor linear"):
        elementwise(lambda u, t: smooth_l1_loss(u, t, beta=0.0), *arguments())
