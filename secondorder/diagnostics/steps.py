"""The damped Newton and Gauss-Newton steps that optimizers approximate, in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from secondorder._layers import linear_layers
from secondorder._random import preserved_generators
from secondorder.criteria import CompositeLoss, FunctionCriterion
from secondorder.criteria.known import LOG_SOFTMAX, link_of
from secondorder.criteria.likelihoods import as_cross_entropy
from secondorder.diagnostics.copies import Criterion, copied, fixed_values, parameter_names
from secondorder.linalg import conjugate_gradient
from secondorder.optim._numbers import check_arguments
from secondorder.stepping.gauss_newton_product import differentiable_twice

# Rows of a layer's Hessian computed at once: each takes a backward pass over the batch.
_ROWS = 64


def newton_step(
    model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, damping: float, max_size: int = 2048
) -> dict[str, Tensor]:
    """Computes the damped Newton step of each linear layer by itself, in float64.

        delta_t = -(|N_t| + damping I)^{-1} g_t,   N_t = d^2 L / d(theta_t)^2,   theta_t = [W^t, b^t],

    with g_t the gradient and N_t the true Hessian of the whole loss, which the eigenvalues' absolute values make positive: the
    exact counterpart of what a layer-wise optimizer approximates.

    Args:
        model: a module, called as model(x); one with random layers belongs in eval mode.
        criterion: a module or a function, called as criterion(output, y).
        x: a batch of inputs.
        y: their targets.
        damping: > 0.
        max_size: how many parameters a layer may have; N_t takes their square in numbers and, factored, their cube in time.

    Returns:
        `{parameter name: change}` for the weights and biases of all linear layers.

    Raises:
        ValueError: a layer has more than `max_size` parameters, or damping <= 0.
    """
    check_arguments("newton_step", [("damping", damping, damping > 0, "> 0")])
    model, loss = copied(model, criterion, torch.float64)
    x, y = (t.double() if t.is_floating_point() else t for t in (x, y))
    fixed = fixed_values(model)
    layers = {name: [key for key in parameter_names(name) if key in fixed] for name in linear_layers(model).values()}
    for name, keys in layers.items():
        size = sum(fixed[key].numel() for key in keys)
        if size > max_size:
            raise ValueError(
                f"newton_step: expected layers of at most max_size={max_size} parameters, whose Hessians are computed whole, got "
                f"{size} in layer {name!r}; raise max_size, or take a smaller net"
            )
    steps: dict[str, Tensor] = {}
    for keys in layers.values():
        shapes, sizes = [fixed[key].shape for key in keys], [fixed[key].numel() for key in keys]

        def value(theta: Tensor, keys=keys, shapes=shapes, sizes=sizes) -> Tensor:  # type: ignore[no-untyped-def]
            parts = (part.view(shape) for part, shape in zip(theta.split(sizes), shapes, strict=True))
            return loss(functional_call(model, {**fixed, **dict(zip(keys, parts, strict=True))}, (x,)), y)

        here = torch.cat([fixed[key].flatten() for key in keys])
        with preserved_generators(model.parameters()):
            g, n = grad(value)(here), jacrev(grad(value), chunk_size=_ROWS)(here)
        values, vectors = torch.linalg.eigh((n + n.T) / 2)
        delta = -vectors @ ((vectors.T @ g) / (values.abs() + damping))
        steps |= {key: part.view(shape) for key, part, shape in zip(keys, delta.split(sizes), shapes, strict=True)}
    return steps


def gauss_newton_step(
    model: nn.Module,
    criterion: Criterion,
    x: Tensor,
    y: Tensor,
    damping: float,
    *,
    blocks: bool = False,
    max_iter: int = 1000,
    tol: float = 1e-6,
) -> dict[str, Tensor]:
    """Computes the damped Gauss-Newton step of all linear layers together, or of each, by conjugate gradients in float64.

        (J^T H J + damping I) delta = -g,   J the Jacobian of the criterion's argument,   H its Hessian there,

    with g the gradient: what "kflr", and for a likelihood the Fisher matrices, approximate (Botev et al., Appendix F.2). For a
    `secondorder.criteria.CompositeLoss` the argument is the inner value. For nn.NLLLoss, which is linear in log-probabilities,
    H is that of cross-entropy, whose logits they are. Frozen layers count as the others do.

    Args:
        model: a module, called as model(x); one with random layers belongs in eval mode.
        criterion: a module or a function, called as criterion(output, y), convex in the output.
        x: a batch of inputs.
        y: their targets.
        damping: > 0.
        blocks: whether J is that of each layer's own parameters: the block-diagonal matrix' step.
        max_iter: iterations for a system at most, >= 1, whatever the residual then is; each takes three backward passes.
        tol: they end where the residual is at most this times |g|, >= 0.

    Returns:
        `{parameter name: change}` for the weights and biases of all linear layers.

    Raises:
        ValueError: an argument is out of its range, or the curvature along a direction that is met is negative.
    """
    check_arguments(
        "gauss_newton_step",
        [
            ("damping", damping, damping > 0, "> 0"),
            ("max_iter", max_iter, max_iter >= 1, ">= 1"),
            ("tol", tol, tol >= 0, ">= 0"),
        ],
    )
    model, loss = copied(model, criterion, torch.float64)
    x, y = (t.double() if t.is_floating_point() else t for t in (x, y))
    model.requires_grad_()
    with preserved_generators(model.parameters()), torch.enable_grad(), differentiable_twice(model):
        z, outer = model(x), loss
        if isinstance(loss, CompositeLoss):
            z, outer = loss.inner(z), loss.outer
        outer = _with_hessian(outer)
        (slope,) = torch.autograd.grad(outer(z, y), z, create_graph=True)
    parameters = dict(model.named_parameters())
    layers = [[key for key in parameter_names(name) if key in parameters] for name in linear_layers(model).values()]
    steps: dict[str, Tensor] = {}
    for keys in layers if blocks else [[key for own in layers for key in own]]:
        matrix = _GaussNewton(z, slope, [parameters[key] for key in keys])

        def damped(v: Tensor, matrix: _GaussNewton = matrix) -> Tensor:
            return matrix.product(v) + damping * v

        delta, _ = conjugate_gradient(damped, -matrix.gradient, max_iter, tol)
        steps |= dict(zip(keys, matrix.split(delta), strict=True))
    return steps


def _with_hessian(criterion: nn.Module) -> nn.Module:
    """Returns the criterion; for NLLLoss cross-entropy, which has its value at log-probabilities, and a Hessian."""
    if link_of(criterion) != LOG_SOFTMAX:
        return criterion
    if isinstance(criterion, FunctionCriterion):
        return FunctionCriterion(nn.functional.cross_entropy)
    assert isinstance(criterion, nn.NLLLoss)
    return as_cross_entropy(criterion)


class _GaussNewton:
    """Multiplies with J^T H J of some parameters, given z and dL/dz, each with its graph; vectors are flat."""

    def __init__(self, z: Tensor, slope: Tensor, parameters: list[Tensor]):
        self._z, self._slope, self._parameters = z, slope, parameters
        self._u = torch.zeros_like(z, requires_grad=True)
        with torch.enable_grad():  # J^T u is linear in u, and differentiated w.r.t. it gives J v
            self._transposed = self._flat(torch.autograd.grad(z, parameters, self._u, create_graph=True, materialize_grads=True))
        self.gradient = self._pulled_back(slope.detach())

    def product(self, v: Tensor) -> Tensor:
        """Returns J^T H J v."""
        (t,) = torch.autograd.grad(self._transposed, self._u, v, retain_graph=True, materialize_grads=True)
        if not self._slope.requires_grad:  # a criterion that is linear in z
            return torch.zeros_like(v)
        (curved,) = torch.autograd.grad(self._slope, self._z, t, retain_graph=True, materialize_grads=True)
        if (t * curved).sum() < -1e-9 * t.norm() * curved.norm():
            raise ValueError("gauss_newton_step: expected a criterion that is convex in the output, got a negative curvature")
        return self._pulled_back(curved)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Returns a vector as tensors of the parameters' shapes."""
        pieces = flat.split([p.numel() for p in self._parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, self._parameters, strict=True)]

    def _pulled_back(self, t: Tensor) -> Tensor:
        """Returns J^T t."""
        return self._flat(torch.autograd.grad(self._z, self._parameters, t, retain_graph=True, materialize_grads=True))

    @staticmethod
    def _flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.flatten() for t in tensors])
