"""A recorded net of linear layers with known activations between them: evaluated and differentiated from its record."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from secondorder._tape import KnownActivation, LossCall, activation_function, derivatives
from secondorder._tensors import flatten_batch, to_compute_dtype


@dataclass
class LinearChain:
    """A recorded net of nothing but linear layers and known activations between them, on some rows.

    Neither the model nor what stands before the first layer is evaluated again:

        t_1 = h_0 V_1^T + v_1,   t_l = (d1_{l-1} * t_{l-1}) W_l^T + h_{l-1} V_l^T + v_l,   J x = t_L.
    """

    layers: list[nn.Linear]
    places: list[tuple[int | None, int | None]]  # of each layer's weight and bias among the parameters
    inputs: list[Tensor]  # h [m, n_in]
    maps: list[KnownActivation]  # to the next layer, one fewer
    output: Tensor  # z [m, n_out]

    def rows(self, keep: Tensor, groups: int) -> "LinearChain":
        """Returns the same net on some of `groups` groups of consecutive rows."""

        def kept(t: Tensor) -> Tensor:
            return to_compute_dtype(t.reshape(groups, -1, t.shape[-1])[keep].flatten(0, 1))

        maps = [KnownActivation(t.activation, t.parameter, kept(t.saved)) for t in self.maps]
        return LinearChain(self.layers, self.places, [kept(h) for h in self.inputs], maps, kept(self.output))

    def value(self, parameters: list[Tensor], rows: slice = slice(None)) -> Tensor:
        """Returns z [m, n_out] at other parameters, or some of its rows."""
        h = self.inputs[0][rows]
        for depth, (layer, (weight, bias)) in enumerate(zip(self.layers, self.places, strict=True)):
            w = layer.weight.detach() if weight is None else parameters[weight]
            b = None if layer.bias is None else layer.bias.detach() if bias is None else parameters[bias]
            h = F.linear(h, to_compute_dtype(w), b if b is None else to_compute_dtype(b))
            if depth < len(self.maps):
                h = activation_function(self.maps[depth])(h)
        return h

    def tangents(self, vectors: list[list[Tensor]]) -> Tensor:
        """Returns J x for every vector x, [k, m, n_out]."""
        t: Tensor | None = None
        for depth, (layer, (weight, bias), h) in enumerate(zip(self.layers, self.places, self.inputs, strict=True)):
            if t is None:
                new = h.new_zeros(len(vectors), len(h), layer.out_features)
            else:
                d1, _ = derivatives(self.maps[depth - 1])
                below = (t * d1).flatten(0, 1)
                new = (below @ to_compute_dtype(layer.weight.detach()).T).view(len(vectors), len(h), layer.out_features)
            for k, vector in enumerate(vectors):
                if weight is not None:
                    new[k].addmm_(h, vector[weight].T)
                if bias is not None:
                    new[k].add_(vector[bias])
            t = new
        assert t is not None
        return t


def linear_chain(loss: LossCall, parameters: list[Tensor]) -> LinearChain | None:
    """Returns the recorded net, if it is a chain from a given tensor to the criterion's one argument; else None.

    Args:
        loss: the criterion's call.
        parameters: those that it may be a function of; others of them do not matter to it.
    """
    if loss.arguments is None or loss.arguments.from_layer is None:
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
    if not calls[-1].given or len(set(layers)) < len(layers):
        return None
    inputs = [_flat(call.input) for call in reversed(calls)]
    saved = [KnownActivation(t.activation, t.parameter, _flat(t.saved)) for t in maps[::-1]]
    if len({len(h) for h in [*inputs, *(t.saved for t in saved)]}) > 1:
        return None
    places = [(place.get(layer.weight), None if layer.bias is None else place.get(layer.bias)) for layer in layers]
    return LinearChain(layers, places, inputs, saved, _flat(loss.sources[0].preactivation()))


def _flat(t: Tensor) -> Tensor:
    return to_compute_dtype(flatten_batch([t]))
