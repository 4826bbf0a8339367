"""Double damping, the BFGS update, its Hessian-action form and compact L-BFGS: by formulas and by invariants."""

import math

import pytest
import torch
from helpers.kernels import needs_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from secondorder import ops, reference

DTYPES = [torch.float32, torch.float64]
SIZES = [1, 2, 3, 7, 16, 31, 64, 65, 129, 151]
MU1, MU2 = 0.2, 0.3**0.5


def positive_definite(n, dtype=torch.float64, generator=None):
    x = torch.randn(n, 2 * n, generator=generator, dtype=torch.float64)
    h = x @ x.T / n + 0.1 * torch.eye(n, dtype=torch.float64)
    return ((h + h.T) / 2).to(dtype)


def three_products(h, s, y):
    """Eq. 6 as it stands, in float64."""
    h, s, y = h.double(), s.double(), y.double()
    rho, eye = 1 / (s @ y), torch.eye(len(s), dtype=torch.float64)
    v = eye - rho * torch.outer(y, s)
    return v.T @ h @ v + rho * torch.outer(s, s)


def pairs_of(n, count, generator):
    """Random (s, y), some scaled to be tiny or huge, some with s.y negative or zero."""
    for i in range(count):
        s, y = torch.randn(2, n, generator=generator, dtype=torch.float64)
        if i % 4 == 1 and s @ y > 0:
            y = -y
        if i % 4 == 2:
            y = y - (s @ y) / (s @ s) * s
        exponents = torch.randint(-6, 7, (2,), generator=generator)
        yield s * 10.0 ** exponents[0].item(), y * 10.0 ** exponents[1].item()


# The formulas


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_update_equals_the_three_product_formula(n, dtype):
    torch.manual_seed(n)
    h = positive_definite(n, dtype)
    s, y = ops.double_damping(*torch.randn(2, n, dtype=dtype), h, MU1, MU2)
    expected = three_products(h, s, y)
    result = ops.bfgs_update_(h.clone(), s, y)
    assert torch.equal(result, result.T)
    error = (result - expected).abs().max() / expected.abs().max()
    plain = (reference.bfgs_update_(h.clone(), s, y) - expected).abs().max() / expected.abs().max()
    assert error <= max(2 * plain, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_double_damping_equals_algorithm_3(n, sign):
    torch.manual_seed(n)
    h = positive_definite(n)
    s, y = torch.randn(2, n, dtype=torch.float64)
    y = y - (s @ y) / (s @ s) * s + sign * s
    hy = h @ y
    theta1 = (1 - MU1) * (y @ hy) / (y @ hy - s @ y) if s @ y < MU1 * (y @ hy) else 1
    s_expected = theta1 * s + (1 - theta1) * hy
    sy, ss = s_expected @ y, s_expected @ s_expected
    theta2 = (1 - MU2) * ss / (ss - sy) if sy < MU2 * ss else 1
    for module in (ops, reference):
        s_damped, y_damped = module.double_damping(s, y, h, MU1, MU2)
        torch.testing.assert_close(s_damped, s_expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(y_damped, theta2 * y + (1 - theta2) * s_expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_update_equals_damping_then_update(dtype):
    """In every combination of the two dampings, on layers of several sizes at once."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for n in SIZES:
        layers = [positive_definite(k, dtype, generator) for k in (n, 1, n + 3)]
        for pair in pairs_of(n, 12, generator):
            s, y = zip(
                pair,
                *([torch.randn(2, len(h), generator=generator, dtype=torch.float64) for h in layers[1:]]),
                strict=True,
            )
            s, y = [t.to(dtype) for t in s], [t.to(dtype) for t in y]
            expected = [h.clone() for h in layers]
            s_damped, y_damped = ops.double_damping(s, y, layers, MU1, MU2)
            undamped = [[torch.equal(a, b) for a, b in zip(*p, strict=True)] for p in ((s, s_damped), (y, y_damped))]
            status_expected = ops.bfgs_update_(expected, s_damped, y_damped)
            status = ops.damped_bfgs_update_(layers, s, y, MU1, MU2)
            assert torch.equal(status & ops.UPDATED, status_expected)
            for i, (h, e) in enumerate(zip(layers, expected, strict=True)):
                bits = int(status[i])
                assert bool(bits & ops.DAMPED_S) or undamped[0][i]
                assert bool(bits & ops.DAMPED_Y) or undamped[1][i]
                seen.add(bits)
                tolerance = 1e-4 if dtype == torch.float32 else 1e-11
                assert (h - e).abs().max() <= tolerance * e.abs().max()
            layers = [positive_definite(len(h), dtype, generator) for h in layers]
    assert {ops.UPDATED | d for d in (0, ops.DAMPED_S, ops.DAMPED_Y, ops.DAMPED_S | ops.DAMPED_Y)} <= seen


@pytest.mark.parametrize("rule", [(), (True, True), (False, True), (False, False)])
def test_list_operators_equal_their_twins(rule):
    """State and statuses over a sequence of pairs of every kind, on three layers at once."""
    generator = torch.Generator().manual_seed(3)
    sizes = (1, 5, 33)
    for make, update in [
        (lambda n: [torch.eye(n).double()], "damped_bfgs_update_"),
        (lambda n: [torch.zeros(4, n).double() for _ in range(2)], "damped_lbfgs_update_"),
    ]:
        states = [[make(n) for n in sizes] for _ in range(2)]
        for i in range(10):
            s, y = ([torch.randn(n, generator=generator).double() for n in sizes] for _ in range(2))
            y[0] = 0.0 * y[0] if i == 4 else y[0]
            y[1] = -y[1] if s[1] @ y[1] > 0 and i % 2 else y[1]
            s[2] = math.nan * s[2] if i == 5 else s[2]
            statuses = [
                getattr(module, update)(*zip(*state, strict=True), s, y, MU1, MU2, *rule)
                for module, state in zip((ops, reference), states, strict=True)
            ]
            assert torch.equal(*statuses)
        for ours, twins in zip(*states, strict=True):
            for a, b in zip(ours, twins, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


# The invariants


@settings(max_examples=40, deadline=None)
@given(n=st.sampled_from(SIZES[:-1]), seed=st.integers(0, 2**31), mu1=st.floats(0.05, 0.95), mu2=st.floats(0.05, 1.0))
def test_invariants_over_long_sequences(n, seed, mu1, mu2):
    generator = torch.Generator().manual_seed(seed)
    h = torch.eye(n, dtype=torch.float64)
    for s, y in pairs_of(n, 40, generator):
        before = h.clone()
        s_damped, y_damped = ops.double_damping(s, y, h, mu1, mu2)
        sy, yhy, ss = s_damped @ y_damped, y @ h @ y, s_damped @ s_damped
        # The scalar products round relative to the lengths of their factors, which the damping makes nearly orthogonal.
        assert s_damped @ y >= mu1 * yhy - 1e-12 * s_damped.norm() * y.norm()
        assert sy >= mu2 * ss - 1e-12 * s_damped.norm() * y_damped.norm()
        status = ops.bfgs_update_([h], [s_damped], [y_damped])
        assert status.item() == ops.UPDATED
        assert torch.equal(h, h.T)
        # Positive definite: up to rounding for the largest eigenvalue, here at most 1e24 times the smallest.
        values = torch.linalg.eigvalsh(h)
        assert values[0] > -1e-12 * values[-1]
        assert (h @ y_damped - s_damped).norm() <= 1e-9 * (s_damped.norm() + (before.norm() + h.norm()) * y_damped.norm())
        # Eq. 10, where the second damping leaves the first one's bound intact.
        if y_damped @ before @ y_damped <= sy / mu1:
            bound = (torch.linalg.matrix_norm(before, 2).sqrt() + 1 / math.sqrt(mu1 * mu2)) ** 2 + 1 / mu2
            assert values[-1] <= bound * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(n=st.sampled_from(SIZES[:-1]), seed=st.integers(0, 2**31))
def test_eigenvalues_and_secant_equation_at_moderate_scales(n, seed):
    """Where float64 resolves the eigenvalues every one is positive, and the secant equation holds to rounding."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.eye(n, dtype=torch.float64)
    for i in range(60):
        s, y = torch.randn(2, n, generator=generator, dtype=torch.float64)
        if i % 3 == 0:
            y = -y if s @ y > 0 else y
        s, y = ops.double_damping(s, y, h, MU1, MU2)
        assert ops.bfgs_update_([h], [s], [y]).item() == ops.UPDATED
        assert torch.linalg.eigvalsh(h)[0] > 0
        assert (h @ y - s).norm() <= 1e-8 * s.norm()


def test_float32_drift_over_ten_thousand_updates(record_property, capsys):
    """The same damped pairs applied in float64 and, from the float32 H's own damping, in float32."""
    n, generator = 24, torch.Generator().manual_seed(0)
    # A Hessian with curvature from -0.5 to 8 that the moving-averaged pairs sample, as in training.
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    hessian = q @ torch.diag(torch.linspace(-0.5, 8, n, dtype=torch.float64)) @ q.T
    s, y = torch.zeros(2, n, dtype=torch.float64)
    single, double = torch.eye(n), torch.eye(n, dtype=torch.float64)
    worst = 0.0
    for i in range(10_000):
        step = torch.randn(n, generator=generator, dtype=torch.float64)
        s, y = (
            0.9 * s + 0.1 * step,
            0.9 * y + 0.1 * (hessian @ step + 0.1 * torch.randn(n, generator=generator).double()),
        )
        assert ops.damped_bfgs_update_([double], [s], [y], MU1, MU2).item() & ops.UPDATED
        assert ops.damped_bfgs_update_([single], [s.float()], [y.float()], MU1, MU2).item() & ops.UPDATED
        if i % 100 == 99:
            assert torch.equal(single, single.T)
            assert torch.linalg.eigvalsh(single.double())[0] > 0
            worst = max(worst, ((single - double).norm() / double.norm()).item())
    with capsys.disabled():
        print(f"\nfloat32 drift of H over 10,000 updates (n = {n}): largest {worst:.1e} of |H|")
    record_property("drift", worst)
    assert worst < 1e-3


# Pairs that are left out by their bounds


def within(s, y, h, mu1, mu2):
    """Whether y.Hy / s.y <= 1 / mu1 and s.s / s.y <= 1 / mu2, as the operators round it; None: too close to tell."""
    ratios = [r / (s @ y) for r in (mu1 * (y @ h @ y), mu2 * (s @ s))]
    return None if any(1.0005 < r < 1.002 for r in ratios) else bool(s @ y > 0 and all(r < 1.001 for r in ratios))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damped", [True, False])
def test_bounded_updates_are_made_within_both_bounds_alone(damped, dtype):
    """By formulas in float64, on pairs of every kind; the memory that stands for the same H takes the same pairs."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for n in SIZES[1:]:
        scale = 10.0 ** torch.randint(-2, 4, (), generator=generator)
        for s, y in pairs_of(n, 12, generator):
            h = (scale * positive_definite(n, dtype, generator)).contiguous()
            s, y = s.to(dtype), y.to(dtype)
            pair = reference.double_damping(s.double(), y.double(), h.double(), MU1, MU2) if damped else (s.double(), y.double())
            expected = within(*pair, h.double(), MU1, MU2)
            if expected is None:
                continue
            before = h.clone()
            status = ops.damped_bfgs_update_([h], [s], [y], MU1, MU2, damped, True).item()
            assert bool(status & ops.UPDATED) == expected
            seen.add((expected, status & (ops.DAMPED_S | ops.DAMPED_Y)))
            if expected:
                exact = three_products(before, *pair)
                assert (h - exact).abs().max() <= (1e-3 if dtype == torch.float32 else 1e-9) * exact.abs().max()
            else:
                assert torch.equal(h, before)
    both = ops.DAMPED_S | ops.DAMPED_Y
    assert {(True, ops.DAMPED_S), (False, both)} <= seen if damped else seen == {(True, 0), (False, 0)}


@pytest.mark.parametrize("damped", [True, False])
def test_a_bounded_memory_takes_the_pairs_that_its_dense_form_does(damped):
    generator = torch.Generator().manual_seed(1)
    n, steps = 6, 30
    h, (s_pairs, y_pairs) = torch.eye(n).double(), torch.zeros(2, steps, n).double()
    statuses = []
    for i in range(steps):
        s, noise = torch.randn(2, n, generator=generator).double() * 3.0 ** (i % 5 - 2)
        y = (-1) ** (i % 4 == 0) * s * 10.0 ** (i % 3 - 2) + (i % 2) * 0.7 * noise
        results = [
            ops.damped_bfgs_update_([h], [s], [y], MU1, 0.2, damped, True),
            ops.damped_lbfgs_update_([s_pairs], [y_pairs], [s], [y], MU1, 0.2, damped, True),
        ]
        assert torch.equal(*results)
        statuses.append(results[0].item() & ops.UPDATED)
    assert 3 < sum(statuses) < steps
    v = torch.eye(n).double()
    torch.testing.assert_close(ops.lbfgs_product(s_pairs, y_pairs, v), h, rtol=1e-8, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(n=st.sampled_from(SIZES[:-1]), seed=st.integers(0, 2**31), mu1=st.floats(0.05, 0.95), mu2=st.floats(0.05, 1.0))
def test_bounded_updates_change_h_and_its_inverse_by_a_factor_at_most(n, seed, mu1, mu2):
    """Eq. 8 and 10, at every update that is made."""
    generator = torch.Generator().manual_seed(seed)
    h = positive_definite(n, generator=generator)
    for i, (s, y) in enumerate(pairs_of(n, 12, generator)):
        values = torch.linalg.eigvalsh(h)
        if values[-1] > 1e8 * values[0]:
            break  # beyond what float64 resolves
        ops.damped_bfgs_update_([h], [s], [y], mu1, mu2, bool(i % 2), True)
        after = torch.linalg.eigvalsh(h)
        assert 1 / after[0] <= (1 + 1 / mu1) / values[0] * 1.002
        assert after[-1] <= ((values[-1].sqrt() + 1 / math.sqrt(mu1 * mu2)) ** 2 + 1 / mu2) * 1.002


# Hessian action


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_theorem_1_hessian_action_is_sherman_morrison(n, dtype):
    torch.manual_seed(n)
    a, vector = positive_definite(n), torch.randn(n, dtype=torch.float64)
    inverse, changed = torch.cholesky_inverse(torch.linalg.cholesky(a)), a + 0.7 * torch.outer(vector, vector)
    inverse = (inverse + inverse.T) / 2
    h = inverse.to(dtype, copy=True).contiguous()
    status = ops.hessian_action_update_([h], [changed.to(dtype)], [vector.to(dtype)], 0.0)
    ha = inverse @ vector
    sherman_morrison = inverse - torch.outer(ha, ha) / (1 / 0.7 + vector @ ha)
    assert status.tolist() == [ops.UPDATED]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    assert (h - sherman_morrison).abs().max() <= tolerance * inverse.abs().max()
    assert torch.equal(h, h.T)


@pytest.mark.parametrize("n", SIZES)
def test_hessian_action_with_damping_equals_reference(n):
    torch.manual_seed(n)
    inverses = [positive_definite(n), positive_definite(n + 1)]
    matrices, vectors = (
        [positive_definite(k) for k in (n, n + 1)],
        [torch.randn(k, dtype=torch.float64) for k in (n, n + 1)],
    )
    expected = [h.clone() for h in inverses]
    statuses = reference.hessian_action_update_(expected, matrices, vectors, 0.55)
    assert torch.equal(ops.hessian_action_update_(inverses, matrices, vectors, 0.55), statuses)
    for h, e in zip(inverses, expected, strict=True):
        torch.testing.assert_close(h, e, rtol=1e-9, atol=1e-9)


# L-BFGS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_lbfgs_with_enough_memory_equals_bfgs(n, dtype):
    """The same raw pairs, each method damping by its own H, from the same start H = I."""
    torch.manual_seed(n)
    count = 12
    h = torch.eye(n, dtype=dtype)
    s_pairs, y_pairs = torch.zeros(2, count + 3, n, dtype=dtype)
    for i in range(count):
        s, y = torch.randn(2, n, dtype=dtype)
        y = -y if i % 3 == 0 and s @ y > 0 else y
        dense = ops.damped_bfgs_update_([h], [s], [y], MU1, MU2)
        compact = ops.damped_lbfgs_update_([s_pairs], [y_pairs], [s], [y], MU1, MU2)
        if dtype == torch.float64:
            assert torch.equal(dense, compact)
    v = torch.randn(n, 5, dtype=dtype)
    expected, result = h @ v, ops.lbfgs_product(s_pairs, y_pairs, v)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()


def test_lbfgs_forgets_the_oldest_pair():
    torch.manual_seed(0)
    n, memory = 20, 4
    s_pairs, y_pairs = torch.zeros(2, memory, n, dtype=torch.float64)
    kept = []
    for _ in range(7):
        s = torch.randn(n, dtype=torch.float64)
        y = s + 0.1 * torch.randn(n, dtype=torch.float64)
        assert ops.damped_lbfgs_update_([s_pairs], [y_pairs], [s], [y], 0.01, 0.01).tolist() == [ops.UPDATED]
        kept.append((s, y))
    h = torch.eye(n, dtype=torch.float64)
    for s, y in kept[-memory:]:
        h = three_products(h, s, y)
    v = torch.randn(n, 3, dtype=torch.float64)
    torch.testing.assert_close(ops.lbfgs_product(s_pairs, y_pairs, v), h @ v, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(reference.lbfgs_product(s_pairs, y_pairs, v), h @ v, rtol=1e-10, atol=1e-10)
    many = ops.lbfgs_product([s_pairs] * 2, [y_pairs] * 2, [v, v[:, :1]])
    torch.testing.assert_close(many[1], (h @ v)[:, :1], rtol=1e-10, atol=1e-10)


# Bad input


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("s", "y"),
    [
        (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf), (1.0, -1.0), (0.0, 1.0), (1.0, 0.0),
        (1e-40, 1e-40), (1e25, 1e-20),
    ],
)  # fmt: skip
def test_updates_that_cannot_be_made_are_skipped(s, y, dtype):
    """A whole vector of the given numbers beside a good layer: the bad one keeps its H, the good one is updated."""
    n = 5
    h, good = positive_definite(n, dtype), positive_definite(3, dtype)
    before, good_before = h.clone(), good.clone()
    s, y = torch.full((n,), s, dtype=dtype), torch.full((n,), y, dtype=dtype)
    status = ops.bfgs_update_([h, good], [s, torch.ones(3, dtype=dtype)], [y, torch.ones(3, dtype=dtype)])
    assert status[1] == ops.UPDATED
    assert not torch.equal(good, good_before)
    if status[0] == 0:
        assert torch.equal(h, before)
    else:  # the last two: float64 has the range for both, float32 for the first of them, whose scale cancels
        assert s[0] < 1e-39 or (s[0] == 1e25 and dtype == torch.float64)
        assert torch.isfinite(h).all()
    assert torch.equal(ops.bfgs_update_(before.clone(), s, y), h)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damped_updates_skip_what_is_not_finite(bad):
    h, s, y = positive_definite(6), torch.randn(6).double(), torch.randn(6).double()
    pairs = torch.randn(2, 4, 6, dtype=torch.float64)
    pairs[1] = pairs[0]
    for position in (0, 1):
        pair = [s.clone(), y.clone()]
        pair[position][2] = bad
        h_before, pairs_before = h.clone(), pairs.clone()
        assert not ops.damped_bfgs_update_([h], *[[p] for p in pair], MU1, MU2).item() & ops.UPDATED
        assert not ops.damped_lbfgs_update_([pairs[0]], [pairs[1]], *[[p] for p in pair], MU1, MU2).item() & ops.UPDATED
        assert torch.equal(h, h_before)
        assert torch.equal(pairs, pairs_before)
    assert ops.hessian_action_update_([h], [h.clone()], [torch.full((6,), bad).double()], 0.5).tolist() == [0]
    assert torch.equal(h, h_before)


def test_zero_pairs_are_skipped_and_zero_y_is_damped():
    h, zero, s = torch.eye(4), torch.zeros(4), torch.ones(4)
    assert ops.damped_bfgs_update_([h], [zero], [zero], MU1, MU2).tolist() == [0]
    assert torch.equal(h, torch.eye(4))
    assert ops.damped_bfgs_update_([h], [s], [zero], MU1, MU2).tolist() == [ops.UPDATED | ops.DAMPED_Y]
    torch.testing.assert_close(h @ (MU2 * s), s)


@needs_kernels
def test_arguments_are_checked():
    h, s = torch.eye(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"double_damping: expected s of shape \[3\], got \[2\]"):
        ops.double_damping(torch.ones(2), s, h, MU1, MU2)
    with pytest.raises(ValueError, match="square inverse_hessian"):
        ops.bfgs_update_(torch.ones(3, 2), s, s)
    with pytest.raises(TypeError, match="y of dtype Float"):
        ops.bfgs_update_(h, s, s.double())
    with pytest.raises(TypeError, match="float32 or float64"):
        ops.bfgs_update_(h.half(), s.half(), s.half())
    with pytest.raises(ValueError, match="contiguous inverse_hessian"):
        ops.bfgs_update_(torch.eye(6)[::2, ::2], s, s)
    with pytest.raises(ValueError, match="mu1 in"):
        ops.double_damping(s, s, h, 1.0, MU2)
    with pytest.raises(ValueError, match="mu2 in"):
        ops.damped_bfgs_update_([h], [s], [s], MU1, 1.5)
    with pytest.raises(ValueError, match=r"lists of one length, got 2 inverse_hessian, 1 s, 1 y"):
        ops.bfgs_update_([h, h], [s], [s])
    with pytest.raises(ValueError, match="damping >= 0"):
        ops.hessian_action_update_([h], [h], [s], -1.0)
    with pytest.raises(ValueError, match="room for at least one pair"):
        ops.damped_lbfgs_update_([torch.ones(0, 3)], [torch.ones(0, 3)], [s], [s], MU1, MU2)
    with pytest.raises(ValueError, match=r"expected v of shape \[3, 2\]"):
        ops.lbfgs_product(torch.ones(1, 3), torch.ones(1, 3), torch.ones(4, 2))


# The dispatcher


def test_opcheck():
    o = torch.ops.secondorder
    h, s, y = positive_definite(5), torch.randn(5).double(), torch.randn(5).double()
    pairs = torch.zeros(2, 3, 5, dtype=torch.float64)
    pairs[:, 2] = 1
    for op, arguments in [
        (o.double_damping.default, (s, y, h, MU1, MU2)),
        (o.double_damping.list, ([s], [y], [h], MU1, MU2)),
        (o.bfgs_update_.default, (h, s, y)),
        (o.bfgs_update_.list, ([h], [s], [y])),
        (o.damped_bfgs_update_.default, ([h], [s], [y], MU1, MU2)),
        (o.hessian_action_update_.default, ([h], [positive_definite(5)], [s], 0.5)),
        (o.lbfgs_product.default, (pairs[0], pairs[1], h)),
        (o.lbfgs_product.list, ([pairs[0]], [pairs[1]], [h])),
        (o.damped_lbfgs_update_.default, ([pairs[0].clone()], [pairs[1].clone()], [s], [y], MU1, MU2)),
        (o.damped_bfgs_update_.default, ([h], [s], [y], MU1, MU2, False, True)),
        (o.damped_lbfgs_update_.default, ([pairs[0].clone()], [pairs[1].clone()], [s], [y], MU1, MU2, True, True)),
    ]:
        torch.library.opcheck(op, arguments)


@needs_kernels
def test_noncontiguous_arguments():
    torch.manual_seed(0)
    h, s, y = positive_definite(6), torch.randn(12).double()[::2], torch.randn(6, 2).double()[:, 1]
    expected = ops.double_damping(s.contiguous(), y.contiguous(), h, MU1, MU2)
    wide = torch.zeros(6, 9, dtype=torch.float64)
    wide[:, :6] = h
    for result, e in zip(ops.double_damping(s, y, wide[:, :6], MU1, MU2), expected, strict=True):
        assert torch.equal(result, e)


def fuzz_cases(q):
    """Every operator with arguments made of the problem that test_fuzz.py draws."""
    o, h, s, y = torch.ops.secondorder, q["h"].contiguous(), q["s"], q["y"]
    return [
        (o.double_damping.default, (s, y, h, 0.2, 0.5)),
        (o.double_damping.list, ([s], [y], [h], 0.2, 0.5)),
        (o.bfgs_update_.default, (h.clone(), s, y)),
        (o.bfgs_update_.list, ([h.clone()], [s], [y])),
        (o.damped_bfgs_update_.default, ([h.clone()], [s], [y], 0.2, 0.5)),
        (o.damped_bfgs_update_.default, ([h.clone()], [s], [y], 0.2, 0.5, False, True)),
        (o.hessian_action_update_.default, ([h.clone()], [h], [s], 0.5)),
        (o.lbfgs_product.default, (q["sp"], q["yp"], q["b"])),
        (o.lbfgs_product.list, ([q["sp"]], [q["yp"]], [q["b"]])),
        (o.damped_lbfgs_update_.default, ([q["sp"].clone()], [q["yp"].clone()], [s], [y], 0.2, 0.5)),
        (o.damped_lbfgs_update_.default, ([q["sp"].clone()], [q["yp"].clone()], [s], [y], 0.2, 0.5, True, True)),
    ]
