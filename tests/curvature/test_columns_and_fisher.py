"""Gauss-Newton, KFLR and the Fisher matrices, against Jacobians and instances' gradients by autograd in float64."""

import copy
import warnings

import pytest
import torch
from helpers.curvatures import CRITERIA, Branching, blocks, log_odds, network
from oracles import hessian_block
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

import secondorder as so
from secondorder._layers import linear_layers
from secondorder._tape import Tape, columns
from secondorder.criteria import BoundedClassificationLoss, CompositeLoss, FunctionCriterion, row_masses
from secondorder.curvature import CURVATURES, FisherMC


def gauss_newton_blocks(model, criterion, x, y):
    """sum_i J_i^T H_i J_i / m for every bias, J_i the output's Jacobian and H_i the criterion's Hessian for instance i alone."""
    fixed = {n: p.detach() for n, p in model.named_parameters()}
    result = {}
    for name in linear_layers(model).values():
        key, total = f"{name}.bias", 0
        for i in range(len(x)):
            output = lambda b, i=i, key=key: functional_call(model, {**fixed, key: b}, (x[i : i + 1],)).flatten()  # noqa: E731
            jacobian, shape = jacrev(output)(fixed[key]), model(x[i : i + 1]).shape
            top = hessian(lambda z, i=i, shape=shape: criterion(z.view(shape), y[i : i + 1]))(output(fixed[key]))
            total = total + jacobian.T @ top @ jacobian / len(x)
        result[name] = total
    return result


def assert_blocks(actual, expected):
    assert actual.keys() == expected.keys()
    for name, block in expected.items():
        torch.testing.assert_close(actual[name], block, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def log_sum_exp(z, y):
    """Convex, with a dense Hessian that no formula here knows."""
    return (torch.logsumexp(2 * z, -1) - z.gather(1, y.unsqueeze(1)).squeeze(1)).mean()


CONVEX = {name: CRITERIA[name] for name in ("cross-entropy", "mse", "bce", "huber")} | {
    "log-sum-exp": (FunctionCriterion(log_sum_exp), CRITERIA["cross-entropy"][1])
}
LIKELIHOODS = ["cross-entropy", "mse", "bce"]


@pytest.mark.parametrize("name", CONVEX)
@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.ReLU(inplace=True), nn.Mish()], ids=repr)
def test_kflr_is_the_expected_gauss_newton_block(activation, name, monkeypatch):
    criterion, target = CONVEX[name]
    model, x, y = network([4, 6, 5, 3], activation), torch.randn(7, 4).double(), target(7, 3)
    expected = gauss_newton_blocks(model, criterion, x, y)
    assert_blocks(blocks(model, criterion, CURVATURES["kflr"], (x, y)), expected)
    monkeypatch.setattr(columns, "_BUDGET", 2 * 7 * 14)  # two columns at a time
    assert_blocks(blocks(model, criterion, CURVATURES["kflr"], (x, y)), expected)


@pytest.mark.parametrize("kind", ["norm", "softmax", "residual", "heads"])
@pytest.mark.parametrize("curvature", ["kflr", "fisher-exact"])
def test_columns_know_no_obstacle(curvature, kind):
    model, criterion = Branching(kind).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    assert_blocks(blocks(model, criterion, CURVATURES[curvature], (x, y)), gauss_newton_blocks(model, criterion, x, y))


@pytest.mark.parametrize("name", CONVEX)
def test_gauss_newton_is_exact_for_one_instance_and_the_recursion_for_many(name):
    criterion, target = CONVEX[name]
    model = network([4, 6, 5, 3], nn.Tanh())
    x, y = torch.randn(1, 4).double(), target(1, 3)
    assert_blocks(blocks(model, criterion, CURVATURES["gauss-newton"], (x, y)), gauss_newton_blocks(model, criterion, x, y))
    x, y = torch.randn(7, 4).double(), target(7, 3)
    actual = blocks(model, criterion, CURVATURES["gauss-newton"], (x, y))
    current = hessian_block(model, criterion, x, y, "4.bias")  # the last layer's, where Gauss-Newton is the Hessian
    for layer, above in ((4, None), (2, 4), (0, 2)):
        if above is not None:
            h = model[:above](x)  # tanh' = 1 - h^2
            moment = sum(torch.outer(1 - row**2, 1 - row**2) for row in h) / 7
            current = (model[above].weight.T @ current @ model[above].weight * moment).detach()
        torch.testing.assert_close(actual[f"{layer}"], current, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_exact_fisher_is_gauss_newton(name):
    criterion, target = CRITERIA[name]
    model, x, y = network([4, 6, 3], nn.Sigmoid()), torch.randn(7, 4).double(), target(7, 3)
    assert_blocks(blocks(model, criterion, CURVATURES["fisher-exact"], (x, y)), gauss_newton_blocks(model, criterion, x, y))


def instance_gradients(model, criterion, x, y):
    """Every instance's own gradient w.r.t. every bias."""
    names = list(linear_layers(model).values())
    rows = {name: [] for name in names}
    for i in range(len(x)):
        gradients = torch.autograd.grad(
            criterion(model(x[i : i + 1]), y[i : i + 1]), [model.get_parameter(f"{n}.bias") for n in names]
        )
        for name, gradient in zip(names, gradients, strict=True):
            rows[name].append(gradient)
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def test_exact_fisher_is_the_sum_over_all_labels():
    model, criterion, x = network([4, 6, 3], nn.Sigmoid()), nn.CrossEntropyLoss(), torch.randn(7, 4).double()
    p, expected = model(x).softmax(1).detach(), {}
    for k in range(3):
        for name, g in instance_gradients(model, criterion, x, torch.full((7,), k)).items():
            expected[name] = expected.get(name, 0) + g.T @ (p[:, k : k + 1] * g) / 7
    assert_blocks(blocks(model, criterion, CURVATURES["fisher-exact"], (x, torch.zeros(7, dtype=torch.long))), expected)


@pytest.mark.parametrize("name", ["cross-entropy", "mse", "bce", "eq14"])
def test_empirical_fisher(name):
    criterion, target = CRITERIA[name]
    model, x, y = network([4, 6, 5, 3], nn.Sigmoid()), torch.randn(7, 4).double(), target(7, 3)
    expected = {n: g.T @ g / 7 for n, g in instance_gradients(model, criterion, x, y).items()}
    assert_blocks(blocks(model, criterion, CURVATURES["fisher-empirical"], (x, y)), expected)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_fisher_converges_as_one_over_the_root_of_the_samples(name):
    criterion, target = CRITERIA[name]
    model, x, y = network([4, 6, 3], nn.Sigmoid()), torch.randn(7, 4).double(), target(7, 3)
    exact = gauss_newton_blocks(model, criterion, x, y)

    def error(samples, runs):
        squares = 0
        for _ in range(runs):
            sampled = blocks(model, criterion, FisherMC(samples), (x, y))
            squares += sum(float((sampled[n] - exact[n]).square().sum()) for n in exact) / runs
        return squares**0.5

    few, many = error(4, 60), error(400, 30)
    assert 7 < few / many < 14  # 10 in expectation
    size = sum(float(b.square().sum()) for b in exact.values()) ** 0.5
    assert many < 0.15 * size


@pytest.mark.parametrize("kwargs", [
    {"weight": torch.tensor([1.0, 0.3, 2.0]).double()}, {"label_smoothing": 0.2}, {"ignore_index": 1}, {"reduction": "sum"},
])  # fmt: skip
@pytest.mark.parametrize("curvature", ["kflr", "fisher-exact", "gauss-newton"])
def test_settings_of_cross_entropy(curvature, kwargs):
    criterion, model = nn.CrossEntropyLoss(**kwargs), nn.Sequential(nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = {"0": hessian_block(model, criterion, x, y, "0.bias")}
    assert_blocks(blocks(model, criterion, CURVATURES[curvature], (x, y)), expected)


def test_settings_of_bce():
    criterion = nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, 0.4]).double(), pos_weight=torch.tensor([3.0, 1.0]).double())
    model, x, y = nn.Sequential(nn.Linear(4, 2)).double(), torch.randn(6, 4).double(), torch.rand(6, 2).double()
    expected = {"0": hessian_block(model, criterion, x, y, "0.bias")}
    for curvature in ("kflr", "fisher-exact", "gauss-newton"):
        assert_blocks(blocks(model, criterion, CURVATURES[curvature], (x, y)), expected)


@pytest.mark.parametrize("curvature", ["gauss-newton", "kflr", "fisher-exact", "fisher-empirical"])
def test_micro_batches_and_factors(curvature):
    model, criterion = network([4, 6, 3], nn.Sigmoid()), nn.CrossEntropyLoss()
    x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))
    kind = CURVATURES[curvature]
    whole = blocks(model, criterion, kind, (x, y))
    model.zero_grad()
    parts = blocks(model, criterion, kind, *((x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)), scale=1 / 3)
    assert_blocks(parts, whole)


@pytest.mark.parametrize("curvature", sorted(set(CURVATURES) - {"fisher-mc"}))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sample_of_the_instances_stands_for_all(curvature, reduction):
    torch.manual_seed(0)
    model, criterion = network([4, 6, 5, 3], nn.Tanh()), nn.MSELoss(reduction=reduction)
    batches = [(torch.randn(m, 4).double(), torch.randn(m, 3).double()) for m in (23, 23)]
    actual = blocks(model, criterion, CURVATURES[curvature], *batches, scale=0.5, samples=7)
    rows = [k * 23 // 7 for k in range(7)]  # 0, 3, 6, 9, 13, 16, 19
    # MSE's own Hessian is the same for every instance: what is left is the full computation on the chosen ones.
    chosen = [(x[rows], y[rows]) for x, y in batches]
    expected = blocks(model, criterion, CURVATURES[curvature], *chosen, scale=0.5 * (23 / 7 if reduction == "sum" else 1))
    assert_blocks(actual, expected)
    whole = blocks(model, criterion, CURVATURES[curvature], *batches)
    assert_blocks(blocks(model, criterion, CURVATURES[curvature], *batches, samples=23), whole)


@pytest.mark.parametrize("curvature", ["gauss-newton", "kflr"])
@pytest.mark.parametrize("name", ["eq14", "tukey"])
def test_a_criterion_that_is_not_convex_is_refused_by_name_of_what_to_use(name, curvature):
    criterion, target = CRITERIA[name]
    model = network([4, 6, 3], nn.Sigmoid())
    with torch.no_grad():
        model[-1].weight *= 20
    with pytest.raises(ValueError, match="positive semi-definite, got the eigenvalue -.*curvature='pch-abs'"):
        blocks(model, criterion, CURVATURES[curvature], (torch.randn(9, 4).double(), target(9, 3)))


class Behind(nn.Module):
    """A net [m, 4] -> [m, 3] whose last layer is followed by a function of its rows."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.function = network([4, 6, 3], nn.Tanh()), function

    def forward(self, x):
        return self.function(self.body(x))


FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": lambda z: z.softmax(-1),
    "pairs": lambda z: (z.view(-1, 1, 3) * z.view(-1, 3, 1)).view(-1, 3, 3),  # an instance has several rows
    "one number": lambda z: torch.sigmoid(z[:, 0] * z[:, 1] - z[:, 2]),
}
CONVEX_IN_ITS_ARGUMENT = {
    "mse": nn.MSELoss(),
    "mse, a function": FunctionCriterion(F.mse_loss),
    "log-cosh": FunctionCriterion(lambda u, y: (3 * (u - y)).cosh().log().mean()),
    "huber": nn.SmoothL1Loss(beta=0.5),
}


@pytest.mark.parametrize("criterion", CONVEX_IN_ITS_ARGUMENT)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_criterion_that_is_convex_behind_a_final_function_has_gauss_newton_blocks(function, criterion):
    """J^T H J with H at what the function returns: at the last layer's output the Hessian is not positive semi-definite."""
    model, criterion = Behind(FUNCTIONS[function]), CONVEX_IN_ITS_ARGUMENT[criterion]
    x = torch.randn(9, 4).double()
    y = 2 * torch.randn_like(model(x)).detach()
    expected = gauss_newton_blocks(model, criterion, x, y)
    assert_blocks(blocks(model, criterion, CURVATURES["kflr"], (x, y)), expected)
    if isinstance(criterion, nn.MSELoss) or function != "one number":  # else the mean's being semi-definite will do
        top = blocks(model, criterion, CURVATURES["gauss-newton"], (x, y))["body.2"]
        torch.testing.assert_close(top, expected["body.2"])
    if isinstance(criterion, nn.MSELoss):
        assert_blocks(blocks(model, criterion, CURVATURES["fisher-exact"], (x, y)), expected)


def test_cross_entropy_of_probabilities_is_convex_in_them():
    model, criterion = Behind(FUNCTIONS["softmax"]), nn.CrossEntropyLoss()
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 3
    expected = gauss_newton_blocks(model, criterion, x, y)
    for name in ("kflr", "fisher-exact"):
        assert_blocks(blocks(model, criterion, CURVATURES[name], (x, y)), expected)


@pytest.mark.parametrize(
    "criterion", [nn.BCELoss(), nn.BCELoss(reduction="sum"), FunctionCriterion(F.binary_cross_entropy)], ids=str
)
def test_bce_of_a_sigmoid_is_bce_with_logits(criterion):
    model, reduction = Behind(torch.sigmoid), getattr(criterion, "reduction", "mean")
    x, y = torch.randn(9, 4).double(), (torch.rand(9, 3) < 0.5).double()
    expected = gauss_newton_blocks(model.body, nn.BCEWithLogitsLoss(), x, y)
    scale = 27 if reduction == "sum" else 1
    for name in ("kflr", "fisher-exact"):
        actual = blocks(model, criterion, CURVATURES[name], (x, y))
        for layer, block in expected.items():
            torch.testing.assert_close(actual[f"body.{layer}"], scale * block)
    so.KFAC(model, criterion)
    with pytest.raises(ValueError, match="of a sigmoid"):
        blocks(Behind(lambda z: z.softmax(1)), criterion, CURVATURES["fisher-mc"], (x, y))


@pytest.mark.parametrize("optimizer", [so.KFLR, so.KFRA, so.KFAC, so.LayerwiseNewton])
@pytest.mark.parametrize("function", ["sigmoid", "tanh", "softmax"])
def test_nets_with_a_final_activation_are_trained(function, optimizer):
    model, criterion = Behind(FUNCTIONS[function]).float(), nn.MSELoss()
    torch.manual_seed(2)
    x, y = torch.randn(60, 4), F.one_hot(torch.arange(60) % 3, 3).float()
    trained, losses = optimizer(model, criterion), []
    for _ in range(60):
        trained.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        trained.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_a_criterion_that_is_no_likelihood_is_refused():
    model = network([4, 6, 3], nn.Sigmoid())
    for curvature in ("fisher-mc", "fisher-exact"):
        with pytest.raises(ValueError, match=r"likelihood .* got BoundedClassificationLoss\(\): use curvature='pch-abs'"):
            blocks(model, BoundedClassificationLoss(), CURVATURES[curvature], (torch.randn(3, 4).double(), torch.zeros(3).long()))
    with pytest.raises(ValueError, match="expected samples >= 1"):
        FisherMC(0)


def test_functions_and_outputs_of_one_dimension():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
    criterion = FunctionCriterion(F.binary_cross_entropy_with_logits)
    x, y = torch.randn(6, 4).double(), torch.rand(6).double()
    rows = nn.Sequential(*model[:3])
    expected = gauss_newton_blocks(rows, nn.BCEWithLogitsLoss(), x, y.unsqueeze(1))
    for curvature in ("fisher-exact", "kflr"):
        assert_blocks(blocks(model, criterion, CURVATURES[curvature], (x, y)), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_output_that_is_broadcast_has_all_its_terms(reduction):
    """MSE of [m, 1] against [m, 4], say, has four terms for each instance."""
    model, x, y = network([3, 5, 1], nn.Tanh()), torch.randn(6, 3).double(), torch.randn(6, 4).double()

    def criterion(output, target):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's own, of the shapes
            return F.mse_loss(output, target, reduction=reduction)

    expected = blocks(model, FunctionCriterion(criterion), CURVATURES["kflr"], (x, y))
    module = nn.MSELoss(reduction=reduction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        actual = blocks(model, module, CURVATURES["kflr"], (x, y))
    scale = 2 * (4 * 6 if reduction == "sum" else 1)
    torch.testing.assert_close(actual["2"], torch.tensor([[float(scale)]]).double())
    for name, block in actual.items():
        torch.testing.assert_close(block, expected[name])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["kflr", "fisher-exact"])
def test_nll_of_log_softmax_is_cross_entropy(name, weighted):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y, weight = torch.randn(9, 4).double(), torch.arange(9) % 3, torch.tensor([1.0, 2.0, 5.0]).double() if weighted else None
    y[2] = -100
    found = []
    for criterion, model in [
        (nn.CrossEntropyLoss(weight), body), (nn.NLLLoss(weight), nn.Sequential(*body, nn.LogSoftmax(1))),
    ]:  # fmt: skip
        tape = Tape(linear_layers(model), criterion, diagonal=False, columns=CURVATURES[name].columns)
        criterion(model(x), y).backward()
        found.append({r.layer: r.block for r in tape.records()})
        tape.remove()
    for layer, block in found[0].items():
        torch.testing.assert_close(found[1][layer], block)


def test_nll_of_anything_else_is_no_likelihood():
    model, criterion = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.NLLLoss()
    optimizer = so.KFAC(model, criterion)
    with pytest.raises(ValueError, match="NLL of log_softmax"):
        criterion(model(torch.randn(5, 4)), torch.arange(5) % 3)
    optimizer.remove_hooks()


# Criteria that bring their likelihood


class Mixture(nn.Module):
    """Eq. 27 as a loss of one's own, which draws its labels."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, output, target):
        losses = F.binary_cross_entropy_with_logits(log_odds(output), target, reduction="none")
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def sample(self, output):
        gate, *experts = output.sigmoid().unbind(1)
        chosen = torch.where(torch.rand_like(gate) < gate, *experts)
        return (torch.rand_like(gate) < chosen).to(output.dtype)


def fisher_of_labels(model, criterion, x):
    """E[g g^T] over both labels by their probabilities, as `Mixture` says; on the scale of the loss."""
    p = log_odds(model(x)).sigmoid().detach()
    parts = [
        (instance_gradients(model, criterion, x, torch.full((len(x),), label).double()), q) for label, q in ((1, p), (0, 1 - p))
    ]
    count = len(x) if criterion.reduction == "mean" else 1
    return {name: sum(g[name].T @ (q.unsqueeze(1) * g[name]) for g, q in parts) / count for name in parts[0][0]}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("curvature", ["kflr", "fisher-exact"])
def test_a_composite_loss_has_the_gauss_newton_blocks_of_its_inner_value(curvature, reduction):
    """By columns, as many as the inner value has, and by the gradients of all labels."""
    criterion = CompositeLoss(log_odds, nn.BCEWithLogitsLoss(reduction=reduction))
    model, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(9, 4).double(), torch.randint(2, (9,)).double()
    assert_blocks(blocks(model, criterion, CURVATURES[curvature], (x, y)), fisher_of_labels(model, Mixture(reduction), x))
    with pytest.raises(ValueError, match="positive semi-definite"):
        blocks(model, Mixture(reduction), CURVATURES["kflr"], (x, y))


def test_a_composite_loss_of_several_inner_values():
    model, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(7, 4).double(), torch.randint(4, (7,))
    inner = nn.Sequential(nn.ConstantPad1d((0, 1), 0.5), nn.Softsign())  # not convex in what is inside
    criterion = CompositeLoss(inner, nn.CrossEntropyLoss())
    composed = nn.Sequential(*model, inner)
    expected = gauss_newton_blocks(composed, nn.CrossEntropyLoss(), x, y)
    assert_blocks(blocks(model, criterion, CURVATURES["kflr"], (x, y)), expected)
    sampled = blocks(model, criterion, FisherMC(4000), (x, y))
    for name, block in expected.items():
        assert (sampled[name] - block).norm() < 0.1 * block.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "criterion", [Mixture, lambda reduction: CompositeLoss(log_odds, nn.BCEWithLogitsLoss(reduction=reduction))],
    ids=["sampler", "composite"],
)  # fmt: skip
def test_labels_that_a_criterion_draws_give_the_fisher_matrix(criterion, reduction):
    model, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(9, 4).double(), torch.randint(2, (9,)).double()
    expected = fisher_of_labels(model, Mixture(reduction), x)
    for samples, tolerance in ((100, 0.3), (10_000, 0.03)):
        sampled = blocks(model, criterion(reduction), FisherMC(samples), (x, y))
        for name, block in expected.items():
            assert (sampled[name] - block).norm() < tolerance * block.norm()


class Drawn(nn.Module):
    """Binary cross-entropy, weighted, that draws its labels."""

    reduction = "mean"

    def forward(self, output, target, weight=1.0):
        return weight * F.binary_cross_entropy_with_logits(output, target)

    def sample(self, output):
        return torch.bernoulli(output.sigmoid())


@pytest.mark.parametrize("squeeze", [True, False])
def test_drawn_labels_of_one_output_and_further_arguments(squeeze):
    """Outputs [m] and [m, 1], and an argument after the target."""
    model, x = network([4, 5, 1], nn.Tanh()), torch.randn(40, 4).double()
    y = torch.randint(2, (40, 1)).double()
    expected = gauss_newton_blocks(model, nn.BCEWithLogitsLoss(), x, y)
    layers, criterion = linear_layers(model), Drawn()
    tape = Tape(layers, criterion, diagonal=False, columns=FisherMC(4000).columns)
    output, target = (model(x).squeeze(1), y.squeeze(1)) if squeeze else (model(x), y)
    criterion(output, target, weight=3.0).backward()
    hessians = FisherMC().bias_hessians(tape.records())
    tape.remove()
    for layer, name in layers.items():  # the weight is squared, as in a gradient's outer product
        assert (hessians[layer] - 9 * expected[name]).norm() < 0.1 * 9 * expected[name].norm()


@pytest.mark.parametrize("outer", [nn.MSELoss(), nn.MSELoss(reduction="sum"), nn.NLLLoss()], ids=repr)
def test_composite_losses_of_other_criteria(outer):
    model, x = network([4, 6, 3], nn.Tanh()), torch.randn(7, 4).double()
    if isinstance(outer, nn.NLLLoss):  # of log-probabilities: cross-entropy's, of which they are logits
        inner, y, known = nn.Sequential(nn.Softsign(), nn.LogSoftmax(1)), torch.randint(3, (7,)), nn.CrossEntropyLoss()
    else:
        inner, y, known = nn.Softsign(), torch.randn(7, 3).double(), outer
    expected = gauss_newton_blocks(nn.Sequential(*model, inner), known, x, y)
    scale = 7 if outer.reduction == "sum" else 1  # the oracle takes means over instances
    actual = blocks(model, CompositeLoss(inner, outer), CURVATURES["kflr"], (x, y))
    assert_blocks(actual, {name: scale * block for name, block in expected.items()})
    step = so.diagnostics.gauss_newton_step(model, CompositeLoss(inner, outer), x, y, 0.1)
    if scale == 1:
        same = so.diagnostics.gauss_newton_step(nn.Sequential(*model, inner), known, x, y, 0.1)
        for name, change in step.items():
            torch.testing.assert_close(change, same[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", [so.KFLR, so.KFAC])
def test_the_mixture_is_trained(optimizer):
    """Eq. 27's, whose true Hessian is indefinite; and the step's quadratic model is that of the Gauss-Newton matrix."""
    torch.manual_seed(0)
    model, x = network([6, 12, 3], nn.Tanh()), torch.randn(200, 6).double()
    y = ((x[:, 0] * x[:, 1] > 0) ^ (x[:, 2] > 0.5)).double()
    criterion = CompositeLoss(log_odds, nn.BCEWithLogitsLoss())
    trained = optimizer(model, criterion)
    losses = []
    for _ in range(60):
        trained.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        trained.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("chain", [True, False])
def test_the_quadratic_model_of_a_composite_loss(chain):
    """x^T G x against Jacobians of the inner value, from a record of layers alone and from the model's graph."""
    model = network([4, 6, 3], nn.Tanh())
    if not chain:
        model = nn.Sequential(*model[:2], nn.LayerNorm(6).double(), model[2])
    criterion, x, y = CompositeLoss(log_odds, nn.BCEWithLogitsLoss()), torch.randn(9, 4).double(), torch.rand(9).round().double()
    step = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    inner, along = torch.func.jvp(lambda values: log_odds(functional_call(model, values, (x,))), (fixed,), (step,))
    p = inner.sigmoid()
    form = float((along**2 * p * (1 - p)).mean())
    loss = criterion(model(x), y)
    slope = sum(
        float((g * d).sum()) for g, d in zip(torch.autograd.grad(loss, list(model.parameters())), step.values(), strict=True)
    )
    moved = functional_call(model, {name: fixed[name] + d for name, d in step.items()}, (x,))
    expected = float(criterion(moved, y) - loss.detach()) / (slope + form / 2)
    assert so.diagnostics.reduction_ratio(model, criterion, x, y, step) == pytest.approx(expected, rel=1e-9)


def test_a_composite_loss_refuses_what_it_does_not_know():
    class Own(nn.MSELoss):
        pass

    for outer, name in ((nn.HuberLoss(), "HuberLoss"), (Own(), "Own")):
        with pytest.raises(TypeError, match=f"expected outer to be nn.CrossEntropyLoss.*got {name}"):
            CompositeLoss(log_odds, outer)


class DrawnNLL(nn.NLLLoss):
    def sample(self, output):
        return torch.multinomial(output.exp(), 1).squeeze(1)


def test_labels_drawn_for_log_probabilities_have_their_gradients_there():
    """And not at the logits, where the columns of what is known begin."""
    model, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(9, 4).double(), torch.randint(3, (9,))
    expected = gauss_newton_blocks(model, nn.CrossEntropyLoss(), x, y)
    sampled = blocks(nn.Sequential(*model, nn.LogSoftmax(1)), DrawnNLL(), FisherMC(4000), (x, y))
    for name, block in expected.items():
        assert (sampled[name] - block).norm() < 0.1 * block.norm()


def test_rows_of_a_composite_loss_count_as_its_criterions_do():
    y, inner = torch.tensor([0, 2, 1, 2]), nn.Softsign()
    outer = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]), ignore_index=1)
    masses = row_masses(CompositeLoss(inner, outer), torch.randn(4, 3), y)
    torch.testing.assert_close(masses, torch.tensor([0.5, 2.0, 0.0, 2.0]).double())


def rows_alone(model, x, y):
    """The gradients dL_i/dz_i at the first layer of every row's own, unweighted loss."""
    z = model[0](x).detach().requires_grad_()
    losses = F.cross_entropy(model[1:](z), y, ignore_index=-100, reduction="none")
    return torch.autograd.grad(losses.sum(), z)[0]


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_empirical_fisher_of_ignored_and_weighted_rows(factor, weighted, reduction, function):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()  # the norm has the block be empirical
    x, y = torch.randn(60, 4).double(), torch.randint(3, (60,))
    y[6:] = -100
    weight = torch.tensor([1.0, 2.0, 5.0]).double() if weighted else None
    own = {"weight": weight, "reduction": reduction}
    criterion = FunctionCriterion(F.cross_entropy) if function else nn.CrossEntropyLoss(**own)
    optimizer = so.EACG(model, criterion, fallback="sgd")
    (factor * criterion(model(x), y, **(own if function else {}))).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    g, w = rows_alone(twin, x, y), torch.ones(60).double()
    w = (w if weight is None else weight[y.clamp(min=0)]) * (y != -100)
    expected = factor * (g.T * (w / w.sum() if reduction == "mean" else w)) @ g
    torch.testing.assert_close(optimizer.state[model[0].weight]["factors"]["bias_hessian"], expected)


WEIGHTS = torch.tensor([1.0, 2.0, 5.0]).double()


class Transposed(nn.Module):
    """Classes in dimension 1."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x).transpose(1, 2)


def test_empirical_fisher_of_ignored_elements_of_sequences():
    torch.manual_seed(0)
    model, criterion = network([4, 6, 3], nn.Sigmoid()), nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]).double())
    x, y = torch.randn(5, 7, 4).double(), torch.randint(3, (5, 7))
    y[2:, 3:] = -100
    expected = blocks(copy.deepcopy(model), criterion, CURVATURES["fisher-empirical"], (x[y != -100], y[y != -100]))
    transposed = Transposed(model)
    actual = blocks(transposed, criterion, CURVATURES["fisher-empirical"], (x, y))
    torch.testing.assert_close(list(actual.values()), list(expected.values()))


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), nn.NLLLoss(WEIGHTS)])
@pytest.mark.parametrize("curvature", [FisherMC(4000), CURVATURES["fisher-exact"], CURVATURES["kflr"]])
def test_classes_in_dimension_1_and_one_instance_without_a_batch(curvature, criterion, probabilities):
    """As the same rows [m, K] have them."""
    nll = isinstance(criterion, nn.NLLLoss)
    if probabilities and nll:
        pytest.skip("NLLLoss has class indices")
    log = nn.LogSoftmax(1) if nll else nn.Identity()
    body, x, y = network([4, 6, 3], nn.Sigmoid()), torch.randn(5, 7, 4).double(), torch.randint(3, (5, 7))
    target = F.one_hot(y, 3).double() if probabilities else y
    tolerance = 0.1 if isinstance(curvature, FisherMC) else 1e-10
    plain = blocks(
        body if nn.Identity is type(log) else nn.Sequential(*body, log),
        criterion,
        CURVATURES["kflr"],
        (x.flatten(0, 1), target.flatten(0, 1)),
    )
    moved = target.transpose(1, 2) if probabilities else target
    actual = blocks(nn.Sequential(Transposed(body), log), criterion, curvature, (x, moved))
    assert all((actual[f"0.body.{n}"] - block).norm() < tolerance * block.norm() for n, block in plain.items())
    log = nn.LogSoftmax(-1) if nll else nn.Identity()
    expected = blocks(nn.Sequential(body, log), criterion, CURVATURES["kflr"], (x[0, :1], target[0, :1]))
    actual = blocks(nn.Sequential(body, log), criterion, curvature, (x[0, 0], target[0, 0]))
    assert all((actual[n] - block).norm() < tolerance * block.norm() for n, block in expected.items())


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("name", ["KFRA", "KFLR"])
def test_a_classifier_that_is_certain_of_its_labels_trains_on(name, log):
    """In float32 its Hessian is rounding, with negative eigenvalues as large as any."""
    torch.manual_seed(0)
    model = nn.Sequential(Transposed(nn.Linear(3, 3)), *([nn.LogSoftmax(1)] if log else []))
    criterion = nn.NLLLoss() if log else nn.CrossEntropyLoss()
    with torch.no_grad():
        model[0].body.weight.copy_(torch.eye(3))
    optimizer = getattr(so, name)(model, criterion)
    for margin in (8.0, 12.0, 15.0):
        y = torch.randint(3, (20, 4))
        optimizer.zero_grad()
        criterion(model(margin * F.one_hot(y, 3).float() + torch.rand(20, 4, 3)), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["EACG", "LayerwiseNewton"])
def test_a_loss_that_counts_for_nothing_has_no_block(name):
    blocks = []
    for both in (False, True):
        torch.manual_seed(0)
        first, norm, last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        model, criterion = nn.Sequential(first, norm, last).double(), nn.CrossEntropyLoss()
        optimizer = getattr(so, name)(model, criterion)
        z, y = model(torch.randn(20, 4).double()), torch.arange(20) % 3
        loss = criterion(z, y)
        (loss + 0.0 * criterion(z, (y + 1) % 3) if both else loss).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        blocks.append(optimizer.state[first.weight]["factors"]["bias_hessian"])
    torch.testing.assert_close(*blocks)
