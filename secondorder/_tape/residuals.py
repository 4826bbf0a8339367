"""The residuals of a least-squares loss, found in its autograd graph: loss = sum_k c_k r_k^2 + constant."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from secondorder._tape.nodes import LEAF, PRODUCTS, SUMS, Reach, is_leaf, is_linear, kind, linear_node, signed_dim
from secondorder._tape.square_roots import ROOTS
from secondorder._tensors import host_numbers, plain

# A write to a part of a tensor, which hides by what operation: one that is linear keeps the loss the sum of the squares above.
_WRITE = "torch::autograd::CopySlices"
_WRITTEN = "a write to a part of a tensor, and something beside it adds a constant or may do so, so that it may not be linear"
_NEITHER = "neither a square nor linear"
_PRODUCT = "a product or quotient of two things that depend on the parameters"
_COMPLEX = "a power of complex numbers, whose real part has no sign: write z.abs() ** 2 for the square of their absolute value"


class Term(NamedTuple):
    """A node of the loss that squares a residual."""

    node: Node
    residual: Tensor  # with its graph, of any shape
    mean: bool  # whether the node is the mean of the squares, rather than the squares or their sum
    summed: tuple[int, ...] = ()  # the residual's dimensions that the node has summed over and no longer has
    weight: Tensor | None = None  # of its shape: what the node multiplies the squares by; None: 1


class Terms(NamedTuple):
    """The squares that a loss is a combination of."""

    squares: list[Term]
    penalties: list[Term]  # the squares of parameters themselves
    constant: bool  # whether the loss may have a part that depends on no parameter


def find_terms(loss: Tensor, reach: Reach, owner: str) -> Terms:
    """Finds the squares that a loss is a combination of, in the order of a walk from the loss.

    Args:
        loss: a scalar with its graph.
        reach: tells which nodes depend on the parameters.
        owner: who asks, for the error.

    Raises:
        RuntimeError: the graph has a node between the loss and a parameter that is neither linear nor a square.
    """
    squares, penalties, constant, written = list[Term](), list[Term](), False, None
    seen: set[Node] = set()
    stack: list[Node] = [loss.grad_fn] if loss.grad_fn is not None else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not reach(node):
            constant = True
        elif (square := _square(node, reach)) is not None:
            constant |= kind(node) == "BinaryCrossEntropyWithLogitsBackward"  # the entropy of its targets
            if square.residual.is_leaf:  # a parameter, or a copy of one by hooks on saved tensors
                leaf: Any = get_gradient_edge(square.residual).node
                penalties.append(square._replace(residual=leaf.variable))
            elif square.residual.numel():
                squares.append(square._replace(residual=plain(square.residual)))
        elif (obstacle := _obstacle(node, reach)) is not None:
            _refuse(owner, loss, node, obstacle)
        else:
            inputs = [f for f, _ in node.next_functions]
            constant |= kind(node) in SUMS and (None in inputs or len(inputs) == 1)
            written = node if kind(node) == _WRITE else written
            stack += [f for f in inputs if f is not None and (kind(node) not in PRODUCTS or reach(f))]
    if written is not None and constant:
        _refuse(owner, loss, written, _WRITTEN)
    if not squares:  # a loss of squares of parameters alone: they are its residuals
        squares, penalties = [term._replace(residual=term.residual.clone()) for term in penalties], []
    if not squares:
        raise RuntimeError(
            f"{owner}.step(): expected the closure to return a loss that depends on a trained parameter, got one that does not; "
            "return the scalar loss itself, neither detached nor a number, and give torch.utils.checkpoint use_reentrant=False, "
            "without which it hides parameters"
        )
    return Terms(squares[::-1], penalties[::-1], constant)


# Hints what to write in place of nodes that losses often have, by the beginnings of their names.
_INSTEAD = {
    ("Abs", "L1Loss"): "In place of absolute values take nn.HuberLoss with a small delta",
    ("LogSoftmax",): "Cross-entropy is of class indices, without label smoothing; for soft labels take EigenAdam",
    ("Sqrt", "Log", "LinalgVectorNorm", "Norm", "Dist", "Pow"): (
        "Leave out the root, norm or logarithm around a sum of squares: the squares, as norm(u - y) ** 2, have the same minimum; "
        "in place of log(cosh(r)), (1 + r ** 2).sqrt() and the like take Huber's loss or smooth L1"
    ),
    ("Addmm", "Mm", "Bmm"): (
        "A term is linear in u. In an energy take the equation's residual, or L-BFGS; beside a multiplier m complete the square, "
        "(r + m / 2) ** 2 in place of r ** 2 + m * r"
    ),
    (_WRITE,): "Stack, join or mask the terms in place of writing them: torch.stack, torch.cat, torch.where",
    (LEAF,): "Give trained weights of the terms to another optimizer",
    ("CompiledFunction",): "Compile the net, and leave the loss out of torch.compile",
}
_FORM = "For a quadratic form, r @ A @ r, write ((r @ L) ** 2).sum() with A = L @ L.T, as torch.linalg.cholesky(A) gives it"


def _refuse(owner: str, loss: Tensor, node: Node, what: str) -> None:
    """Raises RuntimeError, unless the loss has the coefficient zero there, as that of 0 * penalty; all nodes above are linear."""
    if len(node._input_metadata) == 1:
        (coefficient,) = torch.autograd.grad(loss, [GradientEdge(node, 0)], retain_graph=True)
        if not bool(coefficient.any()):
            return
    trained = [f for f, _ in node.next_functions if f is not None and is_leaf(f)]  # factors that are parameters
    names = [node.name()] if what in (_NEITHER, _WRITTEN) else [f.name() for f in trained]
    hints = [text for starts, text in _INSTEAD.items() for name in names if name.startswith(starts)]
    if what == _PRODUCT and _is_form(node):
        hints = [_FORM]
    hint = hints[0] + ". " if hints else ""
    raise RuntimeError(
        f"{owner}.step(): expected the loss to be a sum of means or sums of squares, each times a constant, but {node.name()} "
        f"is {what}. {hint}Take squares of residuals (r ** 2, nn.functional.mse_loss), Huber's loss, smooth L1, the soft margin, "
        "binary cross-entropy with logits or cross-entropy; detach weights that are computed from residuals; or return "
        "[(residual, weight), ...] from the closure. EigenAdam takes any loss."
    )


def _is_form(product: Node) -> bool:
    """Returns whether one of two factors is a linear function of the other one, as far as the graph shows."""
    factors = [f for f, _ in product.next_functions if f is not None]
    for factor, other in zip(factors, factors[::-1], strict=True):
        stack, seen = [factor], set[Node]()
        while stack:
            node = stack.pop()
            if node is other:
                return True
            if node not in seen and linear_node(node):
                stack += [f for f, _ in node.next_functions if f is not None]
            seen.add(node)
    return False


def _obstacle(node: Node, reach: Reach) -> str | None:
    """Returns what a node is through which a loss is no sum of squares; None: it is linear, or a write that may be so."""
    name, inputs = kind(node), [f for f, _ in node.next_functions]
    if _complex_power(node):
        return _COMPLEX
    if name in PRODUCTS:
        return _PRODUCT if sum(map(reach, inputs)) > 1 or (name == "DivBackward" and not reach(inputs[0])) else None
    if name == "LerpBackward" and len(inputs) == 3 and reach(inputs[2]) and (reach(inputs[0]) or reach(inputs[1])):
        return _PRODUCT
    return None if name == _WRITE or is_linear(node) else _NEITHER


def _square(node: Node, reach: Reach) -> Term | None:
    """Returns the node as a square of real numbers, if it is one."""
    name = kind(node)
    saved: Any = node
    if _complex_power(node):
        return None
    if name == "PowBackward" and all(f is None for f, _ in node.next_functions[1:]):
        exponent = _exponent(saved)
        if exponent == 2:
            return _root(node, reach)
        if exponent >= 4 and exponent % 2 == 0:
            return Term(node, saved._saved_self ** (exponent / 2), False)
    if name == "VdotBackward" and len(set(node.next_functions)) == 1 and saved._saved_self.is_complex():
        return Term(node, torch.view_as_real(saved._saved_self), False)
    # One input: the other is a number.
    if name in ("MulBackward", "DotBackward", "VdotBackward") and len(node.next_functions) == 2:
        first, second = node.next_functions
        if first == second:  # the same output of the same node
            return _root(node, reach)
        factors = {"MulBackward": ("_saved_self", "_saved_other"), "DotBackward": ("_saved_self", "_saved_tensor")}.get(name, ())
        for one, other, z in zip((first, second), (second, first), factors, strict=False):
            # z times its conjugate
            if other[0] is not None and kind(other[0]) == "ConjBackward" and other[0].next_functions[0] == one:
                squared: Tensor = torch.view_as_real(getattr(node, z))
                return Term(node, squared, False, (squared.ndim - 1,))
        values = [getattr(node, name) for name in factors if reach(first[0]) and reach(second[0])]
        if len({v.shape for v in values}) == 1 and not values[0].is_complex():
            for one, other, r in zip((first, second), (second, first), values[::-1], strict=True):
                if (weight := _weight(one, other, reach, r.device)) is not None:
                    return Term(node, r, False, weight=weight)
    if name in ROOTS:
        root = ROOTS[name](node)
        return None if root is None else Term(node, root, saved._saved_reduction == 1)
    return None


def _complex_power(node: Any) -> bool:
    """Returns whether a node squares complex numbers themselves rather than their absolute values."""
    inputs = node.next_functions
    power = kind(node) == "PowBackward" or (
        kind(node) in ("MulBackward", "DotBackward") and len(inputs) == 2 == inputs.count(inputs[0])
    )
    return power and isinstance(node._saved_self, Tensor) and node._saved_self.is_complex()


def _exponent(node: Any) -> float:
    """Returns the exponent of a power of a tensor; 0 if there are several, or if the base is a number."""
    exponent = node._saved_exponent
    if not isinstance(node._saved_self, Tensor) or (isinstance(exponent, Tensor) and exponent.numel() != 1):
        return 0.0
    return float(exponent.detach() if isinstance(exponent, Tensor) else exponent)


def _root(square: Any, reach: Reach) -> Term:
    """Returns the term of a node that squares a tensor.

    If the node squares an absolute value or a norm, times constants, the residual is the tensor within, whose square is smooth.
    """
    value: Tensor = square._saved_self
    node, factors = square.next_functions[0][0], list[Tensor]()
    while (found := _constant_factor(node, reach, value.device)) is not None:
        factor, (node, _) = found
        factors.append(factor)
    inner, summed, shape = _within(node)
    if inner is None or value.shape != shape:  # it is neither, or constants have widened it
        return Term(square, value, False)
    if inner.is_complex():
        # Two residuals for each number, its real and its imaginary part, whose squares are summed over the last dimension.
        summed, inner = (*summed, inner.ndim), torch.view_as_real(inner)
    for factor in factors:
        inner = inner * _unsqueezed(factor.to(value).expand(shape), summed)
    return Term(square, inner, False, summed)


def _constant_factor(node: Any, reach: Reach, device: torch.device) -> tuple[Tensor, tuple[Any, int]] | None:
    """Returns the constant that a node multiplies something by, and the edge of that thing; None: it does nothing like that."""
    division = kind(node) == "DivBackward"
    if not (division or kind(node) == "MulBackward") or sum(reach(f) for f, _ in node.next_functions) != 1:
        return None
    first = reach(node.next_functions[0][0])
    if division and not first:
        return None
    other = torch.as_tensor(node._saved_other if first else node._saved_self, device=device).detach()
    return 1 / other if division else other, node.next_functions[0 if first else 1]


def _weight(product: tuple[Any, int], r: tuple[Any, int], reach: Reach, device: torch.device) -> Tensor | None:
    """Returns w if an edge is that of w * r for constants w, as in w * r * r; None: it is not."""
    weight: Tensor | None = None
    while product != r:
        found = None if product[0] is None else _constant_factor(product[0], reach, device)
        if found is None:
            return None
        factor, product = found
        weight = factor if weight is None else weight * factor
    return weight


def _within(node: Any) -> tuple[Tensor | None, tuple[int, ...], torch.Size]:
    """Returns the tensor whose absolute value or norm a node is, the dimensions that are gone then, and the shape that is left.

    The tensor is None if the node is neither.
    """
    name = "" if node is None else kind(node)
    if name == "AbsBackward":
        return node._saved_self, (), node._saved_self.shape
    if name == "DistBackward" and node._saved_p == 2:
        inner: Tensor = node._saved_self - node._saved_other
        return inner, tuple(range(inner.ndim)), torch.Size()
    order = {"LinalgVectorNormBackward": "_saved_ord", "NormBackward": "_saved_p"}.get(name)
    if order is None or getattr(node, order) != 2:
        return None, (), torch.Size()
    inner = node._saved_self
    dims = getattr(node, "_saved_dim", None)
    if getattr(node, "_saved_keepdim", False):
        return inner, (), node._saved_result.shape
    signed = range(inner.ndim) if dims is None else map(signed_dim, dims)
    return inner, tuple(sorted(d % max(inner.ndim, 1) for d in signed)), node._saved_result.shape


def _unsqueezed(t: Tensor, summed: tuple[int, ...]) -> Tensor:
    """Returns a tensor with the dimensions that a term has summed over; a single number needs none."""
    for dim in summed if t.ndim else ():
        t = t.unsqueeze(dim)
    return t


def coefficients(loss: Tensor, terms: list[Term], owner: str) -> list[Tensor]:
    """Returns c of each term, of the residual's shape, once it is known that none is negative.

    Raises:
        RuntimeError: a coefficient is negative.
    """
    found = arriving(loss, terms)
    check_signs(host_numbers(negative(found)), owner)
    return found


def arriving(loss: Tensor, terms: list[Term]) -> list[Tensor]:
    """Returns c of each term, of the residual's shape: the gradient that arrives at its node."""
    edges = [GradientEdge(term.node, 0) for term in terms]
    gradients = torch.autograd.grad(loss, edges, retain_graph=True)
    found = []
    for term, c in zip(terms, gradients, strict=True):
        c = c.detach().real  # of z times its conjugate, which is real
        c = c / term.residual.numel() if term.mean else c
        c = c if term.weight is None else c * term.weight.to(c)
        found.append(_unsqueezed(c, term.summed).expand(term.residual.shape))
    return found


def negative(found: list[Tensor]) -> list[Tensor]:
    """Returns of each term whether any c is negative."""
    return [(c < 0).any() for c in found]


def check_signs(negative: list[float], owner: str) -> None:
    """Raises RuntimeError if an entry of what `negative` returns is true."""
    if any(negative):
        raise RuntimeError(
            f"{owner}.step(): expected a sum of squares, got a negative coefficient: some square is subtracted. Take the squares "
            "of what is to vanish, as (U - V).abs() ** 2 in place of 1 - overlap.abs() ** 2; what is unbounded below has no "
            "Gauss-Newton step"
        )
