"""The Hessian of any criterion with respect to a tensor of the graph, by double backward."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from secondorder._tensors import irregular
from secondorder.criteria.hessians import OutputHessian, check_semidefinite, symmetrized
from secondorder.criteria.roots import DenseRoot, GaussianRoot, OutputRoot
from secondorder.errors import second_derivatives


def autograd_hessian(loss: Tensor, source: Node) -> OutputHessian:
    """H = sum_i d^2 L / dz_i dz_i^T [K, K] of any scalar loss L, by double backward.

    Needs K backward passes through the criterion, or two where it acts on every element of z on its own. Instances must not
    be coupled by the criterion; a coupling enters as if it stood within the instances.

    Args:
        loss: L, a scalar with its graph.
        source: the node of the graph whose tensor is z [..., K].
    """
    diagonal, rows = _rows_of(loss, source)
    k = diagonal.shape[-1]
    if rows is None:
        return OutputHessian(diagonal.reshape(-1, k).sum(0), convex=not bool(diagonal.any()))
    return OutputHessian(torch.stack([row.reshape(-1, k).sum(0) for row in rows]), convex=False)


def autograd_root(loss: Tensor, source: Node) -> OutputRoot:
    """A square root of every instance's H_i = d^2 L / dz_i dz_i^T [K, K], by double backward.

    Args:
        loss: L, a scalar with its graph.
        source: the node of the graph whose tensor is z [..., K].

    Raises:
        ValueError: an H_i is not positive semi-definite.
    """
    diagonal, rows = _rows_of(loss, source)
    if rows is None:
        check_semidefinite(diagonal, diagonal.dtype)
        return GaussianRoot(diagonal.clamp(min=0).sqrt())
    hessians = torch.stack(list(rows), -1)
    if not torch.isfinite(hessians).all():
        return DenseRoot(hessians)  # NaN is left to the step's own check
    eigenvalues, vectors = torch.linalg.eigh(symmetrized(hessians).double())
    check_semidefinite(eigenvalues, diagonal.dtype)
    return DenseRoot((vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)).to(diagonal.dtype))


def _rows_of(loss: Tensor, source: Node) -> tuple[Tensor, Iterator[Tensor] | None]:
    """Every instance's H_i: its diagonal [..., K] and None, or its row sums and its rows, K tensors [..., K]."""
    edge = GradientEdge(source, 0)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss, edge, create_graph=True)
    if not gradient.requires_grad:  # a loss that is linear in z
        return torch.zeros_like(gradient), None

    def product(v: Tensor) -> Tensor:
        with second_derivatives():
            (hv,) = torch.autograd.grad(gradient, edge, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(gradient) if hv is None else hv.detach()

    # A diagonal Hessian has H v = (H 1) * v for every v.
    diagonal, v = product(torch.ones_like(gradient)), irregular(gradient)
    if ((product(v) - diagonal * v).abs() <= 1e-4 * diagonal.abs().max()).all():
        return diagonal, None

    def unit(k: int) -> Tensor:
        v = torch.zeros_like(gradient)
        v[..., k] = 1
        return v

    return diagonal, (product(unit(k)) for k in range(gradient.shape[-1]))
