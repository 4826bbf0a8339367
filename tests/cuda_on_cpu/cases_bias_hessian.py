"""Activations' derivatives, and the bias Hessian's recursion by every kernel."""

import copy

import case_tools
import numpy as np
import torch
from case_tools import PARAMETERS, assert_accurate, case, double, exact_size, normal, placed, same, spd
from harness import Kernels

from secondorder import reference
from secondorder._tape.elementwise import KnownActivation, activation_function


@case
def activation_derivatives(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    for activation in case_tools.ACTIVATIONS:
        parameter = PARAMETERS.get(activation, 1.0)
        function = activation_function(KnownActivation(activation, parameter, torch.empty(0)))
        for dtype in case_tools.DTYPES:
            for n, offset in ((1, 0), (2, 1), (3, 0), (17, 1), (129, 0), (1028, 0), (1028, 1)):
                z = normal(rng, n, dtype=dtype, offset=offset)
                saved = z
                if activation not in ("identity", "softplus", "silu", "gelu", "gelu_tanh"):
                    saved = placed(function(same(z)).numpy(), offset)
                out = placed(np.full_like(z, np.nan), offset), placed(np.full_like(z, np.nan), offset)
                results = kernels.activation_derivatives(saved, activation, parameter, out)
                exact = reference.activation_derivatives(double(saved), activation, parameter)
                for result, x in zip(results, exact, strict=True):
                    np.testing.assert_allclose(result, x.numpy(), rtol=0, atol=2e-6 if dtype is np.float32 else 1e-14)


@case
def activation_derivatives_far_from_zero(kernels: Kernels) -> None:
    """Up to the largest number, and at infinity, where powers of z overflow."""
    for activation in ("softplus", "silu", "gelu", "gelu_tanh"):
        for dtype in case_tools.DTYPES:
            far = np.array([20.0, 1e3, 1e9, 2e10, 1e20, np.finfo(dtype).max, np.inf], dtype)
            z = exact_size(np.concatenate([-far, far]))
            out = exact_size(np.full_like(z, np.nan)), exact_size(np.full_like(z, np.nan))
            results = kernels.activation_derivatives(z, activation, 1.0, out)
            for result, x in zip(results, reference.activation_derivatives(same(z), activation, 1.0), strict=True):
                np.testing.assert_allclose(result, x.numpy(), rtol=0, atol=2e-6 if dtype is np.float32 else 1e-14)


def check_bias_hessian(
    kernels: Kernels,
    k: int,
    n: int,
    m: int,
    dtype: type,
    diagonal: bool,
    large: bool,
    offset: int | None,
    gamma: float,
    arithmetic: str = "plain",
) -> None:
    rng = np.random.default_rng(k * n + m)
    hessian = spd(rng, k, dtype)
    weight, d1, d2, grad = (normal(rng, r, n, dtype=dtype, offset=offset) for r in (k, m, m, m))
    extra = (d2, grad) if diagonal else (None, None)
    result = kernels.bias_hessian(
        hessian, weight, d1, *extra, gamma, arithmetic=arithmetic, multiprocessors=1 if large else 1 << 20
    )
    arguments = (hessian, weight, d1, *extra)
    exact = reference.bias_hessian(*map(double, arguments), gamma)
    assert_accurate(result, exact, reference.bias_hessian(*map(same, arguments), gamma))
    np.testing.assert_array_equal(result, result.T)


@case
def bias_hessian_small_tile(kernels: Kernels) -> None:
    for dtype in case_tools.DTYPES:
        for k, n, m in ((1, 1, 1), (2, 3, 1), (3, 2, 17), (17, 64, 16), (16, 65, 33), (129, 130, 15), (5, 192, 2)):
            check_bias_hessian(kernels, k, n, m, dtype, True, False, None, -1.0)
        check_bias_hessian(kernels, 17, 68, 19, dtype, False, False, 0, 0.0)
        check_bias_hessian(kernels, 17, 68, 19, dtype, True, False, 1, -0.5)
        check_bias_hessian(kernels, 0, 3, 2, dtype, True, False, None, -1.0)


@case
def bias_hessian_parts(kernels: Kernels) -> None:
    """A batch divided among blocks, whose last part is shorter than the others or as long."""
    for dtype in case_tools.DTYPES:
        for k, n, m, diagonal, offset in ((3, 5, 256, True, None), (2, 68, 300, True, 0), (1, 66, 385, False, 1)):
            check_bias_hessian(kernels, k, n, m, dtype, diagonal, False, offset, -0.5)


@case
def bias_hessian_large_tile(kernels: Kernels) -> None:
    for k, n, m, offset in ((1, 1, 1, None), (17, 129, 18, None), (3, 132, 33, 0), (18, 256, 5, 1)):
        check_bias_hessian(kernels, k, n, m, np.float32, True, True, offset, -1.0)


@case
def bias_hessian_split_tf32(kernels: Kernels) -> None:
    """On tensor cores with split numbers: float32's accuracy, judged as the plain kernel is."""
    for k, n, m, offset in ((1, 1, 1, None), (2, 3, 17, None), (17, 65, 16, None), (129, 66, 300, None), (3, 132, 33, 0)):
        check_bias_hessian(kernels, k, n, m, np.float32, True, False, offset, -1.0, "split_tf32")
    check_bias_hessian(kernels, 17, 130, 40, np.float32, True, True, None, -1.0, "split_tf32")


@case
def bias_hessian_tf32(kernels: Kernels) -> None:
    """Each factor of each product is off by at most u = 2^-11 of itself: C = W^T (H W) by 4 u |W|^T |H| |W|, M = d1^T d1 by
    2 u |d1|^T |d1|, and G = C * M / m accordingly."""
    u = 2.0**-11
    for k, n, m, large in ((1, 1, 1, False), (17, 65, 33, False), (40, 129, 18, True), (3, 132, 33, True)):
        rng = np.random.default_rng(k)
        hessian, weight = spd(rng, k, np.float32), normal(rng, k, n, dtype=np.float32)
        d1, d2, grad = (normal(rng, m, n, dtype=np.float32) for _ in range(3))
        multiprocessors = 1 if large else 1 << 20
        result = kernels.bias_hessian(hessian, weight, d1, d2, grad, -1.0, arithmetic="tf32", multiprocessors=multiprocessors)
        exact = reference.bias_hessian(*map(double, (hessian, weight, d1, d2, grad)), -1.0).numpy()
        h, w, d = (np.abs(x.astype(np.float64)) for x in (hessian, weight, d1))
        curvature, moment = w.T @ h @ w, d.T @ d / m
        float32 = (2 * k + m + 8) * 2.0**-23  # of the sums
        bound = ((1 + 4.01 * u + float32) * (1 + 2.01 * u + float32) - 1) * curvature * moment + 2.0**-22 * np.abs(exact)
        assert (np.abs(result - exact) <= bound).all()
        np.testing.assert_array_equal(result, result.T)
        plain = kernels.bias_hessian(hessian, weight, d1, d2, grad, -1.0, multiprocessors=multiprocessors)
        assert np.abs(result - exact).max() > 4 * np.abs(plain - exact).max()  # the switch switches


@case
def bias_hessian_not_finite(kernels: Kernels) -> None:
    """NaN and inf come out of every arithmetic as something that is not finite, where plain PyTorch has it so."""
    for arithmetic in ("plain", "split_tf32", "tf32"):
        for bad in (np.nan, np.inf, -np.inf):
            rng = np.random.default_rng(2)
            arguments = [spd(rng, 3, np.float32), *(normal(rng, rows, 70, dtype=np.float32) for rows in (3, 5, 5, 5))]
            for which in (1, 2):
                poisoned = copy.deepcopy(arguments)
                poisoned[which][1, 66] = bad
                result = kernels.bias_hessian(*poisoned, -1.0, arithmetic=arithmetic)
                plain = reference.bias_hessian(*map(same, poisoned), -1.0).numpy()
                np.testing.assert_array_equal(np.isfinite(result), np.isfinite(plain))


@case
def bias_hessian_activation(kernels: Kernels) -> None:
    rng = np.random.default_rng(1)
    k, n, m = 5, 67, 19
    for dtype in case_tools.DTYPES:
        hessian, weight, grad = spd(rng, k, dtype), normal(rng, k, n, dtype=dtype), normal(rng, m, n, dtype=dtype)
        for activation in case_tools.ACTIVATIONS:
            parameter = PARAMETERS.get(activation, 1.0)
            saved = exact_size((np.abs(normal(rng, m, n, dtype=dtype)) / 8).astype(dtype))  # any activation's output
            for g in (grad, None):
                result = kernels.bias_hessian(hessian, weight, saved, None, g, -1.0, activation, parameter)
                exact, plain = (
                    reference.bias_hessian(
                        convert(hessian), convert(weight),
                        *reference.activation_derivatives(convert(saved), activation, parameter), convert(g), -1.0,
                    )
                    for convert in (double, same)
                )  # fmt: skip
                assert_accurate(result, exact, plain)


@case
def bias_hessian_large_batch(kernels: Kernels) -> None:
    """With d1 = 0 the diagonal alone is left: float64 sums over the batch, rounded once."""
    rng = np.random.default_rng(17)
    k, n, m = 1, 3, case_tools.BATCH
    hessian, weight = spd(rng, k, np.float32), normal(rng, k, n, dtype=np.float32)
    d2, grad = (exact_size((0.5 + rng.random((m, n))).astype(np.float32)) for _ in range(2))
    result = kernels.bias_hessian(hessian, weight, np.zeros((m, n), np.float32), d2, grad, -1.0, multiprocessors=1)
    expected = np.diag((d2.astype(np.float64) * grad.astype(np.float64)).sum(0))
    np.testing.assert_allclose(result, expected, rtol=2 * np.finfo(np.float32).eps)


@case
def bias_hessian_of_products(kernels: Kernels) -> None:
    """From products whose upper triangles, which are not read, hold NaN."""
    rng = np.random.default_rng(7)
    for dtype in case_tools.DTYPES:
        for n, m, diagonal in ((1, 3, True), (31, 5, False), (65, 7, True), (96, 2, True)):
            products = [normal(rng, n, n, dtype=dtype) for _ in range(2)]
            for product in products:
                product[np.triu_indices(n, 1)] = np.nan
            sums = normal(rng, n, dtype=np.float64) if diagonal else None
            result = kernels.bias_hessian_of_products(m, *products, sums, -0.5)
            lower = np.tril(products[0].astype(np.float64) * products[1] / m)
            expected = np.tril(lower, -1) + np.tril(lower).T
            if diagonal:
                expected += np.diag(np.where(sums < 0, -0.5 * sums, sums))
            np.testing.assert_allclose(result, expected, rtol=8 * np.finfo(dtype).eps, atol=8 * np.finfo(dtype).eps)
            np.testing.assert_array_equal(result, result.T)
