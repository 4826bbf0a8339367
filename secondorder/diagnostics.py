"""Compares curvatures and steps on a live model with the true Hessian, the Newton step of its blocks, and the loss itself.

Everything is computed on copies: parameters, gradients, buffers, modes, the records of optimizers and the random generators are
left as they were. So two calls of `curvature_error` sample the same labels. A model with random layers belongs in eval mode.

The functions that judge a step take the model from before it, and the step as {parameter name: change}:

    old = copy.deepcopy(model)
    optimizer.step()
    step = {name: (p - q).detach() for (name, p), q in zip(model.named_parameters(), old.parameters())}
    so.diagnostics.newton_cosine(old, criterion, x, y, step, damping=0.1)
    so.diagnostics.gauss_newton_cosine(old, criterion, x, y, step, damping=0.1)
    so.diagnostics.reduction_ratio(old, criterion, x, y, step)
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

from secondorder._layers import linear_layers
from secondorder._random import preserved_generators
from secondorder._tape import Tape
from secondorder._tensors import Transfer
from secondorder.criteria import CompositeLoss, FunctionCriterion, link_of
from secondorder.curvature import Curvature, curvature_by_name
from secondorder.linalg import conjugate_gradient
from secondorder.stepping import LocalLoss
from secondorder.stepping.gauss_newton_product import differentiable_twice

Criterion = nn.Module | Callable[..., Tensor]

# Rows of a layer's Hessian computed at once: each takes a backward pass over the batch.
_ROWS = 64


@dataclass(frozen=True)
class CurvatureErrors:
    """Holds how far curvatures are from the true Hessian; `print` shows it as a table.

    Args:
        errors: `errors[curvature][layer]`, a Frobenius norm; None for a curvature that is not defined for the criterion.
    """

    errors: dict[str, dict[str, float] | None]

    @property
    def totals(self) -> dict[str, float | None]:
        """Returns the Frobenius distances of the block-diagonal matrices, each the root of the sum of its layers' squares."""
        return {
            name: None if errors is None else sum(e**2 for e in errors.values()) ** 0.5 for name, errors in self.errors.items()
        }

    def __str__(self) -> str:
        layers = next((list(errors) for errors in self.errors.values() if errors is not None), [])
        columns = {name: [*(errors or {}).values(), self.totals[name]] for name, errors in self.errors.items()}
        lines = ["".join(f"{head:>18s}" for head in ["", *self.errors])]
        for row, layer in enumerate([*layers, "total"]):
            cells = [f"{column[row]:>18.4g}" if len(column) > 1 else f"{'-':>18s}" for column in columns.values()]
            lines.append(f"{layer:>18s}" + "".join(cells))
        return "\n".join(lines)


class Cosines(NamedTuple):
    """Holds the cosines of the angles between two steps; NaN where one of the steps is 0.

    Args:
        layers: for every linear layer's parameters, by its name.
        total: for the parameters of all linear layers together.
    """

    layers: dict[str, float]
    total: float


def curvature_error(
    model: nn.Module,
    criterion: Criterion,
    x: Tensor,
    y: Tensor,
    curvatures: Sequence[str | Curvature] = ("fisher-mc", "gauss-newton", "pch-abs", "pch-clip"),
) -> CurvatureErrors:
    """Computes || H - |E[true Hessian w.r.t. the bias]| ||_F for every linear layer with a bias (Chen et al., before Table 2).

    |M| takes the absolute values of M's eigenvalues. The true Hessian is autograd's of the whole loss, n_out^2 numbers per layer,
    one forward-over-backward pass for each of its rows.

    Args:
        model: a module, called as model(x); one with random layers belongs in eval mode.
        criterion: a module or a function, called as criterion(output, y).
        x: a batch of inputs.
        y: their targets.
        curvatures: names, or curvatures themselves.

    Returns:
        The table; a curvature that is not defined for this criterion (Gauss-Newton for one that is not convex) has None in it.
    """
    true, blocks = _bias_blocks(model, criterion, x, y, curvatures)
    true = {layer: _absolute(h) for layer, h in true.items()}
    return CurvatureErrors(
        {
            name: None if own is None else {layer: float(torch.linalg.matrix_norm(h - true[layer])) for layer, h in own.items()}
            for name, own in blocks.items()
        }
    )


def spectrum(
    model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, curvatures: Sequence[str | Curvature] = ("pch-abs",)
) -> dict[str, dict[str, Tensor] | None]:
    """Computes the eigenvalues of every linear layer's bias block, of the true Hessian and of each curvature.

    Args:
        model: a module, called as model(x); one with random layers belongs in eval mode.
        criterion: a module or a function, called as criterion(output, y).
        x: a batch of inputs.
        y: their targets.
        curvatures: names, or curvatures themselves.

    Returns:
        `{"hessian" or the curvature: {layer name: eigenvalues [n_out]}}`, ascending, in float64; None for a curvature that is not
        defined for this criterion.
    """
    true, blocks = _bias_blocks(model, criterion, x, y, curvatures)
    return {
        name: None if own is None else {layer: torch.linalg.eigvalsh(h) for layer, h in own.items()}
        for name, own in [("hessian", true), *blocks.items()]
    }


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
    if not damping > 0:
        raise ValueError(f"newton_step: expected damping > 0, got {damping}")
    model, loss = _copies(model, criterion, torch.float64)
    x, y = (t.double() if t.is_floating_point() else t for t in (x, y))
    layers = {name: layer.weight.numel() + (0 if layer.bias is None else len(layer.bias)) for layer, name in _named(model)}
    for name, size in layers.items():
        if size > max_size:
            raise ValueError(
                f"newton_step: expected layers of at most max_size={max_size} parameters, whose Hessians are computed whole, got "
                f"{size} in layer {name!r}; raise max_size, or take a smaller net"
            )
    fixed = _values(model)
    steps: dict[str, Tensor] = {}
    for name in layers:
        keys = [key for key in _own(name) if key in fixed]
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


def newton_cosine(
    model: nn.Module,
    criterion: Criterion,
    x: Tensor,
    y: Tensor,
    step: Mapping[str, Tensor],
    damping: float,
    max_size: int = 2048,
) -> Cosines:
    """Computes the cosine of the angle between a step and `newton_step`, for every linear layer and for all together.

    Args:
        model: from before the step: a module, called as model(x); one with random layers belongs in eval mode.
        criterion: a module or a function, called as criterion(output, y).
        x: a batch of inputs.
        y: their targets.
        step: {parameter name: change}; what it leaves out has not moved, what is not of a linear layer does not count.
        damping: of the Newton step, > 0.
        max_size: how many parameters a layer may have.

    Raises:
        ValueError: as `newton_step`; or the step is not one of this model's parameters.
    """
    _check_step("newton_cosine", model, step)
    return step_cosines(model, step, newton_step(model, criterion, x, y, damping, max_size))


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
    checks = [
        ("damping", damping, damping > 0, "> 0"),
        ("max_iter", max_iter, max_iter >= 1, ">= 1"),
        ("tol", tol, tol >= 0, ">= 0"),
    ]
    for name, value, valid, expected in checks:
        if not valid:
            raise ValueError(f"gauss_newton_step: expected {name} {expected}, got {value}")
    model, loss = _copies(model, criterion, torch.float64)
    x, y = (t.double() if t.is_floating_point() else t for t in (x, y))
    model.requires_grad_()
    with preserved_generators(model.parameters()), torch.enable_grad(), differentiable_twice(model):
        z, outer = model(x), loss
        if isinstance(loss, CompositeLoss):
            z, outer = loss.inner(z), loss.outer
        outer = _of_logits(outer)
        (slope,) = torch.autograd.grad(outer(z, y), z, create_graph=True)
    parameters = dict(model.named_parameters())
    layers = [[key for key in _own(name) if key in parameters] for _, name in _named(model)]
    steps: dict[str, Tensor] = {}
    for keys in layers if blocks else [[key for own in layers for key in own]]:
        matrix = _GaussNewton(z, slope, [parameters[key] for key in keys])

        def damped(v: Tensor, matrix: _GaussNewton = matrix) -> Tensor:
            return matrix.product(v) + damping * v

        delta, _ = conjugate_gradient(damped, -matrix.gradient, max_iter, tol)
        steps |= dict(zip(keys, matrix.split(delta), strict=True))
    return steps


def gauss_newton_cosine(
    model: nn.Module,
    criterion: Criterion,
    x: Tensor,
    y: Tensor,
    step: Mapping[str, Tensor],
    damping: float,
    *,
    blocks: bool = False,
    max_iter: int = 1000,
    tol: float = 1e-6,
) -> Cosines:
    """Computes the cosine of the angle between a step and `gauss_newton_step`, for every linear layer and for all together.

    Args:
        model: from before the step: a module, called as model(x); one with random layers belongs in eval mode.
        criterion: a module or a function, called as criterion(output, y), convex in the output.
        x: a batch of inputs.
        y: their targets.
        step: {parameter name: change}; what it leaves out has not moved, what is not of a linear layer does not count.
        damping: of the Gauss-Newton step, > 0.
        blocks: whether that is the block-diagonal matrix' step.
        max_iter: conjugate gradients' iterations for a system at most, >= 1.
        tol: they end where the residual is at most this times the gradient's length, >= 0.

    Raises:
        ValueError: as `gauss_newton_step`; or the step is not one of this model's parameters.
    """
    _check_step("gauss_newton_cosine", model, step)
    exact = gauss_newton_step(model, criterion, x, y, damping, blocks=blocks, max_iter=max_iter, tol=tol)
    return step_cosines(model, step, exact)


def step_cosines(model: nn.Module, step: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Cosines:
    """Computes the cosine of the angle between two steps, for every linear layer and for all together.

    Args:
        model: whose parameters they are of.
        step: {parameter name: change}; what it leaves out has not moved.
        other: the same; what is not in it does not count.

    Raises:
        ValueError: a step is not one of this model's parameters, or `other` has none of a linear layer.
    """
    model = getattr(model, "_orig_mod", model)
    for each in (step, other):
        _check_step("step_cosines", model, each)
    own = {key: step[key].double() if key in step else torch.zeros_like(value.double()) for key, value in other.items()}

    def cosine(keys: list[str]) -> float:
        a, b = (torch.cat([s[key].double().flatten() for key in keys]) for s in (own, other))
        return float(a @ b / (a.norm() * b.norm()))

    layers = {name: keys for _, name in _named(model) if (keys := [key for key in _own(name) if key in other])}
    if not layers:
        raise ValueError("step_cosines: expected other to have parameters of a linear layer, got none")
    return Cosines(
        {name: cosine(keys) for name, keys in layers.items()}, cosine([key for keys in layers.values() for key in keys])
    )


def reduction_ratio(
    model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, step: Mapping[str, Tensor], damping: float = 0.0
) -> float:
    """Computes rho of Levenberg and Marquardt: the change of the loss over that of the quadratic model (Botev et al., Eq. 42).

        rho = (L(theta + delta) - L(theta)) / (g^T delta + 1/2 delta^T (G + damping I) delta),

    G being the full Gauss-Newton matrix, as in `secondorder.stepping`. Near 1 the model is trustworthy, below 0 the step went
    uphill. An optimizer that finds its own step has that of its last one, with its own damping and weight decay and on its
    subsample, in `optimizer.param_groups[0]["rho"]`; None: the step was taken back.

    Args:
        model: from before the step: a module, called as model(x); one with random layers belongs in eval mode.
        criterion: a module or a function, called as criterion(output, y).
        x: a batch of inputs.
        y: their targets.
        step: {parameter name: change}; what it leaves out has not moved.
        damping: of the model, >= 0.

    Raises:
        ValueError: the step is not one of this model's parameters.
    """
    _check_step("reduction_ratio", model, step)
    model, loss = _copies(model, criterion)
    parameters = dict(model.named_parameters())
    whole = nn.Sequential(model)  # in training mode, which the tape asks for, whatever the mode of the model
    tape = Tape(linear_layers(whole), loss, diagonal=False, model=whole, keep_inputs=True)
    _record(whole, loss, x, y)
    local = LocalLoss(whole, loss, tape.losses, {p: f"0.{name}" for name, p in parameters.items()}, 1.0, 0, tape)
    deltas = [step[name].to(p) if name in step else torch.zeros_like(p) for name, p in parameters.items()]
    first, second = local.products([deltas], Transfer())()
    predicted = float(first + second / 2) + damping / 2 * sum(float(d.double().square().sum()) for d in deltas)
    moved = [p.detach() + d for p, d in zip(parameters.values(), deltas, strict=True)]
    return (local.value(moved) - local.start) / predicted


def _of_logits(criterion: nn.Module) -> nn.Module:
    """The same; for the negative log-likelihood cross-entropy, which has its value at log-probabilities, and a Hessian."""
    if link_of(criterion) != "LogSoftmaxBackward":
        return criterion
    if isinstance(criterion, FunctionCriterion):
        return FunctionCriterion(nn.functional.cross_entropy)
    assert isinstance(criterion, nn.NLLLoss)
    return nn.CrossEntropyLoss(criterion.weight, ignore_index=criterion.ignore_index, reduction=criterion.reduction)


class _GaussNewton:
    """J^T H J of some parameters, from z with its graph and dL/dz with its own; vectors are flat."""

    def __init__(self, z: Tensor, slope: Tensor, parameters: list[Tensor]):
        self._z, self._slope, self._parameters = z, slope, parameters
        self._u = torch.zeros_like(z, requires_grad=True)
        with torch.enable_grad():  # J^T u is linear in u, and differentiated w.r.t. it gives J v
            self._transposed = self._flat(torch.autograd.grad(z, parameters, self._u, create_graph=True, materialize_grads=True))
        self.gradient = self._pulled_back(slope.detach())

    def product(self, v: Tensor) -> Tensor:
        """J^T H J v."""
        (t,) = torch.autograd.grad(self._transposed, self._u, v, retain_graph=True, materialize_grads=True)
        if not self._slope.requires_grad:  # a criterion that is linear in z
            return torch.zeros_like(v)
        (curved,) = torch.autograd.grad(self._slope, self._z, t, retain_graph=True, materialize_grads=True)
        if (t * curved).sum() < -1e-9 * t.norm() * curved.norm():
            raise ValueError("gauss_newton_step: expected a criterion that is convex in the output, got a negative curvature")
        return self._pulled_back(curved)

    def split(self, flat: Tensor) -> list[Tensor]:
        """A vector as tensors of the parameters' shapes."""
        pieces = flat.split([p.numel() for p in self._parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, self._parameters, strict=True)]

    def _pulled_back(self, t: Tensor) -> Tensor:
        return self._flat(torch.autograd.grad(self._z, self._parameters, t, retain_graph=True, materialize_grads=True))

    @staticmethod
    def _flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.flatten() for t in tensors])


def _bias_blocks(
    model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, curvatures: Sequence[str | Curvature]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor] | None]]:
    """Returns the true Hessian's blocks by layer, and each curvature's, as an optimizer has them; symmetric, in float64."""
    true = true_bias_hessians(model, criterion, x, y)  # first: an error of the model's or the criterion's own is raised here
    blocks: dict[str, dict[str, Tensor] | None] = {}
    for given in curvatures:
        try:
            own = bias_hessians(model, criterion, x, y, curvature_by_name(given))
            blocks[str(given)] = {name: own[name].double() for name in true if name in own}
        except ValueError:
            blocks[str(given)] = None
    return true, blocks


def bias_hessians(model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, curvature: Curvature) -> dict[str, Tensor]:
    """Computes the curvature's block of every linear layer on this batch, as an optimizer would.

    Args:
        model: a module, called as model(x).
        criterion: a module or a function, called as criterion(output, y).
        x: a batch of inputs.
        y: their targets.
        curvature: the curvature itself.

    Returns:
        `{layer name: H [n_out, n_out]}`, on the scale of the loss.
    """
    model, loss = _copies(model, criterion)
    layers = linear_layers(model)
    tape = Tape(
        layers, loss, diagonal=curvature.diagonal, grad_outputs=curvature.grad_outputs, columns=curvature.columns, model=model,
        output_hessian=curvature.output_hessian,
    )  # fmt: skip
    _record(model, loss, x, y)
    return {layers[layer]: h for layer, h in curvature.bias_hessians(tape.records()).items()}


def true_bias_hessians(model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Computes the Hessian [n_out, n_out] of criterion(model(x), y) w.r.t. the bias of every linear layer that has one.

    Args:
        model: a module, called as model(x).
        criterion: a module or a function, called as criterion(output, y).
        x: a batch of inputs.
        y: their targets.

    Returns:
        `{layer name: H [n_out, n_out]}`, computed in the model's dtype; symmetric, in float64.
    """
    model, loss = _copies(model, criterion)
    fixed = _values(model)
    hessians = {}
    for layer, name in _named(model):
        if layer.bias is None:
            continue
        key = _own(name)[1]
        with preserved_generators(model.parameters()):
            h = hessian(lambda b, key=key: loss(functional_call(model, {**fixed, key: b}, (x,)), y))(fixed[key]).double()
        hessians[name] = (h + h.T) / 2
    return hessians


def _copies(model: nn.Module, criterion: Criterion, dtype: torch.dtype | None = None) -> tuple[nn.Module, nn.Module]:
    """Of both, where no optimizer records anything, without gradients."""
    loss = criterion if isinstance(criterion, nn.Module) else FunctionCriterion(criterion)
    model, loss = copy.deepcopy((getattr(model, "_orig_mod", model), getattr(loss, "_orig_mod", loss)))
    model.zero_grad()
    return (model, loss) if dtype is None else (model.to(dtype), loss.to(dtype))


def _record(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> None:
    """A backward pass through copies that a tape is on."""
    for layer in linear_layers(model):
        layer.train()  # which means something to the tape alone
    with preserved_generators(model.parameters()), torch.enable_grad():
        loss(model(x), y).backward()


def _named(model: nn.Module) -> list[tuple[nn.Linear, str]]:
    return list(linear_layers(model).items())


def _own(layer: str) -> tuple[str, str]:
    """Returns the names of a layer's parameters."""
    prefix = f"{layer}." if layer else ""
    return f"{prefix}weight", f"{prefix}bias"


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}


def _check_step(name: str, model: nn.Module, step: Mapping[str, Tensor]) -> None:
    shapes = {key: p.shape for key, p in getattr(model, "_orig_mod", model).named_parameters()}
    for key, change in step.items():
        if key not in shapes:
            raise ValueError(f"{name}: expected a step by parameter name, got {key!r}, which the model does not have")
        if change.shape != shapes[key]:
            raise ValueError(f"{name}: expected {list(shapes[key])} for {key!r}, got {list(change.shape)}")


def _absolute(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.abs()) @ vectors.T
