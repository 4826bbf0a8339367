"""The CUDA operators on a GPU, against float64 oracles and the CPU's operators and without any wait for the device; every
optimizer on a GPU against itself on the CPU.

Without a GPU the CPU stands in for it, so that what the tests themselves call and give stays right. They then take fewer sizes,
and what only a GPU has is skipped.
"""

import copy

import pytest
import torch
from oracles import assert_as_accurate, random_psd
from torch import nn
from torch.utils._pytree import tree_map

import secondorder as so
from secondorder import ops, reference

GPU = torch.cuda.is_available() and so.build_info()["cuda_architectures"] is not None
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU and secondorder built with CUDA")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available() and not GPU, reason="needs secondorder built with CUDA"),
    # torch's own, where the first product that a process makes is one of a thread of autograd's.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]

DTYPES = [torch.float32, torch.float64]
SIZES = [(1, 1, 1), (2, 3, 17), (17, 129, 5), (129, 64, 33)]  # (n_out, n_in, batch)
SIZES += [(256, 1024, 1000), (1024, 2050, 300)] if GPU else []


@pytest.fixture(autouse=True)
def _switches():
    """A test that fails leaves neither the ban on synchronisation nor TF32 behind."""
    yield
    if GPU:
        torch.cuda.set_sync_debug_mode("default")
    torch.set_float32_matmul_precision("highest")


def moved(value, device):
    """A copy on the device, each tensor anew."""
    return tree_map(lambda leaf: leaf.to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf, value)


def without_waiting(function, *arguments):
    """function(*arguments), where any synchronisation that PyTorch knows of is an error."""
    if not GPU:
        return function(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    result = function(*arguments)
    torch.cuda.set_sync_debug_mode("default")
    return result


def on_gpu(function, *arguments):
    """function(*arguments) on the GPU, without waiting; its tensors on the CPU."""
    return moved(without_waiting(function, *moved(arguments, DEVICE)), "cpu")


def to_double(arguments):
    return tree_map(lambda a: a.double() if isinstance(a, torch.Tensor) else a, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["identity", "sigmoid", "tanh", "relu", "softplus", "silu", "gelu", "gelu_tanh"])
def test_activation_derivatives(name, dtype):
    saved = torch.rand(1001, dtype=dtype) * 0.9 + 0.05
    exact = reference.activation_derivatives(saved.double(), name)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for actual, expected in zip(on_gpu(ops.activation_derivatives, saved, name, 1.0), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bias_hessian(size, dtype):
    n_out, n_in, batch = size
    h = random_psd(n_out, dtype)
    rest = [torch.randn(r, n_in, dtype=torch.float64).to(dtype) for r in (n_out, batch, batch, batch)]
    arguments = [h, *rest, -1.0]
    actual = on_gpu(ops.bias_hessian, *arguments)
    assert_as_accurate(actual, reference.bias_hessian(*arguments), reference.bias_hessian(*to_double(arguments)), ulps=64)
    assert torch.equal(actual, actual.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bias_hessian_chain(size, dtype):
    n_out, n_in, batch = size
    widths = [n_out, n_in, 3, n_in]
    h = random_psd(n_out, dtype)
    weights = [torch.randn(k, n, dtype=torch.float64).to(dtype) / k for k, n in zip(widths, widths[1:])]
    saved, grads = ([torch.rand(batch, n, dtype=torch.float64).to(dtype) for n in widths[1:]] for _ in range(2))
    arguments = [h, weights, saved, ["tanh"] * 3, [1.0] * 3, [grads[0], None, grads[2]], -0.5]
    for actual, plain, exact in zip(
        on_gpu(ops.bias_hessian_chain, *arguments),
        ops.bias_hessian_chain(*arguments),
        ops.bias_hessian_chain(*to_double(arguments)),
        strict=True,
    ):
        assert_as_accurate(actual, plain, exact, ulps=256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [True, False])
def test_cross_entropy_hessian(mean, dtype):
    output, target = torch.randn(129, 17, dtype=dtype), torch.arange(129) % 17
    actual = on_gpu(ops.cross_entropy_hessian, output, target, 3, mean)
    plain, exact = (ops.cross_entropy_hessian(x, target, 3, mean) for x in (output, output.double()))
    assert_as_accurate(actual, plain, exact, ulps=64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_averages(dtype):
    new, old = ([torch.randn(shape, dtype=dtype) for shape in [(3, 17), (129, 5), (1, 1)]] for _ in range(2))
    for actual, h in zip(on_gpu(ops.mean_inputs, new), new, strict=True):
        torch.testing.assert_close(actual, h.mean(0))
    here = moved(new, DEVICE)
    without_waiting(ops.average_, here, moved(old, DEVICE), 0.7)
    for actual, x, y in zip(moved(here, "cpu"), new, old, strict=True):
        torch.testing.assert_close(actual, x.lerp(y, 0.7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_precondition(size, dtype):
    n_out, n_in, _ = size
    left, right = random_psd(n_out, dtype), random_psd(n_in, dtype)
    gradient = torch.randn(n_out, n_in, dtype=torch.float64).to(dtype)
    for sides in [(left, right), (left, None), (None, right), (None, None)]:
        arguments = [sides[0], gradient, sides[1]]
        exact = reference.precondition(*to_double(arguments))
        assert_as_accurate(on_gpu(ops.precondition, *arguments), reference.precondition(*arguments), exact, ulps=64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_jacobian_rows(size, dtype):
    """Two pieces with rows that are none, beside a vector's rows in natural order; what is around them stays."""
    a, b, m = (min(n, 129) for n in size)
    x, y = torch.randn(2, m + 2, a, dtype=torch.float64).to(dtype), torch.randn(2, m + 2, b, dtype=torch.float64).to(dtype)
    rows = list(torch.randint(m + 3, (2, m, 3)))
    absent = torch.empty(0, dtype=dtype), torch.empty(0, dtype=torch.int64)
    pieces = [[*x, x[0, :m]], [*y, absent[0]], [*rows, absent[1]]]
    places = [1, 1, 0], [1, 1, 1 + a * b]
    out = torch.randn(m + 1, a * b + a + 2, dtype=torch.float64).to(dtype)
    here, plain, exact = moved(out, DEVICE), out.clone(), out.double()
    without_waiting(ops.jacobian_rows_, here, *moved(pieces, DEVICE), *places)
    reference.jacobian_rows_(plain, *pieces, *places)
    reference.jacobian_rows_(exact, *to_double(pieces[:2]), pieces[2], *places)
    assert_as_accurate(here.cpu(), plain, exact, ulps=64)


@needs_gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bias_hessian_obeys_the_matmul_precision(size):
    """TF32 where PyTorch is allowed it: the bound of its 2^-11, which float32 is far inside of."""
    n_out, n_in, batch = size
    h = random_psd(n_out, torch.float32)
    w, d1 = torch.randn(n_out, n_in), torch.randn(batch, n_in)
    exact = reference.bias_hessian(*to_double([h, w, d1]), None, None, -1.0)
    largest = (w.abs().double().T @ h.abs().double() @ w.abs().double()) * (d1.abs().double().T @ d1.abs().double() / batch)
    errors = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        errors[precision] = (on_gpu(ops.bias_hessian, h, w, d1, None, None, -1.0).double() - exact).abs() / largest
        assert (errors[precision] <= (7 * 2.0**-11 if precision == "high" else (2 * n_out + batch + 16) * 2.0**-23)).all()
    assert errors["high"].max() > errors["highest"].max()


@needs_gpu
@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has the older switch alone")
def test_bias_hessian_obeys_the_newer_switch():
    """Where it is set, torch refuses to answer by the older name."""
    arguments = [random_psd(33, torch.float32), torch.randn(33, 129), torch.randn(64, 129), None, None, -1.0]
    torch.set_float32_matmul_precision("high")
    expected = on_gpu(ops.bias_hessian, *arguments)
    torch.set_float32_matmul_precision("highest")
    assert not torch.equal(on_gpu(ops.bias_hessian, *arguments), expected)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert torch.equal(on_gpu(ops.bias_hessian, *arguments), expected)


@pytest.mark.parametrize("n_out", [1024, 10])
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_the_recursion_by_cublas_has_its_diagonal_and_activation(activation, n_out):
    """At sizes where TF32's products are cuBLAS's, the rest is what it is elsewhere."""
    n_in, batch = 2050, 300
    h, w = random_psd(n_out, torch.float32), torch.randn(n_out, n_in) / n_out
    saved, grad = torch.rand(batch, n_in) - 0.5, torch.randn(batch, n_in)
    d1, d2 = (saved, -saved) if activation is None else reference.activation_derivatives(saved.double(), activation, 1.0)
    exact = reference.bias_hessian(*to_double([h, w, d1, d2, grad]), -0.5)
    d1 = d1.abs().double()
    bound = 7 * 2.0**-11 * (w.abs().double().T @ h.abs().double() @ w.abs().double()) * (d1.T @ d1 / batch)
    bound += torch.diag((d2 * grad).abs().sum(0).double()) * batch * 2.0**-23
    torch.set_float32_matmul_precision("high")
    if activation is None:
        actual = on_gpu(ops.bias_hessian, h, w, d1.float() * saved.sign(), d2, grad, -0.5)
    else:
        (actual,) = on_gpu(ops.bias_hessian_chain, h, [w], [saved], [activation], [1.0], [grad], -0.5)
    assert ((actual.double() - exact).abs() <= bound + 1e-6).all()
    assert torch.equal(actual, actual.T)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_eacg_solve(size, dtype, truncated):
    n_out, n_in, _ = size
    h = random_psd(n_out, dtype)
    a, b, g = (torch.randn(*s, dtype=torch.float64).to(dtype) for s in ((n_in,), (n_out, n_in), (n_out,)))
    settings = (0.1, 4, 1e-5, truncated)
    actual = on_gpu(ops.eacg_solve, h, a, b, g, *settings)
    exact = reference.eacg_solve(*to_double([h, a, b, g]), *settings)
    plain = reference.eacg_solve(h, a, b, g, *settings)
    for k in (0, 1):
        assert_as_accurate(actual[k], plain[k], exact[k], ulps=400)
    assert_as_accurate(on_gpu(ops.eacg_hvp, h, a, b), reference.eacg_hvp(h, a, b),
                       reference.eacg_hvp(*to_double([h, a, b])), ulps=64)  # fmt: skip


def net_arguments(device, layers=((300, 40), (40, 130), (130, 3))):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    lists = [[], [], [], [], [], [], [], []]
    for n_in, n_out in layers:
        root = normal(n_out, n_out) / n_out**0.5
        shapes = [(n_in,), (n_out, n_in), (n_out,), (n_out, n_in), (n_out,), (n_out, n_in), (n_out,)]
        for target, tensor in zip(lists, [root @ root.T, *(normal(*s) for s in shapes)], strict=True):
            target.append(tensor)
    count = len(layers)
    return [*lists, [0.1] * count, [0.2] * count, [0.9] * count, [0.01] * count, 10, 0.0, False]


@pytest.mark.parametrize("bound", [float("inf"), 1.0])
def test_eacg_update_equals_the_cpu_operator(bound):
    on_cpu, on_cuda = net_arguments("cpu"), net_arguments(DEVICE)
    for arguments in (on_cpu, on_cuda):
        arguments.append([bound] * len(arguments[0]))
    expected = ops.eacg_update_(*on_cpu)
    assert torch.equal(without_waiting(ops.eacg_update_, *on_cuda).cpu(), expected)
    for cuda_list, cpu_list in zip(on_cuda[4:8], on_cpu[4:8], strict=True):
        for x, y in zip(cuda_list, cpu_list, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e307])
def test_eacg_update_leaves_everything_where_a_layer_is_not_finite(number):
    arguments = net_arguments(DEVICE)
    arguments[2][1][0, 0] = number
    before = copy.deepcopy(arguments[4:8])
    iterations = ops.eacg_update_(*arguments)
    assert iterations.tolist() == [10, -1, 10]
    for now, old in zip(arguments[4:8], before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(now, old, strict=True))


@needs_gpu
def test_cuda_graph_replays_the_update():
    arguments, expected = net_arguments("cuda"), net_arguments("cuda")
    for _ in range(2):  # the warm-up, then the replay
        ops.eacg_update_(*expected)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.eacg_update_(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.eacg_update_(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(arguments[4], expected[4], strict=True):
        assert torch.equal(x, y)


def bfgs_arguments(memory=5):
    """Lists over layers of H, s, y, A, S, Y; one pair's curvature is negative, and one is not finite."""
    generator = torch.Generator().manual_seed(1)
    sizes = (1, 17, 129, 1000, 33)
    h, a = ([random_psd(n) + 0.1 * torch.eye(n, dtype=torch.float64) for n in sizes] for _ in range(2))
    s, y = ([torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes] for _ in range(2))
    s[4][3] = float("nan")
    s_pairs = [torch.randn(memory, n, generator=generator, dtype=torch.float64) for n in sizes]
    y_pairs = [s + 0.1 * torch.randn(s.shape, generator=generator, dtype=torch.float64) for s in s_pairs]
    for pairs in (*s_pairs, *y_pairs):
        pairs[0] = 0
    return h, s, y, a, s_pairs, y_pairs


def bfgs_calls(h, s, y, a, s_pairs, y_pairs):
    """(operator, its arguments) in an order in which each reads what the one before has written."""
    v = [torch.cat([x[:, None]] * 3, 1) for x in y]
    return [
        (ops.double_damping, [s, y, h, 0.2, 0.1]),
        (ops.damped_bfgs_update_, [h, s, y, 0.2, 0.1]),
        (ops.damped_bfgs_update_, [h, s, y, 0.2, 0.1, True, True]),
        (ops.damped_bfgs_update_, [h, s, y, 0.2, 0.1, False, True]),
        (ops.bfgs_update_, [h, y, y]),
        (ops.hessian_action_update_, [h, a, y, 0.3]),
        (ops.lbfgs_product, [s_pairs, y_pairs, v]),
        (ops.damped_lbfgs_update_, [s_pairs, y_pairs, s, y, 0.2, 0.1]),
        (ops.damped_lbfgs_update_, [s_pairs, y_pairs, s, y, 0.2, 0.1, True, True]),
        (ops.damped_lbfgs_update_, [s_pairs, y_pairs, s, y, 0.2, 0.1, False, True]),
        (ops.lbfgs_product, [s_pairs, y_pairs, v]),
    ]


def test_the_operators_of_kbfgs_equal_the_cpus():
    on_cpu = bfgs_arguments()
    on_cuda = moved(on_cpu, DEVICE)
    for (function, expected_arguments), (_, arguments) in zip(bfgs_calls(*on_cpu), bfgs_calls(*on_cuda), strict=True):
        expected, actual = function(*expected_arguments), moved(without_waiting(function, *arguments), "cpu")
        torch.testing.assert_close(actual, moved(expected, "cpu"), rtol=1e-8, atol=1e-8, equal_nan=True)
        torch.testing.assert_close(moved(on_cuda, "cpu"), moved(on_cpu, "cpu"), rtol=1e-8, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("pairs", [33, 100, 128, 129])
def test_limited_memory_of_many_pairs(pairs):
    """More than a lane has one element of, as many as fit the registers, and one more."""
    s, y, v = (torch.randn(count, 1000, dtype=torch.float64) for count in (pairs, pairs, 9))
    y = s + 0.1 * y
    s[0] = y[0] = 0
    on_cpu = [s], [y], [v.T.contiguous()]
    on_cuda = moved(on_cpu, DEVICE)
    expected, actual = ops.lbfgs_product(*on_cpu), without_waiting(ops.lbfgs_product, *on_cuda)
    torch.testing.assert_close(moved(actual, "cpu"), expected, rtol=1e-8, atol=1e-8)
    for (s_pairs, y_pairs, columns), call in ((on_cpu, lambda f, *a: f(*a)), (on_cuda, without_waiting)):
        last = columns[0][:, 0].contiguous()
        call(ops.damped_lbfgs_update_, s_pairs, y_pairs, [last], [last], 0.2, 0.1)
    assert torch.equal(on_cpu[0][0][-1], v[0])
    torch.testing.assert_close(moved(on_cuda, "cpu"), moved(on_cpu, "cpu"), rtol=0, atol=0)


def eigen_arguments(dtype=torch.float64, seed=0):
    """(arguments of a renewal, of a step) of one net, whose tensors both share; sides with no, some and all directions."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [
        (300, 1030, 16, 16, True),
        (33, 300, 33, 16, True),
        (10, 33, 10, 33, True),
        (129, 65, 0, 0, False),
        (1, 1, 1, 0, True),
    ]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def each(f):
        return [f(*size) for size in sizes]

    def rest(n, p, ku, kv, bias):
        return (ku + (n if ku < n else 0)) * (kv + bias) + (ku * p if kv < p else 0)

    def residual(n, p, ku, kv, bias):
        return n * p if ku < n and kv < p else 0

    grads = [each(lambda n, p, ku, kv, bias: normal(n, p)), each(lambda n, p, ku, kv, bias: normal(n if bias else 0))]
    mean = each(lambda n, p, ku, kv, bias: normal(p if bias else 0))
    basis_out = each(lambda n, p, ku, kv, bias: torch.linalg.qr(normal(n, ku).double())[0].T.contiguous().to(dtype))
    basis_in = each(lambda n, p, ku, kv, bias: torch.linalg.qr(normal(p, kv).double())[0].T.contiguous().to(dtype))
    scale_out = each(lambda n, p, ku, kv, bias: normal(ku).abs() + 1)
    scale_in = each(lambda n, p, ku, kv, bias: normal(kv).abs() + 1)
    first = each(lambda *size: normal(rest(*size) + residual(*size)))
    second = each(lambda *size: normal(rest(*size) + residual(*size)).square() + 0.5)
    last = each(lambda *size: normal(rest(*size) + (size[1] if residual(*size) else 0)))
    parameters = [each(lambda n, p, ku, kv, bias: normal(n, p)), each(lambda n, p, ku, kv, bias: normal(n if bias else 0))]
    control = torch.tensor([0.01, 3, 5, -2, 20, 0, 0, 0], dtype=torch.float64)
    size = [torch.full((1,), 0.9, dtype=torch.float64) for _ in sizes]
    sketch = each(lambda n, p, ku, kv, bias: normal(kv + 1, p) if p > 33 else normal(0))
    hessian = each(lambda n, p, ku, kv, bias: normal(n, n) if p in (1030, 33) else normal(0))
    hessian = [h @ h.T if h.numel() else h for h in hessian]
    numbers = [[(0.3, 1.0, 0.1)[k % 3] for k in range(len(sizes))] for _ in range(4)]
    renewal = [mean, basis_out, basis_in, scale_out, scale_in, first, control, *grads, sketch, hessian,
               [9 if s.numel() else 0 for s in sketch], numbers[0]]  # fmt: skip
    step = [*parameters, first, second, last, size, control, *grads, mean, basis_out, basis_in, *numbers, [7] * len(sizes),
            0.9, 0.95, 1e-7]  # fmt: skip
    return renewal, step


def test_eigen_operators_equal_the_specification():
    """Steps and renewals in a row, in float64; the specification runs on the GPU, for its own waits are no matter."""
    (renewal, step), expected = moved(eigen_arguments(), DEVICE), moved(eigen_arguments(), DEVICE)
    # `moved` copies each list anew: what both operators take must be one tensor again.
    for twin in ((renewal, step), expected):
        twin[1][2], twin[1][6], twin[1][9:12] = twin[0][5], twin[0][6], twin[0][:3]
    for renewed in (False, False, True, False, True):
        if renewed:
            without_waiting(ops.eigen_renew_, *renewal)
            reference.eigen_renew_(*expected[0])
        without_waiting(ops.eigen_step_, *step, renewed)
        reference.eigen_step_(*expected[1], renewed)
        torch.testing.assert_close(renewal, expected[0], rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(step, expected[1], rtol=1e-7, atol=1e-8)


def test_eigen_step_is_as_accurate_as_plain_pytorch():
    twins = [eigen_arguments(torch.float32)[1] for _ in range(3)]
    actual = moved(twins[0], DEVICE)
    without_waiting(ops.eigen_step_, *actual, False)
    exact = to_double(twins[2])
    reference.eigen_step_(*twins[1], False)
    reference.eigen_step_(*exact, False)
    for k in range(5):  # parameters, moments, last steps
        for x, plain, y in zip(moved(actual[k], "cpu"), twins[1][k], exact[k], strict=True):
            assert_as_accurate(x, plain, y, ulps=64)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
def test_eigen_operators_leave_everything_where_a_gradient_is_not_finite(number):
    renewal, step = moved(eigen_arguments(), DEVICE)
    renewal[7][3][2, 5] = step[7][3][2, 5] = number
    before, control = copy.deepcopy([renewal[:6], step[:6]]), step[6].clone()
    ops.eigen_step_(*step, False)
    control[5] += 1
    if number != 1e300:
        ops.eigen_renew_(*renewal)
        assert renewal[6][6] == 1
        torch.testing.assert_close(renewal[:6], before[0], rtol=0, atol=0)
    torch.testing.assert_close(step[:6], before[1], rtol=0, atol=0)
    assert torch.equal(step[6], control)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_eigen_sketch(size, dtype):
    n_in, k, batch = size[1], min(size[1], 16), size[2]
    inputs, shift, sketch = (
        torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in ((batch, n_in), (n_in,), (k + 1, n_in))
    )
    basis = torch.linalg.qr(torch.randn(n_in, k, dtype=torch.float64))[0].T.contiguous().to(dtype)
    actual, plain, exact = moved(sketch, DEVICE), sketch.clone(), sketch.double()
    without_waiting(ops.eigen_sketch_, actual, *moved([inputs, basis, shift], DEVICE))
    reference.eigen_sketch_(plain, inputs, basis, shift)
    reference.eigen_sketch_(exact, *to_double([inputs, basis, shift]))
    assert_as_accurate(actual.cpu(), plain, exact, ulps=64)


def test_eigen_step_is_the_same_every_time():
    """Sums in one order, whatever block comes first: to the bit."""
    results = []
    for _ in range(3):
        renewal, step = moved(eigen_arguments(torch.float32), DEVICE)
        ops.eigen_renew_(*renewal)
        ops.eigen_step_(*step, True)
        results.append([*renewal[:7], *step[:7]])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


OPTIMIZERS = {
    "EACG": lambda m, c: so.EACG(m, c),
    "EACG truncated": lambda m, c: so.EACG(m, c, solver="ea-cg-truncated", momentum=0, factor_decay=0),
    "LayerwiseNewton": lambda m, c: so.LayerwiseNewton(m, c),
    "KFLR": lambda m, c: so.KFLR(m, c),
    "KFRA": lambda m, c: so.KFRA(m, c),
    "KFAC": lambda m, c: so.KFAC(m, c),
    "KBFGS": lambda m, c: so.KBFGS(m, c, lr=0.1),
    "KBFGSL": lambda m, c: so.KBFGSL(m, c, lr=0.1, memory=4),
    "EigenAdam": lambda m, _: so.EigenAdam(m),
}


def trained(make, device, steps=8):
    """The losses of a small net's training, and its parameters after it, on the CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 17), nn.Sigmoid(), nn.Linear(17, 12), nn.Softplus(), nn.Linear(12, 5)
    )
    x, y = torch.randn(200, 20, dtype=torch.float64).to(device), torch.randint(5, (200,)).to(device)
    model, criterion = model.double().to(device), nn.CrossEntropyLoss()
    optimizer = make(model, criterion)

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    losses = []
    for _ in range(steps):
        optimizer.step(closure)
    assert all(p.device.type == device for p in model.parameters())
    return losses, [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_as_on_the_cpu(name):
    losses, parameters = trained(OPTIMIZERS[name], DEVICE)
    assert losses[-1] < losses[0]
    if name == "KFAC":  # draws labels, other ones on every device
        return
    expected_losses, expected_parameters = trained(OPTIMIZERS[name], "cpu")
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    torch.testing.assert_close(parameters, expected_parameters, rtol=1e-5, atol=1e-6)


@needs_gpu
def test_eigen_adam_waits_for_nothing_and_tells_later_of_what_is_not_finite():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 5)).cuda()
    optimizer = so.EigenAdam(model)
    x, y = torch.randn(64, 20, device="cuda"), torch.randint(5, (64,), device="cuda")

    def step(poison=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if poison:
            model[0].weight.grad[0, 0] = float("nan")
        optimizer.step()

    for _ in range(3):  # in which state is made
        step()
    for _ in range(12):
        without_waiting(step)
    before = [p.detach().clone() for p in model.parameters()]
    step(poison=True)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(so.NonFiniteError):
        step()
    step()
    assert optimizer.skipped_steps == 1
    assert optimizer._shared_state()["steps"] == 16


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "convolutions"])
def test_replays_of_a_captured_step_make_eigen_adams_steps(kind, dtype):
    """Passes and step in a CUDA graph against the same steps without one, with renewals, a schedule and a refused step."""

    def net():
        torch.manual_seed(0)
        first = nn.Linear(20, 33) if kind == "linear" else nn.Sequential(
            nn.Unflatten(1, (1, 20)), nn.Conv1d(1, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(108, 33)
        )  # fmt: skip
        return nn.Sequential(first, nn.Tanh(), nn.Linear(33, 5)).to("cuda", dtype)

    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(64, 20, generator=generator).to("cuda", dtype) for _ in range(7)]
    target, x = torch.arange(64, device="cuda") % 5, data[0].clone()
    model, twin = net(), net()
    lr = torch.tensor(1.0, device="cuda")
    optimizer, eager = so.EigenAdam(model, lr, capturable=True, nonfinite="skip"), so.EigenAdam(twin, nonfinite="skip")

    def step(own, made_by):
        made_by.zero_grad()
        nn.functional.cross_entropy(own(x), target).backward()
        made_by.step()

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for t in range(26):
        x.copy_(data[t % 7])
        if t == 21:
            x[0, 0] = float("nan")
        eager.param_groups[0]["lr"] = 0.98**t
        lr.fill_(0.98**t)
        step(twin, eager)
        if t < 6:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(model, optimizer)
            torch.cuda.current_stream().wait_stream(stream)
            continue
        if t == 6:
            with torch.cuda.graph(graph):
                step(model, optimizer)
        without_waiting(graph.replay)
        torch.cuda.synchronize()
        eager._read_reports()  # so that renewals are due at the same steps
        tolerance = 1e-6 if dtype is torch.float64 else 0.05
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=tolerance, atol=tolerance)
    assert optimizer.skipped_steps == eager.skipped_steps == 1
    own, other = optimizer.state_dict()["state"], eager.state_dict()["state"]
    assert all(own[p][key] == other[p][key] for p in own for key in ("step", "steps", "unseen") if key in own[p])
    step(model, optimizer)
    step(twin, eager)
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=tolerance, atol=tolerance)


@needs_gpu
@pytest.mark.filterwarnings("ignore:secondorder:")  # of the fallback and of the empirical Fisher block
@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("kind", ["linear", "normalized"])
def test_replays_of_a_captured_step_make_eacgs_steps(kind, lr):
    """Passes and step in a CUDA graph against the same steps without one, with a schedule, refused steps and one by Python."""

    def net():
        torch.manual_seed(0)
        between = nn.LayerNorm(33) if kind == "normalized" else nn.Identity()
        first = nn.Linear(20, 33, bias=kind == "linear")
        return nn.Sequential(first, between, nn.Tanh(), nn.Linear(33, 17), nn.Sigmoid(), nn.Linear(17, 5)).to("cuda").double()

    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(64, 20, generator=generator).to("cuda").double() for _ in range(7)]
    labels = torch.arange(64, device="cuda") % 5
    model, twin, criterion = net(), net(), nn.CrossEntropyLoss()
    rate = torch.tensor(0.2, dtype=torch.float64, device="cuda") if lr == "tensor" else 0.2
    options = {"weight_decay": 0.1, "average": True, "nonfinite": "skip"}
    optimizer, eager = so.EACG(model, criterion, rate, capturable=True, **options), so.EACG(twin, criterion, 0.2, **options)
    x, target = data[0].clone(), labels.clone()

    def step(own, made_by):
        made_by.zero_grad()
        criterion(own(x), target).backward()
        made_by.step()

    def assert_alike():
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-6, atol=1e-6)

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for t in range(24):
        x.copy_(data[t % 7])
        target.copy_(labels)
        if t == 11:
            x[0, 0] = float("nan")
        if t == 15:
            target[0] = -100  # which no replay can leave out
        if lr == "tensor":
            eager.param_groups[0]["lr"] = 0.2 * 0.98**t
            rate.fill_(0.2 * 0.98**t)
        if t != 15:
            step(twin, eager)
        if t < 4 or t == 20:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(model, optimizer)
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if t == 4:
                with torch.cuda.graph(graph):
                    step(model, optimizer)
            without_waiting(graph.replay)
            torch.cuda.synchronize()
        assert_alike()
    assert (optimizer.skipped_steps, eager.skipped_steps) == (2, 1)
    torch.testing.assert_close(optimizer.state_dict()["state"], eager.state_dict()["state"], rtol=1e-6, atol=1e-6)
    optimizer.load_state_dict(optimizer.state_dict())
    step(model, optimizer)
    step(twin, eager)
    assert_alike()


@needs_gpu
def test_a_replay_of_eacg_that_is_refused_is_told_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 5)).cuda()
    optimizer, x = so.EACG(model, nn.MSELoss(), capturable=True), torch.randn(64, 20, device="cuda")
    target = torch.randn(64, 5, device="cuda")

    def step():
        optimizer.zero_grad()
        optimizer.criterion(model(x), target).backward()
        optimizer.step()

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    before = [p.detach().clone() for p in model.parameters()]
    x[0, 0] = float("nan")
    graph.replay()
    assert all(torch.equal(p, own) for p, own in zip(model.parameters(), before, strict=True))
    x[0, 0] = 0.0
    with pytest.raises(so.NonFiniteError, match="replays of CUDA graphs have met NaN or inf"):
        step()
    step()
    assert optimizer.skipped_steps == 1
    assert optimizer.state[model[0].weight]["step"] == 5


@pytest.mark.parametrize("solver", ["rows", "parameters", "nystrom"])
def test_levenberg_marquardt_steps_as_on_the_cpu(solver):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 1)).double()
    points, edge = torch.rand(150, 2).double(), torch.rand(20, 2).double()

    def trained(device):
        model = copy.deepcopy(net).to(device)
        x, other = points.to(device).requires_grad_(), edge.to(device)

        def loss():
            u_x = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
            return ((u_x[:, :1] - u_x[:, 1:] - 1) ** 2).mean() + (model(other) ** 2).mean()

        optimizer = so.LevenbergMarquardt(model.parameters(), rows=40, race=False, solver=solver, damping=0.1, holdout=True)
        for _ in range(4):
            optimizer.step(loss)
        return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()

    tolerance = 1e-2 if solver == "nystrom" else 1e-6  # conjugate gradients end at a hundredth
    torch.testing.assert_close(trained(DEVICE), trained("cpu"), rtol=tolerance, atol=tolerance)


def test_a_criterion_with_a_table_of_the_batchs_rows_is_evaluated_on_the_host():
    """Taken twice, the batch indexes the table beyond its end, which no process survives on a GPU."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).to(DEVICE), torch.randn(8, 4, device=DEVICE), torch.randn(8, 3, device=DEVICE)
    table = torch.linspace(1, 2, 8, device=DEVICE)

    def criterion(z, y):
        return (table[torch.arange(len(z), device=z.device)] * (z - y).square().sum(1)).sum()

    optimizer = so.EACG(model, criterion, lr=0.0, curvature="fisher-empirical", factor_decay=0.0)
    z = model(x)
    expected = torch.autograd.grad(criterion(z, y), z, retain_graph=True)[0]
    optimizer.criterion(z, y).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model.weight]["factors"]["bias_hessian"], expected.T @ expected)
