"""EigenAdam's sketches, renewals and steps."""

import copy
import dataclasses

import case_tools
import numpy as np
import torch
from case_tools import assert_accurate, case, double, exact_size, normal, same, spd
from harness import EigenMatrix, Kernels

from secondorder import reference


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
    (36, 72, 4, 4, False, 5),  # rows of all arrays begin at a multiple of 16 bytes; in the next one not those of the moments
    (37, 72, 4, 4, True, 5),
]


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
    return np.array([0.01, 3.0, 5.0, -2.0, 20.0, 1.0, 0.0, 0.0])


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
    for dtype in case_tools.DTYPES:
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
    for dtype in case_tools.DTYPES:
        for multiprocessors in (4, 1):
            net = eigen_net(np.random.default_rng(21), dtype, EIGEN_NET)
            if multiprocessors == 1:
                net = [*net, *eigen_net(np.random.default_rng(22), dtype, [(260, 140, 8, 7, True, 11)])]
            check_eigen(kernels, net, multiprocessors, "sss")


@case
def eigen_start(kernels: Kernels) -> None:
    """From nothing: no moments, sizes, last steps, and the control as it starts."""
    for dtype in case_tools.DTYPES:
        net = eigen_net(np.random.default_rng(23), dtype, EIGEN_NET)
        for matrix in net:
            for name in ("first", "second", "last", "size"):
                getattr(matrix, name)[:] = 0
            matrix.step = 0
        control = np.array([0.01, 0, 0, 0, 0, 0, 0, 0])
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
    for dtype in case_tools.DTYPES:
        net = eigen_net(np.random.default_rng(24), dtype, EIGEN_NET)
        check_eigen(kernels, net, 1, "rsrs", slack=400)
        tolerance = 1e-5 if dtype is np.float32 else 1e-13
        for matrix in net:
            for basis in (matrix.basis_out, matrix.basis_in):
                np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), rtol=0, atol=tolerance)


@case
def eigen_replays(kernels: Kernels) -> None:
    """Calls with the numbers of the first one, as a CUDA graph repeats them, do what calls with the numbers of each would."""
    every, since, decay = 3, 20, 0.9
    for dtype in case_tools.DTYPES:
        rng, control = np.random.default_rng(29), eigen_control()
        net = eigen_net(rng, dtype, EIGEN_NET[::2])
        twins = [EigenTwin(net, control, exact) for exact in (True, False)]
        rate = 0.5 + rng.random((len(net), 2))
        steps, shares = [matrix.step for matrix in net], [matrix.share for matrix in net]
        for t in range(since, since + 5):
            due = t % every == 0
            kernels.eigen_renew(net, control, 4, every, since, decay)
            kernels.eigen_step(net, control, 4, *EIGEN_RULE, True, every, since, rate)
            now = [
                dataclasses.replace(matrix, step=step + t - since, share=share, lr=matrix.lr * r, lr_bias=matrix.lr_bias * s)
                for matrix, step, share, (r, s) in zip(net, steps, shares, rate, strict=True)
            ]
            for twin in twins:
                if due:
                    twin.renew(now)
                twin.step(now, due)
            if due:
                shares = [share / (share + decay) for share in shares]
            assert_eigen(net, control, *twins, slack=400)
            next_gradients(rng, net)
            for matrix, step in zip(net, steps, strict=True):
                matrix.step = step


@case
def eigen_replays_that_renew_nothing(kernels: Kernels) -> None:
    """Between renewals a replay leaves bases and sketches as they are, whatever the gradients; a rate must be a number >= 0."""
    sizes = [(5, 9, 2, 3, True, 2), (33, 30, 8, 8, True, 3), (6, 4, 6, 4, True, 0)]
    for dtype in case_tools.DTYPES:
        net, control = eigen_net(np.random.default_rng(30), dtype, sizes), eigen_control()
        net[1].grad_weight[0, 0] = np.nan
        before = copy.deepcopy(net)
        kernels.eigen_renew(net, control, 4, 3, 18, 0.9)
        for matrix, old in zip(net, before, strict=True):
            for name in RENEWED:
                np.testing.assert_array_equal(getattr(matrix, name), getattr(old, name))
        np.testing.assert_array_equal(control, eigen_control())
        h, shift = normal(np.random.default_rng(31), 70, 30, dtype=dtype), np.zeros(0, dtype)
        for steps, changes in ((20.0, False), (21.0, True)):
            control[4], sketch = steps, np.zeros((9, 30), dtype)
            kernels.eigen_sketch(sketch, h, net[1].basis_in, shift, 4, control, 3)
            assert sketch.any() == changes
        net[1].grad_weight[0, 0] = 0
        for bad in (np.nan, np.inf, -1.0):
            before, control, rate = copy.deepcopy(net), eigen_control(), np.ones((3, 2))
            rate[2, 1] = bad
            kernels.eigen_step(net, control, 4, *EIGEN_RULE, False, 0, 0, rate)
            np.testing.assert_array_equal(control - eigen_control(), [0, 0, 0, 0, 0, 1, 0, 0])
            for matrix, old in zip(net, before, strict=True):
                for name in STEPPED:
                    np.testing.assert_array_equal(getattr(matrix, name), getattr(old, name))


@case
def eigen_lost_directions(kernels: Kernels) -> None:
    """Rows that depend on those before them, or are zero, are drawn anew as the specification draws them."""
    for dtype in case_tools.DTYPES:
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
    sizes = [(1 + k % 5, 2 + k % 3, k % 2, k % 3, k % 4 > 0, 1) for k in range(case_tools.MANY)]
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
    for dtype in case_tools.DTYPES:
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
    """Some of the matrices."""
    global EIGEN_NET
    EIGEN_NET = [EIGEN_NET[k] for k in (2, 5, 8, 15, 16)]
