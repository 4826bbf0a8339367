"""EigenAdam's renewal of bases and its step for one matrix, of which a process may have some rows alone.

A process that has some rows of W, b, G, g, R and E needs few sums over all rows of the matrix. So the renewal and the step are
generators: each yields the tensors that are to be summed over all processes, is sent the sums, and writes nothing before the
first sums have come. In one process, which has all rows, the sums are what was yielded (`secondorder.reference.eigen`);
`secondorder.optim` exchanges them where several processes share the rows.

The notation is that of `secondorder.ops.eigen_step_`: bases U [n, ku] and V [p, kv], G' = G - g a^T and X = [G' V, g] with a
bias, else G' = G and X = G V, and the gradient's parts C, R, T and E.
"""

import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor


def eigen_shapes(n: int, p: int, ku: int, kv: int, bias: bool) -> dict[str, tuple[int, int]]:
    """Returns the shapes of a gradient's parts by their names C, R, T and E, without the parts that are missing."""
    c = kv + bias
    shapes = {"C": (ku, c), "R": (n, c), "T": (ku, p), "E": (n, p)}
    missing = {"R": ku == n, "T": kv == p, "E": ku == n or kv == p}
    return {part: shape for part, shape in shapes.items() if not missing.get(part)}


def eigen_split(flat: Tensor, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Returns views of the parts that a flat tensor holds; it may hold fewer rows of E, the last part, than `shapes` says."""
    found, begin = {}, 0
    for part, (rows, columns) in shapes.items():
        end = len(flat) if part == "E" else begin + rows * columns
        found[part], begin = flat[begin:end].view(-1, columns) if columns else flat.new_empty(rows, 0), end
    return found


def orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Makes the rows orthonormal one after another.

    Returns:
        The new rows, and the length that each had once the rows before it were projected out. A row that depends on those before
        it is replaced by a hashed one, with length 0.
    """
    tolerance, tiny = 16 * torch.finfo(rows.dtype).eps, torch.finfo(rows.dtype).tiny
    # Rows grow as squares of a gradient: squares of their lengths would leave the range of numbers. A power of 2 rounds nothing.
    scale = rows.abs().max().clamp(min=tiny).log2().floor().exp2() if rows.numel() else 1.0
    rows = rows / scale
    largest = rows.norm(dim=1).max() if len(rows) else 0
    basis, lengths = torch.zeros_like(rows), torch.zeros_like(rows[:, 0])
    for q, row in enumerate(rows):
        start = row.norm()
        row = row - (row @ basis.T) @ basis
        if row.norm() > tolerance * start and row.norm() > tolerance * largest:
            lengths[q] = row.norm()
        else:
            row = _hashed_row(len(row), q).to(row.dtype).to(row.device)
            row = row - (row @ basis.T) @ basis
        row = row / row.norm()
        row = row - (row @ basis.T) @ basis  # once more, against rounding
        basis[q] = row / row.norm()
    return basis, lengths * scale


def eigen_renew_rows_(
    mean: Tensor,
    basis_out: Tensor,
    basis_in: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    first: dict[str, Tensor],
    grad_weight: Tensor,
    grad_bias: Tensor,
    sketch: Tensor,
    bias_hessian: Tensor,
    rows: int,
    share: float,
    start: int,
    orthonormal: Callable[[Tensor], tuple[Tensor, Tensor]] = orthonormal,
) -> Generator[list[Tensor], list[Tensor], None]:
    """Renews the bases of one matrix, given the rows of G, g and of R in `first` that begin at row `start`.

    All other arguments are those of the whole matrix.
    """
    u, v, here = basis_out.T.clone(), basis_in.T.clone(), slice(start, start + len(grad_weight))
    bias, moved, move = mean.numel() > 0, mean, torch.zeros_like(basis_in[:1].sum(0))
    if bias and rows:
        move = share * sketch[-1] / rows
        moved = mean + move
    g = grad_weight - torch.outer(grad_bias, moved) if bias else grad_weight
    along, *inputs = yield [u[here].T @ g, *([] if rows else [(g @ v).T @ g])]
    if rows:  # sum (x - move) (x - move)^T V from the sums over x
        vx, vm = v.T @ sketch[-1], v.T @ move
        sums = sketch[:-1] - torch.outer(vm, sketch[-1]) - torch.outer(vx, move) + rows * torch.outer(vm, move)
        inputs = [sums / rows]
    if bias_hessian.numel():
        outputs = u.T @ bias_hessian
    else:
        outputs = torch.zeros_like(basis_out)
        outputs[:, here] = along @ g.T
        (outputs,) = yield [outputs]
    mean.copy_(moved)
    for basis, scale, product in ((basis_in, scale_in, inputs[0]), (basis_out, scale_out, outputs)):
        new, lengths = orthonormal((1 - share) * scale.unsqueeze(1) * basis + share * product)
        basis.copy_(new)
        scale.copy_(lengths)
    # The first moments turn into the new bases; E stays as it is.
    rows_turn, columns_turn = basis_out @ u, torch.block_diag(v.T @ basis_in.T, *[u.new_ones(1, 1)] * bias)
    first["C"].copy_(rows_turn @ first["C"] @ columns_turn)
    if "R" in first:
        first["R"].copy_(first["R"] @ columns_turn)
    if "T" in first:
        first["T"].copy_(rows_turn @ first["T"])


def eigen_step_rows_(
    weight: Tensor,
    bias: Tensor,
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    last: dict[str, Tensor],
    size: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    mean: Tensor,
    basis_out: Tensor,
    basis_in: Tensor,
    length: float,
    lr: float,
    lr_bias: float,
    decay: float,
    decay_bias: float,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    start: int,
    sampled: int,
) -> Generator[list[Tensor], list[Tensor], Tensor]:
    """Makes the step of one matrix, given the rows of W, b, G, g, R and E that begin at row `start`.

    All other arguments are those of the whole matrix. `last` holds `sampled` evenly spaced rows of E, whose slopes stand for
    those of all rows; where `sampled` is the number of all rows, it holds the rows from `start` on.

    Returns:
        [2]: the slopes along this step and along the one before.
    """
    (rows, p), (ku, n), kv = grad_weight.shape, basis_out.shape, len(basis_in)
    u, v, with_bias = basis_out[:, start : start + rows].T, basis_in.T, mean.numel() > 0 or grad_bias.numel() > 0
    g, x = _centred(grad_weight, grad_bias, mean, v, with_bias)
    square, c, q = yield [to_float64(grad_weight, size).square().sum(), u.T @ x, u.T @ g]
    size.clamp_(min=(square / max(n * p, 1)).sqrt())
    floor, of = (eps * size + torch.finfo(weight.dtype).tiny).to(weight), parts_of_rows(g, x, c, q, u, v)
    normed, fresh = {}, []
    slopes, slopes_here = size.new_zeros(2), size.new_zeros(2)  # of the parts that are whole, and of the rows that are here
    for part, m in first.items():
        x, v2, before, factor = of[part], second[part], last[part], 1.0
        waits = (x == 0) & (ku + kv == 0)  # without bases, an element whose gradient is zero keeps its state
        m.copy_(torch.where(waits, m, beta1 * m + (1 - beta1) * x))
        v2.copy_(torch.where(waits, v2, beta2 * v2 + (1 - beta2) * x * x))
        ahead = beta1 * m / (1 - beta1 ** (step + 2)) + (1 - beta1) * x / (1 - beta1 ** (step + 1))
        new = (math.sqrt(1 - beta2 ** (step + 1)) * ahead / (v2.sqrt() + floor)).clamp(-1.2, 1.2).masked_fill(waits, 0.0)
        normed[part] = new
        if part == "E" and sampled < n:
            low, high = (-(-edge * sampled // n) for edge in (start, start + rows))
            chosen, factor = torch.arange(low, high, device=x.device) * n // sampled - start, n / sampled
            x, new, waits, whole, before = x[chosen], new[chosen], waits[chosen], before, before[low:high]
            fresh.append(torch.zeros_like(whole))
            fresh[0][low:high] = torch.where(waits, before, new)
        along = [to_float64(x, size).flatten() @ to_float64(direction, size).flatten() for direction in (new, before)]
        (slopes if part in "CT" else slopes_here).add_(factor * torch.stack(along))
        if not (part == "E" and fresh):
            before.copy_(torch.where(waits, before, new))
    slopes_here, *sums = yield [slopes_here, *(u.T @ normed[part] for part in "RE" if part in normed), *fresh]
    if fresh:
        last["E"].copy_(sums.pop())
    s, y = gradient_of_rows(normed, dict(zip([part for part in "RE" if part in normed], sums, strict=True)), u, v)
    s = s * (grad_weight != 0)
    weight.mul_(1 - length * lr * decay).sub_(length * lr * s)
    if with_bias:
        y = (y[:, -1] - s @ mean) * (grad_bias != 0)
        bias.mul_(1 - length * lr_bias * decay_bias).sub_(length * lr_bias * y)
    return slopes + slopes_here


def parts_of_rows(g: Tensor, x: Tensor, ux: Tensor, ug: Tensor, u: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Returns the parts C and T, and the rows of R and E that belong to some rows of G', X and U.

    Args:
        g: the rows of G'.
        x: the rows of X.
        ux: U^T X over all rows.
        ug: U^T G' over all rows.
        u: the rows of U.
        v: V.
    """
    rest = g - u @ ug
    return {"C": ux, "R": x - u @ ux, "T": ug - (ug @ v) @ v.T, "E": rest - rest @ v @ v.T}


def gradient_of_rows(parts: dict[str, Tensor], along: dict[str, Tensor], u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows of S and Y that belong to some rows of U: the way back from parts to the weight and the bias.

    Args:
        parts: the parts that there are, C and T whole, the rows of R and E.
        along: U^T R and U^T E over all rows.
        u: the rows of U.
        v: V.
    """
    y, inner = u @ parts["C"], u.new_zeros(len(u), len(v))
    if "R" in parts:
        y = y + parts["R"] - u @ along["R"]
    if "T" in parts:
        inner = inner + u @ parts["T"]
    if "E" in parts:
        inner = inner + parts["E"] - u @ along["E"]
    return inner - inner @ v @ v.T + y[:, : v.shape[1]] @ v.T, y


def to_float64(t: Tensor, like: Tensor) -> Tensor:
    """Returns the tensor in float64, on the device of `like`: MPS has no float64, so it may be another one."""
    return t.to(like.device).double()


def _centred(grad_weight: Tensor, grad_bias: Tensor, mean: Tensor, v: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Returns some rows of G' and of X from these rows of G and g."""
    if not bias:
        return grad_weight, grad_weight @ v
    g = grad_weight - torch.outer(grad_bias, mean)
    return g, torch.cat([g @ v, grad_bias.unsqueeze(1)], 1)


def _hashed_row(n: int, q: int) -> Tensor:
    """Returns n numbers in [-1, 1): 32-bit hashes of their positions and q, the same in every process and kernel."""
    mask = 2**32 - 1
    u = (torch.arange(n, device="cpu") * 2654435761 + q * 40503 + 12345) & mask
    u = ((u ^ (u >> 15)) * 2246822519) & mask
    u = u ^ (u >> 13)
    return u.double() / 2**31 - 1
