"""sigma' and sigma'' of whatever stands between two linear layers, read off the autograd graph.

The graph, not the module tree, says what happened: it is the same for nn.Sequential, a `forward` of ordinary Python,
functional calls and in-place ones. A single node of a known activation gives the analytic form (`Analytic`); anything else is
differentiated by autograd while its graph lives (`Probed`), after a check that it acts elementwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from secondorder import ops

# Activations with sigma'' = 0 wherever it exists: their diagonal term vanishes, so its gradient need not be kept.
_PIECEWISE_LINEAR = {"identity", "relu", "leaky_relu"}


@dataclass(eq=False, slots=True)
class Analytic:
    """An activation that the operators know by name; `saved` [..., n] is what `ops.activation_derivatives` takes for it."""

    activation: str
    parameter: float
    saved: Tensor

    @property
    def curved(self) -> bool:
        """Whether sigma'' is not identically 0."""
        return self.activation not in _PIECEWISE_LINEAR


@dataclass(eq=False, slots=True)
class Probed:
    """Any other elementwise function, by its derivatives d1 and d2 (None: identically 0), each [..., n]."""

    d1: Tensor
    d2: Tensor | None

    @property
    def curved(self) -> bool:
        """Whether sigma'' is not identically 0."""
        return self.d2 is not None


Transfer = Analytic | Probed

# Name of the autograd node, without its number -> (name, parameter, whether `saved` is the output), or None where its
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


def analytic(node: Any, output: Tensor, source: Node, preactivation: Callable[[], Tensor]) -> Analytic | None:
    """The analytic form of what autograd node `node` made of node `source`'s tensor, if it is one known activation of it.

    `output` is what it made, detached; `preactivation` gives the values of the other, and is called only where they are needed.
    """
    if node is source:
        return Analytic("identity", 1.0, output)
    settings = _NODES.get(node.name().rstrip("0123456789"))  # ...Backward0, or 1 in place
    known = settings(node) if settings and node.next_functions[0][0] is source else None
    if known is None:
        return None
    name, parameter, from_output = known
    return Analytic(name, float(parameter), output if from_output else preactivation())


def probe(output: Tensor, source: Node, second: bool) -> Probed | None:
    """d1 and, if `second`, d2 of `output` as an elementwise function of node `source`'s tensor; None if it is not elementwise.

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
            (d2,) = torch.autograd.grad(d1, edge, torch.ones_like(d1), retain_graph=True, allow_unused=True)
    return Probed(d1.detach(), d2 if d2 is None else d2.detach())


def irregular(like: Tensor) -> Tensor:
    """Numbers of mixed signs and sizes, no two alike, from 0.5 to 1.5: fixed, so that every random generator is left alone."""
    index = torch.arange(like.numel(), device=like.device, dtype=torch.float64)
    fraction = (index * 0.6180339887498949).frac()  # the golden ratio's multiples fill [0, 1) without ever repeating
    signs = 1 - 2 * ((index * 0.7548776662466927).frac() < 0.5).double()
    return ((0.5 + fraction) * signs).to(like.dtype).reshape(like.shape)


def _close(actual: Tensor, expected: Tensor) -> bool:
    scale = expected.abs().max() if expected.numel() else expected.new_zeros(())
    # Non-finite values are not this check's to judge: the step's own check reports them.
    return bool(((actual - expected).abs() <= 1e-3 * scale).all() | ~torch.isfinite(scale))


def merge(transfers: list[Transfer], samples: int | None = None) -> Transfer:
    """One transfer for the union of several micro-batches' instances, or of `sample`s of them, [m, n]."""
    first, others = transfers[0], transfers[1:]
    if isinstance(first, Analytic):
        if not others and samples is None and first.saved.dim() == 2:
            return first
        same = [
            t for t in others if isinstance(t, Analytic) and (t.activation, t.parameter) == (first.activation, first.parameter)
        ]
        if len(same) == len(others):
            return Analytic(first.activation, first.parameter, rows([first.saved, *(t.saved for t in same)], samples))
    probed = [t if isinstance(t, Probed) else Probed(*derivatives(t)) for t in transfers]
    d1 = rows([p.d1 for p in probed], samples)
    if not any(p.curved for p in probed):
        return Probed(d1, None)
    return Probed(d1, rows([torch.zeros_like(p.d1) if p.d2 is None else p.d2 for p in probed], samples))


def derivatives(transfer: Transfer) -> tuple[Tensor, Tensor | None]:
    """d1 and d2 (None: identically 0) of either form."""
    if isinstance(transfer, Probed):
        return transfer.d1, transfer.d2
    d1, d2 = ops.activation_derivatives(transfer.saved, transfer.activation, transfer.parameter)
    return d1, d2 if transfer.curved else None


def rows(tensors: list[Tensor], samples: int | None = None) -> Tensor:
    """[m, n] from tensors [..., n]: the union of their instances, or of `sample`s of them."""
    if len(tensors) == 1 and samples is None and tensors[0].dim() == 2:
        return tensors[0]
    flat = [sample(t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1]), samples) for t in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, but free where it is `t` itself: with small layers, calls of torch are what a step costs."""
    return t if t.dtype == dtype else t.to(dtype)


def widened(t: Tensor) -> Tensor:
    """At least in float32."""
    return t if t.dtype is torch.float32 else cast(t, wide(t.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What numbers of this dtype are computed with: at least float32."""
    return dtype if dtype is torch.float32 else torch.promote_types(dtype, torch.float32)


def sample(instances: Tensor, samples: int | None) -> Tensor:
    """Of the instances [..., m, n], where they are more than `samples`, so many, evenly spaced: floor(k m / samples)."""
    m = instances.shape[-2]
    if samples is None or m <= samples:
        return instances
    return instances.index_select(-2, torch.arange(samples, device=instances.device) * m // samples)
