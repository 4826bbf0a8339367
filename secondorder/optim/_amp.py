"""Mixed precision: what torch.amp.GradScaler leaves for a step to undo, and steps within torch.autocast."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

from secondorder._tensors import autocast_on, host_numbers

Step = TypeVar("Step", bound=Callable[..., Any])


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
    found, factor = host_numbers([found_inf, 1.0 if scale is None else scale])
    if found:
        return None
    if scale is not None:
        for group in optimizer.param_groups:
            torch._foreach_div_([p.grad for p in group["params"] if p.grad is not None], factor)
        return 1.0 / factor
    if grad_scaler is not None:
        return float(1.0 / grad_scaler.get_scale())
    raise RuntimeError(
        f"{type(optimizer).__name__}.step(): the gradients were unscaled by scaler.unscale_(optimizer), and the curvature "
        "must be, too: tell the optimizer its scaler once, by optimizer.grad_scaler = scaler"
    )


def outside_autocast(step: Step) -> Step:
    """Makes `step(self, closure)` compute in the tensors' own dtypes within torch.autocast, as torch's optimizers do.

    The closure is called as within it. The rounded copies that autocast keeps of weights are forgotten before each of its calls,
    and after the step, since the weights have moved.
    """

    @functools.wraps(step)
    def outside(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        own = next((p.device.type for group in self.param_groups for p in group["params"]), "cpu")
        kinds = [kind for kind in dict.fromkeys(("cpu", own)) if autocast_on(kind)]
        if not kinds:
            return step(self, *args, **kwargs)
        dtypes = {kind: torch.get_autocast_dtype(kind) for kind in kinds}
        cached = torch.is_autocast_cache_enabled()

        def within(closure: Any) -> Any:
            def called() -> Any:
                torch.clear_autocast_cache()
                with ExitStack() as stack:
                    for kind, dtype in dtypes.items():
                        stack.enter_context(torch.autocast(kind, dtype, cache_enabled=cached))
                    return closure()

            return called if callable(closure) else closure

        try:
            with ExitStack() as stack:
                for kind in dtypes:
                    stack.enter_context(torch.autocast(kind, enabled=False))
                return step(self, *map(within, args), **{name: within(value) for name, value in kwargs.items()})
        finally:
            torch.clear_autocast_cache()

    return outside  # type: ignore[return-value]


def restore_scale(optimizer: torch.optim.Optimizer) -> None:
    """Multiplies the gradients by GradScaler's factor again after a step that has failed, so that it may be tried again."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        (factor,) = host_numbers([scale])
        for group in optimizer.param_groups:
            torch._foreach_mul_([p.grad for p in group["params"] if p.grad is not None], factor)
