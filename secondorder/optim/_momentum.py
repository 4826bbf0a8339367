"""The update with momentum and decoupled weight decay: v <- momentum v + d, p <- (1 - lr weight_decay) p + lr v."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder._tensors import Later, Transfer

Group = Mapping[str, Any]


def velocity(p: Tensor, direction: Tensor, group: Group, state: Mapping[Tensor, dict[str, Any]]) -> Tensor:
    """Returns V after this direction, without storing it."""
    before = state[p].get("momentum") if group["momentum"] != 0 and p in state else None
    return direction if before is None else torch.add(direction, before, alpha=float(group["momentum"]))


def bounded(updates: Sequence[tuple[Tensor, Tensor, float]], transfer: Transfer) -> Later[list[bool]]:
    """Tells for each (p, v, lr) whether an update by lr v cannot overflow; NaN counts as overflow."""
    reaches = transfer.numbers([v.abs().amax() * max(1.0, lr) if v.numel() else 0.0 for _, v, lr in updates])
    return lambda: [reach <= torch.finfo(p.dtype).max / 8 for (p, _, _), reach in zip(updates, reaches(), strict=True)]


def apply(p: Tensor, v: Tensor, group: Group, state: Mapping[Tensor, dict[str, Any]], sign: float = 1.0) -> None:
    """Stores v, and updates p by sign lr v."""
    lr = float(group["lr"])
    shrink = 1 - lr * float(group["weight_decay"]) if group["decoupled_weight_decay"] else 1.0
    if p.dtype == v.dtype:
        (p if shrink == 1 else p.mul_(shrink)).add_(v, alpha=sign * lr)
    else:
        p.copy_(torch.add(p.to(v.dtype) * shrink, v, alpha=sign * lr))  # rounded once
    if group["momentum"] != 0:
        # The gradient itself belongs to the user: the buffer must not be it.
        state[p]["momentum"] = v.clone() if v is p.grad else v
