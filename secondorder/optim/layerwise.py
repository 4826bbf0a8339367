"""The machine that EACG, KFAC, KFRA and KFLR share: any curvature, any solver, fixed or adapted step sizes."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn

from secondorder import ops, solvers
from secondorder.activations import cast, wide
from secondorder.curvature import Curvature, curvature_by_name
from secondorder.damping import Adaptation, LocalLoss, Step, Watch, best_step
from secondorder.distributed import Ranks, Term
from secondorder.errors import NonFiniteError
from secondorder.optim.base import CurvatureOptimizer
from secondorder.solvers import SOLVERS, Factors
from secondorder.tape import LayerRecord, parameters_of

Groups = dict[Tensor, dict[str, Any]]  # the param_group of every parameter

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
        **options: `maximize`, `decoupled_weight_decay` and `nonfinite`, see `CurvatureOptimizer`.

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
        **options: Any,
    ):
        checks: list[tuple[str, Any, bool, str]] = [
            ("max_cg", max_cg, max_cg >= 1, ">= 1"),
            ("eps_cg", eps_cg, eps_cg >= 0, ">= 0"),
            ("solver", solver, solver in SOLVERS, f"one of {', '.join(map(repr, SOLVERS))}"),
            ("curvature_every", curvature_every, curvature_every >= 1, ">= 1"),
            ("curvature_samples", curvature_samples, curvature_samples is None or curvature_samples >= 1, ">= 1 or None"),
            ("inverse_every", inverse_every, inverse_every >= 1, ">= 1"),
            ("max_factor_elements", max_factor_elements, max_factor_elements >= 0, ">= 0"),
            ("damping", adaptation.tau, adaptation.tau is None or 0 < adaptation.tau < math.inf, "> 0"),
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
            defaults |= {"tau": None, "watch": None, "gamma": None, "rho": None}
        super().__init__(
            model, criterion, defaults, diagonal=self._curvature.diagonal, fallback=fallback,
            grad_outputs=self._curvature.grad_outputs, columns=self._curvature.columns, keep_inputs=lr is None,
            samples=curvature_samples, **options,
        )  # fmt: skip
        self._curvature_name = f"{curvature} by {solver}"
        self._solver = SOLVERS[solver](max_cg, eps_cg, max_factor_elements)
        self._curvature_every, self._inverse_every = curvature_every, inverse_every
        self._samples, self._subsample, self._average = curvature_samples, subsample, average

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses a scheduler at its construction, where there is no learning rate: all put a counter around `step` then."""
        if name == "step" and self._adaptation is not None and any("initial_lr" in group for group in self.param_groups):
            for group in self.param_groups:
                group.pop("initial_lr", None)  # the scheduler's
            raise ValueError(
                f"{type(self).__name__}: with lr=None there is no learning rate for a scheduler: the step size is found anew at "
                "every step; make no scheduler, or give lr a number"
            )
        super().__setattr__(name, value)

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
        self._check_schedule()
        with self._whole_or_nothing() as taken:
            if taken:
                records: list[LayerRecord] = []
                if self._tape.recording:
                    records = self._records() if self._ranks is None else self._ranks.all(self._records)
                groups = self._groups()
                factors = self._new_factors(records, groups) if self._renewing() else {}
                covered = self._covered(factors, groups)
                if self._adaptation is not None:
                    self._adaptive_update(covered, factors, groups, self._adaptation)
                elif isinstance(self._solver, solvers.EACG) and self._fusible(covered, groups):
                    self._fused_update(covered, factors, groups, self._solver)
                else:
                    self._update(covered, factors, groups)
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
                own = p.detach().to(wide(p.dtype), copy=True)
                state["average"] = state["average"].lerp_(own, 1 - beta) if "average" in state else own

    def _check_schedule(self) -> None:
        """Whether lr is given where it was at construction."""
        name = type(self).__name__
        for group in self.param_groups:
            if (group["lr"] is None) != (self._adaptation is not None):
                raise ValueError(
                    f"{name}.step(): expected lr to stay {'None' if self._adaptation else 'a number'}, as at construction, got "
                    f"{group['lr']!r}"
                )

    def _steps(self) -> int:
        return max((state.get("step", 0) for state in self.state.values()), default=0)

    def _renewing(self) -> bool:
        """Whether the next step, or the one being taken, renews the factors."""
        return self._curvature_every == 1 or _due(self._steps(), self._curvature_every)

    def _schedule(self) -> None:
        """Has the next forward pass recorded if the next step renews the factors, or evaluates the model anew."""
        self._tape.recording = self._adaptation is not None or self._renewing()

    def _new_factors(self, records: list[LayerRecord], groups: Groups) -> dict[nn.Linear, Factors]:
        """H and the input's statistics of every recorded layer that has a gradient, averaged with the earlier ones."""
        trained = [record for record in records if record.weight.grad is not None and record.weight in groups]
        if self._ranks is None:
            hessians = self._curvature.bias_hessians(records)
            statistics = self._statistics(trained)
        else:
            hessians, statistics = self._averaged_factors(records, trained, self._ranks)
        factors = {}
        averages: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for record in trained:
            weight = record.weight
            group, state = groups[weight], self.state.get(weight, {})
            new = factors[record.layer] = {"bias_hessian": hessians[record.layer], **statistics[record.layer]}
            if "bias_hessian" in state:
                # c_n = sum_k decay^(n-k) x_k / sum_k decay^(n-k), the bias-corrected average, from c_(n-1).
                decay, updates = group["factor_decay"], state["factor_updates"] + 1
                old, news = averages.setdefault(1 - (1 - decay) / (1 - decay**updates), ([], []))
                old += [state[name] for name in new]
                news += new.values()
        for share, (old, news) in averages.items():
            ops.average_(news, old, share)  # the old ones stay: the step may fail yet
        return factors

    def _statistics(self, records: list[LayerRecord]) -> dict[nn.Linear, Factors]:
        if any(len(record.calls) > 1 or record.calls[0].input.dtype != record.dtype for record in records):
            # Inputs are joined or cast by copies, of which there should be one layer's at a time.
            return {record.layer: self._statistics_of([record])[0] for record in records}
        return dict(zip([record.layer for record in records], self._statistics_of(records), strict=True))

    def _statistics_of(self, records: list[LayerRecord]) -> list[Factors]:
        inputs = [cast(record.input(), record.dtype) for record in records]
        if self._samples is None:
            return self._solver.statistics(inputs, inputs)
        return self._solver.statistics(
            inputs, [cast(record.input(self._samples), h.dtype) for record, h in zip(records, inputs, strict=True)]
        )

    def _averaged_factors(
        self, records: list[LayerRecord], trained: list[LayerRecord], ranks: Ranks
    ) -> tuple[dict[nn.Linear, Tensor], dict[nn.Linear, Factors]]:
        """Bias Hessians and statistics of the inputs over the batches of all ranks."""
        local: list[tuple[nn.Linear, bool, str]] = []

        def terms() -> list[Term]:
            found = []
            for record in records:
                for term in self._curvature.local(record):
                    local.append((record.layer, False, term.name))
                    found.append(term._replace(name=f"{self._layers[record.layer]}: {term.name}"))
            for record in trained:
                for name, value in self._statistics_of([record])[0].items():
                    local.append((record.layer, True, name))
                    found.append(Term(f"{self._layers[record.layer]}: {name}", value, len(record.input())))
            return found

        averaged: dict[nn.Linear, dict[str, Tensor]] = {record.layer: {} for record in records}
        statistics: dict[nn.Linear, Factors] = {record.layer: {} for record in trained}
        for (layer, is_statistic, name), value in zip(local, ranks.average(terms), strict=True):
            (statistics if is_statistic else averaged)[layer][name] = value
        return self._curvature.bias_hessians(records, averaged), statistics

    def _covered(self, factors: dict[nn.Linear, Factors], groups: Groups) -> dict[nn.Linear, Factors]:
        """The layers to be updated, with their factors, new or old."""
        covered = dict(factors)
        if len(factors) < len(self._layers):
            for layer in self._layers:
                state = self.state.get(layer.weight, {})
                if layer not in factors and layer.weight in groups and layer.weight.grad is not None and "bias_hessian" in state:
                    covered[layer] = {name: state[name] for name in _FACTORS if name in state}
        return covered

    def _directions(
        self,
        covered: dict[nn.Linear, Factors],
        groups: Groups,
        grads: dict[Tensor, Tensor],
        scale: float | None = None,
        damping: float | None = None,
        fresh: bool = False,
    ) -> tuple[dict[Tensor, Tensor], dict[nn.Linear, Factors]]:
        """P and d of every covered layer by parameter, and what the solver prepared for it.

        Args:
            covered: the layers, with their factors.
            groups: the param_groups by parameter.
            grads: the gradients by parameter.
            scale: as the solver's; None: by the alpha of the weight's group.
            damping: likewise.
            fresh: prepare in any case, not only every `inverse_every` steps.

        Raises:
            RuntimeError: a direction is not finite.
        """
        directions, prepared, bad = {}, {}, []
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
            raise NonFiniteError(self._not_finite(dict(bad), covered))
        return directions, prepared

    def _update(self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], groups: Groups) -> None:
        """A step of fixed size by any solver; raises before anything has changed."""
        gradients = self._gradients()
        directions, prepared = self._directions(covered, groups, gradients)
        others = self._uncovered(gradients, list(directions))
        velocities = {p: self._velocity(p, direction, groups[p]) for p, direction in directions.items()}
        bad = {
            layer: "the solution overflows" for layer in covered for p in layer.parameters(recurse=False)
            if p in velocities and not self._bounded(p, velocities[p], groups[p])
        }  # fmt: skip
        if bad:
            raise NonFiniteError(self._not_finite(bad, covered))
        self._fallback_update(others)
        for p, velocity in velocities.items():
            self._apply(p, velocity, groups[p])
        self._commit(covered, factors, prepared)

    def _fused_update(
        self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], groups: Groups, solver: solvers.EACG
    ) -> None:
        """Solves and updates all layers in one call, then commits every state; raises before anything has changed."""
        gradients = self._gradients()
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        grad_biases: list[Tensor] = []
        for weight, bias in map(parameters_of, covered):
            grad_bias = None if bias is None else gradients.get(bias)
            weights.append(weight)
            biases.append(weight.new_empty(0) if bias is None or grad_bias is None else bias)
            grad_biases.append(biases[-1] if grad_bias is None else grad_bias)
        own = [groups[weight] for weight in weights]
        momenta: tuple[list[Tensor], list[Tensor]] = ([], [])
        started: dict[Tensor, Tensor] = {}  # momenta that are new
        if any(group["momentum"] != 0 for group in own):
            momenta = (self._momenta(weights, started), self._momenta(biases, started))

        others = self._uncovered(gradients, [*weights, *biases])
        if covered:
            iterations = ops.eacg_update_(
                [each["bias_hessian"] for each in covered.values()],
                [each["mean_input"] for each in covered.values()],
                [gradients[weight] for weight in weights],
                grad_biases,
                weights,
                biases,
                *momenta,
                [float(group["lr"]) for group in own],
                [float(group["alpha"]) for group in own],
                [float(group["momentum"]) for group in own],
                [float(group["weight_decay"]) if group["decoupled_weight_decay"] else 0.0 for group in own],
                solver.max_cg,
                solver.eps_cg,
                solver.truncated,
            )
            bad = [layer for layer, count in zip(covered, iterations.tolist(), strict=True) if count < 0]
            if bad:
                raise NonFiniteError(self._not_finite(dict.fromkeys(bad, "the solution overflows"), covered))

        self._fallback_update(others)
        self._commit(covered, factors, {})
        for parameter, buffer in started.items():
            self.state[parameter]["momentum"] = buffer

    def _adaptive_update(
        self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], groups: Groups, rule: Adaptation
    ) -> None:
        """A step whose size the quadratic model gives, checked before the parameters see it."""
        group, steps = self.param_groups[0], self._steps()
        eta = {p: float(each["weight_decay"]) for p, each in groups.items()}
        grads = self._gradients(coupled=True)
        others = [p for p, *_ in self._uncovered(grads, [p for layer in covered for p in layer.parameters(recurse=False)])]
        local = LocalLoss(
            self._model, self.criterion, self._tape.losses, {p: self._parameter_names[p] for p in grads}, self._subsample, steps,
            self._tape, self._ranks,
        )  # fmt: skip
        if not math.isfinite(local.start):
            raise NonFiniteError(self._not_finite({}, covered))
        tau, watch, gamma, rising = group["tau"], group["watch"], group["gamma"], False
        if tau is None:
            scale = max(abs(local.start), torch.finfo(torch.float32).tiny)
            tau, gamma = rule.start(local.instances) * scale, None if rule.gamma is None else rule.gamma * scale
            watch = (rule.floor * tau, rule.floor * tau, local.start, local.start)
        elif rule.floor > 0:
            seen, rising = Watch(*watch).seen(local.start, tau)
            tau, watch = max(tau, seen.floor), astuple(seen)
        previous: list[Tensor] | None = None
        if rule.momentum and not rising and all("momentum" in self.state.get(p, {}) for p in grads):
            previous = [self.state[p]["momentum"] for p in grads]

        def proposal(tau: float, gamma: float | None, fresh: bool) -> tuple[Step, dict[nn.Linear, Factors]]:
            # The solvers know one damping for all layers: eta is the first group's.
            damping = (tau if gamma is None else gamma) + float(group["weight_decay"])
            directions, prepared = self._directions(covered, groups, grads, 1.0, damping, fresh)
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
            moved = [(p + d).to(p.dtype) for p, d in zip(local.here, step.delta, strict=True)]
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
            tau = max(rule.adapted(tau, rho), watch[1])
        for each in self.param_groups:
            each.update(tau=tau, watch=watch, gamma=gamma, rho=rho)
        for p, delta in zip(grads, step.delta, strict=True):
            p.add_(delta)
            if rule.momentum:
                self.state[p]["momentum"] = delta
        self._commit(covered, factors, prepared)

    def _fusible(self, layers: Iterable[nn.Linear], groups: Groups) -> bool:
        """Whether `ops.eacg_update_` knows all that the groups ask for."""

        def numbers(p: Tensor) -> list[Any]:
            return [groups[p][key] for key in ("lr", "momentum", "weight_decay", "decoupled_weight_decay")]

        several = len(self.param_groups) > 1
        for weight, bias in map(parameters_of, layers):
            if weight.dtype is torch.bfloat16 or (several and bias in groups and numbers(bias) != numbers(weight)):
                return False
        return True

    def _commit(
        self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], prepared: dict[nn.Linear, Factors]
    ) -> None:
        for layer in covered:
            weight, _ = parameters_of(layer)
            state = self.state[weight]
            state["step"] = state.get("step", 0) + 1
            if layer in factors:
                state.update(factors[layer])
                state["factor_updates"] = state.get("factor_updates", 0) + 1
            if self._inverse_every > 1 and layer in prepared:
                state["prepared"] = prepared[layer]

    def _momenta(self, parameters: list[Tensor], started: dict[Tensor, Tensor]) -> list[Tensor]:
        """Their buffers; `started` gets the new ones, but for those of the empty tensors that stand for no bias."""
        buffers = []
        for p in parameters:
            buffer = self.state.get(p, {}).get("momentum")
            if buffer is None:
                buffer = torch.zeros_like(p)
                if p.numel():
                    started[p] = buffer
            buffers.append(buffer)
        return buffers

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
