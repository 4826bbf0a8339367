from dataclasses import dataclass

import pytest
import torch
from oracles import pos_eig_matrix
from torch import nn
from torch.func import hessian
from torch.nn import functional as F

import secondorder as so
from secondorder.criteria import (
    BoundedClassificationLoss,
    FunctionCriterion,
    OutputHessian,
    TukeyBiweightLoss,
    analytic_hessian,
    autograd,
    autograd_hessian,
)

M, K = 7, 5
CLASSES = torch.tensor([0, 4, 2, 2, 1, 3, 0])
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0]).double()


def classes():
    return CLASSES


def some_ignored():
    target = CLASSES.clone()
    target[1] = target[5] = -100
    return target


def probabilities():
    return torch.rand(M, K, dtype=torch.float64).softmax(1)


def values():
    return torch.randn(M, K, dtype=torch.float64)


CASES = [
    (nn.CrossEntropyLoss(), classes),
    (nn.CrossEntropyLoss(reduction="sum"), classes),
    (nn.CrossEntropyLoss(label_smoothing=0.2), classes),
    (nn.CrossEntropyLoss(weight=WEIGHT), classes),
    (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.3, reduction="sum"), classes),
    (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.3), some_ignored),
    (nn.CrossEntropyLoss(ignore_index=2), classes),
    (nn.CrossEntropyLoss(), probabilities),
    (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), probabilities),
    (nn.MSELoss(), values),
    (nn.MSELoss(reduction="sum"), values),
    (nn.BCEWithLogitsLoss(), probabilities),
    (nn.BCEWithLogitsLoss(reduction="sum", pos_weight=WEIGHT), probabilities),
    (nn.BCEWithLogitsLoss(weight=WEIGHT), probabilities),
    (BoundedClassificationLoss(), classes),
    (BoundedClassificationLoss(delta=2.0, epsilon=0.4, reduction="sum"), classes),
    (TukeyBiweightLoss(), values),
    (TukeyBiweightLoss(c=0.8, reduction="sum"), values),
]


def exact(criterion, output, target):
    """sum_i of the diagonal blocks of the full [m K, m K] Hessian of the loss."""
    k = output.shape[-1]
    full = hessian(lambda z: criterion(z.reshape(output.shape), target))(output.reshape(-1))
    blocks = full.reshape(-1, k, full.shape[0] // k, k)
    return sum(blocks[i, :, i] for i in range(blocks.shape[0]))


def dense(result: OutputHessian):
    return torch.diag(result.values) if result.values.dim() == 1 else result.values


def by_autograd(criterion, output, target):
    z = output.clone().requires_grad_() * 1
    return autograd_hessian(criterion(z, target), z.grad_fn)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1].__name__}")
def test_analytic_and_autograd_forms(case):
    criterion, make_target = case
    target, output = make_target(), 2 * values()
    expected = exact(criterion, output, target)
    analytic = analytic_hessian(criterion, output, target)
    assert analytic is not None
    torch.testing.assert_close(dense(analytic), expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(dense(by_autograd(criterion, output, target)), expected, rtol=1e-10, atol=1e-13)
    if analytic.convex:
        assert torch.linalg.eigvalsh(expected)[0] > -1e-12


@pytest.mark.parametrize(
    "criterion",
    [
        nn.SmoothL1Loss(beta=0.5),
        nn.HuberLoss(),
        nn.L1Loss(),
        lambda z, y: (z.softmax(-1) - y).square().sum() / M,
        nn.PoissonNLLLoss(),
    ],
    ids=["smooth-l1", "huber", "l1", "brier", "poisson"],
)
def test_any_other_criterion(criterion):
    output, target = values(), values().abs()
    result = by_autograd(criterion, output, target)
    torch.testing.assert_close(dense(result), exact(criterion, output, target), rtol=1e-10, atol=1e-13)


def test_bounded_loss_with_probabilities_and_without_analytic_form():
    criterion, output, target = BoundedClassificationLoss(), values(), probabilities()
    assert analytic_hessian(criterion, output, target) is None
    torch.testing.assert_close(dense(by_autograd(criterion, output, target)), exact(criterion, output, target))
    one_hot = F.one_hot(CLASSES, K).double()
    torch.testing.assert_close(criterion(output, one_hot), criterion(output, CLASSES))


def test_callables_without_a_hash_are_criteria():
    @dataclass  # which compares instances, and so gives them no hash
    class Weighted:
        weight: float

        def __call__(self, z, y):
            return self.weight * F.mse_loss(z, y)

    x, y, found = torch.randn(7, 4), torch.randn(7, 3), []
    for criterion in (Weighted(2.0), lambda z, y: 2.0 * F.mse_loss(z, y)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        optimizer = so.LayerwiseNewton(model, criterion)
        optimizer.criterion(model(x), y).backward()
        optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


def test_functions_are_their_modules():
    output = values()
    for function, kwargs, target in [
        (F.cross_entropy, {"label_smoothing": 0.1}, CLASSES),
        (F.mse_loss, {"reduction": "sum"}, values()),
        (F.binary_cross_entropy_with_logits, {}, probabilities()),
    ]:
        result = analytic_hessian(FunctionCriterion(function), output, target, **kwargs)
        torch.testing.assert_close(dense(result), exact(lambda z, y, f=function, k=kwargs: f(z, y, **k), output, target))
    assert analytic_hessian(FunctionCriterion(lambda z, y: z.sum()), output, CLASSES) is None


def test_subclasses_are_not_taken_for_their_base():
    class Scaled(nn.MSELoss):
        def forward(self, output, target):
            return 3 * super().forward(output, target)

    assert analytic_hessian(Scaled(), values(), values()) is None


def test_sequence_outputs():
    output, target = torch.randn(3, 4, K, dtype=torch.float64), torch.randn(3, 4, K, dtype=torch.float64)
    for criterion in (nn.MSELoss(), TukeyBiweightLoss()):
        expected = exact(criterion, output, target)
        torch.testing.assert_close(dense(analytic_hessian(criterion, output, target)), expected)
        torch.testing.assert_close(dense(by_autograd(criterion, output, target)), expected)


@pytest.mark.parametrize("gamma", [-1.0, 0.0, -0.5])
def test_pos_eig(gamma):
    matrix = torch.randn(6, 6, dtype=torch.float64)
    matrix = matrix + matrix.T
    torch.testing.assert_close(OutputHessian(matrix, convex=False).positive(gamma), pos_eig_matrix(matrix, gamma))
    diagonal = torch.tensor([1.0, -2.0, 0.0]).double()
    torch.testing.assert_close(OutputHessian(diagonal, convex=False).positive(gamma), pos_eig_matrix(torch.diag(diagonal), gamma))
    with pytest.raises(so.NonFiniteError, match="finite Hessian of the criterion.*take EACG with curvature='fisher-empirical'"):
        OutputHessian(matrix * float("nan"), convex=False).positive(gamma)


def test_a_plain_function_without_analytic_form_is_made_positive():
    """Neither form of autograd's Hessian may pass for convex."""
    output = 2 * values()
    for function, target in [(lambda z, y: -F.cross_entropy(z, y), CLASSES), (lambda z, y: -((z - y) ** 2).mean(), values())]:
        result = by_autograd(function, output, target)
        assert torch.linalg.eigvalsh(result.positive(-1.0))[0] > -1e-12
        torch.testing.assert_close(result.positive(-1.0), -exact(function, output, target))


def test_diagonal_by_accident():
    """Off-diagonal blocks that a vector of signs could cancel."""
    for k in (3, 4, 5):
        for free in range(k):
            mask = torch.ones(k, dtype=torch.bool)
            mask[free] = False

            def function(z, y, mask=mask, free=free):
                return z[:, free].square().mean() + F.cross_entropy(z[:, mask], y)

            output, target = torch.randn(1, k).double(), torch.tensor([1])
            torch.testing.assert_close(dense(by_autograd(function, output, target)), exact(function, output, target))


def test_half_precision_outputs():
    output = 2 * values()
    result = analytic_hessian(nn.CrossEntropyLoss(), output.bfloat16(), CLASSES)
    assert result.values.dtype == torch.float32
    assert torch.linalg.eigvalsh(result.values)[0] > -1e-6


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]))])
def test_a_hessian_is_not_rounded_where_autocast_is_in_force(criterion):
    output = 2 * values().float()
    expected = analytic_hessian(criterion, output, CLASSES).values
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(analytic_hessian(criterion, output, CLASSES).values, expected)


def test_broadcast_targets():
    output, target = values()[:, :1], values()[:, 0]
    assert analytic_hessian(nn.MSELoss(), output, target) is None
    with pytest.raises(ValueError, match=r"expected a target of the output's shape \(7, 1\), got \(7,\)"):
        TukeyBiweightLoss()(output, target)
    assert analytic_hessian(FunctionCriterion(F.mse_loss), output, output, weight=output) is None


def test_eq_14_values():
    output = torch.tensor([[0.0, 0.0]]).double()  # p = 1/2
    assert BoundedClassificationLoss()(output, torch.tensor([1])).item() == pytest.approx(
        1 / (1 + 2.718281828459045 ** (5 * 0.3))
    )
    assert TukeyBiweightLoss(c=2.0)(torch.tensor([0.0, 1.0, 5.0]), torch.zeros(3)).item() == pytest.approx(
        (0 + 4 / 6 * (1 - 0.75**3) + 4 / 6) / 3
    )


def test_bad_input():
    with pytest.raises(ValueError, match="expected reduction 'mean' or 'sum', got 'none'"):
        BoundedClassificationLoss(reduction="none")
    with pytest.raises(ValueError, match="expected c > 0, got 0"):
        TukeyBiweightLoss(c=0)


class Squared(torch.autograd.Function):
    """z^2, whose backward pass reads a number, which vmap cannot."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx, grad):
        assert float(grad.detach().abs().max()) >= 0
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("together", [1, 3 * 5 * 2, 2**17])
@pytest.mark.parametrize("square", [torch.square, Squared.apply])
def test_backward_passes_may_be_taken_together(square, together, monkeypatch):
    monkeypatch.setattr(autograd, "_BATCH", together)
    torch.manual_seed(0)
    output = torch.randn(3, 5).double().requires_grad_() + 0
    mixed = lambda z: (square(z) @ torch.ones(5, 5).double() * z).logsumexp(-1).sum()  # noqa: E731
    found = autograd_hessian(mixed(output), output.grad_fn)
    whole = torch.autograd.functional.hessian(mixed, output.detach())
    torch.testing.assert_close(found.values, sum(whole[i, :, i] for i in range(3)))
