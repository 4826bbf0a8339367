"""The Jacobian of residuals found in a scalar loss's graph, against one backward pass for each residual."""

import pytest
import torch
from helpers.least_squares import float64  # noqa: F401
from helpers.residuals import assert_rows_are_those_of_backward_passes, close, compared, gradient, mlp, points
from torch import nn
from torch.nn.functional import mse_loss, silu

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


@case
def an_ensemble_of_weights():
    first, last = nn.Parameter(torch.rand(3, 2, 4)), nn.Parameter(torch.rand(3, 1, 4))
    bias, x = nn.Parameter(torch.rand(3, 1, 4)), points(5)

    def loss():
        inputs = x.expand(3, 5, 2)
        u = torch.bmm(torch.tanh(torch.bmm(inputs, first) + bias), last.transpose(1, 2))
        u = u + torch.baddbmm(bias[:, :, :1], torch.tanh(inputs), first[:, :, :1], beta=2, alpha=3)
        return ((gradient(u, x) - 1) ** 2).mean() + (torch.matmul(first.mT, x.T) ** 2).sum()

    return [first, bias, last], loss


@case
def splines_on_edges():
    edges, slopes, last = nn.Parameter(torch.rand(2, 4, 5)), nn.Parameter(torch.rand(2, 4)), nn.Parameter(torch.rand(4, 1, 5))
    x, knots = points(6), torch.linspace(0, 1, 5)

    def basis(x):
        return torch.exp(-((x.unsqueeze(2) - knots) ** 2))

    def loss():
        u = torch.einsum("ijk,jlk->ijl", basis(x), edges) + slopes[None] * silu(x)[:, :, None]
        u = torch.einsum("ijk,jlk->il", basis(u.sum(1)), last)
        u_x = gradient(u, x)
        return (u_x.sum(1) ** 2).mean() + mse_loss(gradient(u_x[:, :1], x), x)

    return [edges, slopes, last], loss


@case
def weights_that_are_products_of_parameters():
    x, wide, scale, last = (
        points(6),
        nn.Parameter(torch.rand(4, 2, 5)),
        nn.Parameter(torch.rand(4, 2)),
        nn.Parameter(torch.rand(4)),
    )
    knots = torch.linspace(0, 1, 5)

    def loss():
        basis = torch.exp(-((x.unsqueeze(2) - knots) ** 2)).flatten(1)
        u = torch.tanh(torch.nn.functional.linear(basis, (wide * scale.unsqueeze(2)).flatten(1))) @ (last * scale[:, 0] * last)
        return ((gradient(u, x) - 1) ** 2).mean() + ((x @ (scale * scale).T) ** 2).mean()

    return [wide, scale, last], loss


@case
def slopes_that_are_rows_of_a_parameter():
    net, x, slopes = mlp(1), points(7, 1), nn.Parameter(torch.rand(3, 8))

    def loss():
        u = net[0](x)
        for a in (slopes[0], slopes[-1], 2 * slopes[1, :]):
            u = torch.tanh(a * u)
        return ((gradient(u.sum(1), x) + 1) ** 2).mean()

    return [*net[0].parameters(), slopes], loss


@case
def vectors_that_are_rows_here_and_columns_there():
    w, layer, x = nn.Parameter(torch.rand(5)), nn.Linear(5, 1), torch.rand(11, 5)
    member, inputs = nn.Parameter(torch.rand(3, 1, 4)), torch.rand(3, 7, 1)

    def loss():
        once = torch.tanh(x @ w) + (x * w).tanh().sum(1)
        twice = torch.tanh(layer(x)) + (x * layer.weight).tanh().sum(1, keepdim=True)
        return (once**2).mean() + (twice**2).mean() + (torch.tanh(torch.bmm(inputs, member) + member) ** 2).mean()

    return [w, *layer.parameters(), member], loss


@case
def residuals_of_different_units_in_one_tensor():
    net, x = mlp(), points(40)

    def loss():
        u = net(x)[:, 0]
        return (torch.cat([1e8 * (u[:20] - 1), u[20:].view(2, 10).T.reshape(-1)]) ** 2).mean()

    return net.parameters(), loss


@case
def a_number_that_is_scaled_before_it_is_used():
    net, x, k = mlp(), points(), nn.Parameter(torch.tensor(0.3))

    def loss():
        u = net(x)
        return ((gradient(u, x)[:, :1] + (-k) * u + 2 * k) ** 2).mean() + ((x @ (net[0].weight * k).T - k * k) ** 2).mean()

    return [*net.parameters(), k], loss


@case
def ends_of_a_flat_vector():
    flat, x = nn.Parameter(torch.rand(15)), points()

    def loss():
        u = torch.tanh(x @ flat[:8].view(2, 4) + flat[-4:]) @ flat[-7:-3].view(4, 1)
        return ((gradient(u, x) - 1) ** 2).mean()

    return [flat], loss


@case
def integrals_by_trapezoid():
    net, x = mlp(1), torch.linspace(0, 1, 11).view(-1, 1)
    return net.parameters(), lambda: (torch.trapezoid(net(x), x, dim=0) - 1).square().sum() + mse_loss(net(x), torch.sin(x))


@case
def slices_without_ends():
    """As functions of torch's own take them, which save no start or no end."""
    w, b, x, part = nn.Parameter(torch.rand(2, 9)), nn.Parameter(torch.rand(12)), torch.rand(11, 2), torch.ops.aten.slice
    return [w, b], lambda: ((torch.tanh(x @ part(w, -1, None, -3) + part(b, 0, 1, None, 2)) - 0.5) ** 2).mean()


@case
def members_from_the_left():
    first, last, x = nn.Parameter(torch.rand(3, 4, 2)), nn.Parameter(torch.rand(3, 4, 1)), points(5)
    return [first, last], lambda: (torch.bmm(last.mT, torch.tanh(torch.bmm(first, x.T.expand(3, 2, 5)))) ** 2).mean()


@case
def matrices_that_are_expanded():
    w, column, scale = (nn.Parameter(torch.rand(*shape)) for shape in ((1, 3, 3), (3, 1, 3), (3, 1, 1)))
    x = torch.rand(3, 5, 3)

    def loss():
        e = w.expand(3, 3, 3)
        factors = [e * scale, column.expand(3, 3, 3), e.mT, -2 * e.permute(0, 2, 1), e.transpose(0, 1), e.permute(2, 0, 1)]
        four = torch.stack([x, 2 * x]) @ column.mT.expand(3, 3, 2)
        return (torch.tanh(sum(torch.bmm(x, factor) for factor in factors)).sum(2) ** 2).mean() + (four.sum(3) ** 2).mean()

    return [w, column, scale], loss


@pytest.mark.parametrize("drawing", [False, True], ids=["all", "drawn"])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_one_backward_pass_each(name, drawing):
    assert_rows_are_those_of_backward_passes(CASES[name], drawing)


@pytest.mark.parametrize("name", CASES)
def test_uses_are_known(name):
    plan, *_ = compared(CASES[name], False)
    allowed = {"ExpBackward"} if name == "the_exponential_of_a_coefficient" else set()
    assert {node for block in plan.blocks for node in block.others.values()} <= allowed


def test_a_wide_layer_is_cheaper_by_its_factors():
    net, x = nn.Sequential(nn.Linear(2, 60), nn.Tanh(), nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 1)), torch.rand(9, 2)
    _, ours, expected = compared(lambda: (net.parameters(), lambda: mse_loss(net(x), torch.ones(9, 1))), False)
    assert not ours.prefers_dense()
    close(ours.gram().tril(), (expected @ expected.T).tril())


@pytest.mark.parametrize("drawing", [False, True], ids=["all", "drawn"])
def test_many_small_terms_are_as_few_parts_as_one(drawing):
    """Terms [3, 1] of a wide net, and between them some by its derivative, whose factors have other sizes."""
    net, xs = nn.Sequential(nn.Linear(2, 60), nn.Tanh(), nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 1)), torch.rand(12, 3, 2)

    def loss():
        slope = gradient(net(x := points(3)), x)[:, 0]
        return sum(mse_loss(net(each), torch.ones(3, 1)) for each in xs) + (slope**2).mean() + mse_loss(net(xs[0]), xs[0, :, :1])

    _, ours, expected = compared(lambda: (net.parameters(), loss), drawing)
    u, v = torch.randn(len(expected), 2), torch.randn(expected.shape[1], 2)
    close(ours.gram().tril(), (expected @ expected.T).tril())
    close(ours.mm(v), expected @ v)
    close(ours.rmm(u), expected.T @ u)
    assert max(len(ours._of(p)) for p in ours.parts) == 3  # of 14 terms: before the derivative, it, after it
