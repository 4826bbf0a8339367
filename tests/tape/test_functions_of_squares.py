"""Functions of squares and functions that are positive, written out: as squares whose sum is the loss less its least value."""

import math

import pytest
import torch
from helpers.least_squares import float64  # noqa: F401
from helpers.residuals import brute_force, close, mlp, of_loss
from torch.nn.functional import logsigmoid, poisson_nll_loss, softplus

from secondorder._tape.factored import Buffer
from secondorder._tape.jacobian import jacobian
from secondorder._tape.nodes import Reach
from secondorder._tape.plans import make_plan
from secondorder._tape.residuals import coefficients, find_terms

# phi of residuals d, and its least value.
FUNCTIONS = {
    "log-cosh": (lambda d: torch.log(torch.cosh(d)), 0.0),
    "pseudo-Huber": (lambda d: torch.sqrt(1 + d**2) - 1, 0.0),
    "pseudo-Huber with a scale": (lambda d: 0.09 * ((1 + (d / 0.3) ** 2).sqrt() - 1), 0.0),
    "Charbonnier": (lambda d: torch.sqrt(d * d + 1e-3**2), 1e-3),
    "Charbonnier, 1e-6": (lambda d: torch.sqrt(d * d + 1e-6**2), 1e-6),
    "Charbonnier, as a power": (lambda d: (d.square() + 1e-4) ** 0.45, 1e-4**0.45),
    "Cauchy": (lambda d: torch.log1p(d**2), 0.0),
    "Cauchy with a scale": (lambda d: 2.0 * torch.log(1 + 0.5 * (d / 3) ** 2), 0.0),
    "Student's t": (lambda d: 2.5 * torch.log(4 + d**2), 2.5 * math.log(4)),
    "Welsch": (lambda d: 1 - torch.exp(-0.5 * d**2), 0.0),
    "Geman-McClure": (lambda d: 1 - 1 / (1 + d**2), 0.0),
    "reciprocal root": (lambda d: 3 - (1 + d**2).rsqrt(), 2.0),
    "exp of a square": (lambda d: torch.exp(0.1 * d**2), 1.0),
    "power 1.5": (lambda d: d.abs().pow(1.5), 0.0),
    "power 1.5 of a square": (lambda d: (d**2) ** 0.75, 0.0),
    "power 3": (lambda d: 2 * (3 * d).abs() ** 3, 0.0),
    "power 4": (lambda d: d**4, 0.0),
    "cosh": (lambda d: torch.cosh(d) - 1, 0.0),
}
WITHOUT_CURVATURE = {"power 1.5", "power 1.5 of a square", "power 3", "power 4"}  # at their minimum, or without a bound


def squares_of(loss, parameters):
    """The squares found in a loss's graph, summed, and whether it may have a constant."""
    terms = find_terms(loss, Reach(parameters), "test")
    weights = coefficients(loss, terms.squares, "test")
    return sum((c * t.residual.square()).sum() for c, t in zip(weights, terms.squares, strict=True)), terms, weights


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_squares_is_the_square_of_its_root(name):
    function, least = FUNCTIONS[name]
    d = torch.cat([torch.linspace(-4, 4, 40), torch.logspace(-9, 0, 19), -torch.logspace(-9, 0, 19)]).requires_grad_()
    w = 0.5 + torch.rand(d.shape)
    u = d * 1.0
    loss = (w * function(u)).mean()
    total, terms, _ = squares_of(loss, [d])
    torch.testing.assert_close(total + (w * least).mean(), loss, rtol=1e-9, atol=1e-12)
    assert terms.constant or abs(loss - total) < 1e-12
    (ours,), (right,) = (torch.autograd.grad(value, d, retain_graph=True) for value in (total, loss))
    torch.testing.assert_close(ours, right, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_model_is_that_of_the_root_and_at_the_minimum_newtons(name):
    function, least = FUNCTIONS[name]
    net, x, y = mlp(2, 2), torch.rand(7, 2), torch.rand(7, 2)
    parameters = list(net.parameters())
    d = net(x) - y
    values, weights, uses = of_loss(parameters, function(d).sum())
    plan = make_plan(values, uses, parameters)
    drawn = [None for _ in plan.blocks]
    scales = [weights[b.term].flatten()[b.chosen(None, d.device)].sqrt() for b in plan.blocks]
    ours = jacobian(plan, values, uses, parameters, scales, drawn, Buffer()).dense()
    close(ours, brute_force(plan, values, scales, drawn, parameters))
    # phi'^2 / (2 (phi - least)), dense.
    leaf = d.detach().requires_grad_()
    phi = function(leaf)
    (slope,) = torch.autograd.grad(phi.sum(), leaf)
    curvature = (slope.square() / (2 * (phi.detach() - least))).flatten()
    j = torch.stack([flat(torch.autograd.grad(each, parameters, retain_graph=True)) for each in d.flatten()])
    torch.testing.assert_close(2 * ours.T @ ours, j.T @ torch.diag(curvature) @ j, rtol=1e-6, atol=1e-9)
    # At the minimum.
    if name not in WITHOUT_CURVATURE:
        z = torch.zeros(5, requires_grad=True)
        loss = function(z * 1.0).sum()
        (slope,) = torch.autograd.grad(loss, z, create_graph=True)
        (right,) = torch.autograd.grad(slope.sum(), z, retain_graph=True)
        _, terms, (c,) = squares_of(loss, [z])
        (root,) = torch.autograd.grad(terms.squares[0].residual.sum(), z)
        torch.testing.assert_close(2 * c * root.square(), right, rtol=1e-12, atol=0)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


MONOTONE = {  # nowhere zero
    "softplus": lambda z: softplus(z),
    "softplus of margins": lambda z: softplus(-z * torch.sign(torch.arange(5.0) - 2.5), beta=2.0),
    "log(1 + exp)": lambda z: torch.log(1 + torch.exp(-z)),
    "log1p(exp)": lambda z: torch.log1p(torch.exp(z)),
    "log-sigmoid": lambda z: -logsigmoid(3 * z),
    "exp": lambda z: torch.exp(z),
}


@pytest.mark.parametrize("name", MONOTONE)
def test_a_positive_function_is_the_square_of_its_root(name):
    net, x = mlp(2, 5), torch.rand(6, 2)
    z = net(x)
    loss = MONOTONE[name](z).mean()
    total, terms, _ = squares_of(loss, list(net.parameters()))
    torch.testing.assert_close(total, loss, rtol=1e-9, atol=0)
    (ours,), (right,) = (torch.autograd.grad(value, z, retain_graph=True) for value in (total, loss))
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=0)
    (term,) = terms.squares
    assert term.residual.shape == z.shape


def entropy(t):
    return -torch.xlogy(t, t) - torch.xlogy(1 - t, 1 - t)


SHARES = torch.tensor([0.0, 1.0, 0.3, 0.5, 0.9], dtype=torch.float64)
COUNTS = torch.tensor([0.0, 1.0, 3.0, 0.5, 40.0], dtype=torch.float64)
WITH_LINEAR_PARTS = {  # phi of z [.., 5], its least value
    "log-cosh without overflow": (lambda z: z + softplus(-2 * z) - math.log(2), 0.0),
    "logistic": (lambda z: softplus(z) - SHARES * z, entropy(SHARES)),
    "logistic, margins": (lambda z: softplus(-(2 * z - 1)) + 2 * (1 - SHARES) * z, entropy(SHARES) + 1 - SHARES),
    "logistic, beta": (lambda z: softplus(z, beta=3.0) - SHARES * z, entropy(SHARES) / 3),
    "Poisson": (lambda z: poisson_nll_loss(z, COUNTS.expand_as(z), reduction="none"), COUNTS - torch.xlogy(COUNTS, COUNTS)),
    "Poisson with an exposure": (lambda z: 7 * torch.exp(z) - COUNTS * z, COUNTS - torch.xlogy(COUNTS, COUNTS / 7)),
}


@pytest.mark.parametrize("name", WITH_LINEAR_PARTS)
def test_a_function_takes_up_what_is_linear_in_its_argument(name):
    function, least = WITH_LINEAR_PARTS[name]
    net, x, w = mlp(2, 5), torch.rand(6, 2), 0.5 + torch.rand(6, 5)
    parameters = list(net.parameters())

    def loss(z):
        return 3 * (w * function(z)).mean() + (s := torch.log1p(z**2)).mean() - 0.5 * s.sum() / 30

    for scale in (1e-9, 1.0, 12.0):
        z = net(x)
        z = z * 1.0 if scale == 1e-9 else z * scale - 1
        value = loss(z)
        total, terms, _ = squares_of(value, parameters)
        assert terms.constant
        torch.testing.assert_close(total + 3 * (w * least).mean(), value, rtol=1e-9, atol=1e-11)
        (ours,), (right,) = (torch.autograd.grad(v, z, retain_graph=True) for v in (total, value))
        torch.testing.assert_close(ours, right, rtol=1e-7, atol=1e-9)
    # At the minimum.
    z = torch.zeros(5, requires_grad=True)
    for _ in range(60):
        (slope,) = torch.autograd.grad(function(z * 1.0).sum(), z, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), z)
        z = (z - (slope / curvature).clamp(-1, 1)).detach().clamp(-5, 5).requires_grad_()
    _, terms, (c,) = squares_of(function(z * 1.0).sum(), [z])
    (root,) = torch.autograd.grad(terms.squares[0].residual.sum(), z)
    inside = z.abs() < 5
    assert int(inside.sum()) >= 3
    torch.testing.assert_close((2 * c * root.square())[inside], curvature[inside], rtol=1e-6, atol=0)


SUMS = {  # of residuals [6, 2] and constants of their shape
    "lengths": lambda r, w: torch.sqrt(r.square().sum(1) + 0.1).mean(),
    "areas": lambda r, w: (1 + w[:, 0] * r[:, 0] ** 2 + r[:, 1] ** 2).sqrt().sum(),
    "Cauchy of rows": lambda r, w: (w[:, 0] * torch.log1p((w * r**2).sum(1))).sum(),
    "lengths to a power": lambda r, w: (2 * r.norm(dim=1)).pow(1.5).sum(),
    "differences of squares": lambda r, w: (r[0] ** 2 + 5 - torch.exp(-(r[1] ** 2))).sum(),
    "both": lambda r, w: ((s := r**2) + torch.log1p(s) + (s + 1) ** 2).mean(),
    "functions one above the other, with linear parts": lambda r, w: (
        softplus(h := torch.tanh(r)) - 0.5 * h + softplus(r) - w * r
    ).sum(),
    "a square of squares": lambda r, w: ((s := r**2) + s**2).mean() + 1,
}


@pytest.mark.parametrize("name", SUMS)
def test_functions_of_several_squares_have_the_right_value_and_gradient(name):
    net, x, w = mlp(2, 2), torch.rand(6, 2), torch.rand(6, 2)
    parameters = list(net.parameters())
    value = SUMS[name](net(x), w)
    total, terms, _ = squares_of(value, parameters)
    other = SUMS[name](1e-9 * net(x), w)  # near the least value of all
    constant = other - squares_of(other, parameters)[0]
    torch.testing.assert_close(total + constant, value)
    found, right = (torch.autograd.grad(v, parameters, retain_graph=True) for v in (total, value))
    torch.testing.assert_close(found, right)
    assert terms.constant or abs(value - total) < 1e-12


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_in_float32_have_their_gradient(name):
    d = torch.cat([torch.linspace(-4, 4, 40), torch.logspace(-6, 0, 19)]).float().requires_grad_()
    loss = FUNCTIONS[name][0](d * 1.0).sum()
    total, _, _ = squares_of(loss, [d])
    assert total.dtype == torch.float32
    (ours,), (right,) = (torch.autograd.grad(value, d, retain_graph=True) for value in (total, loss))
    torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-5)


def test_what_is_not_finite_is_left_to_the_steps_own_check():
    for function, _ in (*FUNCTIONS.values(), *WITH_LINEAR_PARTS.values()):
        d = torch.full((2, 5), torch.nan, requires_grad=True)
        assert squares_of(function(d * 1.0).sum(), [d])[0].isnan()


def test_a_function_of_squares_that_are_zero_or_far_away_is_finite():
    for name, (function, _) in FUNCTIONS.items():
        d = torch.tensor([0.0, 0.0, 30.0, -30.0, 1e-160, 1.0], requires_grad=True)
        _, terms, _ = squares_of(function(d * 1.0).sum(), [d])
        (root,) = torch.autograd.grad(terms.squares[0].residual.sum(), d)
        assert torch.isfinite(root).all(), name


def test_log_cosh_far_from_its_minimum_has_no_cancellation():
    d = torch.tensor([40.0, 50.0], requires_grad=True)
    loss = torch.log(torch.cosh(d * 1.0)).sum()
    torch.testing.assert_close(squares_of(loss, [d])[0], loss, rtol=1e-14, atol=0)


def test_a_constant_that_rounding_hides_is_refused():
    for z in (torch.tensor([40.0, 41.0]), torch.tensor([30.0, 35.0])):
        z.requires_grad_()
        with pytest.raises(RuntimeError, match="LogBackward0 is neither"):
            squares_of(torch.log(1 + torch.exp(z * 1.0)).sum(), [z])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda d: d.square().mean().sqrt(), "SqrtBackward0 is neither"),
        (lambda d: (d.square().mean() + 1e-8).log(), "LogBackward0 is neither"),
        (lambda d: d.square().sqrt().sum(), "SqrtBackward0 is neither"),
        (lambda d: d.square().log().sum(), "LogBackward0 is neither"),
        (lambda d: d.abs().sqrt().sum(), "SqrtBackward0 is neither"),
        (lambda d: d.abs().pow(0.9).sum(), "PowBackward0 is neither"),
        (lambda d: (1e5 + 1e-14 + (1e10 + d) ** 2).sqrt().sum(), "SqrtBackward0 is neither"),
        (lambda d: 1 + (((s := d**2) - s.roll(1, 0)) ** 3).sum(), "PowBackward0 is neither"),
        (lambda d: 1 + ((d**2 - 1) ** 3).sum(), "PowBackward0 is neither"),
        (lambda d: 1 + ((1e-3 - d**2) ** 3).sum(), "PowBackward0 is neither"),
        (lambda d: (d + d**2).exp().sum() + (d + 1).sum(), "AddmmBackward0 is neither"),
        (lambda d: (softplus(d) - 1.1 * d).sum(), "AddmmBackward0 is neither"),
        (lambda d: (softplus(d) + d).sum(), "AddmmBackward0 is neither"),
        (lambda d: (d.exp() + d).sum(), "AddmmBackward0 is neither"),
        (lambda d: (softplus(d) - 0.5 * d.roll(1)).sum() + d[0, 0], "AddmmBackward0 is neither"),
        (lambda d: (softplus(d.cumsum(0)) - 0.5 * d).sum(), "AddmmBackward0 is neither"),
        (lambda d: -torch.log1p(d**2).sum(), "negative coefficient"),
        (lambda d: torch.log1p(d**2).sum() - 2 * torch.log1p(d[0] ** 2).sum(), "negative coefficient"),
        (lambda d: (1 - 0.01 * d**2).sqrt().sum(), "negative coefficient"),
        (lambda d: logsigmoid(d).sum(), "negative coefficient"),
    ],
)
def test_functions_that_are_refused(loss, message):
    net = mlp(2, 2)
    with pytest.raises(RuntimeError, match=message):
        of_loss(list(net.parameters()), loss(net(torch.rand(5, 2))))
