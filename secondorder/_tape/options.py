"""What a tape is asked to keep."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from secondorder._tape.columns import Columns
from secondorder.criteria import OutputHessian

# (criterion, loss, autograd node of the one linear layer's output that it depends on, its arguments) -> the recursion's start
OutputHessianOf = Callable[[nn.Module, Tensor, Node, tuple[Any, ...], dict[str, Any]], OutputHessian]


@dataclass(frozen=True)
class TapeOptions:
    """What a tape keeps of forward and backward passes.

    Args:
        diagonal: whether to keep the gradients that the recursion's diagonal needs.
        grad_outputs: whether to keep every layer's delta.
        columns: returns columns s_ic at the network's output. While the graph lives they are taken back to every layer, as
            delta_ic = J_i^T s_ic, and the sum of delta_ic delta_ic^T becomes the layer's `block`. Nothing is then kept for the
            recursion.
        recursive: whether the criterion's Hessian is needed, and the derivatives of what lies between two layers. Double backward
            computes them if no formula does.
        output_hessian: returns the recursion's start if no formula does, given the arguments of `columns`; None: the Hessian.
        samples: at most so many instances of each forward pass, evenly spaced, enter the curvature's expectations; None: all.
        widest: layers with more outputs have no record, and the recursion starts anew at layers that lead to them; None: no
            limit.
        keep_inputs: whether to keep the arguments of the model and of the criterion, for evaluating them again. The tape then
            also notices backward passes that do not come from recorded losses alone (`outside`).
    """

    diagonal: bool = False
    grad_outputs: bool = False
    columns: Columns | None = None
    recursive: bool = True
    output_hessian: OutputHessianOf | None = None
    samples: int | None = None
    widest: int | None = None
    keep_inputs: bool = False
