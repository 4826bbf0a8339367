"""Nodes of an autograd graph that square something: what it is, and how often the squares count."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from secondorder._tape.graph import RESHAPING, TURNING
from secondorder._tape.nodes import FUSED, PRODUCTS, WRITE, Reach, is_leaf, is_linear, kind, signed_dim
from secondorder._tape.parameter_operands import edge_shape
from secondorder._tape.square_roots import POSITIVE, ROOTS
from secondorder._tensors import irregular

NEITHER = "neither a square nor linear"
PRODUCT = "a product or quotient of two things that depend on the parameters"
_COMPLEX = "a power of complex numbers, whose real part has no sign: write z.abs() ** 2 for the square of their absolute value"
# Products of two factors, by the names under which these are saved.
_FACTORS = {
    "MulBackward": ("_saved_self", "_saved_other"),
    "DotBackward": ("_saved_self", "_saved_tensor"),
    "MmBackward": ("_saved_self", "_saved_mat2"),
    "BmmBackward": ("_saved_self", "_saved_mat2"),
    "MvBackward": ("_saved_self", "_saved_vec"),
    "VdotBackward": ("_saved_self", "_saved_other"),
}
# Nodes that multiply numbers by constants, or bring them into another order.
_SCALING = {"MulBackward", "DivBackward", "NegBackward", *RESHAPING, *TURNING} - {"ExpandBackward"}
Edge = tuple[Any, int]  # as in `next_functions`


class Term(NamedTuple):
    """A node of the loss that squares a residual."""

    node: Node
    residual: Tensor  # with its graph, of any shape
    mean: bool = False  # whether the node is the mean of the squares, rather than the squares or their sum
    summed: tuple[int, ...] = ()  # the residual's dimensions that the node has summed over and no longer has
    weight: Tensor | None = None  # of its shape: what the node multiplies the squares by; None: 1
    constant: float = 0.0  # what the node adds to each square
    whole: bool = False  # whether the residual contains its coefficient, so that this is 1


# --- what is linear ---


def obstacle(node: Node, reach: Reach) -> str | None:
    """Returns what a node is through which a loss is no sum of squares; None: it is linear, or a write that may be so."""
    name, inputs = kind(node), [f for f, _ in node.next_functions]
    if _complex_power(node):
        return _COMPLEX
    if name in PRODUCTS:
        return PRODUCT if sum(map(reach, inputs)) > 1 or (name == "DivBackward" and not reach(inputs[0])) else None
    if name in FUSED:
        trained = any(f is not None and is_leaf(f) and reach(f) for f in inputs)
        curved = sum(map(reach, inputs[FUSED[name]])) > 1 or (name == "AddcdivBackward" and reach(inputs[2]))
        return NEITHER if trained or curved else None
    if name == "LerpBackward" and len(inputs) == 3 and reach(inputs[2]) and (reach(inputs[0]) or reach(inputs[1])):
        return PRODUCT
    return None if name == WRITE or is_linear(node) or exponent(node) == 1 else NEITHER


def _complex_power(node: Any) -> bool:
    """Returns whether a node squares complex numbers themselves rather than their absolute values."""
    inputs = node.next_functions
    power = kind(node) == "PowBackward" or (
        kind(node) in ("MulBackward", "DotBackward") and len(inputs) == 2 == inputs.count(inputs[0])
    )
    return power and isinstance(node._saved_self, Tensor) and node._saved_self.is_complex()


def exponent(node: Any) -> float:
    """Returns the exponent of a power of a tensor of real numbers; 0 if it is none, or has several exponents or a trained one."""
    if kind(node) != "PowBackward" or any(f is not None for f, _ in node.next_functions[1:]):
        return 0.0
    saved = node._saved_exponent
    if not isinstance(node._saved_self, Tensor) or (isinstance(saved, Tensor) and saved.numel() != 1):
        return 0.0
    return float(saved.detach() if isinstance(saved, Tensor) else saved)


def _same(one: Edge, other: Edge, reach: Reach) -> bool:
    """Returns whether two tensors, flattened, are the same linear function of the same tensors, so that a constant parts them."""
    if one == other:
        return True
    shapes = [edge_shape(edge) for edge in (one, other)]
    if shapes[0].numel() != shapes[1].numel():
        return False
    inputs = below(one, reach)
    if inputs != below(other, reach):
        return False
    inner = [GradientEdge(*edge) for edge in inputs]
    found = []
    for edge, shape in zip((one, other), shapes, strict=True):
        like: Any = edge[0]._input_metadata[edge[1]]
        v = irregular(torch.empty(shape, dtype=like.dtype, device=like.device))
        found.append(torch.autograd.grad([GradientEdge(*edge)], inner, [v], retain_graph=True))
    return all(_equal(a, b) for a, b in zip(*found, strict=True))


def below(edge: Edge, reach: Reach) -> dict[Edge, None]:
    """Returns the tensors that depend on parameters and of which a tensor is a linear function."""
    found, seen, stack = dict[Edge, None](), set[Node](), [edge]
    while stack:
        node, output = stack.pop()
        if is_leaf(node) or obstacle(node, reach) is not None:
            found[node, output] = None
        elif node not in seen:
            seen.add(node)
            stack += [each for each in node.next_functions if reach(each[0])]
    return dict(sorted(found.items(), key=lambda item: (id(item[0][0]), item[0][1])))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Returns whether numbers are equal but for rounding; what is not finite counts as equal, for the step to refuse it."""
    return not bool(((a - b).abs() > 32 * torch.finfo(a.dtype).eps * torch.maximum(a.abs(), b.abs()).amax()).any())


# --- squares ---


def square(node: Node, reach: Reach) -> Term | None:
    """Returns the node as a square of real numbers, if it is one."""
    name = kind(node)
    saved: Any = node
    if _complex_power(node):
        return None
    if (power := exponent(node)) != 0:
        if power == 2:
            return root(node, reach)
        return Term(node, saved._saved_self ** (power / 2)) if power >= 4 and power % 2 == 0 else None
    if name == "VdotBackward" and len(set(node.next_functions)) == 1 and saved._saved_self.is_complex():
        return Term(node, torch.view_as_real(saved._saved_self))
    if name == "VarBackward" and not saved._saved_self.is_complex():
        centred, summed = _centred(node)
        return Term(node, centred, summed=summed)
    # One input: the other is a number.
    if name in _FACTORS and len(node.next_functions) == 2:
        first, second = saved.next_functions
        if first == second and name not in ("MmBackward", "BmmBackward"):  # the same output of the same node
            return root(node, reach)
        factors = _FACTORS[name] if reach(first[0]) and reach(second[0]) else ()
        for one, other, z in zip((first, second), (second, first), factors, strict=False):
            # z times its conjugate
            if name in ("MulBackward", "DotBackward") and kind(other[0]) == "ConjBackward" and other[0].next_functions[0] == one:
                squared: Tensor = torch.view_as_real(getattr(node, z))
                return Term(node, squared, summed=(squared.ndim - 1,))
        values = [getattr(node, each) for each in factors]
        if values and _inner_product(name, *values) and not values[0].is_complex():
            for one, other, a, r in zip((first, second), (second, first), values, values[::-1], strict=True):
                if (weight := _weight(one, other, a, r, reach)) is not None:
                    return Term(node, r, weight=weight)
    if name in ROOTS:
        found = ROOTS[name](node)
        return None if found is None else Term(node, found, saved._saved_reduction == 1)
    return None


def positive(node: Node) -> Term | None:
    """Returns the node as a function that is positive wherever it is, or negative, less a constant: as a square of its root."""
    name = kind(node)
    if name not in POSITIVE or node._input_metadata[0].dtype.is_complex:
        return None
    found, sign, constant = POSITIVE[name](node)
    return Term(node, found, weight=None if sign == 1 else torch.tensor(sign, device=found.device), constant=constant)


def _inner_product(name: str, a: Tensor, b: Tensor) -> bool:
    """Returns whether a product multiplies each number of `a` with the one of `b` at its place, both flattened."""
    if name in ("MmBackward", "BmmBackward"):
        return a.shape[-2] == b.shape[-1] == 1
    return a.shape[0] == 1 if name == "MvBackward" else a.shape == b.shape


def root(node: Any, reach: Reach) -> Term:
    """Returns the term of a node that squares a tensor.

    If the node squares an absolute value or a norm, times constants, the residual is the tensor within, whose square is smooth.
    """
    value: Tensor = node._saved_self
    base, factors = node.next_functions[0][0], list[Tensor]()
    while (found := _constant_factor(base, reach, value.device)) is not None:
        factor, (base, _) = found
        factors.append(factor)
    if kind(base) in RESHAPING and edge_shape(base.next_functions[0]) == value.shape:
        base = base.next_functions[0][0]
    inner, summed, shape = _within(base)
    if inner is None or value.shape != shape:  # it is neither, or constants have widened it
        return Term(node, value)
    if inner.is_complex():
        # Two residuals for each number, its real and its imaginary part, whose squares are summed over the last dimension.
        summed, inner = (*summed, inner.ndim), torch.view_as_real(inner)
    for factor in factors:
        inner = inner * _unsqueezed(factor.to(value).expand(shape), summed)
    return Term(node, inner, summed=summed)


def _constant_factor(node: Any, reach: Reach, device: torch.device) -> tuple[Tensor, Edge] | None:
    """Returns the constant that a node multiplies something by, and the edge of that thing; None: it does nothing like that."""
    division = kind(node) == "DivBackward"
    if not (division or kind(node) == "MulBackward") or sum(reach(f) for f, _ in node.next_functions) != 1:
        return None
    first = reach(node.next_functions[0][0])
    if division and not first:
        return None
    other = torch.as_tensor(node._saved_other if first else node._saved_self, device=device).detach()
    return 1 / other if division else other, node.next_functions[0 if first else 1]


def _weight(product: Edge, factor: Edge, value: Tensor, r: Tensor, reach: Reach) -> Tensor | None:
    """Returns w if a factor of a node is w * r for constants w and the other factor r, as in w * r * r; None: it is not.

    Args:
        product: the edge of the one factor.
        factor: that of the other one.
        value: of the one.
        r: of the other one.
        reach: tells which nodes depend on the parameters.
    """
    weight = torch.ones_like(value, requires_grad=False)
    while not _same(product, factor, reach):
        node = product[0]
        inner = next((each for each in node.next_functions if reach(each[0])), product)
        if kind(node) not in _SCALING or obstacle(node, reach) is not None or edge_shape(inner).numel() != weight.numel():
            return None
        # What multiplies numbers by constants, or brings them into another order, does likewise with their gradients.
        edges = GradientEdge(*product), GradientEdge(*inner)
        (weight,), product = torch.autograd.grad(edges[:1], edges[1:], [weight], retain_graph=True), inner
    weight = weight.detach().reshape(r.shape)
    # Both are the same function but for a constant: (u - y) * (u - y), and not (u - y) * (u - z).
    return weight if _equal(value.detach().reshape(r.shape), weight * r.detach()) else None


def _within(node: Any) -> tuple[Tensor | None, tuple[int, ...], torch.Size]:
    """Returns the tensor whose absolute value or norm a node is, the dimensions that are gone then, and the shape that is left.

    The tensor is None if the node is neither.
    """
    name = kind(node)
    if name == "AbsBackward":
        return node._saved_self, (), node._saved_self.shape
    if name == "DistBackward" and node._saved_p == 2:
        inner: Tensor = node._saved_self - node._saved_other
        return inner, tuple(range(inner.ndim)), torch.Size()
    if name == "StdBackward" and not node._saved_self.is_complex():
        inner, summed = _centred(node)
        return inner, summed, node._saved_result.shape
    if name == "EuclideanDistBackward" or (name == "CdistBackward" and node._saved_p == 2):
        inner = node._saved_x1.unsqueeze(-2) - node._saved_x2.unsqueeze(-3)
        return inner, (inner.ndim - 1,), inner.shape[:-1]
    order = {"LinalgVectorNormBackward": "_saved_ord", "NormBackward": "_saved_p"}.get(name)
    if order is None or getattr(node, order) != 2:
        return None, (), torch.Size()
    inner = node._saved_self
    return inner, _summed(node, inner), node._saved_result.shape


def _centred(node: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Returns residuals whose squares have a node's variance as their sum, and the dimensions of that sum that are gone."""
    values: Tensor = node._saved_self
    dims = node._saved_dim
    over = list(range(values.ndim)) if not dims else [signed_dim(d) % values.ndim for d in dims]
    count = torch.Size([values.shape[d] for d in over]).numel()
    correction = 1 if node._saved_correction is None else float(node._saved_correction)
    centred = values - values.mean(over, keepdim=True) if over else values * 0
    return centred * max(count - correction, 0) ** -0.5, _summed(node, values)


def _summed(node: Any, inner: Tensor) -> tuple[int, ...]:
    """Returns the dimensions of a tensor that a node has reduced and no longer has."""
    if getattr(node, "_saved_keepdim", False):
        return ()
    dims = getattr(node, "_saved_dim", None)
    signed = range(inner.ndim) if dims is None else map(signed_dim, dims)
    return tuple(sorted(d % max(inner.ndim, 1) for d in signed))


def _unsqueezed(t: Tensor, summed: tuple[int, ...]) -> Tensor:
    """Returns a tensor with the dimensions that a term has summed over; a single number needs none."""
    for dim in summed if t.ndim else ():
        t = t.unsqueeze(dim)
    return t


# --- coefficients ---


def arriving(output: Tensor | GradientEdge, terms: list[Term], seed: Tensor | None = None) -> list[Tensor]:
    """Returns c of each term, of the residual's shape: the gradient that arrives at its node.

    Args:
        output: a scalar loss, or where a tensor stands in the graph of which `seed` is the gradient.
        terms: all squares that it is a combination of.
        seed: of which c is a linear function, with its graph.
    """
    nodes = list(dict.fromkeys(term.node for term in terms))
    gradients = dict(zip(nodes, gradients_past(output, nodes, seed), strict=True))
    found = []
    for term in terms:
        c = gradients[term.node].real  # of z times its conjugate, which is real
        c = torch.ones_like(term.residual).detach() if term.whole else c if seed is not None else c.detach()
        c = c / term.residual.numel() if term.mean else c
        c = c if term.weight is None else c * term.weight.to(c)
        found.append(_unsqueezed(c, term.summed).expand(term.residual.shape))
    return found


def gradients_past(output: Tensor | GradientEdge, nodes: list[Node], seed: Tensor | None = None) -> tuple[Tensor, ...]:
    """Returns the gradients that arrive at nodes otherwise than through another one of them."""

    def stop(gradients: tuple[Tensor | None, ...]) -> tuple[None, ...]:
        return (None,) * len(gradients)  # no gradient, which passes through all nodes, where a zero times infinity is NaN

    handles = [node.register_prehook(stop) for node in nodes if len(nodes) > 1]
    try:
        edges = [GradientEdge(node, 0) for node in nodes]
        return torch.autograd.grad(output, edges, seed, retain_graph=True, create_graph=seed is not None)
    finally:
        for handle in handles:
            handle.remove()
