"""Optimizers that others made, for a model, as they are compared with this package's.

Muon and COSMOS are made for the matrices of hidden layers; the output layer and the rest of a model get AdamW, as their authors
have it. Weight decay is zero everywhere: what is compared first is the training loss. SOAP, PSGD-Kron, Shampoo and Schedule-Free
AdamW come from PyPI's pytorch_optimizer.
COSMOS takes part where its authors' module COSMOS_optim (https://github.com/lliu606/COSMOS) can be imported. Muon and COSMOS
orthogonalise in bfloat16, which a processor without instructions for it does a hundred times as slowly as float32: there they
get the same iteration in float32. torch-levenberg-marquardt (PyPI) takes part where it is installed.
"""

import importlib
import importlib.util
import sys
from functools import lru_cache
from itertools import groupby
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
COSMOS_RANK = 64  # the authors' default
RMSPROP_GRAFTING = 3  # pytorch_optimizer's number of it


class Parts(torch.optim.Optimizer):
    """Optimizers of a model's parts, stepped together; their groups are shown as one optimizer's."""

    def __init__(self, *parts: torch.optim.Optimizer):
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        self.param_groups = groups
        self.parts = parts

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def hidden_weights(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of all linear layers but the last, and all other parameters."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][:-1]
    chosen = {id(weight) for weight in weights}
    return weights, [p for p in model.parameters() if id(p) not in chosen]


@lru_cache
def bfloat16_is_slow() -> bool:
    """Whether this processor multiplies in float32 faster."""
    x = torch.rand(128, 512)
    seconds = [Timer("x @ x.T", globals={"x": x.to(dtype)}).timeit(20).median for dtype in (torch.bfloat16, torch.float32)]
    return seconds[0] > seconds[1]


def orthogonalized(
    grad: Tensor, coefficients: tuple[float, float, float] = NEWTON_SCHULZ, steps: int = 5, eps: float = 1e-7
) -> Tensor:
    """Muon's Newton-Schulz iteration in the gradient's own dtype."""
    a, b, c = coefficients
    wide = len(grad) <= grad.shape[1]
    x = grad if wide else grad.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(getattr(torch.optim, "Muon", torch.optim.Optimizer)):  # torch has it from 2.9 on
    """torch's, in float32 where that is faster."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if bfloat16_is_slow():
            with patch("torch.optim._muon._zeropower_via_newtonschulz", orthogonalized):
                super().step()
        else:
            super().step()


def muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Muon with updates as long as AdamW's, so that one learning rate does for both."""
    weights, others = hidden_weights(model)
    own = [Muon(weights, lr, weight_decay=0, adjust_lr_fn="match_rms_adamw")] if weights else []
    return Parts(*own, torch.optim.AdamW(others, lr, weight_decay=0))


def soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SOAP with its authors' betas and a new basis every ten steps."""
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr, betas=(0.95, 0.95), weight_decay=0, precondition_frequency=10)


def psgd_kron(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """PSGD with Kronecker-factored preconditioners, at its implementation's defaults.

    Without opt_einsum a step takes a hundred times as long.
    """
    from pytorch_optimizer import Kron

    return Kron(model.parameters(), lr, weight_decay=0)


def shampoo(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Shampoo with the step lengths of RMSprop, layer by layer, and new inverse roots every ten steps."""
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(
        model.parameters(), lr, start_preconditioning_step=10, preconditioning_compute_steps=10, graft_type=RMSPROP_GRAFTING
    )


def schedule_free(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Schedule-Free AdamW: it evaluates the model at its average between `eval()` and `train()`."""
    from pytorch_optimizer import ScheduleFreeAdamW

    return ScheduleFreeAdamW(model.parameters(), lr, weight_decay=0)


def has_cosmos() -> bool:
    return importlib.util.find_spec("COSMOS_optim") is not None


def cosmos(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """COSMOS as its authors' page calls it; its rank is at most a layer's number of inputs."""
    import COSMOS_optim

    if bfloat16_is_slow():
        COSMOS_optim.zeropower_via_newtonschulz5 = orthogonalized
    weights, others = hidden_weights(model)
    rank = lambda weight: min(COSMOS_RANK, weight.shape[1])
    own = [
        COSMOS_optim.COSMOS(list(same), lr, betas=(0.95, 0.95), lr_ratio=0.2, rank=r, nestrov=True)
        for r, same in groupby(sorted(weights, key=rank), key=rank)
    ]
    return Parts(*own, torch.optim.AdamW(others, lr, weight_decay=0))


class ClosedOptimizer(torch.optim.Optimizer):
    """An optimizer whose `step` does everything itself, from the examples that it was made with."""


def has_torch_levenberg_marquardt() -> bool:
    return importlib.util.find_spec("torch_levenberg_marquardt") is not None


def _their_training() -> Any:
    """Their module `training`, without their package's trainers, which want PyTorch Lightning."""
    name = "torch_levenberg_marquardt"
    if name not in sys.modules:
        sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))  # and not executed
    return importlib.import_module(f"{name}.training")


class TorchLevenbergMarquardt(ClosedOptimizer):
    """torch-levenberg-marquardt at its defaults for a mean squared error, all examples in every step."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor):
        super().__init__(model.parameters(), {"lr": 1.0})
        self.module = _their_training().LevenbergMarquardtModule(model)
        self.examples = inputs, targets

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.module.training_step(*self.examples)
