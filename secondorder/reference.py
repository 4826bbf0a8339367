"""The operators in plain PyTorch: what `secondorder.ops` must equal, and what stands in for it where there is no kernel.

Each function reads like its equation, has the signature of its twin in `secondorder.ops` (documented there), and works on
any device and dtype. It does not check its arguments, and nothing here is fast on purpose.
"""

import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor


def _also_lists(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function of one layer take lists over the layers of a net, as its twin does."""

    @functools.wraps(function)
    def either(*args: Any) -> Any:
        if isinstance(args[0], Tensor):
            return function(*args)
        columns = [arg if isinstance(arg, list | tuple) else [arg] * len(args[0]) for arg in args]
        results = [function(*layer) for layer in zip(*columns, strict=True)]
        if not results or isinstance(results[0], Tensor):
            return results
        return tuple(torch.stack(r) if r[0].dim() == 0 else list(r) for r in zip(*results, strict=True))

    return either


def pos_eig(eigenvalues: Tensor, gamma: float) -> Tensor:
    """Pos-Eig on eigenvalues: a negative one l becomes gamma * l (Chen et al., between Eq. 3 and 4)."""
    return torch.where(eigenvalues < 0, gamma * eigenvalues, eigenvalues)


def activation_derivatives(saved: Tensor, activation: str, parameter: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sigma' and sigma'' by autograd, at the preactivation that `saved` stands for."""
    function, inverse = _ACTIVATIONS[activation]
    z = inverse(saved, parameter).detach().requires_grad_()
    with torch.enable_grad():
        ones = torch.ones_like(z)
        (d1,) = torch.autograd.grad(function(z, parameter), z, ones, create_graph=True)
        if not d1.requires_grad:
            return d1, torch.zeros_like(d1)
        (d2,) = torch.autograd.grad(d1, z, ones, allow_unused=True, materialize_grads=True)
    return d1.detach(), d2


_F = torch.nn.functional
# name -> (the activation of z, the preactivation z from what autograd saves: the output, or z itself)
_ACTIVATIONS = {
    "identity": (lambda z, p: z * 1, lambda h, p: h),
    "sigmoid": (lambda z, p: torch.sigmoid(z), lambda h, p: torch.logit(h)),
    "tanh": (lambda z, p: torch.tanh(z), lambda h, p: torch.atanh(h)),
    "relu": (lambda z, p: torch.relu(z), lambda h, p: h),
    "leaky_relu": (lambda z, p: _F.leaky_relu(z, p), lambda h, p: torch.where(h > 0, h, h / p)),
    "elu": (lambda z, p: _F.elu(z, p), lambda h, p: torch.where(h > 0, h, torch.log1p(h.clamp(max=0) / p))),
    "softplus": (lambda z, p: _F.softplus(z, p), lambda z, p: z),
    "silu": (lambda z, p: _F.silu(z), lambda z, p: z),
    "gelu": (lambda z, p: _F.gelu(z), lambda z, p: z),
    "gelu_tanh": (lambda z, p: _F.gelu(z, approximate="tanh"), lambda z, p: z),
}


def bias_hessian(
    bias_hessian: Tensor, weight: Tensor, d1: Tensor, d2: Tensor | None, grad_input: Tensor | None, gamma: float
) -> Tensor:
    """Eq. 8b: (W^T H W) * E[d1 d1^T] + diag(PosEig(sum_i d2_i * grad_input_i))."""
    result = (weight.T @ bias_hessian @ weight) * (d1.T @ d1 / len(d1))
    if d2 is not None and grad_input is not None:
        result += torch.diag(pos_eig((d2 * grad_input).sum(0), gamma))
    return result


_step = bias_hessian  # the parameters of this name hide it below


def bias_hessian_activation(
    bias_hessian: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    parameter: float,
    grad_input: Tensor | None,
    gamma: float,
) -> Tensor:
    """Eq. 8b with the derivatives of a known activation."""
    d1, d2 = activation_derivatives(saved, activation, parameter)
    return _step(bias_hessian, weight, d1, None if grad_input is None else d2, grad_input, gamma)


def bias_hessian_chain(
    bias_hessian: Tensor,
    weight: Sequence[Tensor],
    saved: Sequence[Tensor],
    activation: Sequence[str],
    parameter: Sequence[float],
    grad_input: Sequence[Tensor | None],
    gamma: float,
) -> list[Tensor]:
    """Eq. 8b layer after layer, going down."""
    hessians = [bias_hessian]
    for layer in zip(weight, saved, activation, parameter, grad_input, strict=True):
        hessians.append(bias_hessian_activation(hessians[-1], *layer, gamma))
    return hessians[1:]


def cross_entropy_hessian(output: Tensor, target: Tensor, ignore_index: int = -100, mean: bool = True) -> Tensor:
    """The sum of diag(p) - p p^T over the instances that count, or the mean."""
    p = output[target.long() != ignore_index].softmax(1)  # uint8 has no -100
    return (torch.diag(p.sum(0)) - p.T @ p) / (len(p) if mean and len(output) else 1)


def mean_inputs(input: Sequence[Tensor]) -> list[Tensor]:
    """Every layer's E[h]."""
    return [h.mean(0) for h in input]


def average_(new: Sequence[Tensor], old: Sequence[Tensor], share: float) -> None:
    """One step of an exponential average."""
    for x, y in zip(new, old, strict=True):
        x.lerp_(y, share)


def precondition(left: Tensor | None, gradient: Tensor, right: Tensor | None) -> Tensor:
    """KFI's and K-BFGS's two products, L G R."""
    half = gradient if left is None else left @ gradient
    return half.clone() if right is None else half @ right


def jacobian_rows_(
    out: Tensor,
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    rows: Sequence[Tensor],
    start: Sequence[int],
    offset: Sequence[int],
) -> None:
    """Row start + j, from column offset on: the sum of L[rows[j, t]] R[rows[j, t]]^T over the pieces of one place and over t."""
    before = None
    for x, y, index, row, column in zip(left, right, rows, start, offset, strict=True):
        y = x.new_ones(len(x), 1) if y.dim() == 1 else y
        index = torch.arange(len(x), device=x.device).unsqueeze(1) if index.dim() == 1 else index
        x, y = (torch.cat([t, t.new_zeros(1, t.shape[1])])[index] for t in (x, y))
        block = torch.einsum("mta,mtb->mab", x, y).flatten(1)
        target = out[row : row + len(block), column : column + block.shape[1]]
        target.copy_(target + block if (row, column) == before else block)
        before = row, column


def eacg_hvp(bias_hessian: Tensor, mean_input: Tensor, p: Tensor) -> Tensor:
    """Eq. 11b: H P a a^T."""
    return torch.outer(bias_hessian @ (p @ mean_input), mean_input)


@_also_lists
def eacg_solve(
    bias_hessian: Tensor,
    mean_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    alpha: float,
    max_iter: int,
    tol: float,
    truncated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 10a and 10b. `truncated`: CG on matrices, as the paper writes it; else CG on the reduced system alone."""
    h, a = bias_hessian, mean_input
    if truncated:
        direction, iterations = conjugate_gradient(
            lambda p: (1 - alpha) * eacg_hvp(h, a, p) + alpha * p, -grad_weight, max_iter, tol
        )
    else:
        s, u = a @ a, grad_weight @ a
        q, iterations = conjugate_gradient(lambda p: (1 - alpha) * s * (h @ p) + alpha * p, u, max_iter, tol)
        z = torch.where(s > 0, (u - alpha * q) / s, 0 * q)
        direction = -(grad_weight - torch.outer(z, a)) / alpha
    count = torch.tensor(iterations, device=h.device)
    if grad_bias is None or not len(grad_bias):
        return direction, grad_weight.new_empty(0), count
    bias, _ = conjugate_gradient(lambda p: (1 - alpha) * (h @ p) + alpha * p, -grad_bias, max_iter, tol)
    return direction, bias, count


def eacg_update_(
    bias_hessian: Sequence[Tensor],
    mean_input: Sequence[Tensor],
    grad_weight: Sequence[Tensor],
    grad_bias: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    weight_momentum: Sequence[Tensor],
    bias_momentum: Sequence[Tensor],
    lr: Sequence[float],
    alpha: Sequence[float],
    momentum: Sequence[float],
    weight_decay: Sequence[float],
    max_iter: int,
    tol: float,
    truncated: bool,
    max_norm: Sequence[float] | None = None,
) -> Tensor:
    """Eq. 10a and 10b for every layer; then V <- momentum V + P and W <- (1 - lr weight_decay) W + lr V.

    Nothing is written where a solution is not finite, or lr V could not be, now or later: |V| <= max |P| / (1 - momentum). [P, d]
    is shortened to the Frobenius norm `max_norm` where it is longer.
    """
    solutions, counts = [], []
    for h, a, b, g, damping, rate, mu in zip(bias_hessian, mean_input, grad_weight, grad_bias, alpha, lr, momentum, strict=True):
        p, d, iterations = eacg_solve(h, a, b, g, damping, max_iter, tol, truncated)
        solutions.append((p, d))
        reach = max(float(x.abs().max()) if x.isfinite().all() else math.inf for x in (p, d) if x.numel()) if p.numel() else 0.0
        reach *= max(1.0, abs(rate)) / max(1e-3, 1 - mu)
        counts.append(int(iterations) if reach <= torch.finfo(p.dtype).max / 8 else -1)
    for layer, (directions, bound) in enumerate(zip(solutions, max_norm or [], strict=bool(max_norm))):
        length = torch.cat([x.flatten() for x in directions]).norm()
        if length > bound:
            solutions[layer] = tuple(x * (bound / length) for x in directions)
    if all(count >= 0 for count in counts):
        for layer, directions in enumerate(solutions):
            for p, x, v in zip(directions, (weight, bias), (weight_momentum, bias_momentum), strict=True):
                if v:
                    p = v[layer].mul_(momentum[layer]).add_(p)
                x[layer].mul_(1 - lr[layer] * weight_decay[layer]).add_(p, alpha=lr[layer])
    return torch.tensor(counts, dtype=torch.int64, device=bias_hessian[0].device)


def conjugate_gradient(matrix: Callable[[Tensor], Tensor], rhs: Tensor, max_iter: int, tol: float) -> tuple[Tensor, int]:
    """Textbook CG from 0 for a positive definite `matrix` (a function), until |r| <= tol |rhs| or max_iter times."""
    size = rhs.abs().max() if rhs.numel() else rhs.new_ones(())
    size = torch.where(size > 0, size, 1)  # so that a small rhs has squares
    x, r = torch.zeros_like(rhs), rhs / size
    p = r.clone()
    rr = first = (r * r).sum()
    if first == 0:
        return matrix(p), 0  # 0, or NaN of a matrix that is not finite
    for iteration in range(max_iter):
        if math.isnan(rr):
            return torch.full_like(rhs, math.nan), iteration
        if rr <= tol**2 * first:
            return x * size, iteration
        ap = matrix(p)
        curvature = (p * ap).sum()
        if curvature <= 0:  # an indefinite matrix, or p has become too small for its square
            return x * size, iteration
        step = rr / curvature
        x += step * p
        r -= step * ap
        rr, previous = (r * r).sum(), rr
        p = r + (rr / previous) * p
    return x * size, max_iter


@_also_lists
def double_damping(s: Tensor, y: Tensor, inverse_hessian: Tensor, mu1: float, mu2: float) -> tuple[Tensor, Tensor]:
    """Goldfarb et al., Algorithm 3: Powell's damping on H, then with B = I."""
    hy = inverse_hessian @ y
    sy, yhy = s @ y, y @ hy
    theta1 = torch.where(sy < mu1 * yhy, (1 - mu1) * yhy / (yhy - sy), 1)
    s = theta1 * s + (1 - theta1) * hy
    sy, ss = s @ y, s @ s
    theta2 = torch.where(sy < mu2 * ss, (1 - mu2) * ss / (ss - sy), 1)
    return s, theta2 * y + (1 - theta2) * s


def bfgs_update_(
    inverse_hessian: Tensor | Sequence[Tensor], s: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor]
) -> Tensor:
    """Goldfarb et al., Eq. 6, multiplied out: H - rho (s q^T + q s^T) + rho (1 + rho y.q) s s^T with q = H y."""
    if isinstance(inverse_hessian, Tensor):
        _bfgs(inverse_hessian, s, y)
        return inverse_hessian
    pairs = list(zip(s, y, strict=True))
    return _statuses(inverse_hessian, [(_bfgs(h, *pair), pair, pair) for h, pair in zip(inverse_hessian, pairs, strict=True)])


def _bfgs(h: Tensor, s: Any, y: Any) -> bool:
    """Updates H unless the curvature is not positive or a number would not be finite; whether it did."""
    q, rho = h @ y, 1 / (s @ y)
    update = rho * (1 + rho * (y @ q)) * torch.outer(s, s) - rho * (torch.outer(s, q) + torch.outer(q, s))
    updated = bool(s @ y > 0 and torch.isfinite(h + update).all())
    if updated:
        h += update
    return updated


def _statuses(layers: Sequence[Tensor], updates: Sequence[tuple[bool, Any, Any]]) -> Tensor:
    """The bits ops.UPDATED, DAMPED_S and DAMPED_Y of updates: whether each was made, its pair, and the damped pair."""
    bits = []
    for updated, pair, damped in updates:
        s_damped, y_damped = (not torch.equal(a, b) for a, b in zip(pair, damped, strict=True))
        bits.append(updated + 2 * s_damped + 4 * y_damped)
    return torch.tensor(bits, device=layers[0].device)


def damped_bfgs_update_(
    inverse_hessian: Sequence[Tensor],
    s: Sequence[Tensor],
    y: Sequence[Tensor],
    mu1: float,
    mu2: float,
    damped: bool = True,
    bounded: bool = False,
) -> Tensor:
    """Goldfarb et al., Algorithm 3 and Eq. 6, layer by layer."""
    updates = []
    for h, *pair in zip(inverse_hessian, s, y, strict=True):
        s_given, y_given = double_damping(*pair, h, mu1, mu2) if damped else pair
        taken = not bounded or _within_bounds(s_given, y_given, h @ y_given, mu1, mu2)
        updates.append((taken and _bfgs(h, s_given, y_given), pair, (s_given, y_given)))
    return _statuses(s, updates)


def _within_bounds(s: Tensor, y: Tensor, hy: Tensor, mu1: float, mu2: float) -> bool:
    """Whether y.Hy / s.y <= 1 / mu1 and s.s / s.y <= 1 / mu2; a damped pair, which lies on a bound, has it up to rounding."""
    curvature = (1 + 1e-3) * (s @ y)
    return bool(mu1 * (y @ hy) <= curvature and mu2 * (s @ s) <= curvature)


def hessian_action_update_(
    inverse: Sequence[Tensor], matrix: Sequence[Tensor], vector: Sequence[Tensor], damping: float
) -> Tensor:
    """Goldfarb et al., Section 4: BFGS with s = H a and y = (A + lambda_A I) s, layer by layer."""
    updates = []
    for h, a, mean in zip(inverse, matrix, vector, strict=True):
        s = h @ mean
        pair = s, a @ s + damping * s
        updates.append((_bfgs(h, *pair), pair, pair))
    return _statuses(inverse, updates)


@_also_lists
def lbfgs_product(s_pairs: Tensor, y_pairs: Tensor, v: Tensor) -> Tensor:
    """The two-loop recursion from H = I (Nocedal & Wright, Algorithm 7.4), on the columns of v; empty places are skipped."""
    pairs = [(s, y, 1 / (s @ y)) for s, y in zip(s_pairs, y_pairs, strict=True) if s @ y != 0]
    shares, v = [], v.clone()
    for s, y, rho in reversed(pairs):
        shares.append(rho * (s @ v))
        v = v - torch.outer(y, shares[-1])
    for s, y, rho in pairs:
        v = v + torch.outer(s, shares.pop() - rho * (y @ v))
    return v


def damped_lbfgs_update_(
    s_pairs: Sequence[Tensor],
    y_pairs: Sequence[Tensor],
    s: Sequence[Tensor],
    y: Sequence[Tensor],
    mu1: float,
    mu2: float,
    damped: bool = True,
    bounded: bool = False,
) -> Tensor:
    """Goldfarb et al., Algorithm 3 with the H that the pairs stand for, layer by layer; then the oldest pair makes room."""
    updates = []
    for *memories, s_layer, y_layer in zip(s_pairs, y_pairs, s, y, strict=True):
        h = lbfgs_product(*memories, torch.eye(len(s_layer), dtype=s_layer.dtype, device=s_layer.device))
        given = double_damping(s_layer, y_layer, h, mu1, mu2) if damped else (s_layer, y_layer)
        curvature = given[0] @ given[1]
        updated = bool(curvature > 0 and all(torch.isfinite(x @ x / curvature) for x in given))
        updated = updated and (not bounded or _within_bounds(given[0], given[1], h @ given[1], mu1, mu2))
        for memory, new in zip(memories, given if updated else ()):
            memory.copy_(torch.cat([memory[1:], new[None]]))
        updates.append((updated, (s_layer, y_layer), given))
    return _statuses(s, updates)


def eigen_sketch_(sketch: Tensor, inputs: Tensor, basis: Tensor, shift: Tensor) -> None:
    """Sums over the rows x of the shifted inputs: (x V)^T x, and x."""
    x = inputs - shift if shift.numel() else inputs
    sketch += torch.cat([(x @ basis.T).T @ x, x.sum(0, keepdim=True)])


def eigen_shapes(n: int, p: int, ku: int, kv: int, bias: bool) -> dict[str, tuple[int, int]]:
    """The shapes of the parts of a gradient, those that there are, by their names C, R, T and E."""
    c = kv + bias
    shapes = {"C": (ku, c), "R": (n, c), "T": (ku, p), "E": (n, p)}
    missing = {"R": ku == n, "T": kv == p, "E": ku == n or kv == p}
    return {part: shape for part, shape in shapes.items() if not missing.get(part)}


def eigen_split(flat: Tensor, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """A flat tensor of parts as views of them; of E it may have some rows alone."""
    found, begin = {}, 0
    for part, (rows, columns) in shapes.items():
        end = len(flat) if part == "E" else begin + rows * columns
        found[part], begin = flat[begin:end].view(-1, columns) if columns else flat.new_empty(rows, 0), end
    return found


def _centred(grad_weight: Tensor, grad_bias: Tensor, mean: Tensor, v: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """G' and X, of any rows."""
    if not bias:
        return grad_weight, grad_weight @ v
    g = grad_weight - torch.outer(grad_bias, mean)
    return g, torch.cat([g @ v, grad_bias.unsqueeze(1)], 1)


def _parts(g: Tensor, x: Tensor, ux: Tensor, ug: Tensor, u: Tensor, v: Tensor) -> dict[str, Tensor]:
    """All parts, of any rows: from these rows of G', X and U, and from U^T X and U^T G' of all rows."""
    rest = g - u @ ug
    return {"C": ux, "R": x - u @ ux, "T": ug - (ug @ v) @ v.T, "E": rest - rest @ v @ v.T}


def _whole(parts: dict[str, Tensor], along: dict[str, Tensor], u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """S and Y, of any rows: from these rows of U and the parts that there are, and from U^T R and U^T E of all rows."""
    y, inner = u @ parts["C"], u.new_zeros(len(u), len(v))
    if "R" in parts:
        y = y + parts["R"] - u @ along["R"]
    if "T" in parts:
        inner = inner + u @ parts["T"]
    if "E" in parts:
        inner = inner + parts["E"] - u @ along["E"]
    return inner - inner @ v @ v.T + y[:, : v.shape[1]] @ v.T, y


def _alone(rows: Generator[list[Tensor], list[Tensor], Any]) -> Any:
    """What comes of a matrix' rows in one process, which has all of them: sums over ranks are what it has by itself."""
    sums = next(rows)
    while True:
        try:
            sums = rows.send(sums)
        except StopIteration as end:
            return end.value


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows made orthonormal in their order, and their lengths before; what depends on those before it is drawn anew."""
    tolerance = 16 * torch.finfo(rows.dtype).eps
    largest = rows.norm(dim=1).max() if len(rows) else 0
    basis, lengths = torch.zeros_like(rows), torch.zeros_like(rows[:, 0])
    for q, row in enumerate(rows):
        start = row.norm()
        row = row - (row @ basis.T) @ basis
        if row.norm() > tolerance * start and row.norm() > tolerance * largest:
            lengths[q] = row.norm()
        else:
            row = _refill(len(row), q).to(row.dtype).to(row.device)
            row = row - (row @ basis.T) @ basis
        row = row / row.norm()
        row = row - (row @ basis.T) @ basis
        basis[q] = row / row.norm()
    return basis, lengths


def _refill(n: int, q: int) -> Tensor:
    """Numbers in [-1, 1) from a hash of their place, in 32 bits."""
    mask = 2**32 - 1
    u = (torch.arange(n) * 2654435761 + q * 40503 + 12345) & mask
    u = ((u ^ (u >> 15)) * 2246822519) & mask
    u = u ^ (u >> 13)
    return u.double() / 2**31 - 1


def _float64(t: Tensor, control: Tensor) -> Tensor:
    """In float64, where `control` is: some devices have none."""
    return t.to(control.device).double()


def _squares_are_finite(tensors: Sequence[Tensor], control: Tensor) -> bool:
    return all(_float64(t, control).square().sum() < torch.finfo(t.dtype).max / 4 for t in tensors)


def eigen_renew_(
    mean: Sequence[Tensor],
    basis_out: Sequence[Tensor],
    basis_in: Sequence[Tensor],
    scale_out: Sequence[Tensor],
    scale_in: Sequence[Tensor],
    first: Sequence[Tensor],
    control: Tensor,
    grad_weight: Sequence[Tensor],
    grad_bias: Sequence[Tensor],
    sketch: Sequence[Tensor],
    bias_hessian: Sequence[Tensor],
    rows: Sequence[int],
    share: Sequence[float],
) -> None:
    """One power iteration on the averaged second moments of both sides."""
    if not _squares_are_finite([*grad_weight, *grad_bias, *sketch, *bias_hessian], control):
        control[6] = 1
        return
    for i, w in enumerate(share):
        (n, p), ku, kv = grad_weight[i].shape, len(basis_out[i]), len(basis_in[i])
        moments = eigen_split(first[i], eigen_shapes(n, p, ku, kv, grad_bias[i].numel() > 0))
        _alone(
            eigen_renew_rows_(
                mean[i], basis_out[i], basis_in[i], scale_out[i], scale_in[i], moments, grad_weight[i], grad_bias[i], sketch[i],
                bias_hessian[i], rows[i], w, 0,
            )
        )  # fmt: skip


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
    orthonormal: Callable[[Tensor], tuple[Tensor, Tensor]] = _orthonormal,
) -> Generator[list[Tensor], list[Tensor], None]:
    """The renewal of one matrix where only those rows of G and g are here that begin at `start`, and these rows of R in `first`.

    Yields what is to be summed over all rows, and is to be sent the sums. All else is whole. Nothing is written before the
    first sums have come.
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
    # The moments in the new bases; E stays.
    rows_turn, columns_turn = basis_out @ u, torch.block_diag(v.T @ basis_in.T, *[u.new_ones(1, 1)] * bias)
    first["C"].copy_(rows_turn @ first["C"] @ columns_turn)
    if "R" in first:
        first["R"].copy_(first["R"] @ columns_turn)
    if "T" in first:
        first["T"].copy_(rows_turn @ first["T"])


def eigen_step_(
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    last: Sequence[Tensor],
    size: Sequence[Tensor],
    control: Tensor,
    grad_weight: Sequence[Tensor],
    grad_bias: Sequence[Tensor],
    mean: Sequence[Tensor],
    basis_out: Sequence[Tensor],
    basis_in: Sequence[Tensor],
    lr: Sequence[float],
    lr_bias: Sequence[float],
    decay: Sequence[float],
    decay_bias: Sequence[float],
    step: Sequence[int],
    beta1: float,
    beta2: float,
    eps: float,
    renewed: bool,
) -> None:
    """Adam's rule in every part of every gradient, and the step length from the slopes."""
    if control[6] or not _squares_are_finite([*grad_weight, *grad_bias], control):
        control[5] += 1
        control[6] = 0
        return
    length, slopes = eigen_length(control), control.new_zeros(2)
    for i, t in enumerate(step):
        (n, p), ku, kv = grad_weight[i].shape, len(basis_out[i]), len(basis_in[i])
        shapes = eigen_shapes(n, p, ku, kv, grad_bias[i].numel() > 0)
        one, two, before = (eigen_split(flat[i], shapes) for flat in (first, second, last))
        slopes += _alone(
            eigen_step_rows_(
                weight[i], bias[i], one, two, before, size[i], grad_weight[i], grad_bias[i], mean[i], basis_out[i], basis_in[i],
                length, lr[i], lr_bias[i], decay[i], decay_bias[i], t, beta1, beta2, eps, 0, len(before.get("E", ())),
            )
        )  # fmt: skip
    slope, last_slope = slopes.tolist()
    eigen_control_(control, slope, last_slope, renewed)


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
    """The step of one matrix where only those rows of W, b, G, g, R and E are here that begin at `start`.

    Yields what is to be summed over all rows, and is to be sent the sums. All else is whole, also the `sampled` rows of E in
    `last`, unless they are all rows of E. Nothing is written before the first sums have come.

    Returns:
        [2]: the slopes along this step and along the one before.
    """
    (rows, p), (ku, n), kv = grad_weight.shape, basis_out.shape, len(basis_in)
    u, v, with_bias = basis_out[:, start : start + rows].T, basis_in.T, mean.numel() > 0 or grad_bias.numel() > 0
    g, x = _centred(grad_weight, grad_bias, mean, v, with_bias)
    square, c, q = yield [_float64(grad_weight, size).square().sum(), u.T @ x, u.T @ g]
    size.clamp_(min=(square / max(n * p, 1)).sqrt())
    floor, of = (eps * size + torch.finfo(weight.dtype).tiny).to(weight), _parts(g, x, c, q, u, v)
    normed, fresh = {}, []
    slopes, slopes_here = size.new_zeros(2), size.new_zeros(2)  # of what is whole, and of the rows that are here
    for part, m in first.items():
        x, v2, before, factor = of[part], second[part], last[part], 1.0
        waits = (x == 0) & (ku + kv == 0)  # an element that stands for itself, and has no gradient
        m.copy_(torch.where(waits, m, beta1 * m + (1 - beta1) * x))
        v2.copy_(torch.where(waits, v2, beta2 * v2 + (1 - beta2) * x * x))
        ahead = beta1 * m / (1 - beta1 ** (step + 2)) + (1 - beta1) * x / (1 - beta1 ** (step + 1))
        new = (math.sqrt(1 - beta2 ** (step + 1)) * ahead / (v2.sqrt() + floor)).clamp(-1.2, 1.2).masked_fill(waits, 0.0)
        normed[part] = new
        if part == "E" and sampled < n:  # the slopes from some rows
            low, high = (-(-edge * sampled // n) for edge in (start, start + rows))
            chosen, factor = torch.arange(low, high, device=x.device) * n // sampled - start, n / sampled
            x, new, waits, whole, before = x[chosen], new[chosen], waits[chosen], before, before[low:high]
            fresh.append(torch.zeros_like(whole))
            fresh[0][low:high] = torch.where(waits, before, new)
        along = [_float64(x, size).flatten() @ _float64(direction, size).flatten() for direction in (new, before)]
        (slopes if part in "CT" else slopes_here).add_(factor * torch.stack(along))
        if not (part == "E" and fresh):
            before.copy_(torch.where(waits, before, new))
    slopes_here, *sums = yield [slopes_here, *(u.T @ normed[part] for part in "RE" if part in normed), *fresh]
    if fresh:
        last["E"].copy_(sums.pop())
    s, y = _whole(normed, dict(zip([part for part in "RE" if part in normed], sums, strict=True)), u, v)
    s = s * (grad_weight != 0)
    weight.mul_(1 - length * lr * decay).sub_(length * lr * s)
    if with_bias:
        y = (y[:, -1] - s @ mean) * (grad_bias != 0)
        bias.mul_(1 - length * lr_bias * decay_bias).sub_(length * lr_bias * y)
    return slopes + slopes_here


def eigen_length(control: Tensor) -> float:
    """The step length that control gives, without lr."""
    return float(control[0] / (1 + control[1] / 25).sqrt() * ((control[4] + 2) / 14).clamp(max=1))


def eigen_control_(control: Tensor, slope: float, last_slope: float, renewed: bool) -> None:
    """The step length after a step with these slopes."""
    length, oscillations, average, last_average, t, refused, unrenewed = control.tolist()
    if t == 0:
        average = slope
    else:
        average += 0.2 * (slope - average)
        if not renewed:
            last_average += 0.2 * (last_slope - last_average)
            oscillations += last_slope < 0
    if t > 14 and average != 0:
        r = last_average / abs(average)
        if r > 0.1 and oscillations < 25:
            length *= math.exp(0.05 * min(1.0, r - 0.1))
        elif r < -0.6:
            length *= math.exp(0.05 * max(-1.0, r + 0.6))
        length = min(max(length, 1e-6), 0.1)
    entries = [length, oscillations, average, last_average, t + 1, refused, unrenewed]
    control.copy_(torch.tensor(entries, dtype=control.dtype))
