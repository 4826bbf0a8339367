"""Every solver against its assembled dense system in float64, and on factors that are singular, huge or broken."""

import pytest
import torch
from oracles import random_psd

from secondorder.linalg import eigh, inverse
from secondorder.solvers import KFI, SOLVERS, Isotropic, SolverOptions

SIZES = [(1, 1), (1, 6), (5, 1), (4, 7), (9, 3)]  # (n_out, n_in)
DAMPINGS = [(0.9, 0.1), (1.0, 3.0), (1.0, 1e-3), (1.0, 1e20)]  # (scale, damping)


def solver(name, budget=10**6):
    return SOLVERS[name](SolverOptions(2000, 1e-14, budget))


def problem(n_out, n_in, dtype=torch.float64, m=5):
    torch.manual_seed(100 * n_out + n_in)
    h = random_psd(n_out, dtype)
    return h, *(torch.randn(*s, dtype=torch.float64).to(dtype) for s in ((m, n_in), (n_out, n_in), (n_out,)))


def run(kind, h, input, b, g, scale, damping):
    return kind.solve(kind.prepare({"bias_hessian": h, **kind.statistics([input], [input])[0]}, scale, damping), b, g)


def input_factor(name, input):
    """What stands for E[h h^T]."""
    a, second = input.mean(0), input.T @ input / len(input)
    if name in ("kron-cg", "exact", "kfi", "auto"):
        return second
    if name == "ea-isotropic":
        covariance = second - torch.outer(a, a)
        return torch.outer(a, a) + covariance.trace() / len(a) * torch.eye(len(a)).double()
    return torch.outer(a, a)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("scale", "damping"), DAMPINGS)
@pytest.mark.parametrize("name", ["ea-cg", "ea-cg-truncated", "kron-cg", "exact", "ea-isotropic"])
def test_solution_of_the_assembled_system(name, scale, damping, size):
    h, input, b, g = problem(*size)
    p, d = run(solver(name), h, input, b, g, scale, damping)
    matrix = scale * torch.kron(h, input_factor(name, input)) + damping * torch.eye(b.numel()).double()
    expected = torch.linalg.solve(matrix, -b.reshape(-1)).reshape(b.shape)
    torch.testing.assert_close(p, expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max()))
    expected = torch.linalg.solve(scale * h + damping * torch.eye(len(h)).double(), -g)
    torch.testing.assert_close(d, expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("damping", [1e-3, 0.1, 3.0, 1e20])
@pytest.mark.parametrize("name", ["kfi", "kfi-rank-one", "auto"])
def test_kfi_is_the_dense_inverse_of_its_own_approximation(name, damping, size):
    h, input, b, g = problem(*size)
    a = input_factor(name, input)
    pi = ((a.trace() / len(a)) / (h.trace() / len(h))) ** 0.5
    left = h + damping**0.5 / pi * torch.eye(len(h)).double()
    right = a + pi * damping**0.5 * torch.eye(len(a)).double()
    expected = torch.linalg.solve(torch.kron(left, right), -b.reshape(-1)).reshape(b.shape)
    p, d = run(solver(name), h, input, b, g, 0.7, damping)
    torch.testing.assert_close(p, expected, rtol=1e-7, atol=1e-10 * float(expected.abs().max()))
    expected = torch.linalg.solve(h + damping * torch.eye(len(h)).double(), -g)
    torch.testing.assert_close(d, expected, rtol=1e-7, atol=1e-10 * float(expected.abs().max()))


def test_kfi_takes_the_rank_one_form_above_its_budget():
    h, input, b, g = problem(4, 7)
    for budget, same in ((49, "kfi"), (48, "kfi-rank-one")):
        kind = solver("kfi", budget)
        assert ("input_second_moment" in kind.statistics([input], [input])[0]) == (same == "kfi")
        assert torch.equal(run(kind, h, input, b, g, 1, 0.1)[0], run(solver(same), h, input, b, g, 1, 0.1)[0])


@pytest.mark.parametrize(("n_in", "same"), [(1024, "kfi"), (1025, "ea-isotropic")])
def test_auto_takes_the_isotropic_form_for_wide_inputs(n_in, same):
    h, input, b, g = problem(3, n_in)
    chosen, other = (solver(name, 2 * n_in**2) for name in ("auto", same))
    assert chosen.statistics([input], [input])[0].keys() == other.statistics([input], [input])[0].keys()
    for x, y in zip(run(chosen, h, input, b, g, 0.9, 0.1), run(other, h, input, b, g, 0.9, 0.1), strict=True):
        assert torch.equal(x, y)


def test_without_variance_the_isotropic_solver_is_ea_cg():
    h, input, b, g = problem(4, 7)
    input = input.mean(0).expand(5, 7)
    for x, y in zip(run(Isotropic(), h, input, b, g, 0.9, 0.1), run(solver("ea-cg"), h, input, b, g, 0.9, 0.1), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-12, 1e-2, 1e8, 1e30])
@pytest.mark.parametrize("case", ["zero curvature", "zero input", "both", "rank one", "constant input", "one instance"])
@pytest.mark.parametrize("name", SOLVERS)
def test_degenerate_factors_give_finite_steps(name, case, damping, dtype):
    h, input, b, g = problem(6, 8, dtype)
    if case in ("zero curvature", "both"):
        h = torch.zeros_like(h)
    if case in ("zero input", "both"):
        input = torch.zeros_like(input)
    if case == "rank one":
        h = torch.outer(g, g)
    if case == "constant input":
        input = torch.ones_like(input)
    if case == "one instance":
        input = input[:1]
    p, d = run(SOLVERS[name](SolverOptions(50, 1e-4, 10**6)), h, input, b, g, 1.0, damping)
    assert torch.isfinite(p).all()
    assert torch.isfinite(d).all()
    if damping > 1e-12 or name != "kron-cg":  # CG on an all but singular matrix is rounding
        assert (p * b).sum() < 0  # downhill
        assert d @ g < 0


@pytest.mark.parametrize("name", SOLVERS)
def test_a_layer_without_bias(name):
    h, input, b, g = problem(4, 7)
    p, d = run(solver(name), h, input, b, None, 0.9, 0.1)
    assert d is None
    assert torch.equal(p, run(solver(name), h, input, b, g, 0.9, 0.1)[0])


def test_factorisations_name_a_broken_factor():
    broken = torch.eye(3)
    broken[1, 1] = float("nan")
    for factorise in (inverse, eigh):
        with pytest.raises(RuntimeError, match="NaN or inf in its bias Hessian"):
            factorise(broken, "bias Hessian")
    h, input, b, g = problem(3, 4, torch.float32)
    with pytest.raises(RuntimeError, match="NaN or inf in its input second moment"):
        run(KFI(100), h, input * 1e30, b, g, 1.0, 0.1)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("broken", ["bias_hessian", "input"])
def test_a_broken_factor_is_noticed_without_a_gradient(broken, name):
    h, input, b, g = problem(3, 4)
    kind = solver(name)
    factors = {"bias_hessian": h, **kind.statistics([input], [input])[0]}
    for key in factors:
        if (key == "bias_hessian") == (broken == "bias_hessian"):
            factors[key] = factors[key] * torch.inf
    if name == "kfi-rank-one" and broken == "input":  # a vector is factored by nothing: it is in the solution
        assert not torch.isfinite(kind.solve(kind.prepare(factors, 0.9, 0.1), 0 * b, 0 * g)[0]).any()
    else:
        with pytest.raises(RuntimeError, match="NaN or inf in its "):
            kind.prepare(factors, 0.9, 0.1)


def test_a_matrix_that_rounding_made_indefinite_is_factored():
    v = torch.randn(40, 2)
    matrix = v @ v.T * 1e6
    # Its null space, which rounding made indefinite, counts as eps times the largest eigenvalue.
    floor = torch.finfo(torch.float32).eps * torch.linalg.eigvalsh(matrix.double())[-1]
    inverted = torch.linalg.eigvalsh(inverse(matrix, "x").double()) * floor
    torch.testing.assert_close(inverted[2:], torch.ones(38).double(), rtol=0, atol=1e-5)
    assert (inverted[:2].abs() < 1e-5).all()
    values, vectors = eigh(matrix, "x")
    assert (values >= 0).all()
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix, rtol=0, atol=1e-5 * float(matrix.abs().max()))


def test_eigh_falls_back_to_float64(monkeypatch):
    real, calls = torch.linalg.eigh, []

    def failing(matrix):
        calls.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, _ = eigh(torch.diag(torch.tensor([1.0, 2.0])), "x")
    assert calls == [torch.float32, torch.float64]
    torch.testing.assert_close(values, torch.tensor([1.0, 2.0]))
