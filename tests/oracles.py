"""Independent float64 computations: autograd on whole losses, explicit loops over instances, dense assembled matrices."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def hessian_block(model: nn.Module, criterion, x: Tensor, y: Tensor, parameter: str) -> Tensor:
    """The whole loss' Hessian w.r.t. one parameter, [numel, numel] in the parameter's row-major order."""
    fixed = {n: p.detach() for n, p in model.named_parameters()}

    def loss(flat):
        changed = {**fixed, parameter: flat.reshape(fixed[parameter].shape)}
        return criterion(functional_call(model, changed, (x,)), y)

    return hessian(loss)(fixed[parameter].reshape(-1)).contiguous()


def pos_eig_matrix(matrix: Tensor, gamma: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(torch.where(values < 0, gamma * values, values)) @ vectors.T


def scalar_derivatives(function, z: Tensor) -> tuple[Tensor, Tensor]:
    """sigma' and sigma'' of every element, each by an autograd run of its own."""
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    for index in range(z.numel()):
        point = z.reshape(-1)[index].detach().clone().requires_grad_()
        (d1,) = torch.autograd.grad(function(point), point, create_graph=True)
        first.view(-1)[index] = d1.detach()
        if d1.requires_grad:
            (d2,) = torch.autograd.grad(d1, point, allow_unused=True)
            if d2 is not None:
                second.view(-1)[index] = d2
    return first, second


def pch_by_loops(weights, biases, functions, loss, x: Tensor, gamma: float, gamma_output: float | None = None) -> list[Tensor]:
    """Every PCH bias Hessian of z^t = W^t h^{t-1} + b^t, h^t = functions[t](z^t), by loops over instances (Eq. 8).

    `loss(z, i)` is instance i's share of the whole loss at its output z, `gamma_output` Eq. 8a's gamma, by default 8b's.
    Returns the blocks from the first layer to the last.
    """
    m = len(x)
    inputs, preactivations = [], []
    h = x
    for t, (w, b) in enumerate(zip(weights, biases, strict=True)):
        inputs.append(h)
        z = h @ w.T + b
        preactivations.append(z)
        h = functions[t](z) if t < len(weights) - 1 else z
    top = sum(hessian(lambda z, i=i: loss(z, i))(h[i]) for i in range(m))
    blocks = [pos_eig_matrix((top + top.T) / 2, gamma if gamma_output is None else gamma_output)]
    deltas = [torch.func.grad(lambda z, i=i: loss(z, i))(h[i]) for i in range(m)]
    for t in range(len(weights) - 1, 0, -1):
        w, z = weights[t], preactivations[t - 1]
        moment, diagonal, below = 0, 0, []
        for i in range(m):
            d1, d2 = scalar_derivatives(functions[t - 1], z[i])
            back = w.T @ deltas[i]
            moment = moment + torch.outer(d1, d1) / m
            diagonal = diagonal + d2 * back
            below.append(d1 * back)
        diagonal = torch.where(diagonal < 0, gamma * diagonal, diagonal)
        blocks.append((w.T @ blocks[-1] @ w) * moment + torch.diag(diagonal))
        deltas = below
    return blocks[::-1]


def eacg_matrix(h: Tensor, a: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) H (x) a a^T + alpha I, for row-major P."""
    n = h.shape[0] * a.shape[0]
    return (1 - alpha) * torch.kron(h, torch.outer(a, a)) + alpha * torch.eye(n, dtype=h.dtype)


def textbook_cg(matrix: Tensor, rhs: Tensor, iterations: int) -> Tensor:
    """The iterate after so many steps of conjugate gradients from 0 on a dense matrix."""
    x = torch.zeros_like(rhs)
    r = rhs.clone()
    p = r.clone()
    for _ in range(iterations):
        if r.norm() == 0:
            break
        ap = matrix @ p
        step = (r @ r) / (p @ ap)
        x = x + step * p
        new = r - step * ap
        p = new + (new @ new) / (r @ r) * p
        r = new
    return x


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor, ulps: float = 8) -> None:
    """The error against the float64 oracle is at most twice that of plain PyTorch at the same dtype, plus a few ulps."""
    assert actual.shape == exact.shape
    if not exact.numel():
        return
    scale = exact.abs().max()
    error, reference = (actual.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * reference + ulps * torch.finfo(actual.dtype).eps * scale, (error / scale, reference / scale)


def random_psd(n: int, dtype=torch.float64) -> Tensor:
    root = torch.randn(n, max(1, n // 2 + 1), dtype=torch.float64)
    product = root @ root.T / n
    return ((product + product.T) / 2).to(dtype)


def dense_gauss_newton(model, criterion, x, y, gamma=None):
    """The full Gauss-Newton matrix over all parameters; with gamma, the output's mean Hessian goes through Pos-Eig."""
    names, values = zip(*((n, p.detach()) for n, p in model.named_parameters()), strict=True)
    flat = torch.cat([v.reshape(-1) for v in values])

    def output(theta, row):
        parts = [t.reshape(v.shape) for t, v in zip(theta.split([v.numel() for v in values]), values, strict=True)]
        return functional_call(model, dict(zip(names, parts, strict=True)), (row,))[0]

    jacobians = [jacrev(lambda t, i=i: output(t, x[i : i + 1]))(flat) for i in range(len(x))]
    tops = [hessian(lambda z, i=i: criterion(z[None], y[i : i + 1]))(output(flat, x[i : i + 1])) for i in range(len(x))]
    if gamma is not None:
        tops = [pos_eig_matrix(sum(tops) / len(x), gamma)] * len(x)
    return sum(j.T @ h @ j for j, h in zip(jacobians, tops, strict=True)) / len(x)
