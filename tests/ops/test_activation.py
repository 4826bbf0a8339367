import math
import warnings

import pytest
import torch
from helpers.kernels import needs_kernels
from oracles import assert_as_accurate, scalar_derivatives
from torch.library import opcheck
from torch.nn import functional as F

from secondorder import ops, reference

# name -> (the activation, parameter, whether the operator takes its output)
ACTIVATIONS = {
    "identity": (lambda z: z * 1, 1.0, True),
    "sigmoid": (torch.sigmoid, 1.0, True),
    "tanh": (torch.tanh, 1.0, True),
    "relu": (torch.relu, 1.0, True),
    "leaky_relu": (lambda z: F.leaky_relu(z, 0.2), 0.2, True),
    "elu": (lambda z: F.elu(z, 0.7), 0.7, True),
    "softplus": (lambda z: F.softplus(z, 2.5), 2.5, False),
    "silu": (F.silu, 1.0, False),
    "gelu": (F.gelu, 1.0, False),
    "gelu_tanh": (lambda z: F.gelu(z, approximate="tanh"), 1.0, False),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_match_autograd_element_by_element(name):
    function, parameter, from_output = ACTIVATIONS[name]
    z = torch.cat([torch.linspace(-12, 12, 141), torch.tensor([-30.0, -1e-3, 1e-3, 0.5, 30.0])]).double()
    if name in ("relu", "leaky_relu", "elu"):
        z = z[z != 0]  # autograd's one-sided choice at the kink has a test of its own
    exact = scalar_derivatives(function, z)
    for dtype in (torch.float64, torch.float32):
        point = z.to(dtype)
        saved = function(point) if from_output else point
        # What autograd gives at the same dtype, where double backward is written without cancellation or with it alike.
        plain = scalar_derivatives(function, point)
        for module in (ops, reference):
            for a, p, e in zip(module.activation_derivatives(saved, name, parameter), plain, exact, strict=True):
                assert a.dtype == dtype
                assert_as_accurate(a, p, e, ulps=32)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu"])
def test_kinks_are_torchs(name):
    function, parameter, _ = ACTIVATIONS[name]
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(function(z), z)
    for module in (ops, reference):
        d1, _ = module.activation_derivatives(function(z).detach(), name, parameter)
        assert d1.item() == expected.item()


LIMITS = {"identity": (1.0, 1.0), "sigmoid": (0.0, 0.0), "tanh": (0.0, 0.0), "leaky_relu": (0.2, 1.0)}  # of d1; others 0 and 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_far_from_zero_are_autograds_or_their_limits(name, dtype):
    """Up to the largest number, and at infinity. There autograd's own are NaN where a power of z has overflowed."""
    function, parameter, from_output = ACTIVATIONS[name]
    largest = torch.finfo(dtype).max
    far = torch.cat([torch.logspace(0, math.log10(largest), 400, dtype=torch.float64)[:-1], torch.tensor([largest, math.inf])])
    z = torch.cat([-far, far]).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of the overflow
        plain = scalar_derivatives(function, z)
    limits = [torch.where(z < 0, *map(z.new_tensor, LIMITS.get(name, (0.0, 1.0)))), torch.zeros_like(z)]
    for module in (ops, reference):
        found = module.activation_derivatives(function(z).nan_to_num() if from_output else z, name, parameter)
        for a, p, limit in zip(found, plain, limits, strict=True):
            assert a.isfinite().all()
            known = p.isfinite()
            torch.testing.assert_close(a[known], p[known], rtol=32 * torch.finfo(dtype).eps, atol=32 * torch.finfo(dtype).eps)
            assert torch.equal(a[z.abs() > 1e4], limit[z.abs() > 1e4])
    nan = z.new_tensor([math.nan])
    if not from_output:
        assert all(d.isnan().all() for module in (ops, reference) for d in module.activation_derivatives(nan, name, parameter))


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (3, 17), (2, 129, 3), (1000, 70)])
def test_shapes_and_strides(shape):
    saved = torch.rand(*shape, 2)[..., 1]
    d1, d2 = ops.activation_derivatives(saved, "sigmoid")
    r1, r2 = reference.activation_derivatives(saved, "sigmoid")
    assert d1.shape == d2.shape == saved.shape
    torch.testing.assert_close(d1, r1)
    torch.testing.assert_close(d2, r2)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_opcheck(name):
    opcheck(torch.ops.secondorder.activation_derivatives.default, (torch.rand(3, 4), name, 0.5))


@needs_kernels
def test_bad_input():
    with pytest.raises(TypeError, match="expected saved of dtype float32 or float64, got Long"):
        ops.activation_derivatives(torch.arange(3), "relu")
    with pytest.raises(ValueError, match="expected activation to be one of"):
        ops.activation_derivatives(torch.rand(3), "swish")
    with pytest.raises(ValueError, match="expected a parameter > 0 for activation 'softplus', got 0"):
        ops.activation_derivatives(torch.rand(3), "softplus", 0.0)


# What test_fuzz.py changes without making it wrong: elementwise, on one tensor.
FUZZ_ACCEPTED = {"activation_derivatives": {"dtype", "dimension", "scalar"}}


def fuzz_cases(q):
    """Every operator with arguments made of the problem that test_fuzz.py draws."""
    return [(torch.ops.secondorder.activation_derivatives.default, (q["d1"], "gelu", 1.0))]
