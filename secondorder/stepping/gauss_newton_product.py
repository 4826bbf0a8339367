"""Products with the Gauss-Newton matrix of a loss L(z(theta)) with its graph: x^T G y = (J x)^T H (J y), J = dz/dtheta.

J x comes from the graph by double backward: J^T u is linear in u, and differentiated with respect to it. So whatever autograd can
differentiate twice will do. The outputs z are where the last functions with parameters end: what follows them up to the loss, a
softmax, say, is part of the criterion.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from secondorder._tape import is_affine, preactivation
from secondorder._tensors import Later, Transfer, to_compute_dtype
from secondorder.criteria import OutputHessian, OutputRoot, autograd_hessian
from secondorder.criteria.autograd import tangent_map
from secondorder.criteria.hessians import KnownForm
from secondorder.errors import second_derivatives

# The mean Hessian takes a backward pass through the criterion for each output. With more outputs than this the form over the
# vectors alone is made positive instead.
_MOST_OUTPUTS = 512
# At most so many numbers of a root's columns are held at once.
_COLUMNS = 2**24


class OutputCurvature:
    """Applies the positive semi-definite Hessian of a loss w.r.t. tensors z of its graph to tangents; has the gradient there.

    It is the Hessian itself, or its negative, where its form has one sign on every row of z for the tangents at hand, as for a
    criterion that is convex. Else it is J_u^T H_u J_u, where that is so for the Hessian H_u at the criterion's arguments u(z), as
    for MSE behind a sigmoid. Else, for one tensor z, every row has Pos-Eig_{-1} of the mean over rows; for several, and where
    that mean is zero, as of differences between rows, Pos-Eig_{-1} acts on the form itself.

    Args:
        loss: a scalar with its graph.
        outputs: z.
        known: for a criterion that is known not to be convex, the mean's values, or a root of what stands for every row's;
            "convex": it is known to be convex in its one argument, and H_u is taken.
        arguments: u, where they are functions of z that are not affine.
    """

    def __init__(
        self, loss: Tensor, outputs: Sequence[GradientEdge], known: KnownForm = None, arguments: Sequence[GradientEdge] = ()
    ):
        self._loss, self._outputs, self._known, self._arguments = loss, list(outputs), known, list(arguments)
        with torch.enable_grad():
            self._gradients = torch.autograd.grad(
                loss, self._outputs, create_graph=True, allow_unused=True, materialize_grads=True
            )
        self.gradients = [g.detach() for g in self._gradients]

    def form(self, tangents: list[list[Tensor]], transfer: Transfer) -> Later[Tensor]:
        """Returns what gives t_k^T H t_l [k, k] in float64 on the CPU; a tangent has one tensor of each output's shape."""
        if isinstance(self._known, OutputHessian):
            return transfer.later(self._by_mean(tangents, self._known))
        if self._known is not None and self._known != "convex":
            return transfer.later(self._by_root(tangents, self._known))
        if self._known == "convex" and self._arguments:
            forms = self._forms_at_arguments(tangents, transfer)
            return lambda: self._semidefinite(tangents, forms(), at_arguments=True)
        forms = self._forms(tangents, transfer)
        return lambda: self._semidefinite(tangents, forms(), at_arguments=False)

    def _forms(self, tangents: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        """Returns what gives the Hessian's form, and the lowest, highest and total of its rows."""
        form, by_rows = map(transfer.later, _forms(tangents, [self._product(t) for t in tangents]))
        return lambda: (form(), by_rows())

    def _forms_at_arguments(self, tangents: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        """Returns what gives the form of J_u^T H_u J_u, and the lowest, highest and total of its rows."""
        tangent, curvature = self._at_arguments
        with second_derivatives():
            tangents_there = [tangent(t) for t in tangents]
        return curvature._forms(tangents_there, transfer)

    @functools.cached_property
    def _at_arguments(self) -> "tuple[Callable[[list[Tensor]], list[Tensor]], OutputCurvature]":
        """Returns J_u t for a tangent t, and H_u."""
        return tangent_map(self._arguments, self._outputs), OutputCurvature(self._loss, self._arguments)

    def _semidefinite(self, tangents: list[list[Tensor]], forms: tuple[Tensor, Tensor], at_arguments: bool) -> Tensor:
        """Returns the form of the matrix that is used for H, from the forms of H or of J_u^T H_u J_u."""
        found = self._signed(*forms)
        if found is None and self._arguments and not at_arguments:
            found = self._signed(*self._forms_at_arguments(tangents, Transfer())())
        if found is not None:
            return found
        alone = len(self._outputs) == 1 and self._outputs[0].output_nr == 0  # of a node with several the others stay together
        if alone and self.gradients[0].shape[-1:].numel() <= _MOST_OUTPUTS:
            mean = autograd_hessian(self._loss, self._outputs[0].node)
            if mean.values.any():  # else it compares instances
                return self._by_mean(tangents, mean).double().cpu()
        form = self._forms(tangents, Transfer())()[0] if at_arguments else forms[0]
        values, vectors = torch.linalg.eigh(form)
        return (vectors * values.abs()) @ vectors.T

    def _signed(self, form: Tensor, by_rows: Tensor) -> Tensor | None:
        """Returns the form of a Hessian or of its negative, whichever is positive on every row, or None if neither is."""
        values = torch.linalg.eigvalsh(form) if len(form) > 1 and form.isfinite().all() else form.flatten()
        tolerance = torch.finfo(self.gradients[0].dtype).eps ** 0.5
        lowest, highest, total = by_rows.tolist()
        # Of a convex criterion, or of the negative of one, which is to be maximised.
        for sign, row in ((1.0, lowest), (-1.0, -highest)):
            if row >= -tolerance * total and (sign * values).min() >= -tolerance * values.abs().max():
                return sign * form
        return None

    def _by_mean(self, tangents: list[list[Tensor]], mean: OutputHessian) -> Tensor:
        """Returns the tangents' form of the mean's Pos-Eig_{-1}, the same for every row."""
        (gradient,) = self.gradients
        matrix = to_compute_dtype(mean.positive(-1.0)) * (gradient.shape[-1] / gradient.numel())
        flat = torch.stack([t.reshape(-1, gradient.shape[-1]) for (t,) in tangents]).to(matrix.dtype)
        return flat.flatten(1) @ (flat @ matrix).flatten(1).T

    def _by_root(self, tangents: list[list[Tensor]], root: OutputRoot) -> Tensor:
        """Returns the tangents' form of a root of every row's matrix, by chunks of its columns."""
        (gradient,) = self.gradients
        flat = torch.stack([to_compute_dtype(t).reshape(gradient.shape) for (t,) in tangents])
        form = flat.new_zeros(len(flat), len(flat))
        chunk = max(1, _COLUMNS // max(1, gradient.numel()))
        for begin in range(0, root.count, chunk):
            columns = root.columns(begin, min(begin + chunk, root.count)).to(flat.dtype)
            along = torch.einsum("c...j,k...j->kc...", columns, flat).flatten(1)  # s_ic . t_ki
            form += along @ along.T
        return form

    def _product(self, tangent: list[Tensor]) -> list[Tensor]:
        """Returns H t."""
        pairs = [(g, t.to(g.dtype)) for g, t in zip(self._gradients, tangent, strict=True) if g.requires_grad]
        if not pairs:
            return [torch.zeros_like(t) for t in tangent]
        with second_derivatives():
            found = torch.autograd.grad(
                [g for g, _ in pairs], self._outputs, [t for _, t in pairs], retain_graph=True, allow_unused=True
            )
        return [torch.zeros_like(t) if h is None else h.detach() for t, h in zip(tangent, found, strict=True)]


class GraphQuadratic:
    """Computes x^T g and x^T G y for a loss with its graph.

    Args:
        loss: a scalar with its graph.
        arguments: the tensors through which it depends on parameters.
        parameters: the graph's leaves.
        known: as for `OutputCurvature`, where there is one argument.
    """

    def __init__(
        self, loss: Tensor, arguments: Sequence[Tensor], parameters: Sequence[Tensor],
        known: KnownForm = None,
    ):  # fmt: skip
        edges = [GradientEdge(node, a.output_nr) for a in arguments if (node := a.grad_fn) is not None]
        before = [preactivation(edge) for edge in edges]
        curved = not all(is_affine(edge, z.node) for edge, z in zip(edges, before, strict=True))
        outputs = list(dict.fromkeys(before)) if known is None or known == "convex" else edges
        self._curvature = OutputCurvature(loss, outputs, known, edges if curved else ())
        leaves = [get_gradient_edge(p) for p in parameters]
        self._tangent = tangent_map(outputs, leaves)

    def products(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        """Returns what gives x_k^T g [k] and x_k^T G x_l [k, k], in float64 on the CPU; x_k have the parameters' shapes."""
        tangents = [self._tangent(vector) for vector in vectors]
        first = transfer.later(torch.stack([inner(t, self._curvature.gradients) for t in tangents]))
        form = self._curvature.form(tangents, transfer)
        return lambda: (first(), form())


@contextmanager
def differentiable_twice(model: nn.Module) -> Iterator[None]:
    """Has torch run attention and recurrent nets within it by implementations that can be differentiated twice."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            torch._C._set_mkldnn_enabled(False)
        yield


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Returns the sum of the elements' products in float64, []."""
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()


def _forms(tangents: list[list[Tensor]], curved: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns t_k^T c_l [k, k], symmetric; and the least, largest and total absolute value of t_ki^T c_ki over the rows i.

    Where the outputs have as many rows, a row is that of all of them together.
    """
    pairs = [
        (torch.stack(t), torch.stack(c)) for t, c in zip(zip(*tangents, strict=True), zip(*curved, strict=True), strict=True)
    ]
    form = torch.stack([t.flatten(1) @ c.flatten(1).T for t, c in pairs]).sum(0)
    rows = [(t * c).reshape(len(t), t.shape[1] if t.dim() > 1 else 1, -1).sum(2) for t, c in pairs]
    together = torch.stack(rows).sum(0) if len({r.shape for r in rows}) == 1 else torch.cat(rows, 1)
    low, high = (together.min(), together.max()) if together.numel() else (together.sum(), together.sum())
    return (form + form.T) / 2, torch.stack([low, high, together.abs().sum()])
