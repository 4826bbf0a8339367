import copy

import pytest
import torch
from helpers.kernels import needs_kernels
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_as_accurate, eacg_matrix, random_psd, textbook_cg
from torch.library import opcheck

from secondorder import ops, reference

SIZES = [(1, 1), (1, 17), (2, 3), (3, 2), (17, 5), (10, 129), (40, 33), (129, 3)]  # (n_out, n_in)


def problem(n_out, n_in, dtype=torch.float64):
    torch.manual_seed(n_out * 1000 + n_in)
    h = random_psd(n_out, dtype)
    a, b, g = (torch.randn(*s, dtype=torch.float64).to(dtype) for s in ((n_in,), (n_out, n_in), (n_out,)))
    return h, a, b, g


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_hvp(size):
    for dtype in (torch.float64, torch.float32):
        h, a, p, _ = problem(*size, dtype)
        exact = (torch.kron(h.double(), torch.outer(a, a).double()) @ p.double().reshape(-1)).reshape(p.shape)
        assert_as_accurate(ops.eacg_hvp(h, a, p), reference.eacg_hvp(h, a, p), exact)


def test_hvp_compiles_without_graph_breaks():
    arguments = problem(3, 2, torch.float32)[:3]
    compiled = torch.compile(ops.eacg_hvp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.eacg_hvp(*arguments))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bias_hessian": torch.zeros(3, 4).double()}, ValueError, r"expected a square bias_hessian, got shape \[3, 4\]"),
        (
            {"bias_hessian": torch.eye(3).half()},
            TypeError,
            "expected bias_hessian of dtype float32 or float64, got torch.float16",
        ),
        ({"mean_input": torch.zeros(2, 1).double()}, ValueError, "expected mean_input with 1 dimension, got 2"),
        (
            {"mean_input": torch.zeros(2)},
            TypeError,
            "expected mean_input of dtype torch.float64 as bias_hessian, got torch.float32",
        ),
        ({"p": torch.zeros(2, 3).double()}, ValueError, r"expected p of shape \[3, 2\], got \[2, 3\]"),
        ({"p": torch.zeros(3, 2).double().to("meta")}, ValueError, "expected p on cpu as bias_hessian, got meta"),
    ],
)
def test_bad_input_of_hvp(change, error, message):
    h, a, p, _ = problem(3, 2)
    with pytest.raises(error, match="eacg_hvp: " + message):
        ops.eacg_hvp(**{"bias_hessian": h, "mean_input": a, "p": p, **change})


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("alpha", [0.5, 0.01])
@pytest.mark.parametrize("truncated", [False, True])
def test_converged_solution_is_that_of_the_assembled_system(size, alpha, truncated):
    h, a, b, g = problem(*size)
    weight, bias, _ = ops.eacg_solve(h, a, b, g, alpha, 2000, 1e-14, truncated)
    dense = torch.linalg.solve(eacg_matrix(h, a, alpha), -b.reshape(-1)).reshape(b.shape)
    torch.testing.assert_close(weight, dense, rtol=1e-8, atol=1e-9 * float(dense.abs().max()))
    dense = torch.linalg.solve((1 - alpha) * h + alpha * torch.eye(len(h), dtype=h.dtype), -g)
    torch.testing.assert_close(bias, dense, rtol=1e-8, atol=1e-9 * float(dense.abs().max()))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_truncated_form_is_textbook_cg_iterate_by_iterate(size):
    h, a, b, g = problem(*size)
    alpha = 0.05
    matrix = eacg_matrix(h, a, alpha)
    # Past the number of distinct eigenvalues CG works on rounding errors alone.
    for iterations in range(1, min(8, torch.linalg.matrix_rank(h).item() + 1) + 1):
        weight, _, count = ops.eacg_solve(h, a, b, g, alpha, iterations, 0.0, True)
        expected = textbook_cg(matrix, -b.reshape(-1), iterations).reshape(b.shape)
        torch.testing.assert_close(weight, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))
        assert count <= iterations


def test_iterations_and_tolerance():
    h, a, b, g = problem(40, 33)
    matrix, residuals = eacg_matrix(h, a, 0.05), []
    for tol in (1e-1, 1e-3, 1e-6):
        weight, _, count = ops.eacg_solve(h, a, b, None, 0.05, 500, tol, True)
        residual = (matrix @ weight.reshape(-1) + b.reshape(-1)).norm() / b.norm()
        before = textbook_cg(matrix, -b.reshape(-1), int(count) - 1)
        assert residual <= tol * 1.0001 < (matrix @ before + b.reshape(-1)).norm() / b.norm() * 1.0002
        residuals.append(int(count))
    assert residuals == sorted(residuals)
    assert ops.eacg_solve(h, a, b, g, 0.05, 3, 0.0, False)[2] == 3


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float32_is_as_accurate_as_plain_pytorch(size, truncated):
    h, a, b, g = problem(*size, torch.float32)
    exact = reference.eacg_solve(*(t.double() for t in (h, a, b, g)), 0.1, 4, 1e-5, truncated)
    plain = reference.eacg_solve(h, a, b, g, 0.1, 4, 1e-5, truncated)
    actual = ops.eacg_solve(h, a, b, g, 0.1, 4, 1e-5, truncated)
    if exact[2] == plain[2] == actual[2]:  # else they stopped at different iterates
        assert_as_accurate(actual[0], plain[0], exact[0], ulps=64)
        assert_as_accurate(actual[1], plain[1], exact[1], ulps=64)
    else:
        torch.testing.assert_close(actual[0].double(), exact[0], rtol=1e-3, atol=1e-3 * float(exact[0].abs().max()))


@given(
    n_out=st.integers(1, 12), n_in=st.integers(1, 9), alpha=st.floats(1e-3, 0.999), truncated=st.booleans(),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_the_system_is_positive_definite_and_the_direction_descends(n_out, n_in, alpha, truncated, scale, seed):
    torch.manual_seed(seed)
    h, a = random_psd(n_out) * scale, torch.randn(n_in, dtype=torch.float64)
    b, g = torch.randn(n_out, n_in, dtype=torch.float64), torch.randn(n_out, dtype=torch.float64)
    # Not below alpha but for the rounding of the largest eigenvalue.
    eigenvalues = torch.linalg.eigvalsh(eacg_matrix(h, a, alpha))
    assert eigenvalues[0] >= alpha * (1 - 1e-9) - 1e-13 * eigenvalues[-1]
    weight, bias, _ = ops.eacg_solve(h, a, b, g, alpha, 30, 1e-8, truncated)
    assert (weight * b).sum() < 0
    assert (bias * g).sum() < 0


@pytest.mark.parametrize("truncated", [False, True])
def test_degenerate_systems(truncated):
    h, a, b, g = problem(6, 4)
    zero = torch.zeros_like
    # No mean input: plain gradient over alpha.
    torch.testing.assert_close(ops.eacg_solve(h, zero(a), b, g, 0.2, 50, 1e-12, truncated)[0], -b / 0.2)
    # No curvature.
    weight, bias, _ = ops.eacg_solve(zero(h), a, b, g, 0.2, 50, 1e-12, truncated)
    torch.testing.assert_close(weight, -b / 0.2)
    torch.testing.assert_close(bias, -g / 0.2)
    # No gradient: no step, no iteration, no NaN.
    weight, bias, count = ops.eacg_solve(h, a, zero(b), zero(g), 0.2, 50, 1e-12, truncated)
    assert weight.abs().max() == 0
    assert bias.abs().max() == 0
    assert count == 0
    # A gradient of rank one along the mean input, as a batch of one instance gives it.
    rank_one = torch.outer(g, a)
    dense = torch.linalg.solve(eacg_matrix(h, a, 0.2), -rank_one.reshape(-1)).reshape(b.shape)
    torch.testing.assert_close(ops.eacg_solve(h, a, rank_one, g, 0.2, 50, 1e-12, truncated)[0], dense, rtol=1e-8, atol=1e-9)
    # Without a bias.
    assert ops.eacg_solve(h, a, b, None, 0.2, 50, 1e-12, truncated)[1].shape == (0,)


def test_lists_are_the_single_calls():
    layers = [problem(*size) for size in SIZES]
    h, a, b, g = map(list, zip(*layers, strict=True))
    g[2] = None
    alphas = [0.1 * (i + 1) for i in range(len(layers))]
    weights, biases, counts = ops.eacg_solve(h, a, b, g, alphas, 5, 1e-6, True)
    for i in range(len(layers)):
        weight, bias, count = ops.eacg_solve(h[i], a[i], b[i], g[i], alphas[i], 5, 1e-6, True)
        assert torch.equal(weights[i], weight)
        assert torch.equal(biases[i], bias)
        assert counts[i] == count


def update_arguments(dtype=torch.float64, momentum=True):
    layers = [problem(*size, dtype) for size in SIZES]
    h, a, b, g = map(list, zip(*layers, strict=True))
    g[2] = g[2].new_empty(0)
    weights, biases = [torch.randn_like(x) for x in b], [torch.randn_like(x) for x in g]
    momenta = ([torch.randn_like(x) for x in b], [torch.randn_like(x) for x in g]) if momentum else ([], [])
    n = len(layers)
    lr, alpha, mu, decay = ([f * (i + 1) for i in range(n)] for f in (0.01, 0.05, 0.1, 0.2))
    return [h, a, b, g, weights, biases, *momenta, lr, alpha, mu, decay, 6, 1e-6, False]


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_update_is_solve_and_plain_arithmetic(momentum, dtype):
    arguments = update_arguments(dtype, momentum)
    h, a, b, g, weights, biases, wm, bm, lr, alpha, mu, decay, *cg = arguments
    directions = ops.eacg_solve(h, a, b, g, alpha, *cg)
    expected = []
    for kind, (parameters, buffers) in enumerate(((weights, wm), (biases, bm))):
        for i, p in enumerate(parameters):
            v = directions[kind][i] + (mu[i] * buffers[i] if buffers else 0)
            expected.append((p, p * (1 - lr[i] * decay[i]) + lr[i] * v))
            if buffers:
                expected.append((buffers[i], v))
    versions = [w._version for w in weights]
    ops.eacg_update_(*arguments)
    for actual, value in expected:
        torch.testing.assert_close(
            actual, value, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5 if dtype == torch.float32 else 1e-12
        )
    assert all(w._version > v for w, v in zip(weights, versions, strict=True))  # autograd sees the change


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("poisoned", [False, True])
def test_update_equals_its_twin(momentum, poisoned):
    arguments = update_arguments(momentum=momentum)
    if poisoned:
        arguments[2][4][0, 0] = float("nan")
    own, twins = (copy.deepcopy(arguments) for _ in range(2))
    assert torch.equal(ops.eacg_update_(*own) < 0, reference.eacg_update_(*twins) < 0)
    for ours, theirs, before in zip(own[4:8], twins[4:8], arguments[4:8], strict=True):
        torch.testing.assert_close(ours, before if poisoned else theirs, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(theirs, ours, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_max_norm_shortens_what_is_longer_and_leaves_the_rest_to_the_bit(momentum, truncated, dtype):
    arguments = [*update_arguments(dtype, momentum)[:-1], truncated]
    h, a, b, g, _, _, _, _, lr, alpha, _, _, *cg = arguments
    a[3].zero_()  # nothing is along the mean input
    directions = ops.eacg_solve(h, a, b, g, alpha, *cg)
    lengths = [torch.cat([p.flatten(), d]).double().norm().item() for p, d in zip(*directions[:2], strict=True)]
    factors = [0.25 if i % 2 else 1.0 for i in range(len(lr))]
    bounds = [0.25 * length if i % 2 else 1.001 * length for i, length in enumerate(lengths)]
    free, bound, twin, shortened = (copy.deepcopy(arguments) for _ in range(4))
    shortened[2] = [f * x for f, x in zip(factors, b, strict=True)]  # the solution is linear in the gradients
    shortened[3] = [f * x for f, x in zip(factors, g, strict=True)]
    counts = ops.eacg_update_(*free)
    assert torch.equal(ops.eacg_update_(*bound, bounds), counts)
    ops.eacg_update_(*shortened)
    reference.eacg_update_(*twin, bounds)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8
    for lists in zip(bound[4:8], free[4:8], shortened[4:8], twin[4:8], strict=True):
        for i, (ours, unbounded, expected, theirs) in enumerate(zip(*lists, strict=True)):
            if i % 2 == 0:
                assert torch.equal(ours, unbounded)
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    infinite = copy.deepcopy(arguments)
    ops.eacg_update_(*infinite, [float("inf")] * len(lr))
    for ours, unbounded in zip(infinite[4:8], free[4:8], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, unbounded, strict=True))


@needs_kernels
def test_max_norm_is_checked():
    arguments = update_arguments()
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"eacg_update_: expected max_norm >= 0, got {value:g}"):
            ops.eacg_update_(*arguments, [value] * len(SIZES))
    with pytest.raises(ValueError, match="lists of one length, got 8 bias_hessian, 2 max_norm"):
        ops.eacg_update_(*arguments, [1.0] * 2)


def test_copy_on_write():
    h, a, b, g = map(list, zip(*[problem(200, 200) for _ in range(3)], strict=True))  # enough for threads
    originals = [torch.zeros_like(t) for t in (*b, *g)]
    w, x, v, u = ([torch._lazy_clone(t) for t in part] for part in (originals[:3], originals[3:]) * 2)
    ops.eacg_update_(h, a, b, g, w, x, v, u, [0.1] * 3, [0.1] * 3, [0.9] * 3, [0.0] * 3, 9, 0, False)
    assert not any(t.any() for t in originals)
    assert all(t.any() for t in (*w, *x, *v, *u))


@needs_kernels
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_matter(threads):
    # Layers side by side, and layers that threads share.
    layers = [problem(*size, torch.float32) for size in [(200, 300), (17, 3), (300, 400), (17, 129), (1, 1), (200, 200)]]
    h, a, b, g = map(list, zip(*layers, strict=True))
    n, start = len(layers), [torch.randn_like(x) for x in (*b, *g)]

    def updated():
        own = [t.clone() for t in start]
        counts = ops.eacg_update_(h, a, b, g, own[:n], own[n:], [], [], [0.1] * n, [0.05] * n, [0.0] * n, [0.0] * n, 9, 0, False)
        return [*own, counts, *ops.eacg_solve(h, a, b, g, [0.05] * n, 9, 0, False)[0]]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = updated()
        torch.set_num_threads(threads)
        actual = updated()
    finally:
        torch.set_num_threads(before)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("argument", range(4))
@pytest.mark.parametrize("truncated", [False, True])
def test_nothing_is_written_where_one_layer_is_not_finite(argument, value, truncated):
    arguments = update_arguments()
    arguments[-1] = truncated
    arguments[argument][4] = arguments[argument][4].clone()
    arguments[argument][4].view(-1)[-1] = value
    before = [[t.clone() for t in tensors] for tensors in arguments[4:8]]
    counts = ops.eacg_update_(*arguments)
    assert counts[4] == -1
    assert (counts >= 0).sum() == len(counts) - 1
    for tensors, copies in zip(arguments[4:8], before, strict=True):
        assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("argument", range(4))
@pytest.mark.parametrize("truncated", [False, True])
def test_no_row_of_a_solution_is_finite_where_its_system_is_not(argument, truncated):
    system = [torch.eye(4), torch.rand(3), torch.rand(4, 3), torch.rand(4)]
    system[argument].view(-1)[0] = float("nan")
    for library in (ops, reference):
        weight, bias, _ = library.eacg_solve(*system, 0.1, 10, 0.0, truncated)
        assert torch.equal(weight.isnan(), torch.full((4, 3), argument != 3))
        assert torch.equal(bias.isnan(), torch.full((4,), argument in (0, 3)))


def test_an_alpha_whose_inverse_the_dtype_cannot_hold_writes_nothing():
    for alpha, refused in ((1e-37, False), (1e-39, True)):
        weight, momentum = torch.ones(4, 3), torch.zeros(4, 3)
        counts = torch.ops.secondorder.eacg_update_(
            [torch.eye(4)], [torch.rand(3)], [torch.zeros(4, 3)], [torch.empty(0)], [weight], [torch.empty(0)], [momentum],
            [torch.empty(0)], [1.0], [alpha], [0.9], [0.0], 10, 0.0, False,
        )  # fmt: skip
        assert (counts < 0).tolist() == [refused]
        assert torch.equal(weight, torch.ones(4, 3)) and torch.equal(momentum, torch.zeros(4, 3))


def test_opcheck():
    arguments = update_arguments(torch.float32)
    h, a, b, g = (x[:3] for x in arguments[:4])
    library = torch.ops.secondorder
    for truncated in (False, True):
        opcheck(library.eacg_solve.default, (h[1], a[1], b[1], g[1], 0.1, 4, 0.0, truncated))
        opcheck(library.eacg_solve.default, (h[1], a[1], b[1], None, 0.1, 4, 0.0, truncated))
        opcheck(library.eacg_solve.list, (h, a, b, g, [0.1] * 3, 4, 0.0, truncated))
    opcheck(library.eacg_update_.default, tuple(x[:3] if isinstance(x, list) else x for x in arguments))
    opcheck(library.eacg_update_.default, (*(x[:3] if isinstance(x, list) else x for x in arguments), [0.1] * 3))


@needs_kernels
def test_non_contiguous():
    h, a, b, g = problem(17, 5)
    expected = ops.eacg_solve(h, a, b, g, 0.1, 20, 1e-10, True)
    strided = torch.stack([a, a], 1)[:, 0], b.T.contiguous().T, torch.stack([g, g], 1)[:, 1]
    actual = ops.eacg_solve(h.T, *strided, 0.1, 20, 1e-10, True)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    with pytest.raises(ValueError, match="expected a contiguous weight"):
        ops.eacg_update_([h], [a], [b], [g], [b.T.contiguous().T], [g.clone()], [], [], [0.1], [0.1], [0.0], [0.0], 5, 0.0, False)
    numbers = ([0.1], [0.1], [0.0], [0.0], 5, 0.0, False)
    with pytest.raises(
        ValueError, match="lists of one length, got 1 bias_hessian, 2 weight, 1 bias, 1 lr, 1 momentum, 1 weight_decay"
    ):
        ops.eacg_update_([h], [a], [b], [g], [b.clone()] * 2, [g.clone()], [], [], *numbers)
    two = [x * 2 for x in ([h], [a], [b], [g])]
    with pytest.raises(ValueError, match="eacg_update_: expected a bias in memory of its own, got one that is written elsewhere"):
        ops.eacg_update_(*two, [b.clone(), b.clone()], [g.clone()] * 2, [], [], *[x * 2 for x in numbers[:4]], *numbers[4:])
    with pytest.raises(ValueError, match="lists of one length, got 1 bias_hessian, 1 weight_momentum, 0 bias_momentum"):
        ops.eacg_update_([h], [a], [b], [g], [b.clone()], [g.clone()], [b.clone()], [], *numbers)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": 0.0}, ValueError, r"expected alpha in \(0, 1\), got 0"),
        ({"alpha": 1.0}, ValueError, r"expected alpha in \(0, 1\), got 1"),
        ({"alpha": float("nan")}, ValueError, r"expected alpha in \(0, 1\), got nan"),
        ({"max_iter": 0}, ValueError, "expected max_iter >= 1, got 0"),
        ({"tol": -1.0}, ValueError, "expected tol >= 0, got -1"),
        ({"bias_hessian": torch.zeros(3, 4).double()}, ValueError, "expected a square bias_hessian"),
        ({"mean_input": torch.zeros(4).double()}, ValueError, r"expected grad_weight of shape \[3, 4\], got \[3, 2\]"),
        ({"grad_weight": torch.zeros(2, 3).double()}, ValueError, r"expected grad_weight of shape \[3, 2\], got \[2, 3\]"),
        ({"grad_bias": torch.zeros(2).double()}, ValueError, r"expected grad_bias of shape \[3\], got \[2\]"),
        ({"grad_weight": torch.zeros(3, 2)}, TypeError, "expected grad_weight of dtype Double as bias_hessian, got Float"),
    ],
)
def test_bad_input(change, error, message):
    h, a, b, g = problem(3, 2)
    arguments = {
        "bias_hessian": h, "mean_input": a, "grad_weight": b, "grad_bias": g, "alpha": 0.1, "max_iter": 5, "tol": 0.0,
        "truncated": False,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.eacg_solve(**{**arguments, **change})


def fuzz_cases(q):
    """Every operator with arguments made of the problem that test_fuzz.py draws."""
    o, contiguous = torch.ops.secondorder, {"memory_format": torch.contiguous_format}
    w, v, u = q["w"].clone(**contiguous), torch.zeros_like(q["b"], **contiguous), torch.zeros_like(q["g"]).contiguous()
    h, a, b, g = system = q["h"], q["a"], q["b"], q["g"]
    return [
        (o.eacg_solve.default, (*system, 0.1, 5, 1e-3, True)),
        (o.eacg_solve.list, ([h], [a], [b], [g], [0.1], 5, 1e-3, False)),
        (
            o.eacg_update_.default,
            ([h], [a], [b], [g], [w], [g.clone()], [v], [u], [0.1], [0.1], [0.9], [0.0], 5, 1e-3, False, [0.5]),
        ),
    ]
