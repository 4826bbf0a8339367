"""The diagnostics against dense matrices by autograd in float64."""

import copy

import pytest
import torch
from helpers.curvatures import CRITERIA, log_odds, network
from oracles import dense_gauss_newton, hessian_block, linear_names, pch_by_loops
from torch import nn
from torch.func import functional_call, hessian

import secondorder as so
from secondorder.criteria import CompositeLoss
from secondorder.curvature import PCH, curvature_by_name


@pytest.mark.parametrize("criterion_name", ["cross-entropy", "eq14"])
def test_errors_are_those_of_the_dense_blocks(criterion_name):
    criterion, target = CRITERIA[criterion_name]
    model, x, y = network([4, 6, 5, 3], nn.Sigmoid()), torch.randn(7, 4).double(), target(7, 3)
    with torch.no_grad():
        model[-1].weight *= 10  # so that Eq. 14's Hessian has negative eigenvalues
    table = so.diagnostics.curvature_error(model, criterion, x, y, ["pch-abs", PCH(0.0), "gauss-newton"])
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    for name, gamma in (("pch-abs", -1.0), (str(PCH(0.0)), 0.0)):
        blocks = pch_by_loops(
            [layer.weight.detach() for layer in linears],
            [layer.bias.detach() for layer in linears],
            [torch.sigmoid] * 2,
            lambda z, i: criterion(z[None], y[i : i + 1]) / 7,
            x,
            gamma,
        )
        squares = 0
        for layer, block in zip(linear_names(model), blocks, strict=True):
            values, vectors = torch.linalg.eigh(hessian_block(model, criterion, x, y, f"{layer}.bias"))
            distance = float((block - vectors @ torch.diag(values.abs()) @ vectors.T).square().sum().sqrt())
            assert table.errors[name][layer] == pytest.approx(distance, rel=1e-8, abs=1e-12)
            squares += distance**2
        assert table.totals[name] == pytest.approx(squares**0.5)
    assert (table.errors["gauss-newton"] is None) == (criterion_name == "eq14")
    lines = str(table).splitlines()
    assert len(lines) == 5
    assert lines[-1].split()[0] == "total"
    assert float(lines[1].split()[1]) == pytest.approx(table.errors["pch-abs"]["0"], rel=1e-3)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def bernoulli(z, y):
    """Of logits and labels, one each."""
    return nn.functional.binary_cross_entropy_with_logits(z.flatten(), y)


def moved(model, old):
    return {name: (p - q).detach() for (name, p), q in zip(model.named_parameters(), old.parameters(), strict=True)}


def block_newton(model, criterion, x, y, layer, damping):
    """-(|N| + damping I)^{-1} g for one layer's weight, row-major, and bias."""
    keys = [f"{layer}.weight", f"{layer}.bias"]
    fixed = {n: p.detach() for n, p in model.named_parameters()}
    n_out, n_in = fixed[keys[0]].shape

    def loss(theta):
        w, b = theta[: n_out * n_in].reshape(n_out, n_in), theta[n_out * n_in :]
        return criterion(functional_call(model, {**fixed, keys[0]: w, keys[1]: b}, (x,)), y)

    here = torch.cat([fixed[k].reshape(-1) for k in keys])
    values, vectors = torch.linalg.eigh(hessian(loss)(here))
    g = torch.autograd.grad(criterion(model(x), y), [model.get_parameter(k) for k in keys])
    matrix = vectors @ torch.diag(values.abs()) @ vectors.T + damping * torch.eye(len(here)).double()
    return -torch.linalg.solve(matrix, torch.cat([t.reshape(-1) for t in g]))


@pytest.mark.parametrize("criterion_name", ["cross-entropy", "eq14"])
def test_spectra_are_those_of_the_dense_blocks(criterion_name):
    criterion, target = CRITERIA[criterion_name]
    model, x, y = network([4, 6, 5, 3], nn.Tanh()), torch.randn(7, 4).double(), target(7, 3)
    with torch.no_grad():
        model[-1].weight *= 10
    spectra = so.diagnostics.spectrum(model, criterion, x, y, ["pch-clip", "fisher-empirical", "gauss-newton"])
    assert list(spectra) == ["hessian", "pch-clip", "fisher-empirical", "gauss-newton"]
    assert (spectra["gauss-newton"] is None) == (criterion_name == "eq14")
    for layer in linear_names(model):
        expected = torch.linalg.eigvalsh(hessian_block(model, criterion, x, y, f"{layer}.bias"))
        torch.testing.assert_close(spectra["hessian"][layer], expected)
        assert (spectra["pch-clip"][layer] > -1e-12).all()
        rows = torch.stack(
            [
                torch.autograd.grad(criterion(model(x[i : i + 1]), y[i : i + 1]), model.get_parameter(f"{layer}.bias"))[0]
                for i in range(7)
            ]
        )
        expected = torch.linalg.svdvals(torch.cat([rows, torch.zeros(9, rows.shape[1]).double()])).square() / 7
        torch.testing.assert_close(spectra["fisher-empirical"][layer], expected.flip(0))
    assert spectra["hessian"]["0"][0] < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_newton_steps_are_the_dense_ones(rows, dtype, monkeypatch):
    monkeypatch.setattr(so.diagnostics.steps, "_ROWS", rows)
    criterion, target = CRITERIA["eq14"]
    model, x, y = network([4, 6, 5, 3], nn.Sigmoid()).to(dtype), torch.randn(7, 4).to(dtype), target(7, 3)
    newton = so.diagnostics.newton_step(model, criterion, x, y, damping=1e-2)
    assert list(newton) == [name for name, _ in model.named_parameters()]
    exact, x = copy.deepcopy(model).double(), x.double()
    for layer in linear_names(model):
        expected = block_newton(exact, criterion, x, y, layer, 1e-2)
        actual = torch.cat([newton[f"{layer}.weight"].reshape(-1), newton[f"{layer}.bias"]])
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_cosines_of_a_step_to_the_newton_step():
    model, criterion, x, y = network([4, 6, 3], nn.Tanh()), nn.CrossEntropyLoss(), torch.randn(9, 4).double(), torch.arange(9) % 3
    expected = {layer: block_newton(model, criterion, x, y, layer, 0.1) for layer in ("0", "2")}
    optimizer, old = so.EACG(model, criterion, lr=0.3, alpha=0.1), copy.deepcopy(model)
    criterion(model(x), y).backward()
    optimizer.step()
    step = moved(model, old)
    cosines = so.diagnostics.newton_cosine(old, criterion, x, y, step, damping=0.1)
    assert list(cosines.layers) == ["0", "2"]
    own = {layer: torch.cat([step[f"{layer}.weight"].reshape(-1), step[f"{layer}.bias"]]) for layer in expected}
    for layer, newton in expected.items():
        assert cosines.layers[layer] == pytest.approx(float(torch.cosine_similarity(own[layer], newton, dim=0)), rel=1e-9)
        assert 0.1 < cosines.layers[layer] < 0.999
    whole = torch.cosine_similarity(torch.cat([*own.values()]), torch.cat([*expected.values()]), dim=0)
    assert cosines.total == pytest.approx(float(whole), rel=1e-9)
    # A damped Newton step is one; what a step leaves out has not moved.
    newton = so.diagnostics.newton_step(old, criterion, x, y, damping=0.1)
    cosines = so.diagnostics.newton_cosine(
        old, criterion, x, y, {k: 7 * v for k, v in newton.items() if k[0] == "0"}, damping=0.1
    )
    assert cosines.layers["0"] == pytest.approx(1)
    assert cosines.layers["2"] != cosines.layers["2"]  # NaN
    assert cosines.total == pytest.approx(float(expected["0"].norm() / torch.cat([*expected.values()]).norm()))


@pytest.mark.parametrize("name", ["cross-entropy", "mse", "composite"])
def test_gauss_newton_steps_are_the_dense_ones(name):
    """All layers together and each by itself, one of them frozen."""
    model, x = network([4, 6, 3], nn.Tanh()), torch.randn(9, 4).double()
    model[0].weight.requires_grad_(False)
    dense_model = model
    if name == "composite":
        criterion, y = CompositeLoss(log_odds, nn.BCEWithLogitsLoss()), torch.randint(2, (9,)).double()
        dense_model, dense_criterion = nn.Sequential(*model, Function(lambda z: log_odds(z).unsqueeze(1))), bernoulli
    else:
        criterion, target = CRITERIA[name]
        dense_criterion, y = criterion, target(9, 3)
    matrix = dense_gauss_newton(dense_model, dense_criterion, x, y)
    parameters = {key: p.detach().requires_grad_() for key, p in model.named_parameters()}
    loss = criterion(functional_call(model, parameters, (x,)), y)
    g = torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(parameters.values()))])
    step = {key: torch.randn_like(p) for key, p in parameters.items()}
    flat = torch.cat([t.flatten() for t in step.values()])
    first = 4 * 6 + 6
    for blocks in (False, True):
        kept = matrix.clone()
        if blocks:
            kept[:first, first:] = kept[first:, :first] = 0
        expected = -torch.linalg.solve(kept + 0.01 * torch.eye(len(g)).double(), g)
        steps = so.diagnostics.gauss_newton_step(model, criterion, x, y, 0.01, blocks=blocks, tol=1e-12)
        torch.testing.assert_close(torch.cat([t.flatten() for t in steps.values()]), expected, rtol=1e-8, atol=1e-10)
        cosines = so.diagnostics.gauss_newton_cosine(model, criterion, x, y, step, 0.01, blocks=blocks, tol=1e-12)
        assert cosines.total == pytest.approx(float(torch.cosine_similarity(flat, expected, dim=0)), rel=1e-7)
        own = (flat[:first], expected[:first]), (flat[first:], expected[first:])
        assert list(cosines.layers.values()) == [
            pytest.approx(float(torch.cosine_similarity(*each, dim=0)), rel=1e-7) for each in own
        ]


def test_gauss_newton_steps_by_log_probabilities_are_those_by_logits():
    """The negative log-likelihood is linear in log-probabilities, and its Gauss-Newton matrix not zero for that."""
    model, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(9, 4).double(), torch.arange(9) % 3
    by_logits = so.diagnostics.gauss_newton_step(model, nn.CrossEntropyLoss(), x, y, 0.01)
    softened = nn.Sequential(*model, nn.LogSoftmax(1))
    for criterion in (nn.NLLLoss(), nn.functional.nll_loss):
        for name, change in so.diagnostics.gauss_newton_step(softened, criterion, x, y, 0.01).items():
            torch.testing.assert_close(change, by_logits[name], rtol=1e-4, atol=1e-6)


def test_only_linear_layers_count_in_cosines():
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    step = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    cosines = so.diagnostics.step_cosines(torch.compile(model), step, {**step, "1.weight": -step["1.weight"]})
    assert cosines.layers == {"0": pytest.approx(1), "2": pytest.approx(1)}
    assert cosines.total == pytest.approx(1)
    with pytest.raises(ValueError, match="expected other to have parameters of a linear layer, got none"):
        so.diagnostics.step_cosines(model, step, {"1.weight": step["1.weight"]})


def test_exact_blocks_of_one_instance_take_the_gauss_newton_step():
    """KFLR's block of a single instance is the Gauss-Newton matrix' own, H (x) h h^T."""
    model, criterion = network([4, 3], nn.Tanh(), bias=False), nn.CrossEntropyLoss()
    x, y, old = torch.randn(1, 4).double(), torch.tensor([1]), copy.deepcopy(model)
    optimizer = so.EACG(model, criterion, lr=0.3, alpha=0.2, curvature="kflr", solver="exact", momentum=0)
    criterion(model(x), y).backward()
    optimizer.step()
    cosines = so.diagnostics.gauss_newton_cosine(old, criterion, x, y, moved(model, old), damping=0.2 / 0.8, blocks=True)
    assert cosines.total == pytest.approx(1, abs=1e-9)


def test_the_exact_solver_on_one_linear_layer_takes_the_newton_step():
    """For one instance of a linear model the block is H (x) h h^T itself."""
    model, criterion, x, y = (
        nn.Linear(4, 3, bias=False).double(),
        nn.CrossEntropyLoss(),
        torch.randn(1, 4).double(),
        torch.tensor([1]),
    )
    optimizer, old = so.EACG(model, criterion, lr=0.3, alpha=0.2, solver="exact", momentum=0), copy.deepcopy(model)
    criterion(model(x), y).backward()
    optimizer.step()
    cosines = so.diagnostics.newton_cosine(old, criterion, x, y, moved(model, old), damping=0.2 / 0.8)
    assert cosines.layers == {"": pytest.approx(1, abs=1e-12)}
    assert cosines.total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("name", "gamma"), [("cross-entropy", None), ("eq14", -1.0)])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_reduction_ratio_is_that_of_the_explicit_model(damping, name, gamma):
    criterion, target = CRITERIA[name]
    model, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(9, 4).double(), target(9, 3)
    step = {n: 0.1 * torch.randn_like(p) for n, p in model.named_parameters() if n != "0.bias"}
    rho = so.diagnostics.reduction_ratio(model, criterion, x, y, step, damping)
    delta = torch.cat([step.get(n, torch.zeros_like(p)).reshape(-1) for n, p in model.named_parameters()])
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(criterion(model(x), y), list(model.parameters()))])
    matrix = dense_gauss_newton(model, criterion, x, y, gamma) + damping * torch.eye(len(g)).double()
    after = {n: p.detach() + step.get(n, 0) for n, p in model.named_parameters()}
    change = (criterion(functional_call(model, after, (x,)), y) - criterion(model(x), y)).item()
    assert rho == pytest.approx(change / float(delta @ g + delta @ matrix @ delta / 2), rel=1e-9)


def test_the_reduction_ratio_is_the_one_that_the_optimizer_has():
    model, criterion, x, y = network([4, 6, 3], nn.Tanh()), nn.CrossEntropyLoss(), torch.randn(9, 4).double(), torch.arange(9) % 3
    optimizer, old = so.LayerwiseNewton(model, criterion, subsample=1.0, damping=0.01), copy.deepcopy(model)
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    rho = so.diagnostics.reduction_ratio(old, criterion, x, y, moved(model, old), damping=0.01 * loss.item())
    assert rho == pytest.approx(optimizer.param_groups[0]["rho"], rel=1e-9)


def test_what_is_refused():
    model, criterion, x, y = network([4, 6, 3], nn.Tanh()), nn.CrossEntropyLoss(), torch.randn(2, 4).double(), torch.arange(2)
    judge = so.diagnostics
    with pytest.raises(ValueError, match=r"at most max_size=29 parameters.*got 30 in layer '0'; raise max_size"):
        judge.newton_step(model, criterion, x, y, damping=0.1, max_size=29)
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected damping > 0, got"):
            judge.newton_step(model, criterion, x, y, damping)
        with pytest.raises(ValueError, match="gauss_newton_step: expected damping > 0, got"):
            judge.gauss_newton_step(model, criterion, x, y, damping)
    with pytest.raises(ValueError, match="convex in the output, got a negative curvature"):
        judge.gauss_newton_step(model, lambda z, _: -z.square().sum(), x, y, 0.1)
    with pytest.raises(ValueError, match="expected max_iter >= 1, got 0"):
        judge.gauss_newton_step(model, criterion, x, y, 0.1, max_iter=0)
    for function in (judge.newton_cosine, judge.gauss_newton_cosine, judge.reduction_ratio):
        with pytest.raises(ValueError, match=f"{function.__name__}: .* got '1.weight', which the model does not have"):
            function(model, criterion, x, y, {"1.weight": torch.zeros(2)}, damping=0.1)
        with pytest.raises(ValueError, match=rf"{function.__name__}: expected \[6\] for '0.bias', got \[5\]"):
            function(model, criterion, x, y, {"0.bias": torch.zeros(5)}, damping=0.1)


JUDGES = {
    "curvature_error": lambda *args: so.diagnostics.curvature_error(*args, ["pch-abs", "kflr", "fisher-mc"]),
    "spectrum": lambda *args: so.diagnostics.spectrum(*args, ["fisher-mc"]),
    "newton_cosine": lambda m, *args: so.diagnostics.newton_cosine(m, *args, {"0.bias": torch.ones(6)}, damping=0.1),
    "gauss_newton_cosine": lambda m, *args: so.diagnostics.gauss_newton_cosine(m, *args, {"0.bias": torch.ones(6)}, damping=0.1),
    "reduction_ratio": lambda m, *args: so.diagnostics.reduction_ratio(m, *args, {"0.bias": torch.ones(6)}),
}


@pytest.mark.parametrize("name", JUDGES)
def test_the_model_is_left_alone(name):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(), nn.Linear(6, 3)).double().eval()
    x, y, criterion = torch.randn(7, 4).double(), torch.randint(3, (7,)), nn.CrossEntropyLoss()
    criterion(model(x), y).backward()
    before, gradients = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    generator = torch.get_rng_state()
    JUDGES[name](model, criterion, x, y)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert not any(m._compiled_call_impl for m in [*model.modules(), criterion])
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("lr", [0.1, None])
def test_an_optimizer_between_its_backward_pass_and_its_step_is_left_alone(lr, name):
    models = [network([4, 6, 3], nn.Tanh())]
    models.append(copy.deepcopy(models[0]))
    x, y, other, criterion = torch.randn(7, 4).double(), torch.arange(7) % 3, torch.randn(5, 4).double(), nn.CrossEntropyLoss()
    for model, judged in zip(models, (True, False), strict=True):
        optimizer = so.LayerwiseNewton(model, criterion) if lr is None else so.EACG(model, criterion, lr)
        for _ in range(2):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            if judged:
                JUDGES[name](model, optimizer.criterion, other, y[:5])
            optimizer.step()
        optimizer.remove_hooks()
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))


def test_curvatures_are_taken_by_name():
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    by_name, by_object = (
        so.diagnostics.bias_hessians(model, criterion, x, y, each) for each in ("pch-abs", curvature_by_name("pch-abs"))
    )
    torch.testing.assert_close(by_name, by_object)
    for function in (so.diagnostics.spectrum, so.diagnostics.curvature_error):
        with pytest.raises(ValueError, match="expected curvature to be one of"):
            function(model, criterion, x, y, ["pch"])
