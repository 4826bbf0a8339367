"""What a curvature is, and the names by which optimizers take one."""

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from secondorder._distributed import RankTerm
from secondorder._tape import Columns, LayerRecord, OutputHessianOf, TapeOptions, is_affine
from secondorder._tensors import cast
from secondorder.criteria.known import is_fixed


class Curvature:
    """Gives every linear layer its bias Hessian H [n_out, n_out], from the records of the tape.

    The attributes say what the tape has to keep for it. A subclass defines `_block`, or `bias_hessians` if layers depend on one
    another.

    Attributes:
        diagonal: whether the tape keeps the gradients that the recursion's diagonal needs.
        grad_outputs: whether the tape keeps every layer's delta = dL/dz.
        columns: a function of the criterion, the loss, the node of the layer whose output the criterion sees (None if there are
            several), and the criterion's arguments. It returns an edge of the graph and a root of the criterion's Hessian there,
            whose columns the tape takes back to every layer. None: no columns.
        output_hessian: a function of the same arguments that returns the start of the recursion, if that is not the criterion's
            Hessian; it is called if no formula gives the Hessian at the last layer's output itself. None: the Hessian.
        recursive: whether the tape needs the criterion's Hessian and the derivatives of what lies between layers. Double backward
            computes them if no formula does.
        restarts: whether the recursion starts anew, from the empirical Fisher block, at a layer through which it cannot go.
        capturable: whether a CUDA graph may capture it, since it reads no number of the device.
    """

    diagonal = False
    grad_outputs = False
    columns: Columns | None = None
    output_hessian: OutputHessianOf | None = None
    recursive = True
    restarts = False
    capturable = False

    def tape_options(self, **others: Any) -> TapeOptions:
        """Returns what the tape has to keep for it.

        Args:
            **others: the other fields of `TapeOptions`.
        """
        return TapeOptions(
            diagonal=self.diagonal, grad_outputs=self.grad_outputs, columns=self.columns, recursive=self.recursive,
            output_hessian=self.output_hessian, **others,
        )  # fmt: skip

    def bias_hessians(
        self, records: list[LayerRecord], averaged: dict[nn.Linear, dict[str, Tensor]] | None = None
    ) -> dict[nn.Linear, Tensor]:
        """Returns H of every recorded layer, in the dtype of its weight (at least float32).

        The tensors are new: the caller may write into them.

        Args:
            records: in the recursion's order, as `Tape.records` gives them.
            averaged: every layer's `local` terms by name, averaged over ranks; None: this process is alone.

        Returns:
            `{layer: H [n_out, n_out]}`, on the scale of the loss: a mean over the instances for a mean, a sum for a sum.
        """
        hessians: dict[nn.Linear, Tensor] = {}
        for record in records:
            layer = record.layer
            block = self._block(record, hessians) if averaged is None else self._averaged(record, hessians, averaged[layer])
            hessians[layer] = cast(block, record.dtype)
        return hessians

    def local(self, record: LayerRecord) -> list[RankTerm]:
        """Returns what H needs of this process's instances, to be averaged over ranks.

        Args:
            record: what the tape keeps of a layer.

        Returns:
            Terms (name, value, instances). A value that is a mean over instances is averaged with the ranks' numbers of instances
            as weights; with None every rank counts alike. Here the only term is H itself.
        """
        return [RankTerm("block", self._block(record, {}))]

    def _averaged(self, record: LayerRecord, above: dict[nn.Linear, Tensor], terms: dict[str, Tensor]) -> Tensor:
        """Returns H of one layer from the averages of its `local` terms."""
        return terms["block"]

    def _block(self, record: LayerRecord, above: dict[nn.Linear, Tensor]) -> Tensor:
        """Returns H of one layer, given the bias Hessians of the layers after it."""
        raise NotImplementedError


CURVATURES: dict[str, Curvature] = {}


def register(name: str, curvature: Curvature) -> None:
    """Makes a curvature known to optimizers by a name.

    Args:
        name: what an optimizer's `curvature` may then be.
        curvature: the object that serves all optimizers.

    Raises:
        ValueError: the name is taken.
    """
    if name in CURVATURES:
        raise ValueError(f"expected a name that no curvature has yet, got {name!r}")
    CURVATURES[name] = curvature


def curvature_by_name(name: str | Curvature) -> Curvature:
    """Returns the curvature of this name, or the one given.

    Args:
        name: one of `CURVATURES`, or a `Curvature`.

    Raises:
        ValueError: there is none of this name.
    """
    if isinstance(name, Curvature):
        return name
    if not isinstance(name, str) or name not in CURVATURES:
        raise ValueError(f"expected curvature to be one of {', '.join(map(repr, CURVATURES))}, or a Curvature, got {name!r}")
    return CURVATURES[name]


def convex_argument(source: Node, args: tuple[Any, ...]) -> GradientEdge | None:
    """Returns the edge of a criterion's first argument, if that is a function of the last layer's output that is not affine.

    None where its target is trained, too.

    Args:
        source: the node of that output.
        args: the criterion's.
    """
    node = args[0].grad_fn if args and isinstance(args[0], Tensor) else None
    if node is None or not is_fixed(args[1:]):
        return None
    edge = GradientEdge(node, args[0].output_nr)
    return None if is_affine(edge, source) else edge
