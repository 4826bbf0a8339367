"""KBFGSL: K-BFGS with the output side in limited memory (Goldfarb, Ren & Bahamou, 2020)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from secondorder import ops
from secondorder.optim._numbers import check_arguments
from secondorder.optim.kbfgs import KBFGS, damping_of, scaled_gradients


class KBFGSL(KBFGS):
    """K-BFGS(L): K-BFGS with H_g in limited memory, the last `memory` damped pairs (s, y) of each layer.

        [W | b] <- [W | b] - lr H_g M H_a / c,   H_g by the compact form of the pairs' BFGS updates of I.

    H_a is the BFGS estimate of (E[h h^T] + lambda_A I)^-1, M the averaged gradient and c the scale, as in `KBFGS`; while no
    pair has been dropped the steps are the same. Less arithmetic where memory < n_out / 2, roughly.

        optimizer = secondorder.KBFGSL(model, criterion)
        for x, y in loader:
            def closure():
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                return loss
            optimizer.step(closure)

    `step` calls the closure a second time, at the new weights, on the same mini-batch and from the same random state. Where the
    loss after the step exceeds the loss before by more than `max_increase` times its size, or is not finite, the step is halved
    and tried again, and given up after 10 halvings.

    Args:
        model: any module; its nn.Linear layers are covered, whatever lies between them.
        criterion: a module, or a function (output, target) -> scalar loss. The closure computes any loss; where it calls
            it (`optimizer.criterion` for a function), rows count by the weights of their targets, ignored ones not.
        lr: step size, >= 0.
        damping: lambda in (0, 1]; read where `damping_a` or `damping_g` is None.
        damping_a: lambda_A > 0; None: sqrt(damping).
        damping_g: mu2 in (0, 1]; None: sqrt(damping).
        memory: pairs (s, y) kept of each layer, >= 1.
        mu1: in (0, 1): the first damping's bound, y.H y <= s.y / mu1.
        pairs: which (s, y) update H_g. "damped": all, by the double damping. "damped-bounded": of these, those with
            y.H y <= s.y / mu1, which the second damping may have undone (Section 3). "bounded": undamped, those with this bound
            and s.s <= s.y / mu2 (Section 5). The last two limit how much a step changes H_g and its inverse (Eq. 8, 10).
        input_inverse: "hessian-action", or "exact": H_a = (A + lambda_A I)^-1 by a factorisation at every step (Section 5).
        doubled_batch: whether M takes, beside a mini-batch's gradient, that of the mini-batch before at the same parameters,
            from the second call of the closure, which then computes it (end of Section 6); their mean, for mini-batches of one
            size. Parameters of the fallback have the first call's gradients alone, and move only after the second call.
        scale: "curvature": every layer takes the loss in units of its own curvature c, which its pairs tell, so that training
            does not depend on the loss's scale, nor on the layers': M / c and y / c for M and y, and until there is a pair a step
            whose rows' root mean square is 0.1 lr. None: as the paper has it, c = 1, which suits losses that are summed over
            some hundred outputs.
        max_step: > 0: the rows of H_g M H_a are shortened to this root mean square over a layer where they are longer, before lr
            multiplies them; None: as the paper has it, there is no bound.
        decay: of all moving averages (beta in the paper), in [0, 1).
        weight_decay: >= 0, of the kind that `decoupled_weight_decay` says.
        bias_correction: M is the average over the steps so far, as in Adam. False starts from M = 0 without correction,
            as the authors' published numbers do; the first steps are then short.
        max_increase: >= 0, relative: a step after which the loss is higher by more is halved. math.inf takes every step
            with a finite loss after it, as the authors do.
        fallback: what updates parameters outside of the linear layers, after the step: "sgd" (warns once) or "error".
        maximize: whether the loss is maximised: everything is then as for its negative.
        decoupled_weight_decay: False: weight_decay is part of the gradient; True: [W | b] <- (1 - lr weight_decay) [W | b] with
            the step.
        nonfinite: what a step does that meets NaN or inf: "error" raises `secondorder.NonFiniteError`, "skip" leaves everything
            as it is and counts in `skipped_steps`.

    lr, damping, damping_a, damping_g, mu1, decay, weight_decay, maximize and decoupled_weight_decay are read from `param_groups`
    at every step (a layer's from its weight's group, but lr and weight_decay of a bias from its own), as is "momentum", 0 unless
    set there, which the fallback alone uses.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: from `step`, where there is no closure, it adds to gradients from before it, gradients are missing or not
            finite, or the closure's second call sees other data; the weights and the optimizer's state have not changed then.

    Source: Goldfarb, Ren & Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural Networks" (NeurIPS 2020).
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        lr: float = 0.3,
        *,
        damping: float = 0.3,
        damping_a: float | None = None,
        damping_g: float | None = None,
        memory: int = 100,
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
        fallback: str = "sgd",
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        nonfinite: str = "error",
    ):
        check_arguments(type(self).__name__, [("memory", memory, memory >= 1, ">= 1")])
        super().__init__(
            model, criterion, lr, damping=damping, damping_a=damping_a, damping_g=damping_g, mu1=mu1, pairs=pairs,
            input_inverse=input_inverse, doubled_batch=doubled_batch, scale=scale, max_step=max_step, decay=decay,
            weight_decay=weight_decay,
            bias_correction=bias_correction, max_increase=max_increase, max_factor_dim=None, fallback=fallback, maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay, nonfinite=nonfinite,
        )  # fmt: skip
        self._memory = memory

    def _start_output(self, zero: Tensor) -> dict[str, Tensor]:
        return {key: zero.new_zeros(self._memory, len(zero)) for key in ("s_pairs", "y_pairs")}

    def _output_shapes(self, n: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("s_pairs", "y_pairs"), (self._memory, n))

    def _preconditioned(self, states: list[dict[str, Any]], gradients: list[Tensor]) -> list[Tensor]:
        s_pairs, y_pairs = ([state[key] for state in states] for key in ("s_pairs", "y_pairs"))
        halves = ops.lbfgs_product(s_pairs, y_pairs, gradients)
        return [ops.precondition(None, half, state["inverse_input"]) for state, half in zip(states, halves, strict=True)]

    def _damped_update(self, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        s, s_pairs, y_pairs = ([state[key] for state in states] for key in ("s", "s_pairs", "y_pairs"))
        y = scaled_gradients(states)
        return ops.damped_lbfgs_update_(s_pairs, y_pairs, s, y, group["mu1"], damping_of(group, "damping_g"), *self._pairs)
