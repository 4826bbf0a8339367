"""EACG: the positive-curvature Hessian and EA-CG (Chen et al., "EA-CG", 2019)."""

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secondorder._layers import parameters_of
from secondorder._tensors import Transfer, captured_now
from secondorder.curvature import Curvature
from secondorder.errors import NonFiniteError
from secondorder.optim import _momentum
from secondorder.optim._docstrings import complete_docstring
from secondorder.optim._eacg_captured import CapturableOptimizer
from secondorder.optim._eacg_operands import UpdateOperands, max_norm
from secondorder.optim._layerwise import Groups
from secondorder.optim._numbers import NUMBERS, Numbers, check_flags
from secondorder.optim._solving import Systems
from secondorder.solvers import EACGSolver, Factors, Solver, SolverOptions


@complete_docstring
class EACG(CapturableOptimizer):
    """Trains the linear layers of a model by damped Newton steps under the positive-curvature Hessian (PCH).

        optimizer = secondorder.EACG(model, criterion, lr=0.02)
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()

    For each layer z = W h + b, with gradients B and g of the mean loss, the curvature is a bias Hessian H by backward recursion
    (Chen et al., Eq. 8) times an input factor A ~ E[h h^T]. The criterion may be non-convex. With a = E[h], the directions solve
    (Eq. 10, 11b)

        (1 - alpha) H P a a^T + alpha P = -B     and     ((1 - alpha) H + alpha I) d = -g,

    and the update is V <- momentum V + P, W <- (1 - lr weight_decay) W + lr V, and the same for b with d. Where |[P, d]| exceeds
    max_step sqrt(n_out), that is, where the n_out rows of [P, d] have a root mean square length above `max_step`, both are scaled
    down to that bound; otherwise they are the paper's, to the bit.

    With large batches a step costs little more than one of SGD. The paper's own method is `momentum=0, factor_decay=0,
    max_step=None, solver="ea-cg-truncated"`. `LayerwiseNewton` takes the same curvature, and finds step size, momentum and
    damping by itself.

    Args:
        model: any module; its nn.Linear layers are covered. A layer that something else than an elementwise function follows gets
            its empirical Fisher block where the curvature is one by recursion.
        lr: step size, >= 0.
        curvature: "pch-abs" (PCH-1: absolute values), "pch-clip" (PCH-2: clips in Eq. 8b, absolute values in Eq. 8a),
            "pch-clip-all" (clips in both), "gauss-newton", "kflr", "fisher-mc", "fisher-empirical", "fisher-exact", or a
            `secondorder.curvature.Curvature`, such as PCH(gamma).
        alpha: damping, in (0, 1): the weight of the identity, against 1 - alpha of H.
        max_cg: the most iterations of the solvers that use conjugate gradients, >= 1.
        eps_cg: these solvers stop once the residual is at most this times the first one, >= 0.
        solver: "ea-cg" (exact across the mean input, CG along it), "ea-cg-truncated" (the paper's iterates), "kron-cg", "kfi",
            "kfi-rank-one", "exact", "ea-isotropic", "auto", or a `secondorder.solvers.Solver`, which has its own settings.
        momentum: of V, in [0, 1).
        weight_decay: >= 0; `decoupled_weight_decay` says of which kind.
        factor_decay: decay of the exponential averages of H and a over their renewals, in [0, 1); they are bias-corrected. 0: the
            last renewal alone.
        curvature_every: H and a are renewed at the first curvature_every steps, and then at every curvature_every-th; >= 1.
            Between renewals no forward pass is recorded.
        curvature_samples: at most so many instances of each forward pass are used for E[h h^T] and for the curvature, except the
            criterion's Hessian, which uses all; >= 1. None: all are used. a = E[h] always uses all.
        inverse_every: the solver's factorisations are renewed at the first inverse_every steps, and then at every
            inverse_every-th; >= 1.
        max_factor_elements: limit on n_in^2 of a layer, >= 0. Above it "kfi" uses "kfi-rank-one"; "auto" uses "ea-isotropic"
            above the smaller of this and 1024^2.
        max_step: bound on the root mean square of the lengths of a layer's rows of [P, d], before lr and momentum, > 0; None: no
            bound, as in the paper.
        fallback: what happens to parameters that no curvature covers. "sgd": SGD updates them, and a warning names them once.
            "error": `step` raises an error.
        decoupled_weight_decay: True: W <- (1 - lr weight_decay) W, as in AdamW. False: weight_decay W is added to the gradient,
            as in SGD and Adam.
        capturable: whether a CUDA graph may capture steps with the passes before them, once one was made without. A replay makes
            the step that would be made then, but for the groups' numbers, which stay what they were; a learning rate that is a
            tensor on the parameters' device is read by each replay, and is in [0, 1]. For one process, kernels for CUDA, solver
            "ea-cg" or "ea-cg-truncated", curvature_every=1, the curvatures "pch-..." and "fisher-empirical", known activations,
            a criterion whose Hessian has a formula, targets none of which it ignores, and parameters of 32 bits or more. After a
            capture `step` and `state_dict` wait for the device, and replays alone raise no error: `skipped_steps` tells.

    Every step reads lr, alpha, momentum, weight_decay, factor_decay, max_step, maximize and decoupled_weight_decay from
    `param_groups`. A layer uses the alpha, factor_decay and max_step of its weight's group. maximize must be the same in all
    groups.

    Source: Chen, Chou & Chang, "EA-CG: An Approximate Second-Order Method for Training Fully-Connected Neural Networks" (AAAI
    2019); averages, momentum and `max_step` are additions.
    """

    _remedy = "lower lr or raise alpha"
    _group_keys = ("alpha", "factor_decay")
    _numbers: ClassVar[Numbers] = {**NUMBERS, "max_step": (lambda v: v > 0, "> 0, or None for no bound")}

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        lr: float | Tensor = 0.02,
        *,
        curvature: str | Curvature = "pch-abs",
        alpha: float = 0.01,
        max_cg: int = 50,
        eps_cg: float = 1e-4,
        solver: str | Solver = "ea-cg",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        factor_decay: float = 0.9,
        curvature_every: int = 1,
        curvature_samples: int | None = None,
        inverse_every: int = 1,
        max_factor_elements: int = 2**24,
        max_factor_dim: int | None = 4096,
        max_step: float | None = 0.25,
        average: bool = False,
        fallback: str = "sgd",
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
        nonfinite: str = "error",
        capturable: bool = False,
    ):
        check_flags(type(self).__name__, {"capturable": capturable})
        if lr is None:
            raise ValueError(
                f"{type(self).__name__}: expected lr >= 0, got None; the optimizer that finds its own step size is "
                "secondorder.LayerwiseNewton(model, criterion)"
            )
        defaults = {
            "lr": lr, "alpha": alpha, "momentum": momentum, "weight_decay": weight_decay, "factor_decay": factor_decay,
            "max_step": max_step,
        }  # fmt: skip
        super().__init__(
            model, criterion, defaults, curvature=curvature, solver=solver,
            options=SolverOptions(max_cg, eps_cg, max_factor_elements), curvature_every=curvature_every,
            curvature_samples=curvature_samples, inverse_every=inverse_every,
            max_factor_dim=max_factor_dim, average=average, keep_inputs=False,
            fallback=fallback, maximize=maximize, decoupled_weight_decay=decoupled_weight_decay, nonfinite=nonfinite,
        )  # fmt: skip
        if capturable:
            self._allow_captures(curvature, solver)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as every torch optimizer does.

        Raises:
            ValueError: the state is of an optimizer that finds its own step size.
        """
        if any(group.get("lr") is None or "tau" in group for group in state_dict["param_groups"]):
            raise ValueError(
                f"{type(self).__name__}.load_state_dict(): expected the state of an optimizer with a learning rate, got one of "
                "an optimizer that finds its own step size; load it into secondorder.LayerwiseNewton"
            )
        super().load_state_dict(state_dict)

    def metrics(self) -> dict[str, float]:
        """Returns numbers worth logging. Waits for the device; a step does not compute them.

        Returns:
            "damping": alpha of the first group. "trace": the sum of the traces of all layers' bias Hessians H, on the scale of
            the loss; if alpha is far above (1 - alpha) times it, a step is little else than the gradient over alpha. "velocity":
            the Euclidean length of all V together, before lr multiplies them; 0 if momentum is 0. "coverage": the share of all
            trained numbers that a curvature has covered, rather than the fallback. "skipped_steps": how many steps NaN or inf has
            prevented.
        """
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        hessians = [state["factors"]["bias_hessian"] for state in self.state.values() if "factors" in state]
        velocities = [state["momentum"] for state in self.state.values() if "momentum" in state]
        traces = [hessian.diagonal().sum(dtype=torch.float64) for hessian in hessians]
        norms = [torch.linalg.vector_norm(velocity, dtype=torch.float64) for velocity in velocities]
        return {
            "damping": float(self.param_groups[0]["alpha"]),
            "trace": float(torch.stack(traces or [zero]).sum()),
            "velocity": float(torch.stack(norms or [zero]).norm()),
            **super().metrics(),
        }

    def _advance(self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], groups: Groups) -> None:
        captured = self._capturable and captured_now()
        if self._capturable and not captured:
            self._weighs_targets = any(loss.masses() is not None for loss in self._tape.losses)
        if type(self._solver) is EACGSolver and self._fusible(covered, groups):  # a subclass may solve otherwise
            (self._captured_update if captured else self._fused_update)(covered, factors, groups, self._solver)
        elif captured:
            raise RuntimeError(
                f"{type(self).__name__}.step(): expected weights of 32 bits or more, and biases that each belong to one layer "
                "and have its weight's learning rate, momentum and weight decay, where a CUDA graph captures the step; call "
                "step() without a capture"
            )
        else:
            self._update(covered, factors, groups)

    def _update(self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], groups: Groups) -> None:
        """Makes a step by any solver."""
        gradients = self._gradients()
        alphas = {layer: float(groups[layer.weight]["alpha"]) for layer in covered}
        scales = {layer: (1 - alpha, alpha) for layer, alpha in alphas.items()}
        found, revised = self._directions(Systems(covered, gradients, scales), Transfer())
        directions, prepared = revised() or found
        self._shorten(directions, covered, groups)
        others = self._fallback.updates(self.param_groups, gradients, list(directions), self.state)
        velocities = {p: _momentum.velocity(p, d, groups[p], self.state) for p, d in directions.items()}
        moved = [(layer, p) for layer in covered for p in layer.parameters(recurse=False) if p in velocities]
        bounded = _momentum.bounded([(p, velocities[p], float(groups[p]["lr"])) for _, p in moved], Transfer())
        bad = {layer: "the solution overflows" for (layer, _), good in zip(moved, bounded(), strict=True) if not good}
        if bad:
            raise NonFiniteError(self._not_finite(bad, covered))
        self._fallback.apply(others, self.state)
        for p, velocity in velocities.items():
            _momentum.apply(p, velocity, groups[p], self.state)
        self._commit(covered, factors, prepared)

    def _fused_update(
        self, covered: dict[nn.Linear, Factors], factors: dict[nn.Linear, Factors], groups: Groups, solver: EACGSolver
    ) -> None:
        """Solves and updates all layers in one call, then commits every state."""
        gradients = self._gradients()
        operands = UpdateOperands.of_layers(covered, gradients, groups, self.state)
        others = self._fallback.updates(self.param_groups, gradients, [*operands.weights, *operands.biases], self.state)
        if covered:
            iterations = operands.update_(covered.values(), solver, [float(group["lr"]) for group in operands.groups])
            bad = [layer for layer, count in zip(covered, iterations.tolist(), strict=True) if count < 0]
            if bad:
                raise NonFiniteError(self._not_finite(dict.fromkeys(bad, "the solution overflows"), covered))

        self._fallback.apply(others, self.state)
        self._commit(covered, factors, {})
        for parameter, buffer in operands.started.items():
            self.state[parameter]["momentum"] = buffer

    def _shorten(self, directions: dict[Tensor, Tensor], layers: Iterable[nn.Linear], groups: Groups) -> None:
        """Bounds the directions of each layer by its `max_step`, as `ops.eacg_update_` does."""
        for layer in layers:
            own = [p for p in parameters_of(layer) if p in directions]
            bound = max_norm(layer.weight, groups[layer.weight])
            if not own or bound == math.inf:
                continue
            norms = [torch.linalg.vector_norm(directions[p], dtype=torch.float64) for p in own]
            factor = (bound / torch.stack(norms).norm()).clamp(max=1.0)
            for p in own:
                directions[p] = directions[p] * factor.to(directions[p].dtype)

    def _fusible(self, layers: Iterable[nn.Linear], groups: Groups) -> bool:
        """Tells whether `ops.eacg_update_` knows all that the groups ask for."""
        captured = self._capturable and captured_now()

        def numbers(p: Tensor) -> list[Any]:
            own = [groups[p][key] for key in ("lr", "momentum", "weight_decay", "decoupled_weight_decay")]
            # To compare the values of tensors is to read them, which no capture can.
            return [id(each) if captured and isinstance(each, Tensor) else each for each in own]

        several, biases = len(self.param_groups) > 1, set()
        for weight, bias in map(parameters_of, layers):
            if weight.dtype is torch.bfloat16 or (several and bias in groups and numbers(bias) != numbers(weight)):
                return False
            if bias in biases:  # two layers share it: it is to be moved once
                return False
            if bias is not None:
                biases.add(bias)
        return True
