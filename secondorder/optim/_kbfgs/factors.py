"""The Kronecker factors of K-BFGS: a state for every layer, from the start, and how steps update H_a and H_g."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secondorder import ops
from secondorder._tape import TapeOptions
from secondorder._tensors import Transfer
from secondorder.errors import NonFiniteError
from secondorder.optim._curvature_optimizer import CurvatureOptimizer
from secondorder.optim._kbfgs.closure_pass import ClosurePass
from secondorder.optim._kbfgs.layer import Pair, alike, damped_inverse, damping_of, scaled_gradients, update_scale

COUNTS = ("step", "halvings", "rejected", "updated", "damped_s", "damped_y", "skipped", "input_skipped")


class QuasiNewtonOptimizer(CurvatureOptimizer):
    """An optimizer with BFGS estimates of both Kronecker factors of every layer's inverse Hessian (see `KBFGS`).

    Args:
        model: any module; its nn.Linear layers are covered.
        criterion: a module or a function (output, target) -> scalar loss.
        defaults: the param_group values.
        damped: whether (s, y) are damped twice before they update H_g.
        bounded: whether pairs that break the bounds update nothing.
        exact_inverse: whether H_a is a factorisation of every step, rather than updated.
        scaled: whether every layer keeps the curvature c of its pairs.
        max_factor_dim: limit on n_out of a layer, since H_g has n_out^2 numbers; None: no limit.
        **shared: the other arguments of `CurvatureOptimizer`.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module | Callable[..., Tensor] | None, defaults: dict[str, Any], *, damped: bool,
        bounded: bool, exact_inverse: bool, scaled: bool, max_factor_dim: int | None, **shared: Any,
    ):  # fmt: skip
        super().__init__(model, criterion, defaults, tape=TapeOptions(widest=max_factor_dim), **shared)
        # Nothing is recorded: K-BFGS needs means over two passes alone, which `ClosurePass` takes during a step.
        self._tape.recording = False
        self._pairs, self._exact_inverse, self._scaled = (damped, bounded), exact_inverse, scaled

    # --- the state --------------------------------------------------------------------------------------------------------------

    def _start(self, layer: nn.Linear, second_moment: Tensor, damping: float, rows: Tensor | None = None) -> dict[str, Any]:
        """Returns the state of a layer before its first step, with A as given; X^T X / m of `rows` if there are."""
        zeros = second_moment.new_zeros
        n_out, n = layer.out_features, len(second_moment)
        inverse = damped_inverse(second_moment, damping, rows)
        if not inverse.isfinite().all():
            raise NonFiniteError(
                f"{type(self).__name__}: expected finite inputs of layer {self._layers[layer]!r}, whose E[h h^T] has an inverse "
                "once it is damped; got NaN or inf, or numbers whose squares overflow. Scale the inputs, or raise damping"
            )
        return {
            **dict.fromkeys(COUNTS, 0),
            **({"scale": 0.0, "scale_pairs": 0} if self._scaled else {}),  # c, 0 while it is not known, and of how many pairs
            "gradient": zeros(n_out, n),
            "input_second_moment": second_moment,
            "inverse_input": inverse,
            "s": zeros(n_out),
            "y": zeros(n_out),
            **self._start_output(zeros(n_out)),
        }

    def _start_output(self, zero: Tensor) -> dict[str, Tensor]:
        """Returns the state that stands for H_g = I."""
        return {"inverse_output": torch.eye(len(zero), dtype=zero.dtype, device=zero.device)}

    def _output_shapes(self, n: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of what `_start_output` makes."""
        return {"inverse_output": (n, n)}

    def _shapes(self, p: Tensor, state: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
        layer = next((layer for layer in self._layers if layer.weight is p), None)
        if layer is None:
            return {"momentum": tuple(p.shape)}
        n, k = p.shape
        # A bias that has been frozen or unfrozen since the last step is not in the state, or still is: the next step begins anew.
        k += layer.bias is not None and isinstance(state.get("gradient"), Tensor) and state["gradient"].shape[-1] > k
        return {
            **dict.fromkeys(("scale", "scale_pairs", *COUNTS)), "momentum": tuple(p.shape), "gradient": (n, k),
            "second_gradient": (n, k),
            "input_second_moment": (k, k), "inverse_input": (k, k), "s": (n,), "y": (n,), **self._output_shapes(n),
        }  # fmt: skip

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        super()._check_state_dict(state_dict)
        scaled = {"scale" in state for state in state_dict["state"].values() if "inverse_input" in state}
        if scaled - {self._scaled}:
            other, own = ("None", "'curvature'") if self._scaled else ("'curvature'", "None")
            raise ValueError(
                f"{type(self).__name__}.load_state_dict(): expected the state of an optimizer with scale={own}, got one with "
                f"scale={other}; make this one with scale={other}{', max_step=None' if self._scaled else ''}, as that was"
            )

    # --- the factors ------------------------------------------------------------------------------------------------------------

    def _preconditioned(self, states: list[dict[str, Any]], gradients: list[Tensor]) -> list[Tensor]:
        """Returns H_g M H_a of every layer, c times the direction."""
        pairs = zip(states, gradients, strict=True)
        return [ops.precondition(state["inverse_output"], m, state["inverse_input"]) for state, m in pairs]

    def _apart(self, layer: nn.Linear, state: dict[str, Any]) -> dict[str, Any]:
        """Returns a state with tensors of its own, to be updated in place while the optimizer keeps those of before the step."""
        kept = self.state.get(layer.weight, {})
        return {
            key: value.clone() if isinstance(value, Tensor) and value is kept.get(key) else value for key, value in state.items()
        }

    def _update_factors(
        self, states: dict[nn.Linear, dict[str, Any]], first: ClosurePass, pairs: dict[nn.Linear, Pair] | None
    ) -> None:
        """Updates A, H_a and, where the step was taken, H_g in the layers' states; counts what was made, damped and left out.

        Args:
            states: of the layers with gradients, in place.
            first: the first call of the closure.
            pairs: (s, y) of the layers that have them; None: the step was given up.
        """
        inputs: list[dict[str, Any]] = []
        outputs: list[dict[str, Any]] = []
        statuses: tuple[list[Tensor], list[Tensor]] = ([], [])
        for group in self.param_groups:
            members = set(group["params"])
            covered = [layer for layer in states if layer.weight in members]
            for positions in alike([states[layer] for layer in covered]):
                own = {covered[position]: states[covered[position]] for position in positions}
                inputs += own.values()
                statuses[0].append(self._update_inputs(own, first, group))
                taken = [] if pairs is None else self._averaged_pairs(own, pairs, group)
                if taken:
                    outputs += taken
                    statuses[1].append(self._damped_update(taken, group))
        if inputs:
            transfer = Transfer()
            arriving = [transfer.later(each) for each in (*statuses[0], *statuses[1])]
            bits = [int(bit) for each in arriving for bit in each().tolist()]
            for state, each in zip(inputs, bits, strict=False):
                state["input_skipped"] += not each & ops.UPDATED
            for state, each in zip(outputs, bits[len(inputs) :], strict=True):
                state["updated"] += bool(each & ops.UPDATED)
                state["skipped"] += not each & ops.UPDATED
                state["damped_s"] += bool(each & ops.DAMPED_S)
                state["damped_y"] += bool(each & ops.DAMPED_Y)

    def _update_inputs(self, states: dict[nn.Linear, dict[str, Any]], first: ClosurePass, group: dict[str, Any]) -> Tensor:
        """Updates A and H_a of the layers of a group; returns the updates' statuses."""
        damping = damping_of(group, "damping_a")
        means = []
        for layer, state in states.items():
            mean, a = first.layers[layer].mean_input, state["input_second_moment"]
            if state["step"] > 1:  # at the first step A is that of the start already
                first.layers[layer].average_second_moment_(a, group["decay"])
            means.append(mean if len(mean) == len(a) else torch.cat([mean, mean.new_ones(1)]))
        inverses, matrices = ([state[key] for state in states.values()] for key in ("inverse_input", "input_second_moment"))
        if not self._exact_inverse:
            return ops.hessian_action_update_(inverses, matrices, means, damping)
        exact = [damped_inverse(a, damping) for a in matrices]
        valid = torch.stack([inverse.isfinite().all() for inverse in exact])
        for old, new, good in zip(inverses, exact, valid, strict=True):
            old.copy_(torch.where(good, new, old))
        return valid * ops.UPDATED

    def _averaged_pairs(
        self, states: dict[nn.Linear, dict[str, Any]], pairs: dict[nn.Linear, Pair], group: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Updates s and y of the layers of a group that have a new pair; returns the states of these."""
        found = []
        for layer, state in states.items():
            if layer in pairs:
                s, y, products = pairs[layer]
                for key, new in (("s", s), ("y", y)):
                    state[key].lerp_(new, 1 - group["decay"])
                if "scale" in state:
                    update_scale(state, group["decay"], *products)
                found.append(state)
            else:
                state["skipped"] += 1
        return found

    def _damped_update(self, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        """Updates H_g by the damped (s, y / c) of every layer."""
        s, h = ([state[key] for state in states] for key in ("s", "inverse_output"))
        y = scaled_gradients(states)
        return ops.damped_bfgs_update_(h, s, y, group["mu1"], damping_of(group, "damping_g"), *self._pairs)
