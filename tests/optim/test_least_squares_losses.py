"""Which losses LevenbergMarquardt takes, in what words, and what it says of others."""

import copy
import threading

import pytest
import torch
import torch._functorch.config
from helpers.least_squares import dense_jacobian, flat, float64, regression  # noqa: F401
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import secondorder as so


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
    rtol = 1e-6 if so.build_info()["extension"] else 1e-5
    for other in (with_backward, detached, listed, listed_with_weights, with_constants):
        torch.testing.assert_close(trained(net, other), expected, rtol=rtol, atol=1e-9)


def pseudo_huber(d):
    return d / (1 + (1 + d**2).sqrt()).sqrt()  # its square is sqrt(1 + d^2) - 1


@pytest.mark.parametrize(
    ("loss", "root"),
    [
        (lambda d: ((1 + d**2).sqrt() - 1).mean(), pseudo_huber),
        (lambda d: (1 + d**2).sqrt().mean(), pseudo_huber),
        (lambda d: (0.25 * torch.log(torch.cosh(2 * d))).mean(), lambda d: d.sign() * (torch.cosh(2 * d).log() / 4).sqrt()),
        (lambda d: torch.log1p(d**2).mean(), lambda d: d.sign() * torch.log1p(d**2).sqrt()),
        (lambda d: d.abs().pow(1.5).mean(), lambda d: d.sign() * d.abs() ** 0.75),
        (lambda d: torch.nn.functional.softplus(d).mean(), lambda d: torch.nn.functional.softplus(d).sqrt()),
        (lambda d: ((d - 1) * (d - 1)).mean(), lambda d: d - 1),
    ],
)
def test_robust_functions_give_the_steps_of_their_roots(loss, root):
    net, x, y = regression()
    found = trained(net, lambda model, _: lambda: loss(model(x) - y), race=False)
    expected = trained(net, lambda model, _: lambda: [(root(model(x) - y), 1.0)], race=False)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_scalar_residual_that_is_positive_is_a_residual():
    k = nn.Parameter(torch.tensor(1.0))
    optimizer = so.LevenbergMarquardt([k], race=False)
    for _ in range(20):
        optimizer.step(lambda: [(k.exp(), 1.0), (k - 1, 1.0)])
    (slope,) = torch.autograd.grad((2 * k).exp() + (k - 1) ** 2, k)
    assert abs(float(slope)) < 1e-4


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
    torch.testing.assert_close(x.detach(), torch.tensor(1 - 1 / 1.1))  # mu is 0.1 times the mean of two columns of norm 1
    torch.testing.assert_close(y.detach(), torch.tensor(2 - 2 / 1.1))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["cross_entropy", "soft_margin_loss", "binary_cross_entropy_with_logits"])
def test_a_classifier_that_is_certain_of_every_label_goes_on(name, reduction, dtype):
    x = torch.linspace(-1, 1, 40, dtype=dtype).view(-1, 1)
    layer = nn.Linear(1, 1, dtype=dtype)
    layer.weight.data.fill_(1e5)
    layer.bias.data.zero_()
    target = {
        "cross_entropy": (x[:, 0] > 0).long(), "soft_margin_loss": x.sign(), "binary_cross_entropy_with_logits": (x > 0).to(dtype)
    }[name]  # fmt: skip

    def loss():
        output = layer(x)
        logits = torch.cat([-output, output], 1) if name == "cross_entropy" else output
        return getattr(nn.functional, name)(logits, target, reduction=reduction)

    optimizer = so.LevenbergMarquardt(layer.parameters())
    for _ in range(3):
        assert optimizer.step(loss) == 0
    assert layer.weight.item() == 1e5


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


@pytest.mark.parametrize("write", [lambda e: e[:1].exp_(), lambda e: e[:1].mul_(e[1:].clone()), lambda e: e[:1].sqrt_()])
def test_writes_to_losses_that_are_not_linear_are_refused(write):
    net, x, y = regression()
    before = flat(net)

    def closure():
        terms = torch.zeros(2)
        terms[0], terms[1] = mse_loss(net(x), y), 10 * (net(x[:3]) ** 2).mean()
        write(terms)
        return terms.sum()

    with pytest.raises(RuntimeError, match="expected the loss to be the sum of the squares that its graph shows"):
        so.LevenbergMarquardt(net.parameters()).step(closure)
    assert torch.equal(flat(net), before)


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
    metric = 2 * torch.eye(3) + 1
    optimizer = so.LevenbergMarquardt([*net.parameters(), k])
    before = flat(net)

    def reads_gradients():
        loss = mse_loss(k * net(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert k.grad.norm() >= 0
        return loss

    weights = torch.ones_like(y)

    def weighs_by_itself():
        r = net(x) - y
        weights.mul_(0.5).add_(r.detach().abs())
        return ((weights.clone() * r) ** 2).mean()

    def projects():
        with torch.no_grad():
            k.clamp_(0, 1)
        return mse_loss(k * net(x), y)

    for closure, error, message in [
        (weighs_by_itself, RuntimeError, "update weights of residuals after the step"),
        (reads_gradients, RuntimeError, "computes no gradients. Take them by torch.autograd.grad"),
        (projects, RuntimeError, r"writes to the one of shape \(\). Clamp or project it after the step"),
        (lambda: (mse_loss(net(x), y), 1.0), RuntimeError, "return the loss alone"),
        (lambda: None, RuntimeError, "end the closure with return loss"),
        (lambda: mse_loss(net(x), y).item(), RuntimeError, "not loss.item"),
        (lambda: (net(x) - y).norm() / y.norm(), RuntimeError, "the squares, as .* have the same minimum"),
        (lambda: mse_loss(net(x), y).log(), RuntimeError, "Leave out the root, norm or logarithm"),
        (lambda: (net(x) - y).abs().mean(), RuntimeError, "take nn.HuberLoss"),
        (lambda: (net(x).square() - net(x)).mean(), RuntimeError, "In an energy .* complete the square"),
        (lambda: (net(x) - y).square().sqrt().sum(), RuntimeError, r"\(r \*\* 2 \+ eps\).sqrt\(\), let eps be no less"),
        (
            lambda: nn.functional.cross_entropy(net(x).expand(-1, 2), y.expand(-1, 2).softmax(1)),
            RuntimeError,
            "is of class indices",
        ),
        (lambda: (k * (net(x) - y) ** 2).mean(), RuntimeError, "Give trained weights of the terms to another optimizer"),
        (lambda: (k * (k * net(x) - y) ** 2).mean(), RuntimeError, "Give trained weights of the terms to another optimizer"),
        (lambda: (-k).exp() * mse_loss(net(x), y) + k, RuntimeError, "another optimizer|detach weights"),
        (lambda: (r := (net(x) - y)[:3, 0]) @ metric @ r, RuntimeError, r"DotBackward0 .* write \(\(r @ L\) \*\* 2\).sum\(\)"),
        (lambda: mse_loss(net(x), y) + (b := net[0].bias) @ (torch.eye(len(b)) + 0.1) @ b, RuntimeError, "For a quadratic form"),
        (lambda: ((r := net(x)[:3].T) @ metric * r).sum(), RuntimeError, "For a quadratic form"),
        (lambda: 1 - (net(x) * y).sum() ** 2, RuntimeError, r"in place of 1 - overlap.abs\(\) \*\* 2"),
        (
            lambda: mse_loss(checkpoint(net, x.requires_grad_(), use_reentrant=True), y),
            RuntimeError,
            "give torch.utils.checkpoint use_reentrant=False",
        ),
        (mse_loss(net(x), y), TypeError, "expected a closure, a function"),
    ]:
        k.data.fill_(2.0)
        with pytest.raises(error, match=message):
            optimizer.step(closure)
        assert torch.equal(flat(net), before)
    with pytest.raises(TypeError, match=r"torch.view_as_complex\(p\)"):
        so.LevenbergMarquardt([k, nn.Parameter(torch.ones(2, dtype=torch.complex128))])


class Forgetful(torch.autograd.Function):
    """Reads in its backward pass what it has not saved."""

    @staticmethod
    def forward(ctx, u):
        ctx.factor = None
        return 2 * u

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor


def test_an_error_outside_of_the_closure_is_not_said_to_be_the_closures():
    net, x, y = regression()
    with pytest.raises(TypeError, match="NoneType"):
        so.LevenbergMarquardt(net).step(lambda: mse_loss(Forgetful.apply(net(x)), y))


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
    monkeypatch.setattr("secondorder._tape.passes.BATCH", 1)
    found.append(after_steps(nets[2], loss, 1))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)


@torch._functorch.config.patch(donated_buffer=False)  # what monkeypatch restores there counts as deleted
def test_a_compiled_model():
    net, x, y = regression(20, 4)
    compiled = torch.compile(net, backend="aot_eager")
    expected = trained(net, lambda model, _: lambda: mse_loss(model(x), y), race=False)
    optimizer = so.LevenbergMarquardt(net.parameters(), rows=25, race=False)
    with pytest.warns(UserWarning, match="CompiledFunctionBackward"):
        optimizer.step(lambda: mse_loss(compiled(x), y))
    for _ in range(3):
        optimizer.step(lambda: mse_loss(compiled(x), y))
    torch.testing.assert_close(flat(net), expected, rtol=1e-6, atol=1e-9)


CONVERGING = {
    "log(1 + r ** 2)": lambda r: (1 + r**2).log().mean(),
    "log(cosh(r))": lambda r: r.cosh().log().mean(),
    "Student's t": lambda r: 2.5 * (1 + r**2 / 4).log().mean(),
    "(1 + r ** 2).sqrt()": lambda r: ((1 + r**2).sqrt() - 1).mean(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONVERGING)
def test_robust_functions_converge_to_where_rounding_is_all_that_is_left(name, dtype):
    """log(1 + r ** 2) rounds 1 + r ** 2, so that the loss is not the sum of its squares to all digits any more."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    x = torch.linspace(-1, 1, 64, dtype=dtype)[:, None]
    optimizer = so.LevenbergMarquardt(net.parameters(), holdout=False)
    for _ in range(40):
        optimizer.step(lambda: CONVERGING[name](net(x) - torch.sin(3 * x)))
    assert (net(x) - torch.sin(3 * x)).abs().max() < (3e-3 if dtype == torch.float32 else 5e-5)


PRODUCTS = {
    "w * r * r": lambda w, r: (w * r * r).mean(),
    "r * (w * r)": lambda w, r: (r * (w * r)).mean(),
    "einsum": lambda w, r: torch.einsum("i,i->", r, r),
    "views": lambda w, r: r.view(1, -1) @ r.view(-1),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_residuals_that_overflow_in_a_trial_refuse_the_trial(name):
    torch.manual_seed(0)
    x = torch.linspace(0, 10, 30)
    w, p = torch.rand(30), nn.Parameter(torch.tensor([1.0, 0.01]))
    optimizer = so.LevenbergMarquardt([p], race=False)
    losses = [
        optimizer.step(lambda: PRODUCTS[name](w, p[0] * torch.exp(4 * p[1] * x) - 3 * torch.exp(0.5 * x))) for _ in range(30)
    ]
    assert losses[-1] < 1e-3 * losses[0]
    start = nn.Parameter(torch.tensor([1.0, 30.0]))
    with pytest.raises(so.NonFiniteError):
        so.LevenbergMarquardt([start]).step(lambda: PRODUCTS[name](w, start[0] * torch.exp(4 * start[1] * x)))


@pytest.mark.parametrize("race", [True, False])
def test_a_trial_outside_of_the_domain_of_a_function_is_refused(race):
    """The barrier's logarithm ends at 2; without it the minimum is at 3."""
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = so.LevenbergMarquardt([x], race=race)
    for _ in range(60):
        optimizer.step(lambda: ((x - 3) ** 2).sum() - 0.01 * (4 - x**2).log().sum())
    t = x.detach().requires_grad_()
    ((t - 3) ** 2).sum().sub(0.01 * (4 - t**2).log().sum()).backward()
    assert t.grad.abs().max() < 1e-4


def test_counts_that_underflow_are_no_nan():
    """exp(-119) is zero in float32."""
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(-60.0), net.bias.fill_(1.0)
    x, y = torch.tensor([[0.0], [1], [2]]), torch.tensor([[3.0], [1], [0]])
    optimizer = so.LevenbergMarquardt(net.parameters())
    for _ in range(20):
        loss = optimizer.step(lambda: nn.functional.poisson_nll_loss(net(x), y))
    assert loss < 0.31
