"""Which losses are sums of squares, and of what: norms, powers, and what is linear in squares."""

import pytest
import torch
from helpers.least_squares import float64  # noqa: F401
from helpers.residuals import close, compared, mlp, of_loss
from torch.nn.functional import (
    avg_pool1d,
    avg_pool2d,
    conv1d,
    conv2d,
    conv_transpose2d,
    interpolate,
    linear,
    pad,
    pairwise_distance,
)

from secondorder._tape.nodes import Reach
from secondorder._tape.residuals import coefficients, find_terms


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
    "a variance": lambda r, y: r.var(),
    "variances of columns": lambda r, y: (y[0] * r.var(0, correction=0)).sum(),
    "variances of rows with their dimension": lambda r, y: (y[:, :1] * torch.var(r, 1, keepdim=True)).mean(),
    "a standard deviation": lambda r, y: (3 * r.std()) ** 2,
    "standard deviations of columns": lambda r, y: (y[0] * r.std(0)).square().sum(),
    "a variance written out": lambda r, y: (r - r.mean()).square().mean(),
    "distances to each other": lambda r, y: torch.cdist(r, torch.ones(1, 2)).square().mean(),
    "distances to each other, by a product": lambda r, y: (
        torch.cdist(r, torch.ones(1, 2), compute_mode="use_mm_for_euclid_dist") ** 2
    ).sum(),
    "the power 1": lambda r, y: ((r**2) ** 1.0).mean(),
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


def written(target, place, values):
    target[place] = values
    return target


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
    "a copy": lambda s: (written(torch.ones(2, 5, 2), slice(None), s) * torch.arange(1.0, 21).view(2, 5, 2)).sum(),
    "writes to rows": lambda s: (written(torch.zeros(6, 2), slice(1, 6), s) * torch.arange(1.0, 7).view(6, 1)).sum(),
    "sums written to a vector": lambda s: written(written(torch.zeros(3), 0, s.mean()), 2, 4 * s[:, 1].sum()).sum(),
    "weights written over rows": lambda s: ((e := s + s)[:3].mul_(7.0), e[1, :1].fill_(0.0), e.mean())[2],
    "interpolate": lambda s: (interpolate(s.view(1, 1, 5, 2), scale_factor=2) * torch.arange(1.0, 5)).sum(),
    "interpolate, bilinear": lambda s: (
        interpolate(s.view(1, 1, 5, 2), size=(4, 3), mode="bilinear") * torch.arange(1.0, 4)
    ).sum(),
    "interpolate, linear": lambda s: interpolate(s.view(1, 2, 5), size=3, mode="linear").sum() + s.sum(),
    "interpolate, area": lambda s: interpolate(s.view(1, 2, 5), size=3, mode="area").sum() + s.sum(),
    "conv1d": lambda s: (conv1d(s.T.unsqueeze(0), torch.tensor([[[1.0, 2.0], [3.0, 0.5]]])) * torch.arange(1.0, 5)).sum(),
    "conv2d with a bias": lambda s: conv2d(s.view(1, 1, 5, 2), torch.full((2, 1, 2, 2), 0.3), torch.ones(2), padding=1).mean(),
    "conv_transpose2d": lambda s: conv_transpose2d(s.view(1, 1, 5, 2), torch.tensor([[[[1.0, 2.0], [0.5, 3.0]]]])).mean(),
    "linear": lambda s: (linear(s, torch.tensor([[1.0, 2.0], [0.5, 0.0]])) * torch.arange(1.0, 6).view(5, 1)).sum(),
    "linear with a bias": lambda s: linear(s, torch.tensor([[1.0, 2.0]]), torch.ones(1)).mean(),
    "addmm": lambda s: torch.addmm(torch.ones(2, 2), torch.ones(2, 5), s, alpha=3).sum(),
    "addmm to squares": lambda s: torch.addmm(s[:2], torch.ones(2, 5), s, beta=0.5).sum(),
    "addmv and addr": lambda s: torch.addmv(s[:, 1], torch.eye(5), s[:, 0]).sum() + torch.addr(s, s[:, 0], torch.ones(2)).sum(),
    "baddbmm and addbmm": lambda s: (
        torch.baddbmm(s[None], torch.eye(5)[None], s[None]).sum() + torch.addbmm(s, torch.eye(5)[None], s[None]).sum()
    ),
    "addcmul and addcdiv": lambda s: (
        torch.addcmul(s, s, torch.full((5, 2), 2.0), value=0.5) + torch.addcdiv(torch.ones(5, 2), s, torch.full((5, 2), 4.0))
    ).sum(),
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
        (lambda s: 1 + written(torch.zeros(2), 1, s.mean()).sin_().sum(), "SinBackward0 is neither"),
        (lambda s: 1 + written(torch.zeros(2), 1, s.mean()).sum(), "CopySlices is a write .* torch.stack, torch.cat"),
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


PRODUCTS = {  # of a residual [5, 2] and constants w
    "weights before": lambda r, w: (w * r * r).sum(),
    "weights between": lambda r, w: (r * w * r).mean(),
    "weights behind a square": lambda r, w: (r * (r * w / 3)).sum(),
    "a column of weights": lambda r, w: (w[:, :1] * r * r * 2).mean(),
    "a dot product": lambda r, w: torch.dot(w[:, 0] * (e := r[:, 0]), e) + r[:, 1].square().sum(),
    "a number": lambda r, w: (0.5 * r * r).mean(),
    "written twice": lambda r, w: ((r - w) * (r - w)).sum(),
    "written twice, with weights": lambda r, w: (w * (r - w) * (r - w)).sum(),
    "written twice, one of them turned round": lambda r, w: (-(w - 2 * r) * (r + r - w)).mean(),
    "sums written twice": lambda r, w: ((r.sum(1) - w[:, 0]) * (r.sum(1) - w[:, 0])).sum() + (r[:, 0] ** 2).sum(),
    "views": lambda r, w: torch.dot(r.view(-1), r.view(-1)),
    "flattened": lambda r, w: r.flatten() @ r.flatten(),
    "flattened copies": lambda r, w: torch.dot(r.T.flatten(), r.T.reshape(-1)),
    "vdot": lambda r, w: torch.vdot(r.flatten(), r.flatten()),
    "inner": lambda r, w: torch.inner(r.flatten(), r.view(-1)),
    "vecdot": lambda r, w: torch.linalg.vecdot(r.flatten(), r.flatten()),
    "vecdot of rows": lambda r, w: torch.linalg.vecdot(r, r.view(5, 2)).mean(),
    "a row times a column": lambda r, w: (r.view(1, -1) @ r.view(-1, 1)).squeeze(),
    "a column times itself": lambda r, w: (r.view(-1, 1).T @ r.view(-1, 1)).sum(),
    "a row times a vector": lambda r, w: (r.view(1, -1) @ r.flatten()).sum(),
    "einsum": lambda r, w: torch.einsum("ij,ij->", r, r),
    "einsum with weights": lambda r, w: torch.einsum("ij,ij,ij->", w, r, r),
    "einsum of rows": lambda r, w: (w[:, 0] * torch.einsum("ij,ij->i", r, r)).sum(),
    "batches": lambda r, w: (w[:, 0] * torch.bmm(r.unsqueeze(1), r.unsqueeze(2)).flatten()).sum(),
    "batches with weights": lambda r, w: torch.bmm((w * r).unsqueeze(1), r.unsqueeze(2)).sum(),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_residual_times_a_multiple_of_itself_is_a_square_with_weights(name):
    net, x, w = mlp(2, 2), torch.rand(5, 2), torch.rand(5, 2)
    _, ours, expected = compared(lambda: (net.parameters(), lambda: PRODUCTS[name](net(x) - 1, w)), False)
    close(ours.dense(), expected)
    value = PRODUCTS[name](net(x) - 1, w)
    terms = find_terms(value, Reach(net.parameters()), "test").squares
    assert sum(t.residual.numel() for t in terms) == 10
    squares = sum((c * t.residual.square()).sum() for c, t in zip(coefficients(value, terms, "test"), terms, strict=True))
    found, right = (torch.autograd.grad(v, list(net.parameters()), retain_graph=True) for v in (squares, value))
    torch.testing.assert_close(found, right)


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
        (lambda u: torch.addcdiv(torch.ones(5, 2), torch.ones(5, 2), u**2).sum(), "AddcdivBackward0"),
        (lambda u: torch.addcmul(torch.ones(5, 2), u**2, u**2).sum(), "AddcmulBackward0"),
        (lambda u: ((u - 1) * (u - 1 - 1e-9)).sum(), "MulBackward0"),
        (lambda u: ((u - 1) * (u - torch.ones(2, requires_grad=True) * 2)).sum(), "MulBackward0"),
        (lambda u: (u @ u.T).trace() + (u.T @ u).sum(), "MmBackward0"),
        (lambda u: torch.dot(u.flatten(), u.T.flatten()), "DotBackward0"),
        (lambda u: interpolate((u**2).view(1, 1, 5, 2), size=(9, 9), mode="bicubic")[0, 0, 1, 1], "negative coefficient"),
        (lambda u: conv1d((u**2).T, torch.tensor([[[1.0], [-2.0]]])).sum(), "negative coefficient"),
        (lambda u: (u**2).mean() - 2 * (u[:, 0] ** 2).mean(), "negative coefficient"),
        (lambda u: -(u**2).mean(), "negative coefficient"),
        (lambda u: ((u[:, 0] - 10).detach() * (r := u[:, 0] + 0) * r).mean(), "negative coefficient"),
        (lambda u: (u[:, :1] * torch.ones(5, 2) * u).mean(), "MulBackward0"),
        (lambda u: ((r := u[:, :1]) * torch.ones(5, 2) * r).mean(), "MulBackward0"),
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


@pytest.mark.parametrize(
    "penalty",
    [
        lambda u, w: 0.0 * u.abs().sum(),
        lambda u, w: torch.zeros(()) * (u.exp() * u).sum(),
        lambda u, w: torch.add(torch.zeros(()), w.sum(), alpha=0) + 0 * w[0],
        lambda u, w: (torch.tensor([0.0, 0.0]) * u.sum(0).sqrt().sin()).sum() / 3,
        lambda u, w: 0 * (u.to(torch.complex128) ** 2).real.sum(),
    ],
)
def test_terms_with_the_coefficient_zero_are_left_out(penalty):
    net, x = mlp(2, 2), torch.rand(5, 2)
    w = torch.nn.Parameter(torch.rand(3))
    u = net(x)
    values, c, _ = of_loss([*net.parameters(), w], (u**2).mean() + penalty(u.exp(), w))
    (residual,) = values
    close(residual.detach(), u.detach())
    close(c[0], torch.full_like(u.detach(), 0.1))
    with pytest.raises(RuntimeError, match="neither a square nor linear|a power of complex|a product or quotient"):
        of_loss([*net.parameters(), w], (u**2).mean() + penalty(u.exp(), w) + 1e-9 * (u.exp().sum() + w.sum()))


def test_what_is_linear_in_a_parameter_is_refused():
    net = mlp()
    with pytest.raises(RuntimeError, match="AccumulateGrad is neither a square nor linear"):
        of_loss(list(net.parameters()), (net(torch.rand(5, 2)) ** 2).mean() + net[0].bias.sum())


class Sum(torch.autograd.Function):
    """Has the name of a node of torch's own, and is not linear."""

    @staticmethod
    def forward(ctx, squares):
        ctx.save_for_backward(squares)
        return squares.sum() ** 3

    @staticmethod
    def backward(ctx, g):
        (squares,) = ctx.saved_tensors
        return 3 * g * squares.sum() ** 2 * torch.ones_like(squares)


def test_a_function_with_the_name_of_a_linear_node_is_refused():
    net, x = mlp(), torch.rand(5, 2)
    with pytest.raises(RuntimeError, match="SumBackward is neither a square nor linear"):
        find_terms(0 + Sum.apply(net(x) ** 2), Reach(net.parameters()), "test")
