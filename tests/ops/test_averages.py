import pytest
import torch
from helpers.kernels import needs_kernels
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import secondorder as so
from secondorder import ops


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 1, 2, 3, 17, 129, 256, 257, 1000])), max_size=4),
    double=st.booleans(),
    threads=st.sampled_from([1, 2, 5]),
)
def test_mean_inputs(sizes, double, threads):
    inputs = [torch.randn(m, n, dtype=torch.float64 if double else torch.float32) for m, n in sizes]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        means = ops.mean_inputs([h.T.contiguous().T for h in inputs])
    finally:
        torch.set_num_threads(before)
    for mean, h in zip(means, inputs, strict=True):
        exact = h.double().sum(0) / len(h)
        assert mean.dtype == h.dtype
        if so.build_info()["extension"]:  # one rounding of a sum in float64
            torch.testing.assert_close(mean.double(), exact, rtol=torch.finfo(h.dtype).eps, atol=1e-15)
        torch.testing.assert_close(mean, exact.to(h.dtype), rtol=0, atol=8 * torch.finfo(h.dtype).eps)


def test_mean_of_a_large_input_and_of_none():
    h = torch.randn(1000, 3000)
    torch.testing.assert_close(ops.mean_inputs([h])[0].double(), h.double().mean(0), rtol=0, atol=1e-6)  # ATen's float32 sum
    assert ops.mean_inputs([torch.zeros(0, 3)])[0].isnan().all()
    assert ops.mean_inputs([]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_average(share, dtype):
    shapes = [(), (0,), (1,), (17, 3), (129,), (1000, 130)]
    new, old = ([torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(2))
    exact = [(1 - share) * x.double() + share * y.double() for x, y in zip(new, old, strict=True)]
    kept, versions = [y.clone() for y in old], [x._version for x in new]
    ops.average_(new, [y.T.contiguous().T if y.dim() == 2 else y for y in old], share)
    for x, y, e, before, version in zip(new, old, exact, kept, versions, strict=True):
        assert torch.equal(y, before)
        assert x._version > version
        torch.testing.assert_close(x.double(), e, rtol=1e-6 if dtype == torch.float32 else 1e-15, atol=4 * torch.finfo(dtype).eps)
    ops.average_([], [], 0.5)


def test_copy_on_write():
    originals = [torch.zeros(300, 300) for _ in range(3)]
    copies = [torch._lazy_clone(x) for x in originals]
    ops.average_(copies, [torch.ones(300, 300)] * 3, 0.5)
    assert all((x == 0).all() for x in originals)
    assert all((x == 0.5).all() for x in copies)


def test_numbers_that_are_not_finite_stay():
    for value in (float("nan"), float("inf")):
        x = torch.tensor([1.0, value])
        ops.average_([x], [torch.ones(2)], 0.5)
        assert not x[1].isfinite()
        assert not ops.mean_inputs([torch.tensor([[1.0, value], [2.0, 3.0]])])[0][1].isfinite()


def test_opcheck():
    h = [torch.randn(3, 4), torch.randn(2, 5)]
    opcheck(torch.ops.secondorder.mean_inputs.default, (h,))
    opcheck(torch.ops.secondorder.average_.default, (h, [x + 1 for x in h], 0.25))


@needs_kernels
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda h: ops.mean_inputs([h[0]]), ValueError, "mean_inputs: expected input with 2 dimensions, got 1"),
        (lambda h: ops.mean_inputs([h.half()]), TypeError, "expected input of dtype float32 or float64, got Half"),
        (lambda h: ops.average_([h], [], 0.5), ValueError, "expected lists of one length, got 1 new, 0 old"),
        (lambda h: ops.average_([h], [h[:2]], 0.5), ValueError, r"expected old of shape \[3, 4\], got \[2, 4\]"),
        (lambda h: ops.average_([h], [h.double()], 0.5), TypeError, "expected old of dtype Float as new, got Double"),
        (lambda h: ops.average_([h.T], [h.T], 0.5), ValueError, "expected a contiguous new, got strides"),
        (lambda h: ops.average_([h], [h], 1.0), ValueError, r"expected share in \[0, 1\), got 1"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3, 4))


# What test_fuzz.py changes without making it wrong: the dtypes of its tensors are independent.
FUZZ_ACCEPTED = {"mean_inputs": {"dtype"}}


def fuzz_cases(q):
    """Every operator with arguments made of the problem that test_fuzz.py draws."""
    o = torch.ops.secondorder
    return [
        (o.mean_inputs.default, ([q["d1"], q["w"]],)),
        (o.average_.default, ([q["h"].contiguous().clone(), q["s"].clone()], [q["h"], q["y"]], 0.5)),
    ]
