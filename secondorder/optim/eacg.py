"""EACG: the positive-curvature Hessian and EA-CG (Chen et al., "EA-CG", 2019)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secondorder import ops
from secondorder.curvature import PCH, curvature_by_name
from secondorder.optim.base import CurvatureOptimizer
from secondorder.tape import LayerRecord

_SOLVERS = {"ea-cg": False, "ea-cg-truncated": True}  # name -> truncated


class EACG(CurvatureOptimizer):
    """Trains the linear layers of a model by damped Newton steps under the positive-curvature Hessian (PCH).

    For each layer z = W h + b, with gradients B and g of the mean loss, bias Hessian H by backward recursion (Eq. 8) and mean
    input a = E[h], the directions solve (Eq. 10, 11b)

        (1 - alpha) H P a a^T + alpha P = -B     and     ((1 - alpha) H + alpha I) d = -g,

    and the update is V <- momentum V + P, W <- (1 - lr weight_decay) W + lr V, likewise for b. The criterion may be non-convex.

        optimizer = secondorder.EACG(model, criterion)
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()

    The paper's own method is `momentum=0, factor_decay=0, solver="ea-cg-truncated"`.

    Args:
        model: any module; its nn.Linear layers are covered wherever elementwise functions connect them (docs/design.md).
        criterion: a module, or a function (output, target) -> scalar loss to be called as `optimizer.criterion`.
        lr: step size, >= 0.
        curvature: "pch-abs" (PCH-1, gamma = -1), "pch-clip" (PCH-2, gamma = 0), or `secondorder.curvature.PCH(gamma)`.
        alpha: damping, in (0, 1): the weight of the identity against H.
        max_cg: at most this many conjugate gradient iterations, >= 1.
        eps_cg: CG stops at this residual, relative to the first one, >= 0.
        solver: "ea-cg" (exact across the mean input, CG along it) or "ea-cg-truncated" (the paper's iterates).
        momentum: in [0, 1).
        weight_decay: decoupled, >= 0.
        factor_decay: in [0, 1); H and a are bias-corrected exponential averages with this decay over steps; 0: this step's alone.
        curvature_every: H and a are renewed every so many steps, >= 1; in between nothing is recorded.
        fallback: what updates parameters that no curvature covers: "sgd" (warns once) or "error".

    lr, alpha, momentum, weight_decay and factor_decay are read from `param_groups` at every step, a layer's from
    its weight's group.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: from `step`, where gradients or records are missing or numbers are not finite; nothing has changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor],
        lr: float = 0.02,
        *,
        curvature: str | PCH = "pch-abs",
        alpha: float = 0.01,
        max_cg: int = 50,
        eps_cg: float = 1e-4,
        solver: str = "ea-cg",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        factor_decay: float = 0.9,
        curvature_every: int = 1,
        fallback: str = "sgd",
    ):
        checks: list[tuple[str, Any, bool, str]] = [
            ("lr", lr, lr >= 0, ">= 0"),
            ("alpha", alpha, 0 < alpha < 1, "in (0, 1)"),
            ("max_cg", max_cg, max_cg >= 1, ">= 1"),
            ("eps_cg", eps_cg, eps_cg >= 0, ">= 0"),
            ("solver", solver, solver in _SOLVERS, f"one of {', '.join(map(repr, _SOLVERS))}"),
            ("momentum", momentum, 0 <= momentum < 1, "in [0, 1)"),
            ("weight_decay", weight_decay, weight_decay >= 0, ">= 0"),
            ("factor_decay", factor_decay, 0 <= factor_decay < 1, "in [0, 1)"),
            ("curvature_every", curvature_every, curvature_every >= 1, ">= 1"),
        ]
        for name, value, valid, expected in checks:
            if not valid:
                raise ValueError(f"EACG: expected {name} {expected}, got {value!r}")
        self._curvature = curvature_by_name(curvature)
        defaults = {
            "lr": lr, "alpha": alpha, "momentum": momentum, "weight_decay": weight_decay, "factor_decay": factor_decay,
        }  # fmt: skip
        super().__init__(model, criterion, defaults, diagonal=self._curvature.diagonal, fallback=fallback)
        self._max_cg, self._eps_cg, self._truncated = max_cg, eps_cg, _SOLVERS[solver]
        self._curvature_every = curvature_every

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step from the gradients of the backward passes since the last one.

        Args:
            closure: evaluates the model anew and returns the loss; optional.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        factors = self._new_factors(self._records()) if self._tape.recording else {}
        self._update(factors)
        self._tape.clear()
        self._schedule()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every torch optimizer's."""
        super().load_state_dict(state_dict)
        self._schedule()

    def _schedule(self) -> None:
        """Has the next forward pass recorded if the next step renews the factors."""
        steps = max((self.state[layer.weight].get("step", 0) for layer in self._layers if layer.weight in self.state), default=0)
        self._tape.recording = steps % self._curvature_every == 0

    def _new_factors(self, records: list[LayerRecord]) -> dict[nn.Linear, tuple[Tensor, Tensor]]:
        """H and a of every recorded layer that has a gradient, averaged with the earlier ones."""
        hessians = self._curvature.bias_hessians(records)
        groups = self._groups()
        factors = {}
        for record in records:
            weight = record.layer.weight
            if weight.grad is None:
                continue
            hessian, state = hessians[record.layer], self.state.get(weight, {})
            mean_input = record.input().to(hessian.dtype).mean(0)
            if "bias_hessian" in state:
                # c_n = sum_k decay^(n-k) x_k / sum_k decay^(n-k), the bias-corrected average, from c_(n-1).
                decay, updates = groups[weight]["factor_decay"], state["factor_updates"] + 1
                share = (1 - decay) / (1 - decay**updates)
                hessian = torch.lerp(state["bias_hessian"], hessian, share)
                mean_input = torch.lerp(state["mean_input"], mean_input, share)
            factors[record.layer] = (hessian, mean_input)
        return factors

    def _update(self, factors: dict[nn.Linear, tuple[Tensor, Tensor]]) -> None:
        """Solves and updates all layers in one call, then commits every state; raises before anything has changed."""
        groups = self._groups()
        layers, curvatures, mean_inputs = [], [], []
        for layer in self._layers:
            state = self.state.get(layer.weight, {})
            if layer.weight.grad is not None and (layer in factors or "bias_hessian" in state):
                layers.append(layer)
                hessian, mean_input = factors.get(layer) or (state["bias_hessian"], state["mean_input"])
                curvatures.append(hessian)
                mean_inputs.append(mean_input)
        weights = [layer.weight for layer in layers]
        none = [weight.new_empty(0) for weight in weights]
        biases = [
            e if layer.bias is None or layer.bias.grad is None else layer.bias for layer, e in zip(layers, none, strict=True)
        ]
        own = [groups[weight] for weight in weights]
        momenta: tuple[list[Tensor], list[Tensor]] = ([], [])
        if any(group["momentum"] != 0 for group in own):
            momenta = ([self._momentum(p) for p in weights], [self._momentum(p) for p in biases])

        others = self._uncovered({*weights, *biases})
        if layers:
            iterations = ops.eacg_update_(
                curvatures,
                mean_inputs,
                [weight.grad for weight in weights],  # type: ignore[misc]
                [e if bias is e else bias.grad for bias, e in zip(biases, none, strict=True)],  # type: ignore[misc]
                weights,
                biases,
                *momenta,
                [float(group["lr"]) for group in own],
                [float(group["alpha"]) for group in own],
                [float(group["momentum"]) for group in own],
                [float(group["weight_decay"]) for group in own],
                self._max_cg,
                self._eps_cg,
                self._truncated,
            )
            if (iterations < 0).any():
                raise RuntimeError(self._not_finite([layers[i] for i in (iterations < 0).nonzero().flatten().tolist()], factors))

        self._fallback_update(others)
        for layer in layers:
            state = self.state[layer.weight]
            state["step"] = state.get("step", 0) + 1
            if layer in factors:
                state["bias_hessian"], state["mean_input"] = factors[layer]
                state["factor_updates"] = state.get("factor_updates", 0) + 1
        for parameters, buffers in zip((weights, biases), momenta, strict=True):
            for parameter, buffer in zip(parameters, buffers, strict=False):
                if buffer.numel():
                    self.state[parameter]["momentum"] = buffer

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state.get(parameter, {})
        return state["momentum"] if "momentum" in state else torch.zeros_like(parameter)

    def _not_finite(self, layers: list[nn.Linear], factors: dict[nn.Linear, tuple[Tensor, Tensor]]) -> str:
        """Says which layers' steps are not finite, and why."""
        parts = []
        if any(not torch.isfinite(loss.loss) for loss in self._tape.losses):
            parts.append("the loss itself is not finite")
        for layer in layers:
            hessian, mean_input = factors.get(layer, (None, None))
            tensors = {"weight gradient": layer.weight.grad, "mean input": mean_input, "bias Hessian": hessian}
            if layer.bias is not None:
                tensors["bias gradient"] = layer.bias.grad
            bad = [name for name, tensor in tensors.items() if tensor is not None and not torch.isfinite(tensor).all()]
            parts.append(
                f"layer {self._layers[layer]!r}: "
                + (f"NaN or inf in its {' and '.join(bad)}" if bad else "the solution overflows")
            )
        return (
            f"EACG.step(): {'; '.join(parts)}. No parameter and no state has changed; skip this batch, or lower lr "
            "or raise alpha if the training has diverged."
        )
