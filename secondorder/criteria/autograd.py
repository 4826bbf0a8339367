"""The Hessian of any criterion with respect to a tensor of the graph, by double backward."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from secondorder._tensors import gradients_by_seed, irregular
from secondorder.criteria.hessians import OutputHessian, check_semidefinite, lowest_eigenvalue
from secondorder.criteria.roots import GaussianRoot, OutputRoot, dense_root
from secondorder.errors import second_derivatives

_BATCH = 2**17  # so many numbers may backward passes that vmap takes together begin with: more are no faster together


def autograd_hessian(loss: Tensor, source: Node, inner: GradientEdge | None = None) -> OutputHessian:
    """Returns H = sum_i d^2 L / dz_i dz_i^T [K, K] of any scalar loss L, by double backward; with u = u(z), sum_i J_i^T H_u J_i.

    Needs K + 3 backward passes through the criterion, or 3 where it acts on every element of z on its own; where z is small
    vmap takes many of the K together. Instances must not be coupled by the criterion; a coupling enters as if it stood within the
    instances. Where that leaves nothing but rounding, as of differences between instances, H is 0.

    Args:
        loss: L, a scalar with its graph.
        source: the node of the graph whose tensor is z [..., K].
        inner: where u stands in the graph, between z and L: H_u is then the Hessian there, J_i = du/dz_i; None: it is z itself.
    """
    hessians = _InstanceHessians(loss, source, inner)
    k = hessians.sums.shape[-1]
    if hessians.diagonal:
        diagonal = hessians.sums
        convex = not diagonal.numel() or lowest_eigenvalue(diagonal, diagonal.dtype) is None
        return OutputHessian((diagonal.clamp(min=0) if convex else diagonal).reshape(-1, k).sum(0), convex)
    sums, largest = zip(*((row.reshape(-1, k).sum(0), row.abs().max()) for row in hessians.rows()), strict=True)
    flat = torch.stack(largest).max() <= hessians.rounding
    return OutputHessian(torch.stack(sums).masked_fill(flat, 0), convex=False)


def autograd_root(loss: Tensor, source: Node, inner: GradientEdge | None = None, convex: bool = False) -> OutputRoot | None:
    """Returns a square root of every instance's H_i = d^2 L / dz_i dz_i^T, by double backward; with u = u(z), of J_i^T H_u J_i.

    None where these are zero, as an absolute value's, or where a coupling makes them so.

    Args:
        loss: L, a scalar with its graph.
        source: the node of the graph whose tensor is z [..., K].
        inner: where u stands in the graph, as for `autograd_hessian`; None: it is z itself.
        convex: whether every H_i is known to be positive semi-definite: negative eigenvalues are rounding then, however large
            they are beside the others, as where a classifier is certain of every label.

    Raises:
        ValueError: an H_i is not positive semi-definite.
    """
    hessians = _InstanceHessians(loss, source, inner)
    values = hessians.sums if hessians.diagonal else torch.stack(list(hessians.rows()), -1)
    if (values.abs() <= hessians.rounding).all():
        return None

    def check(eigenvalues: Tensor) -> None:
        if not convex:
            check_semidefinite(eigenvalues, values.dtype)

    if hessians.diagonal:
        check(values)
        return GaussianRoot(values.clamp(min=0).sqrt())
    return dense_root(values, check)


def check_second_derivatives(gradients: Iterable[Tensor | None], inner: Iterable[Node]) -> None:
    """Raises where gradients come from a function marked `once_differentiable`, whose second derivatives torch takes for zero.

    Args:
        gradients: what was taken with `create_graph=True`; None: there is none.
        inner: the nodes of the tensors by which they are differentiated, beyond which nothing is looked at.

    Raises:
        RuntimeError: there is one.
    """
    stack = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    seen = {*stack, *inner}
    while stack:
        node = stack.pop()
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("the derivative of a function that is marked once_differentiable is not implemented")
        new = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= new
        stack += new


def tangent_map(outer: Sequence[GradientEdge], inner: Sequence[GradientEdge]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Returns t -> J t, J the derivative of the tensors at `outer` by those at `inner`, by double backward.

    Args:
        outer: where the values stand in the graph.
        inner: where what they are functions of stands, before them.
    """
    made = [edge.node._input_metadata[edge.output_nr] for edge in outer]
    with torch.enable_grad():
        u = [torch.zeros(m.shape, dtype=m.dtype, device=m.device, requires_grad=True) for m in made]
        transposed = torch.autograd.grad(outer, inner, u, create_graph=True, allow_unused=True)
    check_second_derivatives(transposed, [edge.node for edge in inner])

    def tangent(t: Sequence[Tensor]) -> list[Tensor]:
        pairs = [(w, each.to(w.dtype)) for w, each in zip(transposed, t, strict=True) if w is not None and w.requires_grad]
        if not pairs:
            return [torch.zeros_like(each) for each in u]
        return list(
            torch.autograd.grad(
                [w for w, _ in pairs], u, [each for _, each in pairs], retain_graph=True, materialize_grads=True,
                allow_unused=True,
            )
        )  # fmt: skip

    return tangent


class _InstanceHessians:
    """Every instance's H_i = d^2 L / dz_i dz_i^T [K, K], or J_i^T H_u J_i with u = u(z), by products with vectors [..., K].

    Attributes:
        sums: of each H_i's rows [..., K]: its diagonal, if it is diagonal.
        diagonal: whether every H_i is diagonal.
        rounding: the size up to which all numbers of all H_i together may be rounding of zero.
    """

    def __init__(self, loss: Tensor, source: Node, inner: GradientEdge | None):
        self._z = GradientEdge(source, 0)
        self._edge = self._z if inner is None else inner
        with torch.enable_grad():
            (self._gradient,) = torch.autograd.grad(loss, self._edge, create_graph=True, allow_unused=True)
        self._tangent = None if inner is None else tangent_map([self._edge], [self._z])
        made: Any = source._input_metadata[0]
        self._zero = self.sums = torch.zeros(made.shape, dtype=made.dtype, device=made.device)
        self.diagonal, self.rounding = True, self._zero.new_zeros(())
        # A loss that is linear there, or that takes but derivatives of z by what z is made of, has H = 0.
        if self._gradient is not None and self._gradient.requires_grad:
            # A diagonal H has H v = (H 1) * v for every v.
            self.sums, v = self._times(torch.ones_like(self._zero)), irregular(self._zero)
            hv = self._times(v)
            self.diagonal = bool(((hv - self.sums * v).abs() <= 1e-4 * self.sums.abs().max()).all())
            if not self.diagonal:
                self.rounding = torch.finfo(hv.dtype).eps ** 0.75 * hv.abs().max()

    def rows(self) -> Iterator[Tensor]:
        """Yields the K rows of all H_i, each [..., K], by K backward passes."""
        k = self._zero.shape[-1]
        together = max(1, _BATCH // max(1, self._zero.numel())) if self._tangent is None else 1
        for begin in range(0, k, together):
            chosen = torch.arange(begin, min(begin + together, k), device=self._zero.device)
            units = self._zero.new_zeros(len(chosen), *self._zero.shape)
            units[chosen - begin, ..., chosen] = 1
            if together == 1:
                yield from (self._times(unit) for unit in units)
                continue
            with second_derivatives():
                (found,) = gradients_by_seed(self._gradient, [self._edge], units)
            yield from torch.zeros_like(units) if found is None else found.detach()

    def _times(self, v: Tensor) -> Tensor:
        """Returns every H_i v_i [..., K]."""
        with second_derivatives():
            u = v if self._tangent is None else self._tangent([v])[0]
            (hv,) = torch.autograd.grad(self._gradient, self._edge, u, retain_graph=True, allow_unused=True)
            if self._tangent is not None and hv is not None:
                (hv,) = torch.autograd.grad([self._edge], [self._z], [hv], retain_graph=True, allow_unused=True)
        return self._zero if hv is None else hv.detach()
