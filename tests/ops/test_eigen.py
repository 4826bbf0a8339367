"""EigenAdam's operators against their specification in float64, and the specification against the algorithm's own words."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_as_accurate
from torch.library import opcheck

from secondorder import ops, reference

# (n, p, ku, kv, bias): both sides with a basis, full sides, none, single rows and columns, odd widths
SIZES = [
    (40, 50, 8, 8, True),
    (33, 100, 8, 8, False),
    (128, 67, 16, 16, True),
    (10, 300, 10, 8, True),
    (300, 12, 8, 12, True),
    (5, 7, 5, 7, True),
    (1, 30, 1, 8, True),
    (30, 1, 8, 1, False),
    (1, 1, 1, 1, True),
    (90, 91, 3, 5, True),
    (257, 301, 16, 16, True),
    (7, 9, 0, 0, False),
    (1, 100, 0, 0, False),
]
DTYPES = [torch.float64, torch.float32]
STEP = ("weight", "bias", "first", "second", "last", "size")  # what a step writes
RENEWAL = ("mean", "basis_out", "basis_in", "scale_out", "scale_in", "first")


def lengths(n, p, ku, kv, bias):
    """The numbers of elements of C, R, T, E."""
    c = kv + bias
    return ku * c, n * c if ku < n else 0, ku * p if kv < p else 0, n * p if ku < n and kv < p else 0


def matrix(n, p, ku, kv, bias, seed=0, curved=False):
    """A matrix of a net in float64, with moments as steps leave them; `curved`: with a bias Hessian."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def basis(k, length):
        return torch.linalg.qr(normal(length, k))[0].T.contiguous()

    *rest, residual = lengths(n, p, ku, kv, bias)
    rows = min(n, max(ku, 1)) if residual else 0
    made = {
        "weight": normal(n, p), "bias": normal(n if bias else 0), "second": normal(sum(rest) + residual).square(),
        "last": normal(sum(rest) + rows * p).clamp(-1, 1), "size": torch.full((1,), 0.1, dtype=torch.float64),
        "grad_weight": normal(n, p) * (torch.rand(n, p, generator=g) > 0.1), "grad_bias": normal(n if bias else 0),
        "mean": normal(p if bias else 0), "basis_out": basis(ku, n), "basis_in": basis(kv, p),
        "scale_out": normal(ku).abs() + 0.1, "scale_in": normal(kv).abs() + 0.1,
    }  # fmt: skip
    moment = reference._parts(normal(n, p), normal(n if bias else 0), made["mean"], made["basis_out"], made["basis_in"])[0]
    root = normal(n, n) if curved else None
    hessian = normal(0) if root is None else root @ root.T
    return {**made, "first": torch.cat([part.flatten() for part in moment]), "bias_hessian": hessian}


def cast(matrices, dtype):
    return [{k: v.clone() if k == "size" else v.to(dtype, copy=True) for k, v in each.items()} for each in matrices]


def controls():
    return torch.tensor([0.01, 3, 0.5, 0.1, 20, 0, 0], dtype=torch.float64)


def step(library, matrices, control, t=0, renewed=False, lr=1.0, decay=0.1):
    many = len(matrices)
    lists = {key: [each[key] for each in matrices] for key in matrices[0]}
    library.eigen_step_(
        *(lists[key] for key in STEP), control, lists["grad_weight"], lists["grad_bias"], lists["mean"], lists["basis_out"],
        lists["basis_in"], [lr] * many, [lr / 2] * many, [decay] * many, [0.0] * many, [t + i for i in range(many)], 0.9, 0.95,
        1e-7, renewed,
    )  # fmt: skip


def renew(library, matrices, control, sketches, rows, share=0.3):
    lists = {key: [each[key] for each in matrices] for key in matrices[0]}
    library.eigen_renew_(
        *(lists[key] for key in RENEWAL), control, lists["grad_weight"], lists["grad_bias"], sketches, lists["bias_hessian"],
        rows, [share] * len(matrices),
    )  # fmt: skip


def inputs(p, m=37, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, p, generator=g, dtype=torch.float64) * torch.linspace(0.1, 3, p, dtype=torch.float64) + 2


def sketched(library, matrices):
    """Sketches of all matrices' inputs; every third has none."""
    sketches, rows = [], []
    for i, each in enumerate(matrices):
        basis = each["basis_in"]
        if i % 3 == 2:
            sketches.append(basis.new_zeros(0))
            rows.append(0)
            continue
        sketch = basis.new_zeros(len(basis) + 1, basis.shape[1])
        for seed in (1, 2):
            library.eigen_sketch_(sketch, inputs(basis.shape[1], seed=seed).to(basis.dtype), basis, each["mean"])
        sketches.append(sketch)
        rows.append(2 * 37)
    return sketches, rows


def compare(keys, matrices, plain, exact, ulps):
    for a, b, c in zip(matrices, plain, exact, strict=True):
        for key in keys:
            if key == "size":  # of float64, from numbers that need not be
                torch.testing.assert_close(a[key], c[key], rtol=4 * torch.finfo(a["weight"].dtype).eps, atol=0)
            else:
                assert_as_accurate(a[key], b[key], c[key], ulps=ulps)


def eigen_sizes():
    return [size for size in SIZES if size[2]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_equal_the_specification(dtype):
    original = [matrix(*size, seed=i) for i, size in enumerate(SIZES)]
    matrices, plain, exact = cast(original, dtype), cast(original, dtype), cast(original, torch.float64)
    mine, theirs, oracle = controls(), controls(), controls()
    for t in range(3):
        for library, each, control in ((ops, matrices, mine), (reference, plain, theirs), (reference, exact, oracle)):
            step(library, each, control, t, renewed=t == 1)
    compare(STEP, matrices, plain, exact, ulps=64 if dtype == torch.float32 else 256)
    torch.testing.assert_close(mine, oracle, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_renewals_equal_the_specification(dtype):
    original = [matrix(*size, seed=i, curved=i % 2 == 1) for i, size in enumerate(eigen_sizes())]
    matrices, plain, exact = cast(original, dtype), cast(original, dtype), cast(original, torch.float64)
    for library, each in ((ops, matrices), (reference, plain), (reference, exact)):
        control = controls()
        renew(library, each, control, *sketched(library, each))
        assert torch.equal(control, controls())
    compare(RENEWAL, matrices, plain, exact, ulps=64 if dtype == torch.float32 else 256)
    for each in matrices:
        for key in ("basis_out", "basis_in"):
            product = each[key] @ each[key].T
            torch.testing.assert_close(product, torch.eye(len(product), dtype=dtype), rtol=0, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ops.CONTROL)
def test_no_entry_of_control_is_idle(name):
    """Each changes what a step makes of the others or of the weights; but for a count, which optimizers read."""
    original, index, made = matrix(20, 30, 8, 8, True), ops.CONTROL.index(name), []
    for value in (None, 10.0, 1e6):
        (own,), control = cast([original], torch.float64), controls()
        control[ops.CONTROL.index("last_slope")] = 1e4
        control[index] = control[index] if value is None else value
        step(ops, [own], control)
        made.append(([*control[:index], *control[index + 1 :]], own["weight"].tolist()))
    assert (made[0] != made[1] or made[0] != made[2]) == (name != "refused")


@pytest.mark.parametrize("size", [(40, 50, 8, 8, True), (33, 30, 8, 30, False), (9, 40, 9, 8, True)], ids=str)
def test_parts_are_the_gradient_in_other_coordinates(size):
    """Without Adam's rule what goes there and back is the gradient itself, of W and of b, in the metric of centred inputs."""
    each = matrix(*size)
    parts, u, v, _ = reference._parts(*(each[k] for k in ("grad_weight", "grad_bias", "mean", "basis_out", "basis_in")))
    assert [part.numel() for part in parts] == [length for length in lengths(*size) if length]
    s, y = reference._whole(parts, u, v, size[4])
    centred = each["grad_weight"]
    if size[4]:
        centred = centred - torch.outer(each["grad_bias"], each["mean"])
        torch.testing.assert_close(y, each["grad_bias"])
    torch.testing.assert_close(s, centred)
    # The parts are orthogonal: their squares add up to the gradient's.
    total = sum(part.square().sum() for part in parts)
    torch.testing.assert_close(total, centred.square().sum() + each["grad_bias"].square().sum())


def test_without_bases_it_is_adam_with_a_look_ahead():
    """From the moments of torch's Adam."""
    torch.manual_seed(0)
    values, grads = torch.randn(6, 4, dtype=torch.float64), torch.randn(30, 6, 4, dtype=torch.float64)
    p = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.Adam([p], lr=1.0, betas=(0.9, 0.95), eps=0)
    own = matrix(6, 4, 0, 0, False) | {"weight": values.clone(), "size": torch.zeros(1, dtype=torch.float64)}
    own |= {"first": torch.zeros(24, dtype=torch.float64), "second": torch.zeros(24, dtype=torch.float64)}
    control = controls()
    for t, g in enumerate(grads):
        own["grad_weight"] = g
        before, length = own["weight"].clone(), float(control[0] / (1 + control[1] / 25).sqrt())
        step(ops, [own], control, t, decay=0.0)
        p.grad = g
        optimizer.step()
        state = optimizer.state[p]
        ahead = 0.9 * state["exp_avg"] / (1 - 0.9 ** (t + 2)) + 0.1 * g / (1 - 0.9 ** (t + 1))
        expected = (ahead / (state["exp_avg_sq"] / (1 - 0.95 ** (t + 1))).sqrt()).clamp(-1.2, 1.2)
        torch.testing.assert_close((before - own["weight"]) / length, expected, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("what", ["sketch", "bias_hessian"])
def test_a_sketch_or_bias_hessian_that_is_not_finite_refuses_the_step(what):
    own = cast([matrix(20, 30, 8, 8, True, curved=True)], torch.float32)
    before, control = cast(own, torch.float32), controls()
    sketches, rows = sketched(ops, own)
    (sketches[0] if what == "sketch" else own[0]["bias_hessian"])[-1, 0] = math.nan
    renew(ops, own, control, sketches, rows)
    assert control[ops.CONTROL.index("unrenewed")] == 1
    step(ops, own, control)
    assert control[ops.CONTROL.index("unrenewed")] == 0
    assert control[ops.CONTROL.index("refused")] == 1
    assert all(torch.equal(own[0][key], before[0][key]) for key in dict.fromkeys(STEP + RENEWAL))


def test_what_has_no_gradient_does_not_move():
    """Single elements among others, whole rows and whole columns; the bias of a row, too."""
    own = cast([matrix(40, 50, 8, 8, True)], torch.float32)[0]
    own["grad_weight"][7] = own["grad_weight"][:, 9] = 0  # and a tenth of the others
    own["grad_bias"][7] = 0
    still = own["grad_weight"] == 0
    before = own["weight"].clone(), own["bias"].clone()
    step(ops, [own], controls(), decay=0.0)
    assert torch.equal(own["weight"] == before[0], still)
    assert (own["bias"] == before[1]).nonzero().tolist() == [[7]]


def test_a_lost_direction_is_drawn_anew():
    """Inputs of rank 2 for a basis of 8: the others get no scale, and are orthonormal all the same."""
    own = cast([matrix(40, 50, 8, 8, True)], torch.float64)
    own[0]["scale_in"].zero_()
    x = torch.randn(2, 50, dtype=torch.float64)
    sketch = torch.zeros(9, 50, dtype=torch.float64)
    ops.eigen_sketch_(sketch, torch.randn(30, 2, dtype=torch.float64) @ x + own[0]["mean"], own[0]["basis_in"], own[0]["mean"])
    renew(ops, own, controls(), [sketch], [30], share=1.0)
    basis, scale = own[0]["basis_in"], own[0]["scale_in"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64))
    assert (scale > 0).tolist() == [True, True] + [False] * 6
    torch.testing.assert_close(x @ basis[:2].T @ basis[:2], x)


def test_power_iterations_find_the_eigendirections():
    """Of the inputs' covariance, whatever their mean, after some renewals with the same batch."""
    own = cast([matrix(40, 30, 8, 3, True)], torch.float64)
    h = torch.randn(500, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h = h * torch.logspace(1, -1, 30, dtype=torch.float64) + 100
    own[0]["mean"] = h.mean(0)
    for j in range(150):
        sketch = torch.zeros(4, 30, dtype=torch.float64)
        ops.eigen_sketch_(sketch, h, own[0]["basis_in"], own[0]["mean"])
        renew(ops, own, controls(), [sketch], [500], share=1.0 if j == 0 else 0.1)
    values, vectors = torch.linalg.eigh(torch.cov(h.T, correction=0))
    torch.testing.assert_close(own[0]["scale_in"], values.flip(0)[:3], rtol=1e-3, atol=0)
    overlap = (own[0]["basis_in"] * vectors.T.flip(0)[:3]).sum(1).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-3)


def test_power_iterations_find_a_bias_hessians_eigendirections():
    """Whatever the gradient: on the outputs' side alone, while the inputs' is as without it."""
    own = [matrix(40, 30, 3, 4, True), matrix(40, 30, 3, 4, True)]
    q = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    own[0]["bias_hessian"] = q @ torch.diag(torch.logspace(2, -4, 40, dtype=torch.float64)) @ q.T
    for j in range(150):
        renew(ops, own, controls(), *sketched(ops, own), share=1.0 if j == 0 else 0.1)
    torch.testing.assert_close(own[0]["scale_out"], torch.logspace(2, -4, 40, dtype=torch.float64)[:3], rtol=1e-3, atol=0)
    overlap = (own[0]["basis_out"] * q.T[:3]).sum(1).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-3)
    for key in ("basis_in", "scale_in", "mean"):
        assert torch.equal(own[0][key], own[1][key])
    assert (own[1]["basis_out"] * q.T[:3]).sum(1).abs().max() < 0.9


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
        ("step", lambda a: a[12].__setitem__(0, -1.0), ValueError, "expected lr >= 0, got -1"),
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
