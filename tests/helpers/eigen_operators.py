"""What the tests of EigenAdam's operators share: matrices of every kind, and calls of an operator for all of them."""

import torch
from oracles import assert_as_accurate

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


def coordinates(each):
    """G', X, U and V of a matrix."""
    u, v, g = each["basis_out"].T, each["basis_in"].T, each["grad_weight"]
    if not each["mean"].numel():
        return g, g @ v, u, v
    g = g - torch.outer(each["grad_bias"], each["mean"])
    return g, torch.cat([g @ v, each["grad_bias"].unsqueeze(1)], 1), u, v


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
    whole, x, u, v = coordinates({**made, "grad_weight": normal(n, p), "grad_bias": normal(n if bias else 0)})
    moment = [u.T @ x, x - u @ u.T @ x, u.T @ (whole - whole @ v @ v.T)]
    moment.append((whole - u @ u.T @ whole) @ (torch.eye(p, dtype=whole.dtype) - v @ v.T))
    root = normal(n, n) if curved else None
    hessian = normal(0) if root is None else root @ root.T
    return {
        **made,
        "first": torch.cat([part.flatten() for part, length in zip(moment, lengths(n, p, ku, kv, bias), strict=True) if length]),
        "bias_hessian": hessian,
    }


def cast(matrices, dtype):
    return [{k: v.clone() if k == "size" else v.to(dtype, copy=True) for k, v in each.items()} for each in matrices]


def controls():
    return torch.tensor([0.01, 3, 0.5, 0.1, 20, 0, 0, 0], dtype=torch.float64)


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
