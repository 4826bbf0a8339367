"""EACG's step as a CUDA graph may capture it: what numbers decide is decided on the device, and no number is read."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secondorder._tensors import captured_now
from secondorder.errors import NonFiniteError
from secondorder.optim import _captures, _momentum
from secondorder.optim._eacg_operands import UpdateOperands
from secondorder.optim._eacg_replays import EACGReplays, move, rate
from secondorder.optim._layerwise import Groups, LayerwiseOptimizer
from secondorder.optim._numbers import check_arguments, check_numbers
from secondorder.solvers import EACGSolver, Factors


class CapturableOptimizer(LayerwiseOptimizer):
    """A layerwise optimizer whose steps by EA-CG a CUDA graph may capture; a subclass makes the steps that none captures."""

    _capturable = False
    _instead_of_capture = "make the optimizer with capturable=True"

    def _allow_captures(self, curvature: Any, solver: Any) -> None:
        """Makes it capturable.

        Args:
            curvature: the curvature that it was made with, for messages.
            solver: the solver that it was made with, for messages.

        Raises:
            ValueError: it was made so that its steps read numbers of the device.
        """
        check_arguments(type(self).__name__, [
            ("solver", solver, type(self._solver) is EACGSolver, "'ea-cg' or 'ea-cg-truncated' with capturable=True"),
            ("curvature", curvature, self._curvature.capturable, "'pch-abs', 'pch-clip', 'pch-clip-all' or 'fisher-empirical' "
             "with capturable=True"),
            ("curvature_every", self._curvature_every, self._curvature_every == 1, "1 with capturable=True"),
        ])  # fmt: skip
        self._capturable = True
        self._forget_replays()

    def _forget_replays(self) -> None:
        """Starts anew, as if no graph had captured a step: none has one with the present state."""
        self._replays = EACGReplays(layer.weight for layer in self._layers)
        self._unreported = 0  # refused replays that no error has told of
        self._weighs_targets = False  # whether the last step's targets did not all count alike

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Makes one step from the gradients of the backward passes since the last one.

        Args:
            closure: evaluates the model anew, calls backward() and returns the loss; optional.

        Returns:
            What the closure returned; None without one.

        Raises:
            NonFiniteError: a number is not finite, or was not in replays of a CUDA graph since the last step, with
                nonfinite="error".
            RuntimeError: gradients or records are missing, or a CUDA graph is being captured and this step cannot be (see
                `capturable`). As with any error, no parameter and no state has changed.
        """
        loss = super().step(closure)
        if self._capturable and not captured_now():
            self._replays.keep(self.state)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """Returns the optimizer without its graphs."""
        self._catch_up()
        return {**super().__getstate__(), "_replays": EACGReplays(layer.weight for layer in self._layers)}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, as every torch optimizer does."""
        self._catch_up()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as every torch optimizer does; a step is then to be captured anew.

        Raises:
            ValueError: the state is of another optimizer, or of one with another solver.
        """
        super().load_state_dict(state_dict)
        if self._capturable:
            self._forget_replays()  # graphs have the tensors of before

    @property
    def skipped_steps(self) -> int:
        """Returns how many steps NaN or inf has prevented, replays included. Part of the state_dict; after a capture it waits."""
        self._catch_up()
        return super().skipped_steps

    # --- steps that a CUDA graph captures ------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Counts the steps that replays of a CUDA graph have made, and those that were refused."""
        if self._capturable:
            refused = self._replays.catch_up(self.state)
            self._unreported += refused
            for group in self.param_groups:
                group["skipped_steps"] += refused

    def _captured(self) -> bool:
        if not self._capturable:
            return super()._captured()
        name = f"{type(self).__name__}.step()"
        if not captured_now():
            self._catch_up()
            unreported, self._unreported = self._unreported, 0
            if unreported and self._nonfinite == "error":
                raise NonFiniteError(
                    f"{name}: {unreported} replays of CUDA graphs have met NaN or inf, a target that the criterion ignores, or a "
                    "learning rate on the device outside of [0, 1]; they have changed no parameter and no state"
                )
            return False
        weighs = "where the criterion weighs or ignores targets, since by numbers of the device rows are chosen"
        for why, problem in (
            ("where several ranks train", self._ranks is not None),
            ("within GradScaler.step(); train in bfloat16, which needs no scaler", getattr(self, "found_inf", None) is not None),
            (weighs, self._weighs_targets),
        ):
            if problem:
                raise RuntimeError(f"{name}: expected no capture of a CUDA graph {why}")
        _captures.check_kernels(type(self).__name__, next(iter(self._layers)).weight.device)
        self._check_captured_rates()
        return True

    def _groups(self) -> Groups:
        if not (self._capturable and captured_now()):
            return super()._groups()
        for group in self.param_groups:
            told = {**group, "lr": 0.0} if isinstance(group["lr"], Tensor) else group  # which each replay looks at
            check_numbers(f"{type(self).__name__}.step()", told, self._numbers)
        return {p: group for group in self.param_groups for p in group["params"]}

    def _captured_update(
        self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], groups: Groups, solver: EACGSolver
    ) -> None:
        """Launches the kernels of a step; the device decides whether it is made, and otherwise moves everything by 0.

        `factors`, those in `covered` included, are not averaged yet.
        """
        gradients, replays = self._gradients(), self._replays
        operands = UpdateOperands.of_layers(covered, gradients, groups, self.state)
        if not operands.momenta[0] and any(isinstance(group["lr"], Tensor) for group in operands.groups):
            operands = operands._replace(
                momenta=([torch.zeros_like(p) for p in operands.weights], [torch.zeros_like(p) for p in operands.biases])
            )
        others = self._fallback.parameters(self.param_groups, gradients, [*operands.weights, *operands.biases])
        self._check_state(operands, [p for p, group in others if group["momentum"] != 0])
        velocities = [_momentum.velocity(p, gradients[p], group, self.state) for p, group in others]
        averaged = self._averaged(factors, groups)
        made = self._allowed(others, velocities)
        if covered:
            made = self._updated_if(made, {**covered, **averaged}, operands, solver)
        rates = {id(group): rate(group["lr"], made) for group in self.param_groups}
        self._move_by_device_rates(operands, rates)
        for (p, group), v in zip(others, velocities, strict=True):
            move(p, torch.where(made, v, 0.0), group, rates[id(group)], -1.0)
            if group["momentum"] != 0:
                _keep_if(made, self.state[p]["momentum"], v)
        for layer, new in averaged.items():
            for name, before in self.state[layer.weight]["factors"].items():
                _keep_if(made, before, new[name])
        replays.count(made, operands.weights, [layer.weight for layer in averaged])
        if self._average:
            share = torch.where(made, replays.parameter_share(), 0.0)
            for p in groups:
                average = self.state[p]["average"]
                average.lerp_(p.to(average.dtype), share.to(average.dtype))
        replays.add(self.state)

    def _averaged(self, factors: dict[nn.Linear, Factors], groups: Groups) -> dict[nn.Linear, Factors]:
        """Returns the new factors, averaged with those of the state, which stay."""
        averaged: dict[nn.Linear, Factors] = {}
        shares: dict[tuple[float, torch.dtype], dict[Tensor, Tensor]] = {}
        for layer, new in factors.items():
            old, key = self.state[layer.weight]["factors"], (groups[layer.weight]["factor_decay"], new["bias_hessian"].dtype)
            if key not in shares:
                shares[key] = self._replays.factor_shares(*key)
            averaged[layer] = {name: torch.lerp(old[name], t, shares[key][layer.weight]) for name, t in new.items()}
        return averaged

    def _updated_if(
        self, allowed: Tensor, covered: dict[nn.Linear, Factors], operands: UpdateOperands, solver: EACGSolver
    ) -> Tensor:
        """Updates all layers if that is allowed and every solution is finite; returns whether it has, a boolean on the device.

        The operator takes numbers: where a learning rate is on the device it updates the momenta alone.
        """
        first, *others = covered.values()
        # NaN in one layer keeps the operator from updating any.
        first = {**first, "mean_input": torch.where(allowed, first["mean_input"], math.nan)}
        lr = [0.0 if isinstance(group["lr"], Tensor) else float(group["lr"]) for group in operands.groups]
        return (operands.update_([first, *others], solver, lr) >= 0).all()

    def _move_by_device_rates(self, operands: UpdateOperands, rates: dict[int, Tensor]) -> None:
        """Moves the layers whose learning rate is on the device by their new momenta."""
        for parameters, momenta in zip((operands.weights, operands.biases), operands.momenta, strict=True):
            for p, v, group in zip(parameters, momenta, operands.groups, strict=bool(momenta)):
                if isinstance(group["lr"], Tensor):
                    move(p, v, group, rates[id(group)])

    def _check_state(self, operands: UpdateOperands, with_momentum: list[Tensor]) -> None:
        """Raises where a tensor of the state is missing, since a captured step writes to tensors that are there."""
        averages = self._parameters() if self._average else []
        made = not operands.started and self._replays.ready
        for name, parameters in (("factors", operands.weights), ("momentum", with_momentum), ("average", averages)):
            made = made and all(name in self.state.get(p, {}) for p in parameters)
        if not made:
            raise RuntimeError(
                f"{type(self).__name__}.step(): expected a step that makes the state of all parameters before one is captured "
                "in a CUDA graph; call step() without a capture first"
            )

    def _allowed(self, others: list[tuple[Tensor, dict[str, Any]]], velocities: list[Tensor]) -> Tensor:
        """Returns whether a step may be made if the layers' solutions are finite, a boolean on the device."""
        conditions = [self._replays.true(), *(loss.assumed for loss in self._tape.losses if loss.assumed is not None)]
        for (p, group), v in zip(others, velocities, strict=True):
            if v.numel():
                largest = 1.0 if isinstance(group["lr"], Tensor) else max(1.0, float(group["lr"]))
                conditions.append(v.abs().amax() * largest <= torch.finfo(p.dtype).max / 8)
        rates = {id(group["lr"]): group["lr"] for group in self.param_groups if isinstance(group["lr"], Tensor)}
        conditions += [((lr >= 0) & (lr <= 1)).reshape(()) for lr in rates.values()]
        return torch.stack(conditions).all()


def _keep_if(made: Tensor, place: Tensor, new: Tensor) -> None:
    """Writes new numbers to a place of the state, if the step was made."""
    torch.where(made, new, place, out=place)
