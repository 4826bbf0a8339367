"""Mixed precision: what torch.amp.GradScaler leaves for a step to undo."""

from typing import Any

import torch


def unscaling_factor(optimizer: torch.optim.Optimizer, grad_scaler: Any) -> float | None:
    """Undoes GradScaler's factor on the gradients, and returns the factor that undoes it on the tape's records.

    Args:
        optimizer: GradScaler.step has set `found_inf` and `grad_scale` on it, or not.
        grad_scaler: the optimizer's scaler; needed only where the user has unscaled the gradients before the step.

    Returns:
        The factor; None where the scaler has found inf, and the step is to be skipped.

    Raises:
        RuntimeError: the gradients are unscaled already, and the scaler is not known.
    """
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is None:
        return 1.0
    if found_inf.item():
        return None
    if scale is not None:
        for group in optimizer.param_groups:
            torch._foreach_div_([p.grad for p in group["params"] if p.grad is not None], scale.item())
        return float(1.0 / scale.item())
    if grad_scaler is not None:
        return float(1.0 / grad_scaler.get_scale())
    raise RuntimeError(
        f"{type(optimizer).__name__}.step(): the gradients were unscaled by scaler.unscale_(optimizer), and the curvature "
        "must be, too: tell the optimizer its scaler once, by optimizer.grad_scaler = scaler"
    )


def restore_scale(optimizer: torch.optim.Optimizer) -> None:
    """Multiplies the gradients by GradScaler's factor again after a step that has failed, so that it may be tried again."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        for group in optimizer.param_groups:
            torch._foreach_mul_([p.grad for p in group["params"] if p.grad is not None], scale.item())
