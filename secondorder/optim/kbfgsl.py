"""KBFGSL: K-BFGS with the output side in limited memory (Goldfarb, Ren & Bahamou, 2020)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from secondorder import ops
from secondorder.optim._kbfgs_layer import alike, damping_of, scaled_gradients
from secondorder.optim._numbers import check_arguments
from secondorder.optim.kbfgs import KBFGS


class KBFGSL(KBFGS):
    """K-BFGS(L): K-BFGS with H_g in limited memory, the last `memory` damped pairs (s, y) of each layer.

        [W | b] <- [W | b] - lr H_g M H_a / c,   H_g by the compact form of the pairs' BFGS updates of I.

    H_a is the BFGS estimate of (E[h h^T] + lambda_A I)^-1, M the averaged gradient and c the scale, as in `KBFGS`. Its steps are
    those of `KBFGS` until a pair is dropped. It needs less arithmetic than `KBFGS` where memory < n_out / 2, roughly.

        optimizer = secondorder.KBFGSL(model, criterion)
        for x, y in loader:
            def closure():
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                return loss
            optimizer.step(closure)

    `step` calls the closure a second time, at the new weights, on the same mini-batch and from the same random state. If the loss
    after the step exceeds the loss before by more than `max_increase` times its size, or is not finite, the step is halved and
    tried again, and given up after 10 halvings.

    Args:
        model: any module; its nn.Linear layers are covered, whatever lies between them.
        criterion: a module, or a function (output, target) -> scalar loss. The closure may compute any loss. Where it calls the
            criterion (a function as `optimizer.criterion`), a row counts by the weight of its target, and not at all if that is
            ignored.
        lr: step size, >= 0.
        damping: lambda in (0, 1], for `damping_a` and `damping_g` where they are None.
        damping_a: lambda_A > 0; None: sqrt(damping).
        damping_g: mu2 in (0, 1]; None: sqrt(damping).
        memory: how many pairs (s, y) of each layer are kept, >= 1.
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
        max_input_dim: int | None = 16384,
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
            bias_correction=bias_correction, max_increase=max_increase, max_factor_dim=None, max_input_dim=max_input_dim,
            fallback=fallback, maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay, nonfinite=nonfinite,
        )  # fmt: skip
        self._memory = memory

    def _start_output(self, zero: Tensor) -> dict[str, Tensor]:
        return {key: zero.new_zeros(self._memory, len(zero)) for key in ("s_pairs", "y_pairs")}

    def _output_shapes(self, n: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("s_pairs", "y_pairs"), (self._memory, n))

    def _preconditioned(self, states: list[dict[str, Any]], gradients: list[Tensor]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for positions in alike(states):
            s_pairs, y_pairs = ([states[position][key] for position in positions] for key in ("s_pairs", "y_pairs"))
            halves = ops.lbfgs_product(s_pairs, y_pairs, [gradients[position] for position in positions])
            for position, half in zip(positions, halves, strict=True):
                found[position] = ops.precondition(None, half, states[position]["inverse_input"])
        return [found[position] for position in range(len(states))]

    def _damped_update(self, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        s, s_pairs, y_pairs = ([state[key] for state in states] for key in ("s", "s_pairs", "y_pairs"))
        y = scaled_gradients(states)
        return ops.damped_lbfgs_update_(s_pairs, y_pairs, s, y, group["mu1"], damping_of(group, "damping_g"), *self._pairs)
