import pytest
import torch
from helpers.kernels import needs_kernels
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_as_accurate, random_psd
from torch.library import opcheck

from secondorder import ops, reference

# (n_out, n_in): around the widths of register tiles, strips and tiles
SIZES = [
    (1, 1),
    (1, 300),
    (300, 1),
    (2, 3),
    (3, 17),
    (17, 129),
    (129, 17),
    (31, 33),
    (64, 128),
    (130, 257),
    (1000, 60),
    (97, 1000),
]
SIDES = ["both", "left", "right"]


def problem(n_out, n_in, sides, dtype):
    torch.manual_seed(n_out + n_in)
    left, right = random_psd(n_out, dtype), random_psd(n_in, dtype)
    gradient = torch.randn(n_out, n_in, dtype=torch.float64).to(dtype)
    return left if sides != "right" else None, gradient, right if sides != "left" else None


def exact(left, gradient, right):
    result = gradient.double()
    if left is not None:
        result = torch.einsum("ij,jk->ik", left.double(), result)
    return result if right is None else torch.einsum("ij,jk->ik", result, right.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_product(size, sides, dtype):
    arguments = problem(*size, sides, dtype)
    actual = ops.precondition(*arguments)
    assert actual.dtype == dtype
    assert actual.shape == size
    # In float64 the oracle is rounded as plain PyTorch is.
    assert_as_accurate(actual, reference.precondition(*arguments), exact(*arguments), ulps=8 if dtype == torch.float32 else 64)


def test_the_identity_copies():
    gradient = torch.randn(3, 4)
    result = ops.precondition(None, gradient, None)
    assert torch.equal(result, gradient)
    assert result.data_ptr() != gradient.data_ptr()


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("sides", SIDES)
def test_empty(size, sides):
    assert ops.precondition(*problem(*size, sides, torch.float32)).shape == size


@given(n_out=st.integers(1, 80), n_in=st.integers(1, 80), sides=st.sampled_from(SIDES), threads=st.sampled_from([1, 2, 5]))
def test_any_size_strides_and_threads(n_out, n_in, sides, threads):
    left, gradient, right = problem(n_out, n_in, sides, torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = ops.precondition(
            None if left is None else left.T,
            gradient.T.contiguous().T,
            None if right is None else right.T,
        )
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(actual, exact(left, gradient, right))


def test_nan_is_not_lost():
    for position in range(3):
        arguments = list(problem(6, 9, "both", torch.float32))
        arguments[position] = arguments[position].clone()
        arguments[position].view(-1)[-1] = float("nan")
        assert not torch.isfinite(ops.precondition(*arguments)).all()


def test_opcheck():
    for sides in SIDES:
        opcheck(torch.ops.secondorder.precondition.default, problem(5, 7, sides, torch.float32))


@needs_kernels
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.__setitem__(0, a[0][:4]), ValueError, r"expected left of shape \[5, 5\], got \[4, 5\]"),
        (lambda a: a.__setitem__(2, a[2][:, :6]), ValueError, r"expected right of shape \[7, 7\], got \[7, 6\]"),
        (lambda a: a.__setitem__(1, a[1][0]), ValueError, "expected gradient with 2 dimensions, got 1"),
        (lambda a: a.__setitem__(0, a[0].double()), TypeError, "expected left of dtype Float as gradient, got Double"),
        (lambda a: a.__setitem__(1, a[1].half()), TypeError, "expected gradient of dtype float32 or float64, got Half"),
    ],
)
def test_bad_input(change, error, message):
    arguments = list(problem(5, 7, "both", torch.float32))
    change(arguments)
    with pytest.raises(error, match=message):
        ops.precondition(*arguments)


def fuzz_cases(q):
    """Every operator with arguments made of the problem that test_fuzz.py draws."""
    o, right = torch.ops.secondorder.precondition, torch.outer(q["a"], q["a"])
    return [(o.default, (q["h"], q["b"], right)), (o.default, (None, q["b"], right))]
