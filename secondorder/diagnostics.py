"""How good the curvatures are on a live model: their bias blocks against the true Hessian (Chen et al., Tables 2 to 5)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian

from secondorder.criteria import FunctionCriterion
from secondorder.curvature import Curvature, curvature_by_name
from secondorder.optim.base import linear_layers
from secondorder.tape import Tape


@dataclass(frozen=True)
class CurvatureErrors:
    """A table: `errors[curvature][layer]`, and over all layers `totals[curvature]`; None where one is not defined."""

    errors: dict[str, dict[str, float] | None]

    @property
    def totals(self) -> dict[str, float | None]:
        """The root of the sum of the layers' squares: the Frobenius distance of the block-diagonal matrices."""
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


def curvature_error(
    model: nn.Module,
    criterion: nn.Module | Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    curvatures: Sequence[str | Curvature] = ("fisher-mc", "gauss-newton", "pch-abs", "pch-clip"),
) -> CurvatureErrors:
    """|| H - |E[true Hessian w.r.t. the bias]| ||_F for every linear layer with a bias (Chen et al., before Table 2).

    |M| takes the absolute values of M's eigenvalues. The true Hessian is autograd's of the whole loss, n_out^2 numbers per layer,
    one forward-over-backward pass for each of its rows. Gradients, buffers and the model's mode are left as they were.

    Args:
        model: as for an optimizer; called as model(x).
        criterion: as for an optimizer; called as criterion(output, y).
        x: a batch of inputs.
        y: their targets.
        curvatures: names, or curvatures themselves.

    Returns:
        The table; a curvature that is not defined for this criterion (Gauss-Newton for one that is not convex) has None in it.
    """
    loss = criterion if isinstance(criterion, nn.Module) else FunctionCriterion(criterion)
    layers = {layer: name for layer, name in linear_layers(model).items() if layer.bias is not None}
    true = {name: _absolute(true_bias_hessian(model, loss, x, y, name)) for name in layers.values()}
    errors: dict[str, dict[str, float] | None] = {}
    for given in curvatures:
        kind = curvature_by_name(given)
        try:
            blocks = bias_hessians(model, loss, x, y, kind)
        except ValueError:
            errors[str(given)] = None
            continue
        errors[str(given)] = {
            name: float(torch.linalg.matrix_norm(blocks[name].to(true[name].dtype) - true[name]))
            for name in layers.values() if name in blocks
        }  # fmt: skip
    return CurvatureErrors(errors)


def bias_hessians(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, curvature: Curvature) -> dict[str, Tensor]:
    """The curvature's block of every linear layer on this batch, {layer name: H [n_out, n_out]}, as an optimizer has it."""
    layers = linear_layers(model)
    tape = Tape(layers, criterion, diagonal=curvature.diagonal, grad_outputs=curvature.grad_outputs, columns=curvature.columns)
    parameters = list(model.parameters())
    gradients, modes = [p.grad for p in parameters], {layer: layer.training for layer in layers}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for layer in layers:
            layer.training = True  # which means something to the tape alone
        for p in parameters:
            p.grad = None
        with torch.enable_grad():
            criterion(model(x), y).backward()
        return {layers[layer]: h for layer, h in curvature.bias_hessians(tape.records()).items()}
    finally:
        tape.remove()
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        for layer, mode in modes.items():
            layer.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)


def true_bias_hessian(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, layer: str) -> Tensor:
    """The Hessian [n_out, n_out] of criterion(model(x), y) with respect to the bias of the linear layer of this name."""
    key = f"{layer}.bias" if layer else "bias"
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    fixed |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return hessian(lambda b: criterion(functional_call(model, {**fixed, key: b}, (x,)), y))(fixed[key])


def _absolute(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T).double() / 2)
    return (vectors * values.abs()) @ vectors.T
