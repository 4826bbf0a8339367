"""Criteria that bring their likelihood: composite losses, and criteria that draw labels."""

import pytest
import torch
from helpers.curvatures import assert_blocks, blocks, gauss_newton_blocks, instance_gradients, log_odds, network
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import secondorder as so
from secondorder._layers import linear_layers
from secondorder._tape import Tape, TapeOptions
from secondorder.criteria import CompositeLoss
from secondorder.criteria.known import row_masses
from secondorder.curvature import CURVATURES, FisherMC


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
    tape = Tape(layers, criterion, TapeOptions(columns=FisherMC(4000).columns))
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


class Transposed(nn.Module):
    def forward(self, z):
        return z.mT


def test_composite_losses_with_classes_in_dimension_1():
    body, inner = network([4, 6, 3], nn.Tanh()), nn.Softsign()
    x, y, criterion = torch.randn(5, 7, 4).double(), torch.randint(3, (5, 7)), nn.CrossEntropyLoss()
    expected = gauss_newton_blocks(nn.Sequential(*body, inner), criterion, x.flatten(0, 1), y.flatten())
    model = nn.Sequential(*body, Transposed())
    for curvature in ("kflr", "fisher-exact"):
        assert_blocks(blocks(model, CompositeLoss(inner, criterion), CURVATURES[curvature], (x, y)), expected)


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


class Doubled(torch.autograd.Function):
    """2 z, by a backward pass that looks at its numbers, which vmap refuses."""

    @staticmethod
    def forward(ctx, z):
        return 2 * z

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad if grad.isfinite().all() else grad


def test_an_inner_function_that_vmap_does_not_take():
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(4, 3).double(), (torch.randn(5, 4).double(), torch.randint(3, (5,)))
    ours, theirs = (
        so.diagnostics.bias_hessians(model, CompositeLoss(inner, nn.CrossEntropyLoss()), x, y, CURVATURES["kflr"])
        for inner in (Doubled.apply, lambda z: 2 * z)
    )
    torch.testing.assert_close(ours, theirs)
