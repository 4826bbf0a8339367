"""Gauss-Newton, KFLR and the Fisher matrices, against Jacobians and instances' gradients by autograd in float64."""

import copy
import warnings

import pytest
import torch
from helpers.curvatures import (
    CRITERIA,
    Branching,
    assert_blocks,
    blocks,
    gauss_newton_blocks,
    instance_gradients,
    log_odds,
    network,
)
from oracles import hessian_block
from torch import nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

import secondorder as so
from secondorder._tape import columns, is_selecting, taken_from
from secondorder.criteria import BoundedClassificationLoss, CompositeLoss, FunctionCriterion
from secondorder.curvature import CURVATURES, FisherMC


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_columns_of_halves_add_up_in_single_precision(dtype, monkeypatch):
    """Under autocast deltas have 16 bits, in which many small squares are lost beside their sum."""
    torch.manual_seed(0)
    model, criterion = network([4, 6, 600], nn.Tanh()).float(), nn.MSELoss()
    x, y = torch.randn(7, 4), torch.randn(7, 600)
    expected = blocks(model, criterion, CURVATURES["kflr"], (x, y))
    monkeypatch.setattr(columns, "_BUDGET", 1)  # a column at a time
    with torch.autocast("cpu", dtype):
        actual = blocks(model, criterion, CURVATURES["kflr"], (x, y))
    for name, block in expected.items():
        assert actual[name].dtype == torch.float32
        assert (actual[name] - block).norm() < 0.02 * block.norm()


@pytest.mark.parametrize("kind", ["norm", "softmax", "residual", "heads"])
@pytest.mark.parametrize("curvature", ["kflr", "fisher-exact"])
def test_columns_know_no_obstacle(curvature, kind):
    model, criterion = Branching(kind).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    assert_blocks(blocks(model, criterion, CURVATURES[curvature], (x, y)), gauss_newton_blocks(model, criterion, x, y))


class Coupling(nn.Module):
    """[m, T, 4] -> rows [m T, 3], of which several depend on each row of the layers below."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(4, 6), nn.Linear(6, 3), kind
        self.norm, self.recurrent = nn.BatchNorm1d(6), nn.GRU(6, 6, batch_first=True)

    def forward(self, x):
        h = self.first(x)
        if self.kind == "attention":
            output = self.last((h @ h.mT).softmax(-1) @ h)
        elif self.kind == "batch norm":
            output = self.last(self.norm(h.flatten(0, 1)).view_as(h).tanh())
        elif self.kind == "decoder":
            output = self.last(self.recurrent(h[:, :1].expand(-1, x.shape[1], -1))[0])
        else:  # nodes of a graph; the last layer's rows are mixed, too
            neighbours = (x @ x.mT > 0).double()
            output = neighbours @ self.last((neighbours @ h).tanh())
        return output.flatten(0, 1)


def blocks_of_coupled_rows(model, criterion, x, y):
    """sum_ij J_ij^T H_i J_ij for every linear layer, J_ij the Jacobian of row i of the output by row j of the layer's."""
    z = {}
    layers = {name: layer for name, layer in model.named_children() if isinstance(layer, nn.Linear)}
    handles = [layer.register_forward_hook(lambda *call, n=name: z.update({n: call[2]})) for name, layer in layers.items()]
    output = model(x)
    for handle in handles:
        handle.remove()
    m, k = output.shape
    top = torch.autograd.functional.hessian(lambda u: criterion(u, y), output.detach())
    top = torch.stack([top[i, :, i] for i in range(m)])
    unit = torch.eye(m * k).double().view(m, k, m, k).flatten(0, 1)
    jacobians = torch.autograd.grad(output, list(z.values()), unit, is_grads_batched=True)
    jacobians = [jacobian.reshape(m, k, -1, jacobian.shape[-1]) for jacobian in jacobians]
    return {name: torch.einsum("ikja,ikl,iljb->ab", j, top, j) for name, j in zip(z, jacobians, strict=True)}


@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(), nn.MSELoss(), CompositeLoss(torch.neg, nn.MSELoss())], ids=["CE", "MSE", "composite"]
)
@pytest.mark.parametrize("kind", ["attention", "batch norm", "decoder", "graph"])
def test_rows_on_which_several_instances_depend_have_the_sum_of_their_blocks(kind, criterion):
    torch.manual_seed(0)
    model, x, y = Coupling(kind).double(), torch.randn(60, 4, 4).double(), torch.randn(240, 3).double()
    target = y.argmax(1) if isinstance(criterion, nn.CrossEntropyLoss) else y
    expected = blocks_of_coupled_rows(model, criterion, x, target)
    for curvature in ("kflr", "fisher-exact"):
        actual = blocks(model, criterion, CURVATURES[curvature], (x, target))
        for name, block in expected.items():  # up to the signs' noise
            assert (actual[name] - block).norm() < 0.2 * block.norm(), name


@pytest.mark.parametrize("curvature", ["kflr", "fisher-exact", "fisher-mc"])
def test_columns_go_back_through_sparse_matrices(curvature):
    """As those of a graph's neighbours, whose products vmap does not know."""
    torch.manual_seed(0)
    criterion, x, y = nn.CrossEntropyLoss(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    neighbours = (torch.rand(9, 9) < 0.4).double()
    first, last, found = nn.Linear(4, 6).double(), nn.Linear(6, 3).double(), []
    for matrix in (neighbours, neighbours.to_sparse()):
        torch.manual_seed(1)
        model = nn.Sequential(first, nn.Tanh(), Multiplied(matrix), last, Multiplied(matrix))
        found.append(blocks(model, criterion, CURVATURES[curvature], (x, y)))
    assert_blocks(*found)


class Multiplied(nn.Module):
    """A constant matrix times its input."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x):
        return torch.sparse.mm(self.matrix, x)


class Taken(nn.Module):
    """A net whose rows the criterion sees several times, or not at all."""

    def __init__(self, way):
        super().__init__()
        self.first, self.last, self.way = nn.Linear(4, 6), nn.Linear(6, 3), way

    def forward(self, x):
        return self.way(self.last(self.first(x).tanh()))


INDEX = torch.tensor([0, 3, 3, 5, 0, 3])
WAYS = {
    "index": lambda z: z[INDEX],
    "more rows than there are": lambda z: z[INDEX.repeat(2)],
    "index_select": lambda z: z.index_select(0, INDEX),
    "repeat_interleave": lambda z: z.repeat_interleave(2, 0),
    "expand": lambda z: z.unsqueeze(1).expand(-1, 4, -1).reshape(-1, 3),
    "three dimensions": lambda z: z.view(2, 3, 3)[[0, 1, 1, 0]].flatten(0, 1),
    "two indices": lambda z: z.view(2, 3, 3)[[0, 1, 1, 0], [2, 2, 2, 0]],
    "a sequence": lambda z: z.view(6, 3)[INDEX],
    "columns": lambda z: z[INDEX][:, [2, 2, 0]],  # whose classes are others than the layer's outputs
}


@pytest.mark.parametrize(
    "criterion",
    [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 0.5]).double(), ignore_index=1), nn.MSELoss(),
     nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))],
    ids=["CE", "weights", "MSE", "BCE"],
)  # fmt: skip
@pytest.mark.parametrize("way", WAYS)
def test_rows_that_a_criterion_sees_several_times_have_the_sum_of_their_hessians(way, criterion):
    torch.manual_seed(0)
    model, x = Taken(WAYS[way]).double(), torch.randn(6, 4).double()
    y = torch.rand_like(model(x)).detach()
    target = y.argmax(1) if isinstance(criterion, nn.CrossEntropyLoss) else y
    expected = blocks_of_coupled_rows(model, criterion, x, target)
    for curvature in ("kflr", "fisher-exact"):
        assert_blocks(blocks(model, criterion, CURVATURES[curvature], (x, target)), expected)


def log_odds_and_more(z):
    """Two numbers for each row, in neither of which a criterion is convex together with what is inside."""
    return torch.stack([log_odds(z), (z * z.sin()).sum(1)], 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("inner", "outer"),
    [(log_odds, nn.BCEWithLogitsLoss()), (log_odds_and_more, nn.CrossEntropyLoss()), (log_odds_and_more, nn.MSELoss())],
    ids=["BCE", "CE", "MSE"],
)
def test_rows_that_a_composite_loss_sees_several_times_have_the_sum_of_their_blocks(inner, outer, way):
    torch.manual_seed(0)
    model, x = Taken(WAYS[way]).double(), torch.randn(6, 4).double()
    inside = Taken(lambda z: inner(WAYS[way](z)).view(len(WAYS[way](z)), -1)).double()
    inside.load_state_dict(model.state_dict())
    y = torch.rand_like(inside(x)).detach()
    target = y.argmax(1) if isinstance(outer, nn.CrossEntropyLoss) else y
    expected = blocks_of_coupled_rows(inside, outer, x, target)
    target = target.squeeze(1) if inner is log_odds else target
    for curvature in ("kflr", "fisher-exact"):
        assert_blocks(blocks(model, CompositeLoss(inner, outer), CURVATURES[curvature], (x, target)), expected)


@pytest.mark.parametrize("name", ["cross-entropy", "mse", "bce"])
def test_uses_of_a_row_add_up_in_single_precision(name):
    """In bfloat16 a sum of ones ends at 256."""
    torch.manual_seed(0)
    criterion, target = CRITERIA[name]
    index = torch.arange(2000) % 2
    half, y = Taken(lambda z: z[index]).bfloat16(), target(2000, 3)
    double = Taken(lambda z: z[index]).double()
    double.load_state_dict(half.state_dict())
    x = torch.randn(2, 4).bfloat16()
    expected = blocks(double, criterion, CURVATURES["kflr"], (x.double(), y))
    actual = blocks(half, criterion, CURVATURES["kflr"], (x, y if name == "cross-entropy" else y.bfloat16()))
    for layer, block in expected.items():
        assert (actual[layer] - block).norm() < 0.03 * block.norm()


@pytest.mark.parametrize(
    ("way", "logits"),
    [
        (lambda z: F.log_softmax(z, 1)[INDEX], lambda z: z[INDEX]),
        (lambda z: F.log_softmax(z[INDEX], 1), lambda z: z[INDEX]),
        (lambda z: F.log_softmax(z[INDEX], 1)[INDEX], lambda z: z[INDEX][INDEX]),
        (lambda z: F.log_softmax(z.T, 0)[:, INDEX].T, lambda z: z[INDEX]),
    ],
)
def test_log_probabilities_of_rows_that_are_seen_several_times(way, logits):
    model, x, y = Taken(way).double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    plain = Taken(logits).double()
    plain.load_state_dict(model.state_dict())
    expected = blocks_of_coupled_rows(plain, nn.CrossEntropyLoss(), x, y)
    assert_blocks(blocks(model, nn.NLLLoss(), CURVATURES["kflr"], (x, y)), expected)


@pytest.mark.parametrize(
    ("shape", "way", "dim"),
    [
        ((1, 4, 4, 2), lambda t: t[:, :, :1], 1),
        ((1, 4, 4, 2), lambda t: t.split(1, 3)[1], 1),
        ((4, 4), lambda t: t.expand(4, 4, 4), 0),
        ((4, 1), lambda t: t.expand(4, 4), None),
        ((4, 8), lambda t: t[:, 4:], None),
    ],
)
def test_classes_stay_in_their_dimension_where_others_have_as_many_numbers(shape, way, dim):
    given = torch.zeros(shape, requires_grad=True).exp()
    made = way(given)
    origin = taken_from(GradientEdge(made.grad_fn, made.output_nr), 1, is_selecting)
    assert (origin.edge.node, origin.dim) == ((made.grad_fn, 1) if dim is None else (given.grad_fn, dim))


def test_signs_of_columns_leave_random_numbers_alone():
    model, x, y = Coupling("decoder").double(), torch.randn(3, 5, 4).double(), torch.randn(15, 3).double()
    state = torch.get_rng_state()
    first, second = (blocks(model, nn.MSELoss(), CURVATURES["kflr"], (x, y)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


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


def test_a_criterion_that_is_no_likelihood_is_refused():
    model = network([4, 6, 3], nn.Sigmoid())
    for curvature in ("fisher-mc", "fisher-exact"):
        with pytest.raises(ValueError, match=r"likelihood .* got BoundedClassificationLoss\(\): use curvature='pch-abs'"):
            blocks(model, BoundedClassificationLoss(), CURVATURES[curvature], (torch.randn(3, 4).double(), torch.zeros(3).long()))
        with pytest.raises(ValueError, match="MSE of a target of the output's shape"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of the two shapes
            blocks(
                network([4, 1], nn.Sigmoid()), nn.MSELoss(), CURVATURES[curvature], (torch.randn(3, 4).double(), torch.zeros(3))
            )
    with pytest.raises(ValueError, match="expected samples to be an int >= 1"):
        FisherMC(0)


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
