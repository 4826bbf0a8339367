"""Elementwise criteria as squares of their roots: value, gradient, and curvature at the minimum."""

import pytest
import torch
from helpers.least_squares import float64  # noqa: F401
from torch.nn.functional import binary_cross_entropy_with_logits, huber_loss, smooth_l1_loss, soft_margin_loss

from secondorder._tape.nodes import Reach
from secondorder._tape.residuals import coefficients, find_terms


def elementwise(criterion, u, t):
    """The loss, and the squares found in its graph with their coefficients and values."""
    loss = criterion(u, t)
    terms = find_terms(loss, Reach([u]), "test").squares
    return loss, coefficients(loss, terms, "test"), terms


CRITERIA = {
    "huber": lambda u, t: huber_loss(u, t, delta=0.5),
    "huber, sum": lambda u, t: huber_loss(u, t, delta=2.0, reduction="sum"),
    "smooth L1": lambda u, t: smooth_l1_loss(u, t, beta=0.3),
    "soft margin": lambda u, t: soft_margin_loss(u, torch.sign(t - 0.5)),
    "bce": lambda u, t: binary_cross_entropy_with_logits(u, t),
    "bce, weighted": lambda u, t: binary_cross_entropy_with_logits(u, t, weight=1 + t, reduction="sum"),
    "positives": lambda u, t: binary_cross_entropy_with_logits(u, t, pos_weight=torch.tensor(3.0).to(t)),
    "positives, weighted": lambda u, t: binary_cross_entropy_with_logits(u, t, 1 + t, pos_weight=torch.tensor(0.2).to(t)),
}


def arguments(dtype=torch.float64):
    """Outputs near, at and far from the minimum of every criterion, with hard and soft targets."""
    t = torch.cat([torch.rand(30), torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0, 0.3, 0.3])]).to(dtype)
    u = torch.logit(t, eps=1e-3)
    u[:10] += torch.logspace(-9, 0, 10, dtype=dtype)
    u[10:20] -= torch.logspace(-9, 0, 10, dtype=dtype)
    u[20:25], u[25:30] = t[20:25], -25 * torch.rand(5, dtype=dtype)
    u[33:35] = torch.tensor([-30.0, 30.0], dtype=dtype)
    return u.detach().clone().requires_grad_(), t


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_is_the_square_of_its_root(name):
    u, t = arguments()
    loss, weights, terms = elementwise(CRITERIA[name], u, t)
    squares = sum((c * term.residual.square()).sum() for c, term in zip(weights, terms, strict=True))
    entropy = 0.0
    if name.startswith("bce"):
        weight = 1 + t if "weighted" in name else torch.full_like(t, 1 / len(t))
        entropy = float((weight * torch.distributions.Bernoulli(t).entropy()).sum())
    if name.startswith("positives"):
        p, weight = (0.2, 1 + t) if "weighted" in name else (3.0, torch.ones_like(t))
        scale = p * t + (1 - t)
        entropy = float((weight * scale * torch.distributions.Bernoulli(p * t / scale).entropy()).mean())
    torch.testing.assert_close(squares + entropy, loss, rtol=1e-10, atol=0)
    (ours,), (right,) = (torch.autograd.grad(value, u, retain_graph=True) for value in (squares, loss))
    torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_roots_curvature_is_that_of_the_criterion_at_its_minimum(name):
    if name == "soft margin":
        pytest.skip("it has no minimum")
    _, t = arguments()
    t = t[:30]
    p = 1.0 if not name.startswith("positives") else 0.2 if "weighted" in name else 3.0
    u = (t if name.startswith(("huber", "smooth")) else torch.logit(p * t / (p * t + (1 - t)))).clone().requires_grad_()
    loss, weights, terms = elementwise(CRITERIA[name], u, t)
    (slope,) = torch.autograd.grad(loss, u, create_graph=True)
    (right,) = torch.autograd.grad(slope.sum(), u)
    (root,) = torch.autograd.grad(terms[0].residual.sum(), u)
    torch.testing.assert_close(2 * weights[0] * root.square(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CRITERIA)
def test_roots_in_float32_are_finite(name):
    u, t = arguments(torch.float32)
    loss, weights, terms = elementwise(CRITERIA[name], u, t)
    (root,) = torch.autograd.grad(terms[0].residual.sum(), u, retain_graph=True)
    assert torch.isfinite(root).all()
    (right,) = torch.autograd.grad(loss, u, retain_graph=True)
    torch.testing.assert_close(2 * weights[0] * terms[0].residual * root, right, rtol=2e-2, atol=1e-4)


def test_a_criterion_without_a_root_is_refused():
    with pytest.raises(RuntimeError, match="neither a square nor linear"):
        elementwise(lambda u, t: smooth_l1_loss(u, t, beta=0.0), *arguments())
