"""Bias Hessians by backward recursion: the positive-curvature Hessian (PCH) and KFRA's Gauss-Newton blocks.

Recursions start from the criterion's Hessian with respect to the network's output and go backward by `ops.bias_hessian`. Where
the recursion is not defined (another function than an elementwise one follows the layer, or its output is used in several
places) the layer starts anew from its empirical Fisher block, and the recursion goes on below it.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from secondorder import ops
from secondorder._distributed import RankTerm
from secondorder._tape import AutogradMap, KnownActivation, LayerRecord, derivatives
from secondorder._tensors import cast, host_numbers, refuse_capture
from secondorder.criteria import OutputHessian, autograd_hessian
from secondorder.criteria.known import is_convex
from secondorder.curvature.base import Curvature, convex_argument, register
from secondorder.curvature.columns import convex_at
from secondorder.curvature.empirical import empirical_fisher
from secondorder.linalg import pos_eig


class Recursion(Curvature):
    """Backward recursion of the bias Hessian, with Pos-Eig_gamma where it has a diagonal."""

    gamma: float
    restarts = True

    def _top(self, hessian: OutputHessian) -> Tensor:
        """Returns the recursion's start [K, K]."""
        raise NotImplementedError

    def bias_hessians(
        self, records: list[LayerRecord], averaged: dict[nn.Linear, dict[str, Tensor]] | None = None
    ) -> dict[nn.Linear, Tensor]:
        """Returns H of every recorded layer; one operator call serves consecutive layers with known activations between them."""
        if averaged is not None:
            return super().bias_hessians(records, averaged)
        hessians: dict[nn.Linear, Tensor] = {}
        chain: list[tuple[LayerRecord, LayerRecord, KnownActivation]] = []  # a layer, the one after it, what lies between

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
                between = record.map()
                if isinstance(between, KnownActivation):
                    chain.append((record, following, between))
                    continue
                block = self._step(record, following, between, hessians[following.layer])
            hessians[record.layer] = cast(block, record.dtype)
        descend()
        return hessians

    def _descend(self, top: Tensor, chain: list[tuple[LayerRecord, LayerRecord, KnownActivation]]) -> list[Tensor]:
        """Returns H of layers each of which follows the next one, from `top`, that of the layer after the first."""
        return ops.bias_hessian_chain(
            top,
            [cast(following.weight.detach(), top.dtype) for _, following, _ in chain],
            [cast(between.saved, top.dtype) for _, _, between in chain],
            [between.activation for _, _, between in chain],
            [between.parameter for _, _, between in chain],
            [self._grad_activation(record, top.dtype) for record, _, _ in chain],
            self.gamma,
        )

    def _step(self, record: LayerRecord, following: LayerRecord, between: AutogradMap, hessian: Tensor) -> Tensor:
        """Returns H of a layer from that of the one after it, with any function between them."""
        dtype = hessian.dtype
        grad = None if between.d2 is None else self._grad_activation(record, dtype)
        d2 = None if between.d2 is None or grad is None else cast(between.d2, dtype)
        return ops.bias_hessian(hessian, cast(following.weight.detach(), dtype), cast(between.d1, dtype), d2, grad, self.gamma)

    def _grad_activation(self, record: LayerRecord, dtype: torch.dtype) -> Tensor | None:
        grad = record.grad_activation() if self.diagonal else None
        return None if grad is None else cast(grad, dtype)

    def local(self, record: LayerRecord) -> list[RankTerm]:
        """Returns what of this process's instances H depends on, to be averaged over ranks."""
        if record.losses:
            top = self._output_hessian(record).scaled()
            values = torch.diag(top.values) if top.values.dim() == 1 else top.values
            return [RankTerm("output Hessian", values), RankTerm("convex", values.new_full((), float(top.convex)))]
        if record.next is None:
            return [RankTerm("block", empirical_fisher(record))]
        dtype = record.dtype
        d1, d2 = (None if d is None else d.to(dtype) for d in derivatives(record.map()))
        assert d1 is not None
        if not len(d1):  # instances of other ranks alone
            d1, d2 = d1.new_zeros(1, d1.shape[1]), None
        one = d1.new_ones(1, 1)
        # The recursion's own step from H = W = 1 is E[d1 d1^T].
        moment = ops.bias_hessian(one, one.expand(1, d1.shape[1]), d1, None, None, 0.0)
        grad = record.grad_activation() if self.diagonal else None
        diagonal = d1.new_zeros(d1.shape[1]) if d2 is None or grad is None else (d2 * grad.to(dtype)).sum(0)
        return [RankTerm("E[d1 d1^T]", moment, record.counted), RankTerm("diagonal", diagonal)]

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
        """Returns the Hessian of all losses of a layer's output, each with its factor."""
        # The loss of each micro-batch enters backward() with a factor of its own, and so does its Hessian.
        found = []
        for loss in record.losses:
            assert loss.hessian is not None and loss.scale is not None
            found.append(OutputHessian(loss.hessian.values, loss.hessian.convex, loss.scale.reshape(())))
        if len(found) == 1:
            return found[0]
        refuse_capture("second loss of one output")
        scales = host_numbers([loss.scale for loss in record.losses if loss.scale is not None])
        total = functools.reduce(_dense_sum, [each.values * scale for each, scale in zip(found, scales, strict=True)])
        return OutputHessian(total, all(each.convex for each in found) and min(scales) >= 0)


@dataclass(frozen=True)
class PCH(Recursion):
    """The positive-curvature Hessian (Chen et al., Eq. 8).

        H^k     = PosEig(E[d^2 xi / dz^2])                                              of the last layer, Eq. 8a
        H^{t-1} = (W^T H^t W) * E[d1 d1^T] + diag(PosEig(sum_i d2_i * (delta_i W)))     of the layers below, Eq. 8b

    z is the network's output, d1 and d2 the derivatives of the activation, delta_i W the gradient of the loss with respect to the
    layer's input, and * elementwise.

    A negative eigenvalue l of the criterion's Hessian (Eq. 8a) becomes gamma_output l, a negative entry l of the recursion's
    diagonal (Eq. 8b) gamma l: -1 takes absolute values, 0 clips. PCH-1 is PCH(-1); the paper's PCH-2 is PCH(0, -1), since its
    Tables 4 and 5 are those of absolute values in Eq. 8a.

    Args:
        gamma: of Eq. 8b, <= 0.
        gamma_output: of Eq. 8a, <= 0; None: as gamma.

    Raises:
        ValueError: one of them is positive.
    """

    gamma: float
    gamma_output: float | None = None
    diagonal = True
    capturable = True

    def __post_init__(self) -> None:
        for name, value in (("gamma", self.gamma), ("gamma_output", self.gamma_output)):
            if value is not None and not value <= 0:
                raise ValueError(f"expected {name} <= 0 (-1: absolute values, 0: clipping), got {value}")

    def _top(self, hessian: OutputHessian) -> Tensor:
        return hessian.positive(self.gamma if self.gamma_output is None else self.gamma_output)


@dataclass(frozen=True)
class GaussNewton(Recursion):
    """KFRA's approximate expected Gauss-Newton blocks (Botev et al., Eq. 26): PCH's recursion without the diagonal.

        H^k = E[d^2 xi / dz^2]  of the last layer,     H^{t-1} = (W^T H^t W) * E[d1 d1^T]  of the layers below,

    z the last layer's output, d1 the derivative of the activation, and * elementwise. Where the criterion is convex in a function
    u(z) of it alone, as MSE is behind a sigmoid, H^k = E[J^T (d^2 xi / du^2) J] with J = du/dz.

    Raises:
        ValueError: from `bias_hessians`, where the criterion's Hessian is not positive semi-definite.
    """

    gamma = 0.0

    def output_hessian(  # a method here, None in the base
        self, criterion: nn.Module, loss: Tensor, source: Node, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> OutputHessian:
        """Returns H^k on the scale of the loss."""
        inner = convex_argument(source, args)
        if convex_at(criterion, source, args):
            return OutputHessian(autograd_hessian(loss, source).values, convex=True)
        if inner is None:
            return autograd_hessian(loss, source)
        if is_convex(criterion):
            found = autograd_hessian(loss, source, inner)
            return OutputHessian(found.values, convex=True)
        hessian = autograd_hessian(loss, source)
        return hessian if hessian.is_semidefinite() else autograd_hessian(loss, source, inner)

    def _top(self, hessian: OutputHessian) -> Tensor:
        return hessian.semidefinite()


def _is_copied(record: LayerRecord) -> bool:
    """Tells whether the operands of the recursion's step to this layer are copies of what was recorded: joined, cast or weighted.

    Such a step is taken alone, so that there are one layer's copies at a time.
    """
    first = record.links[0].map
    return len(record.links) > 1 or not isinstance(first, KnownActivation) or first.saved.dtype != record.dtype or record.weighted


def _dense_sum(x: Tensor, y: Tensor) -> Tensor:
    """Adds Hessians, each of them whole or a diagonal."""
    if x.dim() != y.dim():
        x, y = (torch.diag(v) if v.dim() == 1 else v for v in (x, y))
    return x + y


register("pch-abs", PCH(-1.0))
register("pch-clip", PCH(0.0, gamma_output=-1.0))
register("pch-clip-all", PCH(0.0))
register("gauss-newton", GaussNewton())
