"""What EACG and LayerwiseNewton share: factors from any curvature, directions from any solver, and when both are renewed."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from secondorder._tape import LayerRecord
from secondorder._tensors import captured_now, outside_inference_mode
from secondorder._warnings import warn
from secondorder.curvature import Curvature, curvature_by_name
from secondorder.optim._amp import outside_autocast
from secondorder.optim._averaging import swapped_with_averages, update_averages
from secondorder.optim._factors import FactorSource
from secondorder.optim._numbers import check_counts, check_flags
from secondorder.optim._recorded import note_largest_batch, take_largest_batch
from secondorder.optim._solving import SolvingOptimizer, due
from secondorder.solvers import Factors, Solver

Groups = dict[Tensor, dict[str, Any]]  # the param_group of every parameter

# Before version 0.2 each factor had a key of its own in `state[weight]`; these are the keys.
_FACTORS_BEFORE = ("bias_hessian", "mean_input", "input_second_moment", "mean_square_input")


class LayerwiseOptimizer(SolvingOptimizer):
    """Damped Newton steps layer by layer, from a curvature and a solver; subclasses say how far.

    Args:
        model: any module; its nn.Linear layers are covered.
        criterion: a module, or a function (output, target) -> scalar loss. The loop must compute its loss by it, and call a
            function as `optimizer.criterion`.
        defaults: the param_group values.
        curvature: "pch-abs", "pch-clip", "pch-clip-all", "gauss-newton", "kflr", "fisher-mc", "fisher-empirical", "fisher-exact",
            or a `secondorder.curvature.Curvature`.
        solver: "kfi", "kfi-rank-one", "ea-cg", "ea-cg-truncated", "kron-cg", "exact", "ea-isotropic", "auto", or a
            `secondorder.solvers.Solver`.
        curvature_every: the factors are renewed every so many steps, >= 1, and at each of the first so many.
        curvature_samples: at most so many instances of each forward pass are used for E[h h^T] and for the curvature, except the
            criterion's Hessian, which uses all; >= 1. None: all are used.
        max_factor_dim: limit on n_out of a layer, >= 1; wider ones are left to the fallback. None: no limit.
        keep_inputs: whether steps evaluate the model and the criterion again.
        average: whether to keep averages of the parameters, for `averaged_parameters`.
        **shared: the other arguments of `SolvingOptimizer`.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: `step` finds no gradients, no recorded call of the criterion, or numbers that are not finite. It has then
            changed nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None,
        defaults: dict[str, Any],
        *,
        curvature: str | Curvature,
        solver: str | Solver,
        curvature_every: int,
        curvature_samples: int | None,
        max_factor_dim: int | None,
        keep_inputs: bool,
        average: bool,
        **shared: Any,
    ):
        name = type(self).__name__
        check_counts(name, 1, {"curvature_every": curvature_every})
        check_counts(name, 1, {"curvature_samples": curvature_samples}, optional=True)
        check_flags(name, {"average": average})
        try:
            self._curvature = curvature_by_name(curvature)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        super().__init__(
            model, criterion, defaults, solver=solver, **shared,
            tape=self._curvature.tape_options(samples=curvature_samples, widest=max_factor_dim, keep_inputs=keep_inputs),
        )  # fmt: skip
        self._curvature_name = f"{curvature} by {solver}"
        self._factors = FactorSource(self._curvature, self._solver, curvature_samples, self._layers)
        self._curvature_every, self._average = curvature_every, average
        note_largest_batch(self._tape, self.param_groups)

    @outside_inference_mode
    @outside_autocast
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Makes one step from the gradients of the backward passes since the last one.

        Args:
            closure: evaluates the model anew, calls backward() and returns the loss; optional.

        Returns:
            What the closure returned; None without one.

        Raises:
            NonFiniteError: a number is not finite, with nonfinite="error".
            RuntimeError: gradients or records are missing, or a CUDA graph is being captured. As with any error, no parameter and
                no state has changed.
        """
        captured = self._captured()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = self._called(closure)
        self._check_gradients()
        with self._whole_or_nothing() as taken:
            if taken:
                groups = self._groups()
                factors = self._renewed(groups, captured)
                self._advance(self._covered(factors, groups), factors, groups)
                if self._average and not captured:
                    update_averages(self._parameters(), self.state, self._steps())
        self._tape.clear(release=True)
        self._schedule()
        return loss

    def _renewed(self, groups: Groups, captured: bool) -> dict[nn.Linear, Factors]:
        """Returns the layers' new factors, if there are any; notes in `_idle` the parameters that have none to be moved by.

        Those are of layers without an instance, and of layers that are new where no record renews factors.
        """
        ranks, records = self._ranks, list[LayerRecord]()
        if self._tape.recording:
            records = self._records() if ranks is None else ranks.all(self._records)
        curved = {p: group for p, group in groups.items() if p not in self._uncovered} if self._uncovered else groups
        factors, idle = {}, [record.layer for record in records if ranks is None and not record.instances]
        # A layer may be new: frozen before, or an expert that had no instance.
        if self._renewing() or any(self._lacks_factors(record.weight, curved) for record in records):
            # Where a CUDA graph captures the step the device averages them, by its own counts.
            factors = self._factors.renewed(records, curved, {} if captured else self.state, ranks)
            idle = [record.layer for record in records if record.layer not in factors and record.weight in curved]
        if not records:  # a new one waits for the next renewal
            idle += [layer for layer in self._layers if self._lacks_factors(layer._parameters.get("weight"), curved)]
        self._idle = {p for layer in idle for p in layer.parameters(recurse=False)}
        return factors

    def _captured(self) -> bool:
        """Tells whether a CUDA graph captures this step, which must then be possible."""
        self._refuse_capture()
        return False

    def _lacks_factors(self, weight: Tensor | None, curved: Groups) -> bool:
        """Tells whether a layer is to be trained by a curvature, which it has never had."""
        if weight is None or weight.grad is None or weight not in curved or weight in self._fallback.warned:
            return False
        return "factors" not in self.state.get(weight, {})

    def _called(self, closure: Callable[[], Tensor]) -> Tensor:
        """Returns the closure's loss."""
        return closure()

    def _records(self) -> list[LayerRecord]:
        """Returns the layers that the losses since the last step reach; warns once of those where the recursion starts anew.

        It warns of losses that grow as well: before anything has changed and on all ranks, since a warning may be an error.
        """
        records = super()._records()
        if not captured_now():
            mean = torch.stack([each.loss.double() for each in self._tape.losses]).mean()
            self._growth.observe(-mean if self._maximize() else mean)
        if self._curvature.columns and any(record.without_columns for record in records):
            self._warn_once(
                "flat",
                f"the Hessian of {self.criterion} is zero, or is in sum over instances that it compares; the layers get their "
                "empirical Fisher blocks.",
            )
        new: dict[str, list[str]] = {}  # names of layers by obstacle
        for record in records:
            if self._curvature.restarts and record.obstacle and record.layer not in self._restarts:
                self._restarts[record.layer] = record.obstacle
                new.setdefault(record.obstacle, []).append(repr(self._layers[record.layer]))
        if new:
            outputs = (("layer " if len(names) == 1 else "each of the layers ") + ", ".join(names) for names in new.values())
            found = "; ".join(f"the output of {names} {obstacle}" for names, obstacle in zip(outputs, new, strict=True))
            layers = "The layer" if sum(map(len, new.values())) == 1 else "Each of these layers"
            warn(
                f"{found}; the bias Hessian's recursion is not defined there. {layers} gets its empirical Fisher block, and the "
                "recursion starts anew from it."
            )
        return records

    @abstractmethod
    def _advance(self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], groups: Groups) -> None:
        """Updates parameters and state; raises before anything has changed.

        Args:
            covered: the layers to be updated, with their factors, new or old.
            factors: the new ones.
            groups: the param_groups by parameter.
        """

    def _shapes(self, p: Tensor, state: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
        n, k = p.shape if p.dim() == 2 else (0, 0)
        return {
            "momentum": tuple(p.shape), "average": tuple(p.shape), "step": None, "factor_updates": None, "factors": None,
            "prepared": None, "bias_hessian": (n, n), "mean_input": (k,), "input_second_moment": (k, k),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as every torch optimizer does, also from before version 0.2, where each factor had a key of its own.

        Raises:
            ValueError: the state is of an optimizer with another solver.
        """
        name, own = type(self).__name__, type(self._solver).__qualname__
        for group in state_dict["param_groups"]:
            if group.get("solver", own) != own:
                raise ValueError(
                    f"{name}.load_state_dict(): expected the state of the solver {own}, got one of {group['solver']}"
                )
        state = {key: _nested(each) for key, each in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": state})
        take_largest_batch(self._tape, self.param_groups)
        self._schedule()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, as every torch optimizer does."""
        note_largest_batch(self._tape, self.param_groups)
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """Returns what copies and pickles have."""
        note_largest_batch(self._tape, self.param_groups)
        return super().__getstate__()

    def averaged_parameters(self) -> AbstractContextManager[None]:
        """Gives the model's parameters their averages over the steps, within it (Botev et al., Eq. 44, 45); not for training.

            average <- beta_t average + (1 - beta_t) theta_t,   beta_t = min(0.95, 1 - 1/t).

        Raises:
            RuntimeError: the optimizer was made with average=False.
        """
        if not self._average:
            raise RuntimeError(f"{type(self).__name__}.averaged_parameters(): expected an optimizer made with average=True")
        return swapped_with_averages(self._parameters(), self.state)

    def _steps(self) -> int:
        return max((state.get("step", 0) for state in self.state.values()), default=0)

    def _renewing(self) -> bool:
        """Tells whether the next step, or the one being taken, renews the factors."""
        return self._curvature_every == 1 or due(self._steps(), self._curvature_every)

    def _schedule(self) -> None:
        """Has the next forward pass recorded if the next step renews the factors."""
        self._tape.recording = self._renewing()

    def _covered(self, factors: dict[nn.Linear, Factors], groups: Groups) -> dict[nn.Linear, Factors]:
        """Returns the layers to be updated, with their factors, new or old."""
        covered = dict(factors)
        if len(factors) < len(self._layers):
            for layer in self._layers:
                state = self.state.get(layer.weight, {})
                trained = layer.weight in groups and layer.weight.grad is not None and layer.weight not in self._idle
                if layer not in factors and trained and "factors" in state:
                    covered[layer] = state["factors"]
        return covered


def _nested(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a weight's state with its factors under one key."""
    if "bias_hessian" not in state:
        return state
    factors = {name: state[name] for name in _FACTORS_BEFORE if name in state}
    return {**{key: value for key, value in state.items() if key not in factors}, "factors": factors}
