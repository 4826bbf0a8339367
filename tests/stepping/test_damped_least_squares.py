"""Damped least squares, by every solver, against dense solves."""

import pytest
import torch
from torch import nn

from secondorder._tape.factored import Buffer, Jacobian, Part
from secondorder._tape.jacobian import jacobian
from secondorder._tape.plans import make_plan
from secondorder._tape.uses import find_uses
from secondorder.stepping import damped_least_squares
from secondorder.stepping.damped_least_squares import DampedLeastSquares


def problem(m, width=9):
    """A net's Jacobian, and the same by one backward pass for each output."""
    net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)).double()
    parameters = list(net.parameters())
    output = net(torch.randn(m, 3).double())
    uses = [find_uses(output, {id(p): i for i, p in enumerate(parameters)})]
    plan = make_plan([output], uses, parameters)
    ours = jacobian(plan, [output], uses, parameters, [torch.ones(m).double()], [None], Buffer())
    rows = [torch.autograd.grad(o, parameters, retain_graph=True) for o in output.flatten()]
    return ours, torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def solved(ours, penalties, solver, memory=2**30):
    return DampedLeastSquares(ours, penalties, solver, memory, torch.Generator().manual_seed(0), Buffer())


@pytest.mark.parametrize("memory", [0, 2**30])
@pytest.mark.parametrize("penalized", [False, True])
@pytest.mark.parametrize("solver", ["auto", "rows", "parameters"])
@pytest.mark.parametrize("m", [1, 23, 151])
def test_solves_are_those_of_a_dense_matrix(m, solver, penalized, memory):
    ours, j = problem(m)
    t = torch.rand(j.shape[1]).double() if penalized else None
    found = solved(ours, t, solver, memory)
    assert float(found.trace) == pytest.approx(float(j.square().sum()), rel=1e-12)
    b, theta = torch.randn(m).double(), torch.randn(j.shape[1]).double()
    for mu in (1e-3, 2.0):
        solve, failed = found.at(mu)
        assert not failed
        matrix = j.T @ j + torch.diag(mu + (torch.zeros_like(theta) if t is None else t))
        torch.testing.assert_close(solve(b), torch.linalg.solve(matrix, j.T @ b), rtol=1e-8, atol=1e-10)
        gradient = j.T @ b + (0 if t is None else t * theta)
        torch.testing.assert_close(found.step(solve, b, theta, mu), -torch.linalg.solve(matrix, gradient), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("memory", [0, 2**30])
def test_nystrom_solves_to_its_tolerance_at_every_damping(memory, monkeypatch):
    monkeypatch.setattr(damped_least_squares, "RANK", 60)
    ours, j = problem(90)
    found = solved(ours, None, "nystrom", memory)
    assert found.solver == "nystrom"
    b = torch.randn(90).double()
    for mu in (1e-6, 1e-3, 1.0):
        exact = torch.linalg.solve(j @ j.T + mu * torch.eye(90).double(), b)
        u = damped_least_squares._conjugate_gradients(ours, *found._nystrom, mu, b)
        assert (j @ (j.T @ (u - exact)) + mu * (u - exact)).norm() <= 1.01e-2 * b.norm()
        torch.testing.assert_close(found.at(mu)[0](b), j.T @ u)


def test_nystrom_is_taken_beyond_some_rows(monkeypatch):
    monkeypatch.setattr(damped_least_squares, "DIRECT", 50)
    assert solved(problem(51)[0], None, "auto").solver == "nystrom"
    assert solved(problem(50)[0], None, "auto").solver == "rows"
    assert solved(problem(140)[0], None, "auto").solver == "parameters"


def test_what_is_singular_within_rounding_has_no_solution():
    ours, _ = problem(151)
    assert solved(ours, None, "rows").at(0.0)[1]


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-11, 1e-14])
def test_nystrom_solves_for_small_numbers_in_single_precision(size, monkeypatch):
    """Squares of J J^T's entries and of b's are below the least number, as where a loss is 1e-20."""
    monkeypatch.setattr(damped_least_squares, "RANK", 60)
    _, j = problem(90)
    parts = {p: [Part(0, 90, [], (size * columns).float())] for p, columns in enumerate(j.split(j.shape[1] // 3, 1))}
    parameters = [torch.empty(part[0].dense.shape[1]) for part in parts.values()]
    found = solved(Jacobian([(0, 90)], parameters, parts, Buffer()), None, "nystrom")
    assert found.solver == "nystrom"
    b, mu = torch.randn(90), 1e-3 * float(j.square().sum())
    u = damped_least_squares._conjugate_gradients(found._jacobian, *found._nystrom, mu * size**2, size * b).double()
    matrix = j @ j.T + mu * torch.eye(90).double()
    assert (size * (matrix @ u) - b).norm() <= 1.02e-2 * b.norm()
