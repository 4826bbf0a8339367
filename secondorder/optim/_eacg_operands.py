"""What `ops.eacg_update_` takes of a net: EACG's update of all layers by one call."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secondorder import ops
from secondorder._layers import parameters_of
from secondorder.optim._layerwise import Groups
from secondorder.solvers import EACGSolver, Factors


class UpdateOperands(NamedTuple):
    """The parameters of the layers that a step updates, with what it updates them by; empty tensors stand for no bias."""

    weights: list[Tensor]
    biases: list[Tensor]
    grad_weights: list[Tensor]
    grad_biases: list[Tensor]
    groups: list[dict[str, Any]]  # of the weights
    momenta: tuple[list[Tensor], list[Tensor]]
    started: dict[Tensor, Tensor]  # momenta that are new

    @classmethod
    def of_layers(
        cls,
        layers: Iterable[nn.Linear],
        gradients: Mapping[Tensor, Tensor],
        groups: Groups,
        state: Mapping[Tensor, dict[str, Any]],
    ) -> "UpdateOperands":
        """Makes them from the layers, the gradients, and the momenta in the state."""
        weights, biases, grad_biases = list[Tensor](), list[Tensor](), list[Tensor]()
        for weight, bias in map(parameters_of, layers):
            grad_bias = None if bias is None else gradients.get(bias)
            weights.append(weight)
            biases.append(weight.new_empty(0) if bias is None or grad_bias is None else bias)
            grad_biases.append(biases[-1] if grad_bias is None else grad_bias)
        own, started = [groups[weight] for weight in weights], dict[Tensor, Tensor]()
        momenta: tuple[list[Tensor], list[Tensor]] = ([], [])
        if any(group["momentum"] != 0 for group in own):
            momenta = (_momenta(weights, state, started), _momenta(biases, state, started))
        return cls(weights, biases, [gradients[weight] for weight in weights], grad_biases, own, momenta, started)

    def update_(self, factors: Iterable[Factors], solver: EACGSolver, lr: list[float]) -> Tensor:
        """Solves all layers, and updates them if every solution is finite; returns their iterations, -1 where one is not."""
        factors = list(factors)
        return ops.eacg_update_(
            [each["bias_hessian"] for each in factors],
            [each["mean_input"] for each in factors],
            self.grad_weights,
            self.grad_biases,
            self.weights,
            self.biases,
            *self.momenta,
            lr,
            [float(group["alpha"]) for group in self.groups],
            [float(group["momentum"]) for group in self.groups],
            [float(group["weight_decay"]) if group["decoupled_weight_decay"] else 0.0 for group in self.groups],
            solver.max_cg,
            solver.eps_cg,
            solver.truncated,
            [max_norm(weight, group) for weight, group in zip(self.weights, self.groups, strict=True)],
        )


def max_norm(weight: Tensor, group: Mapping[str, Any]) -> float:
    """Returns the largest length of [P, d] for a weight [n_out, n_in], by its group's `max_step`; older checkpoints lack it."""
    bound = group.get("max_step")
    return math.inf if bound is None else float(bound) * math.sqrt(len(weight))


def _momenta(parameters: list[Tensor], state: Mapping[Tensor, dict[str, Any]], started: dict[Tensor, Tensor]) -> list[Tensor]:
    """Returns the parameters' momenta; `started` gets new ones, but for those of the empty tensors that stand for no bias."""
    buffers = []
    for p in parameters:
        buffer = state.get(p, {}).get("momentum")
        if buffer is None:
            buffer = torch.zeros_like(p)
            if p.numel():
                started[p] = buffer
        buffers.append(buffer)
    return buffers
