"""Bias Hessians from columns: a square root of the output's Hessian, taken back through the graph of the forward pass.

The columns s_ic give delta_ic = J_i^T s_ic at every layer, and H = sum_i sum_c delta_ic delta_ic^T. They know no obstacle.

Column c of all instances goes back at once. Where several instances depend on one row of a layer (through attention, a norm over
the batch, a recurrent decoder, a graph) their delta_ic arrive there as a sum, whose square has terms of pairs of instances. Each
s_ic has a random sign, so that these terms are zero in expectation. Where each row leads to one instance nothing changes. Rows
that the criterion sees several times, by an index or on both sides, have one root of their summed Hessians.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from secondorder._arguments import is_whole
from secondorder._tape import (
    LayerRecord,
    has_rows_apart,
    is_affine,
    is_recorded,
    is_reshaping,
    is_selecting,
    is_view_of,
    logits_of,
    taken_from,
)
from secondorder._tape.nodes import kind
from secondorder._tensors import captured_now
from secondorder.criteria import CompositeLoss, LikelihoodRoot, OutputRoot, SampledRoot, likelihood_root
from secondorder.criteria.added_roots import added_up, densely_added_up, differences_added_up
from secondorder.criteria.autograd import autograd_root, tangent_map
from secondorder.criteria.known import LOG_SOFTMAX, is_convex, is_fixed, link_of, of_difference
from secondorder.criteria.roots import ClassesElsewhere, GaussianRoot, PulledBackRoot, ScalarRoot, SoftmaxRoot
from secondorder.curvature.base import Curvature, convex_argument, register
from secondorder.curvature.empirical import empirical_fisher


def logits_edge(criterion: nn.Module, output: Tensor) -> GradientEdge | None:
    """Returns the edge of the tensor that a likelihood is convex in, or None if the graph does not have it.

    For a likelihood of log-probabilities or probabilities this tensor is the argument of log_softmax or of the sigmoid. It has
    the numbers of the output, or more where some of the log-probabilities are selected; its shape may differ.
    """
    node, link = output.grad_fn, link_of(criterion)
    assert node is not None
    if link is None:
        return GradientEdge(node, output.output_nr)
    if link == LOG_SOFTMAX:
        return logits_of(output, min(1, output.dim() - 1), is_selecting)
    while is_reshaping(node) and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    if kind(node) != link:
        return None
    before, number = node.next_functions[0]
    return None if before is None else GradientEdge(before, number)


def _columns_edge(criterion: nn.Module, output: Tensor) -> GradientEdge | None:
    """Returns the edge where a likelihood's columns start: that of its logits, or None if the graph does not have these.

    The columns of log-probabilities start at these, since they add up to zero over the classes: log_softmax leaves them as they
    are on their way to the logits.
    """
    assert output.grad_fn is not None
    logits = logits_edge(criterion, output)
    return GradientEdge(output.grad_fn, output.output_nr) if logits is not None and link_of(criterion) == LOG_SOFTMAX else logits


def convex_at(criterion: nn.Module, source: Node, args: tuple[Any, ...]) -> bool:
    """Tells whether a criterion is known to be convex in the output of `source`, as if a likelihood's logits are affine in it."""
    output = args[0] if args else None
    if not isinstance(output, Tensor) or output.grad_fn is None or not (is_convex(criterion) or link_of(criterion)):
        return False
    if not is_fixed(args[1:]):
        return False
    edge = logits_edge(criterion, output)
    return edge is not None and is_affine(edge, source)


def gauss_newton_root(
    criterion: nn.Module, loss: Tensor, source: Node | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[GradientEdge, OutputRoot | None]:
    """Returns the edge of the last linear layer's output z, and a root of every instance's Gauss-Newton matrix there.

    This matrix is the criterion's Hessian at z, or J_u^T H_u J_u for a criterion that is convex in its argument u(z) alone. That
    of a mean square whose target is trained, too, is that of the difference. No root: the matrix is zero.

    Raises:
        ValueError: the criterion is convex in neither, or several linear layers enter it and no root is known of it.
    """
    single = of_difference(criterion, args)
    output = single[0] if single else None
    if isinstance(output, Tensor) and output.grad_fn is not None:
        root: OutputRoot | None = likelihood_root(criterion, output.detach(), *single[1:], **kwargs)
        edge = _columns_edge(criterion, output)
        if root is not None and edge is not None:
            repeats = _before_repeats(criterion, edge, root, output) if single is args else _of_both_sides(args, root)
            edge, root = repeats or (edge, root)
            # At a composite loss's inner value, or at a difference, alone: the Hessian at the source may not be.
            there = source is None or isinstance(criterion, CompositeLoss) or single is not args
            if there or _starts_there(criterion, output, edge, root, source):
                return edge, _Reshaped(_Signed(root), _shape(edge.node, edge.output_nr))
    if source is None:
        raise ValueError(
            f"expected one linear layer's output to enter {criterion}, got several; use curvature='pch-abs', "
            "as LayerwiseNewton does"
        )
    z, inner = GradientEdge(source, 0), convex_argument(source, args)
    if inner is not None and is_convex(criterion):
        return z, _signed(autograd_root(loss, source, inner, convex=True))
    try:
        return z, _signed(autograd_root(loss, source, convex=convex_at(criterion, source, args)))
    except ValueError as error:
        try:
            if inner is not None:
                return z, _signed(autograd_root(loss, source, inner))
        except ValueError:
            pass  # the first error is of what everybody knows, the last layer
        raise error from None


def _before_repeats(
    criterion: nn.Module, edge: GradientEdge, root: OutputRoot, output: Tensor
) -> tuple[GradientEdge, OutputRoot] | None:
    """Returns the edge and the root of the tensor that a likelihood's rows are taken from, if some may be taken several times."""
    log_probabilities = link_of(criterion) == LOG_SOFTMAX
    classes = min(1, output.dim() - 1) if isinstance(root, SoftmaxRoot | ClassesElsewhere) else None
    ways, begin = [], edge
    while True:
        origin = taken_from(begin, classes, _passes)
        ways.append((begin, origin))
        if not (log_probabilities and kind(origin.edge.node) == LOG_SOFTMAX):
            break
        (before, number), classes = origin.edge.node.next_functions[0], origin.dim
        assert before is not None
        begin = GradientEdge(before, number)
    if any(origin.repeats for _, origin in ways):
        total: OutputRoot | None = root
        for begin, (end, dim, _) in ways:
            total = None if total is None else added_up(total, _positions(begin, end), _shape(end.node, end.output_nr), dim)
        if total is not None:
            return origin.edge, total
    end, _, repeats = taken_from(edge, None, _passes)
    if not repeats or log_probabilities or captured_now():  # the host reads whether instances are of one row
        return None
    total = densely_added_up(root, _positions(edge, end).reshape(output.shape), _shape(end.node, end.output_nr))
    return None if total is None else (end, total)


def _of_both_sides(args: tuple[Any, ...], root: OutputRoot) -> tuple[GradientEdge, OutputRoot] | None:
    """Returns the edge and the root of the output of a layer that both sides of a mean square are taken from.

    None: they come from elsewhere, or the columns of the differences do as well. These alone are right where rows of this output
    depend on each other, or on one row of a layer before.
    """
    begins = [GradientEdge(side.grad_fn, side.output_nr) for side in args]
    end, other = (taken_from(begin, None, _passes).edge for begin in begins)
    if end != other or args[0].shape != args[1].shape or not isinstance(root, GaussianRoot):
        return None
    if not has_rows_apart(end.node) or captured_now():  # the number of rows' uses is read by the host
        return None
    first, second = (_positions(begin, end).reshape(root.root.shape) for begin in begins)
    total = differences_added_up(root, first, second, _shape(end.node, end.output_nr))
    return None if total is None else (end, total)


def _passes(node: Node) -> bool:
    return is_selecting(node) and not is_recorded(node)


def _positions(begin: GradientEdge, end: GradientEdge) -> Tensor:
    """Returns which number of the tensor at `end` each one of that at `begin` is, where nodes that select lie between them."""
    shape = _shape(end.node, end.output_nr)
    numbers = torch.arange(shape.numel(), device=end.node._input_metadata[end.output_nr].device).view(shape)
    if begin == end:
        return numbers
    taken, found = tangent_map([begin], [end]), torch.zeros((), dtype=torch.long, device=numbers.device)
    for power in range(0, max(1, shape.numel().bit_length()), 8):  # eight bits at a time: bfloat16 has no more
        found = found + (taken([numbers >> power & 255])[0].long() << power)
    return found


def _starts_there(criterion: nn.Module, output: Tensor, edge: GradientEdge, root: OutputRoot, source: Any) -> bool:
    """Tells whether a likelihood's columns say all of every row of the last linear layer's output, and are at most its width.

    They do where no row of that becomes several of the criterion's, as when images are rows of pixels.
    """
    logits, shape, size = logits_edge(criterion, output), _shape(source), _shape(edge.node, edge.output_nr).numel()
    if logits is None or root.count > shape[-1] or size > root.count * shape[:-1].numel():
        return False
    return is_convex(criterion) or is_view_of(logits.node, source) or is_affine(logits, source)


@dataclass(frozen=True)
class _Signed:
    """Gives every instance's columns random signs, the same at every step and without a generator of torch's."""

    root: OutputRoot

    @property
    def count(self) -> int:
        return self.root.count

    def columns(self, begin: int, end: int) -> Tensor:
        if isinstance(self.root, PulledBackRoot):  # the shape that its function returns says which numbers are an instance's
            return self.root.transposed(_Signed(self.root.root).columns(begin, end))
        found = self.root.columns(begin, end)
        shape = list(found.shape)
        if not isinstance(self.root, ScalarRoot):  # the other roots have their K numbers in one dimension
            shape[1 + self.root.dim if isinstance(self.root, ClassesElsewhere) else -1] = 1
        signs = torch.randint(2, shape, generator=torch.Generator().manual_seed(begin), dtype=torch.int8, device="cpu")
        return found * (2 * signs - 1).to(found.device, found.dtype)


def _signed(root: OutputRoot | None) -> OutputRoot | None:
    return None if root is None else _Signed(root)


@dataclass(frozen=True)
class _Reshaped:
    """Gives a root's columns the shape of the tensor at which they start."""

    root: OutputRoot
    shape: torch.Size

    @property
    def count(self) -> int:
        return self.root.count

    def columns(self, begin: int, end: int) -> Tensor:
        found = self.root.columns(begin, end)
        return found.reshape(len(found), *self.shape)


def _shape(node: Any, number: int = 0) -> torch.Size:
    return torch.Size(node._input_metadata[number].shape)


class FromColumns(Curvature):
    """Computes H = sum_i sum_c delta_ic delta_ic^T from columns at the network's output."""

    recursive = False

    def columns(  # a method here, None in the base
        self, criterion: nn.Module, loss: Tensor, source: Node | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[GradientEdge, OutputRoot | None]:
        """Returns the edge of the graph where the columns start, and the root that has these columns; None: it is zero."""
        raise NotImplementedError

    def _block(self, record: LayerRecord, above: dict[nn.Linear, Tensor]) -> Tensor:
        if record.block is not None:
            return record.block
        if record.without_columns:
            return empirical_fisher(record)
        # The criterion sees this layer by another way than the columns take, by which it has no curvature.
        n_out = record.layer.out_features
        return record.layer.weight.new_zeros(n_out, n_out)


@dataclass(frozen=True)
class FisherExact(FromColumns):
    """The Fisher blocks E[delta delta^T], in expectation over the model's own labels (Botev et al., Eq. 46 to 48).

    For a categorical likelihood that is the sum over all classes, weighted by their probabilities.

    Raises:
        ValueError: in the forward pass, where the criterion is none of those that `secondorder.criteria.likelihood_root` knows.
    """

    def columns(
        self, criterion: nn.Module, loss: Tensor, source: Node | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[GradientEdge, OutputRoot | None]:
        """Returns the edge of the graph where the columns start, and the root that has these columns; None: it is zero."""
        single = of_difference(criterion, args)
        output = single[0] if single else None
        root, edge = None, None
        if isinstance(output, Tensor) and output.grad_fn is not None:
            root = self._root(criterion, output.detach(), *single[1:], **kwargs)
            drawn = isinstance(root, _Samples) and isinstance(root.root, SampledRoot)  # its gradients are at the output itself
            edge = GradientEdge(output.grad_fn, output.output_nr) if drawn else _columns_edge(criterion, output)
        if root is None or edge is None:
            raise ValueError(
                "expected a criterion that is a likelihood the Fisher matrix's labels can be drawn from, called with the "
                "network's output first, and not in its target: cross-entropy, NLL of log_softmax, MSE of a target of the "
                "output's shape, BCE with logits or of a sigmoid, a secondorder.criteria.CompositeLoss of these"
                f"{self._others}; got {criterion}: use curvature='pch-abs' or 'fisher-empirical', which LayerwiseNewton and EACG "
                "take"
            )
        if isinstance(root, _Samples):
            return edge, _Reshaped(root, _shape(edge.node, edge.output_nr))
        return gauss_newton_root(criterion, loss, source, args, kwargs)  # the same for these, and its rows are the layer's

    _others: ClassVar[str] = ""  # what else it takes

    def _root(self, criterion: nn.Module, output: Tensor, *args: Any, **kwargs: Any) -> OutputRoot | None:
        return likelihood_root(criterion, output, *args, **kwargs)


@dataclass(frozen=True)
class FisherMC(FisherExact):
    """KFAC's Fisher blocks: `FisherExact` by labels sampled from the model, with torch's global generator.

    A criterion of one's own brings its likelihood by a method `sample(output) -> target`, which draws a target for every
    instance: the blocks are then those of the gradients of criterion(output, target, whatever else the call had), for a mean over
    the rows of the output unless the criterion's `reduction` is "sum". Such a method takes precedence over what is known.

    Args:
        samples: how many labels per instance, >= 1; the mean over them is unbiased, its error falls as 1/sqrt(samples).
    """

    samples: int = 1

    def __post_init__(self) -> None:
        if not (is_whole(self.samples) and self.samples >= 1):
            raise ValueError(f"expected samples to be an int >= 1, got {self.samples}")

    _others: ClassVar[str] = ", or one with a method sample(output) -> target"

    def _root(self, criterion: nn.Module, output: Tensor, *args: Any, **kwargs: Any) -> OutputRoot | None:
        root: LikelihoodRoot | SampledRoot | None
        if callable(getattr(criterion, "sample", None)):
            named = {name: value for name, value in kwargs.items() if args or name != "target"}
            root = SampledRoot(criterion, output, args[1:], named)
        else:
            root = likelihood_root(criterion, output, *args, **kwargs)
        return None if root is None else _Samples(root, self.samples)


@dataclass(frozen=True)
class _Samples:
    root: LikelihoodRoot | SampledRoot
    count: int

    def columns(self, begin: int, end: int) -> Tensor:
        return torch.stack([self.root.sample() for _ in range(begin, end)]) / self.count**0.5


@dataclass(frozen=True)
class KFLRCurvature(FromColumns):
    """Exact expected Gauss-Newton blocks (Botev et al., Eq. 23 to 25), of K columns per instance for K outputs.

        H = E[J^T H_out J],

    J the Jacobian of the last linear layer's output z with respect to the layer's, H_out the criterion's Hessian there, or of
    its argument u(z), J_u^T H_u J_u, for a criterion that is convex in u alone: MSE behind a sigmoid, say.

    Raises:
        ValueError: in the forward pass, where an instance's Hessian of the criterion is positive semi-definite neither there nor
            at its argument, or several linear layers enter the criterion and it is not one that `likelihood_root` knows.
    """

    def columns(
        self, criterion: nn.Module, loss: Tensor, source: Node | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[GradientEdge, OutputRoot | None]:
        """Returns the edge of the graph where the columns start, and the root that has these columns; None: it is zero."""
        return gauss_newton_root(criterion, loss, source, args, kwargs)


register("kflr", KFLRCurvature())
register("fisher-mc", FisherMC())
register("fisher-exact", FisherExact())
