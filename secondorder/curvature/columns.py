"""Bias Hessians from columns: a square root of the output's Hessian, taken back through the graph of the forward pass.

The columns s_ic give delta_ic = J_i^T s_ic at every layer, and H = sum_i sum_c delta_ic delta_ic^T. They know no obstacle.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from secondorder._tape import LayerRecord
from secondorder.criteria import (
    CompositeLoss,
    LikelihoodRoot,
    OutputRoot,
    SampledRoot,
    autograd_root,
    likelihood_root,
    takes_log_probabilities,
)
from secondorder.curvature.base import Curvature, register


def logits_edge(criterion: nn.Module, output: Tensor) -> GradientEdge | None:
    """Where the tensor that a likelihood's root is taken at stands in the graph; None: it is not there.

    For the negative log-likelihood of log-probabilities that is what log_softmax was taken of, which is them but for a constant.
    """
    node = output.grad_fn
    assert node is not None
    if not takes_log_probabilities(criterion):
        return GradientEdge(node, output.output_nr)
    if not node.name().startswith("LogSoftmaxBackward"):
        return None
    before, number = node.next_functions[0]
    return None if before is None else GradientEdge(before, number)


class FromColumns(Curvature):
    """H = sum_i sum_c delta_ic delta_ic^T of columns at the network's output."""

    recursive = False

    def columns(  # a method here, None in the base
        self, criterion: nn.Module, loss: Tensor, source: Node | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[GradientEdge, OutputRoot]:
        """Where the columns start, and a root of which they are the columns."""
        raise NotImplementedError

    def _block(self, record: LayerRecord, above: dict[nn.Linear, Tensor]) -> Tensor:
        # No block: the criterion sees this layer by another way than the columns take, by which it has no curvature.
        n_out = record.layer.out_features
        return record.layer.weight.new_zeros(n_out, n_out) if record.block is None else record.block


@dataclass(frozen=True)
class FisherExact(FromColumns):
    """The Fisher blocks E[delta delta^T], in expectation over the model's own labels (Botev et al., Eq. 46 to 48).

    For a categorical likelihood that is the sum over all classes, weighted by their probabilities.

    Raises:
        ValueError: in the forward pass, where the criterion is none of those that `secondorder.criteria.likelihood_root` knows.
    """

    def columns(
        self, criterion: nn.Module, loss: Tensor, source: Node | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[GradientEdge, OutputRoot]:
        """Where the columns start, and a root of which they are the columns."""
        output = args[0] if args else None
        root, edge = None, None
        if isinstance(output, Tensor) and output.grad_fn is not None:
            root = self._root(criterion, output.detach(), *args[1:], **kwargs)
            sampled = isinstance(root, _Samples) and isinstance(root.root, SampledRoot)  # its gradients are at the output itself
            edge = GradientEdge(output.grad_fn, output.output_nr) if sampled else logits_edge(criterion, output)
        if root is None or edge is None:
            raise ValueError(
                "expected a criterion that is a likelihood the Fisher matrix's labels can be drawn from, called with the "
                "network's output first: cross-entropy, NLL of log_softmax, MSE or BCE with logits, a "
                f"secondorder.criteria.CompositeLoss of these{self._others}; got {criterion}: use curvature='pch-abs' or "
                "'fisher-empirical'"
            )
        return edge, root

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
        if not self.samples >= 1:
            raise ValueError(f"expected samples >= 1, got {self.samples}")

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

    J the Jacobian of the network's output with respect to the layer's, H_out the criterion's Hessian.

    Raises:
        ValueError: in the forward pass, where an instance's Hessian of the criterion is not positive semi-definite, or several
            linear layers enter the criterion and it is not one that `likelihood_root` knows.
    """

    def columns(
        self, criterion: nn.Module, loss: Tensor, source: Node | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[GradientEdge, OutputRoot]:
        """Where the columns start, and a root of which they are the columns."""
        output = args[0] if args else None
        if isinstance(output, Tensor) and output.grad_fn is not None:
            root, edge = likelihood_root(criterion, output.detach(), *args[1:], **kwargs), logits_edge(criterion, output)
            convex = isinstance(criterion, CompositeLoss)  # at its inner value alone: the Hessian at the source may not be
            if root is not None and edge is not None and (source is None or edge.node is source or convex):
                return edge, root
        if source is None:
            raise ValueError(f"expected one linear layer's output to enter {criterion}, got several; use curvature='pch-abs'")
        return GradientEdge(source, 0), autograd_root(loss, source)


register("kflr", KFLRCurvature())
register("fisher-mc", FisherMC())
register("fisher-exact", FisherExact())
