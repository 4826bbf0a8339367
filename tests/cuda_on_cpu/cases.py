"""Every kernel on awkward sizes against float64 oracles. As a script, `cases.py LIBRARY` runs the jobs that it reads as JSON,
each in a process of its own (AddressSanitizer must be loaded before Python)."""

import copy
import gc
import itertools
import json
import math
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import ACTIVATIONS, BfgsLayer, Device, EacgLayer, EigenMatrix, Kernels

from secondorder import ops, reference

DTYPES = (np.float32, np.float64)
BATCH = 20000  # a large one
PARAMETERS = {"leaky_relu": 0.1, "elu": 1.3, "softplus": 0.7}
CASES: dict[str, Callable[[Kernels], None]] = {}


def case(function: Callable[[Kernels], None]) -> Callable[[Kernels], None]:
    """Registers a case under its name."""
    CASES[function.__name__] = function
    return function


def placed(array: np.ndarray, offset: int = 0) -> np.ndarray:
    """A copy in an allocation of its own, 64-byte aligned plus `offset` elements, that ends where the array does."""
    skip = -(-64 // array.itemsize)
    base = np.full(array.size + skip + offset, np.nan, array.dtype)
    first = -base.ctypes.data % 64 // array.itemsize + offset
    view = base[first : first + array.size].reshape(array.shape)
    view[...] = array
    return view


def exact_size(array: np.ndarray) -> np.ndarray:
    """A copy whose allocation has the array's size to the byte, for AddressSanitizer."""
    return np.array(array, copy=True, order="C")


def normal(rng: np.random.Generator, *shape: int, dtype: type, offset: int | None = None) -> np.ndarray:
    """Normal numbers: `offset` None for an allocation of exact size, else from alignment on."""
    array = rng.standard_normal(shape).astype(dtype)
    return exact_size(array) if offset is None else placed(array, offset)


def spd(rng: np.random.Generator, n: int, dtype: type) -> np.ndarray:
    """A symmetric positive definite matrix with eigenvalues from about 0.1 to 3."""
    q = rng.standard_normal((n, n)) / max(n, 1) ** 0.5
    return exact_size((q @ q.T + 0.1 * np.eye(n)).astype(dtype))


def double(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array.astype(np.float64))


def same(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array)


def assert_accurate(actual: np.ndarray, exact: torch.Tensor, plain: torch.Tensor, slack: float = 16) -> None:
    """The error is at most twice that of plain PyTorch at the same dtype, plus `slack` roundings of the largest number."""
    exact_array = exact.numpy()
    assert actual.shape == exact_array.shape
    if actual.size == 0:
        return
    error = np.abs(actual - exact_array).max()
    allowed = 2 * np.abs(plain.numpy() - exact_array).max()
    allowed += slack * np.finfo(actual.dtype).eps * np.abs(exact_array).max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@case
def activation_derivatives(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    for activation in ACTIVATIONS:
        parameter = PARAMETERS.get(activation, 1.0)
        function, _ = reference._ACTIVATIONS[activation]
        for dtype in DTYPES:
            for n, offset in ((1, 0), (2, 1), (3, 0), (17, 1), (129, 0), (1028, 0), (1028, 1)):
                z = normal(rng, n, dtype=dtype, offset=offset)
                saved = z
                if activation not in ("identity", "softplus", "silu", "gelu", "gelu_tanh"):
                    saved = placed(function(same(z), parameter).numpy(), offset)
                out = placed(np.full_like(z, np.nan), offset), placed(np.full_like(z, np.nan), offset)
                results = kernels.activation_derivatives(saved, activation, parameter, out)
                exact = reference.activation_derivatives(double(saved), activation, parameter)
                for result, x in zip(results, exact, strict=True):
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
    for dtype in DTYPES:
        for k, n, m in ((1, 1, 1), (2, 3, 1), (3, 2, 17), (17, 64, 16), (16, 65, 33), (129, 130, 15), (5, 192, 2)):
            check_bias_hessian(kernels, k, n, m, dtype, True, False, None, -1.0)
        check_bias_hessian(kernels, 17, 68, 19, dtype, False, False, 0, 0.0)
        check_bias_hessian(kernels, 17, 68, 19, dtype, True, False, 1, -0.5)
        check_bias_hessian(kernels, 0, 3, 2, dtype, True, False, None, -1.0)


@case
def bias_hessian_parts(kernels: Kernels) -> None:
    """A batch divided among blocks, whose last part is shorter than the others or as long."""
    for dtype in DTYPES:
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
    for dtype in DTYPES:
        hessian, weight, grad = spd(rng, k, dtype), normal(rng, k, n, dtype=dtype), normal(rng, m, n, dtype=dtype)
        for activation in ACTIVATIONS:
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
    k, n, m = 1, 3, BATCH
    hessian, weight = spd(rng, k, np.float32), normal(rng, k, n, dtype=np.float32)
    d2, grad = (exact_size((0.5 + rng.random((m, n))).astype(np.float32)) for _ in range(2))
    result = kernels.bias_hessian(hessian, weight, np.zeros((m, n), np.float32), d2, grad, -1.0, multiprocessors=1)
    expected = np.diag((d2.astype(np.float64) * grad.astype(np.float64)).sum(0))
    np.testing.assert_allclose(result, expected, rtol=2 * np.finfo(np.float32).eps)


@case
def bias_hessian_of_products(kernels: Kernels) -> None:
    """From products whose upper triangles, which are not read, hold NaN."""
    rng = np.random.default_rng(7)
    for dtype in DTYPES:
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


def eacg_layers(rng: np.random.Generator, dtype: type, sizes: list[tuple[int, int]], offset: int | None) -> list[EacgLayer]:
    layers = []
    for index, (n_out, n_in) in enumerate(sizes):
        # Each operand at an offset of its own: alignment is to be looked at for every one of them.
        offsets = [offset if index % 4 == k else 0 for k in range(4)] if offset else [offset] * 4
        weights = [normal(rng, n_out, n_in, dtype=dtype, offset=o) for o in offsets[:3]]
        biases = [normal(rng, n_out, dtype=dtype) for _ in range(3)] if index % 3 != 2 else [None] * 3
        layers.append(
            EacgLayer(
                spd(rng, n_out, dtype),
                normal(rng, n_in, dtype=dtype, offset=offsets[3]),
                weights[0],
                biases[0],
                weights[1],
                biases[1],
                weights[2],
                biases[2],
                alpha=0.1 + 0.1 * (index % 3),
                lr=0.3 + 0.1 * (index % 4),
                momentum=0.9 - 0.1 * (index % 3),
                weight_decay=0.01 * (index % 5),
            )
        )
    return layers


def bounded(solution: tuple[torch.Tensor, ...], max_norm: float) -> tuple[torch.Tensor, ...]:
    """P and d, shortened where they are longer than this together."""
    factor = min(1.0, max_norm / max(1e-300, float(torch.cat([x.flatten() for x in solution[:2]]).norm())))
    return *(x * factor for x in solution[:2]), solution[2]


def check_eacg(
    kernels: Kernels, layers: list[EacgLayer], max_iter: int, tol: float, truncated: bool, update: bool, device: Device
) -> None:
    before = copy.deepcopy(layers)
    iterations = kernels.eacg(layers, max_iter, tol, truncated, update, device)
    for index, (layer, old) in enumerate(zip(layers, before, strict=True)):
        arguments = (old.bias_hessian, old.mean_input, old.grad_weight, old.grad_bias)
        settings = (old.alpha, max_iter, tol, truncated)
        exact, plain = (bounded(reference.eacg_solve(*map(f, arguments), *settings), old.max_norm) for f in (double, same))
        if old.weight.dtype == np.float64 and tol > 0:  # to 0 exactly, roundings decide
            assert iterations[index] == exact[2]
        pairs = [(layer.weight, old.weight, old.weight_momentum, layer.weight_momentum, 0)]
        if old.bias is not None:
            pairs.append((layer.bias, old.bias, old.bias_momentum, layer.bias_momentum, 1))
        for result, parameter, velocity, new_velocity, which in pairs:
            expected = []
            for convert, direction in ((double, exact[which]), (same, plain[which])):
                if update and velocity is not None:
                    direction = old.momentum * convert(velocity) + direction
                velocity_expected = direction
                if update:
                    direction = (1 - old.lr * old.weight_decay) * convert(parameter) + old.lr * direction
                expected.append((direction, velocity_expected))
            # Conjugate gradients amplify roundings differently in every order of summation.
            assert_accurate(result, expected[0][0], expected[1][0], slack=400)
            if update and velocity is not None:
                assert_accurate(new_velocity, expected[0][1], expected[1][1], slack=400)


NET = [(1, 1), (2, 3), (3, 17), (129, 65), (17, 2), (10, 257), (64, 128), (12, 32), (8, 64), (5, 68), (9, 128)]


@case
def eacg_solve(kernels: Kernels) -> None:
    for dtype in DTYPES:
        for truncated in (False, True):
            layers = eacg_layers(np.random.default_rng(3), dtype, NET, None)
            check_eacg(kernels, layers, 8, 1e-3, truncated, False, Device(multiprocessors=12))


@case
def eacg_update(kernels: Kernels) -> None:
    for dtype in DTYPES:
        for truncated in (False, True):
            layers = eacg_layers(np.random.default_rng(4), dtype, NET, 0 if truncated else 1)
            if truncated:
                for layer in layers:
                    layer.weight_momentum = layer.bias_momentum = None
            check_eacg(kernels, layers, 5, 0.0, truncated, True, Device(multiprocessors=12))


@case
def eacg_bounded(kernels: Kernels) -> None:
    """Layers without a bound, within theirs and beyond it, with and without a bias; a layer within it is as without."""
    for dtype in DTYPES:
        for truncated in (False, True):
            layers = eacg_layers(np.random.default_rng(8), dtype, [*NET, (4, 3)], 0)
            layers[-1].mean_input[:] = 0
            for index, layer in enumerate(layers):
                layer.max_norm = [np.inf, 1e6, 0.5, 0.01][index % 4]
            unbounded = copy.deepcopy(layers)
            for layer in unbounded:
                layer.max_norm = np.inf
            check_eacg(kernels, layers, 5, 0.0, truncated, True, Device(multiprocessors=12))
            kernels.eacg(unbounded, 5, 0.0, truncated, True, Device(multiprocessors=12))
            for index, (layer, free) in enumerate(zip(layers, unbounded, strict=True)):
                same_weight = np.array_equal(layer.weight, free.weight)
                assert same_weight == (index % 4 < 2), index


@case
def eacg_every_plan(kernels: Kernels) -> None:
    """Fewer multiprocessors than layers, groups of blocks, and vectors or H that do not fit shared memory."""
    # The last but one: H of 80 rows fits but for the kernel's static shared memory.
    for multiprocessors, shared_bytes in ((1, 64 << 10), (3, 5000), (16, 2000), (1, 56900), (16, 20000)):
        sizes = [(80, 2)] if shared_bytes == 56900 else [(3, 5), (130, 9), (97, 4), (65, 3), (80, 2)]
        layers = eacg_layers(np.random.default_rng(5), np.float64, sizes, None)
        check_eacg(kernels, layers, 4, 0.0, True, True, Device(multiprocessors, shared_bytes))


@case
def eacg_more_layers_than_a_launch_holds(kernels: Kernels) -> None:
    sizes = [(1 + index % 5, 2 + index % 3) for index in range(131)]
    layers = eacg_layers(np.random.default_rng(16), np.float64, sizes, None)
    check_eacg(kernels, layers, 3, 0.0, False, True, Device(multiprocessors=200))


@case
def eacg_special(kernels: Kernels) -> None:
    """A zero mean input, a zero gradient, B all along the mean input, and layers without rows or columns."""
    rng = np.random.default_rng(6)
    for truncated in (False, True):
        layers = eacg_layers(rng, np.float64, [(5, 4), (5, 4), (6, 3)], None)
        layers[0].mean_input[:] = 0
        layers[1].grad_weight[:] = 0
        layers[1].grad_bias[:] = 0
        check_eacg(kernels, layers, 6, 1e-8, truncated, False, Device())
        empty = eacg_layers(rng, np.float64, [(0, 3), (2, 0), (4, 2)], None)
        kernels.eacg(empty, 3, 0.0, truncated, True, Device())
        assert np.isfinite(empty[2].weight).all()
        along = eacg_layers(rng, np.float64, [(7, 5)], None)
        along[0].grad_weight[:] = np.outer(rng.standard_normal(7), along[0].mean_input)
        kernels.eacg(along, 20, 1e-12, truncated, False, Device())
        s = along[0].mean_input @ along[0].mean_input
        system = 0.9 * s * along[0].bias_hessian + 0.1 * np.eye(7)
        exact = -np.linalg.solve(system, along[0].grad_weight)
        np.testing.assert_allclose(along[0].weight, exact, rtol=1e-7, atol=1e-9)


@case
def eacg_not_finite(kernels: Kernels) -> None:
    """A number that is not finite anywhere: no parameter changes anywhere, and -1 iterations where it was."""
    for name in ("bias_hessian", "mean_input", "grad_weight", "grad_bias"):
        for bad in (np.nan, np.inf):
            layers = eacg_layers(np.random.default_rng(7), np.float32, [(9, 5), (33, 7)], None)
            getattr(layers[1], name).flat[3] = bad
            before = copy.deepcopy(layers)
            iterations = kernels.eacg(layers, 3, 0.0, False, True, Device())
            assert iterations == [3, -1], (name, bad)
            for layer, old in zip(layers, before, strict=True):
                for result in ("weight", "bias", "weight_momentum", "bias_momentum"):
                    np.testing.assert_array_equal(getattr(layer, result), getattr(old, result))


@case
def eacg_overflow(kernels: Kernels) -> None:
    """As eacg_not_finite where an update, or the momentum some steps on, would leave float32's range: as on the CPU."""
    for name, change, refused in (
        ("grad_weight", {}, False),
        ("grad_weight", {"lr": 1e3}, True),
        ("grad_bias", {"lr": -1e3}, True),
        ("grad_weight", {"momentum": 0.99}, True),
        ("grad_bias", {"momentum": 0.99}, True),
        ("grad_bias", {"lr": 1e-30}, False),
    ):
        layers = eacg_layers(np.random.default_rng(15), np.float32, [(9, 31), (33, 7)], None)
        getattr(layers[0], name).flat[-1] = 1e36
        layers[0].momentum, layers[0].alpha = 0.0, 0.9
        for field, value in change.items():
            setattr(layers[0], field, value)
        before = copy.deepcopy(layers)
        iterations = kernels.eacg(layers, 3, 0.0, False, True, Device())
        assert iterations == [-1 if refused else 3, 3], (name, change)
        for layer, old in zip(layers, before, strict=True):
            results = ("weight", "bias", "weight_momentum", "bias_momentum")
            assert all(np.isfinite(getattr(layer, result)).all() for result in results)
            assert all(np.array_equal(getattr(layer, result), getattr(old, result)) for result in results) == refused
        tensors = ("bias_hessian", "mean_input", "grad_weight", "grad_bias", *results)
        numbers = ("lr", "alpha", "momentum", "weight_decay")
        on_cpu = ops.eacg_update_(
            *([same(getattr(layer, field)) for layer in before] for field in tensors),
            *([getattr(layer, field) for layer in before] for field in numbers),
            3, 0.0, False,
        )  # fmt: skip
        assert iterations == on_cpu.tolist()


def check_bfgs(kernels: Kernels, dtype: type, sizes: list[int]) -> None:
    rng = np.random.default_rng(8)
    layers = []
    for index, n in enumerate(sizes):
        h, s = spd(rng, n, dtype), normal(rng, n, dtype=dtype)
        y = exact_size((s + 0.3 * rng.standard_normal(n)).astype(dtype))
        if index % 3 == 1:  # one operand of three out of alignment
            y = placed(y, 1)
        elif index % 3 == 2:
            s = placed(s, 1)
        layers.append(BfgsLayer(h, s, y, np.full_like(s, np.nan), np.full_like(s, np.nan)))
    old = copy.deepcopy(layers)
    kernels.bfgs("double_damping", layers)
    for index, (layer, before) in enumerate(zip(layers, old, strict=True)):
        # The oracle in float64 of the very inputs: damping has no plain operator to compare with.
        s, y = damped(*(a.astype(np.float64) for a in (before.s, before.y, before.inverse_hessian)))
        tolerance = 1e-4 if dtype is np.float32 else 1e-10
        np.testing.assert_allclose(layer.damped_s, s, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(layer.damped_y, y, rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(layer.inverse_hessian, before.inverse_hessian)
        updated = bfgs(before.inverse_hessian.astype(np.float64), s, y)
        for mode in ("bfgs_update", "damped_bfgs_update"):
            given = (layer.damped_s, layer.damped_y) if mode == "bfgs_update" else (before.s, before.y)
            given = (
                placed(given[0], index % 3 == 2),
                placed(given[1], index % 3 == 1),
            )  # copies of exact size do not keep an offset
            result = BfgsLayer(exact_size(before.inverse_hessian), *given)
            status = kernels.bfgs(mode, [result])
            assert status[0] & 1
            scale = np.abs(updated).max()
            error = np.abs(result.inverse_hessian - updated).max() / scale
            assert error < (2e-3 if dtype is np.float32 else 1e-10), error
            np.testing.assert_array_equal(result.inverse_hessian, result.inverse_hessian.T)
    batch = copy.deepcopy(old)
    statuses = kernels.bfgs("damped_bfgs_update", batch)
    assert all(status & 1 for status in statuses), statuses
    for layer, single in zip(batch, copy.deepcopy(old), strict=True):
        kernels.bfgs("damped_bfgs_update", [single])
        np.testing.assert_array_equal(layer.inverse_hessian, single.inverse_hessian)


def damped(s: np.ndarray, y: np.ndarray, h: np.ndarray, mu1: float = 0.2, mu2: float = 0.001) -> tuple[np.ndarray, np.ndarray]:
    return damped_by_hy(s, y, h @ y, mu1, mu2)


def damped_by_hy(
    s: np.ndarray, y: np.ndarray, hy: np.ndarray, mu1: float = 0.2, mu2: float = 0.001
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 3 of Goldfarb, Ren & Bahamou, as printed, from H y."""
    yhy = y @ hy
    theta1 = (1 - mu1) * yhy / (yhy - s @ y) if s @ y < mu1 * yhy else 1
    s = theta1 * s + (1 - theta1) * hy
    theta2 = (1 - mu2) * (s @ s) / (s @ s - s @ y) if s @ y < mu2 * (s @ s) else 1
    return s, theta2 * y + (1 - theta2) * s


def bfgs(h: np.ndarray, s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(I - rho s y^T) H (I - rho y s^T) + rho s s^T."""
    rho, identity = 1 / (s @ y), np.eye(s.size)
    return (identity - rho * np.outer(s, y)) @ h @ (identity - rho * np.outer(y, s)) + rho * np.outer(s, s)


@case
def bfgs_update(kernels: Kernels) -> None:
    for dtype in DTYPES:
        check_bfgs(kernels, dtype, [1, 64, 128, 17, 129, 3, 2, 32])


@case
def bfgs_more_layers_than_a_launch_holds(kernels: Kernels) -> None:
    rng = np.random.default_rng(11)
    layers = []
    for n in range(1, 132):
        s = normal(rng, n % 5 + 1, dtype=np.float64)
        layers.append(BfgsLayer(spd(rng, s.size, np.float64), s, exact_size(s)))
    expected = [bfgs(layer.inverse_hessian, layer.s, layer.y) for layer in layers]
    assert kernels.bfgs("bfgs_update", layers) == [1] * len(layers)
    for layer, exact in zip(layers, expected, strict=True):
        np.testing.assert_allclose(layer.inverse_hessian, exact, rtol=1e-9, atol=1e-9)


# Which are too large to be watched word by word.
WITHOUT_RACE_CHECK = {"indices_beyond_32_bits"}


def sparse(*shape: int) -> np.ndarray:
    """Zeros of float32 that take memory only where they are written."""
    size = 4 * math.prod(shape)
    no_reserve = 0x4000  # which `mmap` has a name for from Python 3.13 on
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return np.frombuffer(memory, np.float32).reshape(shape)


@case
def indices_beyond_32_bits(kernels: Kernels) -> None:
    """The last block alone, of an array and of a matrix with more than 2^32 elements."""
    rng = np.random.default_rng(18)
    z, *out = (sparse(2**32 + 5) for _ in range(3))
    z[-5:] = rng.standard_normal(5)
    kernels.run_last_blocks(1)
    results = kernels.activation_derivatives(z, "softplus", 1.0, tuple(out))
    for result, exact in zip(results, reference.activation_derivatives(double(z[-5:]), "softplus", 1.0), strict=True):
        np.testing.assert_allclose(result[-5:], exact.numpy(), rtol=0, atol=2e-6)
    del z, out, results, result
    n = 65537  # the last row is alone in its block; H y is 0 in the others, which do not run
    h, s, y = sparse(n, n), np.zeros(n, np.float32), np.zeros(n, np.float32)
    last = slice(n - 3, n)
    h[-1, last], s[last], y[last] = [0.3, -0.7, 5], 1, rng.random(3)
    before = h[-1, last].astype(np.float64)
    hy = np.array([0, 0, before @ y[last]])
    rho = 1 / (s[last] @ y[last].astype(np.float64))
    expected = before - rho * (s[-1] * hy + hy[-1] * s[last]) + rho * (1 + rho * (y[last] @ hy)) * s[-1] * s[last]
    assert kernels.bfgs("bfgs_update", [BfgsLayer(h, s, y)]) == [1]
    np.testing.assert_allclose(h[-1, last], expected, rtol=1e-5)


@case
def hessian_action(kernels: Kernels) -> None:
    """Against the formula in float64, with room for what float32 makes of s = H a, to which the update is sensitive."""
    rng = np.random.default_rng(12)
    for dtype in DTYPES:
        layers = []
        for n in (1, 2, 3, 17, 129, 64):
            layers.append(BfgsLayer(spd(rng, n, dtype), normal(rng, n, dtype=dtype), None, matrix=spd(rng, n, dtype)))
        old = copy.deepcopy(layers)
        assert kernels.bfgs("hessian_action_update", layers, damping=0.3) == [1] * len(layers)
        for layer, before in zip(layers, old, strict=True):
            h, a, matrix = (x.astype(np.float64) for x in (before.inverse_hessian, before.s, before.matrix))
            exact = bfgs(h, h @ a, matrix @ (h @ a) + 0.3 * (h @ a))
            error = np.abs(layer.inverse_hessian - exact).max() / np.abs(exact).max()
            assert error < (2e-4 if dtype is np.float32 else 1e-12), error
            np.testing.assert_array_equal(layer.inverse_hessian, layer.inverse_hessian.T)
            np.testing.assert_array_equal(layer.s, before.s)
            np.testing.assert_array_equal(layer.matrix, before.matrix)
    refused = BfgsLayer(spd(rng, 5, np.float32), np.full(5, np.nan, np.float32), None, matrix=spd(rng, 5, np.float32))
    before = refused.inverse_hessian.copy()
    assert kernels.bfgs("hessian_action_update", [refused], damping=0.3) == [0]
    np.testing.assert_array_equal(refused.inverse_hessian, before)


def memory(rng: np.random.Generator, pairs: int, empty: int, n: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """S and Y of positive curvature, the first `empty` places free."""
    s = rng.standard_normal((pairs, n))
    y = s @ (0.5 * np.eye(n) + 0.5 * spd(rng, n, np.float64))
    s[:empty] = y[:empty] = 0
    return exact_size(s.astype(dtype)), exact_size(y.astype(dtype))


@case
def lbfgs_product(kernels: Kernels) -> None:
    """The middle between numpy's long products, against the two-loop recursion."""
    rng = np.random.default_rng(13)
    for dtype in DTYPES:
        for p, empty, n, k in ((1, 0, 1, 1), (2, 1, 3, 2), (3, 3, 4, 9), (33, 4, 50, 17), (40, 0, 129, 8)):
            s, y = memory(rng, p, empty, n, dtype)
            v = normal(rng, n, k, dtype=dtype)
            s64, y64 = s.astype(np.float64), y.astype(np.float64)
            columns = exact_size(np.concatenate([s, y]) @ v)
            kernels.lbfgs_middle(exact_size(s64 @ y64.T), exact_size(y64 @ y64.T), columns)
            result = v + np.concatenate([s, y]).T @ columns
            exact, plain = (reference.lbfgs_product(*map(f, (s, y, v))) for f in (double, same))
            assert_accurate(result, exact, plain, slack=400)


@case
def damped_lbfgs(kernels: Kernels) -> None:
    """The pairs after updates with every damping, refused ones, and more columns than a block has threads."""
    rng = np.random.default_rng(14)
    for dtype in DTYPES:
        layers, expected = [], []
        for index, (pairs, n) in enumerate(((1, 1), (2, 3), (5, 17), (3, 257), (4, 8), (4, 8), (2, 6))):
            s_pairs, y_pairs = memory(rng, pairs, 0, n, dtype)
            s, hy = normal(rng, n, dtype=dtype), normal(rng, n, dtype=dtype)
            y = exact_size((s * (1 if index % 2 else -1)).astype(dtype))
            hy = exact_size((y * (1e4 if index == 4 else 1)).astype(dtype))
            if index == 5:
                s[2] = np.nan
            if index == 6:
                s[:] = y[:] = hy[:] = 0
            layers.append(BfgsLayer(None, s, y, hy=hy, s_pairs=s_pairs, y_pairs=y_pairs))
            with np.errstate(invalid="ignore", divide="ignore"):
                pair = damped_by_hy(*(a.astype(np.float64) for a in (s, y, hy)))
            expected.append([np.concatenate([m[1:], new[None]]) for m, new in zip((s_pairs, y_pairs), pair, strict=True)])
        old = copy.deepcopy(layers)
        statuses = kernels.bfgs("damped_lbfgs_update", layers)
        assert [status & 1 for status in statuses] == [1, 1, 1, 1, 1, 0, 0]
        assert statuses[4] == 7
        for layer, before, exact, status in zip(layers, old, expected, statuses, strict=True):
            for name, pairs in zip(("s_pairs", "y_pairs"), exact, strict=True):
                if status & 1:
                    np.testing.assert_allclose(getattr(layer, name), pairs, rtol=1e-4 if dtype is np.float32 else 1e-12)
                else:
                    np.testing.assert_array_equal(getattr(layer, name), getattr(before, name))


@case
def bfgs_both_dampings(kernels: Kernels) -> None:
    rng = np.random.default_rng(9)
    h, s = spd(rng, 33, np.float64) * 1e4, normal(rng, 33, dtype=np.float64)
    # With a large H the first damping leaves s.y small against s.s, and the second acts too.
    layer = BfgsLayer(exact_size(h), s, exact_size(-s))
    exact = bfgs(h, *damped(s, -s, h))
    assert kernels.bfgs("damped_bfgs_update", [layer]) == [7]
    np.testing.assert_allclose(layer.inverse_hessian, exact, rtol=0, atol=1e-9 * np.abs(exact).max())


def within_bounds(s: np.ndarray, y: np.ndarray, h: np.ndarray, mu1: float, mu2: float) -> bool:
    """Whether y.Hy / s.y <= 1 / mu1 and s.s / s.y <= 1 / mu2, with room for the rounding of a pair that lies on a bound."""
    return mu1 * (y @ h @ y) <= 1.001 * (s @ y) and mu2 * (s @ s) <= 1.001 * (s @ y)


@case
def bfgs_bounded(kernels: Kernels) -> None:
    """Pairs by both rules, damped and not, dense and in limited memory, against the formulas in float64."""
    rng, mu1, mu2 = np.random.default_rng(19), 0.2, 0.5
    for dtype in DTYPES:
        seen = set()
        for n, rule in itertools.product((1, 17, 129, 300), ((False, False), (False, True), (True, True))):
            for sign, size in ((1, 1), (-1, 30), (1, 30), (1, 0.02)):
                h, s = spd(rng, n, dtype) * dtype(size), normal(rng, n, dtype=dtype)
                y = exact_size((sign * s + 0.3 * rng.standard_normal(n)).astype(dtype))
                s64, y64, h64 = (a.astype(np.float64) for a in (s, y, h))
                pair = damped(s64, y64, h64, mu1, mu2) if rule[0] else (s64, y64)
                taken = pair[0] @ pair[1] > 0 and (not rule[1] or within_bounds(*pair, h64, mu1, mu2))
                layer = BfgsLayer(exact_size(h), s, y)
                status = kernels.bfgs("damped_bfgs_update", [layer], mu1, mu2, damped=rule[0], bounded=rule[1])[0]
                assert (status & 1) == taken, (n, rule, sign, size)
                expected = bfgs(h64, *pair) if taken else h64
                error = np.abs(layer.inverse_hessian - expected).max() / np.abs(expected).max()
                assert error < (5e-3 if dtype is np.float32 else 1e-9), error
                s_pairs, y_pairs = memory(rng, 2, 0, n, dtype)
                hs, hy, hhy = (exact_size(v.astype(dtype)) for v in (h64 @ s64, h64 @ y64, h64 @ (h64 @ y64)))
                limited = BfgsLayer(None, s, y, hy=hy, hs=hs, hhy=hhy, s_pairs=s_pairs, y_pairs=y_pairs)
                before = s_pairs.copy(), y_pairs.copy()
                assert kernels.bfgs("damped_lbfgs_update", [limited], mu1, mu2, damped=rule[0], bounded=rule[1]) == [status]
                for memories, old, new in zip((s_pairs, y_pairs), before, pair, strict=True):
                    expected = np.concatenate([old[1:], new[None]]) if taken else old
                    np.testing.assert_allclose(memories, expected, rtol=1e-4, atol=1e-4 * np.abs(new).max())
                seen.add((rule, taken, int(status) & 6))
        assert {((True, True), False, 6), ((True, True), True, 2), ((False, True), False, 0), ((False, True), True, 0)} <= seen, (
            seen
        )


@case
def bfgs_refused(kernels: Kernels) -> None:
    """s.y <= 0, NaN and overflow leave H as it is."""
    rng = np.random.default_rng(10)
    for s, y in ((-1.0, 1.0), (0.0, 0.0), (np.nan, 1.0), (1e30, 1e-30)):
        h = spd(rng, 5, np.float32)
        layer = BfgsLayer(exact_size(h), np.full(5, s, np.float32), np.full(5, y, np.float32))
        assert kernels.bfgs("bfgs_update", [layer]) == [0]
        np.testing.assert_array_equal(layer.inverse_hessian, h)


def orthonormal(rng: np.random.Generator, k: int, n: int, dtype: type) -> np.ndarray:
    """k orthonormal rows of length n."""
    return exact_size(np.linalg.qr(rng.standard_normal((n, k)))[0].T.astype(dtype))


# n, p, ku, kv, whether there is a bias, and the rows of E that `last` holds, where there is E.
EIGEN_NET = [
    (1, 1, 0, 0, True, 1),
    (1, 1, 1, 1, True, 0),
    (3, 2, 0, 0, False, 2),
    (5, 1, 2, 0, True, 5),
    (1, 7, 0, 3, False, 1),
    (33, 65, 8, 8, True, 4),
    (64, 129, 1, 9, False, 3),
    (70, 257, 17, 16, True, 7),
    (17, 40, 17, 8, True, 0),
    (40, 17, 8, 17, True, 0),
    (40, 17, 3, 17, False, 0),
    (12, 9, 12, 9, True, 0),
    (9, 130, 9, 0, False, 0),
    (130, 6, 0, 6, True, 0),
    (35, 3, 0, 1, True, 35),
]
MANY = 131  # matrices, more than a launch holds


def eigen_net(rng: np.random.Generator, dtype: type, sizes: list[tuple[int, int, int, int, bool, int]]) -> list[EigenMatrix]:
    """Matrices with moments of some steps; a tenth of the gradient's elements is exactly zero."""
    net = []
    for index, (n, p, ku, kv, bias, sampled) in enumerate(sizes):
        c = kv + bias
        rest = (ku + (n if ku < n else 0)) * c + (ku * p if kv < p else 0)
        residual = n * p if ku < n and kv < p else 0
        shapes = {"grad_weight": (n, p), "grad_bias": (n if bias else 0,), "mean": (p if bias else 0,), "weight": (n, p)}
        shapes |= {"bias": (n if bias else 0,), "first": (rest + residual,), "last": (rest + sampled * p,)}
        arrays = {name: normal(rng, *shape, dtype=dtype) for name, shape in shapes.items()}
        arrays["grad_weight"][rng.random((n, p)) < 0.1] = 0
        if bias and n > 2:
            arrays["grad_bias"][1] = 0
        sketched, curved = index % 2 == 0, index % 3 == 2
        net.append(
            EigenMatrix(
                **arrays,
                basis_out=orthonormal(rng, ku, n, dtype),
                basis_in=orthonormal(rng, kv, p, dtype),
                second=exact_size((0.5 + rng.random(rest + residual)).astype(dtype)),
                size=np.full(1, 0.8 + 0.4 * (index % 2)),
                scale_out=exact_size((1 + rng.random(ku)).astype(dtype)),
                scale_in=exact_size((1 + rng.random(kv)).astype(dtype)),
                sketch=normal(rng, kv + 1, p, dtype=dtype) if sketched else np.zeros(0, dtype),
                bias_hessian=spd(rng, n, dtype) if curved else np.zeros(0, dtype),
                rows=3 + index if sketched else 0,
                share=(0.1, 0.5, 1.0)[index % 3],
                lr=0.5 + 0.3 * (index % 4),
                lr_bias=0.7 + 0.2 * (index % 3),
                decay=0.1 * (index % 3),
                decay_bias=0.2 * (index % 2),
                step=index % 5,
            )
        )
    return net


EIGEN_RULE = (0.9, 0.95, 1e-7)
RENEWED = ("mean", "basis_out", "basis_in", "scale_out", "scale_in", "first")
STEPPED = ("weight", "bias", "first", "second", "last", "size")


def eigen_control() -> np.ndarray:
    """As it may be after 20 steps."""
    return np.array([0.01, 3.0, 5.0, -2.0, 20.0, 1.0, 0.0])


class EigenTwin:
    """A net in plain PyTorch, in float64 or in its own dtype."""

    def __init__(self, net: list[EigenMatrix], control: np.ndarray, exact: bool) -> None:
        self.exact, self.control = exact, torch.from_numpy(control.copy())
        names = [name for name, value in vars(net[0]).items() if isinstance(value, np.ndarray)]
        self.tensors = {name: self.converted(net, name) for name in names}

    def converted(self, net: list[EigenMatrix], name: str) -> list[torch.Tensor]:
        arrays = [getattr(matrix, name).copy() for matrix in net]
        return [torch.from_numpy(array.astype(np.float64) if self.exact else array) for array in arrays]

    def renew(self, net: list[EigenMatrix]) -> None:
        grads = [self.converted(net, name) for name in ("grad_weight", "grad_bias", "sketch", "bias_hessian")]
        written = [self.tensors[name] for name in RENEWED]
        numbers = [[getattr(matrix, name) for matrix in net] for name in ("rows", "share")]
        reference.eigen_renew_(*written, self.control, *grads, *numbers)

    def step(self, net: list[EigenMatrix], renewed: bool) -> None:
        grads = [self.converted(net, name) for name in ("grad_weight", "grad_bias")]
        given = [self.tensors[name] for name in ("mean", "basis_out", "basis_in")]
        numbers = [[getattr(matrix, name) for matrix in net] for name in ("lr", "lr_bias", "decay", "decay_bias", "step")]
        written = [self.tensors[name] for name in STEPPED]
        reference.eigen_step_(*written, self.control, *grads, *given, *numbers, *EIGEN_RULE, renewed)


def assert_eigen(net: list[EigenMatrix], control: np.ndarray, exact: EigenTwin, plain: EigenTwin, slack: float) -> None:
    eps = np.finfo(net[0].weight.dtype).eps
    for name in dict.fromkeys(RENEWED + STEPPED):
        for matrix, x, y in zip(net, exact.tensors[name], plain.tensors[name], strict=True):
            try:
                assert_accurate(getattr(matrix, name), x, y, slack)
            except AssertionError as error:
                raise AssertionError(
                    f"{name} of {matrix.weight.shape}, {len(matrix.basis_out)}, {len(matrix.basis_in)}: {error}"
                ) from error
    x, y = exact.control.numpy(), plain.control.numpy()
    assert (np.abs(control - x) <= 2 * np.abs(y - x) + slack * eps * (1 + np.abs(x).max())).all(), (control, x)
    np.testing.assert_array_equal(control[[1, 4, 5, 6]], x[[1, 4, 5, 6]])  # counts


def next_gradients(rng: np.random.Generator, net: list[EigenMatrix]) -> None:
    for matrix in net:
        for name in ("grad_weight", "grad_bias", "sketch"):
            array = getattr(matrix, name)
            array[...] = np.where(array == 0, 0, rng.standard_normal(array.shape))
        matrix.step += 1


def check_eigen(kernels: Kernels, net: list[EigenMatrix], multiprocessors: int, script: str, slack: float = 64) -> None:
    """Calls of operators in a row: `r` a renewal, `s` a step."""
    rng, control = np.random.default_rng(40), eigen_control()
    twins = [EigenTwin(net, control, exact) for exact in (True, False)]
    for index, call in enumerate(script):
        renewed = index > 0 and script[index - 1] == "r"
        if call == "r":
            kernels.eigen_renew(net, control, multiprocessors)
        else:
            kernels.eigen_step(net, control, multiprocessors, *EIGEN_RULE, renewed)
        for twin in twins:
            if call == "r":
                twin.renew(net)
            else:
                twin.step(net, renewed)
        assert_eigen(net, control, *twins, slack)
        if call == "s":
            next_gradients(rng, net)


@case
def eigen_sketch(kernels: Kernels) -> None:
    rng = np.random.default_rng(20)
    for dtype in DTYPES:
        for m, p, k, units in ((1, 1, 0, 4), (1, 1, 1, 4), (5, 3, 2, 4), (33, 130, 9, 4), (300, 70, 17, 1), (65, 257, 8, 1)):
            h, shift, sketch = (normal(rng, *shape, dtype=dtype) for shape in ((m, p), (p if m % 2 else 0,), (k + 1, p)))
            basis, old = orthonormal(rng, k, p, dtype), sketch.copy()
            kernels.eigen_sketch(sketch, h, basis, shift, units)
            expected = [convert(old).clone() for convert in (double, same)]
            for result, convert in zip(expected, (double, same), strict=True):
                reference.eigen_sketch_(result, *map(convert, (h, basis, shift)))
            assert_accurate(sketch, *expected)


@case
def eigen_step(kernels: Kernels) -> None:
    """Steps in a row, the first after a renewal, chunks of one tile and of several."""
    for dtype in DTYPES:
        for multiprocessors in (4, 1):
            net = eigen_net(np.random.default_rng(21), dtype, EIGEN_NET)
            if multiprocessors == 1:
                net = [*net, *eigen_net(np.random.default_rng(22), dtype, [(260, 140, 8, 7, True, 11)])]
            check_eigen(kernels, net, multiprocessors, "sss")


@case
def eigen_start(kernels: Kernels) -> None:
    """From nothing: no moments, sizes, last steps, and the control as it starts."""
    for dtype in DTYPES:
        net = eigen_net(np.random.default_rng(23), dtype, EIGEN_NET)
        for matrix in net:
            for name in ("first", "second", "last", "size"):
                getattr(matrix, name)[:] = 0
            matrix.step = 0
        control = np.array([0.01, 0, 0, 0, 0, 0, 0])
        exact, plain = (EigenTwin(net, control, kind) for kind in (True, False))
        kernels.eigen_step(net, control, 4, *EIGEN_RULE, False)
        for twin in (exact, plain):
            twin.step(net, False)
        # Where a part is zero but for rounding, N is anything up to 1.2; its first moment is still rounding alone.
        for matrix, x, y in zip(net, exact.tensors["first"], plain.tensors["first"], strict=True):
            assert_accurate(matrix.first, x, y)
        np.testing.assert_allclose(control, exact.control.numpy(), rtol=1e-4 if dtype is np.float32 else 1e-12)
        for matrix, old in zip(net, eigen_net(np.random.default_rng(23), dtype, EIGEN_NET), strict=True):
            still = matrix.grad_weight == 0
            rate = control[0] * 2 / 14 * matrix.lr
            np.testing.assert_allclose(matrix.weight[still], (1 - rate * matrix.decay) * old.weight[still], rtol=1e-6)
            assert np.abs(matrix.weight - (1 - rate * matrix.decay) * old.weight).max() > 0.01 * rate


@case
def eigen_renew(kernels: Kernels) -> None:
    """With and without a sketch, then a step by the new bases, and both again."""
    for dtype in DTYPES:
        net = eigen_net(np.random.default_rng(24), dtype, EIGEN_NET)
        check_eigen(kernels, net, 1, "rsrs", slack=400)
        tolerance = 1e-5 if dtype is np.float32 else 1e-13
        for matrix in net:
            for basis in (matrix.basis_out, matrix.basis_in):
                np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), rtol=0, atol=tolerance)


@case
def eigen_lost_directions(kernels: Kernels) -> None:
    """Rows that depend on those before them, or are zero, are drawn anew as the specification draws them."""
    for dtype in DTYPES:
        net = eigen_net(np.random.default_rng(25), dtype, [(40, 50, 10, 9, True, 3), (7, 3, 7, 3, False, 0)])
        for matrix in net:
            matrix.grad_weight[:] = matrix.grad_bias[:] = 0
            matrix.sketch, matrix.rows, matrix.bias_hessian = np.zeros(0, dtype), 0, np.zeros(0, dtype)
            matrix.basis_out[2] = matrix.basis_out[0]
            matrix.basis_out[3] = matrix.basis_out[1] + 1e-3 * matrix.basis_out[3]  # nearly lost: one pass is not enough
            matrix.scale_out[4] = matrix.scale_in[1] = 0
        before = copy.deepcopy(net)
        twin, control = EigenTwin(net, eigen_control(), True), eigen_control()
        twin.renew(before)
        kernels.eigen_renew(net, control, 2)
        tolerance = 1e-5 if dtype is np.float32 else 1e-13
        for index, matrix in enumerate(net):
            np.testing.assert_array_equal(np.flatnonzero(matrix.scale_out == 0), [2, 4])
            np.testing.assert_array_equal(np.flatnonzero(matrix.scale_in == 0), [1])
            for name in ("basis_out", "basis_in"):
                basis = getattr(matrix, name)
                np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), rtol=0, atol=tolerance)
                exact = twin.tensors[name][index].numpy()
                np.testing.assert_allclose(basis, exact, rtol=0, atol=50 * tolerance)


@case
def eigen_more_matrices_than_a_launch_holds(kernels: Kernels) -> None:
    sizes = [(1 + k % 5, 2 + k % 3, k % 2, k % 3, k % 4 > 0, 1) for k in range(MANY)]
    sizes = [(n, p, ku, kv, bias, 1 if ku < n and kv < p else 0) for n, p, ku, kv, bias, _ in sizes]
    check_eigen(kernels, eigen_net(np.random.default_rng(26), np.float64, sizes), 4, "srs", slack=400)
    for operator in ("step", "renew"):
        net = eigen_net(np.random.default_rng(26), np.float64, sizes)
        net[-1].grad_weight[0, 0] = np.nan
        check_refused(kernels, net, operator)


def check_refused(kernels: Kernels, net: list[EigenMatrix], operator: str) -> None:
    """Nothing changes but `control`, which counts the step, or tells the next one of the renewal."""
    before, control = copy.deepcopy(net), eigen_control()
    expected = eigen_control()
    if operator == "renew":
        kernels.eigen_renew(net, control, 4)
        expected[6] = 1
    else:
        kernels.eigen_step(net, control, 4, *EIGEN_RULE, False)
        expected[5] += 1
    np.testing.assert_array_equal(control, expected)
    for matrix, old in zip(net, before, strict=True):
        for name in dict.fromkeys(RENEWED + STEPPED):
            np.testing.assert_array_equal(getattr(matrix, name), getattr(old, name))


@case
def eigen_refused(kernels: Kernels) -> None:
    """A gradient that is not finite anywhere, or whose square is not, or a renewal that was refused."""
    sizes = [(5, 9, 2, 3, True, 2), (33, 30, 8, 8, True, 3), (6, 4, 6, 4, True, 0)]
    for dtype in DTYPES:
        large = np.sqrt(np.finfo(dtype).max)
        for which in range(3):
            for name in ("grad_weight", "grad_bias", "sketch", "bias_hessian"):
                for bad in (np.nan, -np.inf, large):
                    net = eigen_net(np.random.default_rng(27), dtype, sizes)
                    if name == "sketch":
                        net[which].sketch = np.ones((sizes[which][3] + 1, sizes[which][1]), dtype)
                        net[which].rows = 2
                    if name == "bias_hessian":
                        net[which].bias_hessian = np.ones((sizes[which][0],) * 2, dtype)
                    getattr(net[which], name).flat[-1] = bad
                    if name not in ("sketch", "bias_hessian"):
                        check_refused(kernels, net, "step")
                    if bad != large:
                        check_refused(kernels, net, "renew")
    net = eigen_net(np.random.default_rng(28), np.float32, sizes)
    before, control = copy.deepcopy(net), eigen_control()
    control[6] = 1
    kernels.eigen_step(net, control, 4, *EIGEN_RULE, False)
    expected = eigen_control()
    expected[5] += 1
    np.testing.assert_array_equal(control, expected)
    for matrix, old in zip(net, before, strict=True):
        np.testing.assert_array_equal(matrix.weight, old.weight)
        np.testing.assert_array_equal(matrix.second, old.second)
    exact, plain = (EigenTwin(net, control, kind) for kind in (True, False))  # and the next one is taken
    kernels.eigen_step(net, control, 4, *EIGEN_RULE, False)
    for twin in (exact, plain):
        twin.step(net, False)
    assert_eigen(net, control, exact, plain, 64)
    control = eigen_control()
    kernels.eigen_step([], control, 4, *EIGEN_RULE, False)  # a net without matrices
    expected = torch.from_numpy(eigen_control())
    reference.eigen_control_(expected, 0.0, 0.0, False)
    np.testing.assert_allclose(control, expected.numpy(), rtol=1e-12)


def few() -> None:
    """Races and the order of fibers do not depend on the values: one dtype and one activation or matrix of each kind."""
    global DTYPES, ACTIVATIONS, EIGEN_NET, MANY, BATCH
    DTYPES, ACTIVATIONS, MANY, BATCH = (np.float32,), ["tanh", "gelu"], 3, 300
    EIGEN_NET = [EIGEN_NET[k] for k in (2, 5, 8)]


def run(library: Kernels, job: dict) -> dict:
    """What became of {"case", "order", "planted": the bug or -1, "few"}: {"error", "races"}."""
    if job["few"]:
        few()
    library.configure(job["order"], seed=1, planted=job["planted"])
    error = None
    try:
        with np.errstate(all="ignore" if job["planted"] >= 0 else "warn"):
            CASES[job["case"]](library)
    except (AssertionError, RuntimeError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    return {"error": error, "races": library.races()}


def run_all(path: str, jobs: list[dict]) -> list[dict]:
    """The outcomes of all jobs, each in a process of its own, which a bug may end; as many at once as there are cores."""
    library, outcomes, running = Kernels(Path(path)), [], {}
    torch.set_num_threads(1)
    gc.freeze()
    for job in [*jobs, *([None] * os.cpu_count())]:
        if len(running) == os.cpu_count() or (job is None and running):
            process, status = os.wait()
            number, said, start = running.pop(process)
            said.seek(0)
            text = said.read().decode(errors="replace")
            outcome = json.loads(text.rsplit("\n", 1)[1]) if status == 0 else {"error": text or f"status {status}", "races": []}
            outcomes.append({**jobs[number], **outcome, "seconds": time.monotonic() - start})
        if job is None:
            continue
        said = tempfile.TemporaryFile()  # noqa: SIM115
        process = os.fork()
        if process == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            outcome = run(library, job)
            os.write(1, b"\n" + json.dumps(outcome).encode())
            os._exit(0)
        running[process] = (jobs.index(job), said, time.monotonic())
    return outcomes


if __name__ == "__main__":
    print(json.dumps(run_all(sys.argv[1], json.load(sys.stdin))))
