"""What a curvature is, and the names by which optimizers take one."""

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from secondorder._distributed import RankTerm
from secondorder._tape import Columns, LayerRecord, OutputHessianOf, is_affine
from secondorder._tensors import cast


class Curvature:
    """What the optimizers ask of a curvature.

    Attributes:
        diagonal: whether the tape must keep the gradients that the recursion's diagonal needs.
        grad_outputs: whether the tape must keep every layer's delta.
        columns: what the tape must take back to every layer, or None. A function of the criterion, the loss, the node of the one
            layer that the criterion sees (else None), and the criterion's arguments; it returns the edge of the graph
            where columns start, and a root whose columns they are.
        output_hessian: where the recursion starts, if not from the criterion's Hessian: a function of the same arguments; asked
            where no formula gives that Hessian of the last layer's output itself.
        recursive: whether the tape must know the criterion's Hessian and what stands between layers, both by double backward
            where no formula gives them.
        restarts: whether a layer behind an obstacle starts anew from its empirical Fisher block.
    """

    diagonal = False
    grad_outputs = False
    columns: Columns | None = None
    output_hessian: OutputHessianOf | None = None
    recursive = True
    restarts = False

    def bias_hessians(
        self, records: list[LayerRecord], averaged: dict[nn.Linear, dict[str, Tensor]] | None = None
    ) -> dict[nn.Linear, Tensor]:
        """H of every recorded layer, in the dtype of its weight (at least float32).

        The tensors are new: whoever asked for them may write into them.

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
        """What of this process's instances H depends on, to be averaged over ranks.

        Args:
            record: what the tape keeps of a layer.

        Returns:
            Terms (name, value, instances): a value that is the mean of so many instances is averaged with their numbers as
            weights; with None every rank counts alike. Here H itself.
        """
        return [RankTerm("block", self._block(record, {}))]

    def _averaged(self, record: LayerRecord, above: dict[nn.Linear, Tensor], terms: dict[str, Tensor]) -> Tensor:
        """H of one layer from the averages of its `local` terms."""
        return terms["block"]

    def _block(self, record: LayerRecord, above: dict[nn.Linear, Tensor]) -> Tensor:
        """H of one layer, given those of the layers after it."""
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
    """The curvature of this name, or the one given.

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
    """Where a criterion's first argument stands in the graph, if it is a function of the last layer's output that is not affine.

    Args:
        source: the node of that output.
        args: the criterion's.
    """
    node = args[0].grad_fn if args and isinstance(args[0], Tensor) else None
    if node is None:
        return None
    edge = GradientEdge(node, args[0].output_nr)
    return None if is_affine(edge, source) else edge
