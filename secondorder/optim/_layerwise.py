"""What EACG and LayerwiseNewton share: factors from any curvature, directions from any solver, and when both are renewed."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from secondorder._layers import parameters_of
from secondorder._tape import LayerRecord
from secondorder._tensors import Later, Transfer, all_finite, finite
from secondorder._warnings import warn
from secondorder.curvature import Curvature, curvature_by_name
from secondorder.errors import NonFiniteError
from secondorder.linalg import unchecked
from secondorder.optim._amp import outside_autocast
from secondorder.optim._averaging import swapped_with_averages, update_averages
from secondorder.optim._base import CurvatureOptimizer
from secondorder.optim._factors import FactorSource
from secondorder.optim._numbers import check_arguments
from secondorder.solvers import Factors, Solver, SolverOptions, solver_by_name

Groups = dict[Tensor, dict[str, Any]]  # the param_group of every parameter
Directions = tuple[dict[Tensor, Tensor], dict[nn.Linear, Factors]]  # P and d by parameter, and what the solver prepared for them

# Each rank solves some of the layers only where all solutions cost at least SHARED_FROM multiplications, counted as n^3 for a
# factor [n, n] (some ten milliseconds of a core), and at least SHARED_PER_NUMBER for each number of the directions, which the
# ranks then exchange (about what sending a number from one machine to another takes).
SHARED_FROM, SHARED_PER_NUMBER = 1e8, 100.0

# Before version 0.2 each factor had a key of its own in `state[weight]`; these are the keys.
_FACTORS_BEFORE = ("bias_hessian", "mean_input", "input_second_moment", "mean_square_input")


class LayerwiseOptimizer(CurvatureOptimizer):
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
        options: what solvers given by name may take.
        curvature_every: the factors are renewed every so many steps, >= 1, and at each of the first so many.
        curvature_samples: at most so many instances of each forward pass are used for E[h h^T] and for the curvature, except the
            criterion's Hessian, which uses all; >= 1. None: all are used.
        inverse_every: the solver's factorisations are renewed every so many steps, >= 1, and at each of the first so many.
        average: whether to keep averages of the parameters, for `averaged_parameters`.
        **shared: the other arguments of `CurvatureOptimizer`.

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
        options: SolverOptions,
        curvature_every: int,
        curvature_samples: int | None,
        inverse_every: int,
        average: bool,
        **shared: Any,
    ):
        name = type(self).__name__
        check_arguments(name, [
            ("max_cg", options.max_cg, options.max_cg >= 1, ">= 1"),
            ("eps_cg", options.eps_cg, options.eps_cg >= 0, ">= 0"),
            ("curvature_every", curvature_every, curvature_every >= 1, ">= 1"),
            ("curvature_samples", curvature_samples, curvature_samples is None or curvature_samples >= 1, ">= 1 or None"),
            ("inverse_every", inverse_every, inverse_every >= 1, ">= 1"),
            ("max_factor_elements", options.max_factor_elements, options.max_factor_elements >= 0, ">= 0"),
        ])  # fmt: skip
        if isinstance(solver, Solver):
            own = SolverOptions()
            check_arguments(name, [
                (option, value, value == getattr(own, option), "to be left to the solver that was given as an object")
                for option, value in vars(options).items()
            ])  # fmt: skip
        try:
            self._curvature, self._solver = curvature_by_name(curvature), solver_by_name(solver, options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        defaults |= {"solver": type(self._solver).__qualname__}  # what the state's factors are for
        super().__init__(
            model, criterion, defaults, diagonal=self._curvature.diagonal, grad_outputs=self._curvature.grad_outputs,
            columns=self._curvature.columns, recursive=self._curvature.recursive, output_hessian=self._curvature.output_hessian,
            samples=curvature_samples, **shared,
        )  # fmt: skip
        self._curvature_name = f"{curvature} by {solver}"
        self._factors = FactorSource(self._curvature, self._solver, curvature_samples, self._layers)
        self._curvature_every, self._inverse_every, self._average = curvature_every, inverse_every, average
        self._warned_flat = False  # whether the warning of a criterion without curvature has been given

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
                groups, ranks = self._groups(), self._ranks
                records: list[LayerRecord] = []
                if self._tape.recording:
                    records = self._records() if ranks is None else ranks.all(self._records)
                curved = {p: group for p, group in groups.items() if p not in self._uncovered} if self._uncovered else groups
                factors, idle = {}, [record for record in records if ranks is None and not record.instances]
                # A layer may be new: frozen before, or an expert that had no instance.
                if self._renewing() or any(self._lacks_factors(record.weight, curved) for record in records):
                    # Where a CUDA graph captures the step the device averages them, by its own counts.
                    factors = self._factors.renewed(records, curved, {} if captured else self.state, ranks)
                    idle = [record for record in records if record.layer not in factors and record.weight in curved]
                self._idle = {p for record in idle for p in record.layer.parameters(recurse=False)}
                if not records:  # it waits for the next renewal, then
                    new = [layer for layer in self._layers if self._lacks_factors(layer._parameters.get("weight"), curved)]
                    self._idle |= {p for layer in new for p in layer.parameters(recurse=False)}
                self._advance(self._covered(factors, groups), factors, groups)
                if self._average and not captured:
                    update_averages([p for group in self.param_groups for p in group["params"]], self.state, self._steps())
        losses = self._tape.losses
        if taken and losses and not captured:
            mean = torch.stack([each.loss.double() for each in losses]).mean()
            self._growth.observe(-mean if self._maximize() else mean)
        self._tape.clear(release=True)
        self._schedule()
        return loss

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
        """Returns the layers that the losses since the last step reach; warns once of those where the recursion starts anew."""
        records = super()._records()
        if self._curvature.columns and not self._warned_flat and any(record.without_columns for record in records):
            self._warned_flat = True
            warn(
                f"the Hessian of {self.criterion} is zero, or is in sum over instances that it compares; the layers get their "
                "empirical Fisher blocks."
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
        self._schedule()

    def averaged_parameters(self) -> AbstractContextManager[None]:
        """Gives the model's parameters their averages over the steps, within it (Botev et al., Eq. 44, 45); not for training.

            average <- beta_t average + (1 - beta_t) theta_t,   beta_t = min(0.95, 1 - 1/t).

        Raises:
            RuntimeError: the optimizer was made with average=False.
        """
        if not self._average:
            raise RuntimeError(f"{type(self).__name__}.averaged_parameters(): expected an optimizer made with average=True")
        return swapped_with_averages([p for group in self.param_groups for p in group["params"]], self.state)

    def _steps(self) -> int:
        return max((state.get("step", 0) for state in self.state.values()), default=0)

    def _renewing(self) -> bool:
        """Tells whether the next step, or the one being taken, renews the factors."""
        return self._curvature_every == 1 or _due(self._steps(), self._curvature_every)

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

    def _directions(
        self,
        covered: dict[nn.Linear, Factors],
        grads: dict[Tensor, Tensor],
        systems: dict[nn.Linear, tuple[float, float]],
        fresh: bool,
        transfer: Transfer,
    ) -> tuple[Directions, Later[Directions | None]]:
        """Returns P and d of every covered layer by parameter, and what the solver prepared for it; not yet known to be finite.

        Where several ranks train and it pays, each solves some of the layers; what they have prepared is then theirs alone.

        Args:
            covered: the layers, with their factors.
            grads: the gradients by parameter.
            systems: every layer's scale c and damping l.
            fresh: prepare in any case, not only every `inverse_every` steps.
            transfer: what whether they are finite comes to the host with.

        Returns:
            The directions, and what is to be called before they are used: it returns what replaces them, mostly None, and raises
            NonFiniteError where they are not finite.

        Raises:
            NonFiniteError: a direction is not finite.
            RuntimeError: the solver raised an error; this one names the layer.
        """
        # Factorisations that are kept over several steps are a tenth of these steps' time, and not worth an exchange.
        ranks = self._ranks if self._inverse_every == 1 and self._solver.factorises else None
        owner: dict[Tensor, nn.Linear] = {p: layer for layer in covered for p in layer.parameters(recurse=False) if p in grads}
        costs = [sum(len(t) ** 3.0 for t in factors.values() if t.dim() == 2) for factors in covered.values()]
        if ranks is None or sum(costs) < max(SHARED_FROM, SHARED_PER_NUMBER * sum(p.numel() for p in owner)):
            found, revised = self._solved(covered, grads, systems, fresh, transfer)
            # With other ranks at once: what they exchange next none may leave.
            return (found, revised) if self._ranks is None else (revised() or found, lambda: None)
        mine = {layer: factors for (layer, factors), own in zip(covered.items(), ranks.dealt(costs), strict=True) if own}

        def solved() -> Directions:
            found, revised = self._solved(mine, grads, systems, fresh, transfer)
            return revised() or found

        directions, prepared = ranks.all(solved)
        own = {p: direction for p, direction in directions.items() if owner[p] in mine}
        return (ranks.joined(own, {p: grads[p] for p in owner}), prepared), lambda: None

    def _solved(
        self,
        covered: dict[nn.Linear, Factors],
        grads: dict[Tensor, Tensor],
        systems: dict[nn.Linear, tuple[float, float]],
        fresh: bool,
        transfer: Transfer,
    ) -> tuple[Directions, Later[Directions | None]]:
        """Solves for all directions, by this rank alone."""
        arguments = (covered, grads, systems, fresh)
        with unchecked() as doubts:
            try:
                solved = self._solutions(*arguments)
            except RuntimeError:
                if not doubts:
                    raise
                solved = None

        def looked_at() -> Directions:
            """Solves once more with a check of every matrix, to tell which one was not positive definite or not finite."""
            directions, prepared, bad = self._solutions(*arguments) if doubts or solved is None else solved
            if not all_finite(list(directions.values())):
                own = {layer: [directions[p] for p in layer.parameters(recurse=False) if p in directions] for layer in prepared}
                bad += [(layer, "the solution overflows") for layer, tensors in own.items() if not all_finite(tensors)]
            if bad:
                raise NonFiniteError(self._not_finite(dict(bad), covered))
            return directions, prepared

        if solved is None or solved[2]:
            return looked_at(), lambda: None
        directions, prepared, _ = solved
        if not directions:
            return (directions, prepared), lambda: None
        good = finite(list(directions.values()))
        known = transfer.later(good & ~torch.stack([t.any() for t in doubts]).any() if doubts else good)
        return (directions, prepared), lambda: None if known() else looked_at()

    def _solutions(
        self,
        covered: dict[nn.Linear, Factors],
        grads: dict[Tensor, Tensor],
        systems: dict[nn.Linear, tuple[float, float]],
        fresh: bool,
    ) -> tuple[dict[Tensor, Tensor], dict[nn.Linear, Factors], list[tuple[nn.Linear, str]]]:
        """Returns directions, what was prepared, and the layers that the solver says are not finite, with its reasons."""
        directions, prepared, bad = {}, {}, []
        for layer, factors in covered.items():
            weight, bias, state = layer.weight, layer.bias, self.state.get(layer.weight, {})
            try:
                ready = state.get("prepared") if self._solver.factorises else None
                if fresh or ready is None or _due(state["step"], self._inverse_every):
                    ready = self._solver.prepare(factors, *systems[layer])
                p, d = self._solver.solve(ready, grads[weight], grads.get(bias) if bias is not None else None)
            except NonFiniteError as error:
                bad.append((layer, str(error)))
                continue
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                raise RuntimeError(self._solver_failed(layer, f"{type(error).__name__}: {error}")) from error
            for parameter, direction in ((weight, p), (bias, d)):
                if direction is not None and (parameter is None or direction.shape != parameter.shape):
                    expected = "None, for there is no bias" if parameter is None else f"shape {list(parameter.shape)}"
                    raise RuntimeError(
                        self._solver_failed(layer, f"expected a direction of {expected}, got shape {list(direction.shape)}")
                    )
            prepared[layer], directions[weight] = ready, p
            if d is not None:
                directions[bias] = d
        return directions, prepared, bad

    def _commit(
        self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], prepared: dict[nn.Linear, Factors]
    ) -> None:
        """Notes in the states that a step was made, with the new factors and what the solver prepared."""
        for layer in covered:
            weight, _ = parameters_of(layer)
            state = self.state[weight]
            state["step"] = state.get("step", 0) + 1
            if layer in factors:
                state["factors"] = factors[layer]
                state["factor_updates"] = state.get("factor_updates", 0) + 1
            if self._inverse_every > 1 and self._solver.factorises and layer in prepared:
                state["prepared"] = prepared[layer]

    def _solver_failed(self, layer: nn.Linear, reason: str) -> str:
        """Returns the message of an error of the solver."""
        return (
            f"{type(self).__name__}.step(): the solver {type(self._solver).__qualname__} failed at layer "
            f"{self._layers[layer]!r}: {reason}. No parameter and no state has changed."
        )

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
            f"{self._remedy} if the training has diverged."
        )


def _due(steps: int, every: int) -> bool:
    """Tells whether what is renewed every so many steps is renewed now; at first, when it changes fastest, at every step."""
    return steps < every or steps % every == 0


def _nested(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a weight's state with its factors under one key."""
    if "bias_hessian" not in state:
        return state
    factors = {name: state[name] for name in _FACTORS_BEFORE if name in state}
    return {**{key: value for key, value in state.items() if key not in factors}, "factors": factors}
