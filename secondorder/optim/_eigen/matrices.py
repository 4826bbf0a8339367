"""EigenAdam's parameters as matrices [n, p], each with the bias that belongs to it and the modules that use it.

A matrix that multiplies inputs is a map, and has a basis on either side. One that is no map has none: a table, whose rows are
looked up, or numbers that each stand for themselves. Where no module is known to use a matrix, its first gradient tells which of
these it is (`tables`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from secondorder._tensors import compute_dtype, is_sharded, local_rows

# Modules whose weight [n_out, n_in, ...] multiplies their one input, as rows.
LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Modules whose weight's rows are looked up, each by itself, so that the weight has no bases.
TABLES = (nn.Embedding, nn.EmbeddingBag)

Users = dict[Tensor, list[nn.Module]]  # the modules that use each weight


@dataclass(eq=False)
class Matrix:
    """A parameter, or a weight with the bias that is added to its product. A complex number counts as two.

    Attributes:
        weight: its values, [n, ...].
        bias: [n], or None.
        name: the weight's name.
        has_bases: whether it is a map, with a basis on either side, as far as is known; else it has none.
        layers: the modules that multiply their inputs with it: what `input_rows` gives are the inputs that it sees.
        lookups: the modules that look up its rows, of a table.
    """

    weight: Tensor
    bias: Tensor | None
    name: str
    has_bases: bool
    layers: list[nn.Module] = field(default_factory=list)
    lookups: list[nn.Module] = field(default_factory=list)

    @property
    def modules(self) -> list[nn.Module]:
        """Returns all modules that are known to use it."""
        return [*self.layers, *self.lookups]

    @property
    def decided_by_gradient(self) -> bool:
        """Tells whether its first gradient decides if it has bases: no module is known that uses it, and it has two sides."""
        p = self.weight
        return not self.modules and p.dim() >= 2 and 1 < len(p) < p.numel()

    @property
    def has_gradient(self) -> bool:
        """Tells whether the weight or the bias has a gradient."""
        return self.weight.grad is not None or (self.bias is not None and self.bias.grad is not None)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Returns [n, p]."""
        numel = self.weight.numel() * (1 + self.weight.is_complex())
        if self.weight.dim() < 2:
            return 1, numel
        n = self.weight.shape[0]
        return n, numel // max(n, 1)

    @cached_property
    def local_shape(self) -> tuple[int, int]:
        """Returns the shape of what this process has: all, or some rows of a DTensor (elements, if it has one dimension)."""
        if not is_sharded(self.weight):
            return self.shape
        rows = local_rows(self.weight).shape[0]
        return rows, self.weight.numel() // self.weight.shape[0]

    @cached_property
    def is_real_and_local(self) -> bool:
        """Tells whether its parameters are real tensors, with all rows in this process."""
        return not (self.weight.is_complex() or is_sharded(self.weight))

    @property
    def numel(self) -> int:
        """Returns how many numbers it has with its bias."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())


def find_matrices(
    parameters: Iterable[Tensor], model: nn.Module | None, states: Mapping[Tensor, dict[str, Any]] | None = None
) -> list[Matrix]:
    """Returns the parameters as matrices.

    Without a model, every parameter with two or more dimensions is a matrix of its own. With one, its linear layers and
    convolutions give each weight its bias and its inputs, and what they do not know, as attention's or an LSTM's weights, is a
    matrix of its own; the tables of embeddings, vectors, and what has a single row or column, have no bases. Integers, as of
    frozen layers that are quantized, are left alone.

    Args:
        parameters: those that are trained.
        model: the model that they are of, or None.
        states: the states, by weight: a weight that has one keeps its bias, or goes on without, whatever has been frozen since.
    """
    names = {p: f"parameter {i}" for i, p in enumerate(parameters) if p.is_floating_point() or p.is_complex()}
    layers: Users = {}
    tables: Users = {}
    if model is not None:
        names |= {p: name for name, p in model.named_parameters() if p in names}
        layers, tables = _users(model, names)
    biases = _biases(layers, names, states or {})
    taken, found = set(biases.values()), []
    for p, name in names.items():
        if p in taken or not p.numel():
            continue
        has_bases = p.dim() >= 2 and (p in layers or (1 < p.shape[0] < p.numel() and p not in tables))
        found.append(Matrix(p, biases.get(p), name, has_bases, layers.get(p, []), [] if has_bases else tables.get(p, [])))
    return found


def _users(model: nn.Module, names: Mapping[Tensor, str]) -> tuple[Users, Users]:
    """Returns the layers that multiply with each of the named weights, and the modules that look up its rows."""
    layers: Users = {}
    tables: Users = {}
    for module in model.modules():
        # TorchScript's modules are of no type that is known here. A complex weight multiplies pairs of numbers.
        weight = None if isinstance(module, torch.jit.ScriptModule) else module._parameters.get("weight")
        if weight is None or weight not in names or weight.is_complex():
            continue
        if multiplies(module):
            layers.setdefault(weight, []).append(module)
        elif isinstance(module, TABLES):
            tables.setdefault(weight, []).append(module)
    return layers, tables


def _biases(layers: Users, names: Mapping[Tensor, str], states: Mapping[Tensor, dict[str, Any]]) -> dict[Tensor, Tensor]:
    """Returns the bias that goes with each weight: both are trained, or neither, unless a state says how they have begun."""
    biases: dict[Tensor, Tensor] = {}
    taken: set[Tensor] = set()
    for weight, modules in layers.items():
        if not weight.numel():
            continue
        bias: Tensor | None = modules[0]._parameters.get("bias")
        alike = all(module._parameters.get("bias") is bias for module in modules)
        alike = alike and getattr(bias, "placements", None) == getattr(weight, "placements", None)
        if bias is None or bias not in names or not alike or bias in taken:
            continue
        mean = states.get(weight, {}).get("mean")
        together = weight.requires_grad == bias.requires_grad if mean is None else mean.numel() > 0
        if together:
            biases[weight] = bias
            taken.add(bias)
    return biases


def computed_in(p: Tensor) -> torch.dtype:
    """Returns what a parameter is computed in: at least float32, and of complex numbers the parts."""
    return compute_dtype(p.dtype.to_real() if p.is_complex() else p.dtype)


def multiplies(module: nn.Module) -> bool:
    """Tells whether a module's output is its weight times its input, plus its bias, by torch's own forward."""
    if isinstance(module, NonDynamicallyQuantizableLinear) or "forward" in vars(module):  # attention's is not called
        return False
    if isinstance(module, LINEAR):
        return type(module).forward is nn.Linear.forward
    if isinstance(module, CONVOLUTIONS):
        kind = next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
        return type(module).forward is kind.forward and module.padding_mode == "zeros"
    return False
