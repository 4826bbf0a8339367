import pytest
import torch
from helpers.kernels import needs_kernels
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_as_accurate, random_psd
from torch.library import opcheck

from secondorder import ops, reference

# (n_out, n_in, m): awkward on purpose, around the widths of register tiles, strips and panels
SIZES = [
    (1, 1, 1), (2, 3, 1), (3, 2, 17), (17, 129, 5), (129, 17, 1000), (10, 16, 33), (64, 200, 100), (31, 127, 255),
    (33, 128, 257), (130, 257, 300), (96, 97, 256), (5, 1000, 64), (600, 24, 3), (300, 600, 513),
]  # fmt: skip


def problem(n_out, n_in, m, dtype=torch.float64):
    torch.manual_seed(n_out + n_in + m)
    h = random_psd(n_out, dtype)
    w = torch.randn(n_out, n_in, dtype=torch.float64).to(dtype)
    d1, d2, g = (torch.randn(m, n_in, dtype=torch.float64).to(dtype) for _ in range(3))
    return h, w, d1, d2, g / m


def dense(h, w, d1, d2, g, gamma):
    """Eq. 8b entry by entry: einsum over instances, nothing factored out."""
    sandwich = torch.einsum("ki,kl,lj->ij", w, h, w)
    result = torch.einsum("ij,mi,mj->ij", sandwich, d1, d1) / len(d1)
    if d2 is not None:
        for j in range(w.shape[1]):
            entry = (d2[:, j] * g[:, j]).sum()
            result[j, j] += gamma * entry if entry < 0 else entry
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("gamma", [-1.0, 0.0, -0.3])
def test_matches_the_equation(size, dtype, gamma):
    arguments = problem(*size, dtype)
    exact = dense(*(t.double() for t in arguments), gamma)
    actual = ops.bias_hessian(*arguments, gamma)
    assert actual.dtype == dtype
    plain = reference.bias_hessian(*arguments, gamma)
    assert torch.equal(actual, actual.T)
    assert torch.equal(plain, plain.T)
    assert_as_accurate(actual, plain, exact)
    h, w, d1, _, _ = arguments
    without = dense(h.double(), w.double(), d1.double(), None, None, gamma)
    plain = reference.bias_hessian(h, w, d1, None, None, gamma)
    assert_as_accurate(ops.bias_hessian(h, w, d1, None, None, gamma), plain, without)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "leaky_relu", "elu", "softplus", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_activation(activation, dtype):
    for size in [(2, 3, 1), (17, 129, 5), (33, 70, 65)]:
        h, w, z, _, g = problem(*size, dtype)
        saved = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}.get(activation, lambda v: v)(z)
        if activation == "elu":
            saved = torch.where(z > 0, z, torch.expm1(z) * 0.5)
        parameter = 0.5
        d1, d2 = reference.activation_derivatives(saved.double(), activation, parameter)
        exact = dense(h.double(), w.double(), d1, d2, g.double(), -1.0)
        plain = reference.bias_hessian(h, w, *reference.activation_derivatives(saved, activation, parameter), g, -1.0)
        assert_as_accurate(ops.bias_hessian_activation(h, w, saved, activation, parameter, g, -1.0), plain, exact, ulps=32)
        exact = dense(h.double(), w.double(), d1, None, None, -1.0)
        plain = reference.bias_hessian(h, w, d1.to(dtype), None, None, -1.0)
        assert_as_accurate(ops.bias_hessian_activation(h, w, saved, activation, parameter, None, -1.0), plain, exact, ulps=32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chain(dtype):
    sizes, m, gamma = [3, 17, 1, 129, 64], 33, -0.5
    names, parameters = ["tanh", "relu", "sigmoid", "elu"], [1.0, 1.0, 1.0, 0.5]
    torch.manual_seed(0)
    top = random_psd(sizes[0], dtype)
    weights = [torch.randn(k, n, dtype=torch.float64).to(dtype) for k, n in zip(sizes, sizes[1:])]
    saved = [torch.rand(m, n, dtype=torch.float64).to(dtype) for n in sizes[1:]]
    grads = [torch.randn(m, n, dtype=torch.float64).to(dtype) for n in sizes[1:]]
    grads[1] = None
    actual = ops.bias_hessian_chain(top, weights, saved, names, parameters, grads, gamma)
    plain, exact = top, top.double()
    for result, w, s, name, parameter, g in zip(actual, weights, saved, names, parameters, grads):
        plain = reference.bias_hessian(plain, w, *reference.activation_derivatives(s, name, parameter), g, gamma)
        d1, d2 = reference.activation_derivatives(s.double(), name, parameter)
        exact = dense(exact, w.double(), d1, *((None, None) if g is None else (d2, g.double())), gamma)
        assert_as_accurate(result, plain, exact, ulps=64)
    assert ops.bias_hessian_chain(top, [], [], [], [], [], gamma) == []


def test_fused_forms_equal_their_twins():
    h, w, z, _, g = problem(17, 33, 5)
    for grad in (g, None):
        arguments = h, w, torch.tanh(z), "tanh", 1.0, grad, -0.5
        torch.testing.assert_close(ops.bias_hessian_activation(*arguments), reference.bias_hessian_activation(*arguments))
    arguments = h, [w, w.T.contiguous()], [z, z[:, :17]], ["gelu", "softplus"], [1.0, 0.5], [g, None], -0.5
    torch.testing.assert_close(ops.bias_hessian_chain(*arguments), reference.bias_hessian_chain(*arguments))


def test_no_outputs_and_no_inputs():
    w, d = torch.zeros(0, 300).double(), torch.randn(4, 300).double()
    ops.bias_hessian(*problem(300, 300, 4), -1.0)  # leaves its numbers in whatever memory comes next
    expected = torch.diag((d * d).sum(0))
    assert torch.equal(ops.bias_hessian(torch.zeros(0, 0).double(), w, d, d, d, -1.0), expected)
    assert ops.bias_hessian(torch.eye(3), torch.zeros(3, 0), torch.zeros(2, 0), None, None, 0.0).shape == (0, 0)


@needs_kernels
def test_any_strides():
    h, w, d1, d2, g = problem(20, 50, 40)
    expected = ops.bias_hessian(h, w, d1, d2, g, -1.0)
    strided = torch.zeros(50, 3, 40, dtype=torch.float64)
    strided[:, 1] = d1.T
    wide = torch.zeros(40, 101, dtype=torch.float64)
    wide[:, 1::2] = d2
    actual = ops.bias_hessian(h.T, w.T.contiguous().T, strided[:, 1].T, wide[:, 1::2], g.flip(0).flip(0), -1.0)
    assert torch.equal(actual, expected)


def test_one_thread_and_many_agree():
    arguments = problem(200, 500, 300)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.bias_hessian(*arguments, -1.0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@given(
    n_out=st.integers(1, 40), n_in=st.integers(1, 70), m=st.integers(1, 50), gamma=st.floats(-2, 0), seed=st.integers(0, 10**6)
)
def test_stays_positive_semi_definite(n_out, n_in, m, gamma, seed):
    torch.manual_seed(seed)
    h, w, d1, d2, g = problem(n_out, n_in, m)
    result = ops.bias_hessian(h, w, d1, d2, g, gamma)
    eigenvalues = torch.linalg.eigvalsh(result)
    assert eigenvalues[0] >= -1e-12 * max(1.0, float(eigenvalues[-1]))


@given(
    n_out=st.integers(2, 6), n_in=st.integers(1, 9), m=st.integers(1, 12), seed=st.integers(0, 10**6),
    activation=st.sampled_from([(torch.sigmoid, 0.25), (torch.tanh, 1.0), (torch.relu, 1.0)]),
)  # fmt: skip
def test_the_error_of_the_expectation_is_bounded(n_out, n_in, m, seed, activation):
    """Chen et al., Eq. 7: |E[X * h' h'^T] - E[X] * E[h' h'^T]|_F^2 <= L^4 sum Var(X), X_i = W^T H_i W, H_i of cross-entropy."""
    torch.manual_seed(seed)
    function, lipschitz = activation
    z, w, logits = torch.randn(m, n_in).double(), torch.randn(n_out, n_in).double(), 3 * torch.randn(m, n_out).double()
    z.requires_grad_()
    (d1,) = torch.autograd.grad(function(z).sum(), z)
    p = logits.softmax(1)
    hessians = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    sandwiches = w.T @ hessians @ w
    exact = (sandwiches * (d1.unsqueeze(2) * d1.unsqueeze(1))).mean(0)
    result = ops.bias_hessian(hessians.mean(0), w, d1, None, None, 0.0)
    bound = lipschitz**4 * sandwiches.var(0, correction=0).sum()
    assert (result - exact).square().sum() <= bound * (1 + 1e-9) + 1e-20


def test_nan_is_not_lost():
    for position in range(5):
        arguments = list(problem(6, 9, 4))
        arguments[position] = arguments[position].clone()
        arguments[position].view(-1)[-1] = float("nan")
        assert not torch.isfinite(ops.bias_hessian(*arguments, 0.0)).all()


def test_opcheck():
    h, w, d1, d2, g = problem(5, 7, 3, torch.float32)
    opcheck(torch.ops.secondorder.bias_hessian.default, (h, w, d1, d2, g, -1.0))
    opcheck(torch.ops.secondorder.bias_hessian.default, (h, w, d1, None, None, 0.0))
    opcheck(torch.ops.secondorder.bias_hessian.activation, (h, w, d1, "sigmoid", 1.0, g, -1.0))
    opcheck(torch.ops.secondorder.bias_hessian.chain, (h, [w], [d1], ["sigmoid"], [1.0], [g], -1.0))


def test_compiles_without_graph_breaks():
    arguments = problem(5, 7, 3, torch.float32)
    compiled = torch.compile(lambda *a: ops.bias_hessian(*a, -1.0) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.bias_hessian(*arguments, -1.0) + 1)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.__setitem__(0, a[0][:4]), ValueError, r"expected a square bias_hessian, got shape \[4, 5\]"),
        (lambda a: a.__setitem__(1, a[1][:4]), ValueError, r"expected weight of shape \[5, 7\], got \[4, 7\]"),
        (lambda a: a.__setitem__(2, a[2][:, :6]), ValueError, r"expected d1 of shape \[3, 7\], got \[3, 6\]"),
        (lambda a: a.__setitem__(3, a[3][:2]), ValueError, r"expected d2 of shape \[3, 7\], got \[2, 7\]"),
        (lambda a: a.__setitem__(4, a[4][:2]), ValueError, r"expected grad_input of shape \[3, 7\], got \[2, 7\]"),
        (lambda a: a.__setitem__(3, None), ValueError, "expected d2 and grad_input together .* got only grad_input"),
        (lambda a: a.__setitem__(5, 0.5), ValueError, "expected gamma <= 0 .* got 0.5"),
        (lambda a: a.__setitem__(5, float("nan")), ValueError, "expected gamma <= 0"),
        (lambda a: a.__setitem__(1, a[1].float()), TypeError, "expected weight of dtype Double as bias_hessian, got Float"),
        (lambda a: a.__setitem__(0, a[0].half()), TypeError, "expected bias_hessian of dtype float32 or float64, got Half"),
        (lambda a: [a.__setitem__(i, a[i][:0]) for i in (2, 3, 4)], ValueError, "at least one instance in d1.*empty batch"),
        (lambda a: a.__setitem__(2, a[2][0]), ValueError, "expected d1 with 2 dimensions, got 1"),
    ],
)
def test_bad_input(change, error, message):
    arguments = [*problem(5, 7, 3), -1.0]
    change(arguments)
    with pytest.raises(error, match=message):
        ops.bias_hessian(*arguments)


@needs_kernels
def test_bad_activation():
    h, w, d1, _, g = problem(5, 7, 3)
    with pytest.raises(ValueError, match="expected activation to be one of identity, sigmoid.*got 'sine'"):
        ops.bias_hessian_activation(h, w, d1, "sine", 1.0, g, -1.0)
    with pytest.raises(ValueError, match="expected a parameter > 0 for activation 'elu', got -1"):
        ops.bias_hessian_activation(h, w, d1, "elu", -1.0, g, -1.0)
    with pytest.raises(ValueError, match="lists of one length, got 2 weight, 1 saved, 1 activation, 1 parameter, 1 grad_input"):
        ops.bias_hessian_chain(h, [w, w], [d1], ["elu"], [1.0], [g], -1.0)
    with pytest.raises(ValueError, match=r"expected weight of shape \[7, 7\], got \[5, 7\]"):
        ops.bias_hessian_chain(h, [w, w], [d1, d1], ["elu"] * 2, [1.0] * 2, [g, g], -1.0)


def fuzz_cases(q):
    """Every operator with arguments made of the problem that test_fuzz.py draws."""
    o = torch.ops.secondorder.bias_hessian
    return [
        (o.default, (q["h"], q["w"], q["d1"], q["d2"], q["grad"], -1.0)),
        (o.default, (q["h"], q["w"], q["d1"], None, None, 0.0)),
        (o.activation, (q["h"], q["w"], q["d1"], "softplus", 1.0, q["grad"], -1.0)),
        (o.chain, (q["h"], [q["w"]], [q["d1"]], ["softplus"], [1.0], [q["grad"]], -1.0)),
    ]
