"""sigma' and sigma'' of whatever stands between two linear layers, read off the autograd graph.

The graph, not the module tree, says what happened: it is the same for nn.Sequential, a `forward` of ordinary Python,
functional calls and in-place ones. A single node of a known activation gives the analytic form (`KnownActivation`); anything else
is differentiated by autograd while its graph lives (`AutogradMap`), after a check that it acts elementwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from secondorder import ops
from secondorder._tape.nodes import kind
from secondorder._tensors import flatten_batch, irregular
from secondorder.criteria.autograd import check_second_derivatives

# Activations with sigma'' = 0 wherever it exists: their diagonal term vanishes, so its gradient need not be kept.
_PIECEWISE_LINEAR = {"identity", "relu", "leaky_relu"}


@dataclass(eq=False, slots=True)
class KnownActivation:
    """An activation that the operators know by name; `saved` [..., n] is what `ops.activation_derivatives` takes for it."""

    activation: str
    parameter: float
    saved: Tensor

    @property
    def curved(self) -> bool:
        """Tells whether sigma'' is not identically 0."""
        return self.activation not in _PIECEWISE_LINEAR


@dataclass(eq=False, slots=True)
class AutogradMap:
    """Any other elementwise function, by its derivatives d1 and d2 (None: identically 0), each [..., n]."""

    d1: Tensor
    d2: Tensor | None

    @property
    def curved(self) -> bool:
        """Tells whether sigma'' is not identically 0."""
        return self.d2 is not None


ElementwiseMap = KnownActivation | AutogradMap

# The kind of an autograd node -> (name, parameter, whether `saved` is the output), or None where its
# settings have no analytic form.
_NODES: dict[str, Callable[[Any], tuple[str, float, bool] | None]] = {
    "SigmoidBackward": lambda node: ("sigmoid", 1.0, True),
    "TanhBackward": lambda node: ("tanh", 1.0, True),
    "ReluBackward": lambda node: ("relu", 1.0, True),
    "LeakyReluBackward": lambda node: (
        ("leaky_relu", node._saved_negative_slope, True) if node._saved_negative_slope > 0 else None
    ),
    "EluBackward": lambda node: (
        ("elu", node._saved_alpha, True)
        if node._saved_alpha > 0 and node._saved_scale == 1 and node._saved_input_scale == 1
        else None
    ),
    "SoftplusBackward": lambda node: (
        ("softplus", node._saved_beta, False) if node._saved_threshold == 20 and node._saved_beta > 0 else None
    ),
    "SiluBackward": lambda node: ("silu", 1.0, False),
    "GeluBackward": lambda node: ("gelu_tanh" if node._saved_approximate == "tanh" else "gelu", 1.0, False),
}


# By name and parameter.
_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda z, _: z,
    "relu": lambda z, _: F.relu(z),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "softplus": F.softplus,
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "tanh": lambda z, _: torch.tanh(z),
    "silu": lambda z, _: F.silu(z),
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
}


def activation_function(known: KnownActivation) -> Callable[[Tensor], Tensor]:
    """Returns the function itself."""
    function = _ACTIVATIONS[known.activation]
    return lambda z: function(z, known.parameter)


def analytic(node: Any, output: Tensor, source: Node, preactivation: Callable[[], Tensor]) -> KnownActivation | None:
    """Returns the analytic form of what autograd node `node` made of node `source`'s tensor, if it is one known activation of it.

    `output` is what it made, detached; `preactivation` gives the values of the other, and is called only where they are needed.
    """
    if node is source:
        return KnownActivation("identity", 1.0, output)
    settings = _NODES.get(kind(node))
    known = settings(node) if settings and node.next_functions[0][0] is source else None
    if known is None:
        return None
    name, parameter, from_output = known
    return KnownActivation(name, float(parameter), output if from_output else preactivation())


def probe(output: Tensor, source: Node, second: bool) -> AutogradMap | None:
    """Computes d1, and d2 if `second`, of `output` as an elementwise function of `source`'s tensor; None: it is not elementwise.

    An elementwise function has a diagonal Jacobian J, so J^T v = (J^T 1) * v for every v; an irregular one is tried.
    """
    edge = GradientEdge(source, 0)
    with torch.enable_grad():
        ones = torch.ones_like(output)
        (d1,) = torch.autograd.grad(output, edge, ones, create_graph=True)
        if d1.shape[-1] != output.shape[-1] or d1.numel() != output.numel():
            return None
        v = irregular(output)
        (jv,) = torch.autograd.grad(output, edge, v, retain_graph=True)
        if not _close(jv, d1.detach() * v.reshape(d1.shape)):
            return None
        d2 = None
        if second and d1.requires_grad:
            check_second_derivatives([d1], [source])
            (d2,) = torch.autograd.grad(d1, edge, torch.ones_like(d1), retain_graph=True, allow_unused=True)
    return AutogradMap(d1.detach(), d2 if d2 is None else d2.detach())


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Tells whether numbers are equal but for rounding."""
    scale = expected.abs().max() if expected.numel() else expected.new_zeros(())
    # Non-finite values are not this check's to judge: the step's own check reports them.
    return bool(((actual - expected).abs() <= 1e-3 * scale).all() | ~torch.isfinite(scale))


def merge(maps: list[ElementwiseMap], samples: int | None = None) -> ElementwiseMap:
    """Joins the maps of several micro-batches to one of all their instances, or of `subsample`s of them, [m, n]."""
    first, others = maps[0], maps[1:]
    if isinstance(first, KnownActivation):
        if not others and samples is None and first.saved.dim() == 2:
            return first
        function = (first.activation, first.parameter)
        same = [t for t in others if isinstance(t, KnownActivation) and (t.activation, t.parameter) == function]
        if len(same) == len(others):
            return KnownActivation(*function, flatten_batch([first.saved, *(t.saved for t in same)], samples))
    probed = [t if isinstance(t, AutogradMap) else AutogradMap(*derivatives(t)) for t in maps]
    d1 = flatten_batch([p.d1 for p in probed], samples)
    if not any(p.curved for p in probed):
        return AutogradMap(d1, None)
    return AutogradMap(d1, flatten_batch([torch.zeros_like(p.d1) if p.d2 is None else p.d2 for p in probed], samples))


def of_rows(function: ElementwiseMap, rows: Tensor) -> ElementwiseMap:
    """Returns a map of some rows alone, [m, n]."""

    def kept(t: Tensor) -> Tensor:
        return flatten_batch([t]).index_select(0, rows)

    if isinstance(function, KnownActivation):
        return KnownActivation(function.activation, function.parameter, kept(function.saved))
    return AutogradMap(kept(function.d1), None if function.d2 is None else kept(function.d2))


def weighted(function: ElementwiseMap, weights: Tensor) -> AutogradMap:
    """Returns a map whose rows of d1 are scaled such that E[d1 d1^T] is the mean with these weights [m]; d2 stays as it is."""
    d1, d2 = derivatives(function)
    d1, d2 = flatten_batch([d1]), None if d2 is None else flatten_batch([d2])
    return AutogradMap(d1 * (weights * (len(weights) / weights.sum())).sqrt().to(d1.dtype).unsqueeze(1), d2)


def derivatives(function: ElementwiseMap) -> tuple[Tensor, Tensor | None]:
    """Returns d1 and d2 (None: identically 0) of either form."""
    if isinstance(function, AutogradMap):
        return function.d1, function.d2
    d1, d2 = ops.activation_derivatives(function.saved, function.activation, function.parameter)
    return d1, d2 if function.curved else None
