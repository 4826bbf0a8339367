"""What the optimizers share that find their own step: the Levenberg-Marquardt loop on the recorded batch."""

import math
from collections.abc import Callable, Iterable
from dataclasses import astuple
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secondorder.errors import NonFiniteError
from secondorder.optim._layerwise import Groups, LayerwiseOptimizer
from secondorder.optim._numbers import NUMBERS, Numbers, check_arguments, warn_of_short_steps
from secondorder.solvers import Factors
from secondorder.stepping import Damping, DampingSchedule, LevenbergMarquardtLoop, LocalLoss, LossTrend


class NewtonOptimizer(LayerwiseOptimizer):
    """Steps delta = lr (c P + c' (previous delta)), c and c' minimising the quadratic model of the regularised loss.

    weight_decay is eta in that model (`secondorder.stepping`). Every step's loss is compared with what the model predicted, on
    the same subsample; where it has not fallen, the step is taken back and tried with a larger damping, without the previous
    delta. If that does not help either, the parameters stay as they were for this step. Parameters that no curvature covers are
    part of the model, with -g as their direction, scaled as the covered parameters' directions are on the whole.

    Args:
        model: any module; its nn.Linear layers are covered.
        criterion: a module, or a function (output, target) -> scalar loss to be called as `optimizer.criterion`.
        lr: multiplies the step that the model gives, in [0, 2).
        schedule: how the dampings begin and change.
        subsample: the fraction of the batch that the model is evaluated on, in (0, 1]; at least 100 instances.
        weight_decay: eta, >= 0.
        factor_decay: in [0, 1); the factors are bias-corrected exponential averages with this decay.
        **shared: the arguments of `LayerwiseOptimizer` that both kinds of steps have.
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
        **shared: Any,
    ):
        check_arguments(type(self).__name__, [("subsample", subsample, 0 < subsample <= 1, "in (0, 1]")])
        # The dampings are kept in the groups, and so in the state_dict; None: the first step sets them.
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "factor_decay": factor_decay,
            "tau": None, "gamma": None, "loss_trend": None, "rho": None, "coefficients": (0.0, 0.0),
        }  # fmt: skip
        super().__init__(model, criterion, defaults, keep_inputs=True, decoupled_weight_decay=None, **shared)
        warn_of_short_steps(type(self).__name__, lr)
        self._loop, self._subsample = LevenbergMarquardtLoop(schedule), subsample

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every torch optimizer's; also takes what an optimizer with lr=None has saved before version 0.2.

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
        """Numbers worth logging.

        Returns:
            "step_size" and "momentum": c and c', what the last step has multiplied its direction and the step before by, lr
            included, 0 where it was taken back; "ratio": the last step's reduction of the loss over the one that the quadratic
            model predicted, near 1 where the model holds, 0 where the step was taken back; "damping": tau of the next step;
            "gamma": the solver's own damping, which is tau where it has none; "floor": what tau does not fall below, 0 but for
            LayerwiseNewton; "coverage": the share of all trained numbers that a curvature covers, rather than the fallback, by
            the steps so far; "skipped_steps". All are 0 before the first step.
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

    def _schedule(self) -> None:
        """Every forward pass is recorded: the loss is evaluated anew at every step."""
        self._tape.recording = True

    def _advance(self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], groups: Groups) -> None:
        """A step whose size the quadratic model gives, checked before the parameters see it."""
        group, steps, lr = self.param_groups[0], self._steps(), float(self.param_groups[0]["lr"])
        if any(float(each["lr"]) != lr for each in self.param_groups):
            raise ValueError(
                f"{type(self).__name__}.step(): expected lr to be the same in all param_groups, since it multiplies one step"
            )
        gradients = self._gradients()
        own = [p for layer in covered for p in layer.parameters(recurse=False)]
        others = [p for p, _ in self._fallback.parameters(self.param_groups, gradients, own)]
        for p in others:
            self._fallback.check(p, gradients[p], 1.0)
        loss = LocalLoss(
            self._model, self.criterion, self._tape.losses, {p: self._parameter_names[p] for p in gradients}, self._subsample,
            steps, self._tape, self._ranks,
        )  # fmt: skip
        if not math.isfinite(loss.start):
            raise NonFiniteError(self._not_finite({}, covered))

        def directions(damping: float, fresh: bool) -> tuple[list[Tensor], dict[nn.Linear, Factors]]:
            # The solvers know one damping for all layers: eta is the first group's.
            system = (1.0, damping + float(group["weight_decay"]))
            found, prepared = self._directions(covered, gradients, dict.fromkeys(covered, system), fresh)
            if others:
                gain = _norm(found.values()) / max(_norm(gradients[p] for p in found), torch.finfo(torch.float32).tiny)
                found |= {p: -gradients[p] * gain for p in others}
            return [found[p] for p in gradients], prepared

        momentum = self._loop.schedule.momentum
        previous = None
        if momentum and all("momentum" in self.state.get(p, {}) for p in gradients):
            previous = [self.state[p]["momentum"] for p in gradients]
        eta = [float(groups[p]["weight_decay"]) for p in gradients]
        delta, prepared, damping = self._loop.step(
            loss, directions, list(gradients.values()), eta, previous, _damping(group), steps, lr
        )
        for each in self.param_groups:
            each.update(
                tau=damping.tau, gamma=damping.gamma, loss_trend=astuple(damping.trend), rho=damping.rho,
                coefficients=damping.coefficients,
            )  # fmt: skip
        for p, change in zip(gradients, delta, strict=True):
            p.add_(change)
            if momentum and lr > 0:  # a step of zero, of a scheduler that begins anew, says nothing of the direction
                self.state[p]["momentum"] = change
        self._commit(covered, factors, prepared or {})


def _damping(group: dict[str, Any]) -> Damping | None:
    """What the last step has left in a group; None before the first."""
    if group["tau"] is None:
        return None
    trend, found = LossTrend(*group["loss_trend"]), group.get("coefficients", (0.0, 0.0))  # which older checkpoints lack
    return Damping(group["tau"], group["gamma"], trend, group["rho"], found)


def _renamed(group: dict[str, Any]) -> dict[str, Any]:
    """A saved group by today's keys."""
    if "watch" not in group:
        return group
    dropped = ("watch", "alpha", "momentum", "decoupled_weight_decay")
    kept = {key: value for key, value in group.items() if key not in dropped}
    return {**kept, "loss_trend": group["watch"], "lr": 1.0}


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))
