"""EigenAdam: Adam in the eigenbasis of the expectation-approximated curvature."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from secondorder._tensors import captured_now, is_sharded, outside_inference_mode
from secondorder._warnings import warn
from secondorder.curvature import Curvature
from secondorder.errors import NonFiniteError
from secondorder.ops.eigen import LAST_SLOPE, OSCILLATIONS, REFUSED, SLOPE, eigen_length
from secondorder.optim._amp import outside_autocast
from secondorder.optim._eigen.bias_hessians import BiasHessians
from secondorder.optim._eigen.bounds import LoopChanges
from secondorder.optim._eigen.matrices import Matrix
from secondorder.optim._eigen.observing_optimizer import ObservingOptimizer
from secondorder.optim._eigen.operands import Operands
from secondorder.optim._eigen.rates import SLOW, GroupRates, RateReader, check_group, rates_of_matrices
from secondorder.optim._eigen.replays import Replay
from secondorder.optim._eigen.reports import StepReports
from secondorder.optim._eigen.sharded_state import local_share_in_bases
from secondorder.optim._eigen.state import forget_state, share_in_bases
from secondorder.optim._eigen.step import EigenStep
from secondorder.optim._eigen.tables import row_share_if_no_map
from secondorder.optim._growth import LossGrowth
from secondorder.optim._numbers import check_arguments, check_counts, check_flags, check_nonfinite, warn_of_short_steps


class EigenAdam(ObservingOptimizer):
    """Applies Adam's rule in the eigenbasis of the expectation-approximated curvature, with a step length that it finds.

    It works with any model, loss and training loop, which call nothing but `zero_grad`, `backward` and `step`. For every matrix
    W [n, p] with inputs h and gradient G = E[delta h^T] it keeps a basis V of the k largest eigen-directions of the centred
    inputs, and a basis U of the k largest of the outputs' side. It renews both at the first five steps, and then at every
    `renew_every`-th, by one power iteration on running averages. A side with at most 2 k + 1 elements has its full basis. The
    bias takes the mean input a out exactly: W h + b = W (h - a) + (b + W a), so that with g, the gradient of the bias, the
    gradient of W is G' = G - g a^T. A batch's mean input counts up to a length of 5 |G| / |g|, since rows that the loss
    leaves out may be of any length. In the coordinates

        C = U^T [G' V, g],   R = [G' V, g] - U C,   T = U^T G' (I - V V^T),   E = (I - U U^T) G' (I - V V^T)

    each element follows Adam's rule with Nesterov's look-ahead. The normalised parts, taken back to W and b, give the step S, and
    W and b move by lr l S. The step length l rises to 0.01 over the first 14 steps, or to less if these prove too long. Then it
    rises, up to 0.1, while the loss of fresh batches still falls along the step before, and falls while that loss rises. With K,
    the number of steps along which it rose, l decays as (1 + K/25)^(-1/2), and grows no more from K = 25 on. Where parameters
    move for the first time after others have trained, as those that are unfrozen, l is at most 0.01.

    Elements of weights that the loop sets after steps, as clamps and masks do, count as those without a gradient. In place of
    weight decay they move by one rounding unit, which frees those that it sets no more. After steps 1, 2, 4, 8 and so on a
    weight's first 4,096 elements tell whether some were set, to two constants at most.

    All other parameters (a bias by itself, a norm's weight, an embedding) follow Adam's rule at the same step length. An element
    whose gradient is exactly zero moves by weight decay alone. So a row of an embedding moves only in steps that look it up; if
    a step looks up m of n rows, they move 2 n / m times as far, at most ten times.

    A forward hook on linear layers and convolutions sums up their inputs (at most 4,096 of a call, 1,024 patches of a
    convolution) and keeps none. It sees every call under autograd since the last step, even if its output is not used. Weights
    that are used otherwise (attention's, an LSTM's, those inside a compiled graph) get V from their gradients. The first gradient
    of such a weight tells whether it is no map: a table that a batch indexes, if at least half of its rows are zero (three
    quarters without a model); or numbers that each stand for themselves (deviations, gates, pixels), if the square of the
    gradient's mean is at least half of its mean square. Both follow Adam's rule.

    Args:
        params: a model, whose parameters are all trained; or parameters or param_groups, as torch's optimizers take them.
        lr: what multiplies the step length that is found, >= 0. Schedulers change it as any learning rate; none is needed. With
            0 a parameter counts as one without a gradient.
        model: where `params` are parameters or groups, the model that they are of, so that its layers' inputs are seen. None:
            every parameter with two or more dimensions is a matrix without them.
        betas: the decay of the first and second moments.
        rank: k, the directions of a basis, >= 1. None: 8, and 16 for a layer that sees 256 or more inputs at a time, or
            where several ranks train.
        eps: added to the root of the second moments, relative to the largest root mean square of the parameter's gradient so far.
            So a step does not depend on the scale of the loss.
        weight_decay: shrinks the parameters by lr l weight_decay at each step, apart from the gradient, as AdamW does.
        renew_every: the bases are renewed at every `renew_every`-th step, >= 1. With 1 the step length stays at its start, 0.01:
            where a renewal comes between, the slope along the step before is not known.
        curvature: which matrix U is the basis of. "gradient": E[G' G'^T], which needs no criterion. "pch-abs", "pch-clip",
            "pch-clip-all", "gauss-newton", "kflr", "fisher-mc", "fisher-exact", "fisher-empirical", or a
            `secondorder.curvature.Curvature`: the bias Hessian H of a linear layer, on any scale, from the forward passes before
            steps that renew bases. Layers without one use their gradients: all but linear ones, and those whose weight is shared.
        criterion: with a bias Hessian: a module, or a function (output, target) -> scalar loss to be called as
            `optimizer.criterion`. The loop must compute its loss by it.
        maximize: whether the loss is to be maximised.
        nonfinite: what a step does that meets NaN or inf: "error" raises `NonFiniteError`, "skip" counts it in `skipped_steps`.
            Nothing else changes. On CUDA, where no step waits for the device, the error comes with one of the next steps.
        capturable: whether a CUDA graph may capture steps with the passes before them, once five were made without one. A replay
            makes the step that would be made then, but for the groups' numbers, which stay what they were; a learning rate that
            is a tensor on the parameters' device is read by each replay. For one process, kernels for CUDA, and
            curvature="gradient". After a capture `step` and `state_dict` wait for the device, and replays alone raise no error:
            `skipped_steps` tells.

    Raises:
        ValueError: an argument is out of its range; or DTensors are sharded otherwise than by rows, over one dimension of a mesh.

    Parameters may be DTensors whose rows ranks share, as `torch.distributed.fsdp.fully_shard` has it. A step is then that of one
    process with all batches, and ranks exchange O(k (n + p)) numbers for a matrix; it waits for the device.

    State of a matrix: two moments of n p numbers, as Adam's, and O(k (n + p)) more, in float32 for 16-bit parameters.

    Source: builds on Chen et al., "EA-CG", whose E[h h^T] is a a^T alone; on SOAP (Vyas et al., 2024), Adam in Shampoo's
    eigenbasis, and COSMOS (Liu et al., 2025), which keeps a part of it; the step length is by Kesten's rule (1958).
    """

    _copied = (*ObservingOptimizer._copied, "_nonfinite")
    _instead_of_capture = (
        "make the optimizer with capturable=True, or capture forward and backward passes alone, and call step() after each replay"
    )

    def __init__(
        self,
        params: nn.Module | ParamsT,
        lr: float | Tensor = 1.0,
        *,
        model: nn.Module | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        rank: int | None = None,
        eps: float = 1e-7,
        weight_decay: float = 0.0,
        renew_every: int = 5,
        curvature: str | Curvature = "gradient",
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        maximize: bool = False,
        nonfinite: str = "error",
        capturable: bool = False,
    ):
        name = type(self).__name__
        if isinstance(params, nn.Module):
            check_arguments(name, [("model", model, model in (None, params), "to be given once")])
            model, params = params, list(params.parameters())
        elif not (model is None or isinstance(model, nn.Module)):
            raise TypeError(
                f"{name}: expected model to be an nn.Module, got {type(model).__name__}; several models go into an nn.ModuleList"
            )
        check_counts(name, 1, {"rank": rank}, optional=True)
        check_counts(name, 1, {"renew_every": renew_every})
        check_flags(name, {"maximize": maximize, "capturable": capturable})
        check_nonfinite(name, nonfinite)
        check_arguments(name, [
            ("capturable", capturable, not capturable or curvature == "gradient", "False with a bias Hessian's bases")
        ])  # fmt: skip
        if callable(lr):
            raise TypeError(
                f"{name}: expected lr to be a number, got {type(lr).__name__}; EigenAdam(model) needs no criterion, and takes a "
                "model beside parameters as model="
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        check_group(name, defaults)
        self._nonfinite = nonfinite
        super().__init__(
            params, defaults, model=model, rank=rank, renew_every=renew_every, curvature=curvature, criterion=criterion,
            capturable=capturable,
        )  # fmt: skip
        warn_of_short_steps(name, lr)
        if model is not None and set(self._parameters()).isdisjoint(model.parameters()):
            warn(
                f"{name}: no parameter is one of model's, so that it shows no inputs of theirs. Give the model whose parameters "
                "these are, or leave model out."
            )
        self._find_anew()

    def _reset(self) -> None:
        super()._reset()
        self._rate_reader = RateReader(type(self).__name__)
        self._reports = StepReports()
        self._growth = LossGrowth(type(self).__name__, "lower lr, or clip the gradients")  # of closures

    def _find_anew(self, states: Mapping[Tensor, dict[str, Any]] | None = None) -> None:
        super()._find_anew(states)
        self._changes = LoopChanges()

    # --- the step ------------------------------------------------------------------------------------------------------------

    @outside_inference_mode
    @outside_autocast
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step from the parameters' gradients.

        Args:
            closure: computes the loss anew and goes backward through it; called once, first.

        Returns:
            The closure's value, or None.

        Raises:
            NonFiniteError: a gradient is NaN or inf, or so large that its square is (nonfinite="error"). Nothing has changed.
            RuntimeError: a gradient is sparse; there is none at the first step (later that is a warning); a CUDA graph is being
                captured, and this step cannot be (see `capturable`); or, with the bias Hessian's bases, no call of the criterion
                was recorded that leads to the gradients.
        """
        if not self._capturable:
            self._refuse_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            if closure is not None:
                self._warn_of_growth(loss)  # where warnings are errors nothing has changed yet
            self._step()
        finally:
            self._forget_passes()
            if self._hessians is not None:
                self._hessians.tape.clear(release=True)
                self._schedule_recording()
        return loss

    @torch.compiler.disable  # its bookkeeping has nothing to compile
    def _step(self) -> None:
        """Renews the bases if that is due, moves all parameters, and notes in the states what came of it."""
        name, sign = f"{type(self).__name__}.step()", -1 if self._maximize() else 1
        recorded = self._hessians  # before hooks for other parameters may lay another tape
        rates = self._rate_reader.read(self.param_groups, self._on_device)
        matrices = self._matrices_to_step(rates)
        if not matrices:
            return
        operands = Operands(name, matrices, sign)
        captured = self._captures(matrices)
        if not captured:
            self._read_reports()
        renews = captured or self._renews_now()
        self._sketches.expect(captured)
        self._find_maps(matrices)
        if not captured:
            self._changes.look(self.state, self._is_distributed)
        states, shared = [self._state_of(matrix) for matrix in matrices], self._shared_state()
        replay = Replay(self._renew_every, shared["steps"]) if captured else None
        step = EigenStep(name, matrices, states, operands, shared["control"], self._shards, replay)
        row_shares: dict[Matrix, float] = {}
        if renews:
            row_shares = self._lookups.row_shares(matrices, states, self._all_reduce_ if self._is_distributed else None)
            self._plan_renewal(step, matrices, recorded, sign)
        matrix_rates = rates_of_matrices(matrices, states, row_shares, rates, self._groups_of, shared["control"])
        step.renew()  # so far no parameter and no basis has changed
        enters = shared["steps"] > 0 and not all(state["step"] for state in states)
        step.move(matrix_rates, self.param_groups[0], enters)
        if captured:
            step.note_captured()
            self._replays.add(matrices)
        elif self._is_reported(shared["control"]):
            self._note_made(step, matrices, row_shares)
            self._reports.add(shared["control"], matrices, renews)
        elif self._reports.look(shared):
            self._note_made(step, matrices, row_shares)
        else:
            self._tell_of_refused()

    def _matrices_to_step(self, rates: list[GroupRates]) -> list[Matrix]:
        """Returns the matrices with a gradient and a learning rate above 0; none where no step is to be made.

        Raises:
            RuntimeError: no step has found a gradient yet.
        """
        if self._present_ids() != self._parameter_ids:
            self._find_anew()  # a group's list of parameters may have been changed by hand
        matrices = [matrix for matrix in self._matrices if matrix.has_gradient]
        if not matrices:
            self._tell_of_no_gradients()
        elif not all(rate.lr for rate in rates):
            self._shared_state()
            for matrix in matrices:  # DCP makes a step with a learning rate of 0 before it loads their states
                self._state_of(matrix)
            # Slopes along steps that are not made would lengthen others.
            matrices = [matrix for matrix in matrices if any(rates[group].lr for group in self._groups_of[matrix])]
        return matrices

    def _plan_renewal(self, step: EigenStep, matrices: list[Matrix], recorded: BiasHessians | None, sign: int) -> None:
        """Plans from which inputs, and from which bias Hessians if there are any, a step renews its bases."""
        trained = {p: group for group in self.param_groups for p in group["params"]}
        hessians = {} if recorded is None else recorded.of_step(trained, sign, self._process_group)
        unseen = step.plan_renewal(self._sketches_of(matrices), hessians)
        self._warn_of_unseen(unseen)  # where warnings are errors nothing has changed yet

    def _captures(self, matrices: list[Matrix]) -> bool:
        """Returns whether a CUDA graph captures this step; if not, brings Python's counts to those of the device.

        Raises:
            RuntimeError: a graph captures a step that cannot be captured.
        """
        captured = self._capturable and captured_now()
        if captured:
            if self._is_distributed:
                raise RuntimeError(f"{type(self).__name__}.step(): expected no capture of a CUDA graph where several ranks train")
            self._check_captured_rates()
        if self._capturable:
            self._replays.check(matrices, self.state, captured)
        if not captured:
            self._catch_up()
        return captured

    def _on_device(self, lr: Any) -> bool:
        """Returns whether the operators read this learning rate on the device, rather than be told its value."""
        return self._capturable and super()._on_device(lr) and self._shards is None

    def _find_maps(self, matrices: list[Matrix]) -> None:
        """Decides by the first gradient of parameters that no module is known to use which of them are maps, and have bases."""
        for matrix in matrices:
            if not matrix.decided_by_gradient or self.state[matrix.weight].get("step"):
                continue
            # Without a model this looks at every layer's weight, and an instance leaves half of a layer's ReLUs idle.
            most = 0.25 if self._model is None else 0.5
            row_share = row_share_if_no_map(matrix, most, self._all_reduce_ if is_sharded(matrix.weight) else None)
            if matrix.has_bases != (row_share is None):
                matrix.has_bases = row_share is None
                forget_state(self.state[matrix.weight])  # what a step that was refused has left
            if row_share is not None and row_share < 1:
                self._state_of(matrix)["share"] = row_share

    def _note_made(self, step: EigenStep, matrices: list[Matrix], row_shares: dict[Matrix, float]) -> None:
        """Notes and counts a step that was made."""
        step.note_made(row_shares)
        for matrix in matrices:
            if matrix.bias is not None:
                self.state[matrix.bias]["step"] = self.state[matrix.weight]["step"]
        self._changes.note_made(matrices)
        shared = self._shared_state()
        shared["steps"] += 1
        if shared["steps"] == SLOW:
            self._rate_reader.warn_if_slow(self.defaults["lr"])

    # --- whether steps were made ---------------------------------------------------------------------------------------------

    def _is_reported(self, control: Tensor) -> bool:
        """Returns whether steps are taken for made, as on CUDA; reports of them tell later whether they were."""
        return control.is_cuda and self._shards is None  # ranks that share rows wait for each other, and all raise at once

    def _read_reports(self) -> None:
        """Learns on CUDA which of the steps before this one were made, as far as the device has told by now.

        Raises:
            NonFiniteError: one was not made, with nonfinite="error".
        """
        # Ranks must count alike, so that what they wait for is not what happens to be there.
        newest = 0 if self._replays else 1 if self._is_distributed else None
        self._reports.settle(self._shared_state(), self.state, newest)
        if self._replays:  # they send no report
            self._reports.look(self._shared_state())
        self._tell_of_refused()

    def _tell_of_refused(self) -> None:
        """Raises NonFiniteError where a refused step was found since this was last called, with nonfinite="error"."""
        if self._reports.tell() and self._nonfinite == "error":
            rates = any(self._on_device(group["lr"]) for group in self.param_groups)  # which no step reads on the host
            raise NonFiniteError(
                f"{type(self).__name__}.step(): expected finite gradients, got NaN or inf, or numbers whose squares are"
                f"{', or a learning rate that is negative or not finite' if rates else ''}; no parameter and no state has changed"
            )

    def _settle(self) -> None:
        """Waits for the reports of all steps; of a refused one the next step tells."""
        if self._reports:
            self._reports.settle(self._shared_state(), self.state, newest=0)
        super()._settle()

    def _restore(self, state_dict: dict[str, Any]) -> None:
        super()._restore(state_dict)
        self._reports = StepReports()

    @property
    def skipped_steps(self) -> int:
        """Returns how many steps were not made since a gradient was not finite. Part of the state_dict; waits for the device."""
        return int(self._shared_state()["control"][REFUSED])

    # --- what it warns of ----------------------------------------------------------------------------------------------------

    def _tell_of_no_gradients(self) -> None:
        """Raises if no step has found a gradient yet; later, when a batch may have nothing to learn from, warns once."""
        problem = f"{type(self).__name__}.step(): expected gradients, found none"
        if not self._steps():
            raise RuntimeError(
                f"{problem}; call loss.backward() first. The parameters must be those of the loss: a model may have got new ones "
                "since, as by to_empty() or load_state_dict(assign=True)"
            )
        self._warn_once(
            "no gradients",
            f"{problem}, and left all parameters as they are. If the model has got new ones since, as by "
            "load_state_dict(assign=True), make a new optimizer.",
        )

    def _warn_of_unseen(self, layers: list[str]) -> None:
        """Warns once of layers whose inputs are not seen any more."""
        if layers:
            self._warn_once(
                "unseen",
                f"{type(self).__name__} sees no inputs of {', '.join(layers)}: the layers run in a compiled graph or under "
                "torch.func or torch.no_grad, have been pruned, parametrized or given another forward since the optimizer was "
                "made, are not called as modules, or get sparse or nested inputs. Their bases are those of their gradients.",
            )

    def _warn_of_growth(self, loss: Any) -> None:
        """Warns once of a closure's loss that has grown a thousandfold."""
        if isinstance(loss, float) or (isinstance(loss, Tensor) and loss.numel() == 1 and not captured_now()):
            self._growth.observe(-loss if self._maximize() else loss)

    def metrics(self) -> dict[str, float]:
        """Returns numbers worth logging. Waits for the device; a step does not compute them.

        Returns:
            "length": the step length, without lr. "slope": the average slope along the present step, per step length.
            "slope_ratio": the average slope along the step before over "slope", -1 to 1 or so. From the 15th step on steps grow
            where it is above 0.1, until there are 25 oscillations, and shrink where it is below -0.6.
            "oscillations": how many steps had a negative slope along the step before. "rank": how many directions the
            bases of matrices have, the mean over their sides. "coverage": the share of all numbers with a gradient so far that
            belong to matrices with bases, rather than follow Adam's rule. "seen": the share of these matrices whose inputs the
            last renewal has seen. "captured": the share of a gradient's mean square that lies in the basis of either side, the
            mean over these matrices. "skipped_steps": how many steps were not made. All but "length" are 0 before the first
            step.
        """
        entries = self._shared_state()["control"].tolist()
        stepped = [(m, self.state[m.weight]) for m in self._matrices if "basis_out" in self.state.get(m.weight, {})]
        of_bases = [(matrix, state) for matrix, state in stepped if matrix.has_bases]
        ranks = [len(state[side]) for _, state in of_bases for side in ("basis_out", "basis_in")]
        in_bases = [(share_in_bases if self._shards is None else local_share_in_bases)(*each) for each in of_bases]
        shares = [share for share in in_bases if share is not None]
        return {
            "length": eigen_length(entries),
            "slope": entries[SLOPE],
            "slope_ratio": entries[LAST_SLOPE] / (abs(entries[SLOPE]) or 1.0),
            "oscillations": entries[OSCILLATIONS],
            "rank": sum(ranks) / max(len(ranks), 1),
            "coverage": sum(matrix.numel for matrix, _ in of_bases) / max(sum(matrix.numel for matrix, _ in stepped), 1),
            "seen": sum(state["renewals"] > 0 and not state["unseen"] for _, state in of_bases) / max(len(of_bases), 1),
            "captured": float(torch.stack(shares).mean()) if shares else 0.0,
            "skipped_steps": entries[REFUSED],
        }
