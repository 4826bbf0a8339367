import pytest
import torch
from helpers.kernels import needs_kernels
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_as_accurate
from torch.func import hessian
from torch.library import opcheck
from torch.nn import functional as F

from secondorder import ops, reference


def exact(output, target, mean):
    """The sum of the instances' Hessians of PyTorch's own loss, in float64."""

    def loss(z, y):
        return F.cross_entropy(z.unsqueeze(0), y.unsqueeze(0), ignore_index=1, reduction="sum")

    total = torch.func.vmap(hessian(loss))(output.double(), target.long()).sum(0)
    return total / (target != 1).sum() if mean else total


@given(
    m=st.sampled_from([1, 2, 17, 129, 1000]),
    k=st.sampled_from([1, 2, 3, 17, 129]),
    mean=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    integers=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    seed=st.integers(0, 100),
)
def test_is_autograds(m, k, mean, dtype, integers, seed):
    torch.manual_seed(seed)
    output, target = 3 * torch.randn(k, m, dtype=dtype).T, torch.randint(k, (m,)).to(integers)
    target[0] = 0  # one that counts
    actual = ops.cross_entropy_hessian(output, target, 1, mean)
    assert actual.dtype == dtype
    if dtype is torch.float64:
        torch.testing.assert_close(actual, exact(output, target, mean), rtol=1e-11, atol=1e-13)
    else:
        assert_as_accurate(actual, reference.cross_entropy_hessian(output, target, 1, mean), exact(output, target, mean))


def test_large_logits_do_not_overflow():
    output = torch.tensor([[1e4, -1e4, 0.0], [3e38, -3e38, 3e38]])
    half = torch.tensor([[0.25, 0.0, -0.25], [0.0, 0.0, 0.0], [-0.25, 0.0, 0.25]])
    torch.testing.assert_close(ops.cross_entropy_hessian(output, torch.tensor([0, 1]), mean=False), half)


@pytest.mark.parametrize("shape", [(5, 3), (1000, 129)])
def test_nothing_that_counts_and_numbers_that_are_not_finite(shape):
    output, ignored = torch.randn(shape), torch.full(shape[:1], -100)
    assert ops.cross_entropy_hessian(output, ignored).isnan().all()
    assert not ops.cross_entropy_hessian(output, ignored, mean=False).any()
    for mean in (False, True):
        assert torch.equal(ops.cross_entropy_hessian(output[:0], ignored[:0], mean=mean), torch.zeros(shape[1], shape[1]))
    output[1, 2] = float("nan")
    target = torch.zeros_like(ignored)
    assert ops.cross_entropy_hessian(output, target).isnan().any()
    target[1] = -100
    assert ops.cross_entropy_hessian(output, target).isfinite().all()


@pytest.mark.parametrize("m", [2, 50])  # either side of where plain loops end
def test_class_156_of_uint8_targets_counts(m):
    output, target = torch.randn(m, 200), torch.full((m,), 156, dtype=torch.uint8)
    torch.testing.assert_close(ops.cross_entropy_hessian(output, target), ops.cross_entropy_hessian(output, target.long()))


def test_opcheck():
    opcheck(torch.ops.secondorder.cross_entropy_hessian.default, (torch.randn(4, 3), torch.tensor([0, 1, 2, 1]), 1, True))


@needs_kernels
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"output": torch.zeros(3)}, ValueError, "expected output with 2 dimensions, got 1"),
        ({"output": torch.zeros(4, 3).half()}, TypeError, "expected output of dtype float32 or float64, got Half"),
        ({"target": torch.zeros(4)}, TypeError, "expected target with class indices, got dtype Float"),
        ({"target": torch.zeros(4, 3).long()}, ValueError, r"expected target of shape \[4\], got \[4, 3\]"),
        ({"target": torch.zeros(5).long()}, ValueError, r"expected target of shape \[4\], got \[5\]"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match="cross_entropy_hessian: " + message):
        ops.cross_entropy_hessian(**{"output": torch.zeros(4, 3), "target": torch.zeros(4).long()} | change)


# What test_fuzz.py changes without making it wrong: the dtypes of its two tensors are independent.
FUZZ_ACCEPTED = {"cross_entropy_hessian": {"dtype", "integer"}}


def fuzz_cases(q):
    """Every operator with arguments made of the problem that test_fuzz.py draws."""
    return [(torch.ops.secondorder.cross_entropy_hessian.default, (q["d1"], torch.arange(len(q["d1"])) % 3, 1, True))]
