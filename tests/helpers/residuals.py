"""Nets and points of equations, and the Jacobian of a loss's residuals beside one backward pass for each residual."""

import torch
from torch import nn

from secondorder._tape.factored import Buffer
from secondorder._tape.jacobian import jacobian
from secondorder._tape.nodes import Reach
from secondorder._tape.plans import make_plan
from secondorder._tape.residuals import coefficients, find_terms
from secondorder._tape.uses import find_uses


def gradient(u, x):
    return torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]


def mlp(n_in=2, n_out=1, activation=nn.Tanh):
    return nn.Sequential(nn.Linear(n_in, 8), activation(), nn.Linear(8, 7), activation(), nn.Linear(7, n_out))


def points(m=11, n=2):
    return torch.rand(m, n).requires_grad_()


def of_loss(parameters, loss):
    """Residuals, their coefficients, and the uses of each."""
    terms = find_terms(loss, Reach(parameters), "test").squares
    index = {id(p): i for i, p in enumerate(parameters)}
    values = [t.residual for t in terms]
    return values, coefficients(loss, terms, "test"), [find_uses(v, index) for v in values]


def brute_force(plan, values, scales, drawn, parameters):
    """One backward pass for each residual."""
    rows = []
    for block, scale, d in zip(plan.blocks, scales, drawn, strict=True):
        flat = values[block.term].flatten()
        for k, e in enumerate(block.chosen(d, flat.device)):
            gradients = torch.autograd.grad(flat[e], parameters, retain_graph=True, allow_unused=True)
            columns = [
                torch.zeros(p.numel()) if g is None else g.to_dense().flatten()
                for p, g in zip(parameters, gradients, strict=True)
            ]
            rows.append(scale[k] * torch.cat(columns))
    return torch.stack(rows)


def compared(make, drawing):
    """The plan, and the Jacobian with the one of brute force."""
    parameters, closure = make()
    parameters = list(parameters)
    loss = closure()
    values, weights, uses = of_loss(parameters, loss)
    total = sum((c * v.detach() ** 2).sum() for c, v in zip(weights, values, strict=True))
    torch.testing.assert_close(total, loss.detach(), rtol=1e-12, atol=0)
    plan = make_plan(values, uses, parameters)
    drawn = [torch.randperm(b.size)[: 1 + b.size // 2].sort()[0] if drawing else None for b in plan.blocks]
    scales = [weights[b.term].flatten()[b.chosen(d, loss.device)].sqrt() for b, d in zip(plan.blocks, drawn, strict=True)]
    ours = jacobian(plan, values, uses, parameters, scales, drawn, Buffer())
    return plan, ours, brute_force(plan, values, scales, drawn, parameters)


def close(actual, expected):
    assert float((actual - expected).norm()) <= 1e-12 * float(expected.norm())


def assert_rows_are_those_of_backward_passes(make, drawing):
    """Compares a Jacobian, and all products with it, with one backward pass for each residual."""
    _, ours, expected = compared(make, drawing)
    u, v = torch.randn(len(expected), 2), torch.randn(expected.shape[1], 2)
    products = [(ours.mm(v), expected @ v), (ours.rmm(u), expected.T @ u), (ours.gram().tril(), (expected @ expected.T).tril())]
    for actual, right in products:  # from the factors
        close(actual, right)
    close(ours.squared_norm(), expected.square().sum())
    close(ours.dense(), expected)
    close(ours.gram().tril(), (expected @ expected.T).tril())
    close(ours.mv(v[:, 0]), expected @ v[:, 0])
    close(ours.rmv(u[:, 0]), expected.T @ u[:, 0])
