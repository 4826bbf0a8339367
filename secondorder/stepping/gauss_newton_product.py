"""Products with the Gauss-Newton matrix: the criterion's Hessian at the output, and J v through a recorded net.

    x^T G y = sum_i (J_i x)^T H_i (J_i y)

takes one forward-mode product J x for every vector. A net that is a chain of linear layers with known activations takes it from
the record alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secondorder._tape import KnownActivation, LossCall, derivatives
from secondorder._tensors import flatten_batch, to_compute_dtype
from secondorder.criteria import analytic_hessian, autograd_hessian


class CriterionAtOutput:
    """The criterion at an output z: its loss, the gradient there, and products with its positive semi-definite Hessian."""

    def __init__(self, criterion: nn.Module, z: Tensor, targets: tuple[Any, ...], options: dict[str, Any]):
        with torch.enable_grad():
            self.leaf = z.detach().requires_grad_()
            output = self.leaf.view_as(self.leaf)
            loss = criterion(output, *targets, **options)
            (self._gradient,) = torch.autograd.grad(loss, self.leaf, create_graph=True)
            hessian = analytic_hessian(criterion, z, *targets, **options)
            self.matrix: Tensor | None = None
            if hessian is None or not hessian.convex:
                assert output.grad_fn is not None
                mean = autograd_hessian(loss, output.grad_fn) if hessian is None else hessian
                self.matrix = mean.positive(-1.0) * (z.shape[-1] / z.numel())
        self.loss, self.gradient = loss.detach(), self._gradient.detach()

    def product(self, tangent: Tensor) -> Tensor:
        """H_i t_i of every instance, of z's shape."""
        if self.matrix is not None:
            return tangent @ self.matrix
        return torch.autograd.grad(self._gradient, self.leaf, tangent, retain_graph=True)[0]


@dataclass
class LinearChain:
    """A net that is linear layers with known activations between them and nothing else, as it was recorded.

    The forward-mode product then needs neither the model nor its activations again, and takes all vectors at once:

        t_1 = h_0 V_1^T + v_1,   t_l = (d1_{l-1} * t_{l-1}) W_l^T + h_{l-1} V_l^T + v_l.
    """

    layers: list[nn.Linear]
    places: list[tuple[int | None, int | None]]  # of each layer's weight and bias among the parameters
    inputs: list[Tensor]  # h [m, ..., n_in]
    maps: list[KnownActivation]  # to the next layer, one fewer
    output: Tensor  # [m, ...]

    def rows(self, keep: slice) -> "LinearChain":
        """The same for these instances alone."""
        maps = [KnownActivation(t.activation, t.parameter, to_compute_dtype(_kept(t.saved, keep))) for t in self.maps]
        inputs = [to_compute_dtype(_kept(h, keep)) for h in self.inputs]
        return LinearChain(self.layers, self.places, inputs, maps, to_compute_dtype(_kept(self.output, keep)))

    def tangents(self, vectors: list[list[Tensor]]) -> Tensor:
        """J x of every vector, [k, *output.shape]."""
        t: Tensor | None = None
        for depth, (layer, (weight, bias), h) in enumerate(zip(self.layers, self.places, self.inputs, strict=True)):
            flat = flatten_batch([h])
            if t is None:
                new = flat.new_zeros(len(vectors), len(flat), layer.out_features)
            else:
                d1, _ = derivatives(self.maps[depth - 1])
                below = (t * d1.reshape(t.shape[1:])).flatten(0, 1)
                new = (below @ to_compute_dtype(layer.weight.detach()).T).view(len(vectors), len(flat), layer.out_features)
            for k, vector in enumerate(vectors):
                if weight is not None:
                    new[k].addmm_(flat, vector[weight].T)
                if bias is not None:
                    new[k].add_(vector[bias])
            t = new
        assert t is not None
        return t.view(len(vectors), *self.output.shape)


def linear_chain(loss: LossCall, parameters: list[Tensor], batch: int) -> LinearChain | None:
    """The recorded net, if it is a chain that depends on these parameters alone and has one row for each instance."""
    assert loss.inputs is not None
    if loss.output is None or loss.output.dim() == 0 or len(loss.output) != batch:
        return None
    place = {p: i for i, p in enumerate(parameters)}
    calls, maps = [loss.sources[0]], []
    while calls[-1].inputs_from:
        links = calls[-1].inputs_from
        if len(links) > 1 or not isinstance(links[0].map, KnownActivation):
            return None
        maps.append(links[0].map)
        calls.append(links[0].source)
    layers = [call.layer for call in reversed(calls)]
    own = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    given = [leaf for leaf in tree_leaves((loss.inputs.args, loss.inputs.kwargs)) if isinstance(leaf, Tensor)]
    first = calls[-1].input
    # Whatever stands before the first layer, a random or a trainable one, say, would have to be evaluated anew.
    if not any(first.data_ptr() == leaf.data_ptr() and first.numel() == leaf.numel() for leaf in given):
        return None
    inputs = [call.input for call in reversed(calls)]
    if not place.keys() <= set(own) or any(len(h) != batch for h in inputs):
        return None
    places = [(place.get(layer.weight), None if layer.bias is None else place.get(layer.bias)) for layer in layers]
    return LinearChain(layers, places, inputs, maps[::-1], loss.output)


def _kept(instances: Tensor, keep: slice) -> Tensor:
    return instances if keep.step == 1 else instances[keep]
