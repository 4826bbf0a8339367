"""Gauss-Newton blocks of criteria behind a final function of the output: sigmoid, softmax, log-softmax, broadcasting."""

import warnings

import pytest
import torch
from helpers.curvatures import assert_blocks, blocks, gauss_newton_blocks, network
from oracles import hessian_block
from torch import nn
from torch.nn import functional as F

import secondorder as so
from secondorder._layers import linear_layers
from secondorder._tape import Tape, TapeOptions, is_selecting, logits_of
from secondorder.criteria import FunctionCriterion
from secondorder.curvature import CURVATURES, FisherMC


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
        tape = Tape(linear_layers(model), criterion, TapeOptions(columns=CURVATURES[name].columns))
        criterion(model(x), y).backward()
        found.append({r.layer: r.block for r in tape.records()})
        tape.remove()
    for layer, block in found[0].items():
        torch.testing.assert_close(found[1][layer], block)


@pytest.mark.parametrize("name", ["pch-abs", "gauss-newton", "kflr", "fisher-exact", "fisher-mc"])
def test_a_mean_square_does_not_know_its_target(name):
    model, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(9, 4).double(), torch.randn(9, 3).double()
    found = []
    for criterion in (nn.MSELoss(), FunctionCriterion(F.mse_loss)):
        for swapped in (False, True):
            tape = Tape(linear_layers(model), criterion, CURVATURES[name].tape_options())
            torch.manual_seed(0)
            z = model(x)
            (criterion(y, z) if swapped else criterion(z, y)).backward()
            found.append(CURVATURES[name].bias_hessians(tape.records()))
            tape.remove()
    for other in found[1:]:
        assert all(torch.equal(other[layer], block) for layer, block in found[0].items())


ROWS = torch.tensor([13, 1, 7, 29, 20])
SELECTED = {  # what the loop does with the log-probabilities [6, 5, 3], the same of the logits, and of the labels [6, 5]
    "flattened": (lambda z: z.log_softmax(-1).view(-1, 3), lambda z: z.view(-1, 3), lambda y: y.flatten()),
    "some rows": (
        lambda z: z.view(-1, 3).log_softmax(1)[ROWS], lambda z: z.view(-1, 3)[ROWS], lambda y: y.flatten()[ROWS]
    ),
    "classes second": (lambda z: z.log_softmax(-1).transpose(1, 2), lambda z: z.view(-1, 3), lambda y: y),
    "last of a sequence": (lambda z: z.log_softmax(-1)[:, -1], lambda z: z[:, -1], lambda y: y[:, -1]),
}  # fmt: skip


@pytest.mark.parametrize("kind", SELECTED)
@pytest.mark.parametrize("name", ["kflr", "fisher-exact", "fisher-mc"])
def test_nll_of_log_softmax_that_is_reshaped_or_selected_is_cross_entropy(name, kind):
    log_probabilities, logits, labels = SELECTED[kind]
    body, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(6, 5, 4).double(), torch.randint(3, (6, 5))
    curvature = FisherMC(3000) if name == "fisher-mc" else CURVATURES[name]
    z = [layer(x).detach() for layer in (body[0], body)]
    top = torch.func.hessian(lambda u: F.cross_entropy(logits(u), labels(y).flatten()))(z[1]).view(30, 3, 30, 3)
    top = torch.stack([top[i, :, i] for i in range(30)])
    jacobian = torch.einsum("kh,ih->ikh", body[2].weight.detach(), 1 - z[0].tanh().view(30, 6) ** 2)
    expected = {"0": torch.einsum("ika,ikl,ilb->ab", jacobian, top, jacobian), "2": top.sum(0)}
    found = blocks(nn.Sequential(*body, Then(log_probabilities)), nn.NLLLoss(), curvature, (x, labels(y)))
    rtol = 0.1 if name == "fisher-mc" else 1e-9
    for layer, block in expected.items():
        assert (found[layer] - block).norm() <= rtol * block.norm()


@pytest.mark.parametrize(
    ("shape", "function"),
    [
        ((4, 4), lambda z: z.log_softmax(1).T),
        ((4, 4), lambda z: z.log_softmax(0)),
        ((3, 4, 2), lambda z: z.log_softmax(1).view(6, 4)),
    ],
    ids=["transposed", "over instances", "viewed"],
)
def test_log_probabilities_over_another_dimension_than_the_classes_are_no_logits(shape, function):
    z = torch.randn(shape, requires_grad=True)
    assert logits_of(function(z), 1, is_selecting) is None


def test_logits_are_those_that_log_softmax_was_taken_of():
    z = torch.randn(5, 4, 4, requires_grad=True)
    for u, function, classes in [
        (2 * z, lambda u: u.log_softmax(2).view(20, 4), 1), (2 * z, lambda u: u.log_softmax(1).transpose(1, 2), 2),
        (2 * z, lambda u: u.log_softmax(1).permute(1, 0, 2), 0), (2 * z, lambda u: u.log_softmax(-1)[2:4, 1], 1),
        (2 * z[0], lambda u: u.log_softmax(0).T, -1),
    ]:  # fmt: skip
        edge = logits_of(function(u), classes, is_selecting)
        assert edge is not None
        assert edge.node is u.grad_fn


class Sigmoid(torch.autograd.Function):
    """Has the name of a node of torch's, and is another function: sigmoid(2 z)."""

    @staticmethod
    def forward(ctx, z):
        p = torch.sigmoid(2 * z)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        return grad * 2 * p * (1 - p)


def test_a_function_of_ones_own_by_the_name_of_a_final_one_is_its_own():
    model, twin = Behind(Sigmoid.apply), Behind(lambda z: torch.sigmoid(2 * z))
    x, y = torch.randn(9, 4).double(), torch.rand(9, 3).double()
    kflr = CURVATURES["kflr"]
    assert_blocks(blocks(model, nn.BCELoss(), kflr, (x, y)), blocks(twin, nn.BCELoss(), kflr, (x, y)))
    with pytest.raises(ValueError, match="expected a criterion that is a likelihood"):
        blocks(model, nn.BCELoss(), CURVATURES["fisher-exact"], (x, y))


class Then(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("shape", [(30,), (6, 5)])
@pytest.mark.parametrize(
    "kwargs", [{}, {"weight": torch.tensor([1.0, 0.3, 2.0]).double()}, {"ignore_index": 1, "reduction": "sum"}]
)
def test_the_hessian_of_nll_of_log_softmax_is_by_formula(monkeypatch, shape, kwargs):
    body, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(*shape, 4).double(), torch.randint(3, (30,))
    true = hessian_block(body[2], nn.CrossEntropyLoss(**kwargs), body[1](body[0](x)).detach().reshape(-1, 6), y, "bias")
    monkeypatch.setattr("secondorder._tape.tape.autograd_hessian", None)
    model = nn.Sequential(*body, nn.LogSoftmax(-1), nn.Flatten(0, -2))
    for name in ("pch-abs", "gauss-newton"):
        torch.testing.assert_close(blocks(model, nn.NLLLoss(**kwargs), CURVATURES[name], (x, y))["2"], true)


def test_nll_of_log_softmax_over_another_dimension_has_no_formula():
    body, x, y = network([4, 6, 3], nn.Tanh()), torch.randn(30, 4).double(), torch.randint(3, (30,))
    model = nn.Sequential(*body, nn.LogSoftmax(0))
    hessian = torch.func.hessian(lambda z: F.nll_loss(z.log_softmax(0), y))(body(x).detach())
    torch.testing.assert_close(hessian.sum((0, 2)), torch.zeros(3, 3).double())  # it compares instances
    found, expected = (blocks(model, nn.NLLLoss(), CURVATURES[name], (x, y))["2"] for name in ("pch-abs", "fisher-empirical"))
    torch.testing.assert_close(found, expected)


def test_nll_of_anything_else_is_no_likelihood():
    model, criterion = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.NLLLoss()
    optimizer = so.KFAC(model, criterion)
    with pytest.raises(ValueError, match="NLL of log_softmax"):
        criterion(model(torch.randn(5, 4)), torch.arange(5) % 3)
    optimizer.remove_hooks()
