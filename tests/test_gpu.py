"""The CUDA operators on a GPU, against float64 oracles and without any wait for the device. Skipped without a GPU."""

import copy

import pytest
import torch
from oracles import assert_as_accurate, random_psd

import secondorder as so
from secondorder import ops, reference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or so.build_info()["cuda_architectures"] is None,
    reason="needs a GPU and secondorder built with CUDA",
)

DTYPES = [torch.float32, torch.float64]
SIZES = [(1, 1, 1), (2, 3, 17), (17, 129, 5), (129, 64, 33), (256, 1024, 1000), (1024, 2050, 300)]  # (n_out, n_in, batch)


@pytest.fixture(autouse=True)
def _no_waiting():
    """Any synchronisation that PyTorch knows of is an error inside an operator."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(function, *arguments):
    """function(*arguments) on the GPU, with synchronisation forbidden; its tensors on the CPU."""
    moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    result = function(*moved)
    torch.cuda.set_sync_debug_mode("default")
    return [t.cpu() for t in result] if isinstance(result, tuple) else result.cpu()


def to_double(arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


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


def test_eacg_update_equals_the_cpu_operator():
    on_cpu, on_cuda = net_arguments("cpu"), net_arguments("cuda")
    expected = ops.eacg_update_(*on_cpu)
    torch.cuda.set_sync_debug_mode("error")
    actual = ops.eacg_update_(*on_cuda)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual.cpu(), expected)
    for cuda_list, cpu_list in zip(on_cuda[4:8], on_cpu[4:8], strict=True):
        for x, y in zip(cuda_list, cpu_list, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=1e-9, atol=1e-9)


def test_eacg_update_leaves_everything_where_a_layer_is_not_finite():
    arguments = net_arguments("cuda")
    arguments[2][1][0, 0] = float("nan")
    before = copy.deepcopy(arguments[4:8])
    iterations = ops.eacg_update_(*arguments)
    assert iterations.tolist() == [10, -1, 10]
    for now, old in zip(arguments[4:8], before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(now, old, strict=True))


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
