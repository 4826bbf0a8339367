"""The bias Hessian of every layer: which curvature a step uses.

A curvature turns the tape's records into {layer: H [n_out, n_out]}, in the dtype of the layer's weight and on the scale of the
loss: for a mean loss H is a mean over the instances, for a sum it is the sum. There are three kinds:

- recursions (`PCH`, `GaussNewton`) start from the criterion's Hessian with respect to the network's output and go backward by
  `ops.bias_hessian`. Where the recursion is not defined (another function than an elementwise one follows the layer, or its
  output is used in several places) the layer starts anew from its empirical Fisher block, and the recursion goes on below it;
- columns (`FisherMC`, `FisherExact`, `KFLR`) take a square root of the output's Hessian back through the graph of the forward
  pass, delta_ic = J_i^T s_ic, and sum delta_ic delta_ic^T. They know no obstacle;
- `FisherEmpirical` needs only the gradients of the backward pass itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from secondorder import activations, ops
from secondorder.activations import Analytic, Probed, cast, rows, widened
from secondorder.criteria import LikelihoodRoot, OutputHessian, OutputRoot, autograd_root, likelihood_root
from secondorder.distributed import Term
from secondorder.linalg import pos_eig
from secondorder.tape import Columns, LayerRecord


class Curvature:
    """What the optimizers ask of a curvature.

    Attributes:
        diagonal: whether the tape must keep the gradients that the recursion's diagonal needs.
        grad_outputs: whether the tape must keep every layer's delta.
        columns: what the tape must take back to every layer, or None (`secondorder.tape.Tape`).
    """

    diagonal = False
    grad_outputs = False
    columns: Columns | None = None

    def bias_hessians(
        self, records: list[LayerRecord], averaged: dict[nn.Linear, dict[str, Tensor]] | None = None
    ) -> dict[nn.Linear, Tensor]:
        """H of every recorded layer, in the dtype of its weight (at least float32).

        The tensors are new: whoever asked for them may write into them.

        Args:
            records: in the recursion's order, as `Tape.records` gives them.
            averaged: every layer's `local` terms by name, averaged over ranks; None: this process is alone.
        """
        hessians: dict[nn.Linear, Tensor] = {}
        for record in records:
            layer = record.layer
            block = self._block(record, hessians) if averaged is None else self._averaged(record, hessians, averaged[layer])
            hessians[layer] = cast(block, record.dtype)
        return hessians

    def local(self, record: LayerRecord) -> list[Term]:
        """What of this process's instances H depends on, to be averaged over ranks."""
        return [Term("block", self._block(record, {}))]

    def _averaged(self, record: LayerRecord, above: dict[nn.Linear, Tensor], terms: dict[str, Tensor]) -> Tensor:
        """H of one layer from the averages of its `local` terms."""
        return terms["block"]

    def _block(self, record: LayerRecord, above: dict[nn.Linear, Tensor]) -> Tensor:
        """H of one layer, given those of the layers after it."""
        raise NotImplementedError


class Recursion(Curvature):
    """Backward recursion of the bias Hessian, with Pos-Eig_gamma where it has a diagonal."""

    gamma: float

    def _top(self, hessian: OutputHessian) -> Tensor:
        """The recursion's start [K, K]."""
        raise NotImplementedError

    def bias_hessians(
        self, records: list[LayerRecord], averaged: dict[nn.Linear, dict[str, Tensor]] | None = None
    ) -> dict[nn.Linear, Tensor]:
        """See `Curvature`. Consecutive layers with known activations between them take one call of an operator."""
        if averaged is not None:
            return super().bias_hessians(records, averaged)
        hessians: dict[nn.Linear, Tensor] = {}
        chain: list[tuple[LayerRecord, LayerRecord, Analytic]] = []  # a layer, the one after it, what lies between

        def descend() -> None:
            if chain:
                below = self._descend(hessians[chain[0][1].layer], chain)
                for (record, _, _), h in zip(chain, below, strict=True):
                    hessians[record.layer] = cast(h, record.dtype)
                chain.clear()

        for record in records:
            following = record.next
            # A step is computed in the dtype of the layer whose H it starts from, and a chain in that of its first step.
            if chain and (following is not chain[-1][0] or following.dtype != chain[0][1].dtype or _is_copied(record)):
                descend()
            if following is None:
                block = self._top(self._output_hessian(record)) if record.losses else empirical_fisher(record)
            else:
                transfer = record.transfer()
                if isinstance(transfer, Analytic):
                    chain.append((record, following, transfer))
                    continue
                block = self._step(record, following, transfer, hessians[following.layer])
            hessians[record.layer] = cast(block, record.dtype)
        descend()
        return hessians

    def _descend(self, top: Tensor, chain: list[tuple[LayerRecord, LayerRecord, Analytic]]) -> list[Tensor]:
        """H of layers each of which follows the next one, from `top`, that of the layer after the first."""
        return ops.bias_hessian_chain(
            top,
            [cast(following.weight.detach(), top.dtype) for _, following, _ in chain],
            [cast(transfer.saved, top.dtype) for _, _, transfer in chain],
            [transfer.activation for _, _, transfer in chain],
            [transfer.parameter for _, _, transfer in chain],
            [self._grad_activation(record, top.dtype) for record, _, _ in chain],
            self.gamma,
        )

    def _step(self, record: LayerRecord, following: LayerRecord, transfer: Probed, hessian: Tensor) -> Tensor:
        """H of a layer from that of the one after it, with any function between them."""
        dtype = hessian.dtype
        grad = None if transfer.d2 is None else self._grad_activation(record, dtype)
        d2 = None if transfer.d2 is None or grad is None else cast(transfer.d2, dtype)
        return ops.bias_hessian(hessian, cast(following.weight.detach(), dtype), cast(transfer.d1, dtype), d2, grad, self.gamma)

    def _grad_activation(self, record: LayerRecord, dtype: torch.dtype) -> Tensor | None:
        grad = record.grad_activation() if self.diagonal else None
        return None if grad is None else cast(grad, dtype)

    def local(self, record: LayerRecord) -> list[Term]:
        """See `Curvature`."""
        if record.losses:
            top = self._output_hessian(record)
            values = torch.diag(top.values) if top.values.dim() == 1 else top.values
            return [Term("output Hessian", values), Term("convex", values.new_full((), float(top.convex)))]
        if record.next is None:
            return [Term("block", empirical_fisher(record))]
        dtype = record.dtype
        d1, d2 = (None if d is None else d.to(dtype) for d in activations.derivatives(record.transfer()))
        assert d1 is not None
        one = d1.new_ones(1, 1)
        # The recursion's own step from H = W = 1 is E[d1 d1^T].
        moment = ops.bias_hessian(one, one.expand(1, d1.shape[1]), d1, None, None, 0.0)
        grad = record.grad_activation() if self.diagonal else None
        diagonal = d1.new_zeros(d1.shape[1]) if d2 is None or grad is None else (d2 * grad.to(dtype)).sum(0)
        return [Term("E[d1 d1^T]", moment, len(d1)), Term("diagonal", diagonal)]

    def _averaged(self, record: LayerRecord, above: dict[nn.Linear, Tensor], terms: dict[str, Tensor]) -> Tensor:
        if record.losses:
            return self._top(OutputHessian(terms["output Hessian"], bool(terms["convex"] == 1)))
        if record.next is None:
            return terms["block"]
        hessian = above[record.next.layer]
        weight = record.next.weight.detach().to(hessian.dtype)
        product = weight.T @ hessian @ weight
        return (product + product.T) / 2 * terms["E[d1 d1^T]"] + torch.diag(pos_eig(terms["diagonal"], self.gamma))

    def _output_hessian(self, record: LayerRecord) -> OutputHessian:
        # The loss of each micro-batch enters backward() with a factor of its own, and so does its Hessian.
        total, convex = None, True
        for loss in record.losses:
            assert loss.hessian is not None and loss.scale is not None
            values, scale = loss.hessian.values, float(loss.scale)
            if scale != 1:
                values = values * scale
            total = values if total is None else _dense_sum(total, values)
            # A negative factor, as for a loss that is maximised, turns a convex criterion into a concave one.
            convex = convex and loss.hessian.convex and scale >= 0
        assert total is not None
        return OutputHessian(total, convex)


@dataclass(frozen=True)
class PCH(Recursion):
    """The positive-curvature Hessian (Chen et al., Eq. 8): gamma = -1 is PCH-1, gamma = 0 is PCH-2."""

    gamma: float
    diagonal = True

    def __post_init__(self) -> None:
        if not self.gamma <= 0:
            raise ValueError(f"expected gamma <= 0 (-1: PCH-1, 0: PCH-2), got {self.gamma}")

    def _top(self, hessian: OutputHessian) -> Tensor:
        return hessian.positive(self.gamma)


@dataclass(frozen=True)
class GaussNewton(Recursion):
    """KFRA's approximate expected Gauss-Newton blocks (Botev et al., Eq. 26): PCH's recursion without the diagonal.

    Raises:
        ValueError: from `bias_hessians`, where the criterion's Hessian is not positive semi-definite.
    """

    gamma = 0.0

    def _top(self, hessian: OutputHessian) -> Tensor:
        return hessian.semidefinite()


class FromColumns(Curvature):
    """H = sum_i sum_c delta_ic delta_ic^T of columns at the network's output."""

    def columns(  # a method here, None in the base
        self, criterion: nn.Module, loss: Tensor, source: Node | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[GradientEdge, OutputRoot]:
        """Where the columns start, and a root of which they are the columns."""
        raise NotImplementedError

    def _block(self, record: LayerRecord, above: dict[nn.Linear, Tensor]) -> Tensor:
        # A layer that the criterion sees by another way than the columns': they say that it has no curvature.
        n_out = record.layer.out_features
        return record.layer.weight.new_zeros(n_out, n_out) if record.block is None else record.block


class FisherExact(FromColumns):
    """The Fisher blocks E[delta delta^T], in expectation over the model's own labels (Botev et al., Eq. 46 to 48).

    For a categorical likelihood that is the sum over all classes, weighted by their probabilities.

    Raises:
        ValueError: in the forward pass, where the criterion is none of those that `secondorder.criteria.likelihood_root` knows.
    """

    def columns(
        self, criterion: nn.Module, loss: Tensor, source: Node | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[GradientEdge, OutputRoot]:
        """See `FromColumns`."""
        output = args[0] if args else None
        root = None
        if isinstance(output, Tensor) and output.grad_fn is not None:
            root = likelihood_root(criterion, output.detach(), *args[1:], **kwargs)
        if root is None:
            raise ValueError(
                "expected a criterion that is a likelihood the Fisher matrix's labels can be drawn from, called with the "
                f"network's output first: cross-entropy, MSE or BCE with logits; got {criterion}: use curvature='pch-abs' or "
                "'fisher-empirical'"
            )
        assert isinstance(output, Tensor)
        assert output.grad_fn is not None
        return GradientEdge(output.grad_fn, output.output_nr), self._labels(root)

    def _labels(self, root: LikelihoodRoot) -> OutputRoot:
        return root


@dataclass(frozen=True)
class FisherMC(FisherExact):
    """KFAC's Fisher blocks: `FisherExact` by labels sampled from the model, with torch's global generator.

    Args:
        samples: how many labels per instance, >= 1; the mean over them is unbiased, its error falls as 1/sqrt(samples).
    """

    samples: int = 1

    def __post_init__(self) -> None:
        if not self.samples >= 1:
            raise ValueError(f"expected samples >= 1, got {self.samples}")

    def _labels(self, root: LikelihoodRoot) -> OutputRoot:
        return _Samples(root, self.samples)


@dataclass(frozen=True)
class _Samples:
    root: LikelihoodRoot
    count: int

    def columns(self, begin: int, end: int) -> Tensor:
        return torch.stack([self.root.sample() for _ in range(begin, end)]) / self.count**0.5


class KFLR(FromColumns):
    """Exact expected Gauss-Newton blocks (Botev et al., Eq. 23 to 25), of K columns per instance for K outputs.

    Raises:
        ValueError: in the forward pass, where an instance's Hessian of the criterion is not positive semi-definite, or several
            linear layers enter the criterion and it is not one that `likelihood_root` knows.
    """

    def columns(
        self, criterion: nn.Module, loss: Tensor, source: Node | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[GradientEdge, OutputRoot]:
        """See `FromColumns`."""
        output = args[0] if args else None
        if isinstance(output, Tensor) and output.grad_fn is not None and (source is None or output.grad_fn is source):
            root = likelihood_root(criterion, output.detach(), *args[1:], **kwargs)
            if root is not None:
                return GradientEdge(output.grad_fn, output.output_nr), root
        if source is None:
            raise ValueError(f"expected one linear layer's output to enter {criterion}, got several; use curvature='pch-abs'")
        return GradientEdge(source, 0), autograd_root(loss, source)


class FisherEmpirical(Curvature):
    """The empirical Fisher blocks E[delta delta^T] of the true labels' gradients; `empirical_fisher` gives the scale."""

    grad_outputs = True

    def _block(self, record: LayerRecord, above: dict[nn.Linear, Tensor]) -> Tensor:
        return empirical_fisher(record)


def empirical_fisher(record: LayerRecord) -> Tensor:
    """The outer products of the instances' own gradients, reduced as the criterion does: m sum_i delta_i delta_i^T for a mean.

    m is how many the mean is of: a layer whose rows (tokens, say) are pooled later has more, and each is summed on its own.

    On the scale of what backward() was called on: a factor on the loss is a factor on the block.
    """
    total: Tensor | None = None
    for gradient, loss in record.grad_outputs():
        m = gradient.shape[:-1].numel()
        delta = widened(rows([gradient], record.samples))
        assert loss.scale is not None
        # delta_i is scale / instances times the instance's own gradient; for a sum, scale times it. A sample stands for all m
        # rows, and a negative scale maximises.
        instances = m if loss.instances is None else loss.instances
        block = (delta.T @ delta) * ((m / len(delta) if m else 1) * (instances if loss.mean else 1) / loss.scale.abs())
        total = block if total is None else total + block
    if total is None:  # no backward pass has come so far: backward(inputs=...) may stop anywhere
        n_out = record.layer.out_features
        total = record.weight.new_zeros(n_out, n_out, dtype=record.dtype)
    return total


def _is_copied(record: LayerRecord) -> bool:
    """Whether the operands of the recursion's step to this layer are copies of what was recorded, joined or cast.

    Such a step is taken alone, so that there are one layer's copies at a time.
    """
    first = record.links[0].transfer
    return len(record.links) > 1 or not isinstance(first, Analytic) or first.saved.dtype != record.dtype


def _dense_sum(x: Tensor, y: Tensor) -> Tensor:
    if x.dim() != y.dim():
        x, y = (torch.diag(v) if v.dim() == 1 else v for v in (x, y))
    return x + y


CURVATURES: dict[str, Curvature] = {
    "pch-abs": PCH(-1.0),
    "pch-clip": PCH(0.0),
    "gauss-newton": GaussNewton(),
    "kflr": KFLR(),
    "fisher-mc": FisherMC(),
    "fisher-empirical": FisherEmpirical(),
    "fisher-exact": FisherExact(),
}


def curvature_by_name(name: str | Curvature) -> Curvature:
    """The curvature of this name, or the one given."""
    if isinstance(name, Curvature):
        return name
    if name not in CURVATURES:
        raise ValueError(f"expected curvature to be one of {', '.join(map(repr, CURVATURES))}, got {name!r}")
    return CURVATURES[name]
