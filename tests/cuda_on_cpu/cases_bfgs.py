"""Double damping, the BFGS updates and limited memory."""

import copy
import itertools

import case_tools
import numpy as np
from case_tools import assert_accurate, case, double, exact_size, normal, placed, same, spd
from harness import BfgsLayer, Kernels

from secondorder import reference


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
    for dtype in case_tools.DTYPES:
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


@case
def hessian_action(kernels: Kernels) -> None:
    """Against the formula in float64, with room for what float32 makes of s = H a, to which the update is sensitive."""
    rng = np.random.default_rng(12)
    for dtype in case_tools.DTYPES:
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
    for dtype in case_tools.DTYPES:
        # Up to 128 pairs are in registers.
        for p, empty, n, k in (
            (1, 0, 1, 1),
            (2, 1, 3, 2),
            (3, 3, 4, 9),
            (33, 4, 50, 17),
            (40, 0, 129, 8),
            (128, 5, 300, 3),
            (129, 4, 300, 9),
        ):
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
    for dtype in case_tools.DTYPES:
        layers, expected = [], []
        for index, (pairs, n) in enumerate(((1, 1), (2, 3), (19, 17), (9, 257), (4, 8), (4, 8), (2, 6))):
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
    for dtype in case_tools.DTYPES:
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
