"""LevenbergMarquardt: exact Gauss-Newton steps for losses that are sums of squares."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from secondorder._arguments import is_whole
from secondorder._distributed import in_one_process
from secondorder._tape.factored import Buffer
from secondorder._tensors import outside_inference_mode
from secondorder._warnings import warn
from secondorder.errors import NonFiniteError
from secondorder.optim._amp import outside_autocast
from secondorder.optim._closure import NEEDED, idle_backward, with_graph
from secondorder.optim._numbers import (
    Numbers,
    check_arguments,
    check_counts,
    check_flags,
    check_nonfinite,
    check_numbers,
    warn_of_short_steps,
)
from secondorder.optim._optimizer import SecondOrderOptimizer
from secondorder.optim.eigen_adam import EigenAdam
from secondorder.stepping.checked_jacobian import CheckedJacobian, Plans
from secondorder.stepping.damped_least_squares import SOLVERS
from secondorder.stepping.gauss_newton_step import HELD_PATIENCE, GaussNewtonStep, Progress, Settings
from secondorder.stepping.least_squares_loss import LeastSquaresLoss, Residuals
from secondorder.stepping.race import race

_NUMBERS: Numbers = {"lr": (lambda v: 0 <= v < 2, "in [0, 2)")}


class LevenbergMarquardt(SecondOrderOptimizer):
    r"""Takes exact Gauss-Newton steps for a loss that is a sum of squares, from the closure that one writes for L-BFGS.

    Take it for physics-informed nets, function fitting, inverse problems and small data, where accuracy counts and the residuals
    are few, up to some thousands. Use float64: in float32 errors end near 1e-4. It predicts noisy data no better than other
    optimizers do, and shocks (Burgers' equation at small viscosity) need many residuals. The loss is

        f(theta) = sum_k c_k r_k(theta)^2 + sum_j t_j theta_j^2 + constant,   c_k, t_j >= 0,

    that is, any combination of means and sums of squares. The residuals r and their coefficients c are found in the loss's
    autograd graph, also if they are made of derivatives by `torch.autograd.grad(..., create_graph=True)`. Squares of the
    parameters themselves become t. Huber's loss, smooth L1, the soft margin, binary cross-entropy with logits and cross-entropy
    count as the squares of their roots, whose curvature is phi'^2 / (2 phi), phi less its least value. So do functions of squares
    that are written out, log(cosh(r)), sqrt(1 + r^2), log(1 + r^2), |r|^p for p > 1, and softplus(z) and exp(z), also less t z.

    J [m, P], the Jacobian of the weighted residuals, comes from one backward pass: wherever a parameter acts row by row, J's rows
    are sums of outer products of the gradients that arrive there and the other operand. A step is

        theta <- theta + lr d + lr^2 a / 2,   (J^T J + diag(t) + mu I) d = -(J^T r + t theta),   (...) a = -J^T r'',

    where r'' is the second derivative of r along d, and a is the geodesic acceleration, which is left out if it is large beside
    d. By how much the residuals there miss r + lr J d is then corrected with the same J and mu, up to three times:

        theta <- theta - lr (J^T J + diag(t) + mu I)^-1 J^T (r(theta) - (r + lr J d)).

    With fewer than 20 parameters, as a curve has them, mu D^2 takes the place of mu I, with D the largest norms so far of J's
    columns (and, below them, of the roots of t), so that parameters may be in any units.

    The system is solved in m or P dimensions, whichever are fewer, by Cholesky's method, and beyond 1500 rows by conjugate
    gradients with a Nystrom preconditioner of rank 200.

    **Rows.** Each step draws `rows` residuals at random, which stand for all; if the parameters are no more than `rows`, it draws
    at least four for each parameter. After 4 steps without a new record of the whole loss it draws 1.5 times as many.

    **Acceptance.** A step is taken if the loss of the rows drawn falls and the whole loss stays below twice its record. mu
    follows the ratio of the reduction to the predicted one (Nielsen's rule). A step tries at most 12 values of mu. It is
    corrected where it would not be taken, or where that ratio is below 0.75, as long as a correction is shorter than a tenth of d
    and lowers the loss of the rows drawn.

    **Residuals held out.** With fewer than 4 residuals for each parameter, a tenth of each term with 100 or more is held out, and
    stands for the term in an estimate of the whole loss. If 12 steps bring no new record of that estimate, and it is at least a
    tenth above its record, or the loss of those held out a tenth above that of the others, the points are being interpolated or
    noise is fitted: the parameters go back to the record, mu becomes a hundred times as large, and a warning says so once. All
    residuals are drawn from then on if no step lowers the loss of the others, or if the loss of those held out falls below 1e-5
    of the first loss, which leaves no room for noise; `holdout=True` holds them out to the end. No residuals of parameters that
    stand for themselves, such as a field's values, are held out.

    **The first call** of `step` does more, since first steps decide which minimum is reached. It takes 6 steps from each of two
    starts and goes on from the least loss, that of the beginning included. One start is the net after 40 steps of `EigenAdam`,
    after fewer if these bring the loss below a tenth, or after up to 120 until it has halved; the other is the net as it is. The
    second is left out if the first ends below a thousandth of the first loss, or has halved it in its last three steps. With
    fewer than 20 parameters the order is reversed.

    Args:
        params: a model, parameters, or param_groups, of one floating dtype on one device. Coefficients of an equation that are to
            be found are parameters like any other. Parameters that do not require a gradient are left alone.
        lr: multiplies the step, in [0, 2); a group's own for its parameters, which it leaves alone with 0. Schedulers change it
            as they change any learning rate; none is needed.
        rows: how many residuals a step draws; each term gets at least half of an equal share. None: all.
        max_rows: how many residuals a step draws at most, once their number grows. None: all.
        acceleration: whether steps are bent by the geodesic acceleration, which costs one more call of the closure in each step.
        corrections: how often a step is corrected at most, >= 0; each costs a call of the closure, one that
            raises the loss two, and no Jacobian.
        damping: the start of mu, relative to the mean of the diagonal of J J^T (of J D^-2 J^T), > 0. With race=True, the default,
            the start from the net as it is begins with it; the one after steps of `EigenAdam` ignores it, and begins with 1e-2 of
            the trace.
        race: whether the first call tries two starts. Without it the first step begins with `damping`.
        holdout: whether a tenth of the residuals is held out, of terms with 100 or more that data enter through layers. None: if
            there are fewer than 4 residuals for each parameter.
        solver: the system that is solved: "rows" (m x m, by Cholesky's method), "parameters" (P x P, by Cholesky's method),
            "nystrom" (m x m, by conjugate gradients), or "auto", which chooses by m and P. With squares of parameters in the loss
            "rows" takes the place of "nystrom".
        memory: how many bytes J may take. A larger J is not formed: products with it are computed from its factors. With
            solver="parameters", which "auto" takes for fewer parameters than rows, and with squares of parameters in the loss, J
            is formed whatever its size.
        seed: of the generator that draws the rows.
        max_iter: how many steps a call of `step` makes at most, all on one batch, as L-BFGS's does. Each but the first spares a
            call of the closure.
        nonfinite: what a step does when it meets NaN or inf: "error" raises `secondorder.NonFiniteError`; "skip" counts the step
            in `skipped_steps`. Neither changes anything else.

    Raises:
        TypeError, ValueError: an argument is out of its range, or the parameters are of several dtypes or devices.

    The state, kept with the first parameter, has the damping, the rows, the generator, the parameters [P] of the record and which
    these are, and D if it is used. Most memory goes to J [rows, P] and J J^T.

    Source: Levenberg (1944) and Marquardt (1963); Moré (1978) for D; Nielsen (1999) for the damping; Transtrum & Sethna (2012)
    for the acceleration; Fan (2012) for corrections with the same Jacobian; Frangella, Tropp & Udell (2021) for the
    preconditioner.
    """

    def __init__(
        self,
        params: nn.Module | ParamsT,
        lr: float | Tensor = 1.0,
        *,
        rows: int | None = 300,
        max_rows: int | None = None,
        acceleration: bool = True,
        corrections: int = 3,
        damping: float = 1e-3,
        race: bool = True,
        holdout: bool | None = None,
        solver: str = "auto",
        memory: int = 2**30,
        seed: int = 0,
        max_iter: int = 1,
        nonfinite: str = "error",
    ):
        name = type(self).__name__
        check_numbers(name, {"lr": lr, "damping": damping}, {**_NUMBERS, "damping": (lambda v: 0 < v < math.inf, "> 0")})
        check_counts(name, 1, {"rows": rows, "max_rows": max_rows}, optional=True)
        check_counts(name, 1, {"max_iter": max_iter})
        check_counts(name, 0, {"memory": memory, "corrections": corrections})
        check_flags(name, {"acceleration": acceleration, "race": race})
        checks: list[tuple[str, Any, bool, str]] = [
            ("holdout", holdout, holdout is None or type(holdout) is bool, "to be True, False or None"),
            ("solver", solver, solver in SOLVERS, f"one of {', '.join(map(repr, SOLVERS))}"),
            ("seed", seed, is_whole(seed), "to be an int"),
        ]
        check_arguments(name, checks)
        check_nonfinite(name, nonfinite)
        self._settings = Settings(
            min(rows or math.inf, max_rows or math.inf), max_rows or math.inf, acceleration, corrections, holdout, solver, memory
        )
        self._damping, self._race, self._seed, self._max_iter, self._nonfinite = damping, race, seed, max_iter, nonfinite
        self._reset()
        super().__init__(list(params.parameters()) if isinstance(params, nn.Module) else params, {"lr": lr, "skipped_steps": 0})
        warn_of_short_steps(name, lr)

    @outside_inference_mode
    @outside_autocast
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] = NEEDED) -> Tensor:  # type: ignore[override]
        """Makes one step, or up to `max_iter`: fewer if one of them lowers nothing, with which the call ends.

        A step calls the closure three times or more (twice without acceleration), and once less if it goes on from one of the
        same call. With race=True the first step of all calls it some 40 to 100 times, or 20 to 30 with fewer than 20 parameters.
        Within a call of `step` every call of the closure starts from the same state of torch's random generators, so that it
        draws the same points each time; the next call draws new ones.

        Args:
            closure: returns the loss with its graph: a scalar, or [(residual, weight), ...], which stands for the sum of
                mean(weight * residual ** 2); a residual is a tensor of any shape, its weight a number or a tensor of that shape.
                The closure takes derivatives by `torch.autograd.grad`. It may call `zero_grad()` and `loss.backward()`, which do
                nothing within a step; if it calls both it may return the loss detached, as Lightning's closures do.

        Returns:
            The loss before the first of these steps, detached.

        Raises:
            RuntimeError: the loss is no sum of squares, a coefficient is negative, the closure's residuals are not the same at
                every call, the net is in DistributedDataParallel over several processes, or a CUDA graph is being captured. As
                with any error, parameters and state are those before the step that failed, so that those of the same call that
                came before it are kept.
            NonFiniteError: the loss or the Jacobian holds NaN or inf, with nonfinite="error".
        """
        name = type(self).__name__
        self._refuse_capture()
        self._check_closure(closure)
        rates = self._rates()
        parameters, moving = list(rates), [p for p, rate in rates.items() if rate != 0]
        loss = LeastSquaresLoss(name, with_graph(name, closure, parameters), moving or parameters)
        run = self._run(loss, rates)
        value: Tensor | None = None
        kept = [p.detach().clone() for p in parameters]
        try:
            with idle_backward(name), in_one_process(name):
                here = loss.here()
                value = here.loss.detach().clone()
                for left in reversed(range(self._max_iter)):
                    self._check_finite(here)
                    if not moving:
                        break
                    there, called = self._advance(run, here)
                    kept = [p.detach().clone() for p in parameters]
                    self._warn_of_interpolation(run)
                    if left == 0 or (there is here and called):  # nothing lowers the loss
                        break
                    here = loss.here(called)
        except BaseException as error:
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
            if (explained := self._explained(error, parameters, loss.calling)) is not None:
                raise explained from error
            if not isinstance(error, NonFiniteError) or self._nonfinite == "error" or value is None:
                raise
            self.param_groups[0]["skipped_steps"] += 1
            return value
        finally:
            loss.leave()
        return value

    def _rates(self) -> dict[Tensor, float]:
        """Returns the learning rate of every parameter that requires a gradient, once the groups are known to be valid."""
        # torch warns of a parameter that is given twice, and takes it: here it is one.
        groups = {p: group for group in self.param_groups for p in group["params"] if p.requires_grad and p.numel()}
        if not groups:
            raise RuntimeError(f"{type(self).__name__}.step(): expected a parameter that requires a gradient, got none")
        for group in self.param_groups:
            check_numbers(f"{type(self).__name__}.step()", group, _NUMBERS)
        return {p: float(group["lr"]) for p, group in groups.items()}

    def _run(self, loss: LeastSquaresLoss, rates: dict[Tensor, float]) -> GaussNewtonStep:
        """Returns what makes the steps of one call."""
        generator = torch.Generator().manual_seed(self._seed)
        if state := self.state.get(self._first_parameter()):
            generator.set_state(state["generator"].cpu())
        slow = functools.partial(self._warn_of_passes, loss.parameters)
        jacobians = CheckedJacobian(loss, self._plans, slow, self._buffer)
        lr = _by_element(loss.parameters, rates)
        return GaussNewtonStep(loss, jacobians, self._settings, generator, lr, self._buffer)

    def _check_closure(self, closure: Any) -> None:
        """Raises where a step has no closure that it can call."""
        name = f"{type(self).__name__}.step()"
        if closure is None or closure is NEEDED:
            raise RuntimeError(
                f"{name}: expected a closure, since the loss is needed at several points: a function that computes "
                "and returns the loss; it may call optimizer.zero_grad() and loss.backward(), which do nothing here"
            )
        if not callable(closure):
            raise TypeError(f"{name}: expected a closure, a function that returns the loss, got {type(closure).__name__}")

    def _explained(self, error: BaseException, parameters: list[Tensor], in_closure: bool) -> RuntimeError | None:
        """Returns an error that says what to do in place of one that closures often cause; None: it speaks for itself."""
        name = f"{type(self).__name__}.step()"
        if "donated_buffer" in str(error):  # torch.compile's graphs are run backward once, unless it is told otherwise
            return RuntimeError(
                f"{name}: expected a graph that can be run backward more than once, got a compiled one that cannot. "
                "Call the model itself rather than the compiled one, or set torch._functorch.config.donated_buffer = False "
                "before it is compiled."
            )
        reads_none = isinstance(error, AttributeError | TypeError) and "NoneType" in str(error)
        if in_closure and reads_none and any(p.grad is None for p in parameters):
            return RuntimeError(
                f"{name}: the closure failed: {error}. Where it reads p.grad: within a step backward() computes no "
                "gradients. Take them by torch.autograd.grad(loss, parameters, retain_graph=True), or after the step"
            )
        return None

    def _warn_of_interpolation(self, run: GaussNewtonStep) -> None:
        """Says once that a step has gone back since only the residuals drawn still fell."""
        if run.interpolates:
            self._warn_once(
                "interpolation",
                f"{type(self).__name__}: the residuals held out lie above the others, or rise, and have brought no record for "
                f"{HELD_PATIENCE} steps: the points are being interpolated, or noise is fitted. It has gone back, with more "
                "damping. More points, or new ones in every step, let it go on; so does holdout=False, for data without noise or "
                "where the least loss itself is sought.",
            )

    def _check_finite(self, here: Residuals) -> None:
        """Raises NonFiniteError where the loss or a residual is NaN or inf."""
        name = type(self).__name__
        if not math.isfinite(here.value):
            raise NonFiniteError(f"{name}.step(): the loss is {here.value}; no parameter and no state has changed")
        if not math.isfinite(here.objective):
            raise NonFiniteError(
                f"{name}.step(): a residual is NaN or inf where the loss leaves it out, so that its gradient is NaN. "
                "Leave it out before it is squared: ((u - y)[mask] ** 2).mean(), or torch.where(mask, u - y, 0); no "
                "parameter and no state has changed"
            )

    def _advance(self, run: GaussNewtonStep, here: Residuals) -> tuple[Residuals, bool]:
        """Makes one step, or the race of starts before the first one; keeps its state.

        Returns:
            The loss where it leads, `here` itself if nothing lowers it; whether the closure was called last there.
        """
        state, raced = self.state.get(self._first_parameter(), {}), False
        positions = {p: i for i, p in enumerate(self._parameters())}
        moved = tuple(positions[p] for p in run.loss.parameters)
        if state:
            progress = Progress(**{key: state[key] for key in Progress._fields})
            there, progress = run.step(here, progress if state["moved"] == moved else progress.with_new_record())
        elif here.objective == 0:  # nothing lowers it; the race is for a loss that is not zero
            return here, True
        elif raced := self._race:
            there, progress = race(run, here, self._damping, EigenAdam)
        else:
            rows = sum(r.numel() for r in here.values)
            start = Progress(self._damping / min(rows, self._settings.rows), self._settings.rows, first=here.objective)
            there, progress = run.step(here, start)
        steps = state.get("step", 0) + 1
        own = {"generator": run.generator.get_state(), "step": steps, "moved": moved}
        self.state[self._first_parameter()] = {**progress._asdict(), **own}
        return there, not raced

    @property
    def skipped_steps(self) -> int:
        """Returns how many steps nonfinite="skip" has skipped. Part of the state_dict."""
        return int(self.param_groups[0]["skipped_steps"])

    def metrics(self) -> dict[str, float]:
        """Returns numbers worth logging.

        Returns:
            "damping": mu relative to tr(J J^T), or to tr(J D^-2 J^T) with fewer than 20 parameters. "rows": how many residuals
            the next step draws, inf for all. "ratio": the last step's reduction over the predicted one; near 1 where the linear
            model holds, 0 if no step was accepted. "excess": the mean loss of the residuals held out over that of the others; far
            above 1 if points are interpolated, 0 if none are held out. "skipped_steps": how many steps NaN or inf has prevented.
            All are 0 before the first step.
        """
        state = self.state.get(self._first_parameter(), {})
        found = {key: float(state.get(key, 0.0)) for key in ("damping", "rows", "ratio", "excess")}
        return {**found, "skipped_steps": float(self.skipped_steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as every torch optimizer does.

        Raises:
            ValueError: it is that of another optimizer.
        """
        expected = {*Progress._fields, "generator", "step", "moved"}
        for state in state_dict["state"].values():
            if set(state) != expected:
                raise ValueError(
                    f"{type(self).__name__}.load_state_dict(): expected a state with {sorted(expected)}, got one with "
                    f"{sorted(state)}"
                )
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as every torch optimizer does; its parameters are of the dtype and on the device of the others.

        Raises:
            TypeError: a parameter is not of the others' dtype, or not of a floating one.
            ValueError: it is on another device, or lr is out of range.
        """
        name = type(self).__name__
        with self._group_or_nothing():
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            check_numbers(name, group, _NUMBERS)
            for p in group["params"]:
                like = self._first_parameter()
                if p.dtype != like.dtype or p.dtype not in (torch.float32, torch.float64):
                    raise TypeError(
                        f"{name}: expected parameters of one dtype, float32 or float64, got {p.dtype} and {like.dtype}"
                        + ("; store complex ones as pairs of real ones, torch.view_as_complex(p)" if p.is_complex() else "")
                    )
                if p.device != like.device:
                    raise ValueError(f"{name}: expected parameters on one device, got {p.device} and {like.device}")

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state and what it was made with."""
        own = ("_settings", "_damping", "_race", "_seed", "_max_iter", "_nonfinite")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes a copy's state; `load_state_dict` comes here too, with the state alone."""
        super().__setstate__(state)
        self._reset()

    def _reset(self) -> None:
        """Sets up what is no part of the state."""
        self._plans = Plans()
        self._slow: set[Tensor] = set()  # the parameters of which `_warn_of_passes` has told
        self._buffer = Buffer()

    def _warn_of_passes(self, parameters: Sequence[Tensor], nodes: dict[int, str]) -> None:
        """Says once of every parameter, by its position among these, that its columns cost a backward pass for each residual."""
        new = {parameters[position]: node for position, node in nodes.items() if parameters[position] not in self._slow}
        if not new:
            return
        self._slow |= new.keys()
        names = {
            p: f"{known!r} {tuple(p.shape)}" if known else f"the parameter of shape {tuple(p.shape)}"
            for group in self.param_groups
            for p, known in zip(group["params"], group.get("param_names", [None] * len(group["params"])), strict=True)
        }
        entries = "; ".join(f"{names[p]} by {node}" for p, node in new.items())
        warn(
            f"{type(self).__name__} needs a backward pass for each residual drawn, since what follows enters by a node whose "
            f"rows are not the residuals' own: {entries}. The steps are exact, and slow."
        )


def _by_element(parameters: Sequence[Tensor], rates: dict[Tensor, float]) -> float | Tensor:
    """Returns the learning rate of all parameters, or that of each element [P] where they differ."""
    each = [rates[p] for p in parameters]
    if len(set(each)) == 1:
        return each[0]
    return torch.cat(
        [torch.full((p.numel(),), rate, dtype=p.dtype, device=p.device) for p, rate in zip(parameters, each, strict=True)]
    )
