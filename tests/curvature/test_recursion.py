"""The tape and the PCH curvature together, against autograd on the whole loss and explicit loops."""

import warnings

import pytest
import torch
from helpers.curvatures import CRITERIA, Branching, Doubled, network
from hypothesis import given
from hypothesis import strategies as st
from oracles import hessian_block, linear_names, pch_by_loops, pos_eig_matrix
from torch import nn
from torch.nn import functional as F

import secondorder as so
from secondorder import ops
from secondorder._layers import linear_layers
from secondorder._tape import Tape, TapeOptions, elementwise
from secondorder.criteria import BoundedClassificationLoss, FunctionCriterion
from secondorder.curvature import PCH, curvature_by_name


class Functional(nn.Module):
    """An activation that is plain Python."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


# name -> (module, the analytic name that the graph must give, or None for autograd's)
ACTIVATIONS = {
    "sigmoid": (nn.Sigmoid(), "sigmoid"),
    "tanh": (nn.Tanh(), "tanh"),
    "relu": (nn.ReLU(), "relu"),
    "relu-inplace": (nn.ReLU(inplace=True), "relu"),
    "leaky-relu": (nn.LeakyReLU(0.1), "leaky_relu"),
    "leaky-relu-inplace": (nn.LeakyReLU(0.1, inplace=True), "leaky_relu"),
    "elu": (nn.ELU(0.7), "elu"),
    "elu-inplace": (nn.ELU(inplace=True), "elu"),
    "softplus": (nn.Softplus(beta=2), "softplus"),
    "softplus-early-threshold": (nn.Softplus(threshold=1), None),
    "silu": (nn.SiLU(), "silu"),
    "gelu": (nn.GELU(), "gelu"),
    "gelu-tanh": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "identity": (nn.Identity(), "identity"),
    "selu": (nn.SELU(), None),
    "mish": (nn.Mish(), None),
    "softsign": (nn.Softsign(), None),
    "functional-tanh": (Functional(torch.tanh), "tanh"),
    "sigmoid-inplace": (Functional(lambda z: z.sigmoid_()), "sigmoid"),
    "sine": (Functional(lambda z: torch.sin(3 * z) + z**2), None),
    "sine-inplace": (Functional(lambda z: z.mul_(3).sin_()), None),
    "linear": (Functional(lambda z: 2 * z - 1), None),
    "gated": (Functional(lambda z: z * torch.sigmoid(1.7 * z)), None),
}


def recorded(model, criterion, *batches, diagonal=True, scale=None):
    """The tape's records after forward and backward passes over the batches."""
    tape = Tape(linear_layers(model), criterion, TapeOptions(diagonal=diagonal))
    for x, y in batches:
        loss = criterion(model(x), y)
        (loss if scale is None else loss * scale).backward()
    records = tape.records()
    tape.remove()
    return records


def blocks(model, criterion, *batches, gamma=-1.0, **kwargs):
    hessians = PCH(gamma).bias_hessians(recorded(model, criterion, *batches, **kwargs))
    return [hessians[layer] for layer in model.modules() if layer in hessians]


@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_batch_of_one_is_exact(name, criterion_name):
    """At m = 1 the recursion is autograd's Hessian w.r.t. each bias, and kron(H, h h^T) that w.r.t. each weight.

    Pos-Eig stands in between: of a diagonal entry l, gamma = 0 gives max(l, 0) and gamma = -1 gives |l|; so each step from the
    true block above, 2 * (gamma = 0) - (gamma = -1) is the recursion without Pos-Eig.
    """
    if name == "sine-inplace" or name.startswith(("relu", "leaky")):
        torch.manual_seed(3)
    activation, _ = ACTIVATIONS[name]
    criterion, target = CRITERIA[criterion_name]
    model = network([4, 5, 3, 6, 3], activation)
    x, y = torch.randn(1, 4).double(), target(1, 3)
    if criterion_name == "huber":  # which bends within delta alone
        y[:, 0] = model(x)[:, 0].detach() + 0.1
    records = recorded(model, criterion, (x, y))
    names = dict(zip((m for m in model.modules() if isinstance(m, nn.Linear)), linear_names(model), strict=True))
    true = {r.layer: hessian_block(model, criterion, x, y, names[r.layer] + ".bias") for r in records}
    top = records[0].losses[0].hessian.values
    torch.testing.assert_close(torch.diag(top) if top.dim() == 1 else top, true[records[0].layer], rtol=1e-9, atol=1e-12)
    for record in records:
        if record.next is not None:
            above, weight = true[record.next.layer], record.next.layer.weight.detach()
            d1, d2 = elementwise.derivatives(record.map())
            grad = record.grad_activation()
            steps = [ops.bias_hessian(above, weight, d1, d2, grad if d2 is not None else None, gamma) for gamma in (0.0, -1.0)]
            torch.testing.assert_close(2 * steps[0] - steps[1], true[record.layer], rtol=1e-9, atol=1e-12)
        h = record.input()[0]
        weight_block = hessian_block(model, criterion, x, y, names[record.layer] + ".weight")
        torch.testing.assert_close(torch.kron(true[record.layer], torch.outer(h, h)), weight_block, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gamma", [-1.0, 0.0])
@pytest.mark.parametrize("criterion_name", ["cross-entropy", "eq14", "tukey"])
@pytest.mark.parametrize("name", ["sigmoid", "relu-inplace", "gelu", "sine", "sine-inplace", "mish"])
def test_batches_match_loops_over_instances(name, criterion_name, gamma):
    activation, _ = ACTIVATIONS[name]
    criterion, target = CRITERIA[criterion_name]
    m, widths = 6, [3, 7, 4, 3]
    model = network(widths, activation)
    x, y = torch.randn(m, 3).double(), target(m, 3)
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    expected = pch_by_loops(
        [layer.weight.detach() for layer in linears],
        [layer.bias.detach() for layer in linears],
        [lambda z: activation(z.clone())] * 2,
        lambda z, i: criterion(z[None], y[i : i + 1]) / m,
        x,
        gamma,
    )
    for actual, block in zip(blocks(model, criterion, (x, y), gamma=gamma), expected, strict=True):
        torch.testing.assert_close(actual, block, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("curvature", "gammas"), [("pch-abs", (-1.0, -1.0)), ("pch-clip", (0.0, -1.0)), ("pch-clip-all", (0.0, 0.0)),
                              (PCH(-0.3, gamma_output=-0.6), (-0.3, -0.6))]
)  # fmt: skip
def test_where_a_curvature_takes_absolute_values_and_where_it_clips(curvature, gammas):
    """Eq. 8b's gamma is that of the recursion's diagonal, Eq. 8a's that of the criterion's Hessian, which is indefinite here."""
    criterion, target = CRITERIA["eq14"]
    m, model = 6, network([3, 7, 4, 3], nn.Tanh())
    x, y = torch.randn(m, 3).double(), target(m, 3)
    with torch.no_grad():
        model[-1].weight *= 10
    output = model(x).detach()
    top = sum(torch.func.hessian(lambda z, i=i: criterion(z[None], y[i : i + 1]))(output[i]) for i in range(m))
    assert torch.linalg.eigvalsh(top)[0] < -0.1
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    expected = pch_by_loops(
        [layer.weight.detach() for layer in linears],
        [layer.bias.detach() for layer in linears],
        [torch.tanh] * 2,
        lambda z, i: criterion(z[None], y[i : i + 1]) / m,
        x,
        *gammas,
    )
    tape = Tape(linear_layers(model), criterion, TapeOptions(diagonal=True))
    criterion(model(x), y).backward()
    actual = curvature_by_name(curvature).bias_hessians(tape.records())
    for layer, block in zip(linears, expected, strict=True):
        torch.testing.assert_close(actual[layer], block, rtol=1e-9, atol=1e-12)
    assert PCH(-0.3) != PCH(-0.3, gamma_output=-0.6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_graph_names_the_activation(name):
    activation, analytic = ACTIVATIONS[name]
    model = network([4, 5, 3], activation)
    records = recorded(model, nn.MSELoss(), (torch.randn(6, 4).double(), torch.randn(6, 3).double()))
    assert getattr(records[1].map(), "activation", None) == analytic


class Relu(torch.autograd.Function):
    """Has the name of a node of torch's, and is another function."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**2 + z

    @staticmethod
    def backward(ctx, grad):
        return grad * (2 * ctx.saved_tensors[0] + 1)


def test_a_function_of_ones_own_by_the_name_of_an_activation_is_its_own():
    torch.manual_seed(0)
    model, twin = (network([4, 5, 3], Functional(function)) for function in (Relu.apply, lambda z: z**2 + z))
    twin.load_state_dict(model.state_dict())
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    torch.testing.assert_close(blocks(model, nn.CrossEntropyLoss(), (x, y)), blocks(twin, nn.CrossEntropyLoss(), (x, y)))


class Plain(nn.Module):
    """A forward of ordinary Python, with dropout, a reshape, a scale of its own and a sigmoid at the end."""

    def __init__(self, last=True):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 5), nn.Linear(5, 1)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.last = last

    def forward(self, x, noise=None):
        h = F.relu(self.first(x.flatten(1)))
        h = h * noise if noise is not None else F.dropout(h, 0.4, self.training)
        h = torch.tanh(self.second(input=h) * self.scale)
        z = self.third(h).squeeze(-1)
        return torch.sigmoid(z) if self.last else z


def test_ordinary_python_forward():
    model = Plain().double()
    x, y, noise = torch.randn(5, 2, 2).double(), torch.rand(5).double(), (torch.rand(5, 8) > 0.4).double() / 0.6
    call, x1 = FunctionCriterion(F.binary_cross_entropy), x.flatten(1)
    tape = Tape(linear_layers(model), call, TapeOptions(diagonal=True))
    call(model(x, noise), y).backward()
    actual = PCH(-1.0).bias_hessians(tape.records())
    # The same network by loops; the noise multiplies the ReLU per instance, so it enters through the functions' order.
    z1 = x1 @ model.first.weight.T + model.first.bias
    h1 = torch.relu(z1) * noise
    functions = [lambda z: torch.tanh(z * model.scale.detach())]
    upper = pch_by_loops(
        [model.second.weight.detach(), model.third.weight.detach()],
        [model.second.bias.detach(), model.third.bias.detach()],
        functions,
        lambda z, i: F.binary_cross_entropy(torch.sigmoid(z[0]), y[i]) / 5,
        h1.detach(),
        -1.0,
    )
    torch.testing.assert_close(actual[model.third], upper[1])
    torch.testing.assert_close(actual[model.second], upper[0])
    d1 = ((z1 > 0) * noise).detach()
    w = model.second.weight.detach()
    torch.testing.assert_close(actual[model.first], (w.T @ upper[0] @ w) * (d1.T @ d1 / 5))


@pytest.mark.parametrize("name", ["sigmoid", "relu-inplace", "sine"])
def test_accumulated_micro_batches_are_one_batch(name):
    activation, _ = ACTIVATIONS[name]
    for criterion_name, (criterion, target) in CRITERIA.items():
        model = network([3, 7, 4, 3], activation)
        x, y = torch.randn(12, 3).double(), target(12, 3)
        whole = blocks(model, criterion, (x, y))
        parts = blocks(model, criterion, *((x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)), scale=1 / 3)
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=criterion_name)


def test_a_factor_on_the_loss_is_a_factor_on_the_curvature():
    model = network([3, 7, 3], nn.Tanh())
    x, y = torch.randn(5, 3).double(), torch.randint(3, (5,))
    for mean, tripled in zip(
        blocks(model, nn.CrossEntropyLoss(), (x, y)), blocks(model, nn.CrossEntropyLoss(), (x, y), scale=3.0), strict=True
    ):
        torch.testing.assert_close(3 * mean, tripled)
    summed = blocks(model, nn.CrossEntropyLoss(reduction="sum"), (x, y))
    for mean, total in zip(blocks(model, nn.CrossEntropyLoss(), (x, y)), summed, strict=True):
        torch.testing.assert_close(5 * mean, total)


def test_chains_that_other_layers_come_between():
    """The layer after `a1` was met in the first pass, another chain in the second, `a1` itself in the third."""
    a1, a2, b1, b2 = (nn.Linear(n, k).double() for n, k in [(3, 4), (4, 3), (5, 4), (4, 3)])
    model, criterion = nn.ModuleList([a1, a2, b1, b2]), nn.CrossEntropyLoss()
    x, h, u = (torch.randn(6, n).double() for n in (3, 4, 5))
    y = torch.randint(3, (6,))
    tape = Tape(linear_layers(model), criterion, TapeOptions(diagonal=True))
    activation = torch.tanh(a1(x))
    activation.retain_grad()
    outputs = [a2(h), b2(torch.tanh(b1(u))), a2(activation)]
    for output in outputs:
        criterion(output, y).backward()
    records = tape.records()
    assert [record.layer for record in records] == [a2, b2, b1, a1]
    hessians = PCH(-1.0).bias_hessians(records)
    tape.remove()
    top = sum(torch.diag(p.sum(0)) - p.T @ p for p in (output.detach().softmax(1) for output in (outputs[0], outputs[2]))) / len(
        x
    )
    torch.testing.assert_close(hessians[a2], top)
    t = activation.detach()
    d1, d2 = 1 - t**2, -2 * t * (1 - t**2)
    diagonal = (d2 * activation.grad).sum(0).abs()
    w = a2.weight.detach()
    torch.testing.assert_close(hessians[a1], (w.T @ top @ w) * (d1.T @ d1 / len(x)) + torch.diag(diagonal))


def test_a_hook_on_the_loss_is_a_factor_on_the_curvature():
    model, criterion = network([3, 7, 3], nn.Tanh()), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 3).double(), torch.randint(3, (5,))
    tape = Tape(linear_layers(model), criterion, TapeOptions(diagonal=True))
    loss = criterion(model(x), y)
    loss.register_hook(lambda gradient: 3 * gradient)
    loss.backward()
    hooked = PCH(-1.0).bias_hessians(tape.records())
    tape.remove()
    for mean, tripled in zip(blocks(model, criterion, (x, y)), [hooked[model[0]], hooked[model[2]]], strict=True):
        torch.testing.assert_close(3 * mean, tripled)


@pytest.mark.parametrize(("batches", "half", "lengths"), [(1, False, [3]), (2, False, [1, 1, 1]), (1, True, [1, 1, 1])])
def test_copies_of_what_was_recorded_are_made_for_one_layer_at_a_time(batches, half, lengths, monkeypatch):
    model = network([3, 7, 4, 6, 3], nn.Tanh()).to(torch.bfloat16 if half else torch.float32)
    x, y = torch.randn(6, 3, dtype=model[0].weight.dtype), torch.randint(3, (6,))
    records = recorded(model, nn.CrossEntropyLoss(), *zip(x.chunk(batches), y.chunk(batches), strict=True))
    calls, chain = [], ops.bias_hessian_chain
    monkeypatch.setattr(
        ops, "bias_hessian_chain", lambda top, weight, *rest: calls.append(len(weight)) or chain(top, weight, *rest)
    )
    PCH(-1.0).bias_hessians(records)
    assert calls == lengths


def test_sequence_inputs_are_instances():
    model = network([3, 6, 2], nn.SiLU())
    x, y = torch.randn(4, 5, 3).double(), torch.randn(4, 5, 2).double()
    flat = blocks(model, nn.MSELoss(), (x.flatten(0, 1), y.flatten(0, 1)))
    for a, b in zip(blocks(model, nn.MSELoss(), (x, y)), flat, strict=True):
        torch.testing.assert_close(a, b)


@given(
    widths=st.lists(st.integers(1, 9), min_size=3, max_size=5), m=st.integers(1, 8), gamma=st.floats(-2, 0),
    name=st.sampled_from(["sigmoid", "tanh", "sine", "gelu", "selu"]), criterion_name=st.sampled_from(sorted(CRITERIA)),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_every_block_is_positive_semi_definite(widths, m, gamma, name, criterion_name, seed):
    torch.manual_seed(seed)
    criterion, target = CRITERIA[criterion_name]
    model = network(widths, ACTIVATIONS[name][0])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    for block in blocks(model, criterion, (torch.randn(m, widths[0]).double(), target(m, widths[-1])), gamma=gamma):
        eigenvalues = torch.linalg.eigvalsh(block)
        assert eigenvalues[0] >= -1e-10 * max(1e-3, float(eigenvalues[-1]))


@pytest.mark.parametrize(
    ("kind", "restarted"),
    [("norm", "b"), ("softmax", "b"), ("residual", "ab"), ("heads", "abc"), ("flip", "b")],
)
def test_where_the_recursion_ends_a_layer_restarts_from_its_fisher_block(kind, restarted):
    model = Branching(kind).double()
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    criterion = nn.CrossEntropyLoss()
    records = recorded(model, criterion, (x, y))
    names = {module: name for name, module in model.named_modules()}
    assert sorted(names[r.layer] for r in records) == ["a", "b", "c"]
    assert sorted(names[r.layer] for r in records if r.obstacle) == list(restarted)
    hessians = PCH(-1.0).bias_hessians(records)
    for record in records:
        if not record.obstacle:
            continue
        expected = 0  # E of the outer products of the instances' own gradients, each from a hook on the layer's output
        deltas = []
        handle = record.layer.register_forward_hook(
            lambda module, args, out, deltas=deltas: out.register_hook(deltas.append) and None
        )
        for i in range(6):
            if kind == "flip":  # instances are not independent: take the batch's rows
                criterion(model(x), y).backward()
                deltas = [6 * row[None] for row in deltas[-1]]
                break
            criterion(model(x[i : i + 1]), y[i : i + 1]).backward()
        handle.remove()
        for delta in deltas:
            expected = expected + torch.outer(delta[0], delta[0]) / 6
        torch.testing.assert_close(hessians[record.layer], expected)


def test_flattened_logits_have_the_analytic_hessian(monkeypatch):
    model, criterion = network([3, 6, 4], nn.Tanh()), nn.CrossEntropyLoss()
    x, y = torch.randn(2, 5, 3).double(), torch.randint(4, (2, 5))
    monkeypatch.setattr("secondorder._tape.tape.autograd_hessian", None)
    tape = Tape(linear_layers(model), criterion, TapeOptions(diagonal=True))
    criterion(model(x).view(-1, 4), y.view(-1)).backward()
    true = hessian_block(
        model[2], lambda z, t: criterion(z, t), torch.tanh(model[0](x)).detach().flatten(0, 1), y.view(-1), "bias"
    )
    torch.testing.assert_close(PCH(-1.0).bias_hessians(tape.records())[model[2]], true)


def test_a_probe_looks_no_further_than_the_layer_before():
    """To walk the graph below it for every activation would cost as much as the depth squared."""
    x = torch.linspace(-1, 1, 20).view(4, 5).requires_grad_()
    (below,) = torch.autograd.grad(Doubled.apply(x).square().sum(), x, create_graph=True)
    z = nn.Linear(5, 3)(below)
    s = torch.sigmoid(z)
    found = elementwise.probe(z * s, z.grad_fn, second=True)
    torch.testing.assert_close(found.d1, s + z * s * (1 - s))
    torch.testing.assert_close(found.d2, s * (1 - s) * (2 + z * (1 - 2 * s)))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        elementwise.probe(torch.tanh(Doubled.apply(z)), z.grad_fn, second=True)


def test_what_is_not_elementwise_is_probed_once(monkeypatch):
    model, criterion = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)).double(), nn.MSELoss()
    tape = Tape(linear_layers(model), criterion, TapeOptions(diagonal=True))
    probes = []
    real = elementwise.probe
    monkeypatch.setattr(elementwise, "probe", lambda *a, **k: probes.append(1) or real(*a, **k))
    for _ in range(4):
        criterion(model(torch.randn(6, 3).double()), torch.randn(6, 2).double()).backward()
    assert len(probes) == 1
    assert all(record.obstacle for record in tape.records() if record.layer is model[0])


def test_pos_eig_of_the_output_hessian():
    criterion, model = BoundedClassificationLoss(), nn.Linear(3, 4).double()
    x, y = torch.randn(5, 3).double(), torch.randint(4, (5,))
    true = hessian_block(model, criterion, x, y, "bias")
    for gamma in (-1.0, 0.0):
        torch.testing.assert_close(blocks(model, criterion, (x, y), gamma=gamma)[0], pos_eig_matrix(true, gamma))


def test_the_users_random_numbers_and_graph_are_left_alone():
    """Probing an unknown activation neither draws random numbers nor changes gradients."""
    results = []
    for with_tape in (False, True):
        torch.manual_seed(5)
        model, criterion = network([4, 6, 3], nn.Sequential(nn.Mish(), nn.Dropout(0.5))), nn.HuberLoss()
        tape = Tape(linear_layers(model), criterion, TapeOptions(diagonal=True)) if with_tape else None
        criterion(model(torch.randn(9, 4).double()), torch.randn(9, 3).double()).backward()
        assert tape is None or len(tape.records()) == 2
        results.append([p.grad for p in model.parameters()] + [torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network([4, 6, 3], nn.Tanh())
        blocks(model, nn.MSELoss(), (torch.randn(9, 4).double(), torch.randn(9, 3).double()))


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("curvature", ["pch-abs", "gauss-newton", "kflr", "fisher-empirical"])
@pytest.mark.parametrize("solver", ["ea-cg", "kfi", "ea-isotropic"])
def test_factors_are_those_of_the_batch_without_ignored_rows(solver, curvature, batches, sequences):
    found = []
    for whole in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 5), nn.ELU(), nn.Linear(5, 3)).double()
        criterion = nn.CrossEntropyLoss()
        optimizer = so.EACG(model, criterion, curvature=curvature, solver=solver)
        for batch in range(batches):
            x, y = torch.randn(24, 4).double(), torch.arange(24) % 3
            y[2 + batch : 15] = -100
            x[2 + batch : 15] += 2  # of another mean
            if not whole:
                x, y = x[y != -100], y[y != -100]
            shape = (-1, 6) if sequences and whole else (len(x),)
            z = model(x.view(*shape, 4))
            criterion(z.view(-1, 3), y.view(-1)).backward()
        optimizer.step()
        found.append([optimizer.state[p]["factors"] for p in model.parameters() if p.dim() == 2])
    for actual, expected in zip(*found, strict=True):
        for name, factor in expected.items():
            torch.testing.assert_close(actual[name], factor, msg=lambda m, name=name: f"{name}: {m}")


def test_rows_that_come_to_the_criterion_in_another_order_all_count():
    """Which of them the ignored targets belong to is not known."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 7), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 3, 4), torch.randint(7, (3, 5))
    y[0, :2] = -100
    optimizer = so.EACG(model, criterion)
    criterion(model(x).transpose(0, 1).reshape(-1, 7), y.reshape(-1)).backward()
    optimizer.step()
    mean = optimizer.state[model.weight]["factors"]["mean_input"]
    torch.testing.assert_close(mean, x.reshape(-1, 4).mean(0))
