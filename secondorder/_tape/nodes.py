"""Autograd nodes: their kinds, which of them are linear, and whether they depend on parameters."""

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

# Nodes that a loss may be made of above its squares: each is linear in every input, with constants that autograd knows.
_LINEAR = {
    "AddBackward", "SubBackward", "RsubBackward", "NegBackward", "MeanBackward", "SumBackward", "NansumBackward", "StackBackward",
    "CatBackward", "SelectBackward", "SliceBackward", "IndexBackward", "IndexSelectBackward", "GatherBackward", "SqueezeBackward",
    "UnsqueezeBackward", "ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "ExpandBackward", "ToCopyBackward",
    "CloneBackward", "AliasBackward", "PermuteBackward", "TransposeBackward", "TBackward", "UnbindBackward", "SplitBackward",
    "WhereBackward", "MaskedFillBackward", "MaskedSelectBackward", "DivBackward", "CumsumBackward", "AsStridedBackward",
    "LiftFreshBackward", "_DDPSinkBackward", "SplitWithSizesBackward", "DiagonalBackward", "DiagEmbedBackward", "TraceBackward",
    "TrilBackward", "TriuBackward", "FlipBackward", "RollBackward", "Rot90Backward", "RepeatBackward", "UnfoldBackward",
    "TakeBackward", "ConstantPadNdBackward", "AvgPool2DBackward", "AvgPool3DBackward", "AdaptiveAvgPool2DBackward",
    "AdaptiveAvgPool3DBackward", "ScatterBackward", "ScatterAddBackward", "IndexAddBackward", "IndexCopyBackward",
    "IndexPutBackward", "ViewAsRealBackward", "LerpBackward", "torch::autograd::CopyBackwards", "UpsampleNearest1DBackward",
    "UpsampleNearest2DBackward", "UpsampleNearest3DBackward", "UpsampleNearestExact1DBackward", "UpsampleNearestExact2DBackward",
    "UpsampleNearestExact3DBackward", "UpsampleLinear1DBackward", "UpsampleBilinear2DBackward", "UpsampleTrilinear3DBackward",
    "UpsampleBicubic2DBackward", "UpsampleBilinear2DAaBackward", "UpsampleBicubic2DAaBackward",
}  # fmt: skip
# Products, which are linear in one factor if the others do not depend on the parameters.
PRODUCTS = {"MulBackward", "DivBackward", "DotBackward", "VdotBackward", "MvBackward", "MmBackward", "BmmBackward"}
# Products that are fused with a sum: which of their inputs are the factors. The others are added.
FUSED = {
    "AddmmBackward": slice(1, 3), "BaddbmmBackward": slice(1, 3), "AddbmmBackward": slice(1, 3), "AddmvBackward": slice(1, 3),
    "AddrBackward": slice(1, 3), "AddcmulBackward": slice(1, 3), "AddcdivBackward": slice(1, 3), "LinearBackward": slice(0, 2),
    "ConvolutionBackward": slice(0, 2),
}  # fmt: skip
# Additive nodes, where an input without a node is a constant that the graph does not hold.
SUMS = {
    "AddBackward", "SubBackward", "RsubBackward", "StackBackward", "CatBackward", "WhereBackward", "MaskedFillBackward",
    "ConstantPadNdBackward", "ScatterBackward", "ScatterAddBackward", "ScatterReduceBackward", "IndexAddBackward",
    "IndexCopyBackward", "IndexPutBackward", "LerpBackward",
}  # fmt: skip

# A write to a part of a tensor, which hides by what operation.
WRITE = "torch::autograd::CopySlices"
LEAF = "torch::autograd::AccumulateGrad"
# The name of a compiled graph's autograd node.
COMPILED = "CompiledFunctionBackward"
_UNNUMBERED = {"_DDPSinkBackward", COMPILED}  # functions in Python that are known by their names


def kind(node: Node) -> str:
    """Returns a node's name without torch's number at the end, and "()" in its place at a `torch.autograd.Function`'s.

    Such a function may have the name of one of torch's own: `class Mul`.
    """
    return _kind(node.name())


@functools.cache
def _kind(name: str) -> str:
    """Returns `kind` of a name; every step asks for that of every node."""
    found = name.rstrip("0123456789")
    return f"{name}()" if found == name and name.endswith("Backward") and name not in _UNNUMBERED else found


def is_leaf(node: Node) -> bool:
    """Returns whether a node is that of a leaf, `node.variable`."""
    return node.name() == LEAF


def signed_dim(dim: int) -> int:
    """Returns a dimension as it was given: autograd saves it as an unsigned number."""
    return dim - 2**64 if dim >= 2**63 else dim


def linear_node(node: Node) -> bool:
    """Returns whether a node that depends on one tensor alone is known to be linear in it, or to add a constant."""
    name = kind(node)
    if name == "DivBackward":
        return node.next_functions[0][0] is not None
    return name in PRODUCTS or is_linear(node)


def is_linear(node: Any) -> bool:
    """Returns whether a node is linear in all its inputs together, if weights between them do not depend on the parameters."""
    name = kind(node)
    return name in _LINEAR or (name == "ScatterReduceBackward" and node._saved_reduce in ("sum", "mean"))


def adds_constant(node: Any) -> bool:
    """Returns whether a linear node may add a constant that its graph does not hold."""
    name, inputs = kind(node), [f for f, _ in node.next_functions]
    if name == "ConvolutionBackward":
        return inputs[2] is None and bool(getattr(node, "_saved_bias_sym_sizes_opt", True))
    if name in FUSED:
        return any(f is None for i, f in enumerate(inputs) if i not in range(*FUSED[name].indices(len(inputs))))
    return name in SUMS and (None in inputs or len(inputs) == 1)


class Reach:
    """Tells whether autograd nodes depend on any of some parameters."""

    def __init__(self, parameters: Iterable[Tensor]):
        self._parameters = {id(p) for p in parameters}
        self._known: dict[Node, bool] = {}

    def __call__(self, node: Node | None) -> bool:
        """Returns whether one of the parameters is upstream of `node`, or at it."""
        if node is None:
            return False
        known = self._known
        if is_leaf(node):
            return id(node.variable) in self._parameters  # type: ignore[attr-defined]
        path = [(node, iter(node.next_functions))]  # from `node` to where the walk is
        while path and node not in known:
            top, following = path[-1]
            if known.get(top):
                known.update((passed, True) for passed, _ in path)
                break
            child = next((f for f, _ in following if f is not None and known.get(f, True)), None)
            if child is None:
                known[top] = False
                path.pop()
                continue
            further = child.next_functions
            if not further and is_leaf(child):
                known[child] = id(child.variable) in self._parameters  # type: ignore[attr-defined]
            path.append((child, iter(further)))
        return known[node]


def linear_inputs(node: Node, reach: Reach) -> list[Node]:
    """Returns the inputs that a linear node is a sum over; factors of products that do not depend on the parameters are none."""
    name, inputs = kind(node), [f for f, _ in node.next_functions]
    factors = range(len(inputs)) if name in PRODUCTS else range(*FUSED.get(name, slice(0)).indices(len(inputs)))
    return [f for i, f in enumerate(inputs) if f is not None and (i not in factors or reach(f))]
