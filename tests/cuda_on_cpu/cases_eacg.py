"""EA-CG's solve and its update of a whole net."""

import copy

import case_tools
import numpy as np
import torch
from case_tools import assert_accurate, case, double, normal, same, spd
from harness import Device, EacgLayer, Kernels

from secondorder import ops, reference


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
    for dtype in case_tools.DTYPES:
        for truncated in (False, True):
            layers = eacg_layers(np.random.default_rng(3), dtype, NET, None)
            check_eacg(kernels, layers, 8, 1e-3, truncated, False, Device(multiprocessors=12))


@case
def eacg_update(kernels: Kernels) -> None:
    for dtype in case_tools.DTYPES:
        for truncated in (False, True):
            layers = eacg_layers(np.random.default_rng(4), dtype, NET, 0 if truncated else 1)
            if truncated:
                for layer in layers:
                    layer.weight_momentum = layer.bias_momentum = None
            check_eacg(kernels, layers, 5, 0.0, truncated, True, Device(multiprocessors=12))


@case
def eacg_bounded(kernels: Kernels) -> None:
    """Layers without a bound, within theirs and beyond it, with and without a bias; a layer within it is as without."""
    for dtype in case_tools.DTYPES:
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
        ("grad_bias", {"lr": 1e3}, True),
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


@case
def eacg_alpha_beyond_the_dtype(kernels: Kernels) -> None:
    """As eacg_overflow where 1 / alpha itself leaves float32's range, though no direction does: the gradient is zero."""
    layers = eacg_layers(np.random.default_rng(17), np.float32, [(9, 5), (4, 7)], None)
    layers[0].grad_weight[:] = 0
    for alpha, refused in ((1e-37, False), (1e-39, True)):
        layers[0].alpha = alpha
        before = copy.deepcopy(layers)
        assert (kernels.eacg(layers, 3, 0.0, False, True, Device())[0] == -1) == refused
        assert all(np.isfinite(layer.weight).all() for layer in layers)
        assert np.array_equal(layers[1].weight, before[1].weight) == refused
