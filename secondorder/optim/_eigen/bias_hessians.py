"""The bias Hessians of a model's layers, for an optimizer that asks for them at some of its steps."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from secondorder._distributed import RankReducer
from secondorder._layers import linear_layers, uncovered
from secondorder._tape import LayerRecord, Tape
from secondorder.criteria.losses import as_criterion
from secondorder.curvature import CURVATURES, Curvature, curvature_by_name
from secondorder.optim._factors import FactorSource
from secondorder.optim._recorded import recorded_layers


class BiasHessians:
    """Lays a tape on a model, and makes the bias Hessians of the linear layers that it has recorded.

    Args:
        owner: the optimizer's name, for messages.
        curvature: gives the bias Hessians.
        criterion: a module whose calls return the loss.
        model: any module with a trainable nn.Linear.

    Raises:
        ValueError: there is no such layer.
    """

    def __init__(self, owner: str, curvature: Curvature, criterion: nn.Module, model: nn.Module):
        layers = linear_layers(model)
        self._uncovered = uncovered(model)
        if not any(layer.weight.requires_grad and layer.weight not in self._uncovered for layer in layers):
            raise ValueError(
                f"{owner}: expected a model with at least one trainable nn.Linear, got {type(model).__name__} with none; "
                "curvature='gradient' needs none"
            )
        self._owner, self._curvature = owner, curvature
        self._source = FactorSource(curvature, None, None, layers)
        self.tape = Tape(layers, criterion, curvature.tape_options(), model)

    def of_step(self, trained: Mapping[Tensor, Any], sign: int, group: dist.ProcessGroup | None) -> dict[Tensor, Tensor]:
        """Returns H [n_out, n_out] of every recorded layer with a gradient, by its weight, in the weight's compute dtype.

        Args:
            trained: the optimizer's parameters; layers of others are left out.
            sign: -1 where the loss is maximised.
            group: the ranks whose instances enter; None: this process is alone.

        Raises:
            RuntimeError: no call of the criterion was recorded.
            ValueError: the batch is empty.
        """
        if self.tape.covers_none:  # all layers have been frozen since
            return {}
        with nullcontext() if sign > 0 else self.tape.rescaled(sign):
            if group is None:
                ranks, records = None, self._records()
            else:
                ranks = RankReducer(group, next(iter(trained)).device)
                records = ranks.all(self._records)
            covered = {p: each for p, each in trained.items() if p not in self._uncovered}
            factors = self._source.renewed(records, covered, {}, ranks)
        # A layer that the criterion sees by another way than the columns take has no block.
        missing = {record.layer for record in records if self._curvature.columns is not None and record.block is None}
        return {layer.weight: each["bias_hessian"] for layer, each in factors.items() if layer not in missing}

    def _records(self) -> list[LayerRecord]:
        return recorded_layers(self._owner, self.tape)


def chosen_curvature(
    owner: str, curvature: str | Curvature, criterion: nn.Module | Callable[..., Tensor] | None, model: nn.Module | None
) -> tuple[Curvature | None, nn.Module | None]:
    """Returns the curvature (None for "gradient") and the criterion as a module, once they are known to go together.

    Args:
        owner: the optimizer's name, for messages.
        curvature: a name, or a curvature.
        criterion: what the loop computes its loss by, or None.
        model: whose layers are to have bias Hessians, or None.

    Raises:
        TypeError: the criterion cannot be called.
        ValueError: the name is not known; or there is a criterion without use, or none, or no model, where one is needed.
    """
    if isinstance(curvature, str) and curvature == "gradient":
        if criterion is not None:
            raise ValueError(
                f"{owner}: expected no criterion with curvature='gradient', which has no use for it, got {criterion!r}; "
                "curvature='pch-abs' has"
            )
        return None, None
    try:
        found = curvature_by_name(curvature)
    except ValueError:
        known = ", ".join(map(repr, CURVATURES))
        raise ValueError(
            f"{owner}: expected curvature to be one of 'gradient', {known}, or a Curvature, got {curvature!r}"
        ) from None
    if criterion is None:
        raise ValueError(f"{owner}: expected a criterion with curvature={curvature!r}, got None; curvature='gradient' needs none")
    module = as_criterion(owner, criterion)
    if model is None:
        raise ValueError(f"{owner}: expected a model with curvature={curvature!r}, got parameters alone; give model=, too")
    return found, module
