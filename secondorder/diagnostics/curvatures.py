"""Curvatures against the true Hessian: errors and spectra of every linear layer's bias block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian

from secondorder._layers import linear_layers
from secondorder._random import preserved_generators
from secondorder._tape import Tape
from secondorder.curvature import Curvature, curvature_by_name
from secondorder.diagnostics.copies import Criterion, copied, fixed_values, go_backward, parameter_names


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


def bias_hessians(model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, curvature: str | Curvature) -> dict[str, Tensor]:
    """Computes the curvature's block of every linear layer on this batch, as an optimizer would.

    Args:
        model: a module, called as model(x).
        criterion: a module or a function, called as criterion(output, y).
        x: a batch of inputs.
        y: their targets.
        curvature: a name, or the curvature itself.

    Returns:
        `{layer name: H [n_out, n_out]}`, on the scale of the loss.

    Raises:
        ValueError: there is no curvature of this name, or it is not defined for this criterion.
    """
    found = curvature_by_name(curvature)
    model, loss = copied(model, criterion)
    layers = linear_layers(model)
    tape = Tape(layers, loss, found.tape_options(), model)
    go_backward(model, loss, x, y)
    return {layers[layer]: h for layer, h in found.bias_hessians(tape.records()).items()}


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
    model, loss = copied(model, criterion)
    fixed = fixed_values(model)
    hessians = {}
    for layer, name in linear_layers(model).items():
        if layer.bias is None:
            continue
        _, key = parameter_names(name)
        with preserved_generators(model.parameters()):
            h = hessian(lambda b, key=key: loss(functional_call(model, {**fixed, key: b}, (x,)), y))(fixed[key]).double()
        hessians[name] = (h + h.T) / 2
    return hessians


def _bias_blocks(
    model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, curvatures: Sequence[str | Curvature]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor] | None]]:
    """Returns the true Hessian's blocks by layer, and each curvature's, as an optimizer has them; symmetric, in float64."""
    true = true_bias_hessians(model, criterion, x, y)  # first: an error of the model's or the criterion's own is raised here
    blocks: dict[str, dict[str, Tensor] | None] = {}
    for given in curvatures:
        curvature = curvature_by_name(given)
        try:
            own = bias_hessians(model, criterion, x, y, curvature)
            blocks[str(given)] = {name: own[name].double() for name in true if name in own}
        except ValueError:
            blocks[str(given)] = None
    return true, blocks


def _absolute(matrix: Tensor) -> Tensor:
    """Returns |M|, M with the absolute values of its eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.abs()) @ vectors.T
