"""The bias Hessian of every layer: which curvature a step uses.

A curvature turns the tape's records into {layer: H [n_out, n_out]}. All start from the criterion's Hessian with respect to the
network's output and go backward by `ops.bias_hessian`; they differ in the diagonal term and in Pos-Eig.

Where the recursion is not defined (another function than an elementwise one follows the layer, or its output is used in several
places) the layer starts anew from its empirical Fisher block, and the recursion goes on below it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secondorder import ops
from secondorder.activations import Analytic
from secondorder.tape import LayerRecord


@dataclass(frozen=True)
class PCH:
    """The positive-curvature Hessian (Chen et al., Eq. 8): gamma = -1 is PCH-1, gamma = 0 is PCH-2."""

    gamma: float
    diagonal = True  # the recursion's diagonal term is wanted

    def __post_init__(self) -> None:
        if not self.gamma <= 0:
            raise ValueError(f"expected gamma <= 0 (-1: PCH-1, 0: PCH-2), got {self.gamma}")

    def bias_hessians(self, records: list[LayerRecord]) -> dict[nn.Linear, Tensor]:
        """H of every recorded layer, in the dtype of its weight (at least float32).

        Args:
            records: in the recursion's order, as `Tape.records` gives them.
        """
        hessians: dict[nn.Linear, Tensor] = {}
        for record in records:
            dtype = torch.promote_types(record.layer.weight.dtype, torch.float32)
            if record.losses:
                hessians[record.layer] = self._from_losses(record).to(dtype)
            elif record.next is None:
                hessians[record.layer] = empirical_fisher(record).to(dtype)
            else:
                hessians[record.layer] = self._step(record, hessians[record.next.layer], record.next.layer.weight.detach())
        return hessians

    def _from_losses(self, record: LayerRecord) -> Tensor:
        # The loss of each micro-batch enters backward() with a factor of its own, and so does its Hessian.
        total = None
        for loss in record.losses:
            assert loss.hessian is not None and loss.scale is not None
            hessian = loss.hessian
            values = hessian.values * loss.scale
            total = values if total is None else _dense_sum(total, values)
        assert total is not None
        convex = all(loss.hessian is not None and loss.hessian.convex for loss in record.losses)
        return type(hessian)(total, convex).positive(self.gamma)

    def _step(self, record: LayerRecord, hessian: Tensor, weight: Tensor) -> Tensor:
        dtype = hessian.dtype
        transfer = record.transfer()
        grad = record.grad_activation() if self.diagonal else None
        if grad is not None:
            grad = grad.to(dtype)
        if isinstance(transfer, Analytic):
            return ops.bias_hessian_activation(
                hessian,
                weight.to(dtype),
                transfer.saved.to(dtype),
                transfer.activation,
                transfer.parameter,
                grad,
                self.gamma,
            )
        d2 = None if transfer.d2 is None or grad is None else transfer.d2.to(dtype)
        return ops.bias_hessian(
            hessian, weight.to(dtype), transfer.d1.to(dtype), d2, grad if d2 is not None else None, self.gamma
        )


def empirical_fisher(record: LayerRecord) -> Tensor:
    """M sum_i delta_i delta_i^T with delta_i the gradient of the mean loss: E of the instances' own gradients' outer products."""
    delta = record.grad_output()
    return len(delta) * (delta.T @ delta)


def _dense_sum(x: Tensor, y: Tensor) -> Tensor:
    if x.dim() != y.dim():
        x, y = (torch.diag(v) if v.dim() == 1 else v for v in (x, y))
    return x + y


CURVATURES = {"pch-abs": PCH(-1.0), "pch-clip": PCH(0.0)}


def curvature_by_name(name: str | PCH) -> PCH:
    """The curvature of this name, or the one given."""
    if isinstance(name, PCH):
        return name
    if name not in CURVATURES:
        raise ValueError(f"expected curvature to be one of {', '.join(map(repr, CURVATURES))}, got {name!r}")
    return CURVATURES[name]
