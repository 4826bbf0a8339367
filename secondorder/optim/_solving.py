"""Optimizers that take the directions of layers from any solver: who solves which, when it factorises anew, and what it finds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secondorder._layers import parameters_of
from secondorder._tensors import Later, Transfer, all_finite, finite
from secondorder.errors import NonFiniteError
from secondorder.linalg import unchecked
from secondorder.optim._curvature_optimizer import CurvatureOptimizer
from secondorder.optim._numbers import check_arguments, check_counts
from secondorder.solvers import Factors, Solver, SolverOptions, solver_by_name

Directions = tuple[dict[Tensor, Tensor], dict[nn.Linear, Factors]]  # P and d by parameter, and what the solver prepared for them

# Each rank solves some of the layers only where all solutions cost at least SHARED_FROM multiplications, counted as n^3 for a
# factor [n, n] (some ten milliseconds of a core), and at least SHARED_PER_NUMBER for each number of the directions, which the
# ranks then exchange (about what sending a number from one machine to another takes).
SHARED_FROM, SHARED_PER_NUMBER = 1e8, 100.0


class Systems(NamedTuple):
    """The systems of a step's layers, c H P A + l P = -B and (c H + l I) d = -g."""

    factors: dict[nn.Linear, Factors]
    gradients: dict[Tensor, Tensor]  # B and g by parameter
    scales: dict[nn.Linear, tuple[float, float]]  # c and l
    fresh: bool = False  # whether the solver prepares anew in any case, not only every `inverse_every` steps


class SolvingOptimizer(CurvatureOptimizer):
    """An optimizer whose directions a solver gives, from the factors of every layer.

    Args:
        model: any module; its nn.Linear layers are covered.
        criterion: a module or a function (output, target) -> scalar loss.
        defaults: the param_group values.
        solver: a name of `secondorder.solvers.SOLVERS`, or a `Solver`.
        options: what solvers given by name may take.
        inverse_every: the solver's factorisations are renewed every so many steps, >= 1, and at each of the first so many.
        **shared: the other arguments of `CurvatureOptimizer`.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None,
        defaults: dict[str, Any],
        *,
        solver: str | Solver,
        options: SolverOptions,
        inverse_every: int,
        **shared: Any,
    ):
        name = type(self).__name__
        check_counts(name, 1, {"max_cg": options.max_cg, "inverse_every": inverse_every})
        check_counts(name, 0, {"max_factor_elements": options.max_factor_elements})
        check_arguments(name, [("eps_cg", options.eps_cg, options.eps_cg >= 0, ">= 0")])
        if isinstance(solver, Solver):
            own = SolverOptions()
            check_arguments(name, [
                (option, value, value == getattr(own, option), "to be left to the solver that was given as an object")
                for option, value in vars(options).items()
            ])  # fmt: skip
        try:
            self._solver = solver_by_name(solver, options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self._inverse_every = inverse_every
        defaults |= {"solver": type(self._solver).__qualname__}  # what the state's factors are for
        super().__init__(model, criterion, defaults, **shared)

    def _directions(self, systems: Systems, transfer: Transfer) -> tuple[Directions, Later[Directions | None]]:
        """Returns P and d of every covered layer by parameter, and what the solver prepared for it; not yet known to be finite.

        Where several ranks train and it pays, each solves some of the layers; what they have prepared is then theirs alone.

        Args:
            systems: of the layers.
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
        covered, grads = systems.factors, systems.gradients
        owner: dict[Tensor, nn.Linear] = {p: layer for layer in covered for p in layer.parameters(recurse=False) if p in grads}
        costs = [sum(len(t) ** 3.0 for t in factors.values() if t.dim() == 2) for factors in covered.values()]
        if ranks is None or sum(costs) < max(SHARED_FROM, SHARED_PER_NUMBER * sum(p.numel() for p in owner)):
            found, revised = self._solved(systems, transfer)
            # With other ranks at once: what they exchange next none may leave.
            return (found, revised) if self._ranks is None else (revised() or found, lambda: None)
        mine = {layer: factors for (layer, factors), own in zip(covered.items(), ranks.dealt(costs), strict=True) if own}

        def solved() -> Directions:
            found, revised = self._solved(systems._replace(factors=mine), transfer)
            return revised() or found

        directions, prepared = ranks.all(solved)
        own = {p: direction for p, direction in directions.items() if owner[p] in mine}
        return (ranks.joined(own, {p: grads[p] for p in owner}), prepared), lambda: None

    def _solved(self, systems: Systems, transfer: Transfer) -> tuple[Directions, Later[Directions | None]]:
        """Solves for all directions, by this rank alone."""
        with unchecked() as doubts:
            try:
                solved = self._solutions(systems)
            except RuntimeError:
                if not doubts:
                    raise
                solved = None

        def looked_at() -> Directions:
            """Solves once more with a check of every matrix, to tell which one was not positive definite or not finite."""
            directions, prepared, bad = self._solutions(systems) if doubts or solved is None else solved
            if not all_finite(list(directions.values())):
                own = {layer: [directions[p] for p in layer.parameters(recurse=False) if p in directions] for layer in prepared}
                bad += [(layer, "the solution overflows") for layer, tensors in own.items() if not all_finite(tensors)]
            if bad:
                raise NonFiniteError(self._not_finite(dict(bad), systems.factors))
            return directions, prepared

        if solved is None or solved[2]:
            return looked_at(), lambda: None
        directions, prepared, _ = solved
        if not directions:
            return (directions, prepared), lambda: None
        good = finite(list(directions.values()))
        known = transfer.later(good & ~torch.stack([t.any() for t in doubts]).any() if doubts else good)
        return (directions, prepared), lambda: None if known() else looked_at()

    def _solutions(self, systems: Systems) -> tuple[dict[Tensor, Tensor], dict[nn.Linear, Factors], list[tuple[nn.Linear, str]]]:
        """Returns directions, what was prepared, and the layers that the solver says are not finite, with its reasons."""
        directions, prepared, bad = {}, {}, []
        grads = systems.gradients
        for layer, factors in systems.factors.items():
            weight, bias, state = layer.weight, layer.bias, self.state.get(layer.weight, {})
            try:
                ready = state.get("prepared") if self._solver.factorises else None
                if systems.fresh or ready is None or due(state["step"], self._inverse_every):
                    ready = self._solver.prepare(factors, *systems.scales[layer])
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


def due(steps: int, every: int) -> bool:
    """Tells whether what is renewed every so many steps is renewed now; at first, when it changes fastest, at every step."""
    return steps < every or steps % every == 0
