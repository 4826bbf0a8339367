"""KBFGSL: K-BFGS with the output side in limited memory (Goldfarb, Ren & Bahamou, 2020)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from secondorder import ops
from secondorder.optim._docstrings import complete_docstring
from secondorder.optim._kbfgs.layer import alike, damping_of, scaled_gradients
from secondorder.optim._numbers import check_counts
from secondorder.optim.kbfgs import KBFGS


@complete_docstring
class KBFGSL(KBFGS):
    """K-BFGS(L): K-BFGS with H_g in limited memory, the last `memory` damped pairs (s, y) of each layer.

    For each layer z = W h + b let [W | b] [n_out, n_in + 1] be its parameters, and let h end in a 1; a layer without a bias has
    neither. A step is

        M <- decay M + (1 - decay) (gradient of the loss + weight_decay [W | b])
        [W | b] <- [W | b] - lr H_g M H_a / c                                              Eq. 4
        s <- decay s + (1 - decay) (E[z+] - E[z]),   y <- likewise with dL/dz              Eq. 5; z+: after the step
        H_g <- the compact form of the BFGS updates of I by the last pairs, each after the double damping of (s, y / c)
        A <- decay A + (1 - decay) E[h h^T]
        H_a <- BFGS update of H_a by s_a = H_a E[h], y_a = (A + lambda_A I) s_a            Section 4

    It starts from s = y = 0, H_g = I, A = E[h h^T] (`initialize`) and H_a = (A + lambda_A I)^-1. c is the layer's `scale`. Its
    steps are those of `KBFGS` until a pair is dropped. It needs less arithmetic than that where memory < n_out / 2, roughly.

        optimizer = secondorder.KBFGSL(model, criterion)
        for x, y in loader:
            def closure():
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                return loss
            optimizer.step(closure)

    `step` calls the closure a second time, at the new weights, on the same mini-batch and from the same random state. If the loss
    after the step exceeds the loss before by more than `max_increase` times its size, or is not finite, the step is halved and
    tried again, and given up after 10 halvings.

    Args:
        memory: how many pairs (s, y) of each layer are kept, >= 1.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        lr: float = 0.3,
        *,
        damping: float = 0.3,
        damping_a: float | None = None,
        damping_g: float | None = None,
        memory: int = 100,
        mu1: float = 0.2,
        pairs: str = "damped",
        input_inverse: str = "hessian-action",
        doubled_batch: bool = False,
        scale: str | None = "curvature",
        max_step: float | None = 0.25,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        max_increase: float = 0.05,
        max_input_dim: int | None = 16384,
        fallback: str = "sgd",
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        nonfinite: str = "error",
    ):
        check_counts(type(self).__name__, 1, {"memory": memory})
        super().__init__(
            model, criterion, lr, damping=damping, damping_a=damping_a, damping_g=damping_g, mu1=mu1, pairs=pairs,
            input_inverse=input_inverse, doubled_batch=doubled_batch, scale=scale, max_step=max_step, decay=decay,
            weight_decay=weight_decay,
            bias_correction=bias_correction, max_increase=max_increase, max_factor_dim=None, max_input_dim=max_input_dim,
            fallback=fallback, maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay, nonfinite=nonfinite,
        )  # fmt: skip
        self._memory = memory

    def _start_output(self, zero: Tensor) -> dict[str, Tensor]:
        return {key: zero.new_zeros(self._memory, len(zero)) for key in ("s_pairs", "y_pairs")}

    def _output_shapes(self, n: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("s_pairs", "y_pairs"), (self._memory, n))

    def _preconditioned(self, states: list[dict[str, Any]], gradients: list[Tensor]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for positions in alike(states):
            s_pairs, y_pairs = ([states[position][key] for position in positions] for key in ("s_pairs", "y_pairs"))
            halves = ops.lbfgs_product(s_pairs, y_pairs, [gradients[position] for position in positions])
            for position, half in zip(positions, halves, strict=True):
                found[position] = ops.precondition(None, half, states[position]["inverse_input"])
        return [found[position] for position in range(len(states))]

    def _damped_update(self, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        s, s_pairs, y_pairs = ([state[key] for state in states] for key in ("s", "s_pairs", "y_pairs"))
        y = scaled_gradients(states)
        return ops.damped_lbfgs_update_(s_pairs, y_pairs, s, y, group["mu1"], damping_of(group, "damping_g"), *self._pairs)
