"""The renewals of EigenAdam's bases and the sketches of inputs, likewise."""

import math

import pytest
import torch
from helpers.eigen_operators import DTYPES, RENEWAL, STEP, cast, compare, controls, eigen_sizes, matrix, renew, sketched, step

from secondorder import ops, reference


@pytest.mark.parametrize("dtype", DTYPES)
def test_renewals_equal_the_specification(dtype):
    original = [matrix(*size, seed=i, curved=i % 2 == 1) for i, size in enumerate(eigen_sizes())]
    matrices, plain, exact = cast(original, dtype), cast(original, dtype), cast(original, torch.float64)
    for library, each in ((ops, matrices), (reference, plain), (reference, exact)):
        control = controls()
        renew(library, each, control, *sketched(library, each))
        assert torch.equal(control, controls())
    compare(RENEWAL, matrices, plain, exact, ulps=64 if dtype == torch.float32 else 256)
    for each in matrices:
        for key in ("basis_out", "basis_in"):
            product = each[key] @ each[key].T
            torch.testing.assert_close(product, torch.eye(len(product), dtype=dtype), rtol=0, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
@pytest.mark.parametrize("library", [ops, reference])
def test_bases_of_a_small_or_large_gradient_are_those_of_any_other(library, factor, curved):
    """In float32, where the squares of the lengths of what becomes a basis, fourth powers of the gradient, are not numbers."""
    one, other = (cast([matrix(40, 50, 8, 8, True, curved=curved)], torch.float32) for _ in range(2))
    for key in ("grad_weight", "grad_bias", "bias_hessian"):
        other[0][key] *= factor
    for each in (one, other):
        control = controls()
        renew(library, each, control, [torch.zeros(0)], [0], share=1.0)
        assert torch.equal(control, controls())
    for key in ("basis_out", "basis_in", "first"):
        assert torch.equal(one[0][key], other[0][key])
    for key, power in (("scale_out", 1 if curved else 2), ("scale_in", 2)):
        assert torch.equal(one[0][key] * factor**power, other[0][key])


@pytest.mark.parametrize("bad", [math.nan, 1.5e19])  # whose square is below the largest number, but not below a fourth of it
@pytest.mark.parametrize("what", ["sketch", "bias_hessian"])
def test_a_sketch_or_bias_hessian_that_is_not_finite_refuses_the_step(what, bad):
    own = cast([matrix(20, 30, 8, 8, True, curved=True)], torch.float32)
    before, control = cast(own, torch.float32), controls()
    sketches, rows = sketched(ops, own)
    (sketches[0] if what == "sketch" else own[0]["bias_hessian"])[-1, 0] = bad
    renew(ops, own, control, sketches, rows)
    assert control[ops.CONTROL.index("unrenewed")] == 1
    step(ops, own, control)
    assert control[ops.CONTROL.index("unrenewed")] == 0
    assert control[ops.CONTROL.index("refused")] == 1
    assert all(torch.equal(own[0][key], before[0][key]) for key in dict.fromkeys(STEP + RENEWAL))


def test_a_lost_direction_is_drawn_anew():
    """Inputs of rank 2 for a basis of 8: the others get no scale, and are orthonormal all the same."""
    own = cast([matrix(40, 50, 8, 8, True)], torch.float64)
    own[0]["scale_in"].zero_()
    x = torch.randn(2, 50, dtype=torch.float64)
    sketch = torch.zeros(9, 50, dtype=torch.float64)
    ops.eigen_sketch_(sketch, torch.randn(30, 2, dtype=torch.float64) @ x + own[0]["mean"], own[0]["basis_in"], own[0]["mean"])
    renew(ops, own, controls(), [sketch], [30], share=1.0)
    basis, scale = own[0]["basis_in"], own[0]["scale_in"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64))
    assert (scale > 0).tolist() == [True, True] + [False] * 6
    torch.testing.assert_close(x @ basis[:2].T @ basis[:2], x)


def test_power_iterations_find_the_eigendirections():
    """Of the inputs' covariance, whatever their mean, after some renewals with the same batch."""
    own = cast([matrix(40, 30, 8, 3, True)], torch.float64)
    h = torch.randn(500, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h = h * torch.logspace(1, -1, 30, dtype=torch.float64) + 100
    own[0]["mean"] = h.mean(0)
    for j in range(150):
        sketch = torch.zeros(4, 30, dtype=torch.float64)
        ops.eigen_sketch_(sketch, h, own[0]["basis_in"], own[0]["mean"])
        renew(ops, own, controls(), [sketch], [500], share=1.0 if j == 0 else 0.1)
    values, vectors = torch.linalg.eigh(torch.cov(h.T, correction=0))
    torch.testing.assert_close(own[0]["scale_in"], values.flip(0)[:3], rtol=1e-3, atol=0)
    overlap = (own[0]["basis_in"] * vectors.T.flip(0)[:3]).sum(1).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-3)


def test_power_iterations_find_a_bias_hessians_eigendirections():
    """Whatever the gradient: on the outputs' side alone, while the inputs' is as without it."""
    own = [matrix(40, 30, 3, 4, True), matrix(40, 30, 3, 4, True)]
    q = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    own[0]["bias_hessian"] = q @ torch.diag(torch.logspace(2, -4, 40, dtype=torch.float64)) @ q.T
    for j in range(150):
        renew(ops, own, controls(), *sketched(ops, own), share=1.0 if j == 0 else 0.1)
    torch.testing.assert_close(own[0]["scale_out"], torch.logspace(2, -4, 40, dtype=torch.float64)[:3], rtol=1e-3, atol=0)
    overlap = (own[0]["basis_out"] * q.T[:3]).sum(1).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-3)
    for key in ("basis_in", "scale_in", "mean"):
        assert torch.equal(own[0][key], own[1][key])
    assert (own[1]["basis_out"] * q.T[:3]).sum(1).abs().max() < 0.9
