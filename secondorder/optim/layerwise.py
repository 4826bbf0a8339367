"""The machine that EACG, KFAC, KFRA and KFLR share: any curvature, any solver, fixed or adapted step sizes."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secondorder import ops, solvers
from secondorder.curvature import Curvature, curvature_by_name
from secondorder.damping import Adaptation, LocalLoss, Step, best_step
from secondorder.optim.base import CurvatureOptimizer
from secondorder.solvers import SOLVERS, Factors
from secondorder.tape import LayerRecord

# As they stand in a weight's state.
_FACTORS = ("bias_hessian", "mean_input", "input_second_moment", "mean_square_input")


class LayerwiseOptimizer(CurvatureOptimizer):
    """Damped Newton steps layer by layer, from a curvature and a solver.

    With a learning rate, V <- momentum V + P, W <- (1 - lr weight_decay) W + lr V, likewise for b, where P and d solve the
    layer's systems with scale 1 - alpha and damping alpha (`secondorder.solvers`).

    With lr=None the step is delta = c P + c' (previous delta), c and c' minimising the quadratic model of the regularised loss,
    in which weight_decay is eta (`secondorder.damping`). Every step's loss is compared with what the model predicted, on the
    same subsample; where it has not fallen, the step is taken back and tried with a larger damping, without the previous delta.
    If that does not help either, the parameters stay as they were for this step.

    Args:
        model: any module; its nn.Linear layers are covered.
        criterion: a module, or a function (output, target) -> scalar loss to be called as `optimizer.criterion`.
        lr: step size, >= 0, or None.
        curvature: a name of `secondorder.curvature.CURVATURES`, or a `Curvature`.
        solver: a name of `secondorder.solvers.SOLVERS`.
        alpha: damping of a fixed lr, in (0, 1).
        max_cg: conjugate gradient solvers do at most so many iterations, >= 1.
        eps_cg: and stop at this residual, relative to the first one, >= 0.
        momentum: in [0, 1); with a fixed lr.
        weight_decay: >= 0; decoupled with a fixed lr.
        factor_decay: in [0, 1); the factors are bias-corrected exponential averages with this decay; 0: this step's alone.
        curvature_every: the factors are renewed every so many steps, >= 1, and at each of the first so many.
        curvature_samples: of every forward pass at most so many instances, evenly spaced, enter the expectations that cost more
            than a pass over the batch: E[d1 d1^T] and the diagonal of the recursion, delta delta^T, E[h h^T]. >= 1; None: all.
        inverse_every: likewise the solver's factorisations.
        max_factor_elements: "kfi" takes Eq. 13 instead of Eq. 12 for a layer with n_in^2 above this, >= 0.
        adaptation: the dampings of lr=None.
        subsample: the fraction of the batch that lr=None evaluates the model on, in (0, 1].
        average: whether averages of the parameters are kept, for `averaged_parameters`.
        fallback: what updates parameters that no curvature covers: "sgd" (warns once) or "error". With lr=None they are part of
            the quadratic model, with -g as their direction, scaled as the covered parameters' directions are on the whole.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: from `step`, where gradients or records are missing or numbers are not finite; nothing has changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor],
        lr: float | None,
        *,
        curvature: str | Curvature,
        solver: str,
        alpha: float,
        max_cg: int,
        eps_cg: float,
        momentum: float,
        weight_decay: float,
        factor_decay: float,
        curvature_every: int,
        curvature_samples: int | None,
        inverse_every: int,
        max_factor_elements: int,
        adaptation: Adaptation,
        subsample: float,
        average: bool,
        fallback: str,
    ):
        checks: list[tuple[str, Any, bool, str]] = [
            ("max_cg", max_cg, max_cg >= 1, ">= 1"),
            ("eps_cg", eps_cg, eps_cg >= 0, ">= 0"),
            ("solver", solver, solver in SOLVERS, f"one of {', '.join(map(repr, SOLVERS))}"),
            ("curvature_every", curvature_every, curvature_every >= 1, ">= 1"),
            ("curvature_samples", curvature_samples, curvature_samples is None or curvature_samples >= 1, ">= 1 or None"),
            ("inverse_every", inverse_every, inverse_every >= 1, ">= 1"),
            ("max_factor_elements", max_factor_elements, max_factor_elements >= 0, ">= 0"),
            ("damping", adaptation.tau, 0 < adaptation.tau < math.inf, "> 0"),
            ("subsample", subsample, 0 < subsample <= 1, "in (0, 1]"),
        ]
        for name, value, valid, expected in checks:
            if not valid:
                raise ValueError(f"{type(self).__name__}: expected {name} {expected}, got {value!r}")
        self._curvature = curvature_by_name(curvature)
        self._adaptation = None if lr is not None else adaptation
        defaults: dict[str, Any] = {
            "lr": lr, "alpha": alpha, "momentum": momentum, "weight_decay": weight_decay, "factor_decay": factor_decay,
        }  # fmt: skip
        if self._adaptation is not None:
            # Kept in the groups, so that they are part of the state_dict; None: to be set by the first step.
            defaults |= {"tau": None, "least_tau": None, "gamma": None, "rho": None}
        super().__init__(
            model, criterion, defaults, diagonal=self._curvature.diagonal, fallback=fallback,
            grad_outputs=self._curvature.grad_outputs, columns=self._curvature.columns, keep_inputs=lr is None,
            samples=curvature_samples,
        )  # fmt: skip
        self._model = model
        self._solver = SOLVERS[solver](max_cg, eps_cg, max_factor_elements)
        self._curvature_every, self._inverse_every = curvature_every, inverse_every
        self._samples, self._subsample, self._average = curvature_samples, subsample, average

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
        records = self._records() if self._tape.recording else []
        factors = self._new_factors(records) if _due(self._steps(), self._curvature_every) else {}
        if self._adaptation is not None:
            self._adaptive_update(factors, self._adaptation)
        elif isinstance(self._solver, solvers.EACG):
            self._fused_update(factors, self._solver)
        else:
            self._update(factors)
        if self._average:
            self._update_averages()
        self._tape.clear(release=True)
        self._schedule()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every torch optimizer's."""
        super().load_state_dict(state_dict)
        self._schedule()

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Within it the model's parameters are their averages over the steps (Botev et al., Eq. 44, 45); not for training.

            average <- beta_t average + (1 - beta_t) theta_t,   beta_t = min(0.95, 1 - 1/t).

        Raises:
            RuntimeError: the optimizer was made with average=False.
        """
        if not self._average:
            raise RuntimeError(f"{type(self).__name__}.averaged_parameters(): expected an optimizer made with average=True")
        averaged = [p for group in self.param_groups for p in group["params"] if "average" in self.state.get(p, {})]
        own = [p.detach().clone() for p in averaged]
        try:
            with torch.no_grad():
                for p in averaged:
                    p.copy_(self.state[p]["average"])
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(averaged, own, strict=True):
                    p.copy_(value)

    def _update_averages(self) -> None:
        beta = min(0.95, 1 - 1 / self._steps())
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["average"] = state["average"].lerp_(p, 1 - beta) if "average" in state else p.detach().clone()

    def _steps(self) -> int:
        return max((state.get("step", 0) for state in self.state.values()), default=0)

    def _schedule(self) -> None:
        """Has the next forward pass recorded if the next step renews the factors, or evaluates the model anew."""
        self._tape.recording = self._adaptation is not None or _due(self._steps(), self._curvature_every)

    def _new_factors(self, records: list[LayerRecord]) -> dict[nn.Linear, Factors]:
        """H and the input's statistics of every recorded layer that has a gradient, averaged with the earlier ones."""
        hessians = self._curvature.bias_hessians(records)
        groups = self._groups()
        factors = {}
        averages: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for record in records:
            weight = record.layer.weight
            group = groups.get(weight)
            if weight.grad is None or group is None:
                continue
            hessian, state = hessians[record.layer], self.state.get(weight, {})
            input = record.input().to(hessian.dtype)
            sample = input if self._samples is None else record.input(self._samples).to(hessian.dtype)
            new = factors[record.layer] = {"bias_hessian": hessian, **self._solver.statistics(input, sample)}
            if "bias_hessian" in state:
                # c_n = sum_k decay^(n-k) x_k / sum_k decay^(n-k), the bias-corrected average, from c_(n-1).
                decay, updates = group["factor_decay"], state["factor_updates"] + 1
                old, news = averages.setdefault(1 - (1 - decay) / (1 - decay**updates), ([], []))
                old += [state[name] for name in new]
                news += new.values()
        for share, (old, news) in averages.items():
            torch._foreach_lerp_(news, old, share)  # the old ones stay: the step may fail yet
        return factors

    def _covered(self, factors: dict[nn.Linear, Factors]) -> dict[nn.Linear, Factors]:
        """The layers to be updated, with their factors, new or old."""
        covered = dict(factors)
        if len(factors) < len(self._layers):
            groups = self._groups()
            for layer in self._layers:
                state = self.state.get(layer.weight, {})
                if layer not in factors and layer.weight in groups and layer.weight.grad is not None and "bias_hessian" in state:
                    covered[layer] = {name: state[name] for name in _FACTORS if name in state}
        return covered

    def _directions(
        self,
        covered: dict[nn.Linear, Factors],
        grads: dict[Tensor, Tensor],
        scale: float | None = None,
        damping: float | None = None,
        fresh: bool = False,
    ) -> tuple[dict[Tensor, Tensor], dict[nn.Linear, Factors]]:
        """P and d of every covered layer by parameter, and what the solver prepared for it.

        Args:
            covered: the layers, with their factors.
            grads: the gradients by parameter.
            scale: as the solver's; None: by the alpha of the weight's group.
            damping: likewise.
            fresh: prepare in any case, not only every `inverse_every` steps.

        Raises:
            RuntimeError: a direction is not finite.
        """
        groups, directions, prepared, bad = self._groups(), {}, {}, []
        for layer, factors in covered.items():
            weight, bias, state = layer.weight, layer.bias, self.state.get(layer.weight, {})
            alpha = groups[weight]["alpha"]
            try:
                ready = state.get("prepared")
                if fresh or ready is None or _due(state["step"], self._inverse_every):
                    ready = self._solver.prepare(
                        factors, 1 - alpha if scale is None else scale, alpha if damping is None else damping
                    )
                p, d = self._solver.solve(ready, grads[weight], grads.get(bias) if bias is not None else None)
            except RuntimeError as error:
                bad.append((layer, str(error)))
                continue
            prepared[layer], directions[weight] = ready, p
            if d is not None:
                directions[bias] = d
        if not all_finite(list(directions.values())):
            own = {layer: [directions[p] for p in layer.parameters(recurse=False) if p in directions] for layer in prepared}
            bad += [(layer, "the solution overflows") for layer, tensors in own.items() if not all_finite(tensors)]
        if bad:
            raise RuntimeError(self._not_finite(dict(bad), covered))
        return directions, prepared

    def _update(self, factors: dict[nn.Linear, Factors]) -> None:
        """A step of fixed size by any solver; raises before anything has changed."""
        groups, covered = self._groups(), self._covered(factors)
        grads = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        directions, prepared = self._directions(covered, grads)
        self._fallback_update(self._uncovered(set(directions)))
        for p, direction in directions.items():
            group = groups[p]
            if group["momentum"] != 0:
                direction = self.state[p]["momentum"] = self._momentum(p).mul_(group["momentum"]).add_(direction)
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=group["lr"])
        self._commit(covered, factors, prepared)

    def _fused_update(self, factors: dict[nn.Linear, Factors], solver: solvers.EACG) -> None:
        """Solves and updates all layers in one call, then commits every state; raises before anything has changed."""
        groups, covered = self._groups(), self._covered(factors)
        layers = list(covered)
        weights = [layer.weight for layer in layers]
        own = [groups[weight] for weight in weights]
        biases: list[Tensor] = []
        bias_grads: list[Tensor] = []
        for layer, weight in zip(layers, weights, strict=True):
            bias: Tensor | None = layer.bias
            if bias is None or bias.grad is None:
                bias = weight.new_empty(0)
            biases.append(bias)
            bias_grads.append(bias if bias.grad is None else bias.grad)
        momenta: tuple[list[Tensor], list[Tensor]] = ([], [])
        if any(group["momentum"] != 0 for group in own):
            momenta = ([self._momentum(p) for p in weights], [self._momentum(p) for p in biases])

        others = self._uncovered({*weights, *biases})
        if layers:
            iterations = ops.eacg_update_(
                [each["bias_hessian"] for each in covered.values()],
                [each["mean_input"] for each in covered.values()],
                [weight.grad for weight in weights],  # type: ignore[misc]
                bias_grads,
                weights,
                biases,
                *momenta,
                [float(group["lr"]) for group in own],
                [float(group["alpha"]) for group in own],
                [float(group["momentum"]) for group in own],
                [float(group["weight_decay"]) for group in own],
                solver.max_cg,
                solver.eps_cg,
                solver.truncated,
            )
            if (iterations < 0).any():
                bad = {layers[i]: "the solution overflows" for i in (iterations < 0).nonzero().flatten().tolist()}
                raise RuntimeError(self._not_finite(bad, covered))

        self._fallback_update(others)
        self._commit(covered, factors, {})
        for parameters, buffers in zip((weights, biases), momenta, strict=True):
            for parameter, buffer in zip(parameters, buffers, strict=False):
                if buffer.numel():
                    self.state[parameter]["momentum"] = buffer

    def _adaptive_update(self, factors: dict[nn.Linear, Factors], rule: Adaptation) -> None:
        """A step whose size the quadratic model gives, checked before the parameters see it."""
        covered, group, steps = self._covered(factors), self.param_groups[0], self._steps()
        eta = {p: float(each["weight_decay"]) for each in self.param_groups for p in each["params"]}
        grads = {
            p: p.grad if eta[p] == 0 else p.grad.add(p, alpha=eta[p])
            for each in self.param_groups for p in each["params"] if p.grad is not None
        }  # fmt: skip
        others = [p for p, *_ in self._uncovered({p for layer in covered for p in layer.parameters(recurse=False)})]
        local = LocalLoss(
            self._model, self.criterion, self._tape.losses, {p: self._parameter_names[p] for p in grads}, self._subsample, steps,
            self._tape,
        )  # fmt: skip
        if not math.isfinite(local.start):
            raise RuntimeError(self._not_finite({}, covered))
        tau, least_tau, gamma = group["tau"], group["least_tau"], group["gamma"]
        if tau is None:
            scale = max(abs(local.start), torch.finfo(torch.float32).tiny)
            tau, gamma = rule.tau * scale, None if rule.gamma is None else rule.gamma * scale
            least_tau = rule.floor * tau
        previous: list[Tensor] | None = None
        if rule.momentum and all("momentum" in self.state.get(p, {}) for p in grads):
            previous = [self.state[p]["momentum"] for p in grads]

        def proposal(tau: float, gamma: float | None, fresh: bool) -> tuple[Step, dict[nn.Linear, Factors]]:
            # The solvers know one damping for all layers: eta is the first group's.
            damping = (tau if gamma is None else gamma) + float(group["weight_decay"])
            directions, prepared = self._directions(covered, grads, 1.0, damping, fresh)
            if others:
                gain = _norm(directions.values()) / max(_norm(grads[p] for p in directions), torch.finfo(torch.float32).tiny)
                directions |= {p: -grads[p] * gain for p in others}
            vectors = [[directions[p] for p in grads]] + ([] if previous is None else [previous])
            return best_step(local, list(grads.values()), vectors, tau, [eta[p] for p in grads]), prepared

        rho = None
        for attempt in range(rule.tries + 1):
            choose = gamma is not None and attempt == 0 and steps % rule.gamma_every == rule.gamma_every - 1
            step, prepared = proposal(tau, gamma, fresh=choose or attempt > 0)
            if choose:
                factor = rule.omega**rule.gamma_every
                choices = [(step, prepared, gamma)]
                choices += [(*proposal(tau, g, fresh=True), g) for g in (gamma * factor, gamma / factor)]
                step, prepared, gamma = min(choices, key=lambda choice: choice[0].predicted)
            if not step.predicted < 0:  # no gradient to follow
                step.delta = [torch.zeros_like(p) for p in grads]
                break
            moved = [p + d for p, d in zip(local.here, step.delta, strict=True)]
            # How far the loss is off its model, on the subsample, is an estimate of the same for the whole batch.
            excess = local.value(moved) - local.start - step.modelled
            rho = (step.undamped + excess) / step.predicted
            if math.isfinite(rho) and rho > 0 and all_finite(moved):
                break
            previous, rho = None, None
            tau *= 4
            gamma = None if gamma is None else 4 * gamma
        else:
            step.delta = [torch.zeros_like(p) for p in grads]
            prepared = {}

        if rho is not None and steps % rule.every == rule.every - 1:
            tau = max(rule.adapted(tau, rho), least_tau)
        for each in self.param_groups:
            each.update(tau=tau, least_tau=least_tau, gamma=gamma, rho=rho)
        for p, delta in zip(grads, step.delta, strict=True):
            p.add_(delta)
            if rule.momentum:
                self.state[p]["momentum"] = delta
        self._commit(covered, factors, prepared)

    def _commit(
        self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], prepared: dict[nn.Linear, Factors]
    ) -> None:
        for layer in covered:
            state = self.state[layer.weight]
            state["step"] = state.get("step", 0) + 1
            if layer in factors:
                state.update(factors[layer])
                state["factor_updates"] = state.get("factor_updates", 0) + 1
            if self._inverse_every > 1 and layer in prepared:
                state["prepared"] = prepared[layer]

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state.get(parameter, {})
        return state["momentum"] if "momentum" in state else torch.zeros_like(parameter)

    def _not_finite(self, layers: dict[nn.Linear, str], covered: dict[nn.Linear, Factors]) -> str:
        """Says which layers' steps are not finite, and why."""
        parts = []
        if not layers or any(not torch.isfinite(loss.loss) for loss in self._tape.losses):
            parts.append("the loss itself is not finite")
        for layer, reason in layers.items():
            tensors = {"weight gradient": layer.weight.grad}
            tensors |= {name.replace("_", " ").replace("hessian", "Hessian"): factor for name, factor in covered[layer].items()}
            if layer.bias is not None:
                tensors["bias gradient"] = layer.bias.grad
            bad = [name for name, tensor in tensors.items() if tensor is not None and not torch.isfinite(tensor).all()]
            parts.append(f"layer {self._layers[layer]!r}: " + (f"NaN or inf in its {' and '.join(bad)}" if bad else reason))
        return (
            f"{type(self).__name__}.step(): {'; '.join(parts)}. No parameter and no state has changed; skip this batch, or "
            "lower lr or raise alpha if the training has diverged."
        )


def _due(steps: int, every: int) -> bool:
    """Whether what is renewed every so many steps is renewed now; at first, when it changes fastest, at every step."""
    return steps < every or steps % every == 0


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no tensor holds NaN or inf, nor so large numbers that their sum does; waits for the device once."""
    return bool(torch.stack([t.sum() for t in tensors]).isfinite().all()) if tensors else True


def _norm(tensors: Any) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))
