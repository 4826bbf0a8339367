"""Whether a CUDA graph can capture the operators of a step: only where they run as kernels."""

import torch


def has_kernels(device: torch.device) -> bool:
    """Returns whether operators on a device of CUDA run as kernels, not as plain PyTorch, which reads numbers; true of others."""
    return device.type != "cuda" or torch._C._dispatch_has_kernel_for_dispatch_key("secondorder::eigen_step_", "CUDA")


def check_kernels(owner: str, device: torch.device, instead: str = "") -> None:
    """Raises where a CUDA graph that captures a step would find plain PyTorch.

    Args:
        owner: whose step it is, for the error.
        device: the device of the parameters.
        instead: what else to do than to compile the extension.

    Raises:
        RuntimeError: there are no kernels for CUDA.
    """
    if not has_kernels(device):
        raise RuntimeError(
            f"{owner}.step(): expected kernels for CUDA where a CUDA graph captures the step, got plain PyTorch, which reads "
            f"numbers of the device; compile the extension with CUDA (docs/install.md){instead}"
        )
