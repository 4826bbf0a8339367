"""KBFGS: a Kronecker-factored quasi-Newton method (Goldfarb, Ren & Bahamou, 2020)."""

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secondorder._random import RandomState
from secondorder._tensors import host_numbers, outside_inference_mode
from secondorder._warnings import warn
from secondorder.errors import NonFiniteError
from secondorder.optim._amp import outside_autocast
from secondorder.optim._closure import NEEDED
from secondorder.optim._kbfgs.closure_pass import ClosurePass
from secondorder.optim._kbfgs.factors import COUNTS, QuasiNewtonOptimizer
from secondorder.optim._kbfgs.inputs import InputMoments
from secondorder.optim._kbfgs.layer import (
    averaged_gradient,
    bounded,
    columns,
    damping_of,
    trained_parameters,
)
from secondorder.optim._kbfgs.trials import Trials
from secondorder.optim._numbers import NUMBERS, Numbers, check_arguments, check_flags
from secondorder.optim._recorded import check_instances

_INPUT_INVERSES = ("hessian-action", "exact")
# pairs -> the operators' arguments `damped` and `bounded`.
_PAIRS = {"damped": (True, False), "damped-bounded": (True, True), "bounded": (False, True)}


class KBFGS(QuasiNewtonOptimizer):
    """Trains the linear layers of a model by K-BFGS: BFGS estimates of both Kronecker factors of each inverse Hessian.

    For each layer z = W h + b let [W | b] [n_out, n_in + 1] be its parameters, and let h end in a 1; a layer without a bias has
    neither. A step is

        M <- decay M + (1 - decay) (gradient of the loss + weight_decay [W | b])
        [W | b] <- [W | b] - lr H_g M H_a / c                                              Eq. 4
        s <- decay s + (1 - decay) (E[z+] - E[z]),   y <- likewise with dL/dz              Eq. 5; z+: after the step
        H_g <- BFGS update of H_g by the double damping of (s, y / c)                      Algorithm 3, Eq. 6
        A <- decay A + (1 - decay) E[h h^T]
        H_a <- BFGS update of H_a by s_a = H_a E[h], y_a = (A + lambda_A I) s_a            Section 4

    It starts from s = y = 0, H_g = I, A = E[h h^T] (`initialize`) and H_a = (A + lambda_A I)^-1. lambda_A and mu2 are
    sqrt(damping), unless `damping_a` and `damping_g` say otherwise. c is the layer's `scale`, which the paper does not have: its
    own method is `scale=None, max_step=None, max_increase=math.inf`.

        optimizer = secondorder.KBFGS(model, criterion)
        for x, y in loader:
            def closure():
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                return loss
            optimizer.step(closure)

    `step` calls the closure a second time, at the new weights, on the same mini-batch and from the same random state, so that
    dropout masks repeat. This call computes gradients of the layers' outputs, and none of parameters unless `doubled_batch` is
    set; p.grad keeps the gradients of the first call. It also gives the loss after the step. If that exceeds the loss before by
    more than `max_increase` times its size, or is not finite, the step is halved and tried again, and given up after 10 halvings.

    Args:
        model: any module; its nn.Linear layers are covered, whatever lies between them.
        criterion: a module, or a function (output, target) -> scalar loss. The closure may compute any loss. Where it calls the
            criterion (a function as `optimizer.criterion`), a row counts by the weight of its target, and not at all if that is
            ignored.
        lr: step size, >= 0.
        damping: lambda in (0, 1], for `damping_a` and `damping_g` where they are None.
        damping_a: lambda_A > 0; None: sqrt(damping).
        damping_g: mu2 in (0, 1]; None: sqrt(damping).
        mu1: bound of the first damping, in (0, 1): y.H y <= s.y / mu1.
        pairs: which (s, y) update H_g. "damped": all, after the double damping. "damped-bounded": of these, the pairs with y.H y
            <= s.y / mu1, since the second damping may break this bound (Section 3). "bounded": without damping, the pairs with
            this bound and s.s <= s.y / mu2 (Section 5). The last two limit how much a step changes H_g and its inverse (Eq. 8,
            10).
        input_inverse: "hessian-action": BFGS updates of H_a. "exact": H_a = (A + lambda_A I)^-1 by a factorisation at every step
            (Section 5).
        doubled_batch: whether M takes the mean of two gradients at the same parameters: of this mini-batch, and of the one
            before, whose gradient the second call of the closure then computes (end of Section 6). Parameters of the fallback
            take the first call's gradients alone, and move after the second call.
        scale: "curvature": divides the loss of every layer by c, the curvature that the layer's pairs show: M / c and y / c
            replace M and y. Training then depends neither on the scale of the loss nor on those of the layers. Until a layer has
            a pair, its rows move by a root mean square of 0.1 lr. None: c = 1, as in the paper, which suits losses that are sums
            over some hundred outputs.
        max_step: bound on the root mean square of the lengths of a layer's rows of H_g M H_a / c, before lr multiplies them, > 0;
            None: no bound, as in the paper.
        decay: decay of all moving averages (beta in the paper), in [0, 1).
        weight_decay: >= 0; `decoupled_weight_decay` says of which kind.
        bias_correction: True: M is the bias-corrected average over the steps so far, as in Adam. False: M starts from 0 without
            correction, as in the authors' published experiments, so that the first steps are short.
        max_increase: a step after which the loss is higher by more than this times its size is halved, >= 0. math.inf: every step
            with a finite loss after it is taken, as by the authors.
        max_factor_dim: limit on n_out of a layer, >= 1, since H_g has n_out^2 numbers; None: no limit. The fallback updates wider
            layers, and a warning names them once.
        max_input_dim: limit on n_in of a layer, >= 1, since A and H_a have n_in^2 numbers each; None: no limit. The fallback
            updates wider layers, and a warning names them once.
        fallback: what happens to parameters outside of the linear layers. "sgd": SGD updates them after the step, and a warning
            names them once. "error": `step` raises an error.
        maximize: whether to maximise the loss: the whole step is then that of the negative loss.
        decoupled_weight_decay: True: [W | b] <- (1 - lr weight_decay) [W | b] with the step. False: weight_decay [W | b] is added
            to the gradient.
        nonfinite: what a step does when it meets NaN or inf: "error" raises `secondorder.NonFiniteError`; "skip" changes nothing
            and counts the step in `skipped_steps`.

    Every step reads lr, damping, damping_a, damping_g, mu1, decay, weight_decay, maximize and decoupled_weight_decay from
    `param_groups`. A layer uses the numbers of its weight's group, but a bias has the lr and weight_decay of its own. A
    "momentum" that is set in a group is used by the fallback alone.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: `step` has no closure, or one that adds to earlier gradients, leaves none, or sees other data at its second
            call; or the loss or a gradient is not finite. `step` has then changed neither weights nor state.

    Source: Goldfarb, Ren & Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural Networks" (NeurIPS 2020).
    """

    _group_keys = ("damping", "mu1")
    _numbers: ClassVar[Numbers] = {
        **NUMBERS,
        "damping": (lambda v: 0 < v <= 1, "in (0, 1]"),
        "damping_a": (lambda v: 0 < v < math.inf, "> 0, or None for sqrt(damping)"),
        "damping_g": (lambda v: 0 < v <= 1, "in (0, 1], or None for sqrt(damping)"),
        "mu1": (lambda v: 0 < v < 1, "in (0, 1)"),
        "decay": (lambda v: 0 <= v < 1, "in [0, 1)"),
    }

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        lr: float = 0.3,
        *,
        damping: float = 0.3,
        damping_a: float | None = None,
        damping_g: float | None = None,
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
        max_factor_dim: int | None = 4096,
        max_input_dim: int | None = 16384,
        fallback: str = "sgd",
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        nonfinite: str = "error",
    ):
        checks: list[tuple[str, Any, bool, str]] = [
            ("max_increase", max_increase, max_increase >= 0, ">= 0"),
            ("pairs", pairs, pairs in _PAIRS, "to be one of " + ", ".join(map(repr, _PAIRS))),
            ("input_inverse", input_inverse, input_inverse in _INPUT_INVERSES, "'hessian-action' or 'exact'"),
            ("scale", scale, scale in ("curvature", None), "'curvature' or None"),
            ("max_step", max_step, max_step is None or max_step > 0, "> 0 or None"),
        ]
        check_arguments(type(self).__name__, checks)
        check_flags(type(self).__name__, {"doubled_batch": doubled_batch, "bias_correction": bias_correction})
        damped, bounded = _PAIRS[pairs]
        defaults = {
            "lr": lr, "damping": damping, "damping_a": damping_a, "damping_g": damping_g, "mu1": mu1, "decay": decay,
            "weight_decay": weight_decay, "momentum": 0.0,
        }  # fmt: skip
        super().__init__(
            model, criterion, defaults, damped=damped, bounded=bounded, exact_inverse=input_inverse == "exact",
            scaled=scale == "curvature", fallback=fallback, max_factor_dim=max_factor_dim, max_input_dim=max_input_dim,
            maximize=maximize, decoupled_weight_decay=decoupled_weight_decay, nonfinite=nonfinite,
        )  # fmt: skip
        self._curvature_name = "quasi-Newton"
        self._max_increase, self._bias_correction = max_increase, bias_correction
        self._doubled, self._max_step = doubled_batch, max_step
        self._unlike: set[nn.Linear] = set()  # the layers of which `_warn_of_unlike` has told
        self._zeroed = [False]  # whether zero_grad was called in a closure; a list, since Lightning calls it on a shallow copy

    @outside_inference_mode
    @torch.no_grad()
    def initialize(self, inputs: Iterable[Any], loss: Callable[[Any], Tensor] | None = None) -> None:
        """Sets A = E[h h^T] over all the given batches, as the paper does, and H_a = (A + lambda_A I)^-1 from it.

        Before the first step, and optional: without it the first mini-batch alone gives A.

        Args:
            inputs: what the model is called with, batch after batch; for example `(x for x, _ in loader)`.
            loss: a function of a batch that gives the loss as a step's closure does, called instead of the model; for example
                `lambda batch: criterion(model(batch[0]), batch[1])`, with `loader` for `inputs`. Rows count by the weights of
                their targets then, ignored ones not. None: all rows count alike.

        Raises:
            RuntimeError: the optimizer has made a step already, or `loss` gives no scalar with its graph.
            TypeError: `loss` is no function.
        """
        if any(state.get("step", 0) > 0 for state in self.state.values()):
            raise RuntimeError(f"{type(self).__name__}.initialize(): expected no step before it")
        if loss is not None and not callable(loss):
            raise TypeError(
                f"{type(self).__name__}.initialize(): expected loss to be a function of a batch, got {type(loss).__name__}"
            )
        groups = self._groups()
        layers = [layer for layer in self._layers if layer.weight in groups and layer.weight not in self._uncovered]
        moments = InputMoments(type(self).__name__, self._layers, self._tape.tied, layers)
        if loss is None:
            moments.add_model_calls(self._model, inputs)
        else:
            moments.add_loss_calls(loss, self.criterion, inputs)
        starts = {}
        for layer, moment in moments.averaged(self._ranks).items():
            if layer.bias not in groups:  # the bias is not trained here, though it may require gradients
                moment = moment[: layer.in_features, : layer.in_features].contiguous()
            starts[layer] = self._start(layer, moment, damping_of(groups[layer.weight], "damping_a"))
        for layer, start in starts.items():
            self.state[layer.weight].update(start)

    @outside_inference_mode
    @outside_autocast
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] = NEEDED) -> Tensor:  # type: ignore[override]
        """Makes one step; calls the closure at least twice.

        Args:
            closure: `zero_grad` of this optimizer or gradients set to None, forward and backward on one mini-batch, the same at
                every call; returns the loss.

        Returns:
            The loss before the step.

        Raises:
            NonFiniteError: the loss or a gradient is not finite, with nonfinite="error".
            RuntimeError: there is no closure, it adds to gradients from before it, it evaluates other data at a later call, or a
                CUDA graph is being captured. As with any error, no parameter and no state has changed.
        """
        self._refuse_capture()
        closure = self._usable(closure)
        random = RandomState.now()
        loss, first = self._first_call(closure)
        self._check_gradients()
        if not first.layers:
            raise RuntimeError(
                f"{type(self).__name__}.step(): expected a closure that calls loss.backward() on what linear layers of the model "
                "have computed, got gradients, but none w.r.t. their outputs. Gradients that are set by hand, as from "
                "torch.autograd.grad, do not give these, nor do those of layers that a torch.autograd.Function calls, as of an "
                "adjoint method: for these take EigenAdam"
            )
        self._warn_of_other_uses(first.layers, first.multiplied)
        with self._whole_or_nothing():
            value: float | Tensor = first.sign * loss
            if self._ranks is not None:
                covered = [layer for layer in self._layers if layer.weight not in self._uncovered]
                value = first.average(self._ranks, float(value), covered)
            self._growth.observe(value)  # first, since a warning may be an error
            self._update(closure, value, first, random)
        return loss

    def _first_call(self, closure: Callable[[], Tensor]) -> tuple[Tensor, ClosurePass]:
        """Calls the closure; returns its loss, and what it has left behind at the layers.

        Raises:
            RuntimeError: it adds to gradients from before it.
        """
        name, sign = type(self).__name__, -1.0 if self._maximize() else 1.0
        before = [p.grad for p in self._parameters()]
        self._zeroed[0] = False
        with ClosurePass(self._layers, self._tape.tied, sign, criterion=self.criterion) as first:
            loss = first.run(closure, name)
        after = [p.grad for p in self._parameters()]
        if not self._zeroed[0] and any(g is not None and g is old for g, old in zip(after, before, strict=True)):
            raise RuntimeError(
                f"{name}.step(): expected a closure that calls optimizer.zero_grad() first, got one that adds to gradients from "
                "before it, whose batches no second call would see. Accumulate within the closure, or take a larger batch "
                "(accumulate_grad_batches=1 in Lightning)"
            )
        return loss, first

    def _usable(self, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Returns the closure; raises RuntimeError if there is none, or a GradScaler, which could not call it again."""
        name = type(self).__name__
        if closure is None or closure is NEEDED:
            raise RuntimeError(
                f"{name}.step(): expected a closure, since the loss is needed at two points: a function that calls "
                "optimizer.zero_grad(), computes the loss, calls loss.backward() and returns the loss"
            )
        if getattr(self, "found_inf", None) is not None:
            raise RuntimeError(
                f"{name}.step(): GradScaler knows no closure that is called again; use torch.autocast with bfloat16, which needs "
                "no scaler"
            )
        return closure

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, as every torch optimizer does."""
        super().zero_grad(set_to_none)
        self._zeroed[0] = True

    def _update(
        self, closure: Callable[[], Tensor], loss_before: float | Tensor, first: ClosurePass, random: RandomState
    ) -> None:
        """Makes the step from the first call's loss and records."""
        idle = [layer for layer, own in first.layers.items() if not own.instances]
        if len(idle) == len(first.layers):
            check_instances(type(self).__name__, [own.input for own in first.layers.values()])
        self._idle = {p for layer in idle for p in layer.parameters(recurse=False)}
        groups, gradients = self._groups(), self._gradients()
        layers = [n for n in self._layers if n in first.layers and n.weight in gradients and n.weight not in self._uncovered]
        parameters = {layer: trained_parameters(layer, gradients) for layer in layers}
        others = self._fallback.updates(
            self.param_groups, gradients, [p for each in parameters.values() for p in each], self.state
        )
        loss = self._check_finite(loss_before, parameters, gradients, first)

        directions, updates = self._directions(parameters, gradients, first, groups)
        limit = math.inf if self._max_increase == math.inf else loss + self._max_increase * abs(loss)
        trials = Trials(
            type(self).__name__, closure, first, random, self._model, self._parameters(),
            self._doubled, self._ddp, self._ranks,
        )  # fmt: skip
        with trials.taken(parameters, directions, groups, limit) as step:
            for state in updates.values():
                state["step"] += 1
                state["halvings"] += step.halvings
                state["rejected"] += step.pairs is None
            states = {layer: self._apart(layer, state) for layer, state in updates.items()}
            self._update_factors(states, first, step.pairs)
            self._warn_of_unlike(step.unlike)
        self._fallback.apply(others, self.state)
        for layer, state in states.items():
            self.state[layer.weight].update(state)
        for layer in self._layers:  # also of those left out: the others have moved since
            self.state.get(layer.weight, {}).pop("second_gradient", None)
            if layer in step.gradients:
                self.state[layer.weight]["second_gradient"] = step.gradients[layer]

    def _warn_of_unlike(self, layers: set[nn.Linear]) -> None:
        """Warns, once for each, of layers that the closure calls on other numbers of rows after a step."""
        new = [layer for layer in self._layers if layer in layers and layer not in self._unlike]
        if new:
            self._unlike.update(new)
            names = " and ".join(repr(self._layers[layer]) for layer in new)
            warn(
                f"the closure has called layers {names} on other numbers of rows after the step than before it, as a router of "
                "experts or a solver of differential equations whose steps adapt does. Their means cannot be compared: such a "
                "step leaves their H_g as it is, and counts as skipped. A solver may take steps of fixed length "
                "(method='rk4' in torchdiffeq)."
            )

    def diagnostics(self) -> dict[str, dict[str, int]]:
        """Counts since the start, layer by layer.

        Returns:
            `{layer name: {count: int}}`, empty before the first step. "step": steps. "halvings": halvings of steps. "rejected":
            steps given up after 10 halvings. "updated": updates of H_g that were made; "damped_s" and "damped_y": those in which
            s or y was damped; "skipped": those left out, since the curvature was not positive, a number was not finite, or a
            bound that `pairs` asks for was broken. "input_skipped": updates of H_a left out, or exact inverses that were not
            finite.
        """
        return {
            name: {count: self.state[layer.weight][count] for count in COUNTS}
            for layer, name in self._layers.items()
            if "step" in self.state.get(layer.weight, {})
        }

    def metrics(self) -> dict[str, float]:
        """Returns numbers worth logging: what `diagnostics` counts layer by layer, as means over all layers and the steps so far.

        Returns:
            "halvings": the mean number of halvings of a step. "rejected": the share of steps given up after 10 halvings.
            "updated": the share of updates of H_g that were made; "damped_s" and "damped_y": the share in which s or y was
            damped; "skipped": the share left out, since the curvature was not positive, a number was not finite, or a bound that
            `pairs` asks for was broken. "input_skipped": the share of updates of H_a left out. "coverage": the share of all
            trained numbers that belong to these layers, rather than to the fallback. "skipped_steps": how many steps NaN or inf
            has prevented. All are 0 before the first step.
        """
        layers = self.diagnostics().values()
        steps = max(sum(counts["step"] for counts in layers), 1)
        shares = {name: sum(counts[name] for counts in layers) / steps for name in COUNTS if name != "step"}
        return {**shares, **super().metrics()}

    def _check_finite(
        self,
        loss: float | Tensor,
        parameters: dict[nn.Linear, list[Tensor]],
        gradients: dict[Tensor, Tensor],
        first: ClosurePass,
    ) -> float:
        """Returns the loss as a number, if it, all gradients and the squares of all inputs are finite."""
        owners = [layer for layer, each in parameters.items() for _ in each]
        norms = torch._foreach_norm([gradients[p] for each in parameters.values() for p in each]) if owners else ()
        value, *sizes = host_numbers([loss, *norms, *(first.layers[layer].mean_square for layer in parameters)])
        own, of_inputs = sizes[: len(owners)], sizes[len(owners) :]
        bad = dict.fromkeys(layer for layer, size in zip(owners, own, strict=True) if not math.isfinite(size))
        large = [layer for layer, size in zip(parameters, of_inputs, strict=True) if not math.isfinite(size)]
        if large and not bad and math.isfinite(value):
            names = ", ".join(repr(self._layers[layer]) for layer in large)
            raise NonFiniteError(
                f"{type(self).__name__}.step(): the inputs of layer {names} hold NaN or inf, or have squares that overflow; no "
                "parameter and no state has changed. Scale the inputs, or skip this batch."
            )
        if bad or not math.isfinite(value):
            names = ", ".join(repr(self._layers[layer]) for layer in bad)
            raise NonFiniteError(
                f"{type(self).__name__}.step(): {f'the gradient of layer {names}' if bad else 'the loss'} holds NaN or "
                "inf; no parameter and no state has changed. Skip this batch, or lower lr or raise damping if the "
                "training has diverged."
            )
        return value

    def _directions(
        self,
        parameters: dict[nn.Linear, list[Tensor]],
        gradients: dict[Tensor, Tensor],
        first: ClosurePass,
        groups: dict[Tensor, dict[str, Any]],
    ) -> tuple[list[Tensor], dict[nn.Linear, dict[str, Any]]]:
        """Returns H_g M H_a / c of every layer, bounded, and what its state becomes after the step."""
        states, updates = [], {}
        for layer, each in parameters.items():
            state, group = self.state.get(layer.weight, {}), groups[layer.weight]
            n = layer.in_features + len(each) - 1
            if "step" not in state or state["gradient"].shape[1] != n:  # whether the bias is trained may change
                own = first.layers[layer]
                moment = own.second_moment[:n, :n].contiguous()
                state = self._start(layer, moment, damping_of(group, "damping_a"), own.rows(bias=len(each) > 1))
            states.append(state)
            batch = self._batch_gradients(layer, state, {p: gradients[p] for p in each}, groups)
            decay = group["decay"]
            share = (1 - decay) / (1 - decay ** (state["step"] + 1)) if self._bias_correction else 1 - decay
            updates[layer] = {**state, "gradient": averaged_gradient(layer, state["gradient"], batch, share)}
        found = self._preconditioned(states, [update["gradient"] for update in updates.values()])
        return [bounded(direction, state, self._max_step) for direction, state in zip(found, states, strict=True)], updates

    def _batch_gradients(
        self, layer: nn.Linear, state: dict[str, Any], gradients: dict[Tensor, Tensor], groups: dict[Tensor, dict[str, Any]]
    ) -> list[Tensor]:
        """Returns the gradients of a layer's parameters, with the mini-batch before where its second call has left one."""
        if not self._doubled or "second_gradient" not in state:
            return list(gradients.values())
        doubled = []
        for (p, gradient), own in zip(gradients.items(), columns(layer), strict=False):
            before = state["second_gradient"][:, own].view_as(p)
            if not groups[p]["decoupled_weight_decay"]:
                before = before.add(p, alpha=float(groups[p]["weight_decay"]))
            doubled.append((gradient + before) / 2)
        return doubled
