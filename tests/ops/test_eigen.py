"""What holds for EigenAdam's operators together: sizes, threads, what is refused, and their schemas."""

import math

import pytest
import torch
from helpers.eigen_operators import RENEWAL, STEP, cast, controls, inputs, matrix, renew, sketched, step
from helpers.kernels import needs_kernels
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from secondorder import ops, reference


@given(
    n=st.integers(1, 40),
    p=st.integers(1, 40),
    k=st.integers(0, 9),
    bias=st.booleans(),
    curved=st.booleans(),
    threads=st.sampled_from([1, 2, 5]),
)
def test_any_size_and_threads(n, p, k, bias, curved, threads):
    size = (n, p, n if n <= 2 * k + 1 and k else min(k, n), p if p <= 2 * k + 1 and k else min(k, p), bias and k > 0)
    original = [matrix(*size, curved=curved)]
    own, exact = cast(original, torch.float64), cast(original, torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step(ops, own, controls())
        if k:
            renew(ops, own, controls(), *sketched(ops, own))
    finally:
        torch.set_num_threads(before)
    step(reference, exact, controls())
    if k:
        renew(reference, exact, controls(), *sketched(reference, exact))
    for key in dict.fromkeys(STEP + RENEWAL if k else STEP):
        torch.testing.assert_close(own[0][key], exact[0][key], rtol=1e-6, atol=1e-8)


@needs_kernels
def test_threads_change_no_bit():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        own = cast(
            [matrix(300, 400, 8, 8, True), matrix(20, 30, 8, 8, True), matrix(300, 90, 8, 8, True, curved=True)], torch.float32
        )
        step(ops, own, controls())
        renew(ops, own, controls(), *sketched(ops, own))
        results.append([each[key] for each in own for key in dict.fromkeys(STEP + RENEWAL)])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("position", ["grad_weight", "grad_bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(position, value):
    """Nor one whose square is not: the second moments would be infinite from then on."""
    own = cast([matrix(20, 30, 8, 8, True), matrix(9, 9, 9, 9, True)], torch.float32)
    own[1][position].view(-1)[-1] = value
    before, control, sketches = cast(own, torch.float32), controls(), sketched(ops, own)
    renew(ops, own, control, *sketches)
    step(ops, own, control)
    for a, b in zip(own, before, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in dict.fromkeys(STEP + RENEWAL))
    expected = controls()
    expected[ops.CONTROL.index("refused")] = 1
    assert torch.equal(control, expected)


def arguments(name):
    own = cast([matrix(5, 40, 5, 4, True), matrix(7, 9, 3, 2, True, curved=True)], torch.float32)
    lists = {key: [each[key] for each in own] for key in own[0]}
    grads = (lists["grad_weight"], lists["grad_bias"])
    if name == "sketch":
        return [torch.zeros(5, 40), inputs(40).float(), own[0]["basis_in"], own[0]["mean"]]
    if name == "renew":
        sketches, rows = sketched(ops, own)
        return [*(lists[key] for key in RENEWAL), controls(), *grads, sketches, lists["bias_hessian"], rows, [0.5, 1.0]]
    return [
        *(lists[key] for key in STEP), controls(), *grads, lists["mean"], lists["basis_out"], lists["basis_in"], [1.0, 0.5],
        [1.0, 0.5], [0.0, 0.1], [0.0, 0.1], [0, 5], 0.9, 0.95, 1e-7, False,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["sketch", "renew", "step"])
def test_opcheck(name):
    opcheck(getattr(torch.ops.secondorder, f"eigen_{name}_").default, arguments(name))


@needs_kernels
@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("sketch", lambda a: a.__setitem__(0, a[0][:4]), ValueError, r"expected sketch of shape \[5, 40\], got \[4, 40\]"),
        ("sketch", lambda a: a.__setitem__(3, a[3][:4]), ValueError, r"expected shift of shape \[40\], got \[4\]"),
        ("sketch", lambda a: a.__setitem__(1, a[1].half()), TypeError, "expected inputs of dtype float32 or float64, got Half"),
        ("renew", lambda a: a[12].__setitem__(0, 0.0), ValueError, r"expected share in \(0, 1\], got 0"),
        ("renew", lambda a: a[11].__setitem__(0, 0), ValueError, "expected rows > 0 with a sketch"),
        ("renew", lambda a: a[10].__setitem__(1, a[10][1][1:]), ValueError, r"expected bias_hessian of shape \[7, 7\]"),
        ("renew", lambda a: a[10].__setitem__(1, a[10][1].double()), TypeError, "expected bias_hessian of dtype Float"),
        ("renew", lambda a: a[10].pop(), ValueError, "expected lists of one length, got 2 grad_weight"),
        ("renew", lambda a: a[0].pop(), ValueError, "expected lists of one length, got 2 grad_weight"),
        ("renew", lambda a: a[5].__setitem__(1, a[5][1][1:]), ValueError, "expected first of shape"),
        ("step", lambda a: a.__setitem__(6, controls()[:3]), ValueError, "expected control of shape"),
        ("step", lambda a: a.__setitem__(6, controls().float()), TypeError, "expected control of dtype float64, got Float"),
        ("step", lambda a: a[4].__setitem__(1, a[4][1][1:]), ValueError, "expected last of"),
        ("step", lambda a: a[0].__setitem__(1, a[0][1].T.contiguous().T), ValueError, "expected a contiguous weight"),
        ("step", lambda a: a[10].__setitem__(1, a[10][1].double()), TypeError, "expected basis_out of dtype Float"),
        ("step", lambda a: a.__setitem__(17, 1.0), ValueError, r"expected beta1 in \[0, 1\), got 1"),
        ("step", lambda a: a[12].__setitem__(0, -1.0), ValueError, "expected lr >= 0 and finite, got -1"),
    ],
)
def test_bad_input(name, change, error, message):
    given_ = arguments(name)
    change(given_)
    with pytest.raises(error, match=message):
        getattr(ops, f"eigen_{name}_")(*given_)


def fuzz_cases(q):
    """Every operator with arguments made of the problem that test_fuzz.py draws; an empty matrix is no matrix."""
    g = q["b"] if q["b"].numel() else q["b"].new_ones(1, 1)
    (n, p), dtype = g.shape, g.dtype
    vector = q["g"] if q["b"].numel() else g[0]
    made = cast([matrix(n, p, min(2, n), min(3, p), True)], dtype)[0] | {"grad_weight": g, "grad_bias": vector}
    made["mean"] = q["a"] if q["b"].numel() else g[0]
    o, lists = torch.ops.secondorder, {key: [value] for key, value in made.items()}
    sketch = torch.ones(min(3, p) + 1, p, dtype=dtype)
    return [
        (o.eigen_sketch_.default, (sketch.clone(), g, made["basis_in"], made["mean"])),
        (
            o.eigen_renew_.default,
            ([made["mean"].contiguous().clone()], *(lists[key] for key in RENEWAL[1:]), controls(), lists["grad_weight"],
             lists["grad_bias"], [sketch], [vector.outer(vector)], [4], [0.5]),
        ),
        (
            o.eigen_step_.default,
            (*(lists[key] for key in STEP), controls(), lists["grad_weight"], lists["grad_bias"], lists["mean"],
             lists["basis_out"], lists["basis_in"], [1.0], [1.0], [0.0], [0.0], [0], 0.9, 0.95, 1e-7, False),
        ),
    ]  # fmt: skip
