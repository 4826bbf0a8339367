"""What the optimizers share that find their own step: the Levenberg-Marquardt loop on the recorded batch."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secondorder._tape import ForwardState
from secondorder._tensors import Later, Transfer
from secondorder.errors import NonFiniteError
from secondorder.optim._closure import idle_backward
from secondorder.optim._layerwise import Groups, LayerwiseOptimizer
from secondorder.optim._numbers import NUMBERS, Numbers, check_arguments, warn_of_short_steps
from secondorder.optim._solving import Directions, Systems
from secondorder.solvers import Factors
from secondorder.stepping import (
    CannotReplay,
    ClosureLoss,
    Damping,
    DampingSchedule,
    LevenbergMarquardtLoop,
    LocalLoss,
    LossTrend,
    QuadraticModel,
)
from secondorder.stepping.closure_loss import Closure
from secondorder.stepping.local_loss import instances

# Where the mean square of a net's inputs is below this, its first layers have less damping. That of images and tables is above.
_SMALL_INPUTS = 0.01
_TINY = torch.finfo(torch.float32).tiny
_InOrder = tuple[list[Tensor], dict[nn.Linear, Factors]]  # `Directions`, in the order of the gradients


class NewtonOptimizer(LayerwiseOptimizer):
    """Steps delta = lr (c P + c' (previous delta)), c and c' minimising the quadratic model of the regularised loss.

    weight_decay is eta in that model (`secondorder.stepping`). Every step's loss is compared with what the model predicted, on
    the same subsample; where it has not fallen, the step is taken back and tried with a larger damping, without the previous
    delta. If that does not help either, the parameters stay as they were for this step. Parameters that no curvature covers are
    part of the model, with -g as their direction, scaled as the covered parameters' directions are on the whole.

    Args:
        model: any module; its nn.Linear layers are covered.
        criterion: a module, or a function (output, target) -> scalar loss. The loop must compute its loss by it, and call a
            function as `optimizer.criterion`.
        lr: multiplies the step that the quadratic model gives; in [0, 2). Schedulers change it as they change any learning rate.
        schedule: how the dampings begin and change.
        subsample: the fraction of the batch that the quadratic model is evaluated on, in (0, 1]. It is at least 100 instances,
            and enough of them for 500 outputs. It is the whole batch where the loss is no mean or sum over the batch's rows.
        weight_decay: eta of the direction and of the quadratic model, >= 0.
        factor_decay: in [0, 1); the factors are bias-corrected exponential averages with this decay.
        fallback: what happens to parameters that no curvature covers. "sgd": they move along their gradients, as a part of the
            quadratic model, and a warning names them once. "error": `step` raises an error.
        **shared: the arguments of `LayerwiseOptimizer` that both kinds of steps have.

    Every step reads lr, weight_decay, factor_decay and maximize from `param_groups`. The solver uses the weight_decay of the
    first group, and a layer the factor_decay of its weight's group. lr and maximize must be the same in all groups.
    """

    _remedy = "begin with more damping"

    _group_keys = ("tau", "factor_decay")
    _numbers: ClassVar[Numbers] = {
        **NUMBERS,
        "lr": (lambda v: 0 <= v < 2, "in [0, 2), since it multiplies the step of the quadratic model"),
    }

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None,
        lr: float,
        *,
        schedule: DampingSchedule,
        subsample: float,
        weight_decay: float,
        factor_decay: float,
        fallback: str,
        **shared: Any,
    ):
        check_arguments(type(self).__name__, [("subsample", subsample, 0 < subsample <= 1, "in (0, 1]")])
        # The dampings are kept in the groups, and so in the state_dict; None: the first step sets them.
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "factor_decay": factor_decay,
            "tau": None, "gamma": None, "loss_trend": None, "rho": None, "coefficients": (0.0, 0.0),
        }  # fmt: skip
        super().__init__(model, criterion, defaults, keep_inputs=True, fallback=fallback, **shared)
        warn_of_short_steps(type(self).__name__, lr)
        self._loop, self._subsample = LevenbergMarquardtLoop(schedule), subsample
        self._closure: Closure | None = None  # of the step under way
        self._evaluating = False  # whether a closure is being called for a trial

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as every torch optimizer does, also what an optimizer with lr=None has saved before version 0.2.

        Raises:
            ValueError: the state is of an optimizer with a fixed learning rate.
        """
        if any("alpha" in group and "tau" not in group for group in state_dict["param_groups"]):
            raise ValueError(
                f"{type(self).__name__}.load_state_dict(): expected the state of an optimizer that finds its own step size, got "
                "one of an optimizer with a learning rate; load it into secondorder.EACG"
            )
        super().load_state_dict({**state_dict, "param_groups": [_renamed(group) for group in state_dict["param_groups"]]})

    def metrics(self) -> dict[str, float]:
        """Returns numbers worth logging.

        Returns:
            "step_size" and "momentum": c and c' of the last step, lr included; 0 if the step was taken back. "ratio": the last
            step's reduction of the loss over the reduction that the quadratic model predicted; near 1 where the model holds, 0 if
            the step was taken back. "damping": tau of the next step. "gamma": the solver's own damping, or tau where it has none.
            "floor": the lower bound of tau, 0 except for LayerwiseNewton. "coverage": the share of all trained numbers that a
            curvature has covered, rather than the fallback. "skipped_steps": how many steps NaN or inf has prevented. All are 0
            before the first step.
        """
        group = self.param_groups[0]
        damping = _damping(group) or Damping(0.0, 0.0, LossTrend(0.0, 0.0, 0.0, 0.0))
        return {
            "step_size": damping.coefficients[0],
            "momentum": damping.coefficients[1],
            "ratio": damping.rho or 0.0,
            "damping": damping.tau,
            "gamma": damping.tau if damping.gamma is None else damping.gamma,
            "floor": damping.trend.floor,
            **super().metrics(),
        }

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Makes one step from the gradients of the backward passes since the last one.

        Args:
            closure: evaluates the model anew, calls backward() and returns the loss. It is needed, and called more than once,
                where the loss has terms outside of the criterion, or cannot be evaluated again from the tape's records.

        Returns:
            What the first call of the closure returned; None without one.

        Raises:
            NonFiniteError: a number is not finite, with nonfinite="error".
            RuntimeError: gradients or records are missing, a CUDA graph is being captured, or the loss cannot be evaluated at
                other parameters and there is no closure. As with any error, no parameter and no state has changed.
        """
        try:
            return super().step(closure)
        finally:
            self._closure = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, and with them what the tape recorded for them."""
        if not self._evaluating:  # a closure that is called for a trial begins so; the gradients of the step are kept
            super().zero_grad(set_to_none)

    def _called(self, closure: Callable[[], Tensor]) -> Tensor:
        self._closure = Closure(closure, ForwardState(nn.ModuleList([self._model, self.criterion])), self._quiet)
        return closure()

    @contextmanager
    def _quiet(self, after: Callable[[], None]) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
        """Has backward() within it call `after`, and zero_grad() nothing; yields what backward() is called on."""
        self._evaluating = True
        roots: list[tuple[Tensor, Tensor | None]] = []
        try:
            with (
                idle_backward(type(self).__name__, after, roots),
                nullcontext() if self._ddp is None else self._ddp.no_sync(),
            ):
                yield roots
        finally:
            self._evaluating = False

    def _loss(self, parameters: list[Tensor], steps: int, transfer: Transfer) -> LocalLoss | ClosureLoss:
        """Returns the loss that backward() was called on, from what was recorded or by the closure.

        Its numbers come to the host by the transfer.

        Raises:
            RuntimeError: neither gives it.
        """
        obstacle = self._tape.outside and f"the gradients are also of {self._tape.outside}"
        recorded: LocalLoss | None = None
        if obstacle is None:
            try:
                recorded = LocalLoss(
                    self._model, self.criterion, self._tape.losses, parameters, self._subsample, steps, self._tape, self._ranks,
                    transfer,
                )  # fmt: skip
            except CannotReplay as error:
                obstacle = str(error)
        if recorded is not None and (recorded.faithful or self._closure is None):
            if not recorded.faithful:
                self._warn_once(
                    "unfaithful",
                    "the model, or the criterion, gives something else when it is evaluated again, though the model's random "
                    "numbers, buffers and attributes are those of its forward pass: its weights were others then, or the "
                    "criterion draws numbers or keeps a state; steps are judged by a loss that is not the recorded one. Pass a "
                    f"closure to {type(self).__name__}.step, or take EACG, which has a learning rate instead",
                )
            return recorded
        if self._closure is None:
            raise RuntimeError(
                f"{type(self).__name__}.step(): expected a loss that can be evaluated at other parameters from what was "
                f"recorded, as that of backward() on criterion(model(x), y), but {obstacle}. Pass a closure, "
                "optimizer.step(closure), that computes the loss, calls backward() and returns it; or take EACG, which has a "
                "learning rate instead. No parameter and no state has changed."
            )
        count = sum(instances(loss, self.criterion) for loss in self._tape.losses)
        return ClosureLoss(
            type(self).__name__, self._closure, self._model, self.criterion, parameters, count, self._tape,
            -1.0 if self._maximize() else 1.0, self._ranks,
        )  # fmt: skip

    def _metric(self, covered: dict[nn.Linear, Factors], transfer: Transfer) -> Later[dict[Tensor, float]]:
        """Gives D of the layers whose inputs are given and small: their mean square over 0.01, where that is below 1.

        The curvature of a weight is on the scale of its inputs' squares, and so has to be what is added to it.
        """
        given = {call.layer for loss in self._tape.losses for call in loss.calls() if call.given}
        squares = {layer: _mean_square(factors, layer.in_features) for layer, factors in covered.items() if layer in given}
        found = transfer.numbers(list(squares.values()))
        return lambda: {
            p: square / _SMALL_INPUTS
            for layer, square in zip(squares, found(), strict=True)
            if 0 < square < _SMALL_INPUTS
            for p in (layer.weight, layer.bias)
            if p is not None
        }

    def _schedule(self) -> None:
        """Has every forward pass recorded, since the loss is evaluated anew at every step."""
        self._tape.recording = True

    def _advance(self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], groups: Groups) -> None:
        """Makes a step whose size the quadratic model gives, checked before the parameters see it."""
        group, steps, lr = self.param_groups[0], self._steps(), self._one_lr()
        gradients = self._gradients()
        own = [p for layer in covered for p in layer.parameters(recurse=False)]
        others = [p for p, _ in self._fallback.parameters(self.param_groups, gradients, own)]
        transfer = Transfer()
        checked = self._fallback.check([(p, gradients[p], 1.0) for p in others], transfer)
        read_metric = self._metric(covered, transfer)
        try:
            loss = self._loss(list(gradients), steps, transfer)
        finally:  # whether numbers are finite comes first
            checked()
        if not math.isfinite(loss.start):
            raise NonFiniteError(self._not_finite({}, covered))
        metric = read_metric()

        momentum = self._loop.schedule.momentum
        known = momentum and all("momentum" in self.state.get(p, {}) for p in gradients)
        previous = [self.state[p]["momentum"] for p in gradients] if known else None
        eta = [float(groups[p]["weight_decay"]) for p in gradients]
        model = QuadraticModel(loss, list(gradients.values()), eta, [metric.get(p, 1.0) for p in gradients])
        directions = self._at_damping(covered, gradients, others, metric)
        delta, prepared, damping = self._loop.step(model, directions, previous, _damping(group), steps, lr)
        self._keep(damping)
        for p, change in zip(gradients, delta, strict=True):
            p.add_(change)
            if momentum and lr > 0:  # with lr = 0, as of a scheduler that restarts, the step before stays
                self.state[p]["momentum"] = change
        self._commit(covered, factors, prepared or {})

    def _at_damping(
        self,
        covered: dict[nn.Linear, Factors],
        gradients: dict[Tensor, Tensor],
        others: list[Tensor],
        metric: dict[Tensor, float],
    ) -> Callable[[float, bool, Transfer], tuple[_InOrder, Later[_InOrder | None]]]:
        """Returns what gives the directions of all parameters at a damping, in the order of the gradients.

        Args:
            covered: the layers that have a curvature, with their factors.
            gradients: by parameter.
            others: the parameters that have no curvature.
            metric: D, where it is not 1.
        """

        def gain(directions: dict[Tensor, Tensor]) -> Tensor | float:
            """Returns |P| / |g| of the covered parameters; 1 where they have no gradient: the model finds the length."""
            if not directions:
                return 1.0
            norm = _norm([gradients[p] for p in directions])
            return torch.where(norm > 0, _norm(directions.values()) / norm.clamp(min=_TINY), 1.0)

        def in_order(found: Directions) -> _InOrder:
            by_parameter, prepared = found
            if others:
                factor = gain(by_parameter)
                by_parameter = by_parameter | {p: -gradients[p] * factor for p in others}
            return [by_parameter[p] for p in gradients], prepared

        def directions(damping: float, fresh: bool, transfer: Transfer) -> tuple[_InOrder, Later[_InOrder | None]]:
            # eta is the first group's.
            eta = float(self.param_groups[0]["weight_decay"])
            scales = {layer: (1.0, damping * metric.get(layer.weight, 1.0) + eta) for layer in covered}
            found, revised = self._directions(Systems(covered, gradients, scales, fresh), transfer)
            return in_order(found), lambda: None if (other := revised()) is None else in_order(other)

        return directions

    def _one_lr(self) -> float:
        """Returns the learning rate of all groups; raises ValueError where they differ."""
        lr = float(self.param_groups[0]["lr"])
        if any(float(group["lr"]) != lr for group in self.param_groups):
            raise ValueError(
                f"{type(self).__name__}.step(): expected lr to be the same in all param_groups, since it multiplies one step"
            )
        return lr

    def _keep(self, damping: Damping | None) -> None:
        """Keeps the dampings for the next step in all groups; None: there is nothing to begin them with."""
        if damping is not None:
            for group in self.param_groups:
                group.update(
                    tau=damping.tau, gamma=damping.gamma, loss_trend=astuple(damping.trend), rho=damping.rho,
                    coefficients=damping.coefficients,
                )  # fmt: skip


def _mean_square(factors: Factors, width: int) -> Tensor | float:
    """Returns the mean square of a layer's inputs, from whichever statistic of them there is; 1 where there is none."""
    if "input_second_moment" in factors:
        return factors["input_second_moment"].diagonal().mean()
    if "mean_square_input" in factors:
        return factors["mean_square_input"].double() / width
    return factors["mean_input"].square().mean() if "mean_input" in factors else 1.0


def _damping(group: dict[str, Any]) -> Damping | None:
    """Returns what the last step has left in a group; None before the first."""
    if group["tau"] is None:
        return None
    trend, found = LossTrend(*group["loss_trend"]), group.get("coefficients", (0.0, 0.0))  # which older checkpoints lack
    return Damping(group["tau"], group["gamma"], trend, group["rho"], found)


def _renamed(group: dict[str, Any]) -> dict[str, Any]:
    """Returns a saved group by today's keys."""
    if "watch" not in group:
        return group
    dropped = ("watch", "alpha", "momentum", "decoupled_weight_decay")
    kept = {key: value for key, value in group.items() if key not in dropped}
    return {**kept, "loss_trend": group["watch"], "lr": 1.0}


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).double().sum().sqrt()
